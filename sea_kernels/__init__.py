"""Fused kernels for the losses of SEA distillation (arXiv 2203.00862)."""

from . import native, plot, reference, taps  # noqa: F401  native registers itself
from .backends import backend
from .distill import Schedule, SEADistiller
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
