"""A detector with SEA distillation for MMDetection's configs. README.md in this folder shows one.

Importing this module lets `torch.load` read what MMEngine's Runner saves: its teachers, its resume, its `load_from`.

    python -m sea_kernels.mmdet epoch_12.pth student.pth

takes the student out of a checkpoint of :class:`SEADistilled`, without what only training needs.
"""

import argparse
import copy
import os
import pickle
import sys
from typing import Any

import numpy as np
import torch
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseModel
from mmengine.runner.checkpoint import CheckpointLoader, load_state_dict
from torch import Tensor, nn

from .distill.distiller import SEADistiller
from .distill.mmdet import change
from .distill.schedule import Schedule


@MODELS.register_module()
class SEADistilled(BaseModel):
    """Trains `student` with its own losses and those of SEA (arXiv 2203.00862). It predicts as `student` alone does.

    Its checkpoints have the student's own names, so they load with the student's own config too; the distiller's
    entries, `distiller.*`, are then reported as unexpected. Where the teacher's files do not exist, it predicts and
    validates, and training raises an error. Attributes that it lacks, such as `bbox_head`, are the student's.

    Args:
        student, teacher: configs of detectors, or file names of configs, whose `model` is used. "mmdet::fcos/..." is a
            config that MMDetection brings along.
        teacher_checkpoint: file name or URL of the teacher's weights, all of them: a state_dict, or what MMEngine's
            Runner saves. None: as its config initializes it.
        taps, teacher_taps: a :class:`sea_kernels.taps.Taps`, or a dict of the fields that differ from those of
            :func:`sea_kernels.taps.find`.
        schedule: as for SEADistiller, or a dict of the arguments of :class:`sea_kernels.distill.Schedule`.
        group: as for SEADistiller, or "world": all processes of the run, if it has several.
        **options: the others of :class:`sea_kernels.SEADistiller`.

    Raises:
        ValueError: the two normalize their input in different ways; an option of SEADistiller is wrong.
        RuntimeError: the checkpoint is not the teacher's.
        OSError: by `init_weights` and `forward(mode="loss")`: a file of the teacher could not be read.

    Example:
        >>> config = dict(
        ...     type="SEADistilled",
        ...     student="fcos_r18_fpn.py",
        ...     teacher="fcos_r50_fpn.py",
        ...     teacher_checkpoint="fcos_r50_fpn.pth",
        ...     schedule=dict(warmup=500),
        ...     group="world",
        ... )
    """

    def __init__(
        self,
        student: Any,
        teacher: Any,
        teacher_checkpoint: os.PathLike | str | None = None,
        *,
        taps: Any = None,
        teacher_taps: Any = None,
        schedule: Any = None,
        group: Any = None,
        **options: Any,
    ) -> None:
        student = _build(student)
        super().__init__(data_preprocessor=student.data_preprocessor)
        self.student, self.distiller, self._no_teacher = student, None, None
        self.register_state_dict_post_hook(_without_prefix)
        self.register_load_state_dict_pre_hook(_with_prefix)
        try:
            teacher = _build(teacher)
            if teacher_checkpoint is None:
                teacher.init_weights()
            else:
                load_state_dict(teacher, _student_of(_read(teacher_checkpoint))[0], strict=True)
        except OSError as error:
            self._no_teacher = error
            return
        theirs, ours = (_normalization(model) for model in (teacher, student))
        if theirs != ours:
            raise ValueError(
                f"teacher normalizes its input by {theirs}; expected {ours}, as the student, whose input it gets"
            )
        taps, teacher_taps = (
            change(model, fields) if isinstance(fields, dict) else fields
            for model, fields in ((student, taps), (teacher, teacher_taps or taps))
        )
        if isinstance(schedule, dict):
            schedule = Schedule(**schedule)
        if isinstance(group, str):
            if group != "world":
                raise ValueError(f'group is {group!r}; expected "world", a ProcessGroup, or None')
            several = torch.distributed.is_available() and torch.distributed.is_initialized()
            group = torch.distributed.group.WORLD if several else None
        self.distiller = SEADistiller(
            student, teacher, taps, teacher_taps=teacher_taps, schedule=schedule, group=group, **options
        )

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # hooks of MMDetection look for a detector's parts
            student = self.__dict__.get("_modules", {}).get("student")
            if student is None:
                raise
            return getattr(student, name)

    def init_weights(self) -> None:
        """Called before training, not before prediction."""
        self._need_teacher()
        super().init_weights()

    def forward(self, inputs: Any, data_samples: Any = None, mode: str = "tensor") -> Any:
        if mode != "loss":
            return self.student(inputs, data_samples, mode=mode)
        self._need_teacher()
        return self.student(inputs, data_samples, mode=mode) | self.distiller.losses()

    def loss(self, inputs: Any, data_samples: Any) -> dict[str, Tensor]:
        return self(inputs, data_samples, mode="loss")

    def _need_teacher(self) -> None:
        if self._no_teacher is not None:
            raise OSError(
                f"the teacher was not found, so this model can predict but not train: {self._no_teacher}"
            ) from self._no_teacher


def _without_prefix(_model: nn.Module, state: dict[str, Any], prefix: str, _metadata: dict) -> None:
    for key in [key for key in state if key.startswith(f"{prefix}student.")]:
        state[prefix + key.removeprefix(f"{prefix}student.")] = state.pop(key)
    versions = getattr(state, "_metadata", {})
    for key in [key for key in versions if key.startswith(f"{prefix}student.")]:
        versions[prefix + key.removeprefix(f"{prefix}student.")] = versions[key]


def _with_prefix(model: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for key in [key for key in state if key.startswith(prefix)]:
        own = key.removeprefix(prefix)
        if own.startswith("distiller."):
            if model.distiller is None:
                del state[key]
        elif not own.startswith("student."):  # as checkpoints of earlier versions have it
            state[f"{prefix}student.{own}"] = state.pop(key)


def _student_of(checkpoint: dict[str, Any]) -> tuple[dict[str, Tensor], bool]:
    """(a detector's own entries of a checkpoint, whether it was distilled)"""
    state = {key.removeprefix("module."): x for key, x in checkpoint.get("state_dict", checkpoint).items()}
    own = {key: x for key, x in state.items() if not key.startswith("distiller.")}
    distilled = len(own) < len(state)
    return ({key.removeprefix("student."): x for key, x in own.items()} if distilled else own), distilled


def _read(path: os.PathLike | str) -> dict[str, Any]:
    checkpoint = CheckpointLoader.load_checkpoint(os.fspath(path), map_location="cpu", logger="silent")
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path} holds a {type(checkpoint).__name__}; expected a state_dict, or a Runner's checkpoint")
    return checkpoint


def _normalization(model: nn.Module) -> dict[str, Any]:
    own = model.data_preprocessor
    values = {name: getattr(own, name).flatten().tolist() for name in ("mean", "std") if hasattr(own, name)}
    return values | {"channel_conversion": getattr(own, "_channel_conversion", None)}


def _build(config: Any) -> nn.Module:
    if isinstance(config, (str, os.PathLike)):
        path = os.fspath(config)
        config = (get_config(path) if "::" in path else Config.fromfile(path)).model
    return MODELS.build(copy.deepcopy(config))  # some detectors change theirs


def _statistic(owner: Any, name: str) -> Any:
    """Takes the place of `getattr`, by which a Runner's checkpoint names the statistics of its logs."""
    if owner is not HistoryBuffer:
        raise pickle.UnpicklingError(f"the file asks for {name!r} of {owner}; expected HistoryBuffer alone")
    return getattr(owner, name)


# mmengine 0.10.7 leaves torch.load at weights_only=True, which refuses the logs in every checkpoint of its Runner.
torch.serialization.add_safe_globals(
    [HistoryBuffer, (_statistic, "builtins.getattr"), np.dtype, np.ndarray]
    + [type(np.dtype(code)) for code in "?bhilqBHILQefdU"]
    + [
        (value.__reduce__()[0], f"numpy.{module}.multiarray.{name}")  # numpy 1 and 2 name the module differently
        for module in ("core", "_core")
        for name, value in (("scalar", np.float64(0)), ("_reconstruct", np.zeros(0)))
    ]
)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m sea_kernels.mmdet",
        description="Take the student out of a checkpoint of SEADistilled: its weights (those of the EMA, if the run "
        "had one) and the data set's classes, without teacher, adapters and optimizer.",
    )
    parser.add_argument("checkpoint", help="what a run with SEADistilled saved")
    parser.add_argument("out", help="the file to write; it loads with the student's own config")
    args = parser.parse_args(arguments)
    try:
        checkpoint = _read(args.checkpoint)
        state, distilled = _student_of(checkpoint)
        if not distilled:
            raise ValueError(f"{args.checkpoint} has no entry 'distiller.step'; expected a checkpoint of SEADistilled")
        meta = {k: v for k, v in checkpoint.get("meta", {}).items() if k in ("dataset_meta", "epoch", "iter")}
        torch.save({"state_dict": state, "meta": meta}, args.out)
    except (OSError, EOFError, ValueError, RuntimeError, pickle.UnpicklingError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    print(f"wrote {args.out}: {len(state)} tensors")
    return 0


if __name__ == "__main__":
    sys.exit(main())
