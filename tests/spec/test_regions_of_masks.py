"""Regions of instance masks: rectangles against boxes bit for bit, any masks pixel by pixel, COCO's segmentations."""

import json
import math
import os
import sys
from pathlib import Path

import cases
import numpy as np
import pytest
import torch
from cases import CUDA, F32, F64, NO_CUDA, make_inputs
from hypothesis import given
from hypothesis import strategies as st
from scenes import assert_same_regions

from sea_kernels import Regions

STRIDES = [8, 16, 1, 0.5, 13.3, 48 / 7, (8, 16), (6.9, 7.3)]
DATA = os.environ.get("SEA_KERNELS_DATA")
real = pytest.mark.skipif(DATA is None, reason="SEA_KERNELS_DATA is not set")


# ---------------------------------------------------------------------------------------- rectangles against boxes


@st.composite
def rectangles(draw):
    """Of each image (H_b, W_b), and rectangles x1 y1 x2 y2 with whole corners within; and the other arguments."""
    sizes, images = [], []
    for _ in range(draw(st.integers(1, 3))):
        h, w = draw(st.tuples(st.integers(1, 70), st.integers(1, 70)))
        corner = st.tuples(st.integers(0, w - 1), st.integers(0, h - 1), st.integers(1, w), st.integers(1, h))
        rows = draw(st.lists(corner.map(lambda r: (r[0], r[1], max(r[0] + 1, r[2]), max(r[1] + 1, r[3]))), max_size=5))
        sizes.append((h, w))
        images.append(rows)
    classes = draw(st.sampled_from([1, 3, 80]))
    labels = [torch.tensor([draw(st.integers(-1, classes - 1)) for _ in x], dtype=torch.int64) for x in images]
    options = {"num_classes": classes, "center_ratio": draw(st.sampled_from([0.5, 0.0, 1.0, 0.3]) | st.floats(0, 1))}
    if draw(st.booleans()):
        options["image_sizes"] = [draw(st.tuples(st.integers(0, 80), st.integers(0, 80))) for _ in images]
    if draw(st.booleans()):
        dtype = draw(st.sampled_from([F32, F64]))
        one = st.tuples(st.floats(-9, 60, width=32), st.floats(-9, 60, width=32), st.floats(0, 30), st.floats(0, 30))
        ignore = [draw(st.lists(one.map(lambda r: (r[0], r[1], r[0] + r[2], r[1] + r[3])), max_size=2)) for _ in images]
        options["ignore_boxes"] = [torch.tensor(x, dtype=dtype).reshape(-1, 4) for x in ignore]
    levels = draw(st.integers(1, 3))
    shapes = [(draw(st.integers(1, 9)), draw(st.integers(1, 9))) for _ in range(levels)]
    strides = [draw(st.sampled_from(STRIDES) | st.floats(0.3, 70)) for _ in range(levels)]
    return sizes, images, labels, shapes, strides, options


def filled(rows, size, dtype=torch.bool):
    masks = torch.zeros(len(rows), *size, dtype=dtype)
    for mask, (x1, y1, x2, y2) in zip(masks, rows):
        mask[y1:y2, x1:x2] = 1 if dtype == torch.bool else 255
    return masks


@given(rectangles(), st.lists(st.sampled_from([torch.bool, torch.uint8]), min_size=3, max_size=3))
def test_a_filled_rectangle_is_its_box(backend, device, call, dtypes):
    sizes, images, labels, shapes, strides, options = call
    if "ignore_boxes" in options:
        options = options | {"ignore_boxes": [x.to(device) for x in options["ignore_boxes"]]}
    dtype = options["ignore_boxes"][0].dtype if "ignore_boxes" in options else F32
    boxes = [torch.tensor(x, dtype=dtype).reshape(-1, 4).to(device) for x in images]
    masks = [filled(x, size, kind).to(device) for x, size, kind in zip(images, sizes, dtypes)]
    labels = [x.to(device) for x in labels]
    wanted = Regions.from_boxes(boxes, labels, shapes, strides, **options)
    found = Regions.from_masks(masks, labels, shapes, strides, **options)
    assert backend == "reference" or (found.bits is not None and found.dense is None)
    assert_same_regions(found, wanted)


# -------------------------------------------------------------------------------------------------- pixel by pixel


def span(low, high, stride):
    """The rule, in float32 as written: a range of rows or columns."""
    first = math.floor(np.float32(low) / np.float32(stride))
    return range(first, max(math.ceil(np.float32(high) / np.float32(stride)), first + 1))


def pixel_by_pixel(mask, shape, stride, ratio):
    """(covered, center) of one mask, each a set of (row, column)"""
    used = [(int(y), int(x)) for y, x in mask.nonzero()]
    covered = {(i, j) for y, x in used for i in span(y, y + 1, stride[0]) for j in span(x, x + 1, stride[1])}
    bounds = []
    for axis in (0, 1):
        low, high = (np.float32(f(u[axis] for u in used) + more) for f, more in ((min, 0), (max, 1)))
        middle, half = (low + high) / np.float32(2), np.float32(ratio) * (high - low) / np.float32(2)
        bounds.append(span(middle - half, middle + half, stride[axis]))
    covered = {(i, j) for i, j in covered if i < shape[0] and j < shape[1]}
    return covered, {(i, j) for i, j in covered if i in bounds[0] and j in bounds[1]}


def as_set(mask):
    return {tuple(x) for x in mask.nonzero().tolist()}


@given(
    st.integers(0, 2**31),
    st.sampled_from([0.02, 0.1, 0.5]),
    st.tuples(st.integers(1, 7), st.integers(1, 7)),
    st.sampled_from([1.5, 4, 0.7, (2.3, 5), 13.3, 3]),
    st.sampled_from([0.5, 0.3, 0.0, 1.0]),
)
def test_any_masks_pixel_by_pixel(backend, device, seed, density, shape, stride, ratio):
    """Holes, several parts, lone pixels; every category one instance, and one with two."""
    g = torch.Generator().manual_seed(seed)
    sizes = [(14, 19), (20, 11)]
    masks = [torch.rand(3, *size, generator=g) < density for size in sizes]
    labels = [torch.tensor([2, 0, 5]), torch.tensor([5, 2, 1])]
    pair = stride if isinstance(stride, tuple) else (stride, stride)
    on_device = [[x.to(device) for x in xs] for xs in (masks, labels)]
    regions = Regions.from_masks(*on_device, [shape], [stride], num_classes=7, center_ratio=ratio)
    wanted = {}
    for b in range(2):
        for mask, label in zip(masks[b], labels[b].tolist()):
            if mask.any():
                covered, center = pixel_by_pixel(mask, shape, pair, ratio)
                center_set, edge_set = wanted.setdefault(label, (set(), set()))
                center_set |= {(b, *u) for u in center}
                edge_set |= {(b, *u) for u in covered - center}
    found = regions.masks(0).cpu()
    assert [k for k in regions.classes.tolist() if k >= 0] == sorted(wanted)
    for k, label in enumerate(sorted(wanted)):
        assert (as_set(found[1 + 2 * k]), as_set(found[2 + 2 * k])) == wanted[label]
    anywhere = set().union(*(s for pair in wanted.values() for s in pair))
    every = {(b, i, j) for b in range(2) for i in range(shape[0]) for j in range(shape[1])}
    assert as_set(found[0]) == every - anywhere
    assert torch.equal(regions.area[0].cpu(), found.sum((1, 2, 3)).float()) and regions.counted.item() == len(every)


# ---------------------------------------------------------------------------------------------------- named cases


def test_an_empty_mask_is_no_instance(backend, device):
    """Nor is one with label -1; both count for the capacity alone, as padding rows do."""
    masks = filled([(0, 0, 8, 8), (3, 3, 9, 12), (0, 0, 30, 20)], (20, 30)).to(device)
    masks[1] = False
    labels = torch.tensor([4, 2, -1], device=device)
    regions = Regions.from_masks([masks], [labels], [(3, 4)], [8], num_classes=5)
    assert regions.classes.tolist() == [4, -1, -1]
    assert regions.area.tolist() == [[11, 1, 0, 0, 0, 0, 0]] and regions.counted.tolist() == [12]


@pytest.mark.parametrize(("dtype", "columns"), [(F32, 30), (F64, 31)], ids=str)
def test_masks_are_computed_in_the_dtype_of_the_ignore_boxes(dtype, columns, backend, device):
    """21 / 0.7 is 30 in float32 and a little more in float64."""
    masks, labels = filled([(0, 0, 21, 1)], (1, 21)).to(device), torch.tensor([0], device=device)
    ignore = [torch.zeros(0, 4, dtype=dtype, device=device)]
    regions = Regions.from_masks([masks], [labels], [(1, 40)], [(1, 0.7)], ignore_boxes=ignore)
    assert regions.area[0, 1:].sum() == columns


@pytest.mark.parametrize("shape", [(0, 20, 30), (0, 0, 0), (2, 0, 30), (2, 20, 0)], ids=str)
def test_masks_without_a_pixel(shape, backend, device):
    masks = torch.zeros(shape, dtype=torch.bool, device=device)
    labels = torch.zeros(shape[0], dtype=torch.int64, device=device)
    regions = Regions.from_masks([masks] * 2, [labels] * 2, [(3, 4), (1, 1)], [8, 32], num_classes=5)
    assert regions.classes.tolist() == [-1] * min(2 * shape[0], 5)
    assert regions.area[:, 0].tolist() == [24, 2] and not regions.area[:, 1:].any()


def test_masks_may_be_strided_and_reach_beyond_the_level(backend, device):
    masks = torch.rand(2, 20, 30, generator=torch.Generator().manual_seed(0)) < 0.1
    labels, call = torch.tensor([0, 1], device=device), ([(5, 8)], [4])
    plain = Regions.from_masks([masks.to(device)], [labels], *call)
    strided = masks.permute(2, 0, 1).contiguous().to(device).permute(1, 2, 0)
    beyond = torch.nn.functional.pad(masks.to(torch.uint8) * 7, (0, 9, 0, 5)).to(device)
    for other in (strided, beyond):
        assert_same_regions(Regions.from_masks([other], [labels], *call), plain)


def test_autocast_does_not_change_regions_of_masks(backend, device):
    """Counts of a mask of 255 overflow float16, and infinity times zero is no number."""
    masks, labels = filled([(0, 0, 300, 20)], (20, 300), torch.uint8).to(device), torch.tensor([0], device=device)
    call = ([labels], [(3, 1)], [(8, 512)])
    plain = Regions.from_masks([masks], *call)
    with torch.autocast(device, dtype=torch.float16):
        assert_same_regions(Regions.from_masks([masks], *call), plain)


def test_masks_of_many_categories_are_their_boxes(backend, device):
    """90 instances of 80 categories: masks of six words, on a real size."""
    g = torch.Generator().manual_seed(3)
    corner = (torch.rand(90, 2, generator=g) * torch.tensor([200, 140])).long()
    rows = torch.cat([corner, corner + 1 + (torch.rand(90, 2, generator=g) * 19).long()], 1)
    labels = torch.arange(90, device=device) % 80
    call = ([(20, 28), (10, 14), (2, 2)], [8, 16, 128])
    wanted = Regions.from_boxes([rows.float().to(device)], [labels], *call)
    assert_same_regions(Regions.from_masks([filled(rows.tolist(), (160, 224)).to(device)], [labels], *call), wanted)


@pytest.fixture
def regions(device):
    g = torch.Generator().manual_seed(1)
    blobs = [torch.nn.functional.avg_pool2d(torch.randn(3, 160, 224, generator=g), 31, 1, 15) > 0.03 for _ in range(2)]
    options = {"num_classes": 5, "image_sizes": [(160, 224), (150, 180)]}
    ignore = [torch.zeros(0, 4, device=device), torch.tensor([[100.0, 20.0, 210.0, 150.0]], device=device)]
    labels = [torch.tensor([3, 1, 3], device=device), torch.tensor([0, 3, 4], device=device)]
    return Regions.from_masks(
        [x.to(device) for x in blobs], labels, cases.SHAPES[:3], cases.STRIDES[:3], ignore_boxes=ignore, **options
    )


@pytest.mark.parametrize("variant", cases.VARIANTS)
def test_native_losses_on_regions_of_masks_are_the_reference(variant, regions, device):
    assert (regions.area[0, :9] > 0).all()
    inputs = make_inputs(regions, 24, 16, dtype=F64, device=device)
    native, reference = (cases.run(variant, inputs, regions, backend) for backend in ("native", "reference"))
    assert all(x.isfinite().all() for x in native[0]) and any(x.abs().sum() > 0 for x in native[0])
    for x, y in zip([*native[0], *native[1]], [*reference[0], *reference[1]]):
        assert (x is None) == (y is None)
        if x is not None:
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12)


@pytest.mark.skipif(not CUDA, reason=NO_CUDA)
def test_masks_on_a_gpu_are_not_synchronized_with_the_host():
    """Masks on a GPU stay there: the whole call lies in a captured graph and serves other masks."""
    masks = [torch.rand(n, 40, 56, device="cuda") < 0.02 for n in (2, 3)]
    others = [torch.rand(n, 40, 56, device="cuda") < 0.05 for n in (2, 3)]
    labels = [torch.tensor([3, 1], device="cuda"), torch.tensor([0, 3, 4], device="cuda")]
    options = {"num_classes": 5, "image_sizes": [(40, 56), (33, 56)]}
    build = lambda masks: Regions.from_masks(masks, labels, [(5, 7), (3, 4)], [8, 16], **options)  # noqa: E731
    wanted = build(others)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = build(masks)
    for x, y in zip(masks, others):
        x.copy_(y)
    graph.replay()
    assert_same_regions(found, wanted)


# ----------------------------------------------------------------------------------------------------------- COCO


def annotations():
    """(height, width, annotations) of each image"""
    data = json.loads((Path(DATA) / "instances_val2014_100.json").read_text())
    rows = {image["id"]: (image["height"], image["width"], []) for image in data["images"]}
    for a in data["annotations"]:
        rows[a["image_id"]][2].append(a)
    return list(rows.values())


def covered(regions, level):
    """Of each category its pixels, center and edge."""
    masks = regions.masks(level)[1:].unflatten(0, (-1, 2)).any(1)
    return {k: m for k, m in zip(regions.classes.tolist(), masks) if k >= 0}


@real
def test_real_segmentations_lie_in_their_boxes(device):
    """Polygons and crowds' run lengths; every instance a category of its own. Grown by a pixel: COCO's polygons reach
    past their boxes by fractions of a pixel of the input."""
    strides, instances, smaller = [8, 16, 32, 64, 128], 0, 0
    images = annotations()
    for start in range(0, len(images), 4):
        batch = images[start : start + 4]
        height, width = (max(-(-image[k] // 128) * 128 for image in batch) for k in (0, 1))
        shapes = [(height // s, width // s) for s in strides]
        labels, first = [], 0
        for *_, rows in batch:
            labels.append(torch.arange(first, first + len(rows), device=device))
            first += len(rows)
        options = {"num_classes": max(first, 1), "image_sizes": [(h, w) for h, w, _ in batch]}
        boxes = [torch.tensor([a["bbox"] for a in rows], dtype=F32).reshape(-1, 4) for *_, rows in batch]
        boxes = [torch.cat([x[:, :2], x[:, :2] + x[:, 2:]], 1).to(device) for x in boxes]
        masks = [[a["segmentation"] for a in rows] for *_, rows in batch]
        from_boxes = Regions.from_boxes(boxes, labels, shapes, strides, **options)
        from_masks = Regions.from_masks(masks, labels, shapes, strides, **options)
        assert torch.equal(from_masks.extent, from_boxes.extent)
        for level in range(len(strides)):
            of_boxes, of_masks = covered(from_boxes, level), covered(from_masks, level)
            assert set(of_masks) <= set(of_boxes) and len(of_masks) >= 0.99 * len(of_boxes)
            for k, mask in of_masks.items():
                assert mask.any()
                grown = torch.nn.functional.max_pool2d(of_boxes[k].float(), 3, 1, 1) > 0
                assert not (mask & ~grown).any()
                instances += level == 0
                smaller += level == 0 and int(mask.sum()) < 0.75 * int(of_boxes[k].sum())
    assert instances > 800 and smaller > 100  # of 839; a mask is not its box


@real
def test_all_forms_of_a_segmentation_are_one_mask(backend, device):
    """Bytes, str and list counts, and the decoded tensor, are one mask."""
    coco = pytest.importorskip("pycocotools.mask", reason="pycocotools is not installed")
    height, width, rows = next(x for x in annotations() if any(a["iscrowd"] for a in x[2]))
    assert {type(a["segmentation"]) for a in rows} == {list, dict}
    encoded = []
    for a in rows:
        parts = coco.frPyObjects(a["segmentation"], height, width)
        encoded.append(coco.merge(parts) if isinstance(parts, list) else parts)
    tensor = torch.from_numpy(coco.decode(encoded)).permute(2, 0, 1).to(device)
    assert tensor.shape == (len(rows), height, width)
    labels = [torch.arange(len(rows), device=device) % 80]
    call = (labels, [(height // 8 + 1, width // 8 + 1)], [8])
    wanted = Regions.from_masks([tensor], *call, image_sizes=[(height, width)])
    texts = [{**x, "counts": x["counts"].decode()} for x in encoded]
    raw = [a["segmentation"] for a in rows]
    for masks in (encoded, texts, raw):
        assert_same_regions(Regions.from_masks([masks], *call, image_sizes=[(height, width)]), wanted)


def test_images_may_have_segmentations_or_a_tensor_or_nothing(backend, device):
    """An image without instances; polygons of two parts, as arrays too; a tensor beside them."""
    pytest.importorskip("pycocotools", reason="pycocotools is not installed")
    two = [[0, 0, 8, 0, 8, 8, 0, 8], np.array([16.0, 16, 24, 16, 24, 24, 16, 24])]
    tensor = filled([(0, 0, 8, 8)], (24, 32)).to(device)
    tensor[0, 16:24, 16:24] = True
    labels = [torch.tensor(x, device=device, dtype=torch.int64) for x in ([], [1], [1])]
    regions = Regions.from_masks([[], [two], tensor], labels, [(3, 4)], [8], num_classes=3, image_sizes=[(24, 32)] * 3)
    masks = regions.masks(0)
    assert regions.classes.tolist() == [1, -1] and not masks[1:, 0].any() and masks[0, 0].all()
    assert torch.equal(masks[:, 1], masks[:, 2]) and as_set(masks[1:3, 1].any(0)) == {(0, 0), (2, 2)}


def test_a_segmentation_costs_its_columns_and_not_the_pixels_of_its_image(backend, device):
    """60,000 x 60,000 pixels are never laid out, neither for a polygon nor for run lengths."""
    pytest.importorskip("pycocotools", reason="pycocotools is not installed")
    n, stride, labels = 60_000, 4096, torch.tensor([2, 0], device=device)
    polygon = [[0, 0, 8192, 0, 8192, 4096, 0, 4096]]
    runs = {"size": [n, n], "counts": [n * 50_000 + 40_960, 4096, n * n - n * 50_000 - 40_960 - 4096]}
    call = ([labels], [(15, 15)], [stride])
    found = Regions.from_masks([[polygon, runs]], *call, num_classes=3, image_sizes=[(n, n)])
    boxes = torch.tensor([[0, 0, 8192, 4096], [50_000, 40_960, 50_001, 45_056]], device=device).float()
    assert_same_regions(found, Regions.from_boxes([boxes], *call, num_classes=3, image_sizes=[(n, n)]))
    with pytest.raises(ValueError, match=r"masks\[0\]\[0\] lies on an image of 70000 x 70000; .* 2\^32"):
        Regions.from_masks([[polygon, polygon]], *call, image_sizes=[(70_000, 70_000)])


@pytest.mark.parametrize("stride", [8, 0.7, 13.3, (6.9, 7.3)])
def test_segmentations_are_their_tensors_on_any_stride(stride, backend, device):
    """Random run lengths: holes, lone pixels, runs over several columns, and one without a pixel."""
    g, (h, w) = torch.Generator().manual_seed(4), (37, 29)
    masks = torch.rand(4, h, w, generator=g) < torch.tensor([0.03, 0.5, 0.97, 0.0]).view(4, 1, 1)
    encoded = []
    for mask in masks:
        _, lengths = torch.unique_consecutive(
            torch.cat([torch.tensor([False]), mask.t().flatten()]), return_counts=True
        )
        lengths[0] -= 1  # the first run is of empty pixels
        encoded.append({"size": (np.int64(h), w), "counts": lengths.numpy()})
    call = ([torch.arange(4, device=device)], [(9, 8)], [stride])
    options = {"num_classes": 4, "image_sizes": [(h, w)], "center_ratio": 0.4}
    wanted = Regions.from_masks([masks.to(device)], *call, **options)
    assert_same_regions(Regions.from_masks([encoded], *call, **options), wanted)


def test_segmentations_need_pycocotools_and_tensors_do_not(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    label, polygon = torch.tensor([0]), [[0, 0, 8, 0, 8, 8]]
    with pytest.raises(ImportError, match=r"masks\[0\]\[0\] is a list of polygons, .* pip install pycocotools"):
        Regions.from_masks([[polygon]], [label], [(3, 4)], [8], image_sizes=[(24, 32)])
    Regions.from_masks([torch.ones(1, 24, 32) > 0], [label], [(3, 4)], [8], image_sizes=[(24, 32)])
