"""Which maps of a detector SEA compares, and where they come from: ready for torchvision and MMDetection, else by name.

| detector | classification maps | box maps | strides |
|---|---|---|---|
| torchvision FCOS, RetinaNet | each convolution of the classification tower | each of the box tower | 8 .. 128 |
| torchvision Faster, Mask R-CNN | output of the FPN | output of the RPN's convolution | 4 .. 64 |
| MMDetection FCOS, RetinaNet, ATSS, GFL | `bbox_head.cls_convs` | `bbox_head.reg_convs` | the head's (8 .. 128) |
| MMDetection Faster, Cascade, Mask R-CNN | output of `neck` | `rpn_head.rpn_conv` | the RPN's (4 .. 64) |
| MMDetection SOLOv2 | `mask_head.cls_convs` | `mask_head.kernel_convs` | input / grid |

Two-stage detectors have no towers that all levels share, and the features of student's and teacher's proposals do not
pair up. There anchors and distances compare the FPN's outputs, and the box maps are for the localisation loss only.

This file imports no detection library: detectors are recognised by their classes' names.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Targets:
    """The ground truth of one batch as :meth:`sea_kernels.Regions.from_boxes` takes it, in pixels of `Taps.input`'s."""

    boxes: list[Tensor]  # B of [G_b, 4]
    labels: list[Tensor]  # B of [G_b], from 0
    image_sizes: list[tuple[int, int]]  # B of (height, width), before padding
    ignore_boxes: list[Tensor] | None = None  # B of [I_b, 4]
    masks: list[Tensor] | None = None  # B of [G_b, H, W]


@dataclass(frozen=True)
class Taps:
    """Where a detector's maps are. A module named fires once a level, in level order, or once with all its levels.

    Where every level has modules of its own, as in YOLO, an entry is a tuple of L names instead of one.

    Args:
        cls: names of the modules (as in `named_modules()`) whose outputs are the classification maps, a set each.
        box: the same for the box maps.
        strides: of every level, as for :meth:`sea_kernels.Regions.from_boxes`; None where the maps divide the input
            evenly whatever its size, as SOLOv2's grids do.
        input: name of the module whose first argument is the batch of images, [B, 3, H, W], padded and normalised. A
            forward of the detector begins where it is called.
        run: `run(model, images)` computes a teacher's maps and as little else as it can. None: `model(images)`.
        targets: name of a module whose output holds the ground truth, and called before `input`; None: there is none.
        read_targets: `read_targets(output, with_masks)` makes `Targets` of that, or None where it holds none.
        num_classes: number of the detector's categories; None: not known.
        anchor_on_box: box maps take part in the anchor loss.
    """

    cls: tuple[str | tuple[str, ...], ...]
    box: tuple[str | tuple[str, ...], ...]
    strides: Sequence[float | Sequence[float]] | None
    input: str = "backbone"
    run: Callable[[nn.Module, Tensor], Any] | None = None
    targets: str | None = None
    read_targets: Callable[[Any, bool], Targets | None] | None = None
    num_classes: int | None = None
    anchor_on_box: bool = True


def names(entry: str | tuple[str, ...]) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else tuple(entry)


def find(model: nn.Module) -> Taps:
    """The ready taps of a torchvision or MMDetection detector (bare, or wrapped by DDP or torch.compile).

    Raises:
        TypeError: the model is none of the detectors in this file's table; write `Taps` with its modules' names.
    """
    model = unwrap(model)
    for kind in type(model).__mro__:
        family = kind.__module__.split(".")[0]
        make = _FAMILIES.get((family, kind.__name__))
        if make is not None:
            return make(model)
    raise TypeError(
        f"no ready taps for {type(model).__module__}.{type(model).__qualname__}; expected one of "
        f"{', '.join(f'{family} {name}' for family, name in _FAMILIES)}, or taps=sea_kernels.taps.Taps(cls=..., "
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


# ------------------------------------------------------------------------------------------------------- torchvision


def _run_towers(model: nn.Module, features: Sequence[Tensor], towers: Sequence[str]) -> None:
    for x in features:
        for name in towers:
            model.get_submodule(name)(x)


def _run_torchvision(model: nn.Module, images: Tensor, towers: Sequence[str]) -> None:
    _run_towers(model, list(model.backbone(images).values()), towers)


def _torchvision_targets(output: Any, with_masks: bool, first_label: int) -> Targets | None:
    images, targets = output
    if targets is None:
        return None
    boxes, labels, ignore = [t["boxes"] for t in targets], [t["labels"] - first_label for t in targets], None
    if any("iscrowd" in t for t in targets):
        crowd = [t.get("iscrowd", torch.zeros_like(x)).bool() for t, x in zip(targets, labels)]
        # Chosen by value, without an index that would wait for the device: what is no crowd lies outside the image.
        ignore = [torch.where(c.unsqueeze(1), b, -2.0) for b, c in zip(boxes, crowd)]
        labels = [torch.where(c, -1, x) for x, c in zip(labels, crowd)]
    masks = [t["masks"] for t in targets] if with_masks else None
    return Targets(boxes, labels, [tuple(size) for size in images.image_sizes], ignore, masks)


def _torchvision_dense(model: nn.Module) -> Taps:
    def convolutions(name: str) -> tuple[str, ...]:
        # FCOS lists convolution, norm and activation one by one, RetinaNet a block of them
        tower = model.get_submodule(name)
        flat = any(isinstance(layer, nn.Conv2d) for layer in tower)
        return tuple(f"{name}.{i}" for i, layer in enumerate(tower) if not flat or isinstance(layer, nn.ReLU))

    towers = "head.classification_head.conv", "head.regression_head.conv"
    cls, box = (convolutions(name) for name in towers)
    return Taps(
        cls,
        box,
        (8, 16, 32, 64, 128),
        run=partial(_run_torchvision, towers=towers),
        targets="transform",
        read_targets=partial(_torchvision_targets, first_label=0),
        num_classes=model.head.classification_head.num_classes,
    )


def _torchvision_two_stage(model: nn.Module) -> Taps:
    return Taps(
        ("backbone",),
        ("rpn.head.conv",),
        (4, 8, 16, 32, 64),
        run=partial(_run_torchvision, towers=("rpn.head.conv",)),
        targets="transform",
        read_targets=partial(_torchvision_targets, first_label=1),  # 0 is the background
        num_classes=model.roi_heads.box_predictor.cls_score.out_features - 1,
        anchor_on_box=False,
    )


# ------------------------------------------------------------------------------------------------------- MMDetection


def _run_mmdet_dense(model: nn.Module, images: Tensor) -> None:
    for x in model.extract_feat(images):
        for tower in (model.bbox_head.cls_convs, model.bbox_head.reg_convs):
            nn.Sequential(*tower)(x)


def _run_mmdet_two_stage(model: nn.Module, images: Tensor) -> None:
    _run_towers(model, model.extract_feat(images), ("rpn_head.rpn_conv",))


def _run_mmdet_solo(model: nn.Module, images: Tensor) -> None:
    model.mask_head(model.extract_feat(images))


def _mmdet_targets(output: Any, with_masks: bool) -> Targets | None:
    samples = output["data_samples"]
    if samples is None:
        return None

    def corners(instances: Any) -> Tensor:
        return getattr(instances.bboxes, "tensor", instances.bboxes)

    boxes, labels = [corners(s.gt_instances) for s in samples], [s.gt_instances.labels for s in samples]
    ignore = masks = None
    if any("bboxes" in s.get("ignored_instances", ()) for s in samples):
        empty = [b.new_empty(0, 4) for b in boxes]
        ignore = [
            corners(s.ignored_instances) if "bboxes" in s.get("ignored_instances", ()) else e
            for s, e in zip(samples, empty)
        ]
    if with_masks:
        masks = [s.gt_instances.masks.to_tensor(torch.bool, b.device) for s, b in zip(samples, boxes)]
    return Targets(boxes, labels, [tuple(s.img_shape[:2]) for s in samples], ignore, masks)


_mmdet_taps = partial(Taps, targets="data_preprocessor", read_targets=_mmdet_targets)


def _numbered(name: str, tower: Sequence[nn.Module]) -> tuple[str, ...]:
    return tuple(f"{name}.{i}" for i in range(len(tower)))


def _yx(strides: Sequence[Sequence[int]]) -> tuple[tuple[int, int], ...]:
    return tuple((y, x) for x, y in strides)


def _mmdet_dense(model: nn.Module) -> Taps:
    head = model.bbox_head
    return _mmdet_taps(
        _numbered("bbox_head.cls_convs", head.cls_convs),
        _numbered("bbox_head.reg_convs", head.reg_convs),
        _yx(head.prior_generator.strides),
        run=_run_mmdet_dense,
        num_classes=head.num_classes,
    )


def _mmdet_two_stage(model: nn.Module) -> Taps:
    head = model.roi_head.bbox_head
    return _mmdet_taps(
        ("neck",),
        ("rpn_head.rpn_conv",),
        _yx(model.rpn_head.prior_generator.strides),
        run=_run_mmdet_two_stage,
        num_classes=(head[0] if isinstance(head, nn.ModuleList) else head).num_classes,
        anchor_on_box=False,
    )


def _mmdet_solo(model: nn.Module) -> Taps:
    head = model.mask_head
    return _mmdet_taps(
        _numbered("mask_head.cls_convs", head.cls_convs),
        _numbered("mask_head.kernel_convs", head.kernel_convs),
        None,
        run=_run_mmdet_solo,
        num_classes=head.num_classes,
    )


_FAMILIES = {
    **{("torchvision", name): _torchvision_dense for name in ("FCOS", "RetinaNet")},
    **{("torchvision", name): _torchvision_two_stage for name in ("FasterRCNN", "MaskRCNN")},
    **{("mmdet", name): _mmdet_dense for name in ("FCOS", "RetinaNet", "ATSS", "GFL")},
    **{("mmdet", name): _mmdet_two_stage for name in ("FasterRCNN", "CascadeRCNN", "MaskRCNN")},
    ("mmdet", "SOLOv2"): _mmdet_solo,
}
