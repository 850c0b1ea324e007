"""Bad input: a ValueError or TypeError that names the argument, before anything is computed, in the same words by both.

Lists on the left say what a good call is, and what of it is changed.
"""

import math
import re

import pytest
import torch
from cases import make_maps, make_regions
from scenes import make_maps as maps_of
from scenes import regions_of
from torch.utils._python_dispatch import TorchDispatchMode

import sea_kernels as sk
from sea_kernels import Regions
from sea_kernels.boxes import RasterInput, check_values

nan, inf = math.nan, math.inf


class Operators(TorchDispatchMode):
    """Which of our operators are called."""

    def __init__(self):
        super().__init__()
        self.called = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "sea_kernels":
            self.called.append(function._schema.name)
        return function(*args, **(kwargs or {}))


def refuses(error, message, call, *arguments, entry=()):
    """`entry`: operators that may be called, because they are what checks."""
    with Operators() as operators, pytest.raises(error, match=message):
        call(*arguments)
    assert set(operators.called) <= set(entry)


def test_operators_that_are_called_are_seen():
    """Else the tests below would show nothing."""
    with Operators() as operators:
        regions = make_regions()
        sk.anchor_pool(make_maps(regions.level_shapes), regions)
    assert operators.called == ["sea_kernels::regions", "sea_kernels::rasterize", "sea_kernels::anchor_pool"] or (
        operators.called == ["sea_kernels::regions", "sea_kernels::anchor_pool"]
    )


# ------------------------------------------------------------------------------------------------------------ boxes

ONE = torch.tensor([[0.0, 0.0, 9.0, 9.0]])
LISTS = {
    "boxes": [ONE, torch.cat([ONE, ONE])],
    "labels": [torch.tensor([0]), torch.tensor([1, 2])],
    "level_shapes": [(6, 8), (3, 4)],
    "strides": [8, 16],
    "num_classes": 5,
}
PACKED = LISTS | {
    "boxes": torch.cat([ONE] * 3),
    "labels": torch.tensor([0, 1, 2]),
    "batch_index": torch.tensor([0, 1, 1]),
    "batch_size": 2,
}


def boxes_with(box):
    return [ONE, torch.cat([ONE, torch.tensor([box])])]


BAD_BOXES = [
    # what is changed, the error, what its message has to say
    (LISTS, {"boxes": 3}, TypeError, r"boxes is a int; expected a list"),
    (LISTS, {"boxes": []}, ValueError, r"boxes is an empty list"),
    (LISTS, {"boxes": [ONE, 3]}, TypeError, r"boxes\[1\] is a int; expected a tensor"),
    (LISTS, {"boxes": [ONE, ONE.long()]}, TypeError, r"boxes\[1\] has dtype torch.int64; expected float32"),
    (LISTS, {"boxes": [ONE, ONE.double()]}, TypeError, r"boxes\[1\] has dtype torch.float64; expected torch.float32"),
    (LISTS, {"boxes": [ONE, ONE[0]]}, ValueError, r"boxes\[1\] has shape \[4\]; expected \[G, 4\]"),
    (LISTS, {"boxes": [ONE, ONE.to("meta")]}, ValueError, r"boxes\[1\] is on meta; expected cpu"),
    (LISTS, {"batch_size": 3}, ValueError, r"batch_size is 3; expected 2"),
    (LISTS, {"batch_index": torch.tensor([0, 1, 1])}, ValueError, r"batch_index is given beside a list"),
    (LISTS, {"labels": torch.tensor([0, 1, 2])}, TypeError, r"labels is a Tensor; expected a list"),
    (LISTS, {"labels": [torch.tensor([0])]}, ValueError, r"labels has 1 tensors; expected 2"),
    (LISTS, {"labels": [torch.tensor([0]), [1, 2]]}, TypeError, r"labels\[1\] is a list; expected an integer tensor"),
    (
        LISTS,
        {"labels": [torch.tensor([0]), torch.tensor([1])]},
        ValueError,
        r"labels\[1\] has shape \[1\]; expected \[2\]",
    ),
    (LISTS, {"labels": [torch.tensor([0.0]), torch.tensor([1, 2])]}, TypeError, r"labels\[0\] has dtype torch.float32"),
    (LISTS, {"level_shapes": 3}, TypeError, r"level_shapes is a int"),
    (LISTS, {"level_shapes": []}, ValueError, r"level_shapes is empty"),
    (LISTS, {"level_shapes": [(6, 8), 4]}, TypeError, r"level_shapes\[1\] is a int"),
    (LISTS, {"level_shapes": [(6, 8), (3, 4, 5)]}, ValueError, r"level_shapes\[1\] has 3 entries"),
    (LISTS, {"level_shapes": [(6, 8), (3, 4.0)]}, TypeError, r"level_shapes\[1\]\[1\] is a float; expected an integer"),
    (LISTS, {"level_shapes": [(6, 8), (0, 4)]}, ValueError, r"level_shapes\[1\]\[0\] is 0; expected an integer >= 1"),
    (LISTS, {"strides": 8}, TypeError, r"strides is a int"),
    (LISTS, {"strides": [8]}, ValueError, r"strides has 1 entries; expected 2"),
    (LISTS, {"strides": [8, "16"]}, TypeError, r"strides\[1\] is '16'"),
    (LISTS, {"strides": [8, (1, 2, 3)]}, ValueError, r"strides\[1\] has 3 entries"),
    (LISTS, {"strides": [8, 0]}, ValueError, r"strides\[1\] is 0; expected finite numbers above 0"),
    (LISTS, {"strides": [8, (16, nan)]}, ValueError, r"strides\[1\] is \(16, nan\)"),
    (LISTS, {"num_classes": 0}, ValueError, r"num_classes is 0; expected an integer >= 1"),
    (LISTS, {"num_classes": 2.0}, TypeError, r"num_classes is a float"),
    (LISTS, {"center_ratio": "0.5"}, TypeError, r"center_ratio is a str"),
    (LISTS, {"center_ratio": 1.5}, ValueError, r"center_ratio is 1.5; expected a number from 0 to 1"),
    (LISTS, {"center_ratio": nan}, ValueError, r"center_ratio is nan"),
    (LISTS, {"box_format": "xyhw"}, ValueError, r"box_format is 'xyhw'; expected 'xyxy', 'xywh', 'cxcywh'"),
    (LISTS, {"normalized": True}, ValueError, r"image_sizes is None; expected \(height, width\) of each image beside"),
    (LISTS, {"image_sizes": 3}, TypeError, r"image_sizes is a int"),
    (LISTS, {"image_sizes": [(48, 64)]}, ValueError, r"image_sizes has 1 entries; expected 2"),
    (LISTS, {"image_sizes": [(48, 64), 3]}, TypeError, r"image_sizes\[1\] is a int"),
    (LISTS, {"image_sizes": [(48, 64), (48, 64, 3)]}, ValueError, r"image_sizes\[1\] has 3 entries"),
    (LISTS, {"image_sizes": [(48, 64), (48, 6.5)]}, TypeError, r"image_sizes\[1\]\[1\] is a float"),
    (LISTS, {"image_sizes": [(48, 64), (48, -1)]}, ValueError, r"image_sizes\[1\]\[1\] is -1"),
    (LISTS, {"image_sizes": torch.ones(2, 2)}, TypeError, r"image_sizes has dtype torch.float32"),
    (LISTS, {"image_sizes": torch.ones(3, 2).long()}, ValueError, r"image_sizes has shape \[3, 2\]; expected \[2, 2\]"),
    (LISTS, {"ignore_boxes": 3}, TypeError, r"ignore_boxes is a int"),
    (LISTS, {"ignore_boxes": [ONE]}, ValueError, r"ignore_boxes has 1 tensors; expected 2"),
    (LISTS, {"ignore_boxes": [ONE, ONE.long()]}, TypeError, r"ignore_boxes\[1\] has dtype torch.int64"),
    (
        LISTS,
        {"ignore_boxes": [ONE.double()] * 2},
        TypeError,
        r"ignore_boxes has dtype torch.float64; expected torch.float32",
    ),
    (LISTS, {"ignore_boxes": [ONE.to("meta")] * 2}, ValueError, r"ignore_boxes is on meta; expected cpu"),
    (LISTS, {"ignore_boxes": ONE}, ValueError, r"ignore_batch_index is None; expected an integer tensor \[1\]"),
    (LISTS, {"ignore_batch_index": torch.tensor([0])}, ValueError, r"ignore_batch_index is given without ignore_boxes"),
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
    (LISTS, {"labels": [torch.tensor([0]), torch.tensor([1, 5])]}, ValueError, r"labels\[1\]\[1\] is 5; .*< 5"),
    (LISTS, {"labels": [torch.tensor([0]), torch.tensor([-2, 1])]}, ValueError, r"labels\[1\]\[0\] is -2"),
    (
        LISTS,
        {"boxes": boxes_with([0.0, nan, 9.0, 9.0])},
        ValueError,
        r"boxes\[1\]\[1\] is \[0.0, nan, 9.0, 9.0\]; .*finite",
    ),
    (LISTS, {"boxes": boxes_with([0.0, 0.0, inf, 9.0])}, ValueError, r"boxes\[1\]\[1\] is \[0.0, 0.0, inf, 9.0\]"),
    (LISTS, {"boxes": boxes_with([9.0, 0.0, 8.0, 9.0])}, ValueError, r"boxes\[1\]\[1\] is .*x1 <= x2"),
    (LISTS, {"boxes": boxes_with([0.0, 9.0, 8.0, 8.0])}, ValueError, r"boxes\[1\]\[1\] is .*y1 <= y2"),
    (LISTS, {"ignore_boxes": boxes_with([9.0, 0.0, 8.0, 9.0])}, ValueError, r"ignore_boxes\[1\]\[1\] is \[9.0"),
    (LISTS, {"image_sizes": torch.tensor([[48, 64], [-1, 64]])}, ValueError, r"image_sizes\[1\] is \[-1, 64\]"),
    (PACKED, {"labels": torch.tensor([0, 1, 5])}, ValueError, r"labels\[2\] is 5"),
    (PACKED, {"batch_index": torch.tensor([0, 2, 1])}, ValueError, r"batch_index\[1\] is 2; expected 0 <= index < 2"),
    (
        PACKED,
        {"ignore_boxes": ONE, "ignore_batch_index": torch.tensor([-1])},
        ValueError,
        r"ignore_batch_index\[0\] is -1; expected 0 <= index < 2",
    ),
]


@pytest.mark.parametrize(("base", "changes", "error", "message"), BAD_BOXES, ids=[m for *_, m in BAD_BOXES])
def test_bad_boxes_are_refused(base, changes, error, message, backend):
    assert (Regions.from_boxes(**base).bits is not None) == (backend == "native")
    refuses(error, message, lambda: Regions.from_boxes(**(base | changes)), entry=["sea_kernels::regions"])


def test_values_of_padding_rows_are_not_checked(backend):
    box = torch.tensor([[nan, 9.0, inf, 0.0], [0.0, 0.0, 9.0, 9.0]])
    args = {"batch_index": torch.tensor([7, 0]), "batch_size": 1, "num_classes": 5}
    regions = Regions.from_boxes(box, torch.tensor([-1, 4]), [(2, 2)], [8], **args)
    assert regions.classes.tolist() == [4, -1]
    rest = torch.tensor([7, 0]), [], None, None, [], None, [], 1, [], [], 5, 0.5
    assert check_values(RasterInput(box, torch.tensor([-1, 4]), *rest)) is None
    with pytest.raises(ValueError, match=r"batch_index\[0\] is 7"):
        check_values(RasterInput(box[[1, 1]], torch.tensor([3, 4]), *rest))


# ------------------------------------------------------------------------------------------------------------ masks

ONE_MASK, TWO_MASKS = (torch.ones(n, 24, 32, dtype=torch.bool) for n in (1, 2))
TENSORS = {
    "masks": [ONE_MASK, TWO_MASKS],
    "labels": [torch.tensor([0]), torch.tensor([1, 2])],
    "level_shapes": [(3, 4), (2, 2)],
    "strides": [8, 16],
    "num_classes": 5,
}
POLYGON = [[0, 0, 8, 0, 8, 8]]
COCO = TENSORS | {"masks": [[POLYGON], [POLYGON, POLYGON]], "image_sizes": [(24, 32), (20, 32)]}


def coco_with(x):
    return {"masks": [[POLYGON], [POLYGON, x]]}


def runs(counts, size=(20, 32)):
    return coco_with({"size": size, "counts": counts})


BAD_MASKS = [
    (TENSORS, {"masks": ONE_MASK}, TypeError, "masks is a Tensor; expected a list with the masks of each image"),
    (TENSORS, {"masks": []}, ValueError, "masks is an empty list; expected the masks of each image"),
    (TENSORS, {"masks": [ONE_MASK, 3]}, TypeError, "masks[1] is a int; expected a tensor [G, H, W] or a list of COCO"),
    (
        TENSORS,
        {"masks": [ONE_MASK, {}]},
        TypeError,
        "masks[1] is a dict; expected a tensor [G, H, W] or a list of COCO",
    ),
    (
        TENSORS,
        {"masks": [ONE_MASK, TWO_MASKS.float()]},
        TypeError,
        "masks[1] has dtype torch.float32; expected bool or uint8",
    ),
    (TENSORS, {"masks": [ONE_MASK, TWO_MASKS[0]]}, ValueError, "masks[1] has shape [24, 32]; expected [G, H, W]"),
    (TENSORS, {"masks": [ONE_MASK, TWO_MASKS.to("meta")]}, ValueError, "masks[1] is on meta; expected cpu, as labels"),
    (TENSORS, {"masks": [ONE_MASK, ONE_MASK]}, ValueError, "labels[1] has shape [2]; expected [1]"),
    (TENSORS, {"masks": [ONE_MASK]}, ValueError, "labels has 2 tensors; expected 1, as masks"),
    (TENSORS, {"labels": torch.tensor([0])}, TypeError, "labels is a Tensor; expected a list of 2 tensors, as masks"),
    (TENSORS, {"labels": [[0], [1, 2]]}, TypeError, "labels[0] is a list; expected an integer tensor"),
    (
        TENSORS,
        {"labels": [ONE_MASK[:, 0, 0], TWO_MASKS[:, 0, 0]]},
        TypeError,
        "labels[0] has dtype torch.bool; expected an int",
    ),
    (
        TENSORS,
        {"labels": [torch.tensor([0]), torch.tensor([1, 2], device="meta")]},
        ValueError,
        "labels[1] is on meta; expected cpu, as labels[0]",
    ),
    (
        TENSORS,
        {"labels": [torch.tensor([0]), torch.tensor([1, 5])]},
        ValueError,
        "labels[1][1] is 5; expected -1 <= label < 5",
    ),
    (TENSORS, {"labels": [torch.tensor([-2]), torch.tensor([1, 2])]}, ValueError, "labels[0][0] is -2; expected -1 <="),
    (TENSORS, {"level_shapes": []}, ValueError, "level_shapes is empty"),
    (TENSORS, {"strides": [8]}, ValueError, "strides has 1 entries; expected 2, as level_shapes"),
    (TENSORS, {"num_classes": 0}, ValueError, "num_classes is 0; expected an integer >= 1"),
    (TENSORS, {"center_ratio": 2}, ValueError, "center_ratio is 2; expected a number from 0 to 1"),
    (TENSORS, {"center_ratio": None}, TypeError, "center_ratio is a NoneType; expected a number from 0 to 1"),
    (TENSORS, {"image_sizes": [(24, 32)]}, ValueError, "image_sizes has 1 entries; expected 2"),
    (
        TENSORS,
        {"image_sizes": torch.ones(2, 2, dtype=torch.int64, device="meta")},
        ValueError,
        "image_sizes is on meta; expected cpu, as labels",
    ),
    (TENSORS, {"image_sizes": torch.tensor([[24, 32], [-1, 2]])}, ValueError, "image_sizes[1] is [-1, 2]; expected"),
    (TENSORS, {"ignore_boxes": torch.zeros(1, 4)}, TypeError, "ignore_boxes is a Tensor; expected a list of tensors"),
    (TENSORS, {"ignore_boxes": [torch.zeros(1, 4)]}, ValueError, "ignore_boxes has 1 tensors; expected 2, one for"),
    (
        TENSORS,
        {"ignore_boxes": [torch.zeros(1, 4, device="meta")] * 2},
        ValueError,
        "ignore_boxes is on meta; expected cpu, as labels",
    ),
    (
        TENSORS,
        {"ignore_boxes": [torch.zeros(1, 4), torch.tensor([[9.0, 0, 8, 9]])]},
        ValueError,
        "ignore_boxes[1][0] is [9.0, 0.0, 8.0, 9.0]; expected finite",
    ),
    (COCO, {"image_sizes": None}, ValueError, "image_sizes is None; expected a list of (height, width), to which mask"),
    (COCO, {"image_sizes": torch.tensor([[24, 32]] * 2)}, TypeError, "image_sizes is a Tensor; expected a list of"),
    (COCO, {"masks": [[POLYGON], [POLYGON]]}, ValueError, "labels[1] has shape [2]; expected [1]"),
    (COCO, coco_with(3), TypeError, "masks[1][1] is a int; expected run lengths (a dict) or a list of polygons"),
    (COCO, coco_with([]), ValueError, "masks[1][1] is empty; expected at least one polygon"),
    (COCO, coco_with([0, 0, 8, 0, 8, 8]), TypeError, "masks[1][1][0] is a int; expected a polygon, a flat list"),
    (COCO, coco_with([[0, 0, 8, 8]]), ValueError, "masks[1][1][0] has 4 entries; expected x and y of three or more"),
    (COCO, coco_with([[0, 0, 8, 8, 1, 2, 3]]), ValueError, "masks[1][1][0] has 7 entries; expected x and y of three"),
    (COCO, coco_with([[0, 0, 8, 8, 1, "2"]]), TypeError, "masks[1][1][0][5] is a str; expected a number"),
    (COCO, coco_with([[0, 0, 8, 8, 1, math.nan]]), ValueError, "masks[1][1][0][5] is nan; expected a number between"),
    (COCO, coco_with([[0, 0, 8, -1e9, 1, 2]]), ValueError, "masks[1][1][0][3] is -1000000000.0; expected a number"),
    (COCO, coco_with({"counts": [640]}), ValueError, "masks[1][1] has no 'size'; expected {'size': (height, width)"),
    (COCO, coco_with({"size": [20, 32]}), ValueError, "masks[1][1] has no 'counts'; expected {'size': (height, width)"),
    (COCO, runs([768], [24, 32]), ValueError, "masks[1][1]['size'] is [24, 32]; expected [20, 32], as image_sizes"),
    (COCO, runs(640), TypeError, "masks[1][1]['counts'] is a int; expected bytes, str or a list of integers"),
    (COCO, runs([600.0, 40]), TypeError, "masks[1][1]['counts'][0] is a float; expected an integer"),
    (COCO, runs([700, -60]), ValueError, "masks[1][1]['counts'][1] is -60; expected an integer >= 0"),
    (COCO, runs([600, 30]), ValueError, "masks[1][1]['counts'] has 630 pixels; expected 20 * 32, as in 'size'"),
    (COCO, runs(b""), ValueError, "masks[1][1]['counts'] has 0 pixels; expected 20 * 32"),
    (COCO, runs("garbage"), ValueError, "masks[1][1]['counts']"),
]


@pytest.mark.parametrize(("base", "changes", "error", "message"), BAD_MASKS, ids=[m for *_, m in BAD_MASKS])
def test_bad_masks_are_refused(base, changes, error, message, backend):
    if base is COCO:
        pytest.importorskip("pycocotools", reason="pycocotools is not installed")
    Regions.from_masks(**base)
    refuses(error, "^" + re.escape(message), lambda: Regions.from_masks(**(base | changes)))


# ------------------------------------------------------------------------------------------------------------- maps


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (([], [], [], []), "student_box is empty"),
        (([], [[]], [[]], [[]]), "student_cls is empty"),
        (([], 1, [[]], [[]]), "student_cls is empty"),
    ],
)
def test_no_branch_has_maps(sets, message, backend):
    with pytest.raises(ValueError, match=message):
        sk.sea_loss(*sets, None)


A = {"shapes": [(6, 8), (3, 4)], "boxes": [[], []], "labels": [[], []], "strides": [8, 16]}
GOOD = maps_of(A)
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
    ([GOOD[0], GOOD[1][..., :0]], GOOD, ValueError, r"student\[1\] has shape \[2, 3, 3, 0\]; expected at least one"),
    (GOOD, [x.int() for x in GOOD], TypeError, r"teacher\[0\] has dtype torch.int32"),
    (GOOD, GOOD[:1], ValueError, r"teacher has 1 levels; expected 2, as student"),
    ([GOOD, GOOD], GOOD, ValueError, r"teacher has 1 sets of maps; expected 2, as student"),
    ([GOOD, GOOD], [GOOD, GOOD[:1]], ValueError, r"teacher\[1\] has 1 levels; expected 2, as student\[1\]"),
    (GOOD, [x[:, :2] for x in GOOD], ValueError, r"teacher\[0\] has shape \[2, 2, 6, 8\]; expected \[2, 3, 6, 8\]"),
    (
        GOOD,
        [GOOD[0], GOOD[1][:, :2]],
        ValueError,
        r"teacher\[1\] has shape \[2, 2, 3, 4\]; expected \[2, 3, 3, 4\], as student\[1\]",
    ),
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


@pytest.fixture
def regions(backend):
    return regions_of(A)


@pytest.mark.parametrize(("student", "teacher", "error", "message"), BAD_MAPS, ids=[m for *_, m in BAD_MAPS])
def test_bad_maps_are_refused(student, teacher, error, message, regions):
    for loss in (sk.anchor_loss, sk.topological_distance_loss, sk.localization_alignment_loss):
        refuses(error, message, loss, student, teacher, regions)
    for name, arguments in (("cls", (student, teacher, GOOD, GOOD)), ("box", (GOOD, GOOD, student, teacher))):
        named = message.replace("student", f"student_{name}").replace("teacher", f"teacher_{name}")
        refuses(error, named, sk.sea_loss, *arguments, regions)
    if student is not GOOD and not (isinstance(student, list) and student and isinstance(student[0], list)):
        named = message.replace("student", "features")
        refuses(error, named, sk.anchor_pool, student, regions)
        refuses(error, named, sk.anchor_cosine, student, torch.zeros(2, 1, 3), regions)


def test_sets_of_different_numbers_of_levels_are_refused(backend):
    maps = make_maps([(6, 8), (3, 4), (2, 2)])
    sets = [maps[:2], maps[2:]]
    message = r"student\[1\] has 1 levels; expected 2, as student\[0\]"
    refuses(ValueError, message, sk.localization_alignment_loss, sets, sets)


@pytest.mark.parametrize("bad", [None, 3, "regions", GOOD, [GOOD]], ids=["None", "3", "text", "maps", "list of maps"])
def test_what_is_no_regions_is_refused(bad, backend):
    message = r"regions is a .*; expected sea_kernels.Regions"
    for call in (sk.anchor_loss, sk.topological_distance_loss):
        refuses(TypeError, message, call, GOOD, GOOD, bad)
    refuses(TypeError, message, sk.sea_loss, GOOD, GOOD, GOOD, GOOD, bad)
    refuses(TypeError, message, sk.anchor_pool, GOOD, bad)
    refuses(TypeError, message, sk.anchor_cosine, GOOD, torch.zeros(2, 1, 3), bad)
    if bad is not None:
        refuses(TypeError, message, sk.localization_alignment_loss, GOOD, GOOD, bad)


def test_channels_of_features_may_not_differ_from_level_to_level(regions):
    """Their anchors are one tensor."""
    features = [GOOD[0], GOOD[1][:, :2]]
    message = r"features\[1\] has shape \[2, 2, 3, 4\]; expected 3 channels, as features\[0\]"
    refuses(ValueError, message, sk.anchor_pool, features, regions)
    refuses(ValueError, message, sk.anchor_cosine, features, torch.zeros(2, 1, 3), regions)


def test_features_are_one_set_and_no_list_of_sets(regions):
    refuses(TypeError, r"features\[0\] is a list; expected a tensor", sk.anchor_pool, [GOOD, GOOD], regions)
    refuses(TypeError, r"features\[0\] is a list", sk.anchor_cosine, [GOOD], torch.zeros(2, 1, 3), regions)


@pytest.mark.parametrize(
    ("value", "error"),
    [("1", TypeError), (None, TypeError), (True, TypeError), (torch.tensor(1.0), TypeError)]
    + [(v, ValueError) for v in (0, -1.0, math.nan, math.inf)],
    ids=str,
)
def test_bad_temperatures_are_refused(value, error, regions):
    for loss in (sk.topological_distance_loss, sk.localization_alignment_loss):
        refuses(error, r"^temperature is .*; expected a (finite )?number", loss, GOOD, GOOD, regions, value)
    for name in ("distance_temperature", "localization_temperature"):
        call = lambda name=name: sk.sea_loss(GOOD, GOOD, GOOD, GOOD, regions, **{name: value})  # noqa: E731
        refuses(error, rf"^{name} is .*; expected", call)


@pytest.mark.parametrize(
    ("anchors", "error", "message"),
    [
        ([], TypeError, r"anchors is a list; expected a tensor \[L, P, C\]"),
        (torch.zeros(2, 1, 3).long(), TypeError, r"anchors has dtype torch.int64; expected float32"),
        (torch.zeros(2, 1, 3).to_sparse(), TypeError, r"anchors has layout torch.sparse_coo"),
        (torch.zeros(2, 1, 3, device="meta"), ValueError, r"anchors is on meta; expected cpu"),
        (torch.zeros(2, 1, 4), ValueError, r"anchors has shape \[2, 1, 4\]; expected \[L, P, C\] = \[2, 1, 3\]"),
        (torch.zeros(2, 3, 3), ValueError, r"anchors has shape \[2, 3, 3\]"),
        (torch.zeros(1, 1, 3), ValueError, r"anchors has shape \[1, 1, 3\]"),
        (torch.zeros(1, 3), ValueError, r"anchors has shape \[1, 3\]"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_bad_anchors_are_refused(anchors, error, message, regions):
    refuses(error, message, sk.anchor_cosine, GOOD, anchors, regions)
