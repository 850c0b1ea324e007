"""Fused kernels for the losses of SEA distillation (arXiv 2203.00862)."""

from typing import TYPE_CHECKING

from . import native, plot, reference, taps  # noqa: F401  native registers itself
from .backends import backend
from .distill import Schedule
from .losses import (
    SEALoss,
    anchor_cosine,
    anchor_loss,
    anchor_pool,
    localization_alignment_loss,
    sea_loss,
    topological_distance_loss,
)
from .native.library import build_info
from .regions import Regions

if TYPE_CHECKING:
    from .distill.distiller import SEADistiller

__version__ = "0.1.0"

__all__ = [
    "Regions",
    "SEADistiller",
    "SEALoss",
    "Schedule",
    "anchor_cosine",
    "anchor_loss",
    "anchor_pool",
    "backend",
    "build_info",
    "localization_alignment_loss",
    "plot",
    "reference",
    "sea_loss",
    "taps",
    "topological_distance_loss",
]


def __getattr__(name: str):
    if name != "SEADistiller":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .distill.distiller import SEADistiller  # it imports torch._dynamo, which takes more than a second

    return SEADistiller
