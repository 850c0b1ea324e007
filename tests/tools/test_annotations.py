"""Annotation files as people have them: the right boxes of the right image, or an error that names what is wrong."""

import json
import logging
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sea_kernels.coco import Annotations, NoEntryError

BOX = [10, 10, 40, 30]
CORNERS = (10, 10, 50, 40)


def image(i, name, **more):
    return {"id": i, "file_name": name, **more}


def note(i=1, **more):
    return {"id": 41, "image_id": i, "category_id": 1, "bbox": BOX} | more


def written(path, images, annotations, categories=None, encoding="utf-8", **more):
    categories = categories or [{"id": 1, "name": "cat"}]
    data = {"images": images, "annotations": annotations, "categories": categories}
    path.write_text(json.dumps(data | more, ensure_ascii=False), encoding=encoding, errors="surrogatepass")
    return path


@pytest.fixture
def file(tmp_path):
    return tmp_path / "j.json"


# ------------------------------------------------------------------------------------------------- which image it is


@pytest.mark.parametrize(
    ("names", "picture", "wanted"),
    [
        (["v1/000001.jpg", "v2/000001.jpg"], "d/v2/000001.jpg", 1),
        (["v1\\000001.jpg", "v2\\000001.jpg"], "d/v2/000001.jpg", 1),
        (["a/x.jpg"], "elsewhere/x.jpg", 0),
        (["x.jpg", "b/x.jpg"], "a/x.jpg", 0),  # it is not in b
        (["x.jpg", "b/x.jpg"], "b/x.jpg", 1),
        (["c/b/x.jpg", "d/b/x.jpg", "b/x.jpg"], "d/b/x.jpg", 1),
        (["c/a/x.jpg", "c/b/x.jpg"], "b/x.jpg", 1),  # no path is whole, one has more in common
        (["../images/./x.jpg", "other/x.jpg"], "images/x.jpg", 0),
        (["C:\\data\\x.jpg"], "x.jpg", 0),
        (["caf\u00e9.jpg"], "cafe\u0301.jpg", 0),
        (["cafe\u0301.jpg"], "caf\u00e9.jpg", 0),
        (["https://host.example/val%202017/x.jpg?v=1#a"], "val 2017/x.jpg", 0),
        (["s3://bucket/x.jpg", "s3://bucket/y.jpg"], "y.jpg", 1),
    ],
)
def test_the_image_is_the_one_whose_path_fits(file, names, picture, wanted):
    annotations = Annotations(written(file, [image(i, name) for i, name in enumerate(names)], []))
    assert annotations.find(Path(picture)).id == wanted and annotations.find(picture).id == wanted


@pytest.mark.parametrize(
    ("names", "picture"),
    [(["a.jpg", "a.jpg"], "f/a.jpg"), (["v1/a.jpg", "v2/a.jpg"], "v3/a.jpg"), (["a.jpg", "./a.jpg"], "a.jpg")],
)
def test_two_images_that_fit_are_an_error(file, names, picture):
    annotations = Annotations(written(file, [image(i + 7, name) for i, name in enumerate(names)], []))
    with pytest.raises(ValueError, match=r"a.jpg can be 2 images of .*j.json: images\[0\] \(id 7\) .*\(id 8\)"):
        annotations.find(picture)


def test_no_image_of_that_name_is_an_error(file):
    annotations = Annotations(written(file, [image(1, "ba.jpg"), image(2, None), image(3, "..")], []))
    with pytest.raises(NoEntryError, match=r"j.json has no image of file_name a.jpg"):
        annotations.find("a.jpg")


@pytest.mark.parametrize("entry", [{"file_name": None}, {"file_name": ""}, {}])
def test_coco_url_stands_in_for_a_file_name(file, entry):
    images = [{"id": 1, "coco_url": "http://images.example.org/val2017/0139.jpg"} | entry, {"id": 2}]
    found = Annotations(written(file, images, [note()])).find("/data/0139.jpg")
    assert found.id == 1 and found.file_name == "val2017/0139.jpg" and found.boxes == [CORNERS]


# -------------------------------------------------------------------------------------------------- ordinary oddities


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_byte_order_marks(file, encoding):
    written(file, [image(1, "ü.jpg")], [note()], encoding=encoding)
    assert Annotations(file).find("ü.jpg").boxes == [CORNERS]


class Path_(os.PathLike):
    def __init__(self, path):
        self.path = path

    def __fspath__(self):
        return str(self.path)


@pytest.mark.parametrize("kind", [str, Path, Path_])
def test_any_path(file, kind):
    written(file, [image(1, "a.jpg")], [note()])
    assert Annotations(kind(file)).find(kind("a.jpg")).boxes == [CORNERS]


@pytest.mark.parametrize(
    ("ids", "refers"), [([1, 2], ["1", "2"]), (["1", "2"], [1, 2.0]), (["a-f", "0"], ["a-f", 0]), ([1.0, 2], [1, "2"])]
)
def test_ids_as_numbers_or_text_are_the_same(file, ids, refers):
    images = [image(i, f"{k}.jpg") for k, i in enumerate(ids)]
    notes = [note(refers[1], category_id=refers[1])]
    categories = [{"id": i, "name": f"name {k}"} for k, i in enumerate(ids)]
    annotations = Annotations(written(file, images, notes, categories))
    found = annotations.find("1.jpg")
    assert found.boxes == [CORNERS] and annotations.names[found.labels[0]] == "name 1"
    assert annotations.find("0.jpg").boxes == []


@pytest.mark.parametrize(
    ("value", "crowd"),
    [
        *((0, False), (1, True), (True, True), (False, False), ("0", False), ("1", True), (None, False), (1.0, True)),
        *(("true", True), ("False", False), ("", False), ("1.0", True), ("yes", True)),
    ],
)
def test_iscrowd_in_any_type(file, value, crowd):
    found = Annotations(written(file, [image(1, "a")], [note(iscrowd=value)])).find("a")
    assert (found.boxes, found.crowds) == (([], [CORNERS]) if crowd else ([CORNERS], []))


@pytest.mark.parametrize(
    ("given", "size"),
    [
        ({"height": None, "width": None}, (None, None)),
        ({"height": "96", "width": "160"}, (96, 160)),
        *(({"height": 96.0, "width": "160.0"}, (96, 160)), ({"height": 96}, (96, None)), ({"width": ""}, (None, None))),
    ],
)
def test_sizes_missing_or_as_text(file, given, size):
    assert Annotations(written(file, [image(1, "a", **given)], [])).find("a").size == size


def test_categories_with_gaps_and_in_any_order(file):
    categories = [{"id": i, "name": name} for i, name in ((10, "ten"), ("9", "nine"), (700, "most"), (0, "none"))]
    annotations = Annotations(written(file, [image(1, "a")], [note(category_id=700), note(category_id=9)], categories))
    assert annotations.names == ["none", "nine", "ten", "most"] and annotations.find("a").labels == [3, 1]


@pytest.mark.parametrize("bbox", [{}, {"bbox": []}, {"bbox": None}])
@pytest.mark.parametrize(
    ("segmentation", "box"),
    [
        ([[10, 10, 50, 10, 50, 40]], (10, 10, 50, 40)),
        ([[5, 5.5, 6, 6, 5, 7], [10, 1, 50, 10, 50, 40]], (5, 1, 50, 40)),
        ({"size": [4, 3], "counts": [5, 2, 5]}, (1, 1, 2, 3)),
        ({"size": [4, 3], "counts": [3, 2, 7]}, (0, 0, 2, 4)),
    ],
)
def test_a_box_that_is_missing_is_that_of_the_segmentation_and_it_is_said(file, bbox, segmentation, box, caplog):
    without = {k: v for k, v in note(id=42).items() if k != "bbox"} | bbox | {"segmentation": segmentation}
    with caplog.at_level(logging.WARNING):
        found = Annotations(written(file, [image(1, "a")], [note(), without])).find("a")
    assert found.boxes == [CORNERS, box]
    (message,) = caplog.messages
    assert "annotations[1] (id 42) has no bbox, as 1 of 2" in message and "j.json" in message


def test_ids_of_annotations_may_repeat_or_be_missing(file):
    nameless = {k: v for k, v in note().items() if k != "id"}
    assert Annotations(written(file, [image(1, "a")], [note(), note(), nameless])).find("a").boxes == [CORNERS] * 3


# ------------------------------------------------------------------------------------------------------ what is wrong

A = [image(1, "a")]
WRONG = [
    # images, annotations, categories, what is said
    ([image(1, "a"), image("1", "b")], [], None, r"images\[1\] \(id 1\): id is \"1\"; expected another .* images\[0\]"),
    ([{"file_name": "a"}], [], None, r"images\[0\] has no id; expected a whole number or text"),
    ([image(True, "a")], [], None, r"images\[0\] \(id True\): id is true"),
    ([image([1], "a")], [], None, r"images\[0\] \(id \[1\]\): id is \[1\]"),
    ([image(1.5, "a")], [], None, r"images\[0\] \(id 1.5\): id is 1.5"),
    ([3], [], None, r"images\[0\] is a int; expected an object"),
    ([image(1, 3)], [], None, r"images\[0\] \(id 1\): file_name is 3; expected text"),
    ([image(1, "a", height="tall")], [], None, r"images\[0\] \(id 1\): height is \"tall\"; expected a whole number"),
    ([image(1, "a", width=0)], [], None, r"images\[0\] \(id 1\): width is 0; expected"),
    ([image(1, "a", width=9.5)], [], None, r"images\[0\] \(id 1\): width is 9.5; expected"),
    (A, [note(7)], None, r"annotations\[0\] \(id 41\): image_id is 7; expected the id of one of the 1 images"),
    (A, [{"id": 5}], None, r"annotations\[0\] \(id 5\) has no image_id"),
    (A, [note(category_id=7)], None, r"annotations\[0\] \(id 41\): category_id is 7; expected the id of one of"),
    (A, [note(category_id=None)], None, r"annotations\[0\] \(id 41\): category_id is null"),
    (A, [note(iscrowd="maybe")], None, r"annotations\[0\] \(id 41\): iscrowd is \"maybe\"; expected 0 or 1"),
    (A, [note(iscrowd=2)], None, r"iscrowd is 2; expected 0 or 1"),
    (A, [note(iscrowd=0.5)], None, r"iscrowd is 0.5; expected 0 or 1"),
    (A, [note(bbox=[])], None, r"annotations\[0\] \(id 41\): bbox is \[\]; expected x, y, width and height"),
    (A, [note(bbox=None, segmentation=[])], None, r"\(id 41\): bbox is null"),
    (A, [note(bbox=[1, 2, 3])], None, r"\(id 41\): bbox is \[1, 2, 3\]"),
    (A, [note(bbox=[50, 50, -20, 10])], None, r"\(id 41\): bbox is \[50, 50, -20, 10\]"),
    (A, [note(bbox=[1, 2, float("nan"), 4])], None, r"\(id 41\): bbox is \[1, 2, NaN, 4\]"),
    (A, [note(bbox=[1, 2, 1e300, 4])], None, r"\(id 41\): bbox is \[1, 2, 1e\+300, 4\]"),
    (A, [note(bbox="1 2 3 4")], None, r"\(id 41\): bbox is \"1 2 3 4\""),
    (A, [note(bbox=[], segmentation=[[1, 2]])], None, r"\(id 41\) has no bbox, and segmentation\[0\] has 2 entries"),
    (A, [note(bbox=[], segmentation={"size": [2, 2], "counts": [4]})], None, r"\(id 41\) has no bbox, .*no pixel"),
    (A, [note(bbox=[], segmentation={"counts": [4]})], None, r"\(id 41\) has no bbox, and segmentation has no 'size'"),
    (A, [], [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}], r"categories\[1\] \(id 1\): id is 1; expected another"),
    (A, [], [{"id": 1}], r"categories\[0\] \(id 1\) has no name"),
]


@pytest.mark.parametrize(("images", "annotations", "categories", "words"), WRONG)
def test_a_wrong_entry_is_named(file, images, annotations, categories, words):
    with pytest.raises(ValueError, match=rf"j\.json: .*{words}"):
        Annotations(written(file, images, annotations, categories)).find("a")


def test_what_is_wrong_with_another_image_does_not_matter(file):
    images = [image(2, "b", height=-1), {"id": 3}, image(1, "a")]
    assert Annotations(written(file, images, [note(2, bbox=[]), note()])).find("a").boxes == [CORNERS]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[1]", r"is not a COCO annotation file \(images, annotations, categories\): it is a list"),
        ('{"images": [], "annotations": []}', "it has no categories"),
        ('{"images": {}, "annotations": [], "categories": []}', "images is a dict; expected a list"),
    ],
)
def test_what_is_no_annotation_file(file, text, words):
    file.write_text(text)
    with pytest.raises(ValueError, match=rf"j\.json {words}" if "is" in words[:3] else words):
        Annotations(file)
    file.write_bytes(b"\xff{}\xe4")
    with pytest.raises(ValueError, match="cannot be read"):
        Annotations(file)


# ------------------------------------------------------------------------------------------------------- at random

NAMES = st.sampled_from(["a.jpg", "b.jpg", "ü.jpg"])
FOLDERS = st.lists(st.sampled_from(["v1", "v2", "w"]), max_size=2)
NUMBERS = st.integers(0, 99) | st.floats(0, 99).map(lambda v: round(v, 2))


@st.composite
def files(draw):
    """Images with paths, boxes and crowds, and the same as an annotation file in one of its many dialects."""
    paths = draw(st.lists(st.tuples(FOLDERS, NAMES).map(lambda p: "/".join([*p[0], p[1]])), min_size=1, max_size=5))
    ids = draw(st.permutations([1, 2, 3, 10, 11]))
    as_text = st.sampled_from([int, str, float])
    separator = draw(st.sampled_from(["/", "\\", "//", "/./"]))
    images, notes, wanted = [], [], []
    for path, i in zip(paths, ids):
        name = {"file_name": path.replace("/", separator)}
        if draw(st.booleans()):
            name = {"file_name": draw(st.sampled_from([None, ""])), "coco_url": f"http://host.example/{path}"}
        images.append({"id": draw(as_text)(i)} | name | draw(st.sampled_from([{}, {"height": "96"}, {"width": None}])))
        boxes = draw(st.lists(st.tuples(NUMBERS, NUMBERS, NUMBERS, NUMBERS), max_size=3))
        crowd = [draw(st.booleans()) for _ in boxes]
        for box, is_crowd in zip(boxes, crowd):
            flag = draw(st.sampled_from([1, True, "1", "true"] if is_crowd else [0, False, "0", None, "false"]))
            values = [draw(st.sampled_from([float, str]))(v) for v in box]
            notes.append({"image_id": draw(as_text)(i), "category_id": 1, "bbox": values, "iscrowd": flag})
        corners = [(x, y, x + w, y + h) for x, y, w, h in boxes]
        wanted.append([[b for b, c in zip(corners, crowd) if c == kind] for kind in (False, True)])
    # each type of id is read as a number or as text, which must be the same
    for entry in images + notes:
        for key in ("id", "image_id"):
            if isinstance(entry.get(key), str):
                entry[key] = str(int(float(entry[key])))
    return paths, images, draw(st.permutations(notes)), wanted, draw(st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]))


@given(files())
def test_random_files_have_the_right_boxes_or_a_named_error(tmp_path, drawn):
    paths, images, notes, wanted, encoding = drawn
    annotations = Annotations(written(tmp_path / "j.json", images, notes, encoding=encoding))
    for path, (boxes, crowds) in zip(paths, wanted):
        if paths.count(path) > 1:
            with pytest.raises(ValueError, match=r"can be \d images"):
                annotations.find(Path("/data") / path)
            continue
        found = annotations.find(Path("/data") / path)
        assert sorted(found.boxes) == sorted(boxes) and sorted(found.crowds) == sorted(crowds)
        assert found.labels == [0] * len(boxes) and found.file_name == path


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=3)
    | st.sampled_from(["1", 1, [1, 2, 3, 4]]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["size", "counts"]), inner, max_size=2),
    max_leaves=5,
)
ENTRIES = {
    "images": ["id", "file_name", "coco_url", "height", "width"],
    "annotations": ["id", "image_id", "category_id", "bbox", "iscrowd", "segmentation"],
    "categories": ["id", "name"],
}
GOOD = {"images": A, "annotations": [note(), note(iscrowd=1)], "categories": [{"id": 1, "name": "cat"}]}


@given(st.sampled_from([(field, key) for field, keys in ENTRIES.items() for key in keys]), JSON, st.booleans())
def test_any_value_in_any_field_is_read_or_named(tmp_path, place, value, missing):
    field, key = place
    data = json.loads(json.dumps(GOOD))
    entry = data[field][0]
    entry.pop(key, None) if missing else entry.update({key: value})
    (tmp_path / "j.json").write_text(json.dumps(data))
    try:
        (found,) = Annotations(tmp_path / "j.json")
    except ValueError as error:
        named = (
            (f"{field}[0]" in str(error) and key in str(error)) or "_id is" in str(error) or "has no bbox" in str(error)
        )
        assert "j.json" in str(error) and named, error
    else:
        assert len(found.boxes) + len(found.crowds) == 2
        for x1, y1, x2, y2 in found.boxes + found.crowds:
            assert x1 <= x2 and y1 <= y2
