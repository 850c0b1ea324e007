"""The specification in code: every function of the package in plain PyTorch, on any device.

Nothing here synchronises with the host. Maps are taken as `[B, C, N]` with `N = H * W` pixels, masks as `[B, P, N]`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from . import checks, distributed
from .regions import Regions

__all__ = [
    "Regions",
    "SEALoss",
    "anchor_cosine",
    "anchor_loss",
    "anchor_pool",
    "localization_alignment_loss",
    "sea_loss",
    "topological_distance_loss",
]

Maps = Sequence[Tensor] | Sequence[Sequence[Tensor]]


class SEALoss(NamedTuple):
    """The three losses of one step, unweighted scalars."""

    anchor: Tensor
    distance: Tensor
    localization: Tensor


# ---------------------------------------------------------------------------------------------------------- regions


def _inside(first: Tensor, end: Tensor, size: int) -> Tensor:
    """bool [..., size]: which u of 0 .. size - 1 have first <= u < end; they may be huge, so clamped as floats"""
    u = torch.arange(size, device=first.device)
    return (u >= first.clamp(0, size).long().unsqueeze(-1)) & (u < end.clamp(0, size).long().unsqueeze(-1))


def _span(low: Tensor, high: Tensor, stride: Tensor, size: int) -> Tensor:
    """bool [..., size]: the rows (or columns) of a map that low .. high in pixels of the input covers"""
    first = (low / stride).floor()
    return _inside(first, torch.maximum((high / stride).ceil(), first + 1), size)


def _cover(boxes: Tensor, shape: tuple[int, int], stride: tuple[Tensor, Tensor]) -> Tensor:
    """bool [G, H, W]: the pixels that each box covers"""
    x1, y1, x2, y2 = boxes.unbind(1)
    rows, columns = _span(y1, y2, stride[0], shape[0]), _span(x1, x2, stride[1], shape[1])
    return rows.unsqueeze(2) & columns.unsqueeze(1)


def _cover_masks(masks: Tensor, shape: tuple[int, int], stride: tuple[Tensor, Tensor]) -> Tensor:
    """bool [G, H, W]: the pixels that each instance covers; masks float32 [G, H_b, W_b], above zero in the instance

    A matrix product: rows[y, i] says that row y of the mask covers row i of the map. A sum of non-negative numbers
    that are not all zero is not rounded to zero, so whether it is above zero is exact, TF32 or not.
    """
    pixels = [torch.arange(n, dtype=stride[0].dtype, device=masks.device) for n in masks.shape[1:]]
    rows, columns = (_span(u, u + 1, s, n).float() for u, s, n in zip(pixels, stride, shape))
    with torch.autocast(masks.device.type, enabled=False):
        return rows.t() @ (masks @ columns) > 0


def _bounds(masks: Tensor) -> Tensor:
    """[G, 4]: the bounding box x1 y1 x2 y2 of each mask; anything for an empty one"""
    found = []
    for used in (masks.any(1), masks.any(2)):  # columns, rows
        before, after = ((x.cumsum(1) == 0).sum(1) for x in (used, used.flip(1)))
        found.append((before, used.shape[1] - after))
    (x1, x2), (y1, y2) = found
    return torch.stack([x1, y1, x2, y2], dim=1)


def _image_of(batch_index: Tensor | None, counts: Sequence[int], device: torch.device) -> Tensor:
    if batch_index is not None:
        return batch_index
    return torch.cat([torch.full((n,), b, device=device) for b, n in enumerate(counts)])


def _levels(
    level_shapes: Sequence[int], strides: Sequence[float], like: Tensor
) -> list[tuple[tuple[int, int], tuple[Tensor, Tensor]]]:
    """(shape, stride) of every level, strides in the dtype to compute in

    They are tensors, because a division by a Python number may be a multiplication by its reciprocal.
    """
    return [
        (tuple(level_shapes[i : i + 2]), tuple(like.new_full((), s) for s in strides[i : i + 2]))
        for i in range(0, len(level_shapes), 2)
    ]


def _usable(boxes: Tensor, image: Tensor, batch_size: int) -> Tensor:
    """bool [G]: finite, not inverted, of an image of the batch; anything else is skipped"""
    in_batch = (image >= 0) & (image < batch_size)
    return in_batch & boxes.isfinite().all(1) & (boxes[:, 2:] >= boxes[:, :2]).all(1)


def rasterize(
    boxes: Tensor,
    labels: Tensor,
    batch_index: Tensor | None,
    counts: Sequence[int],
    ignore_boxes: Tensor | None,
    ignore_batch_index: Tensor | None,
    ignore_counts: Sequence[int],
    image_sizes: Tensor | None,
    image_size_list: Sequence[int],
    batch_size: int,
    level_shapes: Sequence[int],
    strides: Sequence[float],
    num_classes: int,
    center_ratio: float,
    present: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
    """The operator `rasterize`: (classes, area, counted, extent, dense masks of every level), as in `Regions`.

    present: bool [num_classes], the categories that get rows whether boxes show them or not, so that K = num_classes.
    """
    image = _image_of(batch_index, counts, boxes.device)
    usable = (labels >= 0) & (labels < num_classes) & _usable(boxes, image, batch_size)
    boxes = torch.where(usable.unsqueeze(1), boxes, 0)
    ignored = None
    if ignore_boxes is not None:
        ignored = ignore_boxes, _image_of(ignore_batch_index, ignore_counts, boxes.device)
    levels = _levels(level_shapes, strides, boxes)
    covers = [_cover(boxes, *level) for level in levels]
    sizes = image_sizes, image_size_list
    return _assemble(
        covers, boxes, usable, labels, image, ignored, *sizes, batch_size, levels, num_classes, center_ratio, present
    )


def mask_rasterizer(
    masks: Sequence[Tensor],
    labels: Tensor,
    ignore_boxes: Tensor | None,
    ignore_counts: Sequence[int],
    image_sizes: Tensor | None,
    image_size_list: Sequence[int],
    level_shapes: Sequence[int],
    strides: Sequence[float],
    num_classes: int,
    center_ratio: float,
) -> Callable[[Tensor | None], tuple]:
    """Gives what `rasterize` returns, of its last argument, for instance masks [G_b, H_b, W_b] of each image.

    Labels are packed [G].

    No operator: this is the specification and the implementation of either backend.
    """
    image = _image_of(None, [len(m) for m in masks], labels.device)
    filled = torch.cat([m.flatten(1).any(1).bool() for m in masks])  # any of uint8 is uint8
    usable = (labels >= 0) & (labels < num_classes) & filled
    boxes = torch.cat([_bounds(m) for m in masks]).to(torch.float32 if ignore_boxes is None else ignore_boxes.dtype)
    ignored = None if ignore_boxes is None else (ignore_boxes, _image_of(None, ignore_counts, labels.device))
    levels = _levels(level_shapes, strides, boxes)
    covers = []
    for m in masks:  # an image at a time: its masks in float32 are the most memory that this takes
        m = m.float()
        covers.append([_cover_masks(m, *level) for level in levels])
    covers = [torch.cat(level) for level in zip(*covers)]
    sizes = image_sizes, image_size_list
    return partial(
        _assemble,
        *(covers, boxes, usable, labels, image, ignored, *sizes, len(masks), levels, num_classes, center_ratio),
    )


def _assemble(
    covers: Sequence[Tensor],
    boxes: Tensor,
    usable: Tensor,
    labels: Tensor,
    image: Tensor,
    ignored: tuple[Tensor, Tensor] | None,
    image_sizes: Tensor | None,
    image_size_list: Sequence[int],
    batch_size: int,
    levels: Sequence[tuple[tuple[int, int], tuple[Tensor, Tensor]]],
    num_classes: int,
    center_ratio: float,
    also: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
    """What `rasterize` returns, of the pixels that each instance covers on every level, bool [G, H_l, W_l].

    The boxes give the centres. `ignored`: ignore boxes, and whose image each is. `also`: see `rasterize`, `present`.
    """
    device = boxes.device
    # A skipped row points at the spare entry `num_classes`, an absent category at the spare entry K.
    capacity = min(boxes.shape[0], num_classes) if also is None else num_classes
    labels = torch.where(usable, labels, num_classes)
    present = torch.zeros(num_classes + 1, dtype=torch.bool, device=device).scatter(0, labels, True)[:-1]
    present = present if also is None else present | also
    rank = torch.where(present, present.cumsum(0) - 1, capacity)
    classes = torch.full((capacity + 1,), -1, device=device)
    classes = classes.scatter(0, rank, torch.arange(num_classes, device=device))[:-1]
    # Row of (centre mask of the box's category, its image) among P x B. A skipped row has no pixel, so any row will do.
    slot = (1 + 2 * torch.where(usable, rank[labels.clamp(max=num_classes - 1)], 0)) * batch_size
    slot = slot + torch.where(usable, image, 0)

    x1, y1, x2, y2 = boxes.unbind(1)
    cx, cy = (x1 + x2) / 2, (y1 + y2) / 2
    rx, ry = center_ratio * (x2 - x1) / 2, center_ratio * (y2 - y1) / 2
    centers = torch.stack([cx - rx, cy - ry, cx + rx, cy + ry], dim=1)
    has_center = centers.isfinite().all(1)  # may overflow
    centers = torch.where(has_center.unsqueeze(1), centers, 0)

    if ignored is not None:
        ignore_boxes, ignore_image = ignored
        ignore = _usable(ignore_boxes, ignore_image, batch_size)
        ignore_boxes = torch.where(ignore.unsqueeze(1), ignore_boxes, 0)
        ignore_image = torch.where(ignore, ignore_image, 0)
    if image_sizes is None and len(image_size_list) > 0:
        # Filled number by number: a tensor made of a list would be a copy to the device.
        image_sizes = torch.cat([boxes.new_full((1,), n) for n in image_size_list]).view(batch_size, 2)

    area, counted, extent, dense = [], [], [], []
    for instance, ((h, w), stride) in zip(covers, levels):
        if image_sizes is None:
            ends = [boxes.new_full((batch_size,), n) for n in (h, w)]
        else:
            sizes = image_sizes.to(boxes.dtype).unbind(1)
            ends = [(size / s).ceil().clamp(0, n) for size, s, n in zip(sizes, stride, (h, w))]
        zero = torch.zeros_like(ends[0])
        in_image = _inside(zero, ends[0], h).unsqueeze(2) & _inside(zero, ends[1], w).unsqueeze(1)

        instance = instance & usable.view(-1, 1, 1)
        center = _cover(centers, (h, w), stride) & has_center.view(-1, 1, 1) & instance
        # The sum of bools is their union.
        masks = torch.zeros((1 + 2 * capacity) * batch_size, h, w, dtype=torch.bool, device=device)
        masks = masks.index_add(0, slot, center).index_add(0, slot + batch_size, instance & ~center)
        masks = masks.view(1 + 2 * capacity, batch_size, h, w) & in_image
        in_instance = masks.any(0)
        background = in_image & ~in_instance
        if ignored is not None:
            crowd = _cover(ignore_boxes, (h, w), stride) & ignore.view(-1, 1, 1)
            background = background & ~torch.zeros_like(background).index_add(0, ignore_image, crowd)
        masks = torch.cat([background.unsqueeze(0), masks[1:]])

        dense.append(masks)
        area.append(masks.sum((1, 2, 3)).to(torch.float32))
        counted.append((in_instance | background).sum().to(torch.float32))
        extent.append(torch.stack(ends, dim=1).to(torch.int32))
    return classes, torch.stack(area), torch.stack(counted), torch.stack(extent), tuple(dense)


# ------------------------------------------------------------------------------------------------------------ parts


def _masks(regions: Regions, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Of every level the masks as weights [B, P, N], and whether a pixel lies in any of them, bool [B, 1, N]."""
    masks = [regions.masks(i).flatten(2).transpose(0, 1) for i in range(len(regions.level_shapes))]
    return [(m.to(dtype), m.any(1, keepdim=True)) for m in masks]


def _pixels(maps: list[Tensor], masks: list[tuple[Tensor, Tensor]], dtype: torch.dtype) -> list[Tensor]:
    """[B, C, N] of every level, with zero at the pixels of no mask, which must not be read (0 * NaN is NaN)."""
    return [torch.where(any_mask, x.flatten(2).to(dtype), 0) for x, (_, any_mask) in zip(maps, masks)]


def _pool(pixels: list[Tensor], masks: list[tuple[Tensor, Tensor]], regions: Regions) -> Tensor:
    """[L, P, C]: a[l, p] = sum_u m_p(u) F_l(u) / area[l, p], zero where the area is zero"""
    with torch.autocast(pixels[0].device.type, enabled=False):
        sums = torch.stack([torch.einsum("bpn,bcn->bpc", m, x).sum(0) for x, (m, _) in zip(pixels, masks)])
    area = regions.area.to(sums.dtype).unsqueeze(-1)
    return distributed.differentiable_sum(torch.where(area > 0, sums / area.clamp(min=1), 0), regions.group)


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


def _pool_pair(
    student: list[Tensor],
    teacher: list[Tensor],
    masks: list[tuple[Tensor, Tensor]],
    regions: Regions,
    dtype: torch.dtype,
) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    """(student's pixels, teacher's pixels, student's anchors, teacher's anchors) of one set of maps"""
    s, t = _pixels(student, masks, dtype), _pixels([x.detach() for x in teacher], masks, dtype)
    return s, t, _pool(s, masks, regions), _pool(t, masks, regions)


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
    """sum_l mean_u KL(qT(u) || qS(u)); an uncounted pixel is zero on both sides, so both q are uniform there"""
    loss = 0
    empty = (regions.area == 0).unsqueeze(-1)
    for i, (s, t) in enumerate(zip(student, teacher)):
        z_s, z_t = _cosine(s, student_anchors[i]) / temperature, _cosine(t, teacher_anchors[i]) / temperature
        loss = loss + _kl(z_s, z_t, empty[i], dim=1) / regions.counted[i].clamp(min=1)
    return loss if regions.group is None else loss * regions.group.size


def _localization_term(
    student: list[Tensor], teacher: list[Tensor], regions: Regions | None, temperature: float, dtype: torch.dtype
) -> Tensor:
    """sum_l temperature^2 / (B*C) * sum_{b,c} KL(pT || pS), p = softmax over the positions of X / temperature"""
    loss = 0
    for i, (s, t) in enumerate(zip(student, teacher)):
        beyond = None
        if regions is not None:
            rows, columns = regions.extent[i].unbind(1)
            zero = torch.zeros_like(rows)
            beyond = ~(_inside(zero, rows, s.shape[2]).unsqueeze(2) & _inside(zero, columns, s.shape[3]).unsqueeze(1))
            beyond = beyond.flatten(1).unsqueeze(1)
        z_s, z_t = s.flatten(2).to(dtype) / temperature, t.detach().flatten(2).to(dtype) / temperature
        loss = loss + _kl(z_s, z_t, beyond, dim=2) * (temperature**2 / max(s.shape[0] * s.shape[1], 1))
    return loss if regions is None or regions.group is None else loss * localization_share(regions, dtype)


def localization_share(regions: Regions, dtype: torch.dtype) -> Tensor:
    """[]: makes world / (images of all ranks) of 1 / (images of this rank)"""
    return (regions.group.size * regions.batch_size / regions.images.clamp(min=1)).to(dtype)


def _sets(
    student_name: str, student: Maps, teacher_name: str, teacher: Maps
) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    student, teacher = checks.pyramid(student_name, student), checks.pyramid(teacher_name, teacher)
    checks.match(student_name, student, teacher_name, teacher)
    return student, teacher


# ------------------------------------------------------------------------------------------------- public functions


def _compare(call: str, regions: Regions, *branches: list[list[Tensor]]) -> Regions:
    """The ranks of a group compare what they call, and their channels, before anything that needs the areas is sent."""
    if regions.group is None:
        return regions
    sets = [maps for branch in branches for maps in branch]
    channels = {f"channels[{i}]": maps[0].shape[1] for i, maps in enumerate(sets)}
    call = f"{call} of the reference backend in {checks.compute_dtype(*sets)}"
    token = distributed.compare(regions.group, regions.area, call, channels)
    return dataclasses.replace(regions, area=regions.area + token)


def anchor_pool(features: Sequence[Tensor], regions: Regions) -> Tensor:
    """See :func:`sea_kernels.anchor_pool`."""
    features = checks.maps("features", features)
    checks.regions("regions", regions, "features", [features])
    regions = _compare("anchor_pool", regions, [features])
    dtype = checks.compute_dtype(features)
    masks = _masks(regions, dtype)
    return _pool(_pixels(features, masks, dtype), masks, regions)


def anchor_cosine(features: Sequence[Tensor], anchors: Tensor, regions: Regions) -> list[Tensor]:
    """See :func:`sea_kernels.anchor_cosine`."""
    features = checks.maps("features", features)
    checks.regions("regions", regions, "features", [features])
    checks.anchors("anchors", anchors, regions, features)
    dtype = checks.compute_dtype(features, [anchors])
    anchors = torch.where(regions.area.unsqueeze(-1) > 0, anchors.to(dtype), 0)
    return [_cosine(x.flatten(2).to(dtype), a).unflatten(2, x.shape[2:]) for x, a in zip(features, anchors)]


def anchor_loss(student: Maps, teacher: Maps, regions: Regions) -> Tensor:
    """See :func:`sea_kernels.anchor_loss`."""
    student, teacher = _sets("student", student, "teacher", teacher)
    checks.regions("regions", regions, "student", student)
    regions = _compare("anchor_loss", regions, student)
    dtype = checks.compute_dtype(*student, *teacher)
    masks, loss = _masks(regions, dtype), 0
    for s, t in zip(student, teacher):
        _, _, a_s, a_t = _pool_pair(s, t, masks, regions, dtype)
        loss = loss + _anchor_term(a_s, a_t, regions)
    return loss


def topological_distance_loss(
    student: Maps, teacher: Maps, regions: Regions, temperature: float = 0.1, detach_anchors: bool = False
) -> Tensor:
    """See :func:`sea_kernels.topological_distance_loss`."""
    student, teacher = _sets("student", student, "teacher", teacher)
    checks.regions("regions", regions, "student", student)
    regions = _compare("topological_distance_loss", regions, student)
    temperature = checks.temperature("temperature", temperature)
    dtype = checks.compute_dtype(*student, *teacher)
    masks, loss = _masks(regions, dtype), 0
    for s, t in zip(student, teacher):
        s, t, a_s, a_t = _pool_pair(s, t, masks, regions, dtype)
        loss = loss + _distance_term(s, t, a_s.detach() if detach_anchors else a_s, a_t, regions, temperature)
    return loss


def localization_alignment_loss(
    student: Maps, teacher: Maps, regions: Regions | None = None, temperature: float = 1.0
) -> Tensor:
    """See :func:`sea_kernels.localization_alignment_loss`."""
    student, teacher = _sets("student", student, "teacher", teacher)
    if regions is not None:
        checks.regions("regions", regions, "student", student)
    temperature = checks.temperature("temperature", temperature)
    dtype = checks.compute_dtype(*student, *teacher)
    return sum(_localization_term(s, t, regions, temperature, dtype) for s, t in zip(student, teacher))


def sea_loss(
    student_cls: Maps,
    teacher_cls: Maps,
    student_box: Maps,
    teacher_box: Maps,
    regions: Regions,
    distance_temperature: float = 0.1,
    localization_temperature: float = 1.0,
    detach_anchors: bool = False,
    distance_on_box: bool = False,
    anchor_on_box: bool = True,
) -> SEALoss:
    """See :func:`sea_kernels.sea_loss`."""
    student_cls, teacher_cls = _sets("student_cls", student_cls, "teacher_cls", teacher_cls)
    student_box, teacher_box = _sets("student_box", student_box, "teacher_box", teacher_box)
    checks.regions("regions", regions, "student_cls", student_cls)
    checks.regions("regions", regions, "student_box", student_box)
    regions = _compare("sea_loss", regions, student_cls, student_box)
    distance_temperature = checks.temperature("distance_temperature", distance_temperature)
    localization_temperature = checks.temperature("localization_temperature", localization_temperature)

    dtype = checks.compute_dtype(*student_cls, *teacher_cls, *student_box, *teacher_box)
    masks, anchor, distance = _masks(regions, dtype), 0, 0
    localization = sum(
        _localization_term(s, t, regions, localization_temperature, dtype) for s, t in zip(student_box, teacher_box)
    )
    for student, teacher, with_anchor, with_distance in (
        (student_cls, teacher_cls, True, True),
        (student_box, teacher_box, anchor_on_box, distance_on_box),
    ):
        if not (with_anchor or with_distance):
            continue
        for s, t in zip(student, teacher):
            s, t, a_s, a_t = _pool_pair(s, t, masks, regions, dtype)
            if with_anchor:
                anchor = anchor + _anchor_term(a_s, a_t, regions)
            if with_distance:
                a_s = a_s.detach() if detach_anchors else a_s
                distance = distance + _distance_term(s, t, a_s, a_t, regions, distance_temperature)
    return SEALoss(anchor, distance, localization)
