"""The sizes that are measured, and random inputs of these sizes."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

import boxes as box_sources
import measure
import torch


@dataclass(frozen=True)
class Workload:
    batch: int = 2
    height: int = 800
    width: int = 1344
    channels: int = 256
    maps: int = 1  # of each of the two branches
    dtype: str = "float32"
    boxes: int = 14  # of the whole batch
    categories: int = 13  # present in the batch
    num_classes: int = 80
    channels_last: bool = False
    strides: tuple[int, ...] = (8, 16, 32, 64, 128)

    @property
    def level_shapes(self) -> list[tuple[int, int]]:
        return [(math.ceil(self.height / s), math.ceil(self.width / s)) for s in self.strides]

    @property
    def pixels(self) -> int:
        """Of one map on all levels, over the batch."""
        return self.batch * sum(h * w for h, w in self.level_shapes)

    @property
    def branch_bytes(self) -> int:
        """Of all maps of one branch on one side; a feature set is two of these."""
        return self.pixels * self.channels * self.maps * getattr(torch, self.dtype).itemsize

    @property
    def least_bytes(self) -> int:
        """What a step must read and write.

        Classification maps: student and teacher are read to pool the anchors, for the distances, and in backward (6
        reads), and the gradient is written. Box maps need no distances: 4 reads and the gradient.
        """
        return (6 + 1) * self.branch_bytes + (4 + 1) * self.branch_bytes

    def __str__(self) -> str:
        text = (
            f"batch {self.batch}, {self.height}x{self.width}, strides {self.strides[0]}..{self.strides[-1]}, "
            f"{self.channels} channels, {self.dtype}, {self.maps} map{'s' * (self.maps > 1)} per branch, "
            f"{self.boxes} boxes of {self.categories} categories"
        )
        return text + ", channels_last" * self.channels_last

    def choose_boxes(self, annotations: Path | None = None) -> box_sources.Boxes:
        shape = self.batch, self.height, self.width
        return box_sources.choose(annotations, *shape, self.boxes, self.categories, self.num_classes)

    def with_boxes(self, boxes: box_sources.Boxes) -> "Workload":
        return dataclasses.replace(
            self, boxes=len(boxes.labels), categories=boxes.categories, num_classes=boxes.num_classes
        )


_COCO_16 = Workload(batch=16, maps=4, dtype="bfloat16", boxes=130, categories=31)  # what 16 COCO images have
WORKLOADS = {
    "default": Workload(),
    "W1": Workload(maps=4, dtype="bfloat16", boxes=14, categories=5),  # FCOS-R50 as it is trained
    "W2": _COCO_16,
    "W3": dataclasses.replace(_COCO_16, dtype="float32"),
    "W4": dataclasses.replace(_COCO_16, boxes=400, categories=300, num_classes=1203),  # as crowded as LVIS
    "W5": dataclasses.replace(_COCO_16, channels_last=True),
}
SMOKE = Workload(height=64, width=96, channels=16, strides=(8, 16, 32))


def sweeps(base: Workload, full: bool) -> dict[str, list[tuple[str, Workload]]]:
    """Name of the sweep -> (label, workload) of its points: `base` with one thing changed."""

    def vary(**changes):
        return dataclasses.replace(base, **changes)

    def crowd(categories):  # as many boxes as it takes
        classes = base.num_classes if categories <= base.num_classes else 1203
        return vary(categories=categories, boxes=max(base.boxes, categories), num_classes=classes)

    sizes = [(400, 672), (600, 1008), (800, 1344), (1200, 2016)] if full else [(400, 672), (800, 1344)]
    counts = [1, 13, 50, 100, 200, 400] if full else [1, 13, 100, 400]
    dtypes = ["float32", "bfloat16", "float16"] if full else ["float32", "bfloat16"]
    return {
        "batch size": [(str(n), vary(batch=n)) for n in ([1, 2, 4, 8] if full else [1, 2, 4])],
        "image size": [(f"{h}x{w}", vary(height=h, width=w)) for h, w in sizes],
        "categories present": [(str(n), crowd(n)) for n in counts],
        "maps per branch": [(str(n), vary(maps=n)) for n in (1, 4)],
        "dtype": [(d, vary(dtype=d)) for d in dtypes],
    }


@dataclass
class Inputs:
    """One batch: the maps of both branches and both sides, `[m][l]`, and the boxes."""

    student_cls: list[list[torch.Tensor]]
    teacher_cls: list[list[torch.Tensor]]
    student_box: list[list[torch.Tensor]]
    teacher_box: list[list[torch.Tensor]]
    boxes: box_sources.Boxes

    @property
    def student(self) -> list[torch.Tensor]:
        return [x for level in (*self.student_cls, *self.student_box) for x in level]


def make_inputs(
    workload: Workload, boxes: box_sources.Boxes, device: torch.device, count: int | None = None
) -> list[Inputs]:
    """`count` batches; by default so many that together they are twice as large as the last cache, at most 16.

    On a GPU at least two: its cache holds the end of what was read last.
    """
    least = 2 if device.type == "cuda" else 1
    count = count or max(least, min(16, math.ceil(2 * measure.cache_bytes(device) / (4 * workload.branch_bytes))))
    generator = torch.Generator(device).manual_seed(0)
    layout = torch.channels_last if workload.channels_last else torch.contiguous_format

    def random_map(h, w):
        x = torch.randn(workload.batch, workload.channels, h, w, device=device, generator=generator)
        return x.to(getattr(torch, workload.dtype), memory_format=layout)

    def side():
        return [[[random_map(*s) for s in workload.level_shapes] for _ in range(workload.maps)] for _ in range(2)]

    def copied(maps, gradient):
        return [[x.clone().requires_grad_(gradient) for x in levels] for levels in maps]

    # Copies of the same values: all that matters is that they lie elsewhere in memory.
    student, teacher, boxes = side(), side(), boxes.to(device)
    return [
        Inputs(*(copied(maps[b], maps is student) for b in range(2) for maps in (student, teacher)), boxes)
        for _ in range(count)
    ]
