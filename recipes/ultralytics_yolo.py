"""Distills one YOLO into another. Further arguments are Ultralytics' own:

python recipes/ultralytics_yolo.py yolo11n.yaml yolo11s.pt coco.yaml epochs=100 imgsz=640
"""

import sys

import yaml
from ultralytics import YOLO

import sea_kernels.ultralytics

student, teacher, data, *options = sys.argv[1:]
options = {name: yaml.safe_load(value) for name, value in (option.split("=", 1) for option in options)}
YOLO(student).train(trainer=sea_kernels.ultralytics.trainer(teacher), data=data, **options)
