"""SEA distillation in Ultralytics' trainers. README.md in this folder shows it.

Ultralytics is under the AGPL-3.0. Only this module imports it, and nothing else in sea_kernels imports this module.
"""

import copy
import functools
import os
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from ultralytics import YOLO
from ultralytics import __version__ as version
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.models.yolo.pose import PoseTrainer
from ultralytics.models.yolo.segment import SegmentationTrainer
from ultralytics.nn.modules import Detect

from .distill.distiller import SEADistiller
from .taps import Taps, unwrap

_TRAINERS = {"detect": DetectionTrainer, "segment": SegmentationTrainer, "pose": PoseTrainer}
_COLUMNS = "sea_anchor", "sea_dist", "sea_loc"  # the columns of Ultralytics' progress line are 11 wide


def trainer(
    teacher: os.PathLike | str | YOLO | nn.Module, *, maps: str = "towers", base: type | None = None, **options: Any
) -> Callable:
    """The trainer for `YOLO(...).train(trainer=...)` that adds the losses of SEA to those of the student's task.

    The losses are in the progress line and in results.csv as `sea_anchor`, `sea_dist` and `sea_loc`, weighted. Like
    Ultralytics' own, they are multiplied by the number of images before backward. Validation is left alone. The
    trainer's checkpoints load without sea_kernels. To resume, pass a trainer with the same teacher and options.

    Args:
        teacher: a checkpoint, or a model, which is copied: any detector with the levels and the strides of the student.
        maps: which maps are compared: "towers", after each convolution of the head's branches for classes and boxes
            except the last, which predicts; or "neck", the head's inputs.
        base: the trainer to extend. Default: Ultralytics' own for the student's task (detect, segment, pose).
        **options: those of :class:`sea_kernels.SEADistiller`, except taps and masks. While it trains, the distiller
            is the attribute `distiller` of the trainer.

    Raises:
        TypeError, ValueError: the teacher has no weights or no Detect head, an option is wrong. When the training
            starts: teacher and student do not fit together, or the task has no trainer here.

    Example:
        >>> from ultralytics import YOLO  # doctest: +SKIP
        >>> import sea_kernels.ultralytics  # doctest: +SKIP
        >>> distilled = sea_kernels.ultralytics.trainer("yolo11s.pt")  # doctest: +SKIP
        >>> YOLO("yolo11n.yaml").train(trainer=distilled, data="coco8.yaml", epochs=10)  # doctest: +SKIP
    """
    if maps not in ("towers", "neck"):
        raise ValueError(f'maps is {maps!r}; expected "towers" or "neck"')
    if not set(options) <= (accepted := set(SEADistiller.__init__.__kwdefaults__) - {"teacher_taps", "use_masks"}):
        unknown = min(set(options) - accepted)
        raise TypeError(f"{unknown!r} is no option; expected maps, base, {', '.join(sorted(accepted))}")
    teacher = _load(teacher)
    head = _head("teacher", teacher)
    # The teacher is a copy: its head computes the maps and no more.
    head.forward = functools.partial(_towers, head) if maps == "towers" else _nothing

    def make(*args: Any, **kwargs: Any) -> Any:
        overrides = kwargs.get("overrides") or {}
        task = overrides.get("task", "detect")
        if base is None and task not in _TRAINERS:
            raise ValueError(f"the student's task is {task!r}; expected {', '.join(_TRAINERS)}, or base= a trainer")
        if overrides.get("distill_model"):
            raise ValueError(f"distill_model is {overrides['distill_model']!r}; expected None: the teacher is given")
        return _distilling(base or _TRAINERS[task], teacher, maps, options)(*args, **kwargs)

    return make


def _distilling(base: type, teacher: nn.Module, maps: str, options: dict[str, Any]) -> type:
    """A class of its own, as Ultralytics sends the class to its processes of several GPUs."""

    class SEATrainer(base):
        def build_optimizer(self, model: nn.Module, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
            # Here the student is on its device, and what is saved of the optimizer has not yet been loaded.
            optimizer = super().build_optimizer(model, *args, **kwargs)
            student = unwrap(model)
            found, expected = (_strides(side, x) for side, x in (("teacher", teacher), ("student", student)))
            if found != expected:
                raise ValueError(f"the teacher's head has strides {found}; expected {expected}, as the student's")
            if (channels := teacher.yaml.get("channels", 3)) != student.yaml.get("channels", 3):
                raise ValueError(f"the teacher takes {channels} channels; expected {student.yaml.get('channels', 3)}")
            taps = [(_tower_taps if maps == "towers" else _neck_taps)(x) for x in (student, teacher)]
            distiller = SEADistiller(student, teacher, taps[0], teacher_taps=taps[1], **options)
            self.distiller = distiller.to(self.device)
            adapters = list(self.distiller.parameters())
            if adapters:
                groups = [g for g in optimizer.param_groups if g.get("param_group") == "weight"]
                like = (groups or optimizer.param_groups)[-1]
                optimizer.add_param_group({k: v for k, v in like.items() if k != "params"} | {"params": adapters})
            # A checkpoint holds the optimizer's state_dict, which takes that of the distiller along.
            optimizer.register_state_dict_post_hook(functools.partial(_save, self.distiller))
            optimizer.register_load_state_dict_pre_hook(functools.partial(_restore, self.distiller))
            return optimizer

        def _setup_train(self) -> None:
            super()._setup_train()
            student, call = unwrap(self.model), self.distiller
            if torch.distributed.is_initialized() and list(call.parameters()):
                call = nn.parallel.DistributedDataParallel(call)
            own = student.criterion if getattr(student, "criterion", None) is not None else student.init_criterion()
            student.criterion = _Criterion(own, student, call)

        def label_loss_items(self, loss_items: dict | None = None, prefix: str = "train") -> Any:
            out = super().label_loss_items(loss_items, prefix)
            if prefix == "train":
                return out
            ours = {f"{prefix}/{name}" for name in _COLUMNS}
            return {k: v for k, v in out.items() if k not in ours} if loss_items else [k for k in out if k not in ours]

        def save_model(self) -> Any:
            # The EMA has copies of the hooks. They do nothing, but to load them takes sea_kernels.
            for module in self.ema.ema.modules():
                for hooks in (module._forward_hooks, module._forward_pre_hooks):
                    for key in [k for k, hook in hooks.items() if type(hook).__module__.startswith("sea_kernels")]:
                        del hooks[key]
            return super().save_model()

        def train(self) -> Any:
            try:
                return super().train()
            finally:
                if hasattr(self, "distiller"):
                    self.distiller.close()

    SEATrainer.__name__ = SEATrainer.__qualname__ = f"SEA{base.__name__}"
    return SEATrainer


class _Criterion:
    """The student's own criterion, with the losses of SEA while it trains. A copy of it is the student's own."""

    def __init__(self, own: Any, student: nn.Module, distiller: nn.Module) -> None:
        self._own, self._student, self._distiller = own, student, distiller

    def __call__(self, preds: Any, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        loss, items = self._own(preds, batch)
        if not isinstance(items, dict):
            raise RuntimeError(f"ultralytics {version} gives its losses in a tensor; expected 8.4.190 or later")
        if self._student.training and torch.is_grad_enabled():
            sea = list(self._distiller(**_targets(batch)).values())
            items = items | {name: x.detach() for name, x in zip(_COLUMNS, sea)}
            loss = torch.cat([loss.reshape(-1), len(batch["img"]) * torch.stack(sea)])
        return loss, items

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)

    def __reduce__(self) -> tuple:
        return copy.copy, (self._own,)


def _targets(batch: dict[str, Any]) -> dict[str, Any]:
    """Boxes and labels of Ultralytics' packed batch, as `SEADistiller.losses` takes them."""
    return {
        "boxes": batch["bboxes"],
        "labels": batch["cls"].flatten().long(),
        "batch_index": batch["batch_idx"].flatten().long(),
        "box_format": "cxcywh",
        "normalized": True,
    }


def _load(teacher: Any) -> nn.Module:
    if isinstance(teacher, (str, os.PathLike)):
        if os.fspath(teacher).endswith((".yaml", ".yml")):
            raise ValueError(f"teacher is {os.fspath(teacher)!r}, which has no weights; expected a checkpoint (.pt)")
        teacher = YOLO(os.fspath(teacher)).model
    else:
        teacher = copy.deepcopy(getattr(teacher, "model", None) if isinstance(teacher, YOLO) else teacher)
    if not isinstance(teacher, nn.Module):
        raise TypeError(f"teacher is a {type(teacher).__name__}; expected a checkpoint, a YOLO or a torch.nn.Module")
    return teacher.float()


def _head(side: str, model: nn.Module) -> Detect:
    layers = getattr(model, "model", None)
    head = layers[-1] if isinstance(layers, nn.Sequential) and len(layers) else model
    if not isinstance(head, Detect):
        raise TypeError(f"the {side}'s last layer is a {type(head).__name__}; expected a Detect head, as YOLO11 has")
    if head.cv2 is None:
        raise ValueError(f"the {side} was fused, which removed branches of its head; expected it as it was loaded")
    return head


def _strides(side: str, model: nn.Module) -> tuple[float, ...]:
    return tuple(_head(side, model).stride.tolist())


def _tower_taps(model: nn.Module) -> Taps:
    head, name = model.model[-1], f"model.{len(model.model) - 1}"

    def convolutions(branch: str) -> tuple[tuple[str, ...], ...]:
        count = len(getattr(head, branch)[0]) - 1
        return tuple(tuple(f"{name}.{branch}.{level}.{i}" for level in range(head.nl)) for i in range(count))

    strides = tuple(head.stride.tolist())
    return Taps(convolutions("cv3"), convolutions("cv2"), strides, input="model.0", num_classes=head.nc)


def _towers(head: Detect, maps: list[Tensor]) -> None:
    for branch in (head.cv2, head.cv3):
        for tower, x in zip(branch, maps):
            for layer in tower[:-1]:
                x = layer(x)


def _neck_taps(model: nn.Module) -> Taps:
    head = model.model[-1]
    maps = (tuple(f"model.{i % len(model.model)}" for i in head.f),)
    channels = tuple(tower[0].conv.in_channels for tower in head.cv2)
    strides = tuple(head.stride.tolist())
    return Taps(maps, maps, strides, input="model.0", num_classes=head.nc, channels=channels, anchor_on_box=False)


def _nothing(_maps: list[Tensor]) -> None:
    """The teacher's head, where the maps are those of its neck."""


def _save(distiller: nn.Module, _optimizer: Any, state: dict[str, Any]) -> None:
    state["sea_kernels"] = OrderedDict(distiller.state_dict())  # without the metadata, and so a plain dict of tensors


def _restore(distiller: nn.Module, _optimizer: Any, state: dict[str, Any]) -> None:
    if "sea_kernels" not in state:
        raise ValueError("the checkpoint has no state of a distiller; expected one that this trainer saved")
    distiller.load_state_dict(state["sea_kernels"])
