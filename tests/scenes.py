"""Boxes in images, written as lists for the oracle, and the regions that are made of them."""

import numpy as np
import oracle
import torch
from cases import F32, F64

import sea_kernels as sk
from sea_kernels import Regions, backends

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
    "center box as large as the box": {
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


def index_of(boxes):
    return torch.tensor([b for b, x in enumerate(boxes) for _ in range(len(x))], dtype=torch.int32)


def regions_of(case, dtype=F32, packed=False, device="cpu", **changes):
    """Regions of a case by the backend in use, as lists of each image or packed."""
    case = case | changes
    boxes = [torch.tensor(b, dtype=dtype, device=device).reshape(-1, 4) for b in case["boxes"]]
    labels = [torch.tensor(c, dtype=torch.int32, device=device) for c in case["labels"]]
    ignore = case.get("ignore")
    ignore = None if ignore is None else [torch.tensor(b, dtype=dtype, device=device).reshape(-1, 4) for b in ignore]
    sizes, options = case.get("sizes"), {}
    if packed:
        options = {"batch_index": index_of(boxes).to(device), "batch_size": len(boxes)}
        boxes, labels = torch.cat(boxes), torch.cat(labels)
        sizes = None if sizes is None else torch.tensor(sizes, device=device)
        if ignore is not None:
            options["ignore_batch_index"] = index_of(ignore).to(device)
            ignore = torch.cat(ignore)
    return build(
        boxes,
        labels,
        case["shapes"],
        case["strides"],
        num_classes=case.get("num_classes", 5),
        center_ratio=case.get("ratio", 0.5),
        image_sizes=sizes,
        ignore_boxes=ignore,
        **options,
    )


def expected_regions(case, dtype=np.float32):
    """The oracle's (classes, masks of every level, extent)."""
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


def build(*arguments, **options):
    """Regions.from_boxes by the backend in use; what is native equals the reference bit for bit, in every test."""
    regions = Regions.from_boxes(*arguments, **options)
    if backends.current_backend() == "native":
        assert regions.bits is not None and regions.dense is None
        with sk.backend("reference"):
            assert_same_regions(regions, Regions.from_boxes(*arguments, **options))
    return regions


def assert_same_regions(regions, wanted):
    assert regions.level_shapes == wanted.level_shapes and regions.batch_size == wanted.batch_size
    names = ("classes", "area", "counted", "extent", "bits", "runs")
    for name, x, y in zip(names, regions.tensors(), wanted.tensors()):
        assert x.dtype == y.dtype and x.shape == y.shape and x.device == y.device, name
        assert torch.equal(x, y), name
        assert not x.requires_grad
    for i in range(len(regions.level_shapes)):
        assert torch.equal(regions.masks(i), wanted.masks(i))


def make_maps(case, channels=3, seed=0, dtype=F64, requires_grad=False, device="cpu"):
    g = torch.Generator().manual_seed(seed)
    shape = (len(case["boxes"]), channels)
    maps = [torch.randn(*shape, *hw, generator=g, dtype=F64).to(device, dtype) for hw in case["shapes"]]
    return [x.requires_grad_(requires_grad) for x in maps]


def arrays(maps):
    """What the oracle takes."""
    return [x.detach().double().cpu().numpy() for x in maps]


def assert_near(actual, wanted, rtol=1e-9):
    """Relative to the largest value; 1e-3 * rtol absolutely: a divergence is a difference of numbers of order 1."""
    actual = actual.detach().double().cpu().numpy() if isinstance(actual, torch.Tensor) else actual
    atol = rtol * max(np.abs(wanted).max(initial=0), 1e-3)
    np.testing.assert_allclose(actual, wanted, rtol=rtol, atol=atol)
