"""Ready taps of MMDetection's detectors. MMDetection itself is not imported."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..taps import Taps, Targets


def _run_dense(model: nn.Module, images: Tensor) -> None:
    for x in model.extract_feat(images):
        for tower in (model.bbox_head.cls_convs, model.bbox_head.reg_convs):
            nn.Sequential(*tower)(x)


def _run_two_stage(model: nn.Module, images: Tensor) -> None:
    for x in model.extract_feat(images):
        model.rpn_head.rpn_conv(x)


def _run_solo(model: nn.Module, images: Tensor) -> None:
    model.mask_head(model.extract_feat(images))


def _read_targets(output: Any, with_masks: bool) -> Targets | None:
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


_taps = partial(Taps, targets="data_preprocessor", read_targets=_read_targets)


def _numbered(name: str, tower: Sequence[nn.Module]) -> tuple[str, ...]:
    return tuple(f"{name}.{i}" for i in range(len(tower)))


def _yx(strides: Sequence[Sequence[int]]) -> tuple[tuple[int, int], ...]:
    return tuple((y, x) for x, y in strides)


def dense(model: nn.Module) -> Taps:
    head = model.bbox_head
    return _taps(
        _numbered("bbox_head.cls_convs", head.cls_convs),
        _numbered("bbox_head.reg_convs", head.reg_convs),
        _yx(head.prior_generator.strides),
        run=_run_dense,
        num_classes=head.num_classes,
    )


def two_stage(model: nn.Module) -> Taps:
    head = model.roi_head.bbox_head
    return _taps(
        ("neck",),
        ("rpn_head.rpn_conv",),
        _yx(model.rpn_head.prior_generator.strides),
        run=_run_two_stage,
        num_classes=(head[0] if isinstance(head, nn.ModuleList) else head).num_classes,
        anchor_on_box=False,
    )


def solo(model: nn.Module) -> Taps:
    head = model.mask_head
    return _taps(
        _numbered("mask_head.cls_convs", head.cls_convs),
        _numbered("mask_head.kernel_convs", head.kernel_convs),
        None,
        run=_run_solo,
        num_classes=head.num_classes,
    )
