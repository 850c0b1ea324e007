"""A detector with SEA distillation for MMDetection's configs. README.md in this folder shows one."""

import os
from typing import Any

from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.runner import load_checkpoint
from torch import nn

from .distill.distiller import SEADistiller


@MODELS.register_module()
class SEADistilled(BaseModel):
    """Trains `student` with its own losses and those of SEA (arXiv 2203.00862). It predicts as `student` alone does.

    Args:
        student, teacher: configs of detectors, or file names of configs, whose `model` is used.
        teacher_checkpoint: file name of the teacher's weights, all of them. None: as its config initializes it.
        **options: those of :class:`sea_kernels.SEADistiller`.

    Raises:
        ValueError: the two normalize their input in different ways; an option of SEADistiller is wrong.
        RuntimeError: the checkpoint is not the teacher's.
    """

    def __init__(
        self, student: Any, teacher: Any, teacher_checkpoint: os.PathLike | str | None = None, **options: Any
    ) -> None:
        student, teacher = _build(student), _build(teacher)
        super().__init__(data_preprocessor=student.data_preprocessor)
        theirs, ours = (_normalization(model) for model in (teacher, student))
        if theirs != ours:
            raise ValueError(
                f"teacher normalizes its input by {theirs}; expected {ours}, as the student, whose input it gets"
            )
        if teacher_checkpoint is None:
            teacher.init_weights()
        else:
            load_checkpoint(teacher, os.fspath(teacher_checkpoint), map_location="cpu", strict=True)
        self.student = student
        self.distiller = SEADistiller(student, teacher, **options)

    def forward(self, inputs: Any, data_samples: Any = None, mode: str = "tensor") -> Any:
        out = self.student(inputs, data_samples, mode=mode)
        return out | self.distiller.losses() if mode == "loss" else out


def _normalization(model: nn.Module) -> dict[str, Any]:
    own = model.data_preprocessor
    values = {name: getattr(own, name).flatten().tolist() for name in ("mean", "std") if hasattr(own, name)}
    return values | {"channel_conversion": getattr(own, "_channel_conversion", None)}


def _build(config: Any) -> nn.Module:
    return MODELS.build(Config.fromfile(os.fspath(config)).model if isinstance(config, (str, os.PathLike)) else config)
