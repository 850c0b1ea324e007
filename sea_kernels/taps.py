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

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

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
class Taps:
    """Where a detector's maps are.

    A named module is called once per level, in the order of the levels, or once for all levels. If every level has
    modules of its own, as in YOLO, an entry is a tuple of L names instead of one name.

    Args:
        cls: names of the modules (as in `named_modules()`) whose outputs are the classification maps, one set each.
        box: the same for the box maps.
        strides: for each level, as in :meth:`sea_kernels.Regions.from_boxes`. None if the maps divide the input evenly
            whatever its size, as SOLOv2's grids do. Or a function of the step's input size and map sizes:
            `strides((height, width), [(H_1, W_1), ...])`.
        input: name of the module whose first argument is the batch of images, [B, 3, H, W], padded and normalized. The
            call of this module marks the start of a forward of the detector.
        run: `run(model, images)` computes a teacher's maps, and as little else as possible. None: `model(images)`.
        targets: name of a module whose output holds the ground truth, and which is called before `input`. None: there
            is none.
        read_targets: `read_targets(output, with_masks)` converts that output to `Targets`, or returns None if it holds
            no ground truth.
        num_classes: number of the detector's categories. None: not known.
        anchor_on_box: box maps take part in the anchor loss.

    Example:
        >>> import sea_kernels as sk
        >>> taps = sk.taps.Taps(cls=("head.cls.1", "head.cls.3"), box=("head.box.1",), strides=(8, 16, 32))
        >>> taps.input
        'backbone'
    """

    cls: tuple[str | tuple[str, ...], ...]
    box: tuple[str | tuple[str, ...], ...]
    strides: Sequence[float | Sequence[float]] | Callable[[Any, Any], Sequence] | None
    input: str = "backbone"
    run: Callable[[nn.Module, Tensor], Any] | None = None
    targets: str | None = None
    read_targets: Callable[[Any, bool], Targets | None] | None = None
    num_classes: int | None = None
    anchor_on_box: bool = True


def names(entry: str | tuple[str, ...]) -> tuple[str, ...]:
    """The names of the modules of one entry of `Taps.cls` or `Taps.box`."""
    return (entry,) if isinstance(entry, str) else tuple(entry)


_ready: dict[tuple[str, str], Callable[[Any], Taps]] = {}


def register(family: str, detectors: Sequence[str], make: Callable[[Any], Taps]) -> None:
    """Adds detectors to `find`: `make(model)` gives the taps of these classes of the library `family`."""
    _ready.update({(family, name): make for name in detectors})


def find(model: nn.Module) -> Taps:
    """The ready taps of a torchvision or MMDetection detector (bare, or wrapped by DDP or torch.compile).

    Raises:
        TypeError: the model is not one of the known detectors. Write `Taps` with the names of its modules.

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
        "box=..., strides=...) with the names of the modules that make the maps"
    )


def unwrap(model: nn.Module) -> nn.Module:
    """The detector inside DistributedDataParallel and torch.compile."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        else:
            return model
