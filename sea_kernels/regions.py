"""The masks of one batch: on every level a centre and an edge mask of each category present, and the background."""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import distributed, ops

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)

Boxes = Tensor | Sequence[Tensor]
Segmentation = Sequence[Sequence[float]] | Mapping[str, Any]  # of COCO: polygons, or run lengths


@dataclass(frozen=True, eq=False)
class Regions:
    """Masks over the pixels of a feature pyramid; immutable, never differentiated.

    Built by :meth:`from_boxes` or :meth:`from_masks`.
    There are `P = 1 + 2K` masks a level: row 0 is the background, rows `1 + 2k` and `2 + 2k` are the centre and the
    edge of category `classes[k]`. A pixel may lie in several masks, or in none. With a group of processes the batch is
    that of all of them, and so are classes, area, counted and images; all else is the process's own.
    """

    # int64 [K]: the categories present, ascending, then -1; K = min(total boxes, num_classes), with a group num_classes
    classes: Tensor
    area: Tensor  # float32 [L, P]: pixels in each mask, over the whole batch
    counted: Tensor  # float32 [L]: pixels that lie in at least one mask
    extent: Tensor  # int32 [L, B, 2]: rows and columns of the level inside each image, clipped to the map
    # int32 [ceil(P / 32) * N]: bit p % 32 of bits[p // 32 * N + n] says that pixel n of all N is in mask p;
    # n = (pixels of earlier levels) + (b * H_l + y) * W_l + x. Flat, as torch.compile would compile anew for one word
    bits: Tensor | None
    dense: tuple[Tensor, ...] | None  # what the reference builds instead of bits: bool [P, B, H_l, W_l] of every level
    level_shapes: tuple[tuple[int, int], ...]
    batch_size: int
    group: distributed.Group | None = None
    images: Tensor | None = None  # float64 []: images of the whole batch, where there is a group

    def masks(self, level: int) -> Tensor:
        """The masks of one level, bool [P, B, H, W]."""
        if self.dense is not None:
            return self.dense[level]
        h, w = self.level_shapes[level]
        start = self.batch_size * sum(rows * cols for rows, cols in self.level_shapes[:level])
        pixels = self.batch_size * sum(rows * cols for rows, cols in self.level_shapes)
        words = self.bits.view((self.area.shape[1] + 31) // 32, pixels)[:, start : start + self.batch_size * h * w]
        shifts = torch.arange(32, dtype=torch.int32, device=words.device).view(1, 32, 1)
        masks = (words.unsqueeze(1) >> shifts & 1).bool().flatten(0, 1)
        return masks[: self.area.shape[1]].view(self.area.shape[1], self.batch_size, h, w)

    def tensors(self) -> list[Tensor]:
        """`[classes, area, counted, extent, bits]`, what the native operators take."""
        bits = self.bits if self.dense is None else torch.cat([_pack_bits(m) for m in self.dense], dim=1).flatten()
        return [self.classes, self.area, self.counted, self.extent, bits]

    @staticmethod
    def from_boxes(
        boxes: Boxes,
        labels: Boxes,
        level_shapes: Sequence[Sequence[int]],
        strides: Sequence[float | Sequence[float]],
        *,
        num_classes: int = 80,
        center_ratio: float = 0.5,
        batch_index: Tensor | None = None,
        batch_size: int | None = None,
        image_sizes: Sequence[Sequence[int]] | Tensor | None = None,
        ignore_boxes: Boxes | None = None,
        ignore_batch_index: Tensor | None = None,
        validate: bool = False,
        group: "ProcessGroup | None" = None,
    ) -> "Regions":
        """Rasterise the ground-truth boxes of one batch on every level of a pyramid (after SEA, arXiv 2203.00862).

        With stride `s`, a box `(x1, y1, x2, y2)` covers columns `floor(x1/s) .. max(ceil(x2/s), floor(x1/s) + 1) - 1`
        and rows likewise, clipped to the map: a box inside the image owns a pixel on every level. Its centre box,
        `(x1 + x2)/2 -+ center_ratio * (x2 - x1)/2` before any clipping, is rasterised by the same rule and intersected
        with the box; edge = box minus its own centre. The masks of a category are the unions over its boxes. The
        background is what lies inside the image, in no box and in no ignore box. Pixels beyond the image (column
        `>= ceil(width/s)` or row `>= ceil(height/s)`) and pixels that only ignore boxes cover lie in no mask.
        Computed in float32, in float64 for float64 boxes. Nothing here gets a gradient.

        No data moves between host and device, so the call may lie in a captured CUDA graph (not with `validate`).

        The list form specialises `torch.compile` on the number of boxes of each image; the packed form does not, nor do
        regions built outside the compiled function.

        Args:
            boxes: B tensors `[G_b, 4]`, or one packed tensor `[G, 4]` with `batch_index` and `batch_size`: x1 y1 x2 y2
                in pixels of the input; float32, float64, float16 or bfloat16 (the last two are computed in float32).
            labels: B integer tensors `[G_b]`, or one packed `[G]`: `0 <= label < num_classes`, or -1 for a padding row,
                which is skipped whatever its other values.
            level_shapes: `(H_l, W_l)` of every level.
            strides: of every level the pixels of the input from one pixel of the map to the next, a number or a
                `(y, x)` pair; need not be whole. The true strides, not image size / map size: batches are padded.
            num_classes: number of categories.
            center_ratio: side of the centre box over the side of the box, 0 to 1. The default is ours.
            batch_index: integer tensor `[G]`: whose image each packed box is.
            batch_size: number of images, with packed boxes.
            image_sizes: B pairs (height, width) in pixels of the input, before padding: a list, or an integer tensor
                `[B, 2]`. Default: every image fills its maps.
            ignore_boxes: crowd boxes, in either form, of the dtype of `boxes`. To pad packed ones, add boxes that lie
                outside the image.
            ignore_batch_index: integer tensor `[I]`: whose image each packed ignore box is.
            validate: check values on a GPU too; it synchronises. On a CPU they are always checked.
            group: an initialised `torch.distributed.ProcessGroup` (beware: `dist.group.WORLD` is None before
                `init_process_group`). All its ranks must make this call; then the batch is that of all ranks: rows are
                the categories present on any, in the same order, `K = num_classes`, and `area` and `counted` the sums,
                from one all-reduce. Images, their number, sizes and level shapes may differ between ranks, boxes may
                be missing (and images: packed boxes with `batch_size=0`). All that takes these regions sums up over the
                group likewise: see :func:`sea_kernels.anchor_pool` and :func:`sea_kernels.sea_loss`. Default: each
                process for itself.

        Raises:
            TypeError, ValueError: an argument of wrong type, shape, dtype, device or count; a box that is not finite or
                is inverted, a label or batch index out of range, a negative image size (values on a GPU only with
                `validate`: without it such boxes are skipped); a group that is not initialised, that this process does
                not belong to, or without a backend for the device. On every rank, when a group is used for the first
                time: another num_classes, number of levels, strides, center_ratio or device on some rank.
            RuntimeError: a rank failed, or did not come within the timeout of the group.
        """
        shapes = _level_shapes(level_shapes)
        num_strides = _strides(strides, len(shapes))
        _integer("num_classes", num_classes, 1)
        _center_ratio(center_ratio)

        if isinstance(boxes, Tensor):
            if batch_size is None:
                raise ValueError("batch_size is None; expected the number of images beside packed boxes [G, 4]")
            _integer("batch_size", batch_size, 0)
        elif not isinstance(boxes, (list, tuple)):
            raise TypeError(
                f"boxes is a {type(boxes).__name__}; expected a list of tensors [G, 4] or one packed tensor"
            )
        elif len(boxes) == 0:
            raise ValueError("boxes is an empty list; expected one tensor [G, 4] for each image (or packed boxes)")
        elif batch_size is not None and batch_size != len(boxes):
            raise ValueError(f"batch_size is {batch_size}; expected {len(boxes)}, the number of tensors in boxes")
        else:
            batch_size = len(boxes)
        packed, counts = _pack_boxes("boxes", boxes, "batch_index", batch_index, batch_size)
        index = None if batch_index is None else batch_index.to(torch.int64)

        if isinstance(boxes, Tensor):
            _check_integers("labels", labels, (packed.shape[0],), packed.device)
        else:
            labels = _pack_labels(labels, counts, packed.device, "boxes")
        labels = labels.to(torch.int64)

        ignore, ignore_counts, ignore_index = None, [], None
        if ignore_boxes is not None:
            ignore, ignore_counts = _pack_boxes(
                "ignore_boxes", ignore_boxes, "ignore_batch_index", ignore_batch_index, batch_size
            )
            given, like = (x if isinstance(x, Tensor) else x[0] for x in (ignore_boxes, boxes))
            if given.dtype != like.dtype:
                raise TypeError(f"ignore_boxes has dtype {given.dtype}; expected {like.dtype}, as boxes")
            if ignore.device != packed.device:
                raise ValueError(f"ignore_boxes is on {ignore.device}; expected {packed.device}, as boxes")
            ignore_index = None if ignore_batch_index is None else ignore_batch_index.to(torch.int64)
        elif ignore_batch_index is not None:
            raise ValueError("ignore_batch_index is given without ignore_boxes; expected both or neither")

        sizes, size_list = _image_sizes(image_sizes, batch_size, packed.device, "boxes")
        # packed boxes are often columns of one tensor; the kernels read them as rows
        rows = [packed, labels, index, counts, ignore, ignore_index, ignore_counts, sizes]
        *rows, sizes = [x.contiguous() if isinstance(x, Tensor) else x for x in rows]
        flat_shapes = [n for shape in shapes for n in shape]
        grid = (sizes, size_list, batch_size, flat_shapes, num_strides, num_classes, float(center_ratio))
        options = num_strides, num_classes, center_ratio, group
        if ops.current_backend() == "native":
            ops.require("rasterize", packed.device)

            def rasterize(present: Tensor | None) -> tuple:
                if present is None:
                    return torch.ops.sea_kernels.regions(*rows, *grid, validate)
                return torch.ops.sea_kernels.rasterize(*rows, *grid, present)

            return _mark_dynamic(_build(rasterize, shapes, batch_size, packed, *options))

        from . import reference

        if not torch.compiler.is_compiling() and (validate or packed.device.type == "cpu"):
            check_values(*rows, sizes, batch_size, num_classes)
        return _build(partial(reference.rasterize, *rows, *grid), shapes, batch_size, packed, *options)

    @staticmethod
    def from_masks(
        masks: Sequence[Tensor | Sequence[Segmentation]],
        labels: Sequence[Tensor],
        level_shapes: Sequence[Sequence[int]],
        strides: Sequence[float | Sequence[float]],
        *,
        num_classes: int = 80,
        center_ratio: float = 0.5,
        image_sizes: Sequence[Sequence[int]] | Tensor | None = None,
        ignore_boxes: Sequence[Tensor] | None = None,
        group: "ProcessGroup | None" = None,
    ) -> "Regions":
        """Rasterise instance masks instead of boxes, for students that predict masks (Mask R-CNN, SOLOv2).

        An instance covers a pixel of a level if any pixel of its mask touches it, by the rule of :meth:`from_boxes`:
        column `x` of a mask covers columns `floor(x/s) .. max(ceil((x + 1)/s), floor(x/s) + 1) - 1`, and rows likewise.
        Its centre is what it covers inside the centre box of its bounding box, its edge what it covers outside. A mask
        without a pixel counts as no instance. All else is as in :meth:`from_boxes`, so that a mask which is a filled
        rectangle gives what its box gives.

        Plain PyTorch on the tensors' device, the same with either backend. With tensors no data moves between host and
        device; COCO segmentations are decoded on the host and copied to the labels' device, which waits for it and
        cannot be compiled. Memory: beside the masks 4 bytes for each of their pixels, an image at a time; then the `P`
        dense masks of every level, a byte a pixel, and 16 bytes a pixel while those of one image and level are packed.

        Args:
            masks: of each of B images a bool or uint8 tensor `[G_b, H_b, W_b]`, not zero in the instance, in pixels of
                the input: pixel (y, x) is the square from (y, x) to (y + 1, x + 1), and H_b x W_b may be any part of
                the input from its first pixel on. Or a list of G_b COCO segmentations, also in pixels of the input
                (scaled as the image is), which pycocotools decodes to the image's size: polygons (a list of flat lists
                x y x y ...) or run lengths (`{"size": (h, w), "counts": bytes, str or list}`).
            labels: B integer tensors `[G_b]`: `0 <= label < num_classes`, or -1 for an instance to skip.
            level_shapes, strides, num_classes, center_ratio: as in :meth:`from_boxes`.
            image_sizes: as in :meth:`from_boxes`; COCO segmentations need it, as a list.
            ignore_boxes: B tensors `[I_b, 4]` of crowd boxes. All is computed in float64 if they are.
            group: as in :meth:`from_boxes`.

        Raises:
            ImportError: COCO segmentations are given and pycocotools is not installed.
            TypeError, ValueError, RuntimeError: as :meth:`from_boxes`; a segmentation that is malformed or not of the
                image's size.
        """
        shapes = _level_shapes(level_shapes)
        num_strides = _strides(strides, len(shapes))
        _integer("num_classes", num_classes, 1)
        _center_ratio(center_ratio)

        if not isinstance(masks, (list, tuple)):
            raise TypeError(f"masks is a {type(masks).__name__}; expected a list with the masks of each image")
        if len(masks) == 0:
            raise ValueError("masks is an empty list; expected the masks of each image")
        batch_size = len(masks)
        for b, x in enumerate(masks):
            _check_masks(f"masks[{b}]", x)
        counts = [x.shape[0] if isinstance(x, Tensor) else len(x) for x in masks]
        labels = _pack_labels(labels, counts, None, "masks")
        device = labels.device

        ignore, ignore_counts = None, []
        if ignore_boxes is not None:
            if not isinstance(ignore_boxes, (list, tuple)):
                raise TypeError(f"ignore_boxes is a {type(ignore_boxes).__name__}; expected a list of tensors [G, 4]")
            ignore, ignore_counts = _pack_boxes("ignore_boxes", ignore_boxes, "", None, batch_size)
            if ignore.device != device:
                raise ValueError(f"ignore_boxes is on {ignore.device}; expected {device}, as labels")
        sizes, size_list = _image_sizes(image_sizes, batch_size, device, "labels")

        pixels = []
        for b, x in enumerate(masks):
            if not isinstance(x, Tensor):
                wanted = f"expected a list of (height, width), to which masks[{b}], COCO segmentations, is decoded"
                if image_sizes is None:
                    raise ValueError(f"image_sizes is None; {wanted}")
                if isinstance(image_sizes, Tensor):
                    raise TypeError(f"image_sizes is a Tensor; {wanted}")
                x = _decode(f"masks[{b}]", x, *size_list[2 * b : 2 * b + 2]).to(device)
            if x.device != device:
                raise ValueError(f"masks[{b}] is on {x.device}; expected {device}, as labels")
            pixels.append(x.detach())
        if not torch.compiler.is_compiling() and device.type == "cpu":
            check_values(None, labels, None, counts, ignore, None, ignore_counts, sizes, batch_size, num_classes)

        from . import reference

        flat_shapes = [n for shape in shapes for n in shape]
        rasterize = reference.mask_rasterizer(
            *(pixels, labels, ignore, ignore_counts, sizes, size_list, flat_shapes, num_strides),
            *(num_classes, float(center_ratio)),
        )
        found = _build(rasterize, shapes, batch_size, labels, num_strides, num_classes, center_ratio, group)
        # Packed once for all losses; image by image, as that takes 16 bytes for each mask and pixel.
        images = [image for level in found.dense for image in level.split(1, dim=1)]
        bits = torch.cat([_pack_bits(image) for image in images], dim=1).flatten()
        return _mark_dynamic(replace(found, bits=bits, dense=None))


def _build(
    rasterize: Callable[[Tensor | None], tuple],
    shapes: tuple[tuple[int, int], ...],
    batch_size: int,
    like: Tensor,
    strides: list[float],
    num_classes: int,
    center_ratio: float,
    group: "ProcessGroup | None",
) -> Regions:
    """Regions from what `rasterize` gives for the categories `present`, bool [num_classes], or (None) for its own."""
    images, joined = None, None
    if group is None:
        found = rasterize(None)
    else:
        joined = distributed.join(group)
        steps = {f"strides[{i // 2}][{i % 2}]": s for i, s in enumerate(strides) if joined.compares_strides}
        token = distributed.compare(
            joined, like, f"Regions of the {ops.current_backend()} backend",
            {"num_classes": num_classes, "levels": len(shapes)}, {"center_ratio": float(center_ratio)} | steps,
        )  # fmt: skip
        found, images = distributed.rasterize(rasterize, num_classes, batch_size, joined, token)
    *rest, masks = found
    bits, dense = (None, masks) if isinstance(masks, tuple) else (masks, None)
    return Regions(*rest, bits, dense, shapes, batch_size, joined, images)


def _mark_dynamic(regions: Regions) -> Regions:
    """Says to torch.compile that K changes: left to find out it compiles once more when K first needs another word."""
    if "torch._dynamo" in sys.modules and not torch.compiler.is_compiling():
        for x, dim in ((regions.classes, 0), (regions.area, 1), (regions.bits, 0)):
            torch._dynamo.maybe_mark_dynamic(x, dim)
    return regions


def check_values(
    boxes: Tensor | None,
    labels: Tensor,
    batch_index: Tensor | None,
    counts: Sequence[int],
    ignore_boxes: Tensor | None,
    ignore_batch_index: Tensor | None,
    ignore_counts: Sequence[int],
    image_sizes: Tensor | None,
    batch_size: int,
    num_classes: int,
) -> None:
    """Raise ValueError for the first bad value of the tensors that are to be rasterised. It synchronises."""
    used = labels >= 0
    _refuse((labels < -1) | (labels >= num_classes), "labels", labels, counts, f"-1 <= label < {num_classes}")
    if boxes is not None:
        _refuse(used & ~_proper(boxes), "boxes", boxes, counts, "finite numbers with x1 <= x2 and y1 <= y2")
    in_batch = f"0 <= index < {batch_size}"
    if batch_index is not None:
        bad = used & ((batch_index < 0) | (batch_index >= batch_size))
        _refuse(bad, "batch_index", batch_index, [], in_batch)
    if ignore_boxes is not None:
        bad = ~_proper(ignore_boxes)
        _refuse(bad, "ignore_boxes", ignore_boxes, ignore_counts, "finite numbers with x1 <= x2 and y1 <= y2")
    if ignore_batch_index is not None:
        bad = (ignore_batch_index < 0) | (ignore_batch_index >= batch_size)
        _refuse(bad, "ignore_batch_index", ignore_batch_index, [], in_batch)
    if image_sizes is not None:
        _refuse((image_sizes < 0).any(1), "image_sizes", image_sizes, [], "height >= 0 and width >= 0")


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


def _pack_bits(masks: Tensor) -> Tensor:
    """bool [P, B, H, W] -> int32 [ceil(P / 32), B * H * W]"""
    flat = masks.flatten(1).to(torch.int64)
    flat = torch.nn.functional.pad(flat, (0, 0, 0, -flat.shape[0] % 32))
    shifts = torch.arange(32, device=flat.device).view(1, 32, 1)
    return (flat.unflatten(0, (flat.shape[0] // 32, 32)) << shifts).sum(1).to(torch.int32)


def _shape(x: Tensor) -> str:
    return f"[{', '.join(str(n) for n in x.shape)}]"


def _is_number(x: object) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool)


def _integer(name: str, value: object, least: int) -> None:
    if not isinstance(value, (int, torch.SymInt)) or isinstance(value, bool):
        raise TypeError(f"{name} is a {type(value).__name__}; expected an integer")
    if value < least:
        raise ValueError(f"{name} is {value}; expected an integer >= {least}")


def _level_shapes(level_shapes: object) -> tuple[tuple[int, int], ...]:
    if not isinstance(level_shapes, (list, tuple)):
        raise TypeError(f"level_shapes is a {type(level_shapes).__name__}; expected a list of (height, width)")
    if len(level_shapes) == 0:
        raise ValueError("level_shapes is empty; expected (height, width) of every level")
    for i, shape in enumerate(level_shapes):
        if not isinstance(shape, (list, tuple)):
            raise TypeError(f"level_shapes[{i}] is a {type(shape).__name__}; expected (height, width)")
        if len(shape) != 2:
            raise ValueError(f"level_shapes[{i}] has {len(shape)} entries; expected (height, width)")
        _integer(f"level_shapes[{i}][0]", shape[0], 1)
        _integer(f"level_shapes[{i}][1]", shape[1], 1)
    return tuple((h, w) for h, w in level_shapes)


def _strides(strides: object, levels: int) -> list[float]:
    """The strides as y0 x0 y1 x1 ..."""
    if not isinstance(strides, (list, tuple)):
        raise TypeError(f"strides is a {type(strides).__name__}; expected a list of numbers or (y, x) pairs")
    if len(strides) != levels:
        raise ValueError(f"strides has {len(strides)} entries; expected {levels}, as level_shapes")
    out = []
    for i, stride in enumerate(strides):
        pair = stride if isinstance(stride, (list, tuple)) else (stride, stride)
        if len(pair) != 2:
            raise ValueError(f"strides[{i}] has {len(pair)} entries; expected a number or a (y, x) pair")
        for s in pair:
            if not _is_number(s):
                raise TypeError(f"strides[{i}] is {stride!r}; expected a number or a (y, x) pair")
            if not 0 < s < math.inf:
                raise ValueError(f"strides[{i}] is {stride}; expected finite numbers above 0")
            out.append(float(s))
    return out


def _center_ratio(center_ratio: object) -> None:
    if not _is_number(center_ratio):
        raise TypeError(f"center_ratio is a {type(center_ratio).__name__}; expected a number from 0 to 1")
    if not 0 <= center_ratio <= 1:
        raise ValueError(f"center_ratio is {center_ratio}; expected a number from 0 to 1")


def _image_sizes(
    image_sizes: object, batch_size: int, device: torch.device, like: str
) -> tuple[Tensor | None, list[int]]:
    """The image sizes as a tensor [B, 2] if they are one, and else as h0 w0 h1 w1 ..."""
    if image_sizes is None:
        return None, []
    if isinstance(image_sizes, Tensor):
        _check_integers("image_sizes", image_sizes, (batch_size, 2), device, like)
        return image_sizes.to(torch.int64), []
    if not isinstance(image_sizes, (list, tuple)):
        raise TypeError(
            f"image_sizes is a {type(image_sizes).__name__}; "
            "expected a list of (height, width) or an integer tensor [B, 2]"
        )
    if len(image_sizes) != batch_size:
        raise ValueError(f"image_sizes has {len(image_sizes)} entries; expected {batch_size}, one for each image")
    for b, size in enumerate(image_sizes):
        if not isinstance(size, (list, tuple)):
            raise TypeError(f"image_sizes[{b}] is a {type(size).__name__}; expected (height, width)")
        if len(size) != 2:
            raise ValueError(f"image_sizes[{b}] has {len(size)} entries; expected (height, width)")
        _integer(f"image_sizes[{b}][0]", size[0], 0)
        _integer(f"image_sizes[{b}][1]", size[1], 0)
    return None, [n for size in image_sizes for n in size]


def _pack_labels(labels: object, counts: Sequence[int], device: torch.device | None, like: str) -> Tensor:
    """A list of labels as one tensor [G]; where no device is given, the first one's is expected of all"""
    if not isinstance(labels, (list, tuple)):
        raise TypeError(f"labels is a {type(labels).__name__}; expected a list of {len(counts)} tensors, as {like}")
    if len(labels) != len(counts):
        raise ValueError(f"labels has {len(labels)} tensors; expected {len(counts)}, as {like}")
    for b, x in enumerate(labels):
        _check_integers(f"labels[{b}]", x, (counts[b],), device, like)
        if device is None:
            device, like = x.device, "labels[0]"
    return torch.cat([x.to(torch.int64) for x in labels])


def _check_integers(
    name: str, x: object, shape: tuple[int, ...], device: torch.device | None, like: str = "boxes"
) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is a {type(x).__name__}; expected an integer tensor")
    if x.dtype not in _INTEGERS:
        raise TypeError(f"{name} has dtype {x.dtype}; expected an integer dtype")
    if x.dim() != len(shape) or any(x.shape[d] != n for d, n in enumerate(shape)):
        raise ValueError(f"{name} has shape {_shape(x)}; expected [{', '.join(str(n) for n in shape)}]")
    if device is not None and x.device != device:
        raise ValueError(f"{name} is on {x.device}; expected {device}, as {like}")


def _check_boxes(name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is a {type(x).__name__}; expected a tensor [G, 4]")
    if x.dtype not in _FLOATS:
        raise TypeError(f"{name} has dtype {x.dtype}; expected float32, float64, float16 or bfloat16")
    if x.dim() != 2 or x.shape[1] != 4:
        raise ValueError(f"{name} has shape {_shape(x)}; expected [G, 4]: x1 y1 x2 y2")


def _pack_boxes(
    name: str, boxes: object, index_name: str, index: Tensor | None, batch_size: int
) -> tuple[Tensor, list[int]]:
    """Boxes of either form as one tensor [G, 4] in the dtype to compute in, and each image's count ([]: packed)."""
    if isinstance(boxes, Tensor):
        _check_boxes(name, boxes)
        if index is None:
            raise ValueError(
                f"{index_name} is None; expected an integer tensor [{boxes.shape[0]}] beside packed {name}"
            )
        _check_integers(index_name, index, (boxes.shape[0],), boxes.device)
        counts = []
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
            _check_boxes(f"{name}[{b}]", x)
            if x.dtype != boxes[0].dtype:
                raise TypeError(f"{name}[{b}] has dtype {x.dtype}; expected {boxes[0].dtype}, as {name}[0]")
            if x.device != boxes[0].device:
                raise ValueError(f"{name}[{b}] is on {x.device}; expected {boxes[0].device}, as {name}[0]")
        counts = [x.shape[0] for x in boxes]
        boxes = torch.cat(list(boxes))
    boxes = boxes.detach()
    return boxes if boxes.dtype == torch.float64 else boxes.to(torch.float32), counts


def _check_masks(name: str, x: object) -> None:
    if not isinstance(x, (Tensor, list, tuple)):
        raise TypeError(f"{name} is a {type(x).__name__}; expected a tensor [G, H, W] or a list of COCO segmentations")
    if isinstance(x, Tensor):
        if x.dtype not in (torch.bool, torch.uint8):
            raise TypeError(f"{name} has dtype {x.dtype}; expected bool or uint8")
        if x.dim() != 3:
            raise ValueError(f"{name} has shape {_shape(x)}; expected [G, H, W]")


def _decode(name: str, segmentations: Sequence[Segmentation], height: int, width: int) -> Tensor:
    """COCO segmentations as masks, uint8 [G, height, width]"""
    if len(segmentations) == 0 or height * width == 0:
        return torch.zeros(len(segmentations), height, width, dtype=torch.uint8)
    try:
        from pycocotools import mask as coco
    except ImportError as error:
        raise ImportError(
            f"{name} is a list of COCO segmentations, which pycocotools decodes, and that is not installed: "
            "pip install pycocotools, or give a tensor [G, H, W]"
        ) from error
    encoded = []
    for g, x in enumerate(segmentations):
        if isinstance(x, Mapping):
            runs = _run_lengths(f"{name}[{g}]", x, height, width)
            encoded.append(coco.frPyObjects({"size": [height, width], "counts": runs}, height, width))
        else:
            encoded.append(coco.merge(coco.frPyObjects(_polygons(f"{name}[{g}]", x), height, width)))
    return torch.from_numpy(coco.decode(encoded)).permute(2, 0, 1).contiguous()


def _polygons(name: str, polygons: object) -> list[list[float]]:
    if not isinstance(polygons, (list, tuple)):
        raise TypeError(f"{name} is a {type(polygons).__name__}; expected run lengths (a dict) or a list of polygons")
    if len(polygons) == 0:
        raise ValueError(f"{name} is empty; expected at least one polygon")
    out = []
    for i, x in enumerate(polygons):
        x = x.tolist() if hasattr(x, "tolist") else x
        if not isinstance(x, (list, tuple)):
            raise TypeError(f"{name}[{i}] is a {type(x).__name__}; expected a polygon, a flat list x y x y ...")
        if len(x) < 6 or len(x) % 2 != 0:
            raise ValueError(f"{name}[{i}] has {len(x)} entries; expected x and y of three or more corners")
        for j, v in enumerate(x):
            if not _is_number(v):
                raise TypeError(f"{name}[{i}][{j}] is a {type(v).__name__}; expected a number")
            if not abs(v) < 1e6:  # pycocotools walks along the edges in steps of a fifth of a pixel
                raise ValueError(f"{name}[{i}][{j}] is {v}; expected a number between -1e6 and 1e6")
        out.append([float(v) for v in x])
    return out


def _run_lengths(name: str, encoded: Mapping[str, Any], height: int, width: int) -> list[int]:
    """The runs of a run-length dict. They have to fill the image: pycocotools reads stray memory beyond them."""
    for key in ("size", "counts"):
        if key not in encoded:
            raise ValueError(f"{name} has no {key!r}; expected {{'size': (height, width), 'counts': ...}}")
    size, runs = encoded["size"], encoded["counts"]
    if not isinstance(size, (list, tuple)) or list(size) != [height, width]:
        raise ValueError(f"{name}['size'] is {size!r}; expected {[height, width]}, as image_sizes")
    if not isinstance(runs, (bytes, str, list, tuple)):
        raise TypeError(f"{name}['counts'] is a {type(runs).__name__}; expected bytes, str or a list of integers")
    if isinstance(runs, (bytes, str)):
        runs = _uncompress(runs.encode() if isinstance(runs, str) else runs)
    for i, n in enumerate(runs):
        _integer(f"{name}['counts'][{i}]", n, 0)
    if sum(runs) != height * width:
        raise ValueError(f"{name}['counts'] has {sum(runs)} pixels; expected {height} * {width}, as in 'size'")
    return list(runs)


def _uncompress(counts: bytes) -> list[int]:
    """Runs from COCO's string: 5 bits a character, the lowest first; from the fourth run on less the last but one"""
    runs, value, shift = [], 0, 0
    for c in counts:
        value |= (c - 48 & 31) << shift
        shift += 5
        if c - 48 & 32:
            continue
        if c - 48 & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value, shift = 0, 0
    return runs
