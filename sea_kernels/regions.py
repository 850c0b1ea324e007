"""The masks of one batch: on every level a center and an edge mask of each category present, and the background."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import backends, checks, segmentations
from . import group as ranks
from .boxes import FORMATS, Boxes, RasterInput, corners, pack, pack_labels, scaled
from .segmentations import Segmentation

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True, eq=False)
class Regions:
    """Masks over the pixels of a feature pyramid. Immutable and without gradient.

    Build them with :meth:`from_boxes` or :meth:`from_masks`. Each level has `P = 1 + 2K` masks: row 0 is the
    background, rows `1 + 2k` and `2 + 2k` are the center and the edge of category `classes[k]`. A pixel may lie in
    several masks, or in none. With a group of processes the batch is that of all ranks, and so are `classes`, `area`,
    `counted` and `images`. Everything else belongs to the process.

    Attributes:
        classes: int64 `[K]`. The categories present, ascending, then -1. `K = min(total boxes, num_classes)`, or
            num_classes with a group.
        area: float32 `[L, P]`. Number of pixels in each mask, over the whole batch.
        counted: float32 `[L]`. Number of valid pixels, those that lie in at least one mask.
        extent: int32 `[L, B, 2]`. Rows and columns of the level that lie inside each image.
        bits: int32 `[ceil(P / 32) * N]`, bitmasks of all N pixels of all levels: bit `p % 32` of
            `bits[p // 32 * N + n]` is set if pixel n lies in mask p. None where `dense` is given.
        runs: int32 `[3 * W]`, three words for every 32 pixels of an image of a level. Bit i stands for pixel i of
            these. It is set in `runs[3 * w]` if the pixel is the first of its image, or differs from the pixel before
            in its masks or in whether it lies inside the image; in `runs[3 * w + 1]` if it lies inside; in
            `runs[3 * w + 2]` if it is in any mask. None where `dense` is given.
        dense: for each level bool `[P, B, H_l, W_l]`, as the reference builds them. None where `bits` is given.
        level_shapes: `(H_l, W_l)` of each level.
        batch_size: number of images B of this process.
        group: the group of processes, or None.
        images: float64 `[]`. Number of images of all ranks; None without a group.
    """

    classes: Tensor
    area: Tensor
    counted: Tensor
    extent: Tensor
    # n = (pixels of earlier levels) + (b * H_l + y) * W_l + x. Flat: with a dimension for the words, torch.compile
    # would compile again when there is only one word.
    bits: Tensor | None
    # w = (words of earlier levels) + b * ceil(H_l * W_l / 32) + (y * W_l + x) // 32
    runs: Tensor | None
    dense: tuple[Tensor, ...] | None
    level_shapes: tuple[tuple[int, int], ...]
    batch_size: int
    group: ranks.Group | None = None
    images: Tensor | None = None

    def masks(self, level: int) -> Tensor:
        """The masks of one level, bool `[P, B, H_l, W_l]`.

        Example:
            >>> import sea_kernels as sk, torch
            >>> boxes, labels = [torch.tensor([[0.0, 0.0, 32.0, 32.0]])], [torch.tensor([7])]
            >>> regions = sk.Regions.from_boxes(boxes, labels, [(4, 6)], [8])
            >>> regions.masks(0)[1, 0].int()  # the center of category 7
            tensor([[0, 0, 0, 0, 0, 0],
                    [0, 1, 1, 0, 0, 0],
                    [0, 1, 1, 0, 0, 0],
                    [0, 0, 0, 0, 0, 0]], dtype=torch.int32)
        """
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
        """`[classes, area, counted, extent, bits, runs]`, as the operators take them."""
        bits, runs = self.bits, self.runs
        if self.dense is not None:
            levels = [_pack_bits(m) for m in self.dense]
            bits, runs = torch.cat(levels, dim=1).flatten(), _pack_runs(levels, self.extent, self.level_shapes)
        return [self.classes, self.area, self.counted, self.extent, bits, runs]

    def _levels(self, start: int, stop: int) -> "Regions":
        """The same regions, of the levels from `start` to before `stop` alone."""
        shapes, bits, runs = self.level_shapes, self.bits, self.runs
        if self.dense is None:
            pixels = [self.batch_size * h * w for h, w in shapes]
            words = [self.batch_size * ((h * w + 31) // 32) for h, w in shapes]
            # With a row of zeros below: of a table that may have one row alone, torch.compile makes two graphs.
            rows, own = (self.area.shape[1] + 31) // 32, sum(pixels[start:stop])
            table = torch.cat([bits, bits.new_zeros(sum(pixels))]).view(rows + 1, sum(pixels))
            bits = table[:, sum(pixels[:start]) : sum(pixels[:stop])].flatten()[: rows * own]
            runs = runs[3 * sum(words[:start]) : 3 * sum(words[:stop])]
        fields = {name: getattr(self, name)[start:stop] for name in ("area", "counted", "extent")}
        dense = None if self.dense is None else self.dense[start:stop]
        return replace(self, **fields, bits=bits, runs=runs, dense=dense, level_shapes=shapes[start:stop])

    # ------------------------------------------------------------------------------------------------- what ranks share

    def _consistent(self, call: str, integers: dict[str, int], numbers: dict[str, float] | None = None) -> "Regions":
        """The same regions, after the ranks of the group checked that they all make this call with the same arguments.

        The result depends on the check, so that compiled code cannot remove the check.
        """
        token = ranks.compare(self.group, self.area, call, integers, numbers or {})
        return replace(self, area=self.area + token)

    def _sum(self, x: Tensor) -> Tensor:
        """The sum over the ranks, differentiable.

        Each rank divides what it pools by the area of all ranks, so that the sum of its anchors is the mean.
        """
        return ranks.differentiable_sum(x, self.group)

    def _share(self, distance: Tensor, localization: Tensor) -> tuple[Tensor, Tensor]:
        """The losses of this rank's pixels and images, scaled so that their mean over the group is the batch's loss.

        `distance` is divided by the valid pixels of all ranks, `localization` by the images of this rank.
        """
        images = (self.group.size * self.batch_size / self.images.clamp(min=1)).to(localization.dtype)
        return distance * self.group.size, localization * images

    # --------------------------------------------------------------------------------------------------------- building

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
        box_format: str = "xyxy",
        normalized: bool = False,
        validate: bool = False,
        group: "ProcessGroup | None" = None,
    ) -> "Regions":
        """Rasterize the ground-truth boxes of one batch on every level of a pyramid (SEA, arXiv 2203.00862).

        With stride `s`, a box `(x1, y1, x2, y2)` covers columns `floor(x1/s) .. max(ceil(x2/s), floor(x1/s) + 1) - 1`
        and rows likewise, clipped to the map. So a box inside the image covers at least one pixel on every level. Its
        center box, `(x1 + x2)/2 -+ center_ratio * (x2 - x1)/2` before any clipping, is rasterized by the same rule and
        intersected with the box. The edge is the box without its own center. The masks of a category are the unions
        over its boxes. The background is what lies inside the image, in no box and in no ignore box. Pixels beyond the
        image (column `>= ceil(width/s)` or row `>= ceil(height/s)`) and pixels that only ignore boxes cover lie in no
        mask. Computed in float32, or in float64 for float64 boxes. There is no gradient.

        No data moves between host and device, so the call can be part of a captured CUDA graph (not with `validate`).

        With lists of boxes, `torch.compile` compiles for the number of boxes of each image. With packed boxes, or with
        regions that are built outside the compiled function, it does not.

        Args:
            boxes: B tensors `[G_b, 4]`, or one packed tensor `[G, 4]` with `batch_index` and `batch_size`: x1 y1 x2 y2
                in pixels of the input, unless `box_format` or `normalized` say otherwise. float32, float64, float16 or
                bfloat16 (the last two are computed in float32).
            labels: B integer tensors `[G_b]`, or one packed `[G]`. `0 <= label < num_classes`, or -1 for a padding row,
                which is skipped whatever its other values.
            level_shapes: `(H_l, W_l)` of each level.
            strides: for each level the number of input pixels from one pixel of the map to the next: a number, or a
                `(y, x)` pair. It need not be whole. Give the network's strides: image size / map size is wrong in
                padded batches.
            num_classes: number of categories.
            center_ratio: side of the center box / side of the box, from 0 to 1. The default is ours.
            batch_index: integer tensor `[G]`, the image of each packed box.
            batch_size: number of images, with packed boxes.
            image_sizes: B pairs (height, width) in pixels of the input, before padding: a list, or an integer tensor
                `[B, 2]`. Default: every image fills its maps.
            ignore_boxes: crowd boxes, in either form, in the dtype of `boxes`. To pad packed ones, add boxes that lie
                outside the image.
            ignore_batch_index: integer tensor `[I]`, the image of each packed ignore box.
            box_format: of `boxes` and `ignore_boxes`: "xyxy", "xywh" (x1 y1 width height) or "cxcywh" (the center's x
                and y, width, height).
            normalized: `boxes` and `ignore_boxes` are relative: 1 is the width or height of the box's own image, as
                `image_sizes` has it.
            validate: check values on a GPU too, which synchronizes. On a CPU they are always checked.
            group: an initialized `torch.distributed.ProcessGroup` (`dist.group.WORLD` is None before
                `init_process_group`). All its ranks must make this call. The batch is then that of all ranks: rows are
                the categories present on any of them, in the same order, `K = num_classes`, and `area` and `counted`
                are sums, which takes one all-reduce. Ranks may differ in their number of images, image sizes and level
                shapes. A rank may have no boxes, and no images (packed boxes with `batch_size=0`). The losses sum over
                the group too: see :func:`sea_kernels.sea_loss`. Default: each process is alone.

        Raises:
            TypeError, ValueError: an argument has a wrong type, shape, dtype, device or count. A box is not finite or
                is inverted, a label or batch index is out of range, an image size is negative (on a GPU only with
                `validate`; without it such boxes are skipped). The group is not initialized, does not contain this
                process, or has no backend for the device. On the first use of a group, on every rank: the ranks differ
                in num_classes, number of levels, strides, center_ratio or device.
            RuntimeError: a rank failed, or did not arrive within the timeout of the group.

        On a CPU, the logger "sea_kernels" warns once if no box is larger than one pixel, or if all lie outside of their
        images.

        Example:
            >>> import sea_kernels as sk, torch
            >>> boxes, labels = [torch.tensor([[0.0, 0.0, 32.0, 32.0]])], [torch.tensor([7])]
            >>> regions = sk.Regions.from_boxes(boxes, labels, [(4, 6), (2, 3)], [8, 16])
            >>> regions.classes, regions.area  # pixels of background, center and edge on each level
            (tensor([7]), tensor([[ 8.,  4., 12.],
                    [ 2.,  4.,  0.]]))
        """
        shapes = checks.level_shapes(level_shapes)
        num_strides = checks.strides(strides, len(shapes))
        num_classes = checks.integer("num_classes", num_classes, 1)
        center_ratio = checks.center_ratio(center_ratio)
        box_format = checks.box_format(box_format, FORMATS)
        if normalized and image_sizes is None:
            raise ValueError("image_sizes is None; expected (height, width) of each image beside normalized boxes")

        if isinstance(boxes, Tensor):
            if batch_size is None:
                raise ValueError("batch_size is None; expected the number of images beside packed boxes [G, 4]")
            batch_size = checks.integer("batch_size", batch_size, 0)
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
        packed, index, counts = pack("boxes", boxes, "batch_index", batch_index, batch_size)

        if isinstance(boxes, Tensor):
            checks.integers("labels", labels, (packed.shape[0],), packed.device)
            labels = labels.to(torch.int64)
        else:
            labels = pack_labels(labels, counts, packed.device, "boxes")

        ignore, ignore_index, ignore_counts = None, None, []
        if ignore_boxes is not None:
            ignore, ignore_index, ignore_counts = pack(
                "ignore_boxes", ignore_boxes, "ignore_batch_index", ignore_batch_index, batch_size
            )
            given, like = (x if isinstance(x, Tensor) else x[0] for x in (ignore_boxes, boxes))
            if given.dtype != like.dtype:
                raise TypeError(f"ignore_boxes has dtype {given.dtype}; expected {like.dtype}, as boxes")
            if ignore.device != packed.device:
                raise ValueError(f"ignore_boxes is on {ignore.device}; expected {packed.device}, as boxes")
        elif ignore_batch_index is not None:
            raise ValueError("ignore_batch_index is given without ignore_boxes; expected both or neither")

        sizes, size_list = checks.image_sizes(image_sizes, batch_size, packed.device, "boxes")
        packed = corners(packed, box_format)
        ignore = None if ignore is None else corners(ignore, box_format)
        if normalized:
            packed = scaled(packed, index, counts, sizes, size_list)
            ignore = None if ignore is None else scaled(ignore, ignore_index, ignore_counts, sizes, size_list)
        # Packed boxes are often columns of one tensor. The kernels read them as rows.
        tensors = [packed, labels, index, ignore, ignore_index, sizes]
        packed, labels, index, ignore, ignore_index, sizes = (None if x is None else x.contiguous() for x in tensors)
        given = RasterInput(
            packed, labels, index, counts, ignore, ignore_index, ignore_counts, sizes, size_list, batch_size,
            [n for shape in shapes for n in shape], num_strides, num_classes, center_ratio,
        )  # fmt: skip
        return _mark_dynamic(_build(backends.implementation().rasterizer(given, validate), given, shapes, group))

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
        """Rasterize instance masks instead of boxes, for students that predict masks (Mask R-CNN, SOLOv2).

        An instance covers a pixel of a level if any pixel of its mask touches it, by the rule of :meth:`from_boxes`:
        column `x` of a mask covers columns `floor(x/s) .. max(ceil((x + 1)/s), floor(x/s) + 1) - 1`, and rows likewise.
        Its center is the part inside the center box of its bounding box, and its edge is the part outside. A mask
        without a pixel is not an instance. Everything else is as in :meth:`from_boxes`, so a mask that is a filled
        rectangle gives the same as its box.

        It runs in plain PyTorch on the tensors' device with either backend. With tensors, no data moves between host
        and device. COCO segmentations are decoded on the host and copied to the labels' device, which synchronizes and
        cannot be compiled. Memory needed besides the masks: first, for one image at a time, 6 bytes for each pixel of
        its tensor, or for segmentations 12 bytes for each pixel of a level and instance. Then one byte per pixel for
        each of the `P` dense masks of every level, and 8 bytes per pixel while the masks of one image and level are
        packed.

        Args:
            masks: for each of B images a bool or uint8 tensor `[G_b, H_b, W_b]`, not zero inside the instance, in
                pixels of the input. Pixel (y, x) is the square from (y, x) to (y + 1, x + 1). H_b x W_b may be any part
                of the input that begins at its first pixel. Or a list of G_b COCO segmentations in pixels of the input
                (scaled like the image): polygons (a list of flat lists x y x y ...), which pycocotools rasterizes, or
                run-length encoding (`{"size": (h, w), "counts": bytes, str or list}`).
            labels: B integer tensors `[G_b]`. `0 <= label < num_classes`, or -1 for an instance to skip.
            level_shapes, strides, num_classes, center_ratio: as in :meth:`from_boxes`.
            image_sizes: as in :meth:`from_boxes`. COCO segmentations need it, as a list.
            ignore_boxes: B tensors `[I_b, 4]` of crowd boxes. If they are float64, everything is computed in float64.
            group: as in :meth:`from_boxes`.

        Raises:
            ImportError: polygons are given and pycocotools is not installed.
            TypeError, ValueError: a bad argument or value, as in :meth:`from_boxes`. A segmentation is malformed or not
                of the image's size.
            RuntimeError: a rank of the group failed, or did not arrive within its timeout.

        Example:
            >>> import sea_kernels as sk, torch
            >>> mask = torch.zeros(1, 32, 48, dtype=torch.bool)
            >>> mask[0, :16, :32] = True
            >>> regions = sk.Regions.from_masks([mask], [torch.tensor([7])], [(4, 6)], [8])
            >>> regions.classes, regions.area
            (tensor([7]), tensor([[16.,  4.,  4.]]))
        """
        shapes = checks.level_shapes(level_shapes)
        num_strides = checks.strides(strides, len(shapes))
        num_classes = checks.integer("num_classes", num_classes, 1)
        center_ratio = checks.center_ratio(center_ratio)

        if not isinstance(masks, (list, tuple)):
            raise TypeError(f"masks is a {type(masks).__name__}; expected a list with the masks of each image")
        if len(masks) == 0:
            raise ValueError("masks is an empty list; expected the masks of each image")
        batch_size = len(masks)
        for b, x in enumerate(masks):
            checks.instance_masks(f"masks[{b}]", x)
        counts = [x.shape[0] if isinstance(x, Tensor) else len(x) for x in masks]
        labels = pack_labels(labels, counts, None, "masks")
        device = labels.device

        ignore, ignore_counts = None, []
        if ignore_boxes is not None:
            if not isinstance(ignore_boxes, (list, tuple)):
                raise TypeError(f"ignore_boxes is a {type(ignore_boxes).__name__}; expected a list of tensors [G, 4]")
            ignore, _, ignore_counts = pack("ignore_boxes", ignore_boxes, "", None, batch_size)
            if ignore.device != device:
                raise ValueError(f"ignore_boxes is on {ignore.device}; expected {device}, as labels")
        sizes, size_list = checks.image_sizes(image_sizes, batch_size, device, "labels")

        pixels = []
        for b, x in enumerate(masks):
            if not isinstance(x, Tensor):
                wanted = f"expected a list of (height, width), to which masks[{b}], COCO segmentations, is decoded"
                if image_sizes is None:
                    raise ValueError(f"image_sizes is None; {wanted}")
                if isinstance(image_sizes, Tensor):
                    raise TypeError(f"image_sizes is a Tensor; {wanted}")
                found = segmentations.decode(f"masks[{b}]", x, *size_list[2 * b : 2 * b + 2])
                pixels.append(found._replace(runs=found.runs.to(device)))
            elif x.device != device:
                raise ValueError(f"masks[{b}] is on {x.device}; expected {device}, as labels")
            else:
                pixels.append(x.detach())

        # The rasterizer puts the masks' bounding boxes in the place of these.
        boxes = torch.zeros(len(labels), 4, dtype=torch.float32 if ignore is None else ignore.dtype, device=device)
        given = RasterInput(
            boxes, labels, None, counts, ignore, None, ignore_counts, sizes, size_list, batch_size,
            [n for shape in shapes for n in shape], num_strides, num_classes, center_ratio,
        )  # fmt: skip
        found = _build(backends.implementation().mask_rasterizer(pixels, given), given, shapes, group)
        # Packed once for all losses, image by image, as that takes 8 bytes for each mask and pixel.
        levels = [torch.cat([_pack_bits(image) for image in level.split(1, dim=1)], dim=1) for level in found.dense]
        bits, runs = torch.cat(levels, dim=1).flatten(), _pack_runs(levels, found.extent, shapes)
        return _mark_dynamic(replace(found, bits=bits, runs=runs, dense=None))


def check_fit(name: str, regions: object, maps_name: str, sets: list[list[Tensor]]) -> None:
    """`regions` is a Regions with the levels, batch size and device of every set of maps."""
    if not isinstance(regions, Regions):
        raise TypeError(f"{name} is a {type(regions).__name__}; expected sea_kernels.Regions")
    shapes = regions.level_shapes
    for m, s in enumerate(sets):
        if len(shapes) != len(s):
            raise ValueError(f"{name} has {len(shapes)} levels; expected {len(s)}, as {maps_name}")
        for i, x in enumerate(s):
            at = checks.at
            if regions.classes.device != x.device:
                raise ValueError(
                    f"{name} is on {regions.classes.device}; expected {x.device}, as {at(maps_name, sets, m, i)}"
                )
            if regions.batch_size != x.shape[0]:
                raise ValueError(
                    f"{name} has batch size {regions.batch_size}; expected {x.shape[0]}, as {at(maps_name, sets, m, i)}"
                )
            if shapes[i][0] != x.shape[2] or shapes[i][1] != x.shape[3]:
                raise ValueError(
                    f"{name} has level_shapes[{i}] = ({shapes[i][0]}, {shapes[i][1]}); "
                    f"expected ({x.shape[2]}, {x.shape[3]}), as {at(maps_name, sets, m, i)}"
                )


def check_anchors(name: str, anchors: object, regions: Regions, maps: list[Tensor]) -> None:
    """`anchors` is a floating tensor [L, P, C] that fits the regions and the maps."""
    if not isinstance(anchors, Tensor):
        raise TypeError(f"{name} is a {type(anchors).__name__}; expected a tensor [L, P, C]")
    if anchors.layout != torch.strided:
        raise TypeError(f"{name} has layout {anchors.layout}; expected a dense tensor (torch.strided)")
    if anchors.dtype not in checks.FLOATS:
        raise TypeError(f"{name} has dtype {anchors.dtype}; expected float32, float64, float16 or bfloat16")
    if anchors.device != maps[0].device:
        raise ValueError(f"{name} is on {anchors.device}; expected {maps[0].device}, as the maps")
    expected = (len(maps), regions.area.shape[1], maps[0].shape[1])
    if anchors.dim() != 3 or any(anchors.shape[d] != expected[d] for d in range(3)):
        raise ValueError(
            f"{name} has shape {checks.shape_of(anchors)}; "
            f"expected [L, P, C] = [{expected[0]}, {expected[1]}, {expected[2]}]"
        )


def _build(
    rasterize: Callable[[Tensor | None], tuple],
    given: RasterInput,
    shapes: tuple[tuple[int, int], ...],
    group: "ProcessGroup | None",
) -> Regions:
    """Regions from a rasterizer (see :class:`sea_kernels.backends.Backend`), of this process or of a group."""
    images, joined = None, None
    if group is None:
        found = rasterize(None)
    else:
        joined = ranks.join(group)
        steps = {f"strides[{i // 2}][{i % 2}]": s for i, s in enumerate(given.strides) if joined.compares_strides}
        token = ranks.compare(
            joined, given.labels, f"Regions of the {backends.current_backend()} backend",
            {"num_classes": given.num_classes, "levels": len(shapes)}, {"center_ratio": given.center_ratio} | steps,
        )  # fmt: skip
        found, images = ranks.rasterize(rasterize, given.num_classes, given.batch_size, joined, token)
    return Regions(*found, shapes, given.batch_size, joined, images)


def _mark_dynamic(regions: Regions) -> Regions:
    """Tells torch.compile that K changes. Otherwise it compiles again when K first needs another word of bits."""
    if regions.bits is not None and "torch._dynamo" in sys.modules and not torch.compiler.is_compiling():
        for x, dim in ((regions.classes, 0), (regions.area, 1), (regions.bits, 0)):
            torch._dynamo.maybe_mark_dynamic(x, dim)
    return regions


def _pack_bits(masks: Tensor) -> Tensor:
    """bool [P, B, H, W] -> int32 [ceil(P / 32), B * H * W]"""
    words = []
    for rows in masks.flatten(1).split(32):
        bits = torch.arange(len(rows), dtype=torch.int32, device=rows.device).view(-1, 1)
        words.append((rows.to(torch.int32) << bits).sum(0, dtype=torch.int32))  # each bit once, so nothing is carried
    return torch.stack(words)


def _pack_runs(levels: list[Tensor], extent: Tensor, shapes: tuple[tuple[int, int], ...]) -> Tensor:
    """The field `runs` from the bits of each level, int32 [ceil(P / 32), B * H * W]."""
    out = []
    for bits, size, (h, w) in zip(levels, extent, shapes):
        words = bits.unflatten(1, (-1, h * w))
        rows, columns = (torch.arange(n, device=bits.device) < size[:, i, None] for i, n in enumerate((h, w)))
        inside = (rows.unsqueeze(2) & columns.unsqueeze(1)).flatten(1)
        starts = torch.ones_like(inside)
        starts[:, 1:] = (words[..., 1:] != words[..., :-1]).any(0) | (inside[:, 1:] != inside[:, :-1])
        flags = torch.stack([starts, inside, (words != 0).any(0)])  # [3, B, H * W]
        flags = torch.nn.functional.pad(flags, (0, -h * w % 32)).unflatten(2, (-1, 32)).to(torch.int64)
        packed = (flags << torch.arange(32, device=bits.device)).sum(3).to(torch.int32)
        out.append(packed.permute(1, 2, 0).flatten())
    return torch.cat(out)
