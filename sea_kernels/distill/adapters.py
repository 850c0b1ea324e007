"""1x1 convolutions that bring a student's maps to the teacher's channels."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def make(own: int | Sequence[int], target: int | Sequence[int], **options: Any) -> nn.Module:
    """One for all levels, or a list with one for each. Levels whose channels are equal need none."""
    if isinstance(own, int) and isinstance(target, int):
        return nn.Conv2d(own, target, 1, **options)
    count = len(target if isinstance(own, int) else own)
    own, target = ([x] * count if isinstance(x, int) else list(x) for x in (own, target))
    if len(own) != len(target):
        raise ValueError(f"channels are {own} for the student and {target} for the teacher; expected as many levels")
    return nn.ModuleList(nn.Identity() if a == b else nn.Conv2d(a, b, 1, **options) for a, b in zip(own, target))


def adapt(adapter: nn.Module, maps: list[Tensor]) -> list[Tensor]:
    """The maps `[B, C, H_l, W_l]` of all levels, in the adapter's dtype unless autocast chooses one."""
    levels = adapter if isinstance(adapter, nn.ModuleList) else [adapter] * len(maps)
    if len(levels) != len(maps):
        raise ValueError(f"there are {len(maps)} maps; expected {len(levels)}, as channels= has for each level")
    out = []
    for layer, x in zip(levels, maps):
        as_it_is = isinstance(layer, nn.Identity) or torch.is_autocast_enabled(x.device.type)
        out.append(layer(x if as_it_is else x.to(layer.weight.dtype)))
    return out
