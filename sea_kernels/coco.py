"""COCO's annotation files and segmentations."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import checks

Segmentation = Sequence[Sequence[float]] | Mapping[str, Any]  # polygons, or a run-length encoding


# ------------------------------------------------------------------------------------------------- annotation files


@dataclass(frozen=True)
class Image:
    """One image of an annotation file. Boxes are (x1, y1, x2, y2) in pixels of the image."""

    id: int
    file_name: str
    size: tuple[int | None, int | None]  # (height, width), None where the file does not say
    boxes: list[tuple[float, float, float, float]]
    labels: list[int]  # of each box, from 0 in the order of the category ids
    crowds: list[tuple[float, float, float, float]]  # the boxes that are marked as crowds


class Annotations:
    """An annotation file. Iterating over it gives its images, with their boxes, in the order of the file.

    Args:
        path: the file; it has images, annotations and categories.

    Raises:
        ValueError: it cannot be read, or is not an annotation file.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        try:
            text = self.path.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from None
        with self._reading():
            data = json.loads(text)
            categories = sorted(data["categories"], key=lambda c: c["id"])
            self.names = [str(c["name"]) for c in categories]  # of the categories, by label
            self._labels = {c["id"]: label for label, c in enumerate(categories)}
            self._images, self._annotations = list(data["images"]), {}
            for a in data["annotations"]:
                self._annotations.setdefault(a["image_id"], []).append(a)

    def __iter__(self) -> Iterator[Image]:
        return map(self._image, self._images)

    def find(self, file_name: str) -> Image:
        """The image with that file name, in any folder."""
        with self._reading():
            found = [entry for entry in self._images if Path(entry["file_name"]).name == file_name]
        if not found:
            raise ValueError(f"{self.path} has no image of file_name {file_name}")
        return self._image(found[0])

    def _image(self, entry: dict) -> Image:
        boxes, labels, crowds = [], [], []
        with self._reading():
            for a in self._annotations.get(entry["id"], []):
                x, y, w, h = map(float, a["bbox"])
                if a.get("iscrowd"):
                    crowds.append((x, y, x + w, y + h))
                else:
                    boxes.append((x, y, x + w, y + h))
                    labels.append(self._labels[a["category_id"]])
            size = entry.get("height"), entry.get("width")
            return Image(entry["id"], entry["file_name"], size, boxes, labels, crowds)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except json.JSONDecodeError as error:
            raise ValueError(f"{self.path} is not JSON: {error}") from None
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"{self.path} is not a COCO annotation file (images, annotations, categories): "
                f"{type(error).__name__} {error}"
            ) from None


# --------------------------------------------------------------------------------------------------- segmentations


def decode(name: str, segmentations: Sequence[Segmentation], height: int, width: int) -> Tensor:
    """COCO segmentations as masks, uint8 [G, height, width]"""
    if len(segmentations) == 0 or height * width == 0:
        return torch.zeros(len(segmentations), height, width, dtype=torch.uint8)
    try:
        from pycocotools import mask as coco
    except ImportError as error:
        raise ImportError(
            f"{name} is a list of COCO segmentations, which pycocotools decodes, and that is not installed: "
            "pip install pycocotools, or give a tensor [G, H, W]"
        ) from error
    encoded = []
    for g, x in enumerate(segmentations):
        if isinstance(x, Mapping):
            runs = _run_lengths(f"{name}[{g}]", x, height, width)
            encoded.append(coco.frPyObjects({"size": [height, width], "counts": runs}, height, width))
        else:
            encoded.append(coco.merge(coco.frPyObjects(_polygons(f"{name}[{g}]", x), height, width)))
    return torch.from_numpy(coco.decode(encoded)).permute(2, 0, 1).contiguous()


def _polygons(name: str, polygons: object) -> list[list[float]]:
    if not isinstance(polygons, (list, tuple)):
        raise TypeError(f"{name} is a {type(polygons).__name__}; expected run lengths (a dict) or a list of polygons")
    if len(polygons) == 0:
        raise ValueError(f"{name} is empty; expected at least one polygon")
    out = []
    for i, x in enumerate(polygons):
        x = x.tolist() if hasattr(x, "tolist") else x
        if not isinstance(x, (list, tuple)):
            raise TypeError(f"{name}[{i}] is a {type(x).__name__}; expected a polygon, a flat list x y x y ...")
        if len(x) < 6 or len(x) % 2 != 0:
            raise ValueError(f"{name}[{i}] has {len(x)} entries; expected x and y of three or more corners")
        for j, v in enumerate(x):
            if not checks.is_number(v):
                raise TypeError(f"{name}[{i}][{j}] is a {type(v).__name__}; expected a number")
            if not abs(v) < 1e6:  # pycocotools walks along the edges in steps of a fifth of a pixel
                raise ValueError(f"{name}[{i}][{j}] is {v}; expected a number between -1e6 and 1e6")
        out.append([float(v) for v in x])
    return out


def _run_lengths(name: str, encoded: Mapping[str, Any], height: int, width: int) -> list[int]:
    """The runs of a run-length encoding. They have to fill the image, or pycocotools reads memory past their end."""
    for key in ("size", "counts"):
        if key not in encoded:
            raise ValueError(f"{name} has no {key!r}; expected {{'size': (height, width), 'counts': ...}}")
    size, runs = encoded["size"], encoded["counts"]
    if not isinstance(size, (list, tuple)) or list(size) != [height, width]:
        raise ValueError(f"{name}['size'] is {size!r}; expected {[height, width]}, as image_sizes")
    if not isinstance(runs, (bytes, str, list, tuple)):
        raise TypeError(f"{name}['counts'] is a {type(runs).__name__}; expected bytes, str or a list of integers")
    if isinstance(runs, (bytes, str)):
        runs = _uncompress(runs.encode() if isinstance(runs, str) else runs)
    for i, n in enumerate(runs):
        checks.integer(f"{name}['counts'][{i}]", n, 0)
    if sum(runs) != height * width:
        raise ValueError(f"{name}['counts'] has {sum(runs)} pixels; expected {height} * {width}, as in 'size'")
    return list(runs)


def _uncompress(counts: bytes) -> list[int]:
    """Runs from COCO's string: 5 bits a character, lowest first. From the fourth on, the change from two runs ago."""
    runs, value, shift = [], 0, 0
    for c in counts:
        value |= (c - 48 & 31) << shift
        shift += 5
        if c - 48 & 32:
            continue
        if c - 48 & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value, shift = 0, 0
    return runs
