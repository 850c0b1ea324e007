"""Numbers of numpy are numbers, in every argument: the same result as with Python's. A bool is none."""

import numpy as np
import pytest
import torch
from cases import make_maps, make_regions
from scenes import assert_same_regions
from torch import nn

import sea_kernels as sk

INTEGERS = (np.int64, np.int32, np.uint8)
FLOATS = (np.float64, np.float32, np.float16)


@pytest.mark.parametrize(("whole", "real"), [*zip(INTEGERS, FLOATS)])
def test_regions(backend, whole, real):
    box, label = torch.tensor([[0.0, 0.0, 32.0, 32.0]]), torch.tensor([1])

    def build(whole, real):
        options = {"num_classes": whole(3), "center_ratio": real(0.5)}
        shapes, strides = [(whole(4), whole(6)), (2, whole(3))], [real(8), (whole(16), real(16))]
        sizes = [(whole(30), whole(40))]
        polygon = [real(v) for v in (0, 0, 8, 0, 8, 8)]
        counts = {"size": [whole(30), whole(40)], "counts": [whole(200), whole(200), *[whole(200)] * 4]}
        return [
            sk.Regions.from_boxes([box], [label], shapes, strides, image_sizes=sizes, **options),
            sk.Regions.from_boxes(
                box, label, shapes, strides, batch_index=torch.tensor([0]), batch_size=whole(1), **options
            ),
            sk.Regions.from_masks(
                [[[polygon], counts]], [torch.tensor([1, 2])], shapes, strides, image_sizes=sizes, **options
            ),
        ]

    for found, wanted in zip(build(whole, real), build(int, float)):
        assert_same_regions(found, wanted)
        assert all(type(n) is int for shape in found.level_shapes for n in shape)


def test_losses(backend):
    regions = make_regions(levels=2)
    maps = [make_maps(regions.level_shapes, seed=seed) for seed in (1, 2)]
    for name in ("topological_distance_loss", "localization_alignment_loss"):
        loss = getattr(sk, name)
        arguments = (*maps, regions) if name.startswith("topo") else maps
        assert torch.equal(loss(*arguments, temperature=np.float64(0.5)), loss(*arguments, temperature=0.5))
        assert torch.equal(loss(*arguments, temperature=np.int32(2)), loss(*arguments, temperature=2))


def test_pictures():
    regions = make_regions(levels=2)
    maps = make_maps(regions.level_shapes)
    pictures = torch.zeros(regions.batch_size, 3, 160, 224)
    figure = sk.plot.cosines(
        pictures, {"t": maps}, regions, [np.int64(8), np.float32(16)], level=np.int64(1), image=np.uint8(0),
        anchors=np.array([0]),
    )  # fmt: skip
    assert figure.axes[0].get_title() == "background"


def test_the_distiller():
    student, teacher = (nn.Sequential(nn.Conv2d(3, 4, 1)) for _ in range(2))
    taps = sk.taps.Taps(cls=("0",), box=("0",), strides=(np.int64(8),), input="0", run=lambda model, x: model(x))
    weights = tuple(map(np.float32, (1, 2, 3)))
    schedule = sk.Schedule(warmup=np.int64(2), decay=np.int64(5), stop=np.int64(9))
    distiller = sk.SEADistiller(
        student, teacher, taps, weights=weights, schedule=schedule, num_classes=np.int64(3),
        center_ratio=np.float32(0.5), distance_temperature=np.float64(0.1), localization_temperature=np.int64(1),
        channels=((np.int64(4), 4), (4, np.int64(4))),
    )  # fmt: skip
    student(torch.rand(1, 3, 4, 6))
    losses = distiller.losses([torch.tensor([[0.0, 0.0, 20.0, 20.0]])], [torch.tensor([2])], [(np.int64(32), 48)])
    assert all(type(x) is torch.Tensor and x.dtype == torch.float32 for x in losses.values())
    for x, raw, weight in zip(losses.values(), distiller.unweighted, (1, 2, 3)):
        torch.testing.assert_close(x.detach(), 0.5 * weight * raw)


@pytest.mark.parametrize("bad", [np.bool_(True), True, "3", None, np.array([3]), np.float32(3), 3j])
def test_what_is_no_integer(bad):
    box = [torch.zeros(1, 4)], [torch.tensor([0])]
    with pytest.raises(TypeError, match=r"num_classes is a .*; expected an integer"):
        sk.Regions.from_boxes(*box, [(4, 6)], [8], num_classes=bad)


@pytest.mark.parametrize("bad", [np.bool_(True), True, "0.5", None, np.array([0.5]), 0.5j])
def test_what_is_no_number(bad):
    box = [torch.zeros(1, 4)], [torch.tensor([0])]
    with pytest.raises(TypeError, match=r"center_ratio is a .*; expected a number"):
        sk.Regions.from_boxes(*box, [(4, 6)], [8], center_ratio=bad)
