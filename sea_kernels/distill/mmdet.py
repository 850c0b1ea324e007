"""Ready taps of MMDetection's detectors, by the parts that they have. MMDetection itself is not imported."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..taps import Taps, Targets, names

Entry = str | tuple[str, ...]  # of Taps.cls and Taps.box

_TOWERS = (
    ("cls_convs", "reg_convs"),
    ("multi_level_cls_convs", "multi_level_reg_convs"),  # YOLOX
    ("cls_subnet", "bbox_subnet"),  # YOLOF
    ("cls_convs", "kernel_convs"),  # SOLOv2
    ("cls_decomp", "reg_decomp"),  # TOOD: what it makes of the tower that both branches share
)


def _head(model: nn.Module) -> str:
    """The name of the head that takes the maps of the neck."""
    heads = ("rpn_head", "bbox_head", "mask_head")
    return next((name for name in heads if getattr(model, name, None) is not None), "")


def _run_head(model: nn.Module, images: Tensor) -> None:
    maps, name = model.extract_feat(images), _head(model)
    if name and not hasattr(model, "forward_transformer"):  # whose head takes queries
        model.get_submodule(name)(maps)


def _run_neck(model: nn.Module, images: Tensor) -> None:
    model.extract_feat(images)


def _run_two_stage(model: nn.Module, images: Tensor) -> None:
    for x in model.extract_feat(images):
        model.rpn_head.rpn_conv(x)


def _run_towers(model: nn.Module, images: Tensor, towers: Sequence[Sequence[Entry]]) -> None:
    for level, features in enumerate(model.extract_feat(images)):
        for tower in towers:
            x = features
            for entry in tower:
                x = model.get_submodule(entry if isinstance(entry, str) else entry[level])(x)


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


def _strides(size: Sequence[int], shapes: Sequence[Sequence[int]]) -> list[int]:
    """Every stage of a backbone halves its maps, rounding up: the power of two that makes the map of the input."""

    def stride(shape: Sequence[int]) -> int:
        s = 1
        while any(-(-n // s) > m for n, m in zip(size, shape)):
            s *= 2
        return s

    return [stride(shape) for shape in shapes]


def _strides_of(head: Any) -> Any:
    priors = getattr(head, "prior_generator", None)
    return _strides if priors is None else tuple((y, x) for x, y in priors.strides)


def _entries(model: nn.Module, name: str, strides: Any) -> tuple[Entry, ...]:
    """The blocks of a tower that the levels share, or of one tower for each level. Empty: there is no such tower."""
    try:
        tower = model.get_submodule(name)
    except AttributeError:
        return ()
    if not isinstance(tower, (nn.ModuleList, nn.Sequential)):
        return (name,)
    several = all(isinstance(blocks, (nn.ModuleList, nn.Sequential)) for blocks in tower)
    if not several or not (callable(strides) or len(strides) == len(tower)):
        return tuple(f"{name}.{i}" for i in range(len(tower)))
    # A bare convolution is a predictor: SSD's lists have the same names.
    depth = min((sum(not isinstance(block, nn.Conv2d) for block in blocks) for blocks in tower), default=0)
    return tuple(tuple(f"{name}.{level}.{i}" for level in range(len(tower))) for i in range(depth))


def _modules(model: nn.Module, entries: tuple[Entry, ...]) -> set[nn.Module]:
    return {model.get_submodule(name) for entry in entries for name in names(entry)}


_taps = partial(Taps, targets="data_preprocessor", read_targets=_read_targets)


def detector(model: nn.Module) -> Taps:
    """Taps by structure: a head's towers; the neck and the RPN's convolution; or else the neck alone."""
    name = _head(model)
    if name == "rpn_head":
        return _two_stage(model)
    head = getattr(model, name, None) if name else None
    strides = _strides_of(head)
    for branches in _TOWERS:
        cls, box = (_entries(model, f"{name}.{branch}", strides) for branch in branches)
        if cls and box:
            if _modules(model, cls) & _modules(model, box):
                break  # RTMDet-Ins runs one tower twice a level
            grids = "kernel_convs" in branches
            whole = grids or "cls_decomp" in branches
            return _taps(
                cls,
                box,
                None if grids else strides,
                run=_run_head if whole else partial(_run_towers, towers=(cls, box)),
                num_classes=head.num_classes,
            )
    if getattr(model, "neck", None) is None:
        raise TypeError(
            f"no ready taps for {type(model).__name__}: it has no neck, and no towers in {name or 'a head'}; expected "
            "taps=sea_kernels.taps.Taps(cls=..., box=..., strides=...) with the names of the modules that make the maps"
        )
    return _taps(
        ("neck",),
        ("neck",),
        strides,
        run=_run_neck,
        num_classes=getattr(head, "num_classes", None) or _roi_classes(model),
        anchor_on_box=False,
    )


def _roi_classes(model: nn.Module) -> int | None:
    head = getattr(getattr(model, "roi_head", None), "bbox_head", None)
    return getattr(head[0] if isinstance(head, nn.ModuleList) else head, "num_classes", None)


def _two_stage(model: nn.Module) -> Taps:
    features = "backbone" if getattr(model, "neck", None) is None else "neck"
    conv = hasattr(model.rpn_head, "rpn_conv")
    return _taps(
        (features,),
        ("rpn_head.rpn_conv" if conv else features,),
        _strides_of(model.rpn_head),
        run=_run_two_stage if conv else _run_neck,
        num_classes=_roi_classes(model),
        anchor_on_box=False,
    )


def change(model: nn.Module, fields: dict[str, Any]) -> Taps:
    """The ready taps of a detector with other fields, as a config has them."""
    try:
        taps = detector(model)
    except TypeError:
        taps = _taps((), (), _strides, run=_run_head)
    fields = {k: _tuples(v) if k in ("cls", "box") else v for k, v in fields.items()}
    if fields.keys() & {"cls", "box"}:
        taps = dataclasses.replace(taps, run=_run_head)  # the ready one runs nothing but the ready maps
    return dataclasses.replace(taps, **fields)


def _tuples(entries: Any) -> tuple[Entry, ...]:
    entries = (entries,) if isinstance(entries, str) else entries
    return tuple(entry if isinstance(entry, str) else tuple(entry) for entry in entries)
