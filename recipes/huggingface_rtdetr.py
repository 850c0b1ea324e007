"""RT-DETR from a larger RT-DETR: python huggingface_rtdetr.py student teacher images/ instances.json [--max_steps=9]"""

import sys

from torchvision.datasets import CocoDetection
from transformers import AutoImageProcessor, AutoModelForObjectDetection, HfArgumentParser, TrainingArguments

from sea_kernels.transformers import trainer

student, teacher, images, annotations, *arguments = sys.argv[1:]  # names on the hub or folders; one kind of RT-DETR
model, processor = AutoModelForObjectDetection.from_pretrained(student), AutoImageProcessor.from_pretrained(student)
args = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(
    [*arguments, "--output_dir=distilled", "--remove_unused_columns=False", "--logging_steps=1"]
)[0]


def collate(samples):
    rows = [{"image_id": i, "annotations": boxes} for i, (_, boxes) in enumerate(samples)]
    return dict(processor([image for image, _ in samples], rows, return_tensors="pt"))


data = CocoDetection(images, annotations)
trainer(teacher)(model, args, train_dataset=data, data_collator=collate).train()
