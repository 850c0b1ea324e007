"""Ready taps of torchvision's detectors."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..taps import Taps, Targets


def _run(model: nn.Module, images: Tensor, towers: Sequence[str]) -> None:
    for x in model.backbone(images).values():
        for name in towers:
            model.get_submodule(name)(x)


def _read_targets(output: Any, with_masks: bool, first_label: int) -> Targets | None:
    images, targets = output
    if targets is None:
        return None
    boxes, labels, ignore = [t["boxes"] for t in targets], [t["labels"] - first_label for t in targets], None
    if any("iscrowd" in t for t in targets):
        crowd = [t.get("iscrowd", torch.zeros_like(x)).bool() for t, x in zip(targets, labels)]
        # Selected by value, as an index would wait for the device. Boxes that are no crowd are put outside the image.
        ignore = [torch.where(c.unsqueeze(1), b, -2.0) for b, c in zip(boxes, crowd)]
        labels = [torch.where(c, -1, x) for x, c in zip(labels, crowd)]
    masks = [t["masks"] for t in targets] if with_masks else None
    return Targets(boxes, labels, [tuple(size) for size in images.image_sizes], ignore, masks)


def dense(model: nn.Module) -> Taps:
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
        run=partial(_run, towers=towers),
        targets="transform",
        read_targets=partial(_read_targets, first_label=0),
        num_classes=model.head.classification_head.num_classes,
    )


def two_stage(model: nn.Module) -> Taps:
    return Taps(
        ("backbone",),
        ("rpn.head.conv",),
        (4, 8, 16, 32, 64),
        run=partial(_run, towers=("rpn.head.conv",)),
        targets="transform",
        read_targets=partial(_read_targets, first_label=1),  # 0 is the background
        num_classes=model.roi_heads.box_predictor.cls_score.out_features - 1,
        anchor_on_box=False,
    )
