"""`python -m sea_kernels show` of pictures and boxes as people have them."""

import html.parser
import json
import os
import subprocess
import sys

import numpy as np
import programs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

import sea_kernels as sk
from sea_kernels import ground_truth, page, pictures
from sea_kernels.__main__ import main

ORIENTATION = 0x0112
SIZE = (24, 40)  # height, width


def picture(path, size=SIZE, seed=0, mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)
    Image.fromarray(values).convert(mode).save(path, **options)
    return path


def turned(path, orientation, size=SIZE):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return picture(path, size, exif=exif.tobytes())


def coco(path, images, boxes, categories=("cat",)):
    """images: of file name, and size or None; boxes: of image, and x y w h"""
    entries = [
        {"id": i, "file_name": name} | ({"height": size[0], "width": size[1]} if size else {})
        for i, (name, size) in enumerate(images)
    ]
    notes = [{"id": k, "image_id": i, "category_id": 0, "bbox": box} for k, (i, box) in enumerate(boxes)]
    named = [{"id": i, "name": name} for i, name in enumerate(categories)]
    path.write_text(json.dumps({"images": entries, "annotations": notes, "categories": named}))
    return path


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """The command in an empty folder: its exit status, what it prints, its error."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        code = main(["show", *map(str, arguments), "--strides", "8", "16"])
        return code, *capsys.readouterr()

    return run


# ------------------------------------------------------------------------------------------------------------ pictures


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_as_its_exif_tag_says(tmp_path, orientation):
    path = turned(tmp_path / "a.jpg", orientation)
    wanted = np.asarray(ImageOps.exif_transpose(Image.open(path)))
    assert (pictures.read(path).permute(1, 2, 0).numpy() == wanted).all()
    assert pictures.orientation(path) == orientation
    assert tuple(pictures.read(path).shape[1:]) == (SIZE if orientation < 5 else SIZE[::-1])


@pytest.mark.parametrize(("orientation", "size"), [(6, (40, 24)), (3, SIZE), (8, (40, 24)), (6, None)])
def test_boxes_are_those_of_the_turned_picture_and_it_is_said(call, tmp_path, orientation, size):
    turned(tmp_path / "a.jpg", orientation)
    code, out, err = call("a.jpg", coco(tmp_path / "j.json", [("a.jpg", size)], [(0, [2, 3, 10, 12])]))
    height, width = (40, 24) if orientation > 4 else SIZE
    assert code == 0 and not err
    assert f"a.jpg, {height} x {width} pixels, turned by its EXIF orientation {orientation}, padded" in out


def test_boxes_of_the_picture_before_it_was_turned_are_refused(call, tmp_path):
    turned(tmp_path / "a.jpg", 6)
    code, out, err = call("a.jpg", coco(tmp_path / "j.json", [("a.jpg", SIZE)], []))
    assert code == 2 and not out
    assert "a.jpg has 40 x 24 pixels" in err and "says 24 x 40, as before its EXIF orientation 6 turns it" in err


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "YCbCr", "I;16", "I", "F"])
def test_pictures_of_any_mode(tmp_path, mode):
    path = tmp_path / "a.tif"
    if mode in ("I;16", "I", "F"):
        values = (np.arange(SIZE[0] * SIZE[1]) * 17).reshape(SIZE).astype({"I;16": "u2", "I": "i4", "F": "f4"}[mode])
        Image.fromarray(values).save(path)
        wanted = torch.from_numpy(values.astype("f4")).expand(3, -1, -1)
    else:
        path = picture(path.with_suffix(".png" if mode in ("1", "L", "P", "LA", "RGBA") else ".tif"), mode=mode)
        wanted = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)
    assert Image.open(path).mode == mode
    assert torch.equal(pictures.read(path), wanted) and wanted.float().std() > 0


def test_a_wrong_suffix_does_not_matter(tmp_path):
    picture(tmp_path / "a.png").rename(tmp_path / "a.jpg")
    assert pictures.read(tmp_path / "a.jpg").shape == (3, *SIZE)


def test_a_damaged_picture_is_named(call, tmp_path):
    whole = picture(tmp_path / "a.jpg").read_bytes()
    (tmp_path / "b.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "rows.txt").write_text("1 1 9 9 cat")
    code, _, err = call("b.jpg", "rows.txt")
    assert code == 2 and "b.jpg cannot be read as a picture" in err


# ---------------------------------------------------------------------------------------------- folders and identity


def test_of_two_pictures_of_one_name_each_has_its_own_boxes(call, tmp_path):
    for folder in ("v1", "v2"):
        picture(tmp_path / folder / "1.jpg")
    boxes = [(0, [1, 1, 9, 9]), (1, [2, 2, 9, 9]), (1, [20, 2, 9, 9])]
    j = coco(tmp_path / "j.json", [("v1/1.jpg", SIZE), ("v2/1.jpg", SIZE)], boxes)
    assert "2 boxes" in call("v2/1.jpg", j)[1] and "1 boxes" in call("v1/1.jpg", j)[1]
    code, out, _ = call(".", j, "--out", "drawn")
    assert code == 0 and [line.partition(":")[0] for line in out.splitlines() if line.startswith("wrote")] == [
        "wrote drawn/v1/1.jpg.png", "wrote drawn/v2/1.jpg.png"
    ]  # fmt: skip
    assert all((tmp_path / "drawn" / v / "1.jpg.png").stat().st_size > 1000 for v in ("v1", "v2"))
    j = coco(tmp_path / "k.json", [("1.jpg", SIZE), ("1.jpg", SIZE)], [])
    code, out, err = call("v1/1.jpg", j)
    assert code == 2 and not out and "v1/1.jpg can be 2 images" in err


def test_what_a_folder_has_beyond_the_file_is_left_out_and_said(call, tmp_path):
    for name in ("a.jpg", "b.PNG", "c.jpg", "._a.jpg", "notes.md"):
        picture(tmp_path / "in" / "x.png").rename(tmp_path / "in" / name)
    j = coco(tmp_path / "j.json", [("a.jpg", None)], [(0, [1, 1, 9, 9])])
    code, out, err = call("in", j)
    assert code == 0 and not err and (tmp_path / "regions" / "a.jpg.png").is_file()
    assert out.startswith("left out 2 of 3 pictures: ") and "no image of file_name b.PNG, ..." in out
    assert call("in/a.jpg", "in/b.PNG", j)[0] == 2  # what was asked for by name is not left out
    (tmp_path / "empty").mkdir()
    assert "empty has no picture" in call("empty", j)[2]
    assert "has no image of file_name" in call("in", coco(tmp_path / "k.json", [("z.jpg", None)], []))[2]


def test_every_box_is_read_before_a_picture_is_drawn(call, tmp_path):
    for name in ("a.jpg", "b.jpg"):
        picture(tmp_path / name)
    j = coco(tmp_path / "j.json", [("a.jpg", None), ("b.jpg", None)], [(0, [1, 1, 9, 9]), (1, [9, 9, -9, 9])])
    code, out, err = call("a.jpg", "b.jpg", j)
    assert code == 2 and not out and "annotations[1] (id 1): bbox is [9, 9, -9, 9]" in err
    assert not (tmp_path / "regions").exists()
    (tmp_path / "rows.txt").write_text("1 1 9 9 cat")
    assert "rows.txt has the boxes of one picture" in call("a.jpg", "b.jpg", "rows.txt")[2]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_rows_with_a_byte_order_mark(call, tmp_path, encoding):
    picture(tmp_path / "a.jpg")
    (tmp_path / "b.csv").write_bytes("x1,y1,x2,y2,label\r\n1,1,9,9,Kätzchen\r\n".encode(encoding))
    assert "1 boxes of 1 categories" in call("a.jpg", "b.csv")[1]


def test_json_is_json_whatever_its_suffix(call, tmp_path):
    picture(tmp_path / "a.jpg")
    coco(tmp_path / "j.json", [("a.jpg", None)], [(0, [1, 1, 9, 9])]).rename(tmp_path / "j.txt")
    assert "1 boxes" in call("a.jpg", "j.txt")[1]


def test_a_dollar_in_a_name_is_no_formula(call, tmp_path):
    picture(tmp_path / "a.jpg")
    assert call("a.jpg", coco(tmp_path / "j.json", [("a.jpg", None)], [(0, [1, 1, 20, 20])], ["$\\frac$"]))[0] == 0


# ---------------------------------------------------------------------------------------------------------------- YOLO


def shares(text, tmp_path, size=(100, 200), names=None):
    path = tmp_path / "a.txt"
    path.write_text(text)
    (tmp_path / "classes.txt").write_text(names) if names else (tmp_path / "classes.txt").unlink(missing_ok=True)
    truth = ground_truth.reader(path, 1)(tmp_path / "a.jpg", tmp_path)
    rows, crowds = truth.boxes(*size)
    assert not crowds
    return [tuple(round(v, 6) for v in row) for row in rows], truth.names


def test_text_files_of_yolo(tmp_path):
    assert shares("2 0.5 0.5 0.25 0.5\n0 0.1 0.2 0.2 0.4 0.87\n", tmp_path) == (
        [(75, 25, 125, 75, 1), (0, 0, 40, 40, 0)], ["class 0", "class 2"]
    )  # fmt: skip
    assert shares("1 0.1 0.1 0.5 0.2 0.3 0.9", tmp_path, names="cat\ndog\n") == ([(20, 10, 100, 90, 0)], ["dog"])


@pytest.mark.parametrize(
    "line", ["0 0.5 0.5 1.5 0.1", "0.5 0.5 0.5 0.1 0.1", "0 0.5 0.5 0.1", "0 0.1 nan 0.1 0.1", "x"]
)
def test_a_wrong_line_of_yolo_is_named(call, tmp_path, line):
    picture(tmp_path / "a.jpg")
    (tmp_path / "a.txt").write_text(f"0 0.5 0.5 0.1 0.1\n{line}")
    code, _, err = call("a.jpg", ".")
    assert code == 2 and f"a.txt, line 2: {line!r}; expected a category and center x" in err


def test_a_category_without_a_name_is_an_error(call, tmp_path):
    picture(tmp_path / "a.jpg")
    (tmp_path / "a.txt").write_text("2 0.5 0.5 0.1 0.1")
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    assert "a.txt, line 1: category 2; classes.txt has 2 names" in call("a.jpg", "a.txt")[2]


def test_text_files_beside_pictures_or_in_a_folder_of_the_same_form(call, tmp_path):
    for name in ("train/a.jpg", "train/b.jpg", "val/a.jpg"):
        picture(tmp_path / "images" / name)
    for folder in ("labels", "images"):
        for name, count in (("train/a", 1), ("val/a", 2)):
            path = tmp_path / folder / f"{name}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("0 0.5 0.5 0.5 0.5\n" * count)
        code, out, _ = call("images", folder, "--html", "p.html")
        assert code == 0 and "left out 1 of 3 pictures" in out and f"{folder} has no train/b.txt" in out
        said = [line for line in out.splitlines() if "boxes" in line]
        assert ["1 boxes" in said[0], "2 boxes" in said[1]] == [True, True] and "as YOLO's" in said[0]
    assert "labels has no b.txt" in call("images/train/b.jpg", "labels")[2]


@given(st.lists(st.tuples(st.integers(0, 4), *[st.floats(0.01, 0.49)] * 4), min_size=1, max_size=5), st.booleans())
@settings(max_examples=30)
def test_random_boxes_in_shares_are_those_in_pixels(tmp_path, boxes, polygon):
    lines, wanted = [], []
    for category, x, y, w, h in boxes:
        corners = [x, y, x + w, y, x + w, y + h, x, y + h]
        numbers = corners if polygon else [x + w / 2, y + h / 2, w, h]
        lines.append(f"{category} {' '.join(map(repr, numbers))}")
        wanted.append((x * 200, y * 100, (x + w) * 200, (y + h) * 100, category))
    rows, names = shares("\n".join(lines), tmp_path)
    for row, box in zip(rows, wanted, strict=True):
        assert row[:4] == pytest.approx(box[:4], abs=1e-5) and names[row[4]] == f"class {box[4]}"


# ---------------------------------------------------------------------------------------------------------------- page


class Table(html.parser.HTMLParser):
    """Every tag with its attributes, and the rows of every table."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.rows, self.tag = [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.tag = tag
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        self.tag = None

    def handle_data(self, data):
        if self.tag in ("td", "th"):
            self.rows[-1][-1] += data


def test_a_page_has_the_areas_of_every_region_beside_its_picture(call, tmp_path):
    name = "<b>cat & dog</b>"
    for picture_name in ("a.png", "b<i>.png"):
        picture(tmp_path / picture_name)
    boxes = [(0, [0, 0, 16, 16])]
    j = coco(tmp_path / "j.json", [("a.png", SIZE), ("b<i>.png", SIZE)], boxes, [name])
    code, out, err = call("a.png", "b<i>.png", j, "--html", "p.html", "--pad-to", "32")
    assert code == 0 and not err and not (tmp_path / "regions").exists() and out.count("wrote p.html: ") == 2
    text = (tmp_path / "p.html").read_text()
    found = Table(text)
    images = [attributes for tag, attributes in found.tags if tag == "img"]
    assert len(images) == 2 and all(a["src"].startswith("data:image/png;base64,") for a in images)
    assert not [tag for tag, _ in found.tags if tag in ("b", "i", "script", "link")]
    regions = sk.Regions.from_boxes(
        [torch.tensor([[0.0, 0, 16, 16]])], [torch.tensor([0])], [(4, 8), (2, 4)], [8, 16], image_sizes=[SIZE]
    )
    table = page.areas(regions, [8, 16], [name])
    assert table == [
        ["region", "stride 8:\n4 x 8", "stride 16:\n2 x 4"],
        *([kind, *map(str, x)] for kind, x in zip(
            ("background", f"{name}: center", f"{name}: edge"), regions.area.long().t().tolist()
        )),
        ["padding", "17", "2"],
    ]  # fmt: skip
    assert found.rows[: len(table)] == table
    assert text.count("<td class=none>0</td>") == sum(
        row.count("0") for row in found.rows if row[0] not in ("padding", "uncounted (crowd)")
    )


# -------------------------------------------------------------------------------------------------------------- streams


@pytest.mark.parametrize("arguments", [[], ["show", "a.jpg", "r.txt"]], ids=["report", "show"])
def test_a_reader_that_has_gone_ends_the_command_without_a_word(tmp_path, arguments):
    picture(tmp_path / "a.jpg")
    (tmp_path / "r.txt").write_text("1 1 9 9 cat")
    path = os.pathsep.join(
        filter(None, [str(page.__file__).rpartition("/sea_kernels/")[0], os.environ.get("PYTHONPATH")])
    )
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "sea_kernels", *arguments]
    done = subprocess.run(
        command, stdout=write, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": path}
    )
    os.close(write)
    assert not done.stderr


def test_letters_that_the_terminal_has_not(tmp_path):
    name = os.fsdecode(b"caf\xe9 \xc3\xbc.png")  # its first accent is no UTF-8
    picture(tmp_path / name)
    (tmp_path / "rows.txt").write_text("1 1 9 9 cat")
    arguments = ["show", name, "rows.txt", "--html", "p.html"]
    done = programs.run("-m", "sea_kernels", *arguments, cwd=tmp_path, env={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stderr
    assert "\\udce9" in done.stdout and (tmp_path / "p.html").read_bytes().decode()
