"""Native regions equal those of the reference bit for bit, whatever the boxes (scenes.build compares them)."""

import pytest
import torch
from cases import BF16, F16, F32, F64
from hypothesis import given
from hypothesis import strategies as st
from scenes import assert_same_regions, build

from sea_kernels import Regions

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
def test_any_boxes_in_lists_or_packed(device, call, order):
    images, labels, shapes, strides, options = call
    on_device = [[x.to(device) for x in xs] for xs in (images, labels)]
    listed = dict(options)
    if "ignore_boxes" in options:
        listed["ignore_boxes"] = [x.to(device) for x in options["ignore_boxes"]]
    native = build(*on_device, shapes, strides, **listed)
    arguments, options = packed(images, labels, options, order, device)
    assert_same_regions(native, Regions.from_boxes(*arguments, shapes, strides, **options))
    build(*arguments, shapes, strides, **options)


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
def test_boxes_at_the_limits_of_their_dtype(box, dtype, device):
    boxes = torch.tensor([box, (8.0, 8.0, 40.0, 40.0)], dtype=dtype, device=device)
    labels = torch.tensor([1, 1], device=device)
    build([boxes], [labels], [(6, 8), (3, 4), (1, 1)], [8, 16, 0.5])
