"""Annotation files: COCO's and LVIS's, and what other tools write in their form."""

import json
import logging
import math
import os
import re
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from . import segmentations

_log = logging.getLogger(__name__)
_FIELDS = ("images", "annotations", "categories")
_CROWD = {"0": False, "false": False, "no": False, "": False, "none": False, "1": True, "true": True, "yes": True}
_MOST = 1e6  # pixels: no box lies further out

Box = tuple[float, float, float, float]


class NoEntryError(ValueError):
    """There is nothing of a picture."""


@dataclass(frozen=True)
class Image:
    """One image of an annotation file. Boxes are (x1, y1, x2, y2) in pixels of the image."""

    id: int | str
    file_name: str | None  # with / between folders, or the path of its coco_url
    size: tuple[int | None, int | None]  # (height, width), None where the file does not say
    boxes: list[Box]
    labels: list[int]  # of each box, from 0 in the order of the category ids
    crowds: list[Box]  # the boxes that are marked as crowds


class Annotations:
    """An annotation file. Iterating over it gives its images, with their boxes, in the order of the file.

    Ids are numbers or text; 1 and "1" are the same. Those of images and of categories are unique, and every annotation
    names one of each. The ids of annotations may repeat or be missing, as nothing refers to them. An annotation without
    a bbox gets that of its segmentation, which a warning of the log says once.

    Args:
        path: the file (str or os.PathLike); it has images, annotations and categories.

    Raises:
        ValueError: it cannot be read, is not an annotation file, or an entry is wrong: the message has its field, its
            place and its id. What only one image needs (its size, its boxes) is checked when that image is read.
    """

    def __init__(self, path: os.PathLike | str) -> None:
        self.path = Path(path)
        self._data = data = self._load()
        self._images, categories = self._by_id("images"), self._by_id("categories")
        keys = sorted(categories, key=_in_order)
        self._labels = {key: label for label, key in enumerate(keys)}
        self.names = [self._name(categories[key]) for key in keys]  # of the categories, by label
        self._annotations: dict[str, list[int]] = {}  # of each image
        without = []
        for i, a in enumerate(data["annotations"]):
            image = self._refer(i, a, "image_id", self._images)
            self._refer(i, a, "category_id", self._labels)
            self._annotations.setdefault(image, []).append(i)
            if not a.get("bbox") and a.get("segmentation"):
                without.append(i)
        if without:
            _log.warning(
                "%s has no bbox, as %d of %d; their boxes are those of their segmentations",
                self._entry("annotations", without[0]), len(without), len(data["annotations"]),
            )  # fmt: skip
        self._named: dict[str, list[tuple[list[str], str]]] = {}  # by file name: (folders and name, id) of each image
        for key, i in self._images.items():
            if parts := _parts(self._file_name(i) or ""):
                self._named.setdefault(parts[-1], []).append((parts, key))

    def __iter__(self) -> Iterator[Image]:
        return map(self._image, self._images)

    def find(self, picture: os.PathLike | str) -> Image:
        """The image of a picture file: the one whose file_name the path ends with, or else whose last parts it has.

        Raises:
            NoEntryError: no image has that file name.
            ValueError: the path fits several images equally well.
        """
        parts = _parts(os.path.abspath(picture))
        ranks: dict[tuple[bool, int], list[str]] = {}
        for named, key in self._named.get(parts[-1], []) if parts else []:
            same = next((n for n, (a, b) in enumerate(zip(named[::-1], parts[::-1])) if a != b), len(named))
            same = min(same, len(parts))
            ranks.setdefault((same == len(named), same), []).append(key)
        if not ranks:
            raise NoEntryError(f"{self.path} has no image of file_name {Path(picture).name}")
        best = ranks[max(ranks)]
        if len(best) > 1:
            places = [self._images[key] for key in best[:4]]
            entries = ", ".join(
                f"images[{i}] (id {self._data['images'][i]['id']}) {self._file_name(i)}" for i in places
            )
            raise ValueError(f"{picture} can be {len(best)} images of {self.path}: {entries}; expected one")
        return self._image(best[0])

    # ------------------------------------------------------------------------------------------------------- one entry

    def _image(self, key: str) -> Image:
        place, boxes, labels, crowds = self._images[key], [], [], []
        for i in self._annotations.get(key, []):
            a = self._data["annotations"][i]
            if self._is_crowd(i, a.get("iscrowd")):
                crowds.append(self._box(i, a))
            else:
                boxes.append(self._box(i, a))
                labels.append(self._labels[_key(a["category_id"])])
        size = self._pixels(place, "height"), self._pixels(place, "width")
        entry = self._data["images"][place]
        return Image(entry["id"], self._file_name(place), size, boxes, labels, crowds)

    def _file_name(self, place: int) -> str | None:
        for field in ("file_name", "coco_url"):
            name = self._data["images"][place].get(field)
            if name is not None and not isinstance(name, str):
                raise self._wrong("images", place, field, "text")
            if name:
                url = re.match(r"[A-Za-z][\w+.-]*://[^/]*/?([^?#]*)", name)
                return "/".join(_parts(unquote(url[1]) if url else name))
        return None

    def _pixels(self, place: int, field: str) -> int | None:
        value = self._data["images"][place].get(field)
        if value is None or value == "":
            return None
        number = _number(value)
        if number is None or number != int(number) or number < 1:
            raise self._wrong("images", place, field, "a whole number of pixels, 1 or more")
        return int(number)

    def _is_crowd(self, place: int, value: object) -> bool:
        number = _number(value)  # 0, False, "0", 0.0
        found = _CROWD.get(str(value if number is None else int(number)).strip().lower())
        if found is None or (number is not None and number != int(number)):
            raise self._wrong("annotations", place, "iscrowd", "0 or 1")
        return found

    def _box(self, place: int, a: Mapping[str, Any]) -> Box:
        if not a.get("bbox") and a.get("segmentation"):
            try:
                return segmentations.box("segmentation", a["segmentation"])
            except (TypeError, ValueError) as error:
                raise ValueError(f"{self._entry('annotations', place)} has no bbox, and {error}") from None
        given = a.get("bbox")
        numbers = [_number(v) for v in given] if isinstance(given, list) else []
        if len(numbers) != 4 or any(v is None or not abs(v) <= _MOST for v in numbers) or min(numbers[2:]) < 0:
            raise self._wrong(
                "annotations", place, "bbox", "x, y, width and height: four numbers of pixels, the last two 0 or more"
            )
        x, y, w, h = numbers
        return x, y, x + w, y + h

    def _name(self, place: int) -> str:
        name = self._data["categories"][place].get("name")
        if name is None or isinstance(name, (list, dict)):
            raise self._wrong("categories", place, "name", "text")
        return str(name)

    # --------------------------------------------------------------------------------------------------------- the file

    def _load(self) -> dict[str, list[dict]]:
        text = read_text(self.path)
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self.path} is not JSON: {error}") from None
        what = f"{self.path} is not a COCO annotation file ({', '.join(_FIELDS)}): "
        if not isinstance(data, dict):
            raise ValueError(f"{what}it is a {type(data).__name__}")
        for field in _FIELDS:
            if not isinstance(data.get(field), list):
                has = f"{field} is a {type(data[field]).__name__}" if field in data else f"it has no {field}"
                raise ValueError(f"{what}{has}; expected a list")
            for i, entry in enumerate(data[field]):
                if not isinstance(entry, dict):
                    raise ValueError(f"{self.path}: {field}[{i}] is a {type(entry).__name__}; expected an object")
        return data

    def _by_id(self, field: str) -> dict[str, int]:
        """The place in its list of each entry."""
        places: dict[str, int] = {}
        for i, entry in enumerate(self._data[field]):
            key = _key(entry.get("id"))
            if key is None:
                raise self._wrong(field, i, "id", "a whole number or text")
            if key in places:
                raise self._wrong(field, i, "id", f"another one than that of {field}[{places[key]}]")
            places[key] = i
        return places

    def _refer(self, place: int, a: Mapping[str, Any], field: str, known: Mapping[str, int]) -> str:
        key = _key(a.get(field))
        if key is None or key not in known:
            listed = "images" if field == "image_id" else "categories"
            raise self._wrong("annotations", place, field, f"the id of one of the {len(known)} {listed}")
        return key

    def _entry(self, field: str, place: int) -> str:
        entry = self._data[field][place]
        return f"{self.path}: {field}[{place}]" + (f" (id {str(entry['id'])[:80]})" if "id" in entry else "")

    def _wrong(self, field: str, place: int, key: str, expected: str) -> ValueError:
        entry = self._data[field][place]
        given = f": {key} is {json.dumps(entry[key])[:80]}" if key in entry else f" has no {key}"
        return ValueError(f"{self._entry(field, place)}{given}; expected {expected}")


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, or in what its byte order mark says. ValueError: it cannot be read."""
    try:
        data = path.read_bytes()
        return data.decode(json.detect_encoding(data))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


def _key(value: object) -> str | None:
    """An id as text; None where it is none."""
    if isinstance(value, float) and math.isfinite(value) and value == int(value):
        value = int(value)
    return str(value) or None if isinstance(value, (int, str)) and not isinstance(value, bool) else None


def _in_order(key: str) -> tuple:
    """Numbers by value, then text."""
    return (0, int(key), "") if key.removeprefix("-").isdecimal() else (1, 0, key)


def _number(value: object) -> float | None:
    """A finite number, which may be written as text."""
    try:
        number = float(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _parts(path: str) -> list[str]:
    """Folders and name, whatever stands between them; in one of the two forms in which an accent can be written."""
    parts = [x for x in unicodedata.normalize("NFC", path.replace("\\", "/")).split("/") if x not in ("", ".")]
    return parts[len(parts) - parts[::-1].index("..") :] if ".." in parts else parts
