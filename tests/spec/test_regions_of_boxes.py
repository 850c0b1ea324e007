"""Regions of boxes: the masks of the definition, pixel by pixel, whatever the boxes."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import BF16, F16, F32, F64, make_boxes
from hypothesis import given, settings
from hypothesis import strategies as st
from scenes import CASES, assert_same_regions, build, expected_regions, regions_of

import sea_kernels as sk
from sea_kernels import backends, reference
from sea_kernels.boxes import RasterInput


def assert_regions(regions, classes, masks, extent):
    assert regions.classes.dtype == torch.int64 and regions.classes.tolist() == classes
    assert regions.extent.dtype == torch.int32
    np.testing.assert_array_equal(regions.extent.cpu().numpy(), extent)
    assert regions.area.dtype == regions.counted.dtype == torch.float32
    for i, m in enumerate(masks):
        assert regions.masks(i).dtype == torch.bool
        np.testing.assert_array_equal(regions.masks(i).cpu().numpy(), m)
        np.testing.assert_array_equal(regions.area[i].cpu().numpy(), m.sum((1, 2, 3)))
        assert regions.counted[i] == m.any(0).sum()


def assert_as_defined(case, dtype, packed, device):
    wanted = expected_regions(case, np.float64 if dtype == F64 else np.float32)
    assert_regions(regions_of(case, dtype, packed, device), *wanted)


def draw(mask):
    return ["".join(".#"[v] for v in row) for row in mask.tolist()]


def test_a_picture_of_background_center_and_edge(backend, device):
    """A box of 4 x 3 pixels and a tiny one of the same category, a crowd, padding at the right and at the bottom."""
    regions = build(
        [torch.tensor([[8.0, 0.0, 40.0, 24.0], [0.0, 25.0, 0.5, 25.5]], device=device)],
        [torch.tensor([3, 3], device=device)],
        [(5, 8)],
        [8],
        image_sizes=[(30, 49)],
        ignore_boxes=[torch.tensor([[32.0, 16.0, 64.0, 40.0]], device=device)],
    )
    background, center, edge = (draw(m[0]) for m in regions.masks(0)[:3])
    assert regions.classes.tolist() == [3, -1]
    assert background == ["#....##.", "#....##.", "#.......", ".###....", "........"]
    assert center == ["..##....", "..##....", "..##....", "#.......", "........"]
    assert edge == [".#..#...", ".#..#...", ".#..#...", "........", "........"]
    assert regions.extent.tolist() == [[[4, 7]]]
    assert regions.area.tolist() == [[10, 7, 6, 0, 0]]
    assert regions.counted.tolist() == [23]


@pytest.mark.parametrize("packed", [False, True], ids=["list", "packed"])
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_regions_are_those_of_the_definition(case, dtype, packed, backend, device):
    assert_as_defined(case, dtype, packed, device)


coordinate = st.one_of(
    st.integers(-10, 70).map(float),
    st.floats(-20, 80, width=16),
    st.floats(-(2.0**127), 2.0**127, width=32),
)


@st.composite
def cases(draw):
    batch = draw(st.integers(1, 3))
    levels = draw(st.integers(1, 2))

    def boxes(number):
        values = [draw(st.tuples(*[coordinate] * 4)) for _ in range(draw(st.integers(0, number)))]
        return [(min(a, c), min(b, d), max(a, c), max(b, d)) for a, b, c, d in values]

    stride = st.one_of(st.sampled_from([1, 8, 16, 0.5]), st.floats(0.7, 40))
    case = {
        "boxes": [boxes(4) for _ in range(batch)],
        "shapes": [draw(st.tuples(st.integers(1, 6), st.integers(1, 7))) for _ in range(levels)],
        "strides": [draw(st.one_of(stride, st.tuples(stride, stride))) for _ in range(levels)],
        "num_classes": draw(st.integers(1, 4)),
        "ratio": draw(st.sampled_from([0.5, 0.0, 0.3, 1.0])),
    }
    case["labels"] = [[draw(st.integers(-1, case["num_classes"] - 1)) for _ in image] for image in case["boxes"]]
    if draw(st.booleans()):
        case["ignore"] = [boxes(2) for _ in range(batch)]
    if draw(st.booleans()):
        case["sizes"] = [draw(st.tuples(st.integers(0, 70), st.integers(0, 70))) for _ in range(batch)]
    return case


@settings(derandomize=True, max_examples=150)
@given(cases(), st.sampled_from([F32, F64]), st.booleans())
def test_any_boxes_give_the_regions_of_the_definition(backend, device, case, dtype, packed):
    assert_as_defined(case, dtype, packed, device)


SIZES = [(32, 64), (64, 128), (64, 64)]  # powers of two: every conversion below is exact


def in_form(boxes, sizes, box_format, normalized):
    """x1 y1 x2 y2 in pixels as another trainer has them"""
    out = boxes.clone()
    if box_format != "xyxy":
        out[:, 2:] -= boxes[:, :2]
    if box_format == "cxcywh":
        out[:, :2] = (boxes[:, :2] + boxes[:, 2:]) / 2
    return out / sizes.flip(1).repeat(1, 2) if normalized else out


@pytest.mark.parametrize("dtype", [F16, F32, F64])
@pytest.mark.parametrize("sizes_in", [list, torch.tensor])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("box_format", ["xyxy", "xywh", "cxcywh"])
def test_boxes_in_other_formats(box_format, normalized, packed, sizes_in, dtype, backend, device):
    generator = torch.Generator().manual_seed(0)
    for sizes in (SIZES, [SIZES[0]] * 3):
        made = []
        for counts in ([3, 0, 2], [0, 2, 1]):
            index = torch.arange(3).repeat_interleave(torch.tensor(counts))
            first = torch.randint(0, 100, (sum(counts), 2), generator=generator) / 4
            size = torch.randint(4, 100, (sum(counts), 2), generator=generator) / 4
            boxes = torch.cat([first, first + size], 1)
            other = in_form(boxes, torch.tensor(sizes)[index], box_format, normalized)
            for x in (boxes, other):
                x = x.to(dtype).to(device)
                made.append((x, index.to(device)) if packed else (list(x.split(counts)), None))
        (boxes, index), (others, _), (ignore, ignore_index), (other_ignore, _) = made
        labels = torch.tensor([0, 1, 1, 0, 2], device=device)
        options = {
            "labels": labels if packed else list(labels.split([3, 0, 2])), "batch_index": index,
            "ignore_batch_index": ignore_index, "batch_size": 3, "num_classes": 3, "level_shapes": [(8, 16), (4, 8)],
            "strides": [8, 16], "image_sizes": sizes if sizes_in is list else torch.tensor(sizes, device=device),
        }  # fmt: skip
        wanted = sk.Regions.from_boxes(boxes, ignore_boxes=ignore, **options)
        form = {"box_format": box_format, "normalized": normalized}
        found = sk.Regions.from_boxes(others, ignore_boxes=other_ignore, **options, **form)
        assert_same_regions(found, wanted)
        assert wanted.area[:, 1:].sum() > 0 and wanted.counted[0] < 3 * 8 * 16


def test_normalized_packed_boxes_of_no_image_or_out_of_range(backend, device):
    """On a GPU such boxes are skipped, on a CPU refused."""
    options = {"level_shapes": [(2, 2)], "strides": [8], "normalized": True, "box_format": "cxcywh"}
    none = {"boxes": torch.zeros(0, 4, device=device), "labels": torch.zeros(0, device=device).long()}
    index = torch.zeros(0, device=device).long()
    for sizes in ([], [(16, 8)], [(16, 8), (8, 16)]):
        regions = sk.Regions.from_boxes(**none, **options, batch_index=index, batch_size=len(sizes), image_sizes=sizes)
        assert regions.batch_size == len(sizes)
    box, label = torch.full((1, 4), 0.5), torch.tensor([0])
    for sizes in ([(16, 8)], [(16, 8), (8, 16)], []):
        with pytest.raises(ValueError, match=rf"batch_index\[0\] is 7; expected 0 <= index < {len(sizes)}"):
            sk.Regions.from_boxes(
                box, label, **options, batch_index=torch.tensor([7]), batch_size=len(sizes), image_sizes=sizes
            )


@pytest.mark.parametrize(
    ("boxes", "options", "said"),
    [
        ([0.1, 0.1, 0.6, 0.6], {}, "no box is larger than one pixel; are they relative to their images"),
        ([0.1, 0.1, 0.6, 0.6], {"normalized": True}, None),
        ([0.1, 0.1, 0.6, 1.6], {}, None),
        ([400.0, 40.0, 600.0, 60.0], {}, "every box lies outside of its image; are they of images before"),
        ([40.0, 40.0, 600.0, 600.0], {}, None),
        ([40.0, 100.0, 60.0, 110.0], {"image_sizes": [(320, 320), (90, 320)]}, "every box lies outside"),
        ([40.0, 100.0, 60.0, 110.0], {"image_sizes": torch.tensor([[320, 320], [120, 320]])}, None),
        ([400.0, 40.0, 600.0, 60.0], {"labels": -1}, None),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_boxes_that_look_wrong_are_told_once(boxes, options, said, packed, backend, caplog, monkeypatch):
    from sea_kernels import boxes as module

    monkeypatch.setattr(module, "_told", set())
    options = {"level_shapes": [(40, 40)], "strides": [8], "image_sizes": [(320, 320)] * 2} | options
    label = torch.tensor([options.pop("labels", 1)])
    given, labels = torch.tensor([boxes]), label
    if packed:
        options |= {"batch_index": torch.tensor([1]), "batch_size": 2}
    else:
        given, labels = [torch.zeros(0, 4), given], [label[:0], label]
    for _ in range(2):
        sk.Regions.from_boxes(given, labels, **options)
    messages = [r.getMessage() for r in caplog.records]
    assert messages == [] if said is None else len(messages) == 1 and said in messages[0]


@pytest.mark.parametrize("stride", [6.9, 13.3, 1333 / 40, 100 / 7])
def test_borders_of_pixels_are_multiples_of_the_stride_in_float32(stride, backend, device):
    """Coordinates at multiples of the stride, which reciprocals, or float64, would put into another pixel."""
    corners = (np.arange(41, dtype=np.float32) * np.float32(stride)).tolist()
    case = {
        "boxes": [[(low, low, high, high) for low, high in zip(corners, corners[2:])]],
        "labels": [list(range(39))],
        "shapes": [(1, 42), (42, 1)],
        "strides": [(1e6, stride), (stride, 1e6)],
        "num_classes": 39,
    }
    assert_as_defined(case, F32, False, device)


@given(st.floats(0, 60, width=32), st.floats(0, 60, width=32), st.floats(0, 4, width=32), st.floats(0, 4, width=32))
def test_a_box_inside_the_image_owns_a_pixel_of_every_level(backend, device, x, y, w, h):
    box, labels = torch.tensor([[x, y, x + w, y + h]], device=device), torch.tensor([0], device=device)
    regions = build([box], [labels], [(8, 8), (4, 4), (2, 2), (1, 1)], [8, 16, 32, 64])
    assert (regions.masks(0)[1:].sum() > 0) and bool((regions.area[:, 1:3].sum(1) > 0).all())


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_half_boxes_are_computed_in_float32(dtype, backend, device):
    corner = torch.rand(30, 2, generator=torch.Generator().manual_seed(0)) * 40
    boxes = torch.cat([corner, corner + 30], 1).to(device, dtype)
    labels = torch.arange(30, device=device)
    half, full = (build([b], [labels], [(12, 40)], [3.3]) for b in (boxes, boxes.float()))
    assert_same_regions(half, full)


def test_boxes_do_not_need_a_gradient_and_get_none(backend, device):
    boxes = torch.tensor([[0.0, 0.0, 9.0, 9.0]], requires_grad=True, device=device)
    regions = sk.Regions.from_boxes([boxes], [torch.tensor([0], device=device)], [(2, 2)], [8])
    assert not any(x.requires_grad for x in regions.tensors())


@pytest.mark.parametrize("boxes", [0, 1, 20, 40])
def test_masks_are_packed_into_words_of_32(boxes, backend, device):
    """2 * 40 + 1 masks fill a sign bit and reach the third word."""
    g = torch.Generator().manual_seed(boxes)
    corner = torch.rand(boxes, 2, generator=g) * 50
    b = torch.cat([corner, corner + 30 * torch.rand(boxes, 2, generator=g)], 1).to(device)
    shapes, labels = [(5, 7), (3, 4), (1, 1)], torch.arange(boxes, device=device)
    regions = build(b, labels, shapes, [8, 16, 64], batch_index=labels % 3, batch_size=3)
    bits = regions.tensors()[4]
    p = 1 + 2 * boxes
    pixels = 3 * (35 + 12 + 1)
    assert bits.dtype == torch.int32 and bits.shape == (math.ceil(p / 32) * pixels,)
    rows = bits.view(-1, pixels)
    packed = sk.Regions(*regions.tensors(), None, regions.level_shapes, 3)
    start = 0
    for i, (h, w) in enumerate(shapes):
        assert torch.equal(packed.masks(i), regions.masks(i))
        for mask in range(0, p, 7):
            words = rows[mask // 32, start : start + 3 * h * w].reshape(3, h, w)
            assert torch.equal(words >> (mask % 32) & 1 == 1, regions.masks(i)[mask])
        start += 3 * h * w
    assert torch.equal(packed.masks(-1), packed.masks(2))
    assert torch.equal(packed.tensors()[4], bits)


@pytest.mark.parametrize("sizes", [None, [(40, 56), (33, 41), (8, 24)]], ids=str)
@pytest.mark.parametrize("boxes", [0, 1, 40])
def test_runs_begin_where_masks_or_the_image_end(boxes, sizes, backend, device):
    """Images of less than 32 pixels, of exactly 32, and of several words."""
    g = torch.Generator().manual_seed(boxes)
    corner = torch.rand(boxes, 2, generator=g) * 50
    b = torch.cat([corner, corner + 20 * torch.rand(boxes, 2, generator=g)], 1).to(device)
    shapes, labels = [(5, 7), (4, 8), (1, 1), (9, 15)], torch.arange(boxes, device=device)
    regions = build(b, labels, shapes, [8, 8, 64, 5], batch_index=labels % 3, batch_size=3, image_sizes=sizes)
    wanted = []
    for level, (h, w) in enumerate(shapes):
        masks = regions.masks(level).flatten(2).cpu()
        for image, (rows, columns) in enumerate(regions.extent[level].tolist()):
            pixels = [(masks[:, image, n].tolist(), n // w < rows and n % w < columns) for n in range(h * w)]
            starts = [n == 0 or pixels[n] != pixels[n - 1] for n in range(h * w)]
            flags = starts, [inside for _, inside in pixels], [any(bits) for bits, _ in pixels]
            for n in range(0, h * w, 32):
                wanted += [sum(1 << i for i, bit in enumerate(f[n : n + 32]) if bit) for f in flags]
    assert [x % 2**32 for x in regions.tensors()[5].tolist()] == wanted


nan, inf = math.nan, math.inf
BAD_ROWS = {
    "NaN": ((nan, 0.0, 9.0, 9.0), 0, 0),
    "infinite": ((0.0, 0.0, inf, 9.0), 0, 0),
    "inverted": ((9.0, 0.0, 0.0, 9.0), 0, 0),
    "label too high": ((0.0, 0.0, 9.0, 9.0), 5, 0),
    "label too low": ((0.0, 0.0, 9.0, 9.0), -2, 0),
    "batch index too high": ((0.0, 0.0, 9.0, 9.0), 0, 2),
    "negative batch index": ((0.0, 0.0, 9.0, 9.0), 0, -1),
}


@pytest.mark.parametrize("row", BAD_ROWS.values(), ids=BAD_ROWS)
def test_unchecked_bad_rows_are_skipped(row, backend, device):
    """What a GPU does without `validate`: a bad row changes nothing but the capacity."""

    def rasterize(boxes, labels, index, ignore=None, ignore_index=None):
        tensor = lambda x: None if x is None else torch.tensor(x, device=device)  # noqa: E731
        boxes, ignore = (None if x is None else tensor(x).reshape(-1, 4) for x in (boxes, ignore))
        args = (boxes, tensor(labels), tensor(index), [], ignore, tensor(ignore_index), [])
        if backends.current_backend() == "native":
            return torch.ops.sea_kernels.rasterize(*args, None, [], 2, [6, 8], [8.0, 8.0], 5, 0.5, None)
        return by_reference(*args)

    def by_reference(*args):
        return reference.raster.rasterize(RasterInput(*args, None, [], 2, [6, 8], [8.0, 8.0], 5, 0.5))

    def flat(found):
        """The reference's masks of each level among the other tensors."""
        return [*found[:4], *(found[6] if backend == "reference" else found[4:])]

    good = ((20.0, 10.0, 50.0, 40.0), 3, 1)
    padding = ((0.0, 0.0, 9.0, 9.0), -1, 0)
    plain, bad = (rasterize(*zip(*rows)) for rows in ((padding, good), (row, good)))
    assert plain[0].tolist() == [3, -1]
    for x, y in zip(flat(plain), flat(bad)):
        assert torch.equal(x, y)
    box, label, index = row
    if 0 <= label < 5:  # the same among ignore boxes
        crowd = rasterize(*zip(good), ignore=[good[0], box], ignore_index=[good[2], index])
        alone = rasterize(*zip(good), ignore=[good[0]], ignore_index=[good[2]])
        assert torch.equal(flat(crowd)[4], flat(alone)[4])


def test_padding_rows_change_nothing_but_the_capacity(backend, device):
    rows, labels, index = make_boxes(5)
    garbage = torch.tensor([[nan, inf, -1.0, -2.0]]).expand(3, 4)
    rows = torch.cat([rows[:2], garbage[:1], rows[2:], garbage[1:]])
    labels = torch.cat([labels[:2], torch.tensor([-1]), labels[2:], torch.tensor([-1, -1])])
    index = torch.cat([index[:2], torch.tensor([99]), index[2:], torch.tensor([-5, 0])])
    call = {"level_shapes": [(20, 28)], "strides": [8], "num_classes": 5, "batch_size": 2}
    padded = build(rows.to(device), labels.to(device), batch_index=index.to(device), **call)
    keep = labels >= 0
    plain = build(rows[keep].to(device), labels[keep].to(device), batch_index=index[keep].to(device), **call)
    masks = plain.area.shape[1]
    assert torch.equal(padded.area[:, :masks], plain.area) and not padded.area[:, masks:].any()
    assert torch.equal(padded.masks(0)[:masks], plain.masks(0))


def test_a_batch_without_an_image(backend, device):
    none = torch.zeros(0, dtype=torch.int64, device=device)
    options = {"batch_index": none, "batch_size": 0}
    regions = build(torch.zeros(0, 4, device=device), none, [(6, 8), (3, 4)], [8, 16], **options)
    assert regions.area.tolist() == [[0], [0]] and regions.masks(1).shape == (1, 0, 3, 4)


def test_image_sizes_as_list_and_tensor_agree(backend, device):
    rows, labels, index = (x.to(device) for x in make_boxes(6))
    call = {"batch_index": index, "batch_size": 2, "num_classes": 5}
    sizes = [(101, 223), (160, 7)]
    a, b = (
        build(rows, labels, [(20, 28)], [8], image_sizes=s, **call)
        for s in (sizes, torch.tensor(sizes, dtype=torch.int32, device=device))
    )
    assert_same_regions(a, b)


@pytest.mark.parametrize(
    ("boxes", "num_classes"),
    [(0, 80), (1, 1), (15, 80), (16, 80), (31, 80), (32, 80), (200, 80), (500, 1203)],
)
def test_many_boxes_of_many_categories(boxes, num_classes, device):
    """Up to 500 boxes an image of up to 1,203 categories: the masks fill from one word to many."""
    rows, labels, index = (x.to(device) for x in make_boxes(2 * boxes, 2, num_classes, seed=boxes))
    if boxes == 500:
        labels = torch.randperm(1203, generator=torch.Generator().manual_seed(1))[:1000].to(device)
    shapes, strides = [(20, 28), (10, 14), (2, 2)], [8, 16, 80]
    regions = build(rows, labels, shapes, strides, num_classes=num_classes, batch_index=index, batch_size=2)
    assert regions.classes.shape[0] == min(2 * boxes, num_classes)
    assert regions.classes.tolist()[: len(labels.unique())] == labels.unique().tolist()


@pytest.mark.skipif("SEA_KERNELS_DATA" not in os.environ, reason="SEA_KERNELS_DATA is not set")
def test_native_regions_of_real_boxes_are_those_of_the_reference(device):
    """COCO's annotations, crowds as ignore boxes, eight images a batch, padded to the size of the largest."""
    data = json.loads((Path(os.environ["SEA_KERNELS_DATA"]) / "instances_val2014_100.json").read_text())
    rows = {image["id"]: ([], [], []) for image in data["images"]}
    for a in data["annotations"]:
        x, y, w, h = a["bbox"]
        boxes, labels, crowd = rows[a["image_id"]]
        (crowd if a["iscrowd"] else boxes).append((x, y, x + w, y + h))
        labels.extend([] if a["iscrowd"] else [a["category_id"] - 1])
    for start in range(0, len(data["images"]), 8):
        images = data["images"][start : start + 8]
        height, width = (max(-(-image[k] // 128) * 128 for image in images) for k in ("height", "width"))
        boxes, crowd = (
            [torch.tensor(rows[image["id"]][k], dtype=F32, device=device).reshape(-1, 4) for image in images]
            for k in (0, 2)
        )
        labels = [torch.tensor(rows[image["id"]][1], device=device).long() for image in images]
        strides = [8, 16, 32, 64, 128]
        build(
            boxes,
            labels,
            [(height // s, width // s) for s in strides],
            strides,
            num_classes=90,
            image_sizes=[(image["height"], image["width"]) for image in images],
            ignore_boxes=crowd,
        )
