"""The specification of the losses in plain PyTorch, on any device: what :class:`sea_kernels.backends.Backend` asks for.

Nothing here synchronizes with the host. Maps are taken as `[B, C, N]` with `N = H * W` pixels, masks as `[B, P, N]`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends import ANCHOR, DISTANCE, LOCALIZATION, Options
from ..checks import compute_dtype
from ..regions import Regions
from .raster import inside

Masks = list[tuple[Tensor, Tensor]]


def anchor_pool(features: list[Tensor], regions: Regions) -> Tensor:
    dtype = compute_dtype(features)
    masks = _masks(regions, dtype)
    return _pool(_pixels(features, masks, dtype), masks, regions)


def anchor_cosine(features: list[Tensor], anchors: Tensor, regions: Regions) -> list[Tensor]:
    anchors = torch.where(regions.area.unsqueeze(-1) > 0, anchors, 0)
    return [_cosine(x.flatten(2).to(a.dtype), a).unflatten(2, x.shape[2:]) for x, a in zip(features, anchors)]


def losses(
    student: Sequence[list[Tensor]], teacher: Sequence[list[Tensor]], regions: Regions | None, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = compute_dtype(*student, *teacher)
    anchor = distance = localization = student[0][0].new_zeros((), dtype=dtype)
    masks = None
    for flags, s, t in zip(options.losses, student, teacher):
        t = [x.detach() for x in t]
        if flags & LOCALIZATION:
            localization = localization + _localization_term(s, t, regions, options.localization_temperature, dtype)
        if not flags & (ANCHOR | DISTANCE):
            continue
        masks = masks or _masks(regions, dtype)
        s, t = _pixels(s, masks, dtype), _pixels(t, masks, dtype)
        # Pool, sum over the ranks, compare.
        anchors_s, anchors_t = regions._sum(_pool(s, masks, regions)), regions._sum(_pool(t, masks, regions))
        if flags & ANCHOR:
            anchor = anchor + _anchor_term(anchors_s, anchors_t, regions)
        if flags & DISTANCE:
            anchors_s = anchors_s.detach() if options.detach_anchors else anchors_s
            distance = distance + _distance_term(s, t, anchors_s, anchors_t, regions, options.distance_temperature)
    return anchor, distance, localization


def _masks(regions: Regions, dtype: torch.dtype) -> Masks:
    """Of every level the masks as weights [B, P, N], and whether a pixel lies in any of them, bool [B, 1, N]."""
    masks = [regions.masks(i).flatten(2).transpose(0, 1) for i in range(len(regions.level_shapes))]
    return [(m.to(dtype), m.any(1, keepdim=True)) for m in masks]


def _pixels(maps: list[Tensor], masks: Masks, dtype: torch.dtype) -> list[Tensor]:
    """[B, C, N] of every level, with zero at the pixels of no mask, which must not be read (0 * NaN is NaN)."""
    return [torch.where(any_mask, x.flatten(2).to(dtype), 0) for x, (_, any_mask) in zip(maps, masks)]


def _pool(pixels: list[Tensor], masks: Masks, regions: Regions) -> Tensor:
    """[L, P, C]: a[l, p] = sum_u m_p(u) F_l(u) / area[l, p], zero where the area is zero"""
    with torch.autocast(pixels[0].device.type, enabled=False):
        sums = torch.stack([torch.einsum("bpn,bcn->bpc", m, x).sum(0) for x, (m, _) in zip(pixels, masks)])
    area = regions.area.to(sums.dtype).unsqueeze(-1)
    return torch.where(area > 0, sums / area.clamp(min=1), 0)


def _inverse_norm(x: Tensor, dim: int) -> Tensor:
    """1 / |x|, and 0 without a gradient where |x| <= 1e-12; NaN stays NaN"""
    norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True)
    zero = norm <= 1e-12
    return torch.where(zero, 0, 1 / torch.where(zero, 1, norm))


def _cosine(x: Tensor, anchors: Tensor) -> Tensor:
    """[B, P, N]: cos(F(u), a_p) of one level; x [B, C, N], anchors [P, C]"""
    h = anchors * _inverse_norm(anchors, 1)
    with torch.autocast(x.device.type, enabled=False):
        return torch.bmm(h.expand(x.shape[0], -1, -1), x) * _inverse_norm(x, 1)


def _kl(student: Tensor, teacher: Tensor, left_out: Tensor | None, dim: int) -> Tensor:
    """Sum of all KL(softmax(teacher) || softmax(student)), the softmax being over the entries of `dim` not left out.

    Where all are left out both distributions are uniform: their divergence is 0.
    """
    if left_out is not None:
        lowest = torch.finfo(student.dtype).min  # not -inf: 0 * (inf - inf) would be NaN
        student, teacher = student.masked_fill(left_out, lowest), teacher.masked_fill(left_out, lowest)
    log_s, log_t = student.log_softmax(dim), teacher.log_softmax(dim)
    return (log_t.exp() * (log_t - log_s)).sum()


def _anchor_term(student: Tensor, teacher: Tensor, regions: Regions) -> Tensor:
    """sum_l mean_{p: area > 0} mean_c (aS - aT)^2; anchors [L, P, C]"""
    present = regions.area > 0
    errors = torch.where(present, (student - teacher).square().mean(2), 0).sum(1)
    return (errors / present.sum(1).clamp(min=1)).sum()


def _distance_term(
    student: list[Tensor],
    teacher: list[Tensor],
    student_anchors: Tensor,
    teacher_anchors: Tensor,
    regions: Regions,
    temperature: float,
) -> Tensor:
    """sum_l mean_u KL(qT(u) || qS(u)); a pixel that is not valid is zero on both sides, so both q are uniform there"""
    loss = 0
    empty = (regions.area == 0).unsqueeze(-1)
    for i, (s, t) in enumerate(zip(student, teacher)):
        z_s, z_t = _cosine(s, student_anchors[i]) / temperature, _cosine(t, teacher_anchors[i]) / temperature
        loss = loss + _kl(z_s, z_t, empty[i], dim=1) / regions.counted[i].clamp(min=1)
    return loss


def _localization_term(
    student: list[Tensor], teacher: list[Tensor], regions: Regions | None, temperature: float, dtype: torch.dtype
) -> Tensor:
    """sum_l temperature^2 / (B C) * sum_{b,c} KL(pT || pS), p = softmax over the positions of X / temperature"""
    loss = 0
    for i, (s, t) in enumerate(zip(student, teacher)):
        beyond = None
        if regions is not None:
            rows, columns = regions.extent[i].unbind(1)
            zero = torch.zeros_like(rows)
            beyond = ~(inside(zero, rows, s.shape[2]).unsqueeze(2) & inside(zero, columns, s.shape[3]).unsqueeze(1))
            beyond = beyond.flatten(1).unsqueeze(1)
        z_s, z_t = s.flatten(2).to(dtype) / temperature, t.detach().flatten(2).to(dtype) / temperature
        loss = loss + _kl(z_s, z_t, beyond, dim=2) * (temperature**2 / max(s.shape[0] * s.shape[1], 1))
    return loss
