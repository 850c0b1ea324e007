"""The specification of the regions: which pixels of each level a box or an instance mask covers, in plain PyTorch.

Nothing here synchronizes with the host, except the check of values.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from ..boxes import RasterInput, check_boxes, check_values
from ..segmentations import Columns

Level = tuple[tuple[int, int], tuple[Tensor, Tensor]]  # shape (H, W), and stride (y, x) in the dtype to compute in


def rasterizer(given: RasterInput, validate: bool) -> Callable[[Tensor | None], tuple]:
    """`rasterize` of these boxes, as a function of `present`. See :class:`sea_kernels.backends.Backend`."""
    if not torch.compiler.is_compiling() and (validate or given.boxes.device.type == "cpu"):
        check_boxes(given)
    return partial(rasterize, given)


def inside(first: Tensor, end: Tensor, size: int) -> Tensor:
    """bool [..., size]: which u of 0 .. size - 1 have first <= u < end; they may be huge, so clamped as floats"""
    u = torch.arange(size, device=first.device)
    return (u >= first.clamp(0, size).long().unsqueeze(-1)) & (u < end.clamp(0, size).long().unsqueeze(-1))


def _ends(low: Tensor, high: Tensor, stride: Tensor) -> tuple[Tensor, Tensor]:
    """The first of the rows (or columns) of a map that low .. high in pixels of the input covers, and what follows"""
    first = (low / stride).floor()
    return first, torch.maximum((high / stride).ceil(), first + 1)


def _span(low: Tensor, high: Tensor, stride: Tensor, size: int) -> Tensor:
    """bool [..., size]: which rows (or columns) of a map those are"""
    return inside(*_ends(low, high, stride), size)


def _cover(boxes: Tensor, shape: tuple[int, int], stride: tuple[Tensor, Tensor]) -> Tensor:
    """bool [G, H, W]: the pixels that each box covers"""
    x1, y1, x2, y2 = boxes.unbind(1)
    rows, columns = _span(y1, y2, stride[0], shape[0]), _span(x1, x2, stride[1], shape[1])
    return rows.unsqueeze(2) & columns.unsqueeze(1)


def _cover_masks(sums: Tensor, shape: tuple[int, int], stride: tuple[Tensor, Tensor]) -> Tensor:
    """bool [G, H, W]: the pixels that each instance covers

    sums: int32 [G, H_b, W_b + 1], the number of pixels of the instance in the first x columns of each row.
    """
    taken = _any_within(sums, 2, stride[1], shape[1])
    return _any_within(_sums(taken, 1), 1, stride[0], shape[0])


def _sums(filled: Tensor, dim: int) -> Tensor:
    """int32, one longer in that dimension: how many of the first u entries are True"""
    padding = (1, 0) if dim == 2 else (0, 0, 1, 0)
    return torch.nn.functional.pad(filled, padding).cumsum(dim, dtype=torch.int32)


def _any_within(sums: Tensor, dim: int, stride: Tensor, size: int) -> Tensor:
    """bool, of that size in that dimension: for each row (or column) of a map, whether what covers it has an instance

    Those that cover it lie side by side, as the first and the last that u covers never decrease with u.
    """
    u = torch.arange(sums.shape[dim] - 1, dtype=stride.dtype, device=sums.device)
    covers = torch.nn.functional.pad(_span(u, u + 1, stride, size), (0, 0, 0, 1))  # of nothing, argmax has no value
    start = covers.int().argmax(0)
    return sums.index_select(dim, start + covers.sum(0)) > sums.index_select(dim, start)


def _cover_columns(columns: Columns, shape: tuple[int, int], stride: tuple[Tensor, Tensor]) -> Tensor:
    """The same for masks as columns of pixels: each run of pixels covers a rectangle, and they are added up."""
    g, x, y1, y2 = columns.runs.unbind(1)
    (left, right), (top, _), (_, bottom) = (
        [end.clamp(max=n).long() for end in _ends(u.to(s.dtype), u.to(s.dtype) + 1, s)]
        for u, s, n in ((x, stride[1], shape[1]), (y1, stride[0], shape[0]), (y2 - 1, stride[0], shape[0]))
    )
    sums = torch.zeros(columns.count, shape[0] + 1, shape[1] + 1, dtype=torch.int32, device=g.device)
    for y, x, sign in ((top, left, 1), (top, right, -1), (bottom, left, -1), (bottom, right, 1)):
        sums.index_put_((g, y, x), torch.full_like(g, sign, dtype=torch.int32), accumulate=True)
    return sums.cumsum(1, dtype=torch.int32).cumsum(2, dtype=torch.int32)[:, :-1, :-1] > 0


def _bounds(masks: Tensor | Columns) -> Tensor:
    """[G, 4]: the bounding box x1 y1 x2 y2 of each mask; anything for an empty one"""
    if isinstance(masks, Columns):
        g, x, y1, y2 = masks.runs.unbind(1)
        none = torch.zeros(masks.count, dtype=torch.int64, device=g.device)
        ends = ((x, "amin"), (y1, "amin"), (x + 1, "amax"), (y2, "amax"))
        return torch.stack([none.scatter_reduce(0, g, u, least, include_self=False) for u, least in ends], dim=1)
    found = []
    for used in (masks.any(1), masks.any(2)):  # columns, rows
        before, after = ((x.cumsum(1) == 0).sum(1) for x in (used, used.flip(1)))
        found.append((before, used.shape[1] - after))
    (x1, x2), (y1, y2) = found
    return torch.stack([x1, y1, x2, y2], dim=1)


def _filled(masks: Tensor | Columns) -> Tensor:
    """bool [G]: which masks have a pixel"""
    if isinstance(masks, Columns):
        g = masks.runs[:, 0]
        return torch.zeros(masks.count, dtype=torch.bool, device=g.device).index_fill(0, g, True)
    return masks.flatten(1).any(1).bool()  # any of uint8 is uint8


def _image_of(batch_index: Tensor | None, counts: Sequence[int], device: torch.device) -> Tensor:
    if batch_index is not None:
        return batch_index
    return torch.cat([torch.full((n,), b, device=device) for b, n in enumerate(counts)])


def _levels(given: RasterInput) -> list[Level]:
    # Strides are tensors, because a division by a Python number may be a multiplication by its reciprocal.
    return [
        (tuple(given.level_shapes[i : i + 2]), tuple(given.boxes.new_full((), s) for s in given.strides[i : i + 2]))
        for i in range(0, len(given.level_shapes), 2)
    ]


def _usable(boxes: Tensor, image: Tensor, batch_size: int) -> Tensor:
    """bool [G]: finite, not inverted, of an image of the batch; anything else is skipped"""
    in_batch = (image >= 0) & (image < batch_size)
    return in_batch & boxes.isfinite().all(1) & (boxes[:, 2:] >= boxes[:, :2]).all(1)


def rasterize(
    given: RasterInput, present: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
    """The operator `rasterize`: (classes, area, counted, extent, dense masks of every level), as in `Regions`.

    present: bool [num_classes], the categories that get rows whether boxes show them or not, so that K = num_classes.
    Rows with bad values are skipped.
    """
    image = _image_of(given.batch_index, given.counts, given.boxes.device)
    usable = (given.labels >= 0) & (given.labels < given.num_classes) & _usable(given.boxes, image, given.batch_size)
    given = given._replace(boxes=torch.where(usable.unsqueeze(1), given.boxes, 0))
    levels = _levels(given)
    covers = [_cover(given.boxes, *level) for level in levels]
    return _assemble(covers, given, usable, image, levels, present)


def mask_rasterizer(masks: Sequence[Tensor | Columns], given: RasterInput) -> Callable[[Tensor | None], tuple]:
    """The same for instance masks of each image, as [G_b, H_b, W_b] or as columns of pixels on the device.

    Their bounding boxes replace the given boxes.

    There is no operator for it: this is the specification, and what both backends run.
    """
    if not torch.compiler.is_compiling() and given.labels.device.type == "cpu":
        check_values(given)
    image = _image_of(None, given.counts, given.labels.device)
    filled = torch.cat([_filled(m) for m in masks])
    usable = (given.labels >= 0) & (given.labels < given.num_classes) & filled
    given = given._replace(boxes=torch.cat([_bounds(m) for m in masks]).to(given.boxes.dtype))
    levels = _levels(given)
    covers = []
    for m in masks:  # one image at a time: the sums of its masks are the most memory that this takes
        cover, m = (_cover_columns, m) if isinstance(m, Columns) else (_cover_masks, _sums(m != 0, 2))
        covers.append([cover(m, *level) for level in levels])
    covers = [torch.cat(level) for level in zip(*covers)]
    return partial(_assemble, covers, given, usable, image, levels)


def _assemble(
    covers: Sequence[Tensor],
    given: RasterInput,
    usable: Tensor,
    image: Tensor,
    levels: Sequence[Level],
    also: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
    """What `rasterize` returns, from the pixels that each instance covers on every level, bool [G, H_l, W_l].

    For each instance, usable: bool [G], and image: int64 [G]. Its box gives its center. also: `present` of `rasterize`.
    """
    boxes, batch_size, num_classes = given.boxes, given.batch_size, given.num_classes
    device = boxes.device
    # A skipped row points to the spare entry `num_classes`, an absent category to the spare entry K.
    capacity = min(boxes.shape[0], num_classes) if also is None else num_classes
    labels = torch.where(usable, given.labels, num_classes)
    present = torch.zeros(num_classes + 1, dtype=torch.bool, device=device).scatter(0, labels, True)[:-1]
    present = present if also is None else present | also
    rank = torch.where(present, present.cumsum(0) - 1, capacity)
    classes = torch.full((capacity + 1,), -1, device=device)
    classes = classes.scatter(0, rank, torch.arange(num_classes, device=device))[:-1]
    # Row of (center mask of the box's category, its image) among P x B. A skipped row has no pixel, so any row will do.
    slot = (1 + 2 * torch.where(usable, rank[labels.clamp(max=num_classes - 1)], 0)) * batch_size
    slot = slot + torch.where(usable, image, 0)

    x1, y1, x2, y2 = boxes.unbind(1)
    cx, cy = (x1 + x2) / 2, (y1 + y2) / 2
    rx, ry = given.center_ratio * (x2 - x1) / 2, given.center_ratio * (y2 - y1) / 2
    centers = torch.stack([cx - rx, cy - ry, cx + rx, cy + ry], dim=1)
    has_center = centers.isfinite().all(1)  # may overflow
    centers = torch.where(has_center.unsqueeze(1), centers, 0)

    ignore_boxes = given.ignore_boxes
    if ignore_boxes is not None:
        ignore_image = _image_of(given.ignore_batch_index, given.ignore_counts, device)
        ignore = _usable(ignore_boxes, ignore_image, batch_size)
        ignore_boxes = torch.where(ignore.unsqueeze(1), ignore_boxes, 0)
        ignore_image = torch.where(ignore, ignore_image, 0)
    image_sizes = given.image_sizes
    if image_sizes is None and len(given.image_size_list) > 0:
        # Filled number by number: a tensor made of a list would be a copy to the device.
        image_sizes = torch.cat([boxes.new_full((1,), n) for n in given.image_size_list]).view(batch_size, 2)

    area, counted, extent, dense = [], [], [], []
    for instance, ((h, w), stride) in zip(covers, levels):
        if image_sizes is None:
            ends = [boxes.new_full((batch_size,), n) for n in (h, w)]
        else:
            sizes = image_sizes.to(boxes.dtype).unbind(1)
            ends = [(size / s).ceil().clamp(0, n) for size, s, n in zip(sizes, stride, (h, w))]
        zero = torch.zeros_like(ends[0])
        in_image = inside(zero, ends[0], h).unsqueeze(2) & inside(zero, ends[1], w).unsqueeze(1)

        instance = instance & usable.view(-1, 1, 1)
        center = _cover(centers, (h, w), stride) & has_center.view(-1, 1, 1) & instance
        # The sum of bools is their union.
        masks = torch.zeros((1 + 2 * capacity) * batch_size, h, w, dtype=torch.bool, device=device)
        masks = masks.index_add(0, slot, center).index_add(0, slot + batch_size, instance & ~center)
        masks = masks.view(1 + 2 * capacity, batch_size, h, w) & in_image
        in_instance = masks.any(0)
        background = in_image & ~in_instance
        if ignore_boxes is not None:
            crowd = _cover(ignore_boxes, (h, w), stride) & ignore.view(-1, 1, 1)
            background = background & ~torch.zeros_like(background).index_add(0, ignore_image, crowd)
        masks = torch.cat([background.unsqueeze(0), masks[1:]])

        dense.append(masks)
        area.append(masks.sum((1, 2, 3)).to(torch.float32))
        counted.append((in_instance | background).sum().to(torch.float32))
        extent.append(torch.stack(ends, dim=1).to(torch.int32))
    return classes, torch.stack(area), torch.stack(counted), torch.stack(extent), None, None, tuple(dense)
