"""Native regions equal those of the reference bit for bit, whatever the boxes."""

import json
import os
from pathlib import Path

import pytest
import torch
from cases import BF16, F16, F32, F64, make_boxes
from hypothesis import given
from hypothesis import strategies as st

import sea_kernels as sk
from sea_kernels import Regions


def build(backend, *arguments, **options):
    with sk.backend(backend):
        return Regions.from_boxes(*arguments, **options)


def assert_equal(native, reference):
    assert native.level_shapes == reference.level_shapes and native.batch_size == reference.batch_size
    for name, x, y in zip(("classes", "area", "counted", "extent", "bits"), native.tensors(), reference.tensors()):
        assert x.dtype == y.dtype and x.shape == y.shape and x.device == y.device, name
        assert torch.equal(x, y), name
        assert not x.requires_grad
    for i in range(len(native.level_shapes)):
        assert torch.equal(native.masks(i), reference.masks(i))


def assert_backends_agree(*arguments, **options):
    native = build("native", *arguments, **options)
    assert native.bits is not None and native.dense is None
    assert_equal(native, build("reference", *arguments, **options))
    return native


# ------------------------------------------------------------------------------------------------------- any boxes

STRIDES = [8, 16, 1, 0.5, 13.3, 48 / 7, (8, 16), (6.9, 7.3)]
coordinate = st.one_of(
    st.integers(-20, 120).map(float),  # on the borders of pixels
    st.sampled_from([13.3 * k for k in range(7)] + [48 / 7 * k for k in range(9)]),
    st.floats(-40, 160, width=32),
    st.sampled_from([-0.0, 1e-38, -1e-30, 1e9, -1e9, 3e38, -3e38, 16777217.0]),
)
IN_FLOAT16 = st.floats(-200, 200, width=16)


@st.composite
def calls(draw):
    dtype = draw(st.sampled_from([F32, F32, F64, F16, BF16]))
    batch = draw(st.integers(1, 3))
    value = IN_FLOAT16 if dtype in (F16, BF16) else coordinate

    def boxes(most):
        rows = draw(st.lists(st.tuples(*[value] * 4), max_size=most))
        if rows and draw(st.booleans()):
            rows = rows + rows[:1]  # a duplicate
        sorted_rows = [(min(a, c), min(b, d), max(a, c), max(b, d)) for a, b, c, d in rows]
        return torch.tensor(sorted_rows, dtype=F64).reshape(-1, 4).to(dtype)

    images = [boxes(5) for _ in range(batch)]
    classes = draw(st.sampled_from([1, 2, 3, 80, 1203]))
    label = st.integers(-1, classes - 1)
    kind = draw(st.sampled_from([torch.int64, torch.int32, torch.int16] + [torch.int8] * (classes <= 80)))
    labels = [torch.tensor([draw(label) for _ in x], dtype=kind) for x in images]
    options = {"num_classes": classes, "center_ratio": draw(st.sampled_from([0.5, 0.0, 1.0, 0.3, 1]) | st.floats(0, 1))}
    if draw(st.booleans()):
        options["image_sizes"] = [draw(st.tuples(st.integers(0, 130), st.integers(0, 130))) for _ in images]
    if draw(st.booleans()):
        options["ignore_boxes"] = [boxes(3) for _ in images]
    levels = draw(st.integers(1, 3))
    shapes = [(draw(st.integers(1, 9)), draw(st.integers(1, 9))) for _ in range(levels)]
    strides = [draw(st.sampled_from(STRIDES) | st.floats(0.3, 70)) for _ in range(levels)]
    return images, labels, shapes, strides, options


def packed(images, labels, options, order, device):
    """The same call with packed boxes, as columns of one larger tensor and in another order of rows."""
    index = torch.tensor([b for b, x in enumerate(images) for _ in x], dtype=torch.int64)
    order = torch.tensor(sorted(range(len(index)), key=lambda i: (i * order) % 7), dtype=torch.int64)
    rows = torch.full((len(index), 9), 5.0, dtype=images[0].dtype, device=device)
    rows[:, 2:6] = torch.cat(images)[order].to(device)
    keys = torch.zeros(2, len(index), 3, dtype=labels[0].dtype, device=device)
    keys[0, :, 1], keys[1, :, 2] = index[order].to(device), torch.cat(labels)[order].to(device)
    out = dict(options, batch_index=keys[0, :, 1], batch_size=len(images))
    if "image_sizes" in options:
        out["image_sizes"] = torch.tensor(options["image_sizes"], device=device).t().contiguous().t()
    if "ignore_boxes" in options:
        ignore = options["ignore_boxes"]
        out["ignore_boxes"] = torch.cat(ignore).to(device).t().contiguous().t()
        out["ignore_batch_index"] = torch.tensor([b for b, x in enumerate(ignore) for _ in x], device=device).long()
    return (rows[:, 2:6], keys[1, :, 2]), out


@given(calls(), st.integers(1, 6))
def test_any_boxes(device, call, order):
    images, labels, shapes, strides, options = call
    on_device = [[x.to(device) for x in xs] for xs in (images, labels)]
    listed = dict(options)
    if "ignore_boxes" in options:
        listed["ignore_boxes"] = [x.to(device) for x in options["ignore_boxes"]]
    native = assert_backends_agree(*on_device, shapes, strides, **listed)
    arguments, options = packed(images, labels, options, order, device)
    assert_equal(native, build("native", *arguments, shapes, strides, **options))
    assert_backends_agree(*arguments, shapes, strides, **options)


# ------------------------------------------------------------------------------------------------------ named cases


@pytest.mark.parametrize(
    ("boxes", "num_classes"),
    [(0, 80), (1, 1), (15, 80), (16, 80), (31, 80), (32, 80), (200, 80), (500, 1203)],
)
def test_many_categories(boxes, num_classes, device):
    """Up to 500 boxes an image of up to 1,203 categories: the masks fill from one word to many."""
    rows, labels, index = (x.to(device) for x in make_boxes(2 * boxes, 2, num_classes, seed=boxes))
    if boxes == 500:
        labels = torch.randperm(1203, generator=torch.Generator().manual_seed(1))[:1000].to(device)
    shapes, strides = [(20, 28), (10, 14), (2, 2)], [8, 16, 80]
    native = assert_backends_agree(
        rows, labels, shapes, strides, num_classes=num_classes, batch_index=index, batch_size=2
    )
    assert native.classes.shape[0] == min(2 * boxes, num_classes)
    assert native.classes.tolist()[: len(labels.unique())] == labels.unique().tolist()


@pytest.mark.parametrize(
    "box",
    [
        (-3e38, 0.0, 3e38, 9.0),  # its width overflows
        (2e38, 0.0, 3e38, 9.0),  # the sum of its corners does
        (-3e38, -3e38, -2e38, -2e38),
        (-1e9, -1e9, 1e9, 1e9),
        (0.0, 0.0, 0.0, 0.0),
        (63.999996, 47.999996, 64.0, 48.0),
        (64.0, 48.0, 64.0, 48.0),
        (-1e-45, -1e-45, 0.0, 0.0),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_boxes_at_the_limits(box, dtype, device):
    boxes = torch.tensor([box, (8.0, 8.0, 40.0, 40.0)], dtype=dtype, device=device)
    labels = torch.tensor([1, 1], device=device)
    assert_backends_agree([boxes], [labels], [(6, 8), (3, 4), (1, 1)], [8, 16, 0.5])


def test_padding_rows_change_nothing_but_the_capacity(device):
    rows, labels, index = make_boxes(5)
    garbage = torch.tensor([[float("nan"), float("inf"), -1.0, -2.0]]).expand(3, 4)
    rows = torch.cat([rows[:2], garbage[:1], rows[2:], garbage[1:]])
    labels = torch.cat([labels[:2], torch.tensor([-1]), labels[2:], torch.tensor([-1, -1])])
    index = torch.cat([index[:2], torch.tensor([99]), index[2:], torch.tensor([-5, 0])])
    call = {"level_shapes": [(20, 28)], "strides": [8], "num_classes": 5, "batch_size": 2}
    padded = assert_backends_agree(rows.to(device), labels.to(device), batch_index=index.to(device), **call)
    keep = labels >= 0
    plain = build("native", rows[keep].to(device), labels[keep].to(device), batch_index=index[keep].to(device), **call)
    masks = plain.area.shape[1]
    assert torch.equal(padded.area[:, :masks], plain.area) and not padded.area[:, masks:].any()
    assert torch.equal(padded.masks(0)[:masks], plain.masks(0))


def test_no_image(device):
    none = torch.zeros(0, dtype=torch.int64, device=device)
    options = {"batch_index": none, "batch_size": 0}
    regions = assert_backends_agree(torch.zeros(0, 4, device=device), none, [(6, 8), (3, 4)], [8, 16], **options)
    assert regions.area.tolist() == [[0], [0]] and regions.masks(1).shape == (1, 0, 3, 4)


def test_image_sizes_as_list_and_tensor_agree(device):
    rows, labels, index = (x.to(device) for x in make_boxes(6))
    call = {"batch_index": index, "batch_size": 2, "num_classes": 5}
    sizes = [(101, 223), (160, 7)]
    a, b = (
        build("native", rows, labels, [(20, 28)], [8], image_sizes=s, **call)
        for s in (sizes, torch.tensor(sizes, dtype=torch.int32, device=device))
    )
    assert_equal(a, b)


def test_regions_of_either_backend_serve_the_other(device):
    rows, labels, index = (x.to(device) for x in make_boxes(20, num_classes=20))
    call = {"batch_index": index, "batch_size": 2, "num_classes": 20}
    native, dense = (build(b, rows, labels, [(20, 28), (5, 7)], [8, 32], **call) for b in ("native", "reference"))
    maps = [torch.randn(2, 8, *shape, device=device) for shape in native.level_shapes]
    for backend in ("native", "reference"):
        with sk.backend(backend):
            assert torch.equal(sk.anchor_pool(maps, native), sk.anchor_pool(maps, dense))


@pytest.mark.skipif("SEA_KERNELS_DATA" not in os.environ, reason="SEA_KERNELS_DATA is not set")
def test_real_boxes(device):
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
        assert_backends_agree(
            boxes,
            labels,
            [(height // s, width // s) for s in strides],
            strides,
            num_classes=90,
            image_sizes=[(image["height"], image["width"]) for image in images],
            ignore_boxes=crowd,
        )
