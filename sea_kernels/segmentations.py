"""COCO's segmentations (polygons and run-length encodings), as the columns of pixels that they fill."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks

Segmentation = Sequence[Sequence[float]] | Mapping[str, Any]  # polygons, or a run-length encoding
_ENCODED = "expected {'size': (height, width), 'counts': ...}"


class Columns(NamedTuple):
    """Which pixels the masks of one image fill, column by column, however large the image is."""

    count: int  # of masks, G
    runs: Tensor  # int64 [N, 4]: in mask g, the rows y1 <= y < y2 of column x are filled: g x y1 y2


def decode(name: str, segmentations: Sequence[Segmentation], height: int, width: int) -> Columns:
    """COCO segmentations of an image of height x width."""
    rows = [torch.zeros(0, 4, dtype=torch.int64)]
    for g, x in enumerate(segmentations if height * width > 0 else ()):
        counts = _run_lengths(f"{name}[{g}]", x, height, width)
        ends = torch.tensor(counts, dtype=torch.int64).cumsum(0)  # runs of empty and of filled pixels, by turns
        start, end = ends[: len(ends) // 2 * 2].view(-1, 2).unbind(1)  # of filled ones, down column by column
        start, end = start[end > start], end[end > start]
        first = start // height
        columns = (end - 1) // height - first + 1
        x = torch.arange(int(columns.sum())) - (columns.cumsum(0) - columns - first).repeat_interleave(columns)
        top, bottom = (e.repeat_interleave(columns) - x * height for e in (start, end))
        rows.append(torch.stack([torch.full_like(x, g), x, top.clamp(min=0), bottom.clamp(max=height)], 1))
    return Columns(len(segmentations), torch.cat(rows))


def box(name: str, segmentation: Segmentation) -> tuple[float, float, float, float]:
    """The bounding box x1 y1 x2 y2 of a COCO segmentation."""
    if not isinstance(segmentation, Mapping):
        numbers = [v for polygon in _polygons(name, segmentation) for v in polygon]
        xs, ys = numbers[::2], numbers[1::2]
        return min(xs), min(ys), max(xs), max(ys)
    height, width = _size(name, segmentation)
    _, x, y1, y2 = decode(name, [segmentation], height, width).runs.unbind(1)
    if len(x) == 0:
        raise ValueError(f"{name} has no pixel")
    return float(x.min()), float(y1.min()), float(x.max() + 1), float(y2.max())


def _run_lengths(name: str, segmentation: Segmentation, height: int, width: int) -> list[int]:
    """The runs of empty and of filled pixels, by turns, down column by column."""
    if isinstance(segmentation, Mapping):
        return _given_runs(name, segmentation, height, width)
    polygons = _polygons(name, segmentation)
    if height * width >= 2**32:  # pycocotools counts pixels in 32 bits
        raise ValueError(f"{name} lies on an image of {height} x {width}; expected fewer than 2^32 pixels for polygons")
    try:
        from pycocotools import mask as coco
    except ImportError as error:
        raise ImportError(
            f"{name} is a list of polygons, which pycocotools rasterizes, and that is not installed: "
            "pip install pycocotools, or give a tensor [G, H, W]"
        ) from error
    return _uncompress(coco.merge(coco.frPyObjects(polygons, height, width))["counts"])


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
            if not abs(float(v)) < 1e6:  # pycocotools walks along the edges in steps of a fifth of a pixel
                raise ValueError(f"{name}[{i}][{j}] is {v}; expected a number between -1e6 and 1e6")
        out.append([float(v) for v in x])
    return out


def _given_runs(name: str, encoded: Mapping[str, Any], height: int, width: int) -> list[int]:
    """The runs of a run-length encoding. They have to fill the image."""
    if _size(name, encoded) != [height, width]:
        raise ValueError(f"{name}['size'] is {encoded['size']!r}; expected {[height, width]}, as image_sizes")
    if "counts" not in encoded:
        raise ValueError(f"{name} has no 'counts'; {_ENCODED}")
    runs = encoded["counts"]
    runs = runs.tolist() if hasattr(runs, "tolist") else runs
    if not isinstance(runs, (bytes, str, list, tuple)):
        raise TypeError(f"{name}['counts'] is a {type(runs).__name__}; expected bytes, str or a list of integers")
    if isinstance(runs, (bytes, str)):
        runs = _uncompress(runs.encode() if isinstance(runs, str) else runs)
    runs = [checks.integer(f"{name}['counts'][{i}]", n, 0) for i, n in enumerate(runs)]
    if sum(runs) != height * width:
        raise ValueError(f"{name}['counts'] has {sum(runs)} pixels; expected {height} * {width}, as in 'size'")
    return runs


def _size(name: str, encoded: Mapping[str, Any]) -> list[int]:
    if "size" not in encoded:
        raise ValueError(f"{name} has no 'size'; {_ENCODED}")
    size = encoded["size"]
    size = size.tolist() if hasattr(size, "tolist") else size
    if not isinstance(size, (list, tuple)) or len(size) != 2:
        raise ValueError(f"{name}['size'] is {size!r}; expected (height, width)")
    return [checks.integer(f"{name}['size'][{i}]", n, 0) for i, n in enumerate(size)]


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
