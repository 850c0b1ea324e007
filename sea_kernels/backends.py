"""The interface between the public functions and their backends: the compiled kernels or plain PyTorch.

A backend is a :class:`Backend`. It gets arguments that are already checked. It registers itself here, so that callers
do not have to import it.
"""

import functools
import inspect
import os
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

ANCHOR, DISTANCE, LOCALIZATION = 1, 2, 4  # loss flags: the losses that a set of maps takes part in

_P, _R = ParamSpec("_P"), TypeVar("_R")


@dataclass(frozen=True)
class Options:
    """The options of one call of the losses."""

    losses: tuple[int, ...]  # loss flags of each set of maps
    distance_temperature: float = 0.1
    localization_temperature: float = 1.0
    detach_anchors: bool = False


class Backend(NamedTuple):
    """The functions of a backend. B images, L levels, S sets of maps; anchors are summed over `regions.group`."""

    name: str
    # (boxes: RasterInput, validate) -> a function of `present`. It returns the tensors of Regions, classes to
    # dense, for the categories that the boxes show (present = None) or for those of a tensor bool [num_classes].
    rasterizer: Callable[..., Callable]
    # (instance masks of each image, boxes: RasterInput) -> the same; the boxes are those around the masks.
    mask_rasterizer: Callable[..., Callable]
    # (features, regions) -> [L, P, C]: the share of this rank's images in the anchors. Differentiable.
    anchor_pool: Callable[..., Any]
    # (features, anchors, regions) -> L maps [B, P, H, W]. Differentiable.
    anchor_cosine: Callable[..., Any]
    # (student: S sets of L maps, teacher, regions or None, Options) -> (anchor, distance, localization): pools the
    # anchors, sums them over the ranks, and compares. The last two losses are those of this rank's pixels and images.
    losses: Callable[..., Any]


_NAMES = ("native", "reference")
_registered: dict[str, Backend] = {}


def register(backend: Backend) -> None:
    _registered[backend.name] = backend


def _check(name: str, source: str) -> str:
    if name not in _NAMES:
        raise ValueError(f"{source} is {name!r}; expected one of {', '.join(_NAMES)}")
    return name


# One value for the process, a plain global: torch.compile guards on it and compiles again when it changes.
_current = _check(os.environ.get("SEA_KERNELS_BACKEND", "native"), "SEA_KERNELS_BACKEND")


def current_backend() -> str:
    return _current


def implementation() -> Backend:
    """The current backend."""
    return _registered[_current]


@contextmanager
def backend(name: str):
    """Within this context, for the whole process: "native" runs the compiled kernels, "reference" plain PyTorch.

    The value is read in forward. The environment variable SEA_KERNELS_BACKEND sets it from outside.

    Example:
        >>> import sea_kernels as sk, torch
        >>> maps = [torch.randn(1, 8, 4, 4)]
        >>> with sk.backend("reference"):
        ...     loss = sk.localization_alignment_loss(maps, maps)
        >>> loss.item()
        0.0
    """
    global _current
    before, _current = _current, _check(name, "backend")
    try:
        yield
    finally:
        _current = before


def on_current_backend(function: Callable[Concatenate[Backend, _P], _R]) -> Callable[_P, _R]:
    """`function(backend, ...)` as a public function, which uses the current backend."""

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        return function(_registered[_current], *args, **kwargs)

    signature = inspect.signature(function)
    call.__signature__ = signature.replace(parameters=list(signature.parameters.values())[1:])
    return call


def on(backend: Backend, public: Callable[_P, _R]) -> Callable[_P, _R]:
    """A public function that always uses the given backend, whatever the current one is."""

    @functools.wraps(public)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        return public.__wrapped__(backend, *args, **kwargs)

    return call  # with the signature of `public`, which wraps() copies
