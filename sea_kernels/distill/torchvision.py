"""Ready taps of torchvision's detectors."""

import types
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..taps import Taps, Targets


def _features(model: nn.Module, images: Tensor) -> list[Tensor]:
    out = model.backbone(images)
    return [out] if isinstance(out, Tensor) else list(out.values())


def _run(model: nn.Module, images: Tensor, towers: Sequence[str]) -> None:
    for x in _features(model, images):
        for name in towers:
            model.get_submodule(name)(x)


def _run_ssd(model: nn.Module, images: Tensor, head: bool) -> None:
    features = _features(model, images)
    if head:
        model.head(features)


class _AsItIs(nn.Module):
    """Replaces a detector's transform for images that are already resized and normalized."""

    def __init__(self, image_sizes: list[tuple[int, int]]) -> None:
        super().__init__()
        self.image_sizes = image_sizes

    def forward(self, images: Tensor, targets: None) -> tuple[Any, None]:
        return types.SimpleNamespace(tensors=images, image_sizes=self.image_sizes), targets

    def postprocess(self, result: list[dict], *_sizes: Any) -> list[dict]:
        return result


def _detect(model: nn.Module, images: Tensor, image_sizes: list[tuple[int, int]], first_label: int) -> list[dict]:
    transform = model.transform
    model.transform = _AsItIs(image_sizes)
    try:
        found = model(images)
    finally:
        model.transform = transform
    return [{"boxes": x["boxes"], "labels": x["labels"] - first_label, "scores": x["scores"]} for x in found]


def _strides(size: Sequence[int], shapes: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """Those of torchvision's AnchorGenerator: the padded input divided by the map, rounded down."""
    return [tuple(n // m for n, m in zip(size, shape)) for shape in shapes]


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
        _strides,
        run=partial(_run, towers=towers),
        targets="transform",
        read_targets=partial(_read_targets, first_label=0),
        detect=partial(_detect, first_label=0),
        num_classes=model.head.classification_head.num_classes,
    )


def two_stage(model: nn.Module) -> Taps:
    classes = getattr(model.roi_heads.box_predictor, "cls_score", None)
    return Taps(
        ("backbone",),
        ("rpn.head.conv",),
        _strides,
        run=partial(_run, towers=("rpn.head.conv",)),
        targets="transform",
        read_targets=partial(_read_targets, first_label=1),  # 0 is the background
        detect=partial(_detect, first_label=1),
        num_classes=classes.out_features - 1 if isinstance(classes, nn.Linear) else None,
        anchor_on_box=False,
    )


def ssd(model: nn.Module) -> Taps:
    """SSDLite's heads have a depthwise convolution before their predictor, one for each level. SSD's have none."""
    heads = [f"head.{branch}_head.module_list" for branch in ("classification", "regression")]
    blocks = [model.get_submodule(name) for name in heads]
    lite = isinstance(blocks[0][0], nn.Sequential)
    cls, box = (
        tuple(f"{name}.{level}.0" for level in range(len(levels))) if lite else "backbone"
        for name, levels in zip(heads, blocks)
    )
    return Taps(
        (cls,),
        (box,),
        model.anchor_generator.steps,  # None: its boxes divide the input evenly
        run=partial(_run_ssd, head=lite),
        targets="transform",
        read_targets=partial(_read_targets, first_label=1),
        detect=partial(_detect, first_label=1),
        num_classes=model.head.classification_head.num_columns - 1,
        anchor_on_box=lite,
    )
