"""Distillation of a whole detector: hooks on student and teacher, and the losses between their maps."""

from ..taps import register
from . import mmdet, torchvision
from .schedule import Schedule

__all__ = ["Schedule"]

register("torchvision", ("FCOS", "RetinaNet"), torchvision.dense)
register("torchvision", ("FasterRCNN", "MaskRCNN"), torchvision.two_stage)
register("torchvision", ("SSD",), torchvision.ssd)
register("mmdet", ("BaseDetector",), mmdet.detector)
