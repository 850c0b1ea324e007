"""A detector with SEA distillation, usable from an MMDetection config (the file of an existing detector unchanged):

custom_imports = dict(imports=["sea_kernels.mmdet"], allow_failed_imports=False)
_base_ = "fcos_r18_fpn.py"
model = dict(_delete_=True, type="SEADistilled", student=..., teacher=..., teacher_checkpoint="fcos_r101.pth")
"""

from typing import Any

from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.runner import load_checkpoint
from torch import nn

from .distiller import SEADistiller


@MODELS.register_module()
class SEADistilled(BaseModel):
    """Trains `student` with its own losses and those of SEA (arXiv 2203.00862); predicts as `student` alone does.

    Args:
        student, teacher: configs of detectors, or file names of configs whose `model` is meant.
        teacher_checkpoint: file name of the teacher's weights; None: as its config initialises it.
        **options: of :class:`sea_kernels.SEADistiller`.
    """

    def __init__(self, student: Any, teacher: Any, teacher_checkpoint: str | None = None, **options: Any) -> None:
        student, teacher = _build(student), _build(teacher)
        super().__init__(data_preprocessor=student.data_preprocessor)
        teacher.init_weights()
        if teacher_checkpoint is not None:
            load_checkpoint(teacher, teacher_checkpoint, map_location="cpu")
        self.student = student
        self.distiller = SEADistiller(student, teacher, **options)

    def forward(self, inputs: Any, data_samples: Any = None, mode: str = "tensor") -> Any:
        out = self.student(inputs, data_samples, mode=mode)
        return out | self.distiller.losses() if mode == "loss" else out


def _build(config: Any) -> nn.Module:
    return MODELS.build(Config.fromfile(config).model if isinstance(config, str) else config)
