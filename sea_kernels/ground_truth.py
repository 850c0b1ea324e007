"""The boxes of pictures, from any of the files that people have: COCO's, YOLO's, or rows x1 y1 x2 y2 label."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from . import coco

Row = tuple[float, float, float, float, int]  # x1 y1 x2 y2 label


class Truth(NamedTuple):
    """The boxes of one picture."""

    rows: list[Row]
    crowds: list[coco.Box]
    names: list[str]  # of the categories, by label
    source: str = ""  # what is to be said of where they come from
    size: tuple[int | None, int | None] = (None, None)  # (height, width) that the file says the picture has
    relative: bool = False  # the boxes are in shares of its width and height

    def boxes(self, height: int, width: int) -> tuple[list[Row], list[coco.Box]]:
        """The rows and the crowds in pixels."""
        if not self.relative:
            return self.rows, self.crowds
        rows = [(x1 * width, y1 * height, x2 * width, y2 * height, label) for x1, y1, x2, y2, label in self.rows]
        return rows, self.crowds


def reader(path: Path, pictures: int) -> Callable[[Path, Path], Truth]:
    """A function of (picture, the folder it was found in) that finds its boxes: in a file, or in a folder of YOLO's.

    Raises:
        ValueError: the file cannot be read, or has the boxes of a single picture beside several. The function raises it
            for a wrong entry, and coco.NoEntryError where there is none.
    """
    if path.is_dir():
        return lambda picture, folder: _beside(path, picture, folder)
    text = coco.read_text(path)
    if path.suffix.lower() == ".json" or text.lstrip()[:1] in ("{", "["):
        annotations = coco.Annotations(path)
        return lambda picture, folder: _of_coco(annotations, picture)
    if pictures > 1:
        raise ValueError(f"{path} has the boxes of one picture; expected an annotation file or a folder for {pictures}")
    truth = _yolo(path, text, _names(path.parent)) if _is_yolo(text) else _plain(path, text)
    return lambda picture, folder: truth


# -------------------------------------------------------------------------------------------------------------- formats


def _of_coco(annotations: coco.Annotations, picture: Path) -> Truth:
    image = annotations.find(picture)
    source = "" if image.file_name == str(picture) else f"image {image.file_name} of {annotations.path}: "
    rows = [(*box, label) for box, label in zip(image.boxes, image.labels)]
    return Truth(rows, image.crowds, annotations.names, source, image.size)


def _beside(labels: Path, picture: Path, folder: Path) -> Truth:
    path = labels / picture.relative_to(folder).with_suffix(".txt")
    if not path.is_file():
        raise coco.NoEntryError(f"{labels} has no {path.relative_to(labels)} for {picture}")
    return _yolo(path, coco.read_text(path), _names(path.parent) or _names(labels))


def _lines(text: str) -> list[tuple[int, str]]:
    lines = enumerate(map(str.strip, text.splitlines()), 1)
    return [(number, line) for number, line in lines if line and not line.startswith("#")]


def _plain(path: Path, text: str) -> Truth:
    """From lines `x1 y1 x2 y2 label`, by space, comma or tab. The label `ignore` marks a crowd."""
    boxes, crowds = [], []
    for number, line in _lines(text):
        if re.match(r"x1\b", line):
            continue
        *sides, name = re.split(r"\s*,\s*|\s+", line, maxsplit=4)
        try:
            x1, y1, x2, y2 = map(float, sides)
        except ValueError:
            raise ValueError(f"{path}, line {number}: {line[:80]!r}; expected x1 y1 x2 y2 label") from None
        boxes.append(((x1, y1, x2, y2), name)) if name != "ignore" else crowds.append((x1, y1, x2, y2))
    names = sorted({name for _, name in boxes})
    return Truth([(*box, names.index(name)) for box, name in boxes], crowds, names)


def _yolo_numbers(line: str) -> list[float] | None:
    """A category and 4 shares (and perhaps a confidence), or the corners of a polygon; None where it is not that."""
    try:
        category, *shares = map(float, line.split())
    except ValueError:
        return None
    fits = 0 <= category < math.inf and category == int(category) and all(0 <= v <= 1 for v in shares)
    return (
        [category, *shares] if fits and (len(shares) in (4, 5) or (len(shares) >= 6 and len(shares) % 2 == 0)) else None
    )


def _is_yolo(text: str) -> bool:
    """No one has boxes of less than a pixel and a number for a label."""
    lines = _lines(text)
    return bool(lines) and all(_yolo_numbers(line) is not None for _, line in lines)


def _yolo(path: Path, text: str, names: list[str]) -> Truth:
    boxes, polygons = [], 0
    for number, line in _lines(text):
        numbers = _yolo_numbers(line)
        if numbers is None:
            raise ValueError(
                f"{path}, line {number}: {line[:80]!r}; expected a category and center x, center y, width and height, "
                "or the corners of a polygon, in shares from 0 to 1"
            )
        category, *shares = numbers
        if names and category >= len(names):
            raise ValueError(f"{path}, line {number}: category {category:g}; classes.txt has {len(names)} names")
        if len(shares) > 5:
            polygons += 1
            box = min(shares[::2]), min(shares[1::2]), max(shares[::2]), max(shares[1::2])
        else:
            x, y, w, h = shares[:4]
            box = x - w / 2, y - h / 2, x + w / 2, y + h / 2
        boxes.append((box, int(category)))
    present = sorted({category for _, category in boxes})
    shown = [names[category] if names else f"class {category}" for category in present]
    source = f"{path.name} as YOLO's{f', {polygons} polygons' if polygons else ''}: "
    return Truth([(*box, present.index(category)) for box, category in boxes], [], shown, source, relative=True)


def _names(folder: Path) -> list[str]:
    """Those of classes.txt in a folder of YOLO's files, or in the one above."""
    for path in (folder / "classes.txt", folder.parent / "classes.txt"):
        if path.is_file():
            return [line.strip() for line in coco.read_text(path).strip().splitlines()]
    return []
