"""Ground-truth boxes for the benchmarks: from a COCO annotation file, or sampled with COCO's statistics."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from sea_kernels import coco

# Instances of each of the 80 categories in COCO train2017 (crowds left out), in category order: 860,001 boxes.
COCO_INSTANCES = (
    262465, 7113, 43867, 8725, 5135, 6069, 4571, 9973, 10759, 12884, 1865, 1983, 1285, 9838, 10806, 4768, 5508, 6587,
    9509, 8147, 5513, 1294, 5303, 5131, 8720, 11431, 12354, 6496, 6192, 2682, 6646, 2685, 6347, 9076, 3276, 3747, 5543,
    6126, 4812, 24342, 7913, 20650, 5479, 7770, 6165, 14358, 9458, 5851, 4373, 6399, 7308, 7852, 2918, 5821, 7179, 6353,
    38491, 5779, 8652, 4192, 15714, 4157, 5805, 4970, 2262, 5703, 2855, 6434, 1673, 3334, 225, 5610, 2637, 24715, 6334,
    6613, 1481, 4793, 198, 1954,
)  # fmt: skip
BOXES_PER_IMAGE = 7.33  # mean in train2017; a geometric distribution has COCO's median (5) and 90th percentile (16) too
REPEAT = 0.6  # how often a box has the category of another box of its image: gives COCO's 2.9 categories an image
LOG_SIZE = (-2.15, 1.1)  # mean and deviation of log sqrt(box area / image area), cut off at 0.95
LOG_ASPECT = (0.15, 0.7)  # mean and deviation of log(height / width)


@dataclass
class Boxes:
    """The boxes of one batch, packed, in input pixels."""

    boxes: torch.Tensor  # float32 [G, 4] x1 y1 x2 y2
    labels: torch.Tensor  # int64 [G]
    batch_index: torch.Tensor  # int64 [G]
    ignore_boxes: torch.Tensor | None  # float32 [I, 4], COCO's crowds
    ignore_batch_index: torch.Tensor | None  # int64 [I]
    image_sizes: list[tuple[int, int]] | None  # (height, width) before padding; None: every image fills its map
    num_classes: int
    source: str  # one sentence for the output

    def to(self, device: torch.device) -> "Boxes":
        moved = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in vars(self).items()}
        return Boxes(**moved)

    def padded(self, room: int) -> "Boxes":
        """The same with rows of label -1 up to `room` boxes, as a captured graph that serves every batch has them."""
        rows = max(0, room - len(self.labels))
        pad = torch.nn.functional.pad
        labels, index = pad(self.labels, (0, rows), value=-1), pad(self.batch_index, (0, rows))
        return dataclasses.replace(self, boxes=pad(self.boxes, (0, 0, 0, rows)), labels=labels, batch_index=index)

    @property
    def categories(self) -> int:
        return len(self.labels[self.labels >= 0].unique())


def padded_size(sizes: list[tuple[int, int]]) -> list[int]:
    """(height, width) of a batch of such images, padded as detectors do: to the largest, and to multiples of 32."""
    return [32 * math.ceil(max(size[d] for size in sizes) / 32) for d in (0, 1)]


def choose(annotations: Path | None, batch: int, height: int, width: int, *numbers) -> Boxes:
    """Boxes from `sample` or, where there is a file, of the images whose numbers come nearest to those of `sample`."""
    sampled = sample(batch, height, width, *numbers)
    if annotations is None:
        return sampled
    return from_annotations(annotations, batch, height, width, len(sampled.labels), sampled.categories)


def category_weights(num_classes: int) -> np.ndarray:
    """COCO's shares for up to 80 categories; beyond, 1 / rank, about as unbalanced as LVIS."""
    if num_classes <= len(COCO_INSTANCES):
        weights = np.array(COCO_INSTANCES[:num_classes], dtype=float)
    else:
        weights = 1 / np.arange(1.0, num_classes + 1)
    return weights / weights.sum()


def sample(
    batch: int, height: int, width: int, boxes: int | None = None, categories: int | None = None,
    num_classes: int = 80, seed: int = 0,
) -> Boxes:  # fmt: skip
    """Boxes with COCO's statistics on `batch` images of `height` x `width` pixels.

    `boxes` (of the whole batch) and `categories` (present in the batch) are met exactly where they are given, and
    follow the statistics where they are not.
    """
    rng = np.random.default_rng(seed)
    weights = category_weights(num_classes)
    counts = rng.geometric(1 / BOXES_PER_IMAGE, batch)
    if boxes is not None:
        counts = rng.multinomial(boxes, counts / counts.sum())
    total = int(counts.sum())
    if categories is not None:
        if not 0 <= categories <= min(total, num_classes) or (total and not categories):
            raise ValueError(f"{total} boxes cannot show exactly {categories} of {num_classes} categories")
        present = rng.choice(num_classes, categories, replace=False, p=weights)
        again = rng.choice(present, total - categories, p=weights[present] / weights[present].sum()) if total else []
        labels = rng.permutation(np.concatenate([present, again]))
    else:
        labels = np.concatenate([_categories_of_an_image(rng, n, weights) for n in counts])

    size = np.minimum(np.exp(rng.normal(*LOG_SIZE, total)), 0.95) * np.sqrt(height * width)
    aspect = np.exp(rng.normal(*LOG_ASPECT, total) / 2)
    w, h = np.minimum(size / aspect, width), np.minimum(size * aspect, height)
    x, y = rng.random(total) * (width - w), rng.random(total) * (height - h)
    return Boxes(
        boxes=torch.from_numpy(np.stack([x, y, x + w, y + h], 1)).float().clamp_(min=0),
        labels=torch.from_numpy(labels.astype(np.int64)),
        batch_index=torch.from_numpy(np.repeat(np.arange(batch), counts)),
        ignore_boxes=None,
        ignore_batch_index=None,
        image_sizes=None,
        num_classes=num_classes,
        source=f"built-in sampler with COCO's statistics: {total} boxes of {len(np.unique(labels))} categories",
    )


def _categories_of_an_image(rng: np.random.Generator, count: int, weights: np.ndarray) -> np.ndarray:
    labels: list[int] = []
    for _ in range(count):
        again = labels and rng.random() < REPEAT
        labels.append(int(rng.choice(labels) if again else rng.choice(len(weights), p=weights)))
    return np.array(labels)


def from_annotations(path: Path, batch: int, height: int, width: int, boxes: int, categories: int) -> Boxes:
    """`batch` images of a COCO annotation file, scaled the way detectors do.

    The images are those whose numbers of boxes and of categories come nearest to `boxes` and `categories`; the same
    file gives the same images every time. An image is scaled until its shorter side is `height` or its longer side is
    `width`, whichever comes first (portrait images are skipped where there are enough landscape ones), and lies at
    the top left of its map. The rest is padding, which `image_sizes` tells. Crowds become ignore boxes.
    """
    try:
        annotations = coco.Annotations(path)
        found = sorted(annotations, key=lambda image: (len(str(image.id)), str(image.id)))
    except ValueError as error:
        raise SystemExit(str(error)) from None
    images = dict(enumerate(found))
    if unknown := [image.id for image in found if image.boxes and None in image.size]:
        raise SystemExit(f"{path}: the image of id {unknown[0]} has no height and width, by which it would be scaled")
    things = {i: [x for x in zip(image.boxes, image.labels) if _visible(x[0])] for i, image in images.items()}
    labels = {i: [label for _, label in rows] for i, rows in things.items() if rows}
    landscape = {i: labels[i] for i in labels if images[i].size[1] >= images[i].size[0]}
    candidates = landscape if len(landscape) >= batch else labels
    if len(candidates) < batch:
        raise SystemExit(f"{path} has {len(candidates)} images with boxes; a batch of {batch} was asked for")
    chosen = sorted(_nearest(candidates, batch, boxes, categories))

    rows, ignored, sizes = [], [], []  # (box, image of the batch, label)
    for b, i in enumerate(chosen):
        h, w = images[i].size
        scale = min(height / h, width / w)
        sizes.append((round(h * scale), round(w * scale)))
        rows += [([scale * v for v in box], b, label) for box, label in things[i]]
        ignored += [([scale * v for v in box], b, -1) for box in images[i].crowds if _visible(box)]
    box, index, label = map(torch.tensor, zip(*rows, strict=True))
    ignore, ignore_index, _ = map(torch.tensor, zip(*ignored, strict=True)) if ignored else (None, None, None)
    present = len(label.unique())
    return Boxes(
        boxes=box,
        labels=label,
        batch_index=index,
        ignore_boxes=ignore,
        ignore_batch_index=ignore_index,
        image_sizes=sizes,
        num_classes=len(annotations.names),
        source=f"COCO annotations {path.name}, images {', '.join(str(images[i].id) for i in chosen)}: "
        f"{len(label)} boxes of {present} categories, the nearest to {boxes} of {categories}",
    )


def _visible(box: tuple[float, ...]) -> bool:
    """Whether it has at least one pixel, but for rounding."""
    return min(box[2] - box[0], box[3] - box[1]) > 1 - 1e-6


def _nearest(labels: dict[int, list[int]], batch: int, boxes: int, categories: int) -> list[int]:
    """The `batch` images whose numbers together come nearest to those asked for, by exchanging one image at a time."""
    rng = np.random.default_rng(0)
    best: tuple[int, list[int]] | None = None
    for _ in range(20):
        order = rng.permutation(sorted(labels))[:1000].tolist()
        images, distance = order[:batch], None
        improved = True
        while improved:
            improved = False
            for slot in range(batch):
                others = images[:slot] + images[slot + 1 :]
                count = sum(len(labels[i]) for i in others)
                present = set().union(*(labels[i] for i in others))
                new_distance, new = min(
                    (abs(count + len(labels[i]) - boxes) + abs(len(present.union(labels[i])) - categories), i)
                    for i in order
                    if i not in others
                )
                if distance is None or new_distance < distance:
                    images, distance, improved = [*others, new], new_distance, True
        if best is None or distance < best[0]:
            best = distance, images
        if not best[0]:
            break
    return best[1]
