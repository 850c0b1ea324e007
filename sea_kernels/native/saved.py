"""How many elements the tensors have that the losses save for backward. The only place that computes these sizes.

What lies in the tensors is up to the kernels of the device. They allocate what they are told, and check that it is what
they need. No size is branched on: torch.compile would compile a graph for either outcome.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import ANCHOR, DISTANCE, LOCALIZATION

_TILE = 64  # pixels of a tile of the CPU kernels, which save coefficients in whole tiles
# On the CPU coefficients and anchors are saved while they take at most this share of the student's maps. With the rest
# that is saved this stays below 15%. Beyond it, backward computes them again.
SHARE = (2, 15)


class Elements(NamedTuple):
    """Numbers of elements of the three tensors that are saved for backward; 0 for one that is not saved."""

    saved: int = 0
    gradients: int = 0  # of the distance loss with respect to the student's anchors; 0: the anchors get none
    softmax: int = 0  # sums of the localization loss's softmax


def elements(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    losses: Sequence[int],
    masks: int,
    detach_anchors: bool,
    share: tuple[int, int] = SHARE,
) -> Elements:
    """For sets of maps, one after the other, the loss flags of each set, and P masks per level."""
    levels, cuda = len(student) // len(losses), student[0].is_cuda
    gradients = softmax = 0
    for i, x in enumerate(student):
        flags, (batch, channels, _, _) = losses[i // levels], x.shape
        if flags & DISTANCE and not detach_anchors:
            gradients = gradients + masks * (_row(channels) if cuda else channels)
        if flags & LOCALIZATION:
            softmax = softmax + 4 * batch * channels
    own = _saved_cuda(student, teacher, losses, masks) if cuda else _saved_cpu(student, teacher, losses, masks, share)
    return Elements(own, gradients, softmax)


def anchor_elements(student: Sequence[Tensor], losses: Sequence[int], masks: int) -> int:
    """For the anchors that sea_loss_pool returns: those of both sides for a set with distances, else the difference."""
    levels = len(student) // len(losses)
    sides = [2 if flags & DISTANCE else 1 if flags & ANCHOR else 0 for flags in losses]
    return sum(n * levels * masks * student[s * levels].shape[1] for s, n in enumerate(sides))


def _row(channels: int) -> int:
    """Channels of a row on CUDA, padded to 16 bytes of half precision."""
    return (channels + 7) // 8 * 8


def _saved_cuda(student: Sequence[Tensor], teacher: Sequence[Tensor], losses: Sequence[int], masks: int) -> int:
    """With distances the unit anchors of both sides and two or four numbers per pixel; with anchors a table of them."""
    levels, total, dtype = len(student) // len(losses), 0, student[0].dtype
    half = dtype in (torch.float16, torch.bfloat16) and all(x.dtype == dtype for x in (*student, *teacher))
    for i, x in enumerate(student):
        flags, (batch, channels, height, width) = losses[i // levels], x.shape
        if flags & DISTANCE:
            total = total + 2 * masks * _row(channels) + (2 if half else 4) * batch * height * width
        if flags & ANCHOR:
            total = total + masks * _row(channels)
    return total


def _saved_cpu(
    student: Sequence[Tensor], teacher: Sequence[Tensor], losses: Sequence[int], masks: int, share: tuple[int, int]
) -> int:
    """P + 1 rows, or none beyond the share. A row has a coefficient per pixel, and two sides of channels per level."""
    if not any(flags & (ANCHOR | DISTANCE) for flags in losses):
        return 0
    levels, row, room = len(student) // len(losses), 0, 0
    for i, x in enumerate(student):
        flags, (batch, channels, height, width) = losses[i // levels], x.shape
        if flags & DISTANCE:
            row = row + (batch * height * width + _TILE - 1) // _TILE * _TILE
        if flags & (ANCHOR | DISTANCE):
            row = row + 2 * channels
        room = room + batch * channels * height * width * x.element_size()
    size = 8 if any(x.dtype == torch.float64 for x in (*student, *teacher)) else 4
    most = room * share[0] // share[1] // (size * row)
    # P + 1 rows if that is at most `most`, else none. torch.compile makes no branch of max and min. It does not trace
    # torch.sym_max of two constants (2.11).
    return max(0, min(masks + 1, (masks + 1) * (most - masks))) * row
