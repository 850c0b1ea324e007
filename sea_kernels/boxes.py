"""The ground truth of one batch in the form that the rasterizers take: packed, checked, in the dtype to compute in."""

import logging
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import checks

Boxes = Tensor | Sequence[Tensor]
FORMATS = ("xyxy", "xywh", "cxcywh")

_log = logging.getLogger("sea_kernels")
_told: set[str] = set()  # what was logged, which is not repeated


class RasterInput(NamedTuple):
    """The boxes of one batch and the maps to rasterize them on. The operators' schemas are made of these fields."""

    boxes: Tensor  # float32 or float64 [G, 4]: x1 y1 x2 y2 in pixels of the input
    labels: Tensor  # int64 [G]; -1: skipped
    batch_index: Tensor | None  # int64 [G]: the image of each box; None: the images are in turn, as counts says
    counts: list[int]  # of each image, without a batch_index; else empty
    ignore_boxes: Tensor | None  # [I, 4], in the dtype of boxes
    ignore_batch_index: Tensor | None  # int64 [I]
    ignore_counts: list[int]
    image_sizes: Tensor | None  # int64 [B, 2]: height and width of each image
    image_size_list: list[int]  # the same as h0 w0 h1 w1 ...; empty, without image_sizes: images fill their maps
    batch_size: int
    level_shapes: list[int]  # h0 w0 h1 w1 ... of the levels
    strides: list[float]  # y0 x0 y1 x1 ... of the levels
    num_classes: int
    center_ratio: float


def pack(
    name: str, boxes: object, index_name: str, index: Tensor | None, batch_size: int
) -> tuple[Tensor, Tensor | None, list[int]]:
    """Boxes of either form as (boxes [G, 4] in the dtype to compute in, batch index or None, counts)."""
    if isinstance(boxes, Tensor):
        checks.boxes(name, boxes)
        if index is None:
            raise ValueError(
                f"{index_name} is None; expected an integer tensor [{boxes.shape[0]}] beside packed {name}"
            )
        checks.integers(index_name, index, (boxes.shape[0],), boxes.device)
        index, counts = index.to(torch.int64), []
    else:
        if not isinstance(boxes, (list, tuple)):
            raise TypeError(
                f"{name} is a {type(boxes).__name__}; expected a list of tensors [G, 4] or one packed tensor"
            )
        if len(boxes) != batch_size or batch_size == 0:
            raise ValueError(f"{name} has {len(boxes)} tensors; expected {batch_size}, one for each image")
        if index is not None:
            raise ValueError(f"{index_name} is given beside a list of {name}; expected it with packed {name} only")
        for b, x in enumerate(boxes):
            checks.boxes(f"{name}[{b}]", x)
            if x.dtype != boxes[0].dtype:
                raise TypeError(f"{name}[{b}] has dtype {x.dtype}; expected {boxes[0].dtype}, as {name}[0]")
            if x.device != boxes[0].device:
                raise ValueError(f"{name}[{b}] is on {x.device}; expected {boxes[0].device}, as {name}[0]")
        counts = [x.shape[0] for x in boxes]
        boxes = torch.cat(list(boxes))
    boxes = boxes.detach()
    return boxes if boxes.dtype == torch.float64 else boxes.to(torch.float32), index, counts


def corners(boxes: Tensor, box_format: str) -> Tensor:
    """Boxes [G, 4] of that format as x1 y1 x2 y2."""
    if box_format == "xyxy":
        return boxes
    first, size = boxes.split(2, dim=1)
    if box_format == "cxcywh":
        return torch.cat([first - size / 2, first + size / 2], dim=1)
    return torch.cat([first, first + size], dim=1)


def scaled(
    boxes: Tensor, index: Tensor | None, counts: Sequence[int], sizes: Tensor | None, size_list: Sequence[int]
) -> Tensor:
    """Boxes [G, 4] that are relative to the sizes of their images, in pixels. Numbers on the device stay there."""
    pairs = list(zip(size_list[::2], size_list[1::2])) if sizes is None else sizes
    if len(pairs) == 0:
        return boxes
    if index is None:
        return torch.cat([times(x, *pair) for x, pair in zip(boxes.split(list(counts)), pairs)])
    if sizes is None and all(pair == pairs[0] for pair in pairs):
        return times(boxes, *pairs[0])
    if sizes is None:  # filled on the device: a copy from the host would wait
        sizes = torch.stack([torch.full((), n, device=boxes.device) for n in size_list]).view(-1, 2)
    height, width = sizes[index.clamp(0, len(pairs) - 1)].unbind(1)  # what is out of range is refused or skipped later
    return times(boxes, height, width)


def times(boxes: Tensor, height: int | Tensor, width: int | Tensor) -> Tensor:
    """Boxes [G, 4], x1 y1 x2 y2, relative to one size or to one size [G] each, in pixels."""
    x1, y1, x2, y2 = boxes.unbind(1)
    return torch.stack([x1 * width, y1 * height, x2 * width, y2 * height], dim=1)


def pack_labels(labels: object, counts: Sequence[int], device: torch.device | None, like: str) -> Tensor:
    """A list of labels as one tensor int64 [G]; without a device that of the first one is expected of all."""
    if not isinstance(labels, (list, tuple)):
        raise TypeError(f"labels is a {type(labels).__name__}; expected a list of {len(counts)} tensors, as {like}")
    if len(labels) != len(counts):
        raise ValueError(f"labels has {len(labels)} tensors; expected {len(counts)}, as {like}")
    for b, x in enumerate(labels):
        checks.integers(f"labels[{b}]", x, (counts[b],), device, like)
        if device is None:
            device, like = x.device, "labels[0]"
    return torch.cat([x.to(torch.int64) for x in labels])


def check_boxes(given: RasterInput) -> None:
    """`check_values`, and a warning where boxes on a CPU look as if they were meant in another way."""
    check_values(given)
    if given.boxes.device.type != "cpu":
        return
    # As lists: the first box usually settles it, and an operation on tensors takes longer than that.
    index = given.batch_index
    images = [b for b, n in enumerate(given.counts) for _ in range(n)] if index is None else index.tolist()
    rows = zip(given.boxes.tolist(), given.labels.tolist(), images)
    used = [(box, image) for box, label, image in rows if label >= 0]
    if not used:
        return
    if all(x2 - x1 <= 1 and y2 - y1 <= 1 for (x1, y1, x2, y2), _ in used):
        _tell("no box is larger than one pixel; are they relative to their images? Then pass normalized=True")
    sizes = given.image_size_list if given.image_sizes is None else given.image_sizes.flatten().tolist()
    if not sizes:
        sizes = [n * s for n, s in zip(given.level_shapes[:2], given.strides[:2])] * given.batch_size
    if all(
        x1 >= sizes[2 * image + 1] or y1 >= sizes[2 * image] or x2 <= 0 or y2 <= 0 for (x1, y1, x2, y2), image in used
    ):
        _tell("every box lies outside of its image; are they of images before they were resized?")


def _tell(what: str) -> None:
    if what not in _told:
        _told.add(what)
        _log.warning("boxes: %s", what)


def check_values(given: RasterInput) -> None:
    """Raise ValueError for the first bad value of the tensors that are to be rasterized. It synchronizes."""
    labels, counts = given.labels, given.counts
    used, in_batch = labels >= 0, f"0 <= index < {given.batch_size}"
    corners = "finite numbers with x1 <= x2 and y1 <= y2"
    bad = (labels < -1) | (labels >= given.num_classes)
    _refuse(bad, "labels", labels, counts, f"-1 <= label < {given.num_classes}")
    _refuse(used & ~_proper(given.boxes), "boxes", given.boxes, counts, corners)
    index = given.batch_index
    if index is not None:
        _refuse(used & ((index < 0) | (index >= given.batch_size)), "batch_index", index, [], in_batch)
    if given.ignore_boxes is not None:
        bad = ~_proper(given.ignore_boxes)
        _refuse(bad, "ignore_boxes", given.ignore_boxes, given.ignore_counts, corners)
    index = given.ignore_batch_index
    if index is not None:
        _refuse((index < 0) | (index >= given.batch_size), "ignore_batch_index", index, [], in_batch)
    if given.image_sizes is not None:
        bad = (given.image_sizes < 0).any(1)
        _refuse(bad, "image_sizes", given.image_sizes, [], "height >= 0 and width >= 0")


def _proper(boxes: Tensor) -> Tensor:
    return boxes.isfinite().all(1) & (boxes[:, 2:] >= boxes[:, :2]).all(1)


def _refuse(bad: Tensor, name: str, values: Tensor, counts: Sequence[int], expected: str) -> None:
    if not bad.any():
        return
    row = image = int(bad.nonzero()[0])
    value = values[row].tolist()
    if len(counts) > 0:  # the list form: name the image's own tensor and row
        image = 0
        while row >= counts[image]:
            row -= counts[image]
            image += 1
        name = f"{name}[{image}]"
    raise ValueError(f"{name}[{row}] is {value}; expected {expected}")
