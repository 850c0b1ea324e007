"""Which maps of a detector SEA compares, and where they come from.

| detector | classification maps | box maps | strides |
|---|---|---|---|
| torchvision FCOS, RetinaNet | each convolution of the classification tower | each of the box tower | of its anchors |
| torchvision Faster, Mask, Keypoint R-CNN | output of the FPN | output of the RPN's convolution | of its anchors |
| MMDetection with towers (FCOS, RTMDet, YOLOX, ...) | `bbox_head.cls_convs` | `bbox_head.reg_convs` | the head's |
| MMDetection two-stage (Faster R-CNN, ...) | output of `neck` | `rpn_head.rpn_conv` | the RPN's (4 .. 64) |
| MMDetection SOLOv2 | `mask_head.cls_convs` | `mask_head.kernel_convs` | input / grid |
| other MMDetection detectors (DETR, DINO, ...) | output of `neck` | output of `neck` | powers of two |

Two-stage detectors have no towers that all levels share, and the student's proposals cannot be paired with the
teacher's. So the anchor and distance losses compare the outputs of the FPN, and only the localization loss uses the box
maps.

No detection library is imported. torchvision's detectors are recognized by the names of their classes, MMDetection's by
their parts.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Targets:
    """The ground truth of one batch as :meth:`sea_kernels.Regions.from_boxes` takes it.

    Boxes are in pixels of what the module `Taps.input` gets.
    """

    boxes: list[Tensor]  # B of [G_b, 4]
    labels: list[Tensor]  # B of [G_b], from 0
    image_sizes: list[tuple[int, int]]  # B of (height, width), before padding
    ignore_boxes: list[Tensor] | None = None  # B of [I_b, 4]
    masks: list[Tensor] | None = None  # B of [G_b, H, W]


@dataclass(frozen=True)
class Select:
    """An entry of `Taps.cls` or `Taps.box`: a module whose output holds the maps among other things.

    Args:
        name: of the module, as in `named_modules()`. It is called once per level, or once for all levels.
        select: `select(output, (height, width))` gives the map `[B, C, H, W]` or the maps in an output. The size is
            that of the detector's input in pixels.

    Example:
        >>> import sea_kernels as sk
        >>> entry = sk.taps.Select("neck", lambda output, size: [x for x, mask in output])  # of (map, mask) pairs
        >>> sk.taps.Taps((entry,), (entry,), strides=(8, 16), anchor_on_box=False).cls == (entry,)
        True
    """

    name: str
    select: Callable[[Any, tuple[int, int]], Tensor | Sequence[Tensor]]


def tokens(*strides: int, skip: int = 0) -> Callable[[Tensor, tuple[int, int]], list[Tensor]]:
    """For `Select`: the maps in a tensor of tokens, as transformers have.

    Args:
        strides: of the levels, in pixels of the input. Level l has `ceil(height / stride)` rows and
            `ceil(width / stride)` columns, row by row, and the levels follow each other.
        skip: number of tokens before the first map, such as a class token.

    Returns:
        A function of tokens `[B, N, C]` and (height, width) that gives L maps `[B, C, H_l, W_l]`. It raises a
        ValueError if N is not `skip` plus the pixels of all levels.

    Example:
        >>> import sea_kernels as sk, torch
        >>> select = sk.taps.tokens(16, 32, skip=1)
        >>> [x.shape for x in select(torch.zeros(2, 31, 256), (64, 96))]
        [torch.Size([2, 256, 4, 6]), torch.Size([2, 256, 2, 3])]
    """
    return partial(_maps_of_tokens, strides=strides, skip=skip)


def _maps_of_tokens(output: Tensor, size: tuple[int, int], strides: Sequence[int], skip: int) -> list[Tensor]:
    shapes = [tuple(-(-n // stride) for n in size) for stride in strides]
    counts = [height * width for height, width in shapes]
    if output.dim() != 3 or output.shape[1] != skip + sum(counts):
        raise ValueError(
            f"the output has shape {tuple(output.shape)}; expected tokens [B, {skip + sum(counts)}, C]: {skip} to "
            f"skip, then levels of {', '.join(f'{h} x {w}' for h, w in shapes)}"
        )
    levels = output[:, skip:].transpose(1, 2).split(counts, dim=2)
    return [x.unflatten(2, shape) for x, shape in zip(levels, shapes)]


Entry = str | tuple[str, ...] | Select


@dataclass(frozen=True)
class Taps:
    """Where a detector's maps are.

    A named module is called once per level, in the order of the levels, or once for all levels. If every level has
    modules of its own, as in YOLO, an entry is a tuple of L names instead of one name. If a module's output holds more
    than its maps, or holds them in another form, an entry is a :class:`Select`.

    Args:
        cls: names of the modules (as in `named_modules()`) whose outputs are the classification maps, one set each. One
            of `cls` and `box` may be empty: the losses of those maps are then 0.
        box: the same for the box maps.
        strides: for each level, as in :meth:`sea_kernels.Regions.from_boxes`. None if the maps divide the input evenly
            whatever its size, as SOLOv2's grids do. Or a function of the step's input size and map sizes:
            `strides((height, width), [(H_1, W_1), ...])`.
        input: name of the module whose first argument is the batch of images, [B, 3, H, W], padded and normalized. The
            call of this module marks the start of a forward of the detector.
        run: `run(model, images)` computes a teacher's maps and should stop there. If it takes more arguments, it gets
            the others that the student's module `input` got, such as a mask. None: `model(images, ...)` with
            all of them.
        targets: name of a module whose output holds the ground truth, and which is called before `input`. None: there
            is none.
        read_targets: `read_targets(output, with_masks)` converts that output to `Targets`, or returns None if it holds
            no ground truth.
        num_classes: number of the detector's categories. None: not known.
        channels: of the maps: a number, or one for each level. None: read from the modules.
        anchor_on_box: whether the anchor loss compares the box maps too.
        detect: `detect(model, images, image_sizes)` runs a teacher in evaluation mode to its end, including the tapped
            modules, and returns its detections: for each image a dict with `boxes` [N, 4] (x1 y1 x2 y2 in pixels of
            `images`), `labels` [N] from 0, and `scores` [N]. Only needed for `SEADistiller(boxes="teacher")`.

    Example:
        >>> import sea_kernels as sk
        >>> taps = sk.taps.Taps(cls=("head.cls.1", "head.cls.3"), box=("head.box.1",), strides=(8, 16, 32))
        >>> taps.input
        'backbone'
    """

    cls: tuple[Entry, ...]
    box: tuple[Entry, ...]
    strides: Sequence[float | Sequence[float]] | Callable[[Any, Any], Sequence] | None
    input: str = "backbone"
    run: Callable[[nn.Module, Tensor], Any] | None = None
    targets: str | None = None
    read_targets: Callable[[Any, bool], Targets | None] | None = None
    num_classes: int | None = None
    channels: int | Sequence[int] | None = None
    anchor_on_box: bool = True
    detect: Callable[[nn.Module, Tensor, list[tuple[int, int]]], list[dict[str, Tensor]]] | None = None

    def __post_init__(self) -> None:
        for branch in ("cls", "box"):
            entries = getattr(self, branch)
            one = isinstance(entries, (str, Select))
            object.__setattr__(self, branch, (entries,) if one else tuple(entries))


def names(entry: Entry) -> tuple[str, ...]:
    """The names of the modules of one entry of `Taps.cls` or `Taps.box`."""
    if isinstance(entry, Select):
        return (entry.name,)
    return (entry,) if isinstance(entry, str) else tuple(entry)


_ready: dict[tuple[str, str], Callable[[Any], Taps]] = {}


def register(family: str, detectors: Sequence[str], make: Callable[[Any], Taps]) -> None:
    """Adds detectors to `find`: `make(model)` gives the taps of these classes of the library `family`."""
    _ready.update({(family, name): make for name in detectors})


def find(model: nn.Module) -> Taps:
    """The ready taps of a torchvision or MMDetection detector (bare, or wrapped by DDP or torch.compile).

    Raises:
        TypeError: the model is not one of the known detectors. Write `Taps` with the names of its modules,
            which `candidates` lists.

    Example:
        >>> import sea_kernels as sk, torch
        >>> sk.taps.find(torch.nn.Linear(1, 1))
        Traceback (most recent call last):
            ...
        TypeError: no ready taps for torch.nn.modules.linear.Linear; expected one of torchvision FCOS, ...
    """
    model = unwrap(model)
    for kind in type(model).__mro__:
        family = kind.__module__.split(".")[0]
        make = _ready.get((family, kind.__name__))
        if make is not None:
            return make(model)
    raise TypeError(
        f"no ready taps for {type(model).__module__}.{type(model).__qualname__}; expected one of "
        f"{', '.join(f'{family} {name}' for family, name in _ready)}, or taps=sea_kernels.taps.Taps(cls=..., "
        "box=..., strides=...) with the names of the modules that make the maps, which "
        "sea_kernels.taps.candidates(model, images) lists"
    )


def values(output: Any) -> list:
    """The levels in what a module returned."""
    if isinstance(output, Mapping):
        return list(output.values())
    if dataclasses.is_dataclass(output):
        return [getattr(output, field.name) for field in dataclasses.fields(output)]
    return list(output) if isinstance(output, (list, tuple)) else [output]


def tensors(output: Any) -> list[Tensor]:
    """All tensors in what a module returned."""
    if isinstance(output, Tensor):
        return [output]
    inside = values(output)
    return [] if inside and inside[0] is output else [x for value in inside for x in tensors(value)]


def unwrap(model: nn.Module) -> nn.Module:
    """The detector inside DistributedDataParallel and torch.compile."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        else:
            return model


class Candidate(NamedTuple):
    """A module that computes maps, one of what `candidates` lists."""

    name: str  # as in named_modules(), for Taps
    kind: str  # its class
    calls: int  # in a forward
    shapes: tuple[tuple[int, ...], ...]  # of its maps [B, C, H, W], in their order
    strides: tuple[tuple[float, float], ...]  # (height, width) of the input / those of each map. (): not known


class _Table(list[Candidate]):
    def __repr__(self) -> str:
        rows = [("module", "class", "calls", "C x H x W of each map", "strides")]
        for x in self:
            shapes = [f"{c}x{h}x{w}" for _, c, h, w in x.shapes]
            strides = [f"{h:.4g}" if h == w else f"{h:.4g}x{w:.4g}" for h, w in x.strides]
            cells = [" ".join(maps[:8] + ["..."] * (len(maps) > 8)) for maps in (shapes, strides)]
            rows.append((x.name or "(itself)", x.kind, str(x.calls), *cells))
        widths = [max(map(len, column)) for column in zip(*rows)]
        return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def candidates(model: nn.Module, *inputs: Any, **keywords: Any) -> list[Candidate]:
    """The modules of a detector that compute maps, to choose from for `Taps`. Prints as a table.

    Calls `model(*inputs, **keywords)` once (the detector inside DistributedDataParallel and torch.compile), in
    evaluation mode and without gradients. Parameters, running statistics, modes and torch's random numbers stay as they
    are. Images of the size of training show all levels.

    First come modules with a map for each level, from fine to coarse: called once per level, or once with several maps
    in a list, tuple, dict or dataclass. Then the others, among them those that belong to one level. Both are in the
    order of the forward, and a module with several names has the first. Strides are the size of the images over that of
    the map; if the map's size was rounded up, the true stride may be larger. The images are the first
    tensor [B, 3, H, W] that a module gets. Maps of another batch size, such as those of RoIs, are left out, and so are
    modules whose maps all have a single pixel.

    Raises:
        Whatever the model raises for these inputs.

    Example:
        >>> import sea_kernels as sk, torch
        >>> from torch import nn
        >>> class Detector(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.backbone, self.tower = nn.Conv2d(3, 16, 8, 8), nn.Conv2d(16, 16, 3, 1, 1)
        ...     def forward(self, images):
        ...         x = self.backbone(images)
        ...         return [self.tower(x), self.tower(nn.functional.max_pool2d(x, 2))]
        >>> sk.taps.candidates(Detector(), torch.zeros(1, 3, 64, 96))
        module    class     calls  C x H x W of each map  strides
        tower     Conv2d    2      16x8x12 16x4x6         8 16
        (itself)  Detector  1      16x8x12 16x4x6         8 16
        backbone  Conv2d    1      16x8x12                8
    """
    model = unwrap(model)
    modules = dict(model.named_modules())
    modes = [(module, module.training) for module in modules.values()]
    seen: dict[str, list[list[tuple[int, ...]]]] = {}  # shapes, since a later operation may overwrite a map
    images: list[tuple[int, ...]] = []

    def see(name: str, _module: nn.Module, args: tuple, output: Any) -> None:
        if args and isinstance(args[0], Tensor) and args[0].dim() == 4 and args[0].shape[1] == 3:
            images.append(tuple(args[0].shape))
        seen.setdefault(name, []).append([tuple(x.shape) for x in tensors(output) if x.dim() == 4])

    hooks = [module.register_forward_hook(partial(see, name)) for name, module in modules.items()]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    try:
        for module in modules.values():  # not model.eval(): detectors override train() to do more
            module.training = False
        # What was compiled before ignores new hooks.
        with torch.no_grad(), torch.random.fork_rng(devices), torch.compiler.set_stance("force_eager"):
            model(*inputs, **keywords)
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes:
            module.training = mode

    found = _Table()
    for name, calls in seen.items():
        shapes = tuple(s for call in calls for s in call if not images or s[0] == images[0][0])
        if any(h * w > 1 for _, _, h, w in shapes):
            strides = tuple((images[0][2] / h, images[0][3] / w) for _, _, h, w in shapes if images)
            found.append(Candidate(name, type(modules[name]).__name__, len(calls), shapes, strides))
    found.sort(key=lambda x: not _falls([h * w for _, _, h, w in x.shapes]))
    return found


def _falls(sizes: list[int]) -> bool:
    return len(sizes) > 1 and all(a > b for a, b in itertools.pairwise(sizes))
