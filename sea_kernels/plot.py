"""Pictures of what the losses see: the regions over the image, and the cosines of every pixel with the anchors.

matplotlib is imported only when a picture is drawn. The figures do not belong to pyplot, so nothing has to be closed.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import checks
from .losses import anchor_cosine, anchor_pool
from .regions import Regions, check_fit

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The kinds of pixels of a map. A pixel can be the center of one box and the edge of another.
KINDS = ("background", "edge", "center", "center and edge", "uncounted (crowd)", "padding")
BACKGROUND, EDGE, CENTER, BOTH, UNCOUNTED, PADDING = range(len(KINDS))
_COLORS = ("#2b6cb0", "#ffe14d", "#e8262a", "#ff9416", "#b146c9", "#15171a")
_PAINT = 0.62  # opacity
_GRID = 48  # maps of up to so many columns are drawn with lines between their pixels

Names = Sequence[str] | Mapping[int, str]


def kinds(regions: Regions, level: int) -> Tensor:
    """The kind of every pixel of one level: uint8 [B, H, W], an index into `KINDS`.

    Padding lies beyond the image. Uncounted pixels lie inside the image and in no mask: only ignore boxes cover them.

    Example:
        >>> import sea_kernels as sk, torch
        >>> boxes, labels = [torch.tensor([[0.0, 0.0, 32.0, 32.0]])], [torch.tensor([7])]
        >>> regions = sk.Regions.from_boxes(boxes, labels, [(4, 6)], [8])
        >>> [sk.plot.KINDS[kind] for kind in sk.plot.kinds(regions, 0)[0, 1]]
        ['edge', 'center', 'center', 'edge', 'background', 'background']
    """
    masks = regions.masks(level)
    background, center, edge = masks[0], masks[1::2].any(0), masks[2::2].any(0)
    _, _, h, w = masks.shape
    rows, columns = regions.extent[level].view(-1, 2, 1, 1).unbind(1)
    y, x = torch.arange(h, device=masks.device).view(h, 1), torch.arange(w, device=masks.device)
    out = torch.full(background.shape, UNCOUNTED, dtype=torch.uint8, device=masks.device)
    out[(y >= rows) | (x >= columns)] = PADDING
    for kind, where in ((BACKGROUND, background), (EDGE, edge), (CENTER, center), (BOTH, center & edge)):
        out[where] = kind
    return out


def regions(
    images: Tensor,
    regions: Regions,
    strides: Sequence[float | Sequence[float]],
    *,
    names: Names | None = None,
    boxes: Sequence[Tensor] | None = None,
    ignore_boxes: Sequence[Tensor] | None = None,
) -> "Figure":
    """Draw the images of a batch, and next to each image the regions of every level painted over it.

    Args:
        images: the batch as the detector gets it, padding included: `[B, 3, H, W]` or `[3, H, W]` (or one channel),
            uint8 or floating. An image with values outside 0 to 1 is rescaled so that its least value becomes 0 and its
            greatest 1.
        regions: the masks of the batch.
        strides: as for :meth:`Regions.from_boxes`.
        names: the categories' names, by label. A name is written once on every connected piece of its category.
        boxes, ignore_boxes: B tensors `[G_b, 4]` each, x1 y1 x2 y2 in input pixels. Their outlines are drawn, those of
            `ignore_boxes` dashed.

    Returns:
        A matplotlib `Figure`. `figure.savefig("regions.png")` writes it.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape, dtype or count.
        ImportError: matplotlib is missing.

    Example:
        >>> import sea_kernels as sk, torch
        >>> boxes, labels = [torch.tensor([[0.0, 0.0, 32.0, 32.0]])], [torch.tensor([0])]
        >>> regions = sk.Regions.from_boxes(boxes, labels, [(4, 6)], [8])
        >>> figure = sk.plot.regions(torch.rand(1, 3, 32, 48), regions, [8], names=["cat"], boxes=boxes)
        >>> [axes.get_title() for axes in figure.axes]
        ['image', 'level 0: 4 x 6, stride 8']
    """
    new_figure = figure_type()
    pictures, scales = _checked(images, regions, strides)
    outlines = [
        (_boxes("boxes", boxes, len(pictures)), "-"),
        (_boxes("ignore_boxes", ignore_boxes, len(pictures)), "--"),
    ]
    levels = len(scales)
    columns = min(3, 1 + levels) if len(pictures) == 1 else 1 + levels
    rows = math.ceil((1 + levels) / columns)  # of one image
    width, height = _reach(pictures, regions.level_shapes, scales)
    side = 4.2 if len(pictures) == 1 else 3.2
    figure = new_figure(
        figsize=(side * columns, (side * height / width + 0.3) * rows * len(pictures) + 0.4), layout="constrained"
    )
    axes = figure.subplots(rows * len(pictures), columns, squeeze=False).reshape(len(pictures), -1)
    painted = [kinds(regions, level).cpu() for level in range(levels)]
    for b, picture in enumerate(pictures):
        plain, *level_axes = axes[b]
        _draw_image(plain, picture, gray=False)
        plain.set_title("image" if len(pictures) == 1 else f"image {b}", fontsize=10)
        if names is not None:
            _write_names(plain, regions, b, scales[0], names)
        for level, (axis, (sy, sx)) in enumerate(zip(level_axes, scales)):
            _draw_image(axis, picture, gray=True)
            _paint(axis, painted[level][b], sy, sx)
            h, w = regions.level_shapes[level]
            axis.set_title(f"level {level}: {h} x {w}, stride {_stride(sy, sx)}", fontsize=10)
        for axis in axes[b]:
            axis.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
            for outlined, line in outlines:
                _outline(axis, outlined[b], line)
        for axis in level_axes[levels:]:
            axis.remove()
    _legend(figure)
    return figure


def cosines(
    images: Tensor,
    maps: Mapping[str, Sequence[Tensor]],
    regions: Regions,
    strides: Sequence[float | Sequence[float]],
    *,
    level: int = 0,
    image: int = 0,
    anchors: Sequence[int] | None = None,
    names: Names | None = None,
) -> "Figure":
    """Draw the cosines of every pixel with the anchors, as each of several networks sees them, side by side.

    There is one row per anchor: its mask, then its cosines in each set of maps, all on one scale from -1 to 1, then the
    absolute difference between each set and the last one, with its mean over the valid pixels of the image. Pixels that
    are not valid are gray. NaN is black.

    Args:
        images: as for :func:`regions`.
        maps: sets of maps by name, each a list of L maps `[B, C, H_l, W_l]`. Each is compared with the last one:
            `{"student": ..., "teacher": ...}`, or `{"before": ..., "after": ..., "teacher": ...}`.
        regions: the masks of the batch.
        strides: as for :meth:`Regions.from_boxes`.
        level, image: which level of which image to draw. The anchors are those of the whole batch.
        anchors: the rows `0 <= p < P` of the masks to draw. Default: those with a pixel of this level of this image.
        names: the categories' names, by label.

    Returns:
        A matplotlib `Figure`.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape, dtype or count, or is out of range.
        ImportError: matplotlib is missing.

    Example:
        >>> import sea_kernels as sk, torch
        >>> boxes, labels = [torch.tensor([[0.0, 0.0, 32.0, 32.0]])], [torch.tensor([0])]
        >>> regions = sk.Regions.from_boxes(boxes, labels, [(4, 6)], [8])
        >>> maps = {"student": [torch.randn(1, 16, 4, 6)], "teacher": [torch.randn(1, 16, 4, 6)]}
        >>> figure = sk.plot.cosines(torch.rand(1, 3, 32, 48), maps, regions, [8], anchors=[1])
        >>> [axes.get_title() for axes in figure.axes[:3]]
        ['category 0: center', 'student', 'teacher']
    """
    new_figure = figure_type()
    pictures, scales = _checked(images, regions, strides)
    if not isinstance(maps, Mapping):
        raise TypeError(f"maps is a {type(maps).__name__}; expected a dict from names to lists of maps")
    if len(maps) == 0:
        raise ValueError("maps is empty; expected a dict from names to lists of maps")
    for name, given in maps.items():
        checked = checks.maps(f"maps[{name!r}]", given)
        check_fit("regions", regions, f"maps[{name!r}]", [checked])
    level = checks.integer("level", level, 0, len(scales) - 1)
    image = checks.integer("image", image, 0, len(pictures) - 1)
    masks = regions.masks(level)[:, image].cpu()
    if anchors is None:
        anchors = masks.flatten(1).any(1).nonzero().flatten().tolist()
    anchors = [checks.integer(f"anchors[{i}]", p, 0, len(masks) - 1) for i, p in enumerate(anchors)]
    if len(anchors) == 0:
        raise ValueError("anchors is empty; expected rows of the masks (no pixel of this level of this image counts)")
    with torch.no_grad():
        found = {
            name: anchor_cosine(given, anchor_pool(given, regions), regions)[level][image, anchors].float().cpu()
            for name, given in maps.items()
        }
    *compared, (last, target) = found.items()
    valid = masks.any(0)
    differences = {f"|{name} - {last}|": (cosine - target).abs() for name, cosine in compared}
    most = max((d[:, valid].nan_to_num(0).max().item() for d in differences.values() if valid.any()), default=0)

    sy, sx = scales[level]
    columns = 1 + len(found) + len(differences)
    width, height = _reach(pictures, [regions.level_shapes[level]], [scales[level]])
    side = 2.7 * height / width + 0.3  # of a row, in inches
    figure = new_figure(figsize=(2.7 * columns, side * len(anchors) + 1.1), layout="constrained")
    grid = figure.add_gridspec(len(anchors) + 1, columns, height_ratios=[side] * len(anchors) + [0.15])
    for row, p in enumerate(anchors):
        first, *rest = axes = [figure.add_subplot(grid[row, column]) for column in range(columns)]
        _draw_image(first, pictures[image], gray=True)
        kind = BACKGROUND if p == 0 else CENTER if p % 2 else EDGE
        _paint(first, torch.where(masks[p], kind, -1), sy, sx)
        first.set_title(anchor_name(regions, p, names), fontsize=9, parse_math=False)
        for axis, (name, cosine) in zip(rest, found.items()):
            shown = _map(axis, cosine[row], sy, sx, cmap="RdBu_r", vmin=-1, vmax=1)
            axis.set_title(name, fontsize=9)
        for axis, (name, difference) in zip(rest[len(found) :], differences.items()):
            apart = _map(axis, difference[row], sy, sx, cmap="viridis", vmin=0, vmax=max(most, 1e-6))
            axis.set_title(f"{name}, mean {difference[row][valid].mean():.3f}", fontsize=9)
        for axis in axes:
            if axis is not first:
                axis.set_facecolor("black")  # seen where a value is not a number
                _map(axis, torch.where(valid[..., None], 0, torch.tensor([0.8, 0.8, 0.8, 1])), sy, sx)
            axis.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
    bar = {"orientation": "horizontal"}
    cosine_bar = figure.add_subplot(grid[-1, 1 : 1 + len(found)])
    figure.colorbar(shown, cax=cosine_bar, label="cosine with the anchor", **bar)
    if differences:
        difference_bar = figure.add_subplot(grid[-1, 1 + len(found) :])
        figure.colorbar(apart, cax=difference_bar, label="absolute difference", **bar)
    h, w = regions.level_shapes[level]
    figure.suptitle(f"image {image}, level {level}: {h} x {w}, stride {_stride(sy, sx)}", fontsize=11)
    return figure


def figure_type() -> type:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"sea_kernels.plot draws with matplotlib: pip install matplotlib ({error})") from error
    return Figure


def _checked(images: Tensor, regions: Regions, strides: Sequence) -> tuple[list, list[tuple[float, float]]]:
    """The images as arrays [H, W, 3] of 0 to 1, and the (y, x) strides of every level."""
    if not isinstance(regions, Regions):
        raise TypeError(f"regions is a {type(regions).__name__}; expected sea_kernels.Regions")
    if not isinstance(images, Tensor):
        raise TypeError(f"images is a {type(images).__name__}; expected a tensor [B, 3, H, W] or [3, H, W]")
    if images.dtype != torch.uint8 and not images.dtype.is_floating_point:
        raise TypeError(f"images has dtype {images.dtype}; expected uint8 or a floating dtype")
    shape, batch = list(images.shape), regions.batch_size
    if len(shape) not in (3, 4) or shape[-3] not in (1, 3) or 0 in shape:
        raise ValueError(f"images has shape {shape}; expected [B, 3, H, W] or [3, H, W] (or one channel)")
    images = images.view(-1, *shape[-3:]) if images.dim() == 4 else images.unsqueeze(0)
    if len(images) != batch:
        raise ValueError(f"images has {len(images)} images; expected {batch}, as regions")
    flat = checks.strides(strides, len(regions.level_shapes))
    return [_picture(image) for image in images.detach()], list(zip(flat[::2], flat[1::2]))


def _picture(image: Tensor):
    if image.dtype == torch.uint8:
        image = image.cpu().float() / 255
    else:
        image = image.cpu().float().nan_to_num(0, 0, 0)
        low, high = image.min(), image.max()
        if low < 0 or high > 1:
            image = (image - low) / (high - low).clamp(min=1e-12)
    return image.expand(3, -1, -1).permute(1, 2, 0).clamp(0, 1).numpy()


def _boxes(name: str, boxes: Sequence[Tensor] | None, batch: int) -> list:
    if boxes is None:
        return [[]] * batch
    if not isinstance(boxes, (list, tuple)):
        raise TypeError(f"{name} is a {type(boxes).__name__}; expected a list of {batch} tensors [G, 4]")
    if len(boxes) != batch:
        raise ValueError(f"{name} has {len(boxes)} tensors; expected {batch}, one for each image")
    for b, x in enumerate(boxes):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}[{b}] is a {type(x).__name__}; expected a tensor [G, 4]")
        if x.dim() != 2 or x.shape[1] != 4:
            raise ValueError(f"{name}[{b}] has shape {list(x.shape)}; expected [G, 4]: x1 y1 x2 y2")
    return [x.detach().cpu().tolist() for x in boxes]


def _name(names: Names | None, label: int) -> str:
    if names is None:
        return f"category {label}"
    try:
        return str(names[label])
    except (IndexError, KeyError):
        raise ValueError(f"names has no entry for label {label}; expected one for each category present") from None


def anchor_name(regions: Regions, p: int, names: Names | None) -> str:
    """What a row of the masks is called."""
    if p == 0:
        return "background"
    label = int(regions.classes[(p - 1) // 2])
    return f"{_name(names, label) if label >= 0 else 'no category'}: {'center' if p % 2 else 'edge'}"


def _stride(sy: float, sx: float) -> str:
    return f"{sy:g}" if sy == sx else f"{sy:g} x {sx:g}"


def _reach(pictures: list, shapes: Sequence, scales: Sequence) -> tuple[float, float]:
    """Width and height, in input pixels, that hold the images and their maps. A map may reach beyond the image."""
    height = max(len(pictures[0]), *(h * sy for (h, _), (sy, _) in zip(shapes, scales)))
    width = max(len(pictures[0][0]), *(w * sx for (_, w), (_, sx) in zip(shapes, scales)))
    return width, height


def _draw_image(axis, picture, gray: bool) -> None:
    if gray:  # and light, so that no color of the picture looks like paint, and no shadow like padding
        picture = 0.3 + 0.7 * picture.mean(2, keepdims=True).repeat(3, 2)
    h, w, _ = picture.shape
    axis.imshow(picture, extent=(0, w, h, 0))


def _map(axis, values: Tensor, sy: float, sx: float, **style):
    h, w = values.shape[:2]
    shown = axis.imshow(values.numpy(), extent=(0, w * sx, h * sy, 0), interpolation="nearest", **style)
    if w <= _GRID and h <= _GRID:
        line = {"colors": "white", "linewidth": 0.3, "alpha": 0.35}
        axis.vlines([x * sx for x in range(w + 1)], 0, h * sy, **line)
        axis.hlines([y * sy for y in range(h + 1)], 0, w * sx, **line)
    return shown


def _paint(axis, kind: Tensor, sy: float, sx: float) -> None:
    """`kind` [H, W]: an index into KINDS, or -1 for no paint."""
    palette = torch.tensor([[int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] + [_PAINT] for c in _COLORS] + [[0.0] * 4])
    _map(axis, palette[kind.long()], sy, sx)


def _outline(axis, boxes: list, line: str) -> None:
    for x1, y1, x2, y2 in boxes:
        xs, ys = [x1, x2, x2, x1, x1], [y1, y1, y2, y2, y1]
        axis.plot(xs, ys, color="white", linewidth=1.3)  # legible on dark and on light
        axis.plot(xs, ys, line, color="black", linewidth=0.5 if line == "-" else 0.9)


def _write_names(axis, regions: Regions, image: int, scale: tuple[float, float], names: Names) -> None:
    from matplotlib.patheffects import withStroke

    masks, (sy, sx) = regions.masks(0)[:, image].cpu(), scale
    style = {"ha": "center", "va": "center", "clip_on": True, "fontsize": 7.5, "color": "white"}
    style["parse_math"] = False  # a $ in a name is a $
    for k, label in enumerate(regions.classes.tolist()):
        if label < 0:
            break
        for y, x in _pieces(masks[1 + 2 * k] | masks[2 + 2 * k]):
            text = axis.text((x + 0.5) * sx, (y + 0.5) * sy, _name(names, label), **style)
            text.set_path_effects([withStroke(linewidth=2, foreground="black")])


def _pieces(mask: Tensor) -> list[tuple[int, int]]:
    """For each connected piece of a mask [H, W], the pixel (y, x) nearest to its middle."""
    left, found = {(y, x) for y, x in mask.nonzero().tolist()}, []
    while left:
        piece = [left.pop()]
        for y, x in piece:  # grows while it is walked
            near = left & {(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)}
            left -= near
            piece += near
        my, mx = (sum(values) / len(piece) for values in zip(*piece))
        found.append(min(piece, key=lambda p: ((p[0] - my) ** 2 + (p[1] - mx) ** 2, p)))
    return sorted(found)


def _legend(figure) -> None:
    from matplotlib.patches import Patch

    patches = [
        Patch(facecolor=c, alpha=0.85, edgecolor="black", linewidth=0.4, label=k) for k, c in zip(KINDS, _COLORS)
    ]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(KINDS), frameon=False, fontsize=9)
