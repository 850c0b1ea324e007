"""The pictures show the regions and the cosines as they are; `python -m sea_kernels show` draws, or says why not."""

import json
from pathlib import Path

import oracle
import programs
import pytest
import torch
from cases import make_maps, make_regions
from matplotlib.colors import to_rgb
from matplotlib.image import imread, imsave
from PIL import Image  # matplotlib's own dependency

import sea_kernels as sk
from sea_kernels import plot
from sea_kernels.__main__ import main

ROOT = Path(sk.__file__).parents[1]
SHAPES, STRIDES = [(9, 12), (5, 6), (2, 2)], [8, (16, 16.5), 40]
SIZES = [(72, 96), (50, 61)]  # height, width
NAMES = ["cat", "dog", "cow", "pig"]
# In image 0 a cat in a dog's center; a crowd reaches over half the dog. Image 1 has a crowd alone, over its border.
BOXES = [[(8.0, 8.0, 60.0, 60.0), (24.0, 20.0, 47.0, 40.0), (70.0, 3.0, 75.0, 9.0)], []]
LABELS = [[1, 0, 3], []]
IGNORE = [[(40.0, 30.0, 95.0, 70.0)], [(33.0, 31.0, 90.0, 90.0)]]


@pytest.fixture(params=["native", "reference"])
def scene(request):
    with sk.backend(request.param):
        return sk.Regions.from_boxes(
            [torch.tensor(x).view(-1, 4) for x in BOXES],
            [torch.tensor(x, dtype=torch.int64) for x in LABELS],
            SHAPES, STRIDES, num_classes=4, image_sizes=SIZES,
            ignore_boxes=[torch.tensor(x) for x in IGNORE],
        )  # fmt: skip


def images(dtype=torch.float32):
    return torch.rand(2, 3, 72, 96, generator=torch.Generator().manual_seed(1)).to(dtype)


def kinds_by_hand(level):
    """[B][H][W] of kinds, from the boxes, pixel by pixel."""
    _, masks, extent = oracle.regions(BOXES, LABELS, SHAPES, STRIDES, 4, sizes=SIZES, ignore=IGNORE)
    out = []
    for b in range(2):
        rows = []
        for y in range(SHAPES[level][0]):
            row = []
            for x in range(SHAPES[level][1]):
                background, *pairs = masks[level][:, b, y, x]
                name = {(True, True): "center and edge", (True, False): "center", (False, True): "edge"}.get(
                    (any(pairs[::2]), any(pairs[1::2])), "background" if background else "uncounted (crowd)"
                )
                rows_inside, columns_inside = extent[level, b]
                row.append(plot.KINDS.index(name if y < rows_inside and x < columns_inside else "padding"))
            rows.append(row)
        out.append(rows)
    return out


@pytest.mark.parametrize("level", range(3))
def test_kinds_are_those_counted_by_hand(scene, level):
    found = plot.kinds(scene, level)
    assert found.dtype == torch.uint8 and found.tolist() == kinds_by_hand(level)


def test_the_scene_has_every_kind():
    assert {k for image in kinds_by_hand(0) for row in image for k in row} == set(range(len(plot.KINDS)))


def panels(figure):
    """The axes that show pictures, by title; their pictures."""
    return {axis.get_title(): axis for axis in figure.axes if axis.images}


def test_regions_are_painted_where_they_are(scene):
    figure = plot.regions(images(), scene, STRIDES)
    axes = [axis for axis in figure.axes if axis.images]
    assert len(axes) == 2 * (1 + 3)
    for i, axis in enumerate(axes):
        b, level = i // 4, i % 4 - 1
        assert axis.images[0].get_extent() == [0, 96, 72, 0]
        assert axis.get_xlim() == (0, 99) and axis.get_ylim() == (80, 0)  # 6 * 16.5 columns, 2 * 40 rows and columns
        if level < 0:
            assert axis.get_title() == f"image {b}" and len(axis.images) == 1
            torch.testing.assert_close(torch.tensor(axis.images[0].get_array()), images()[b].permute(1, 2, 0))
            continue
        paint = axis.images[1]
        h, w = SHAPES[level]
        sy, sx = STRIDES[level] if isinstance(STRIDES[level], tuple) else (STRIDES[level],) * 2
        assert paint.get_extent() == [0, w * sx, h * sy, 0] and paint.get_interpolation() == "nearest"
        colors = {to_rgb(c): kind for kind, c in enumerate(plot._COLORS)}
        painted = [[min(colors, key=lambda c: abs(p[:3] - c).sum()) for p in row] for row in paint.get_array()]
        assert [[colors[c] for c in row] for row in painted] == kinds_by_hand(level)[b]
        assert f"{h} x {w}, stride {'16 x 16.5' if level == 1 else sy}" in axis.get_title()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(plot.KINDS)


def test_what_is_drawn_looks_as_painted(tmp_path, scene):
    """The color in the written file where pixel (y, x) of level 0 lies, on a gray image: nothing lies over it."""
    figure = plot.regions(torch.full((2, 3, 72, 96), 0.5), scene, STRIDES)
    figure.savefig(tmp_path / "a.png")
    written = torch.tensor(imread(tmp_path / "a.png"))[..., :3]
    height, seen = len(written), {}
    for b, axis in enumerate(a for a in figure.axes if a.get_title().startswith("level 0")):
        for y in range(9):
            for x in range(12):
                column, row = axis.transData.transform((8 * x + 4, 8 * y + 4))
                seen.setdefault(kinds_by_hand(0)[b][y][x], []).append(written[int(height - row), int(column)])
    middles = torch.stack([torch.stack(seen[kind]).mean(0) for kind in range(len(plot.KINDS))])
    for kind, colors in seen.items():
        assert (torch.stack(colors) - middles[kind]).abs().max() < 0.15  # in the map but beyond the image, too
    assert (torch.cdist(middles, middles) + torch.eye(len(middles))).min() > 0.15


def test_names_and_outlines(scene):
    boxes, ignore = [torch.tensor(x).view(-1, 4) for x in BOXES], [torch.tensor(x) for x in IGNORE]
    figure = plot.regions(images(), scene, STRIDES, names=NAMES, boxes=boxes, ignore_boxes=ignore)
    first, second = (a for a in figure.axes if a.get_title() in ("image 0", "image 1"))
    texts = {text.get_text(): text.get_position() for text in first.texts}
    assert set(texts) == {"cat", "dog", "pig"} and not second.texts
    for name, (x, y) in texts.items():
        x1, y1, x2, y2 = BOXES[0][LABELS[0].index(NAMES.index(name))]
        assert x1 - 8 < x < x2 + 8 and y1 - 8 < y < y2 + 8
    for axis in figure.axes[:8]:
        drawn = {(min(x), min(y), max(x), max(y)) for x, y in (line.get_data() for line in axis.lines)}
        image = 0 if axis in figure.axes[:4] else 1
        assert drawn == {*BOXES[image], *IGNORE[image]}
        dashed = [line for line in axis.lines if line.get_linestyle() == "--"]
        assert [min(line.get_xdata()) for line in dashed] == [IGNORE[image][0][0]]
    by_label = plot.regions(images(), scene, STRIDES, names={1: "d", 0: "c", 3: "p"})
    assert {text.get_text() for text in by_label.axes[0].texts} == {"d", "c", "p"}


def test_a_name_for_every_piece():
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 1], [0, 0, 0, 1], [1, 0, 0, 1]], dtype=torch.bool)
    assert plot._pieces(mask) == [(0, 0), (2, 3), (3, 0)]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.float64])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_every_kind(dtype, channels):
    regions = sk.Regions.from_boxes([torch.zeros(0, 4)], [torch.zeros(0, dtype=torch.int64)], [(2, 3)], [8])
    image = torch.arange(channels * 16 * 24).view(channels, 16, 24) % 256
    shown = (plot.regions(x.to(dtype), regions, [8]).axes[0].images[0].get_array() for x in (image, image - 100))
    expected = image.expand(3, -1, -1).permute(1, 2, 0) / 255
    torch.testing.assert_close(torch.tensor(next(shown)).double(), expected.double(), atol=1e-6, rtol=0)
    if dtype != torch.uint8:  # of any normalization: rescaled to its least and greatest
        torch.testing.assert_close(torch.tensor(next(shown)).double(), expected.double(), atol=1e-3, rtol=0)
    small = plot.regions(torch.full((3, 16, 24), 0.25), regions, [8]).axes[0].images[0].get_array()
    assert (small == 0.25).all()
    nan = torch.zeros(3, 16, 24)
    nan[0, 0, 0], nan[1, 1, 1] = float("nan"), -1
    assert torch.tensor(plot.regions(nan, regions, [8]).axes[0].images[0].get_array()).isfinite().all()


def cosine_maps(regions):
    make = {name: make_maps(regions.level_shapes, seed=i) for i, name in enumerate(("before", "after", "teacher"))}
    return make, {n: sk.anchor_cosine(m, sk.anchor_pool(m, regions), regions) for n, m in make.items()}


def test_cosines_are_those_of_the_maps():
    regions = make_regions(levels=2, num_classes=5)
    maps, expected = cosine_maps(regions)
    image, level = 1, 1
    figure = plot.cosines(torch.rand(2, 3, 160, 224), maps, regions, [8, 16], level=level, image=image, names="abcde")
    masks = regions.masks(level)[:, image]
    rows = [p for p in range(len(masks)) if masks[p].any()]
    axes = [axis for axis in figure.axes if axis.images and axis.get_title()]
    assert len(axes) == len(rows) * 6
    for row, p in enumerate(rows):
        mask, before, after, teacher, before_apart, after_apart = axes[6 * row : 6 * row + 6]
        label = "abcde"[int(regions.classes[(p - 1) // 2])]
        assert mask.get_title() == ("background" if p == 0 else f"{label}: {'center' if p % 2 else 'edge'}")
        assert torch.equal(torch.tensor(mask.images[1].get_array())[..., 3] > 0, masks[p])
        target = expected["teacher"][level][image, p]
        for axis, name in ((before, "before"), (after, "after"), (teacher, "teacher")):
            torch.testing.assert_close(torch.tensor(axis.images[0].get_array()), expected[name][level][image, p])
            assert axis.images[0].get_clim() == (-1, 1) and axis.get_title() == name
        for axis, name in ((before_apart, "before"), (after_apart, "after")):
            apart = (expected[name][level][image, p] - target).abs()
            torch.testing.assert_close(torch.tensor(axis.images[0].get_array()), apart)
            assert axis.images[0].get_clim() == before_apart.images[0].get_clim()
            assert axis.get_title() == f"|{name} - teacher|, mean {apart[masks.any(0)].mean():.3f}"
        covered = torch.tensor(after.images[1].get_array())[..., 3] > 0
        assert torch.equal(covered, ~masks.any(0))  # what does not count is gray


def test_chosen_anchors_and_one_set_of_maps(tmp_path):
    regions = make_regions(levels=1)
    maps, _ = cosine_maps(regions)
    pictures = torch.zeros(2, 3, 160, 224)
    figure = plot.cosines(pictures, {"teacher": maps["teacher"]}, regions, [8], anchors=[2, 0])
    label = int(regions.classes[0])
    assert list(panels(figure)) == [f"category {label}: edge", "teacher", "background"]
    figure.savefig(tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    maps["teacher"][0][0, :, 3, 3] = float("nan")
    plot.cosines(pictures, maps, regions, [8]).savefig(tmp_path / "b.png")


GOOD = {"images": torch.zeros(2, 3, 160, 224), "strides": [8, 16]}
BAD_REGIONS = [
    ({"images": [1]}, TypeError, "images is a list; expected a tensor"),
    ({"images": torch.zeros(2, 3, 8, 8, dtype=torch.int64)}, TypeError, "images has dtype torch.int64"),
    ({"images": torch.zeros(2, 4, 8, 8)}, ValueError, r"images has shape \[2, 4, 8, 8\]; expected \[B, 3, H, W\]"),
    ({"images": torch.zeros(3, 8, 8)}, ValueError, "images has 1 images; expected 2, as regions"),
    ({"regions": None}, TypeError, "regions is a NoneType; expected sea_kernels.Regions"),
    ({"strides": [8]}, ValueError, "strides has 1 entries; expected 2"),
    ({"names": ["a"]}, ValueError, "names has no entry for label"),
    ({"boxes": torch.zeros(1, 4)}, TypeError, "boxes is a Tensor; expected a list of 2 tensors"),
    ({"ignore_boxes": [torch.zeros(1, 4)]}, ValueError, "ignore_boxes has 1 tensors; expected 2"),
    ({"boxes": [torch.zeros(1, 4), torch.zeros(4)]}, ValueError, r"boxes\[1\] has shape \[4\]; expected \[G, 4\]"),
]


@pytest.mark.parametrize(("bad", "error", "words"), BAD_REGIONS)
def test_bad_arguments_of_regions(bad, error, words):
    with pytest.raises(error, match=words):
        plot.regions(**{**GOOD, "regions": make_regions(levels=2), **bad})


BAD_COSINES = [
    ({"maps": []}, TypeError, "maps is a list; expected a dict"),
    ({"maps": {}}, ValueError, "maps is empty"),
    ({"maps": {"s": 1}}, TypeError, r"maps\['s'\] is a int; expected a list of maps"),
    ({"maps": {"s": [torch.zeros(2, 4, 20, 28)]}}, ValueError, r"regions has 2 levels; expected 1, as maps\['s'\]"),
    ({"level": 2}, ValueError, "level is 2; expected an integer from 0 to 1"),
    ({"image": "0"}, TypeError, "image is a str; expected an integer"),
    ({"anchors": [0, 99]}, ValueError, r"anchors\[1\] is 99; expected an integer from 0 to"),
    ({"anchors": []}, ValueError, "anchors is empty"),
    ({"images": torch.zeros(3, 8, 8)}, ValueError, "images has 1 images; expected 2, as regions"),
]


@pytest.mark.parametrize(("bad", "error", "words"), BAD_COSINES)
def test_bad_arguments_of_cosines(bad, error, words):
    regions = make_regions(levels=2)
    with pytest.raises(error, match=words):
        plot.cosines(**{**GOOD, "maps": cosine_maps(regions)[0], "regions": regions, **bad})


def test_without_matplotlib():
    code = """
import sys
sys.modules["matplotlib"] = None
import sea_kernels, torch
from sea_kernels import plot
from sea_kernels.__main__ import main
for draw in (lambda: plot.regions(None, None, None), lambda: plot.cosines(None, None, None, None)):
    try:
        draw()
    except ImportError as error:
        assert "sea_kernels.plot draws with matplotlib: pip install matplotlib" in str(error), error
    else:
        raise AssertionError("no error")
assert main(["show", "a.png", "b.txt"]) == 2
"""
    done = programs.run("-c", code, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("python -m sea_kernels show: sea_kernels.plot draws with matplotlib")


# The picture benchmarks/results/regions.png is `show scene.png scene.json --size 256 384` of these, by `draw_scene`.
SCENE = {
    "house": [(150, 84, 250, 196)],
    "tree": [(24, 40, 100, 200), (262, 108, 306, 196)],
    "ball": [(112, 192, 140, 220)],
    "crowd": [(180, 200, 336, 234)],
}
SCENE_SIZE = (240, 352)


def draw_scene(folder):
    """A drawn picture and its boxes in both formats: scene.png, scene.json, scene.txt."""
    h, w = SCENE_SIZE
    y, x = torch.meshgrid(torch.arange(h) + 0.5, torch.arange(w) + 0.5, indexing="ij")
    picture = torch.stack([0.45 + y / h / 3, 0.65 + y / h / 4, torch.full((h, w), 0.92)])

    def fill(where, *color):
        picture[:, where] = torch.tensor(color).view(3, 1)

    def disc(cx, cy, r):
        return (x - cx).square() + (y - cy).square() < r * r

    fill(y > 170 + 6 * torch.sin(x / 40), 0.36, 0.62, 0.3)
    fill(disc(310, 36, 18), 1.0, 0.9, 0.4)
    fill((y > 124) & (y < 196) & (x > 158) & (x < 242), 0.86, 0.76, 0.6)
    fill((y > 84) & (y < 126) & ((x - 200).abs() < (y - 84) * 50 / 42), 0.62, 0.22, 0.18)
    fill((y > 152) & (y < 196) & (x > 190) & (x < 212), 0.35, 0.22, 0.14)
    for x1, y1, x2, y2 in SCENE["tree"]:
        cx, r = (x1 + x2) / 2, (x2 - x1) / 2
        fill(((x - cx).abs() < r / 5) & (y > y1 + r) & (y < y2), 0.4, 0.27, 0.15)
        fill(((x - cx) / r).square() + ((y - y1 - 1.3 * r) / (1.3 * r)).square() < 1, 0.14, 0.42, 0.2)
    fill(disc(126, 206, 14), 0.95, 0.45, 0.1)
    for n in range(19):
        cx, cy = 186 + 8 * n, 208 + 5 * (n % 3)
        fill(((x - cx).abs() < 3) & (y > cy) & (y < cy + 16), 0.2 + 0.04 * n, 0.2, 0.8 - 0.03 * n)
        fill(disc(cx, cy, 4), 0.9, 0.75, 0.6)
    imsave(folder / "scene.png", picture.permute(1, 2, 0).clamp(0, 1).numpy())

    ids = {"person": 1, "house": 7, "ball": 3, "tree": 12}
    annotations, lines = [], ["x1,y1,x2,y2,label", "# a comment", ""]
    for name, boxes in SCENE.items():
        for x1, y1, x2, y2 in boxes:
            crowd = name == "crowd"
            entry = {"image_id": 5, "category_id": ids["person" if crowd else name], "iscrowd": int(crowd)}
            annotations.append({**entry, "bbox": [x1, y1, x2 - x1, y2 - y1]})
            separator = ", " if name == "tree" else " "
            lines.append(separator.join(map(str, (x1, y1, x2, y2, "ignore" if crowd else name))))
    annotations.append({"image_id": 6, "category_id": 1, "bbox": [0, 0, 9, 9]})
    entries = [{"id": 6, "file_name": "other.png"}, {"id": 5, "file_name": "a/scene.png", "height": h, "width": w}]
    categories = [{"id": i, "name": name} for name, i in ids.items()]
    coco = {"images": entries, "annotations": annotations, "categories": categories}
    (folder / "scene.json").write_text(json.dumps(coco))
    (folder / "scene.txt").write_text("\n".join(lines))


def show(folder, *arguments):
    """The command as a process."""
    return programs.run("-m", "sea_kernels", "show", *map(str, arguments), cwd=folder)


@pytest.fixture
def call(drawn, monkeypatch, capsys):
    """The command within this process, in the folder of the drawn files: what it says."""
    monkeypatch.chdir(drawn)

    def run(*arguments):
        assert main(["show", *map(str, arguments)]) == 0
        out, err = capsys.readouterr()
        assert not err
        return out

    return run


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scene")
    draw_scene(folder)
    return folder


def test_show_of_both_formats_is_the_same(drawn):
    said = {}
    for boxes in ("scene.json", "scene.txt"):
        done = show(drawn, "scene.png", boxes, "--size", 256, 384, "--strides", 8, 12.5, "--out", f"{boxes}.png")
        assert done.returncode == 0 and not done.stderr, done.stderr
        first, *said[boxes] = done.stdout.splitlines()
        assert first.startswith(f"wrote {boxes}.png: scene.png, 240 x 352 pixels, padded to 256 x 384; ")
        assert first.endswith("4 boxes of 3 categories, 1 crowd")
        assert imread(drawn / f"{boxes}.png").shape[2] == 4
    assert said["scene.json"] == said["scene.txt"]

    boxes = [x for name, given in SCENE.items() if name != "crowd" for x in given]
    labels = [list(SCENE).index(name) for name, given in SCENE.items() if name != "crowd" for _ in given]
    regions = sk.Regions.from_boxes(
        [torch.tensor(boxes).float()], [torch.tensor(labels)], [(32, 48), (21, 31)], [8, 12.5],
        image_sizes=[SCENE_SIZE], ignore_boxes=[torch.tensor(SCENE["crowd"]).float()],
    )  # fmt: skip
    for level, line in enumerate(said["scene.txt"]):
        where, _, counts = line.partition(": ")
        assert where == f"level {level}, stride {(8, 12.5)[level]}"
        counts = {kind: int(n) for n, _, kind in (part.partition(" ") for part in counts.split(", "))}
        kinds = plot.kinds(regions, level)
        assert counts == {kind: n for i, kind in enumerate(plot.KINDS) if (n := int((kinds == i).sum()))}


def test_show_pads_to_a_multiple_and_has_defaults(call, drawn):
    said = call("scene.png", "scene.txt", "--pad-to", 100, "--center-ratio", 1)
    assert "padded to 300 x 400" in said and "edge" not in said
    assert said.startswith("wrote regions.png") and said.count("level ") == 5
    assert (drawn / "regions.png").stat().st_size > 10_000


@pytest.mark.parametrize("content", ["", "\n", "1 1 20 20 ignore\n"])
def test_show_without_a_box(call, drawn, content):
    (drawn / "none.csv").write_text(content)
    assert "0 boxes of 0 categories" in call("scene.png", "none.csv", "--strides", 16)


@pytest.mark.parametrize("form", ["gray", "opacity", "bits16"])
def test_show_of_other_pictures(call, drawn, form):
    picture = Image.open(drawn / "scene.png")
    if form == "bits16":
        Image.fromarray((torch.rand(240, 352) * 65535).to(torch.uint16).numpy()).save(drawn / f"{form}.png")
    else:
        picture.convert({"gray": "L", "opacity": "RGBA"}[form]).save(drawn / f"{form}.png")
    assert "240 x 352" in call(f"{form}.png", "scene.txt", "--strides", 32)


BAD_FILES = [
    (["missing.png", "scene.txt"], "missing.png cannot be read as a picture"),
    (["scene.txt", "scene.txt"], "scene.txt cannot be read as a picture"),
    (["scene.png", "missing.txt"], "missing.txt cannot be read"),
    (["scene.png", "scene.png"], "scene.png cannot be read"),
    (["scene.png", "four.txt"], "four.txt, line 2: '1 2 3 4'; expected x1 y1 x2 y2 label"),
    (["scene.png", "word.txt"], "word.txt, line 1: '1 2 x 4 cat'; expected x1 y1 x2 y2 label"),
    (["scene.png", "inverted.txt"], "boxes[0][0] is"),
    (["scene.png", "nan.txt"], "boxes[0][0] is"),
    (["scene.png", "broken.json"], "broken.json is not JSON"),
    (["scene.png", "list.json"], "list.json is not a COCO annotation file"),
    (
        ["scene.png", "half.json"],
        "half.json is not a COCO annotation file (images, annotations, categories): it has no categories",
    ),
    (["other2.png", "scene.json"], "scene.json has no image of file_name other2.png"),
    (["small.png", "small.json"], "small.png has 8 x 9 pixels (height x width); small.json says 16 x 18"),
    (["scene.png", "scene.txt", "--size", "100", "400"], "--size is 100 x 400; expected at least 240 x 352"),
    (["scene.png", "scene.txt", "--center-ratio", "2"], "center_ratio is 2.0; expected a number from 0 to 1"),
    (["scene.png", "scene.txt", "--out", "no/such/folder.png"], "no/such/folder.png"),
    (["scene.png", "scene.txt", "--out", "a.nonsense"], "nonsense"),
    (["scene.png", "scene.txt", "--strides", "0"], "argument --strides: 0 is not above 0 and finite"),
    (["scene.png", "scene.txt", "--pad-to", "1.5"], "argument --pad-to: invalid"),
    (["scene.png", "scene.txt", "--pad-to", "8", "--size", "9", "9"], "not allowed with"),
    (["scene.png"], "the following arguments are required: boxes"),
]


@pytest.fixture(scope="module")
def bad(drawn):
    (drawn / "four.txt").write_text("1 2 3 4 cat\n1 2 3 4")
    (drawn / "word.txt").write_text("1 2 x 4 cat")
    (drawn / "inverted.txt").write_text("9 2 3 4 cat")
    (drawn / "nan.txt").write_text("1 2 nan 4 cat")
    (drawn / "broken.json").write_text("{")
    (drawn / "list.json").write_text("[1]")
    coco = json.loads((drawn / "scene.json").read_text())
    (drawn / "half.json").write_text(json.dumps({k: v for k, v in coco.items() if k != "categories"}))
    entry = {"id": 5, "file_name": "small.png", "height": 16, "width": 18}
    (drawn / "small.json").write_text(json.dumps({**coco, "images": [entry], "annotations": coco["annotations"][:1]}))
    for name in ("small.png", "other2.png"):
        imsave(drawn / name, torch.zeros(8, 9, 3).numpy())
    return drawn


@pytest.mark.parametrize(("arguments", "words"), BAD_FILES)
def test_bad_files_are_one_sentence(bad, arguments, words, monkeypatch, capsys):
    monkeypatch.chdir(bad)
    try:
        code = main(["show", *arguments])
    except SystemExit as error:  # argparse's own, after the usage
        code = error.code
    out, err = capsys.readouterr()
    assert code == 2 and not out
    line = err.splitlines()[-1]
    assert line.startswith("python -m sea_kernels show: ") and words in line
    assert err.startswith("usage:") or len(err.splitlines()) == 1


def test_a_bad_file_by_the_command(drawn):
    done = show(drawn, "scene.png", "missing.txt")
    assert done.returncode == 2 and not done.stdout and len(done.stderr.splitlines()) == 1
