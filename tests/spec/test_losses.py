"""The reference, regions and losses, against the loops of oracle.py, and where a formula alone says too little."""

import math
import warnings

import numpy as np
import oracle
import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from sea_kernels import ops, reference
from sea_kernels.reference import Regions
from sea_kernels.regions import check_values

F64 = torch.float64


@pytest.fixture(autouse=True, scope="module")
def use_reference():
    with ops.backend("reference"):
        yield


def build(case, dtype=torch.float32, packed=False, **changes):
    """Regions of a case as written for the oracle."""
    case = case | changes
    boxes = [torch.tensor(b, dtype=dtype).reshape(-1, 4) for b in case["boxes"]]
    labels = [torch.tensor(c, dtype=torch.int32) for c in case["labels"]]
    ignore = case.get("ignore")
    ignore = None if ignore is None else [torch.tensor(b, dtype=dtype).reshape(-1, 4) for b in ignore]
    sizes, kwargs = case.get("sizes"), {}
    if packed:
        kwargs = {"batch_index": index_of(boxes), "batch_size": len(boxes)}
        boxes, labels = torch.cat(boxes), torch.cat(labels)
        sizes = None if sizes is None else torch.tensor(sizes)
        if ignore is not None:
            kwargs["ignore_batch_index"] = index_of(ignore)
            ignore = torch.cat(ignore)
    return Regions.from_boxes(
        boxes,
        labels,
        case["shapes"],
        case["strides"],
        num_classes=case.get("num_classes", 5),
        center_ratio=case.get("ratio", 0.5),
        image_sizes=sizes,
        ignore_boxes=ignore,
        **kwargs,
    )


def index_of(boxes):
    return torch.tensor([b for b, x in enumerate(boxes) for _ in range(len(x))], dtype=torch.int32)


def expected(case, dtype=np.float32):
    return oracle.regions(
        case["boxes"],
        case["labels"],
        case["shapes"],
        case["strides"],
        case.get("num_classes", 5),
        case.get("ratio", 0.5),
        case.get("sizes"),
        case.get("ignore"),
        dtype,
    )


def assert_regions(regions, classes, masks, extent):
    assert regions.classes.dtype == torch.int64 and regions.classes.tolist() == classes
    assert regions.extent.dtype == torch.int32
    np.testing.assert_array_equal(regions.extent.numpy(), extent)
    assert regions.area.dtype == regions.counted.dtype == torch.float32
    for i, m in enumerate(masks):
        assert regions.masks(i).dtype == torch.bool
        np.testing.assert_array_equal(regions.masks(i).numpy(), m)
        np.testing.assert_array_equal(regions.area[i].numpy(), m.sum((1, 2, 3)))
        assert regions.counted[i] == m.any(0).sum()


def same_regions(a, b):
    for x, y in zip(a.tensors(), b.tensors()):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


# ---------------------------------------------------------------------------------------------------------- regions


def draw(mask):
    return ["".join(".#"[v] for v in row) for row in mask.tolist()]


def test_picture():
    """A box of 4 x 3 pixels and a tiny one of the same category, a crowd, padding at the right and at the bottom."""
    regions = Regions.from_boxes(
        [torch.tensor([[8.0, 0.0, 40.0, 24.0], [0.0, 25.0, 0.5, 25.5]])],
        [torch.tensor([3, 3])],
        [(5, 8)],
        [8],
        image_sizes=[(30, 49)],
        ignore_boxes=[torch.tensor([[32.0, 16.0, 64.0, 40.0]])],
    )
    background, center, edge = (draw(m[0]) for m in regions.masks(0)[:3])
    assert regions.classes.tolist() == [3, -1]
    assert background == ["#....##.", "#....##.", "#.......", ".###....", "........"]
    assert center == ["..##....", "..##....", "..##....", "#.......", "........"]
    assert edge == [".#..#...", ".#..#...", ".#..#...", "........", "........"]
    assert regions.extent.tolist() == [[[4, 7]]]
    assert regions.area.tolist() == [[10, 7, 6, 0, 0]]
    assert regions.counted.tolist() == [23]


CASES = {
    "plain": {
        "boxes": [[(3, 5, 40, 29), (20, 0, 31, 63)], [(0, 0, 64, 48)]],
        "labels": [[2, 0], [2]],
        "shapes": [(6, 8), (3, 4), (1, 1)],
        "strides": [8, 16, 64],
    },
    "crowd and padding": {
        "boxes": [[(3, 5, 20, 29)], [(10, 2, 33, 20), (40, 40, 64, 48)]],
        "labels": [[1], [4, 4]],
        "ignore": [[(30, 10, 64, 30), (0, 0, 5, 5)], []],
        "sizes": [(48, 64), (33, 57)],
        "shapes": [(6, 8), (3, 4)],
        "strides": [8, 16],
    },
    "pairs of strides, not whole": {
        "boxes": [[(3.3, 5.1, 40.7, 29.9), (1, 1, 2, 2)], [(10.1, 10.1, 31.3, 31.7)]],
        "labels": [[0, 1], [1]],
        "sizes": [(47, 61), (33, 41)],
        "shapes": [(7, 5), (4, 4)],
        "strides": [(48 / 7, 64 / 5), 13.3],
        "ratio": 0.3,
    },
    "padding rows, duplicates, outside": {
        "boxes": [[(8, 8, 16, 16), (8, 8, 16, 16), (0, 0, 64, 48)], [(-50, -50, -10, -10), (70, 0, 90, 48)]],
        "labels": [[2, 2, -1], [0, 3]],
        "shapes": [(6, 8)],
        "strides": [8],
    },
    "more boxes than categories": {
        "boxes": [[(8 * i, 4 * i, 8 * i + 20, 4 * i + 9) for i in range(5)]],
        "labels": [[1, 0, 1, 0, 1]],
        "shapes": [(6, 8)],
        "strides": [8],
        "num_classes": 2,
    },
    "no box": {"boxes": [[], []], "labels": [[], []], "sizes": [(9, 17), (48, 8)], "shapes": [(6, 8)], "strides": [8]},
    "an image without a pixel": {
        "boxes": [[(0, 0, 30, 30)], [(0, 0, 30, 30)]],
        "labels": [[0], [0]],
        "sizes": [(0, 0), (40, 40)],
        "shapes": [(6, 8), (1, 1)],
        "strides": [8, 48],
    },
    "centre box as large as the box, and of no size": {
        "boxes": [[(3, 5, 40, 29)]],
        "labels": [[0]],
        "shapes": [(6, 8)],
        "strides": [8],
        "ratio": 1.0,
    },
    "one pixel": {"boxes": [[(0, 0, 5, 5)], []], "labels": [[1], []], "shapes": [(1, 1)], "strides": [16]},
    "huge": {
        "boxes": [[(-1e30, -1e30, 1e30, 1e30), (-3e38, 0, 3e38, 9), (1e30, 0, 2e30, 9), (-2e30, 0, -1e30, 9)]],
        "labels": [[0, 1, 2, 3]],
        "shapes": [(6, 8)],
        "strides": [8],
    },
}


@pytest.mark.parametrize("packed", [False, True], ids=["list", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_regions(case, dtype, packed):
    assert_regions(build(case, dtype, packed), *expected(case, np.float64 if dtype == F64 else np.float32))


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


@settings(derandomize=True, deadline=None, max_examples=150)
@given(cases(), st.sampled_from([torch.float32, torch.float64]), st.booleans())
def test_regions_of_any_boxes(case, dtype, packed):
    assert_regions(build(case, dtype, packed), *expected(case, np.float64 if dtype == F64 else np.float32))


@pytest.mark.parametrize("stride", [6.9, 13.3, 1333 / 40, 100 / 7])
def test_borders_of_pixels(stride):
    """Coordinates at multiples of the stride, which reciprocals, or float64, would put into another pixel."""
    corners = (np.arange(41, dtype=np.float32) * np.float32(stride)).tolist()
    case = {
        "boxes": [[(low, low, high, high) for low, high in zip(corners, corners[2:])]],
        "labels": [list(range(39))],
        "shapes": [(1, 42), (42, 1)],
        "strides": [(1e6, stride), (stride, 1e6)],
        "num_classes": 39,
    }
    assert_regions(build(case), *expected(case))


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.floats(0, 60, width=32), st.floats(0, 60, width=32), st.floats(0, 4, width=32), st.floats(0, 4, width=32))
def test_a_box_inside_the_image_owns_a_pixel_of_every_level(x, y, w, h):
    box = torch.tensor([[x, y, x + w, y + h]])
    regions = Regions.from_boxes([box], [torch.tensor([0])], [(8, 8), (4, 4), (2, 2), (1, 1)], [8, 16, 32, 64])
    assert (regions.masks(0)[1:].sum() > 0) and bool((regions.area[:, 1:3].sum(1) > 0).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_boxes_are_computed_in_float32(dtype):
    corner = torch.rand(30, 2, generator=torch.Generator().manual_seed(0)) * 40
    boxes = torch.cat([corner, corner + 30], 1).to(dtype)
    labels = torch.arange(30)
    shapes, strides = [(12, 40)], [3.3]
    half, full = (Regions.from_boxes([b], [labels], shapes, strides) for b in (boxes, boxes.float()))
    same_regions(half, full)


def test_boxes_do_not_need_a_gradient_and_get_none():
    boxes = torch.tensor([[0.0, 0.0, 9.0, 9.0]], requires_grad=True)
    regions = Regions.from_boxes([boxes], [torch.tensor([0])], [(2, 2)], [8])
    assert not any(x.requires_grad for x in regions.tensors())


@pytest.mark.parametrize("boxes", [0, 1, 20, 40])
def test_bits(boxes):
    """Masks survive packing; 2 * 40 + 1 masks fill a sign bit and reach the third word."""
    g = torch.Generator().manual_seed(boxes)
    corner = torch.rand(boxes, 2, generator=g) * 50
    b = torch.cat([corner, corner + 30 * torch.rand(boxes, 2, generator=g)], 1)
    shapes = [(5, 7), (3, 4), (1, 1)]
    regions = Regions.from_boxes(
        b, torch.arange(boxes), shapes, [8, 16, 64], batch_index=torch.arange(boxes) % 3, batch_size=3
    )
    bits = regions.tensors()[4]
    p = 1 + 2 * boxes
    pixels = 3 * (35 + 12 + 1)
    assert bits.dtype == torch.int32 and bits.shape == (math.ceil(p / 32) * pixels,)
    rows = bits.view(-1, pixels)
    native = Regions(*regions.tensors(), None, regions.level_shapes, 3)
    start = 0
    for i, (h, w) in enumerate(shapes):
        assert torch.equal(native.masks(i), regions.masks(i))
        for mask in range(0, p, 7):
            words = rows[mask // 32, start : start + 3 * h * w].reshape(3, h, w)
            assert torch.equal(words >> (mask % 32) & 1 == 1, regions.masks(i)[mask])
        start += 3 * h * w
    assert torch.equal(native.masks(-1), native.masks(2))
    assert torch.equal(native.tensors()[4], bits)


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
def test_unchecked_bad_rows_are_skipped(row):
    """What a GPU does without `validate`: a bad row changes nothing but the capacity."""

    def rasterize(boxes, labels, index, ignore=None, ignore_index=None):
        boxes = torch.tensor(boxes).reshape(-1, 4)
        ignore = None if ignore is None else torch.tensor(ignore).reshape(-1, 4)
        ignore_index = None if ignore_index is None else torch.tensor(ignore_index)
        args = (boxes, torch.tensor(labels), torch.tensor(index), [], ignore, ignore_index, [])
        return reference.rasterize(*args, None, [], 2, [6, 8], [8.0, 8.0], 5, 0.5)

    good = ((20.0, 10.0, 50.0, 40.0), 3, 1)
    padding = ((0.0, 0.0, 9.0, 9.0), -1, 0)
    plain, bad = (rasterize(*zip(*rows)) for rows in ((padding, good), (row, good)))
    assert plain[0].tolist() == [3, -1]
    for x, y in zip(plain[:4] + plain[4], bad[:4] + bad[4]):
        assert torch.equal(x, y)
    box, label, index = row
    if 0 <= label < 5:  # the same among ignore boxes
        crowd = rasterize(*zip(good), ignore=[good[0], box], ignore_index=[good[2], index])
        alone = rasterize(*zip(good), ignore=[good[0]], ignore_index=[good[2]])
        assert torch.equal(crowd[4][0], alone[4][0])


ONE = torch.tensor([[0.0, 0.0, 9.0, 9.0]])
OK = {
    "boxes": [ONE, torch.cat([ONE, ONE])],
    "labels": [torch.tensor([0]), torch.tensor([1, 2])],
    "level_shapes": [(6, 8), (3, 4)],
    "strides": [8, 16],
    "num_classes": 5,
}
PACKED = OK | {
    "boxes": torch.cat([ONE] * 3),
    "labels": torch.tensor([0, 1, 2]),
    "batch_index": torch.tensor([0, 1, 1]),
    "batch_size": 2,
}


def boxes_with(box):
    return [ONE, torch.cat([ONE, torch.tensor([box])])]


BAD = [
    # what is changed, the error, what its message has to say
    (OK, {"boxes": 3}, TypeError, r"boxes is a int; expected a list"),
    (OK, {"boxes": []}, ValueError, r"boxes is an empty list"),
    (OK, {"boxes": [ONE, 3]}, TypeError, r"boxes\[1\] is a int; expected a tensor"),
    (OK, {"boxes": [ONE, ONE.long()]}, TypeError, r"boxes\[1\] has dtype torch.int64; expected float32"),
    (OK, {"boxes": [ONE, ONE.double()]}, TypeError, r"boxes\[1\] has dtype torch.float64; expected torch.float32"),
    (OK, {"boxes": [ONE, ONE[0]]}, ValueError, r"boxes\[1\] has shape \[4\]; expected \[G, 4\]"),
    (OK, {"boxes": [ONE, ONE.to("meta")]}, ValueError, r"boxes\[1\] is on meta; expected cpu"),
    (OK, {"batch_size": 3}, ValueError, r"batch_size is 3; expected 2"),
    (OK, {"batch_index": torch.tensor([0, 1, 1])}, ValueError, r"batch_index is given beside a list"),
    (OK, {"labels": torch.tensor([0, 1, 2])}, TypeError, r"labels is a Tensor; expected a list"),
    (OK, {"labels": [torch.tensor([0])]}, ValueError, r"labels has 1 tensors; expected 2"),
    (OK, {"labels": [torch.tensor([0]), [1, 2]]}, TypeError, r"labels\[1\] is a list; expected an integer tensor"),
    (
        OK,
        {"labels": [torch.tensor([0]), torch.tensor([1])]},
        ValueError,
        r"labels\[1\] has shape \[1\]; expected \[2\]",
    ),
    (OK, {"labels": [torch.tensor([0.0]), torch.tensor([1, 2])]}, TypeError, r"labels\[0\] has dtype torch.float32"),
    (OK, {"level_shapes": 3}, TypeError, r"level_shapes is a int"),
    (OK, {"level_shapes": []}, ValueError, r"level_shapes is empty"),
    (OK, {"level_shapes": [(6, 8), 4]}, TypeError, r"level_shapes\[1\] is a int"),
    (OK, {"level_shapes": [(6, 8), (3, 4, 5)]}, ValueError, r"level_shapes\[1\] has 3 entries"),
    (OK, {"level_shapes": [(6, 8), (3, 4.0)]}, TypeError, r"level_shapes\[1\]\[1\] is a float; expected an integer"),
    (OK, {"level_shapes": [(6, 8), (0, 4)]}, ValueError, r"level_shapes\[1\]\[0\] is 0; expected an integer >= 1"),
    (OK, {"strides": 8}, TypeError, r"strides is a int"),
    (OK, {"strides": [8]}, ValueError, r"strides has 1 entries; expected 2"),
    (OK, {"strides": [8, "16"]}, TypeError, r"strides\[1\] is '16'"),
    (OK, {"strides": [8, (1, 2, 3)]}, ValueError, r"strides\[1\] has 3 entries"),
    (OK, {"strides": [8, 0]}, ValueError, r"strides\[1\] is 0; expected finite numbers above 0"),
    (OK, {"strides": [8, (16, nan)]}, ValueError, r"strides\[1\] is \(16, nan\)"),
    (OK, {"num_classes": 0}, ValueError, r"num_classes is 0; expected an integer >= 1"),
    (OK, {"num_classes": 2.0}, TypeError, r"num_classes is a float"),
    (OK, {"center_ratio": "0.5"}, TypeError, r"center_ratio is a str"),
    (OK, {"center_ratio": 1.5}, ValueError, r"center_ratio is 1.5; expected a number from 0 to 1"),
    (OK, {"center_ratio": nan}, ValueError, r"center_ratio is nan"),
    (OK, {"image_sizes": 3}, TypeError, r"image_sizes is a int"),
    (OK, {"image_sizes": [(48, 64)]}, ValueError, r"image_sizes has 1 entries; expected 2"),
    (OK, {"image_sizes": [(48, 64), 3]}, TypeError, r"image_sizes\[1\] is a int"),
    (OK, {"image_sizes": [(48, 64), (48, 64, 3)]}, ValueError, r"image_sizes\[1\] has 3 entries"),
    (OK, {"image_sizes": [(48, 64), (48, 6.5)]}, TypeError, r"image_sizes\[1\]\[1\] is a float"),
    (OK, {"image_sizes": [(48, 64), (48, -1)]}, ValueError, r"image_sizes\[1\]\[1\] is -1"),
    (OK, {"image_sizes": torch.ones(2, 2)}, TypeError, r"image_sizes has dtype torch.float32"),
    (OK, {"image_sizes": torch.ones(3, 2).long()}, ValueError, r"image_sizes has shape \[3, 2\]; expected \[2, 2\]"),
    (OK, {"ignore_boxes": 3}, TypeError, r"ignore_boxes is a int"),
    (OK, {"ignore_boxes": [ONE]}, ValueError, r"ignore_boxes has 1 tensors; expected 2"),
    (OK, {"ignore_boxes": [ONE, ONE.long()]}, TypeError, r"ignore_boxes\[1\] has dtype torch.int64"),
    (
        OK,
        {"ignore_boxes": [ONE.double()] * 2},
        TypeError,
        r"ignore_boxes has dtype torch.float64; expected torch.float32",
    ),
    (OK, {"ignore_boxes": [ONE.to("meta")] * 2}, ValueError, r"ignore_boxes is on meta; expected cpu"),
    (OK, {"ignore_boxes": ONE}, ValueError, r"ignore_batch_index is None; expected an integer tensor \[1\]"),
    (OK, {"ignore_batch_index": torch.tensor([0])}, ValueError, r"ignore_batch_index is given without ignore_boxes"),
    (PACKED, {"batch_size": None}, ValueError, r"batch_size is None"),
    (PACKED, {"batch_size": -1}, ValueError, r"batch_size is -1"),
    (PACKED, {"batch_size": 2.0}, TypeError, r"batch_size is a float"),
    (PACKED, {"batch_index": None}, ValueError, r"batch_index is None; expected an integer tensor \[3\]"),
    (PACKED, {"batch_index": [0, 1, 1]}, TypeError, r"batch_index is a list"),
    (PACKED, {"batch_index": torch.tensor([0, 1])}, ValueError, r"batch_index has shape \[2\]; expected \[3\]"),
    (PACKED, {"labels": [torch.tensor([0, 1, 2])]}, TypeError, r"labels is a list; expected an integer tensor"),
    (PACKED, {"labels": torch.tensor([0, 1, 2]).to("meta")}, ValueError, r"labels is on meta; expected cpu"),
    (PACKED, {"boxes": torch.zeros(3, 5)}, ValueError, r"boxes has shape \[3, 5\]"),
    # values
    (OK, {"labels": [torch.tensor([0]), torch.tensor([1, 5])]}, ValueError, r"labels\[1\]\[1\] is 5; .*< 5"),
    (OK, {"labels": [torch.tensor([0]), torch.tensor([-2, 1])]}, ValueError, r"labels\[1\]\[0\] is -2"),
    (
        OK,
        {"boxes": boxes_with([0.0, nan, 9.0, 9.0])},
        ValueError,
        r"boxes\[1\]\[1\] is \[0.0, nan, 9.0, 9.0\]; .*finite",
    ),
    (OK, {"boxes": boxes_with([0.0, 0.0, inf, 9.0])}, ValueError, r"boxes\[1\]\[1\] is \[0.0, 0.0, inf, 9.0\]"),
    (OK, {"boxes": boxes_with([9.0, 0.0, 8.0, 9.0])}, ValueError, r"boxes\[1\]\[1\] is .*x1 <= x2"),
    (OK, {"boxes": boxes_with([0.0, 9.0, 8.0, 8.0])}, ValueError, r"boxes\[1\]\[1\] is .*y1 <= y2"),
    (OK, {"ignore_boxes": boxes_with([9.0, 0.0, 8.0, 9.0])}, ValueError, r"ignore_boxes\[1\]\[1\] is \[9.0"),
    (OK, {"image_sizes": torch.tensor([[48, 64], [-1, 64]])}, ValueError, r"image_sizes\[1\] is \[-1, 64\]"),
    (PACKED, {"labels": torch.tensor([0, 1, 5])}, ValueError, r"labels\[2\] is 5"),
    (PACKED, {"batch_index": torch.tensor([0, 2, 1])}, ValueError, r"batch_index\[1\] is 2; expected 0 <= index < 2"),
    (
        PACKED,
        {"ignore_boxes": ONE, "ignore_batch_index": torch.tensor([-1])},
        ValueError,
        r"ignore_batch_index\[0\] is -1; expected 0 <= index < 2",
    ),
]


@pytest.mark.parametrize(("base", "changes", "error", "message"), BAD, ids=[m for *_, m in BAD])
def test_bad_boxes(base, changes, error, message):
    Regions.from_boxes(**base)
    with pytest.raises(error, match=message):
        Regions.from_boxes(**(base | changes))


def test_values_of_padding_rows_are_not_looked_at():
    box = torch.tensor([[nan, 9.0, inf, 0.0], [0.0, 0.0, 9.0, 9.0]])
    args = {"batch_index": torch.tensor([7, 0]), "batch_size": 1, "num_classes": 5}
    regions = Regions.from_boxes(box, torch.tensor([-1, 4]), [(2, 2)], [8], **args)
    assert regions.classes.tolist() == [4, -1]
    index = torch.tensor([7, 0])
    assert check_values(box, torch.tensor([-1, 4]), index, [], None, None, [], None, 1, 5) is None
    with pytest.raises(ValueError, match=r"batch_index\[0\] is 7"):
        check_values(box[[1, 1]], torch.tensor([3, 4]), index, [], None, None, [], None, 1, 5)


# ----------------------------------------------------------------------------------------------------------- losses


def make_maps(case, channels=3, seed=0, dtype=F64, requires_grad=False):
    g = torch.Generator().manual_seed(seed)
    shape = (len(case["boxes"]), channels)
    maps = [torch.randn(*shape, *hw, generator=g, dtype=F64).to(dtype) for hw in case["shapes"]]
    return [x.requires_grad_(requires_grad) for x in maps]


def arrays(maps):
    return [x.detach().double().numpy() for x in maps]


def assert_near(actual, wanted, rtol=1e-9):
    """Relative to the largest value; 1e-3 * rtol absolutely: a divergence is a difference of numbers of order 1."""
    actual = actual.detach().double().numpy() if isinstance(actual, torch.Tensor) else actual
    atol = rtol * max(np.abs(wanted).max(initial=0), 1e-3)
    np.testing.assert_allclose(actual, wanted, rtol=rtol, atol=atol)


LOSS_CASES = {k: v for k, v in CASES.items() if k != "huge"}


@pytest.fixture(params=LOSS_CASES.values(), ids=LOSS_CASES)
def case(request):
    return request.param


def test_anchor_pool_and_cosine(case):
    regions, (_, masks, _) = build(case), expected(case)
    features = make_maps(case)
    anchors = reference.anchor_pool(features, regions)
    wanted = oracle.anchors(arrays(features), masks)
    assert anchors.dtype == F64
    assert_near(anchors, np.stack(wanted))
    assert torch.equal(anchors[regions.area == 0], torch.zeros_like(anchors[regions.area == 0]))
    for f, a, m, c in zip(arrays(features), wanted, masks, reference.anchor_cosine(features, anchors, regions)):
        assert c.shape == (f.shape[0], len(m), *f.shape[2:])
        wanted_cosine = [
            [oracle.cosine(f[b, :, y, x], a[p]) for b in range(f.shape[0])]
            for y in range(f.shape[2])
            for x in range(f.shape[3])
            for p in range(len(m))
        ]
        wanted_cosine = np.array(wanted_cosine).reshape(*f.shape[2:], len(m), -1).transpose(3, 2, 0, 1)
        assert_near(c, wanted_cosine)


def test_anchor_cosine_of_an_empty_anchor_is_zero(case):
    """Whatever is given for it, even NaN."""
    regions, features = build(case), make_maps(case, requires_grad=True)
    anchors = torch.randn(len(features), regions.area.shape[1], 3, dtype=F64)
    anchors[regions.area == 0] = nan
    anchors.requires_grad_()
    cosines = reference.anchor_cosine(features, anchors, regions)
    for c, area in zip(cosines, regions.area):
        assert torch.equal(c.isfinite(), torch.ones_like(c, dtype=torch.bool))
        assert not c[:, area == 0].any()
    grads = torch.autograd.grad(sum(c.sum() for c in cosines), [anchors, *features])
    assert all(g.isfinite().all() for g in grads)
    assert not grads[0][regions.area == 0].any()


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_losses(case, dtype):
    """In every dtype of maps against the oracle on the same (rounded) values."""
    regions, (_, masks, extent) = build(case), expected(case)
    student, teacher = make_maps(case, 4, 1, dtype), make_maps(case, 4, 2, dtype)
    s, t = arrays(student), arrays(teacher)
    rtol = 1e-9 if dtype == F64 else 1e-4
    for loss, wanted in (
        (reference.anchor_loss(student, teacher, regions), oracle.anchor_loss(s, t, masks)),
        (
            reference.topological_distance_loss(student, teacher, regions, temperature=0.2),
            oracle.distance_loss(s, t, masks, 0.2),
        ),
        (
            reference.localization_alignment_loss(student, teacher, regions, temperature=2),
            oracle.localization_loss(s, t, extent, 2.0),
        ),
        (reference.localization_alignment_loss(student, teacher), oracle.localization_loss(s, t, None, 1.0)),
    ):
        assert loss.shape == () and loss.dtype == (F64 if dtype == F64 else torch.float32)
        assert_near(loss, wanted, rtol)


def test_default_temperatures():
    case = CASES["plain"]
    regions, (_, masks, _) = build(case), expected(case)
    student, teacher = make_maps(case, 4, 1), make_maps(case, 4, 2)
    s, t = arrays(student), arrays(teacher)
    assert_near(reference.topological_distance_loss(student, teacher, regions), oracle.distance_loss(s, t, masks, 0.1))
    assert_near(reference.localization_alignment_loss(student, teacher), oracle.localization_loss(s, t, None, 1.0))


@pytest.mark.parametrize("temperature", [0.01, 0.1, 5.0])
@pytest.mark.parametrize("detach_anchors", [False, True])
def test_gradients_are_the_closed_formulas(case, temperature, detach_anchors):
    regions, (_, masks, extent) = build(case), expected(case)
    student, teacher = make_maps(case, 4, 1, requires_grad=True), make_maps(case, 4, 2)
    s, t = arrays(student), arrays(teacher)
    distance = reference.topological_distance_loss(student, teacher, regions, temperature, detach_anchors)
    for loss, wanted in (
        (reference.anchor_loss(student, teacher, regions), oracle.anchor_gradient(s, t, masks)),
        (distance, oracle.distance_gradient(s, t, masks, temperature, detach_anchors)),
        (
            reference.localization_alignment_loss(student, teacher, regions, temperature),
            oracle.localization_gradient(s, t, extent, temperature),
        ),
        (
            reference.localization_alignment_loss(student, teacher, None, temperature),
            oracle.localization_gradient(s, t, None, temperature),
        ),
    ):
        for g, w in zip(torch.autograd.grad(loss, student), wanted):
            assert_near(g, w, 1e-8)


@pytest.mark.parametrize("name", ["plain", "crowd and padding", "one pixel", "no box"])
def test_gradcheck(name):
    case = CASES[name] | {"shapes": [(2, 3), (1, 1)], "strides": [24, 64]}
    regions = build(case)
    student, teacher = make_maps(case, 3, 1, requires_grad=True), make_maps(case, 3, 2)
    anchors = torch.randn(2, regions.area.shape[1], 3, dtype=F64, requires_grad=True)
    n = len(student)
    for f, inputs in (
        (lambda *x: reference.anchor_pool(x, regions), student),
        (lambda *x: tuple(reference.anchor_cosine(x[:n], x[n], regions)), [*student, anchors]),
        (lambda *x: reference.anchor_loss(x, teacher, regions), student),
        (lambda *x: reference.topological_distance_loss(x, teacher, regions), student),
        (lambda *x: reference.localization_alignment_loss(x, teacher, regions), student),
        (lambda *x: sum(reference.sea_loss(x, teacher, x, teacher, regions, distance_on_box=True)), student),
    ):
        assert torch.autograd.gradcheck(f, inputs)


@pytest.mark.parametrize("anchor_on_box", [False, True])
@pytest.mark.parametrize("distance_on_box", [False, True])
def test_sea_loss_is_the_sum_of_the_single_losses(distance_on_box, anchor_on_box):
    """Of two maps a branch, the box maps of other width; the gradient included."""
    case = CASES["crowd and padding"]
    regions = build(case)
    student_cls, teacher_cls = ([make_maps(case, 4, i + k, requires_grad=k == 0) for i in (0, 1)] for k in (0, 9))
    student_box, teacher_box = ([make_maps(case, 5, i + k, requires_grad=k == 20) for i in (0, 1)] for k in (20, 30))
    out = reference.sea_loss(
        student_cls, teacher_cls, student_box, teacher_box, regions, 0.3, 2.0, False, distance_on_box, anchor_on_box
    )
    assert out._fields == ("anchor", "distance", "localization")

    def single(loss, student, teacher, *args):
        return sum(loss(s, t, *args) for s, t in zip(student, teacher))

    anchor = single(reference.anchor_loss, student_cls, teacher_cls, regions)
    if anchor_on_box:
        anchor = anchor + single(reference.anchor_loss, student_box, teacher_box, regions)
    distance = single(reference.topological_distance_loss, student_cls, teacher_cls, regions, 0.3)
    if distance_on_box:
        distance = distance + single(reference.topological_distance_loss, student_box, teacher_box, regions, 0.3)
    localization = single(reference.localization_alignment_loss, student_box, teacher_box, regions, 2.0)
    maps = [x for s in student_cls + student_box for x in s]
    for x, y in zip(out, (anchor, distance, localization)):
        assert_near(x, y.item())
        for g, w in zip(*(torch.autograd.grad(v, maps, retain_graph=True, materialize_grads=True) for v in (x, y))):
            torch.testing.assert_close(g, w)


def test_sea_loss_detaches_anchors():
    case = CASES["plain"]
    regions, student, teacher = build(case), make_maps(case, 3, 1, requires_grad=True), make_maps(case, 3, 2)
    out = reference.sea_loss(student, teacher, make_maps(case), make_maps(case), regions, detach_anchors=True)
    wanted = reference.topological_distance_loss(student, teacher, regions, detach_anchors=True)
    for g, w in zip(torch.autograd.grad(out.distance, student), torch.autograd.grad(wanted, student)):
        torch.testing.assert_close(g, w)


def test_lists_of_sets():
    case = CASES["plain"]
    regions = build(case)
    student, teacher = ([make_maps(case, 3, i + k) for i in (0, 1, 2)] for k in (0, 9))
    for loss in (
        reference.anchor_loss,
        reference.topological_distance_loss,
        reference.localization_alignment_loss,
    ):
        assert_near(loss(student, teacher, regions), sum(loss(s, t, regions).item() for s, t in zip(student, teacher)))
        assert_near(loss(student[:1], teacher[:1], regions), loss(student[0], teacher[0], regions).item())


def test_equal_maps_give_zero(case):
    regions, maps = build(case), make_maps(case)
    for v in reference.sea_loss(maps, maps, maps, maps, regions, distance_on_box=True):
        assert abs(v.item()) < 1e-12


def all_losses(student, teacher, regions):
    return (
        reference.anchor_loss(student, teacher, regions),
        reference.topological_distance_loss(student, teacher, regions),
        reference.localization_alignment_loss(student, teacher, regions),
    )


def test_nan_at_an_uncounted_pixel_does_not_show_and_elsewhere_does():
    case = CASES["crowd and padding"]
    regions = build(case)
    for who in ("student", "teacher"):
        for level in range(2):
            counted = regions.masks(level).any(0)
            rows, columns = regions.extent[level].unbind(1)
            h, w = case["shapes"][level]
            y, x = torch.arange(h).view(1, h, 1), torch.arange(w).view(1, 1, w)
            in_image = (y < rows.view(-1, 1, 1)) & (x < columns.view(-1, 1, 1))
            crowd = in_image & ~counted
            # a crowd's pixel has a share in the localisation, one beyond the image in nothing
            for pixels, shows in ((~in_image, (0, 0, 0)), (crowd, (0, 0, 1)), (counted, (1, 1, 1))):
                if not pixels.any():
                    assert level == 1 and pixels is not counted
                    continue
                b, v, u = pixels.nonzero()[0].tolist()
                clean = {"student": make_maps(case, 3, 1, requires_grad=True), "teacher": make_maps(case, 3, 2)}
                maps = {"student": make_maps(case, 3, 1), "teacher": make_maps(case, 3, 2)}
                maps[who][level][b, 1, v, u] = nan
                maps["student"] = [m.requires_grad_() for m in maps["student"]]
                wanted, losses = (all_losses(m["student"], m["teacher"], regions) for m in (clean, maps))
                for loss, want, show in zip(losses, wanted, shows):
                    assert loss.isnan() if show else torch.equal(loss, want)
                    grads = torch.autograd.grad(loss, maps["student"])
                    if not show:
                        for g, g_clean in zip(grads, torch.autograd.grad(want, clean["student"])):
                            assert torch.equal(g, g_clean)
                    elif who == "student":
                        assert any(g.isnan().any() for g in grads)


def test_non_finite_features_give_non_finite_losses():
    case = CASES["plain"]
    regions = build(case)
    for value in (nan, inf, -inf):
        student = make_maps(case, 3, 1)
        student[1][0, 0, 0, 0] = value
        assert all(not v.isfinite() for v in all_losses(student, make_maps(case, 3, 2), regions))


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.float16], ids=str)
def test_pixels_of_zero_norm(dtype):
    """Cosine 0 with everything, no gradient through the direction; the anchor path still moves them."""
    case = CASES["plain"]
    regions, (_, masks, _) = build(case), expected(case)
    student, teacher = make_maps(case, 3, 1, dtype), make_maps(case, 3, 2, dtype)
    tiny = 0.5e-12 if dtype != torch.float16 else 0.0
    for x in (student[0], teacher[0]):
        x[0, :, 1:3] = 0
        x[1, 0, 2, 2], x[1, 1:, 2, 2] = tiny, 0
    student = [x.requires_grad_() for x in student]
    cosines = reference.anchor_cosine(student, reference.anchor_pool(teacher, regions), regions)[0]
    assert not cosines[0, :, 1:3].any() and not cosines[1, :, 2, 2].any()
    grads = torch.autograd.grad(cosines.sum(), student[0])[0]
    assert grads.isfinite().all() and not grads[0, :, 1:3].any() and not grads[1, :, 2, 2].any()

    s, t = arrays(student), arrays(teacher)
    rtol = 1e-9 if dtype == F64 else 1e-4
    detached = reference.topological_distance_loss(student, teacher, regions, detach_anchors=True)
    assert_near(detached, oracle.distance_loss(s, t, masks, 0.1), rtol)
    grads = torch.autograd.grad(detached, student)
    assert all(g.isfinite().all() for g in grads)
    assert not grads[0][0, :, 1:3].any() and grads[0][1, :, 0, 0].any()
    through = torch.autograd.grad(reference.topological_distance_loss(student, teacher, regions), student)
    assert all(g.isfinite().all() for g in through) and through[0][0, :, 1:3].any()


def test_anchor_of_zero_norm():
    """A category whose features are all zero in the student: the loss is finite, so is its gradient."""
    case = CASES["one pixel"]
    regions, (_, masks, _) = build(case), expected(case)
    student, teacher = make_maps(case, 3, 1), make_maps(case, 3, 2)
    student[0][0] = 0
    student = [x.requires_grad_() for x in student]
    loss = reference.topological_distance_loss(student, teacher, regions)
    assert_near(loss, oracle.distance_loss(arrays(student), arrays(teacher), masks, 0.1))
    (grad,) = torch.autograd.grad(loss, student)
    assert grad.isfinite().all() and not grad[0].any()


def test_norm_just_above_the_limit_counts():
    x = torch.tensor([[[[2e-12]], [[0.0]]]], dtype=F64)
    regions = Regions.from_boxes([torch.zeros(0, 4)], [torch.zeros(0, dtype=torch.int64)], [(1, 1)], [8])
    (cosine,) = reference.anchor_cosine([x], torch.tensor([[[3.0, 4.0]]], dtype=F64), regions)
    assert_near(cosine.flatten(), [0.6])
    (cosine,) = reference.anchor_cosine([x / 4], torch.tensor([[[3.0, 4.0]]], dtype=F64), regions)
    assert cosine.item() == 0
    (cosine,) = reference.anchor_cosine([x * nan], torch.tensor([[[3.0, 4.0]]], dtype=F64), regions)
    assert cosine.isnan()


def test_a_level_without_a_counted_pixel_adds_nothing():
    """A crowd over all of it; and no image in the batch."""
    case = CASES["plain"] | {"boxes": [[], []], "labels": [[], []], "ignore": [[(0, 0, 64, 48)]] * 2}
    empty = case | {"boxes": [], "labels": [], "ignore": []}
    none = torch.zeros(0, dtype=torch.int64)
    args = {"batch_index": none, "batch_size": 0}
    no_image = Regions.from_boxes(torch.zeros(0, 4), none, case["shapes"], case["strides"], **args)
    assert no_image.area.tolist() == [[0]] * 3
    assert Regions(*no_image.tensors(), None, no_image.level_shapes, 0).masks(0).shape == (1, 0, 6, 8)
    for c, regions in ((case, build(case)), (empty, no_image)):
        assert not regions.counted.any()
        student, teacher = make_maps(c, 3, 1, requires_grad=True), make_maps(c, 3, 2)
        anchor, distance, localization = reference.sea_loss(student, teacher, student, teacher, regions)
        assert anchor.item() == 0 and distance.item() == 0 and (localization.item() > 0) == (c is case)
        for loss in (anchor, distance):
            assert not any(g.any() for g in torch.autograd.grad(loss, student, retain_graph=True))
        assert all(g.isfinite().all() for g in torch.autograd.grad(localization, student))


def test_dtypes_and_the_teacher():
    case = CASES["plain"]
    regions = build(case)
    for student_dtype, teacher_dtype, wanted in (
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float16, torch.float64, torch.float64),
        (torch.float64, torch.bfloat16, torch.float64),
    ):
        student = make_maps(case, 3, 1, student_dtype, True)
        teacher = make_maps(case, 3, 2, teacher_dtype, True)
        before = [x.detach().clone() for x in student + teacher]
        for loss in (
            *all_losses(student, teacher, regions),
            reference.sea_loss(*(student, teacher) * 2, regions).anchor,
        ):
            assert loss.dtype == wanted
            grads = torch.autograd.grad(loss, student + teacher, allow_unused=True)
            assert all(g.dtype == student_dtype for g in grads[:3]) and all(g is None for g in grads[3:])
        assert all(torch.equal(x, y) for x, y in zip(before, student + teacher))
    anchors = reference.anchor_pool(make_maps(case, dtype=torch.bfloat16), regions)
    assert anchors.dtype == torch.float32
    cosines = reference.anchor_cosine(make_maps(case, dtype=torch.bfloat16), anchors.double(), regions)
    assert cosines[0].dtype == F64


def test_autocast_changes_nothing():
    case = CASES["plain"]
    regions, student, teacher = build(case), make_maps(case, dtype=torch.float32), make_maps(case, 3, 2, torch.float32)
    wanted = (*all_losses(student, teacher, regions), reference.anchor_pool(student, regions))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = (*all_losses(student, teacher, regions), reference.anchor_pool(student, regions))
        cosines = reference.anchor_cosine(student, again[-1], regions)
    assert all(torch.equal(x, y) for x, y in zip(wanted, again))
    for x, y in zip(cosines, reference.anchor_cosine(student, wanted[-1], regions)):
        assert torch.equal(x, y)


def test_layouts():
    """channels_last, transposed, sliced and expanded maps give the values of contiguous ones."""
    case = CASES["crowd and padding"]
    regions, student, teacher = build(case), make_maps(case, 4, 1), make_maps(case, 4, 2)
    wanted = all_losses(student, teacher, regions)
    for change in (
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        lambda x: torch.stack([x, x], dim=4).flatten(3)[..., ::2],
    ):
        changed = [change(x) for x in student]
        for x, y in zip(all_losses(changed, teacher, regions), wanted):
            torch.testing.assert_close(x, y)
    expanded = [x[:, :1].expand(-1, 4, -1, -1) for x in student]
    for x, y in zip(
        all_losses(expanded, teacher, regions), all_losses([x.contiguous() for x in expanded], teacher, regions)
    ):
        torch.testing.assert_close(x, y)


def test_native_regions_are_accepted():
    case = CASES["plain"]
    dense, student, teacher = build(case), make_maps(case, 3, 1), make_maps(case, 3, 2)
    bits = Regions(*dense.tensors(), None, dense.level_shapes, dense.batch_size)
    for x, y in zip(all_losses(student, teacher, bits), all_losses(student, teacher, dense)):
        assert torch.equal(x, y)


A = {"shapes": [(6, 8), (3, 4)], "boxes": [[], []], "labels": [[], []], "strides": [8, 16]}
GOOD = make_maps(A)
BAD_MAPS = [
    # student, teacher, error, message
    (3, GOOD, TypeError, r"student is a int; expected a list of maps"),
    (GOOD[0], GOOD, TypeError, r"student is a Tensor; expected a list of maps"),
    ([], GOOD, ValueError, r"student is empty"),
    ([GOOD[0], 3], GOOD, TypeError, r"student\[1\] is a int; expected a tensor"),
    ([GOOD, GOOD[0]], [GOOD] * 2, TypeError, r"student\[1\] is a Tensor; expected a list"),
    ([GOOD, []], [GOOD] * 2, ValueError, r"student\[1\] is empty"),
    ([GOOD, [GOOD[0], 3]], [GOOD] * 2, TypeError, r"student\[1\]\[1\] is a int"),
    ([GOOD[0].to_sparse(), GOOD[1]], GOOD, TypeError, r"student\[0\] has layout torch.sparse_coo"),
    ([x.int() for x in GOOD], GOOD, TypeError, r"student\[0\] has dtype torch.int32; expected float32"),
    ([x.to(torch.complex64) for x in GOOD], GOOD, TypeError, r"student\[0\] has dtype torch.complex64"),
    ([GOOD[0], GOOD[1].float()], GOOD, TypeError, r"student\[1\] has dtype torch.float32; expected torch.float64"),
    ([GOOD, [x.float() for x in GOOD]], [GOOD] * 2, TypeError, r"student\[1\]\[0\] has dtype torch.float32"),
    ([GOOD[0], GOOD[1][0]], GOOD, ValueError, r"student\[1\] has shape \[3, 3, 4\]; expected 4 dimensions"),
    ([GOOD[0], GOOD[1].to("meta")], GOOD, ValueError, r"student\[1\] is on meta; expected cpu"),
    ([GOOD, [x.to("meta") for x in GOOD]], [GOOD] * 2, ValueError, r"student\[1\]\[0\] is on meta; expected cpu"),
    ([GOOD[0], GOOD[1][:1]], GOOD, ValueError, r"student\[1\] has shape \[1, 3, 3, 4\]; expected batch size 2"),
    ([GOOD[0], GOOD[1][:, :2]], GOOD, ValueError, r"student\[1\] has shape \[2, 2, 3, 4\]; .* 3 channels"),
    ([GOOD[0], GOOD[1][..., :0]], GOOD, ValueError, r"student\[1\] has shape \[2, 3, 3, 0\]; expected at least one"),
    (GOOD, [x.int() for x in GOOD], TypeError, r"teacher\[0\] has dtype torch.int32"),
    (GOOD, GOOD[:1], ValueError, r"teacher has 1 levels; expected 2, as student"),
    ([GOOD, GOOD], GOOD, ValueError, r"teacher has 1 sets of maps; expected 2, as student"),
    ([GOOD, GOOD], [GOOD, GOOD[:1]], ValueError, r"teacher\[1\] has 1 levels; expected 2, as student\[1\]"),
    (GOOD, [x[:, :2] for x in GOOD], ValueError, r"teacher\[0\] has shape \[2, 2, 6, 8\]; expected \[2, 3, 6, 8\]"),
    (GOOD, [x.to("meta") for x in GOOD], ValueError, r"teacher\[0\] is on meta; expected cpu, as student\[0\]"),
    (GOOD[:1], GOOD[:1], ValueError, r"regions has 2 levels; expected 1, as student"),
    (
        [x[:1] for x in GOOD],
        [x[:1] for x in GOOD],
        ValueError,
        r"regions has batch size 2; expected 1, as student\[0\]",
    ),
    ([x.to("meta") for x in GOOD], [x.to("meta") for x in GOOD], ValueError, r"regions is on cpu; expected meta"),
    (
        [GOOD[0], GOOD[1][..., :3]],
        [GOOD[0], GOOD[1][..., :3]],
        ValueError,
        r"regions has level_shapes\[1\] = \(3, 4\); expected \(3, 3\), as student\[1\]",
    ),
]


@pytest.mark.parametrize(("student", "teacher", "error", "message"), BAD_MAPS, ids=[m for *_, m in BAD_MAPS])
def test_bad_maps(student, teacher, error, message):
    regions = build(A)
    for loss in (
        reference.anchor_loss,
        reference.topological_distance_loss,
        reference.localization_alignment_loss,
    ):
        with pytest.raises(error, match=message):
            loss(student, teacher, regions)
    for name, args in (("cls", (student, teacher, GOOD, GOOD)), ("box", (GOOD, GOOD, student, teacher))):
        named = message.replace("student", f"student_{name}").replace("teacher", f"teacher_{name}")
        with pytest.raises(error, match=named):
            reference.sea_loss(*args, regions)
    if student is not GOOD and not isinstance(student[0] if isinstance(student, list) and student else 0, list):
        for f in (reference.anchor_pool, lambda x, r: reference.anchor_cosine(x, torch.zeros(2, 1, 3), r)):
            with pytest.raises(error, match=message.replace("student", "features")):
                f(student, regions)


def test_bad_regions_and_temperatures_and_anchors():
    regions = build(A)
    for bad in (None, GOOD, "regions"):
        with pytest.raises(TypeError, match=r"regions is a .*; expected sea_kernels.Regions"):
            reference.anchor_loss(GOOD, GOOD, bad)
    with pytest.raises(TypeError, match=r"features\[0\] is a list; expected a tensor"):
        reference.anchor_pool([GOOD], regions)
    distance, localization = reference.topological_distance_loss, reference.localization_alignment_loss
    for value, error in (
        ("1", TypeError),
        (None, TypeError),
        (True, TypeError),
        (torch.tensor(1.0), TypeError),
        *((v, ValueError) for v in (0, -1.0, nan, inf)),
    ):
        for loss in (distance, localization):
            with pytest.raises(error, match=r"^temperature is "):
                loss(GOOD, GOOD, regions, temperature=value)
        for name in ("distance_temperature", "localization_temperature"):
            with pytest.raises(error, match=f"^{name} is "):
                reference.sea_loss(GOOD, GOOD, GOOD, GOOD, regions, **{name: value})
    for anchors, error, message in (
        ([], TypeError, r"anchors is a list"),
        (torch.zeros(2, 1, 3).long(), TypeError, r"anchors has dtype torch.int64"),
        (torch.zeros(2, 1, 3).to_sparse(), TypeError, r"anchors has layout torch.sparse_coo"),
        (torch.zeros(2, 1, 3, device="meta"), ValueError, r"anchors is on meta; expected cpu"),
        (torch.zeros(2, 1, 4), ValueError, r"anchors has shape \[2, 1, 4\]; expected \[L, P, C\] = \[2, 1, 3\]"),
        (torch.zeros(1, 3), ValueError, r"anchors has shape \[1, 3\]"),
    ):
        with pytest.raises(error, match=message):
            reference.anchor_cosine(GOOD, anchors, regions)


# ---------------------------------------------------------------------------------------------------- torch.compile


def packed(number, seed=0):
    g = torch.Generator().manual_seed(seed)
    corner = 40 * torch.rand(number, 2, generator=g)
    boxes = torch.cat([corner, corner + 20 * torch.rand(number, 2, generator=g)], 1)
    return boxes, torch.arange(number) % 5, torch.arange(number) % 2


@pytest.mark.compile
def test_compile():
    """Regions inside, as an argument and in a closure: a new graph for no values, one for other numbers of boxes."""
    torch._dynamo.reset()
    case = CASES["plain"]
    student, teacher = make_maps(case, 3, 1, requires_grad=True), make_maps(case, 3, 2)
    closure = build(case)

    def make(boxes, labels, index):
        kwargs = {"batch_index": index, "batch_size": 2, "image_sizes": [(40, 64), (48, 50)]}
        return Regions.from_boxes(boxes, labels, case["shapes"], case["strides"], num_classes=5, **kwargs)

    def loss(student, teacher, regions):
        return sum(reference.sea_loss(student, teacher, student, teacher, regions, distance_on_box=True))

    functions = (
        (lambda s, t, rows: loss(s, t, make(*rows)), lambda rows: rows),
        (lambda s, t, regions: loss(s, t, regions), lambda rows: make(*rows)),
        (lambda s, t, _: loss(s, t, closure), lambda rows: None),
    )
    for f, prepare in functions:
        torch._dynamo.reset()
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(f, fullgraph=True, backend=counter)
        for number in (4, 4, 7, 9, 12):
            third = prepare(packed(number, number))
            values = compiled(student, teacher, third), f(student, teacher, third)
            torch.testing.assert_close(*values)
            for g, w in zip(*(torch.autograd.grad(v, student) for v in values)):
                torch.testing.assert_close(g, w)
        assert counter.frame_count <= 2, f"{counter.frame_count} graphs"


@pytest.mark.compile
def test_compile_with_dynamic_maps():
    torch._dynamo.reset()

    def f(student, teacher, boxes, labels):
        shapes = [x.shape[2:] for x in student]
        regions = Regions.from_boxes([boxes], [labels], shapes, [8, 16], num_classes=5)
        return sum(reference.sea_loss(student, teacher, student, teacher, regions))

    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend=counter)
    boxes, labels, _ = packed(11)  # no two sizes the same, which a graph would take for a rule
    for h, w in ((14, 26), (26, 14), (8, 12)):
        case = {"boxes": [0], "shapes": [(h, w), (h // 2, w // 2)]}
        student, teacher = make_maps(case, 5, 1), make_maps(case, 5, 2)
        torch.testing.assert_close(compiled(student, teacher, boxes, labels), f(student, teacher, boxes, labels))
    assert counter.frame_count == 1


@pytest.mark.compile
def test_compiled_regions_are_the_same_bit_by_bit():
    """By the code that inductor writes, with strides whose reciprocals are not exact."""
    torch._dynamo.reset()

    def f(boxes, labels, index):
        kwargs = {"batch_index": index, "batch_size": 2, "image_sizes": [(47, 61), (33, 64)]}
        regions = Regions.from_boxes(boxes, labels, [(7, 9), (4, 5)], [(6.9, 7.3), 13.3], num_classes=5, **kwargs)
        return regions.tensors()

    compiled = torch.compile(f, fullgraph=True)
    for seed in range(3):
        boxes, labels, index = packed(8, seed)
        boxes[:4] = boxes[:4].div(7.3).round() * 7.3  # on and beside the borders of pixels
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            got = compiled(boxes, labels, index)
        for x, y in zip(got, f(boxes, labels, index)):
            assert torch.equal(x, y)
