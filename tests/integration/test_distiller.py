"""SEADistiller on a small detector: what it captures, what it refuses, and what trainers do to a student."""

import copy
import dataclasses
import gc
import logging
import math
import pickle
import weakref

import pytest
import torch
import torch._dynamo.testing
from cases import CUDA, NO_CUDA
from ranks import Meeting
from scenes import assert_same_regions
from torch import nn
from torch.torch_version import TorchVersion
from torch.utils.checkpoint import checkpoint
from toy_detector import STRIDES, TAPS, Toy, batch

import sea_kernels as sk

IMAGES, BOXES, LABELS = batch()


def pair(width=16, stride=8):
    """(student in training mode, teacher)"""
    return Toy().train(), Toy(width, stride, seed=1)


def distill(student, teacher, taps=TAPS, **options):
    """With fixed weights: those that set themselves are 0 in the first step."""
    return sk.SEADistiller(student, teacher, taps, **{"weights": (0.02, 0.02, 0.02)} | options)


def value(losses):
    return sum(losses.values()).item()


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def by_hand(student, teacher, images=IMAGES, **options):
    """The losses without hooks: the towers called one layer after the other."""

    def maps(model):
        sets = [[], [], []]
        for x in model.features(images):
            a = model.head.cls_tower[0](x).relu()
            sets[0].append(a)
            sets[1].append(model.head.cls_tower[2](a).relu())
            sets[2].append(model.head.box_tower[0](x).relu())
        return sets[:2], sets[2:]

    student_cls, student_box = maps(student)
    teacher_cls, teacher_box = maps(teacher)
    shapes = [x.shape[2:] for x in student_cls[0]]
    regions = sk.Regions.from_boxes(BOXES, LABELS, shapes, STRIDES, num_classes=4)
    return sk.sea_loss(student_cls, teacher_cls, student_box, teacher_box, regions, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"distance_temperature": 0.3},
        {"localization_temperature": 2.0},
        {"detach_anchors": True},
        {"distance_on_box": True},
        {"anchor_on_box": False},
    ],
)
def test_losses_are_those_of_sea_loss(options):
    student, teacher = pair()
    taps, own = TAPS, dict(options)
    if "anchor_on_box" in own:
        taps = dataclasses.replace(TAPS, anchor_on_box=own.pop("anchor_on_box"))
    distiller = distill(student, teacher, taps, weights=(0.5, 2.0, 3.0), **own)
    student(IMAGES)
    losses = distiller.losses(BOXES, LABELS)
    sum(losses.values()).backward()
    found = gradients(student)

    student.zero_grad()
    expected = by_hand(student, teacher.eval(), **options)
    weighted = [w * x for w, x in zip((0.5, 2.0, 3.0), expected)]
    sum(weighted).backward()
    assert list(losses) == ["loss_sea_anchor", "loss_sea_distance", "loss_sea_localization"]
    for actual, plain, weight, want in zip(losses.values(), distiller.unweighted, (0.5, 2.0, 3.0), weighted):
        torch.testing.assert_close(actual, want)
        torch.testing.assert_close(plain * weight, want.detach())
        assert not plain.requires_grad
    for name, x in gradients(student).items():
        torch.testing.assert_close(found[name], x)


def test_an_entry_may_name_a_module_for_every_level():
    """As in YOLO: an entry names a module for every level."""

    class PerLevel(Toy):
        def __init__(self):
            super().__init__()
            self.towers = nn.ModuleList(copy.deepcopy(self.head.box_tower) for _ in STRIDES)

        def forward(self, images):
            return {"loss": sum(tower(x).mean() for tower, x in zip(self.towers, self.features(images)))}

    student, teacher = PerLevel(), PerLevel()
    names = tuple(f"towers.{i}.0" for i in range(3))
    distiller = distill(student, teacher, dataclasses.replace(TAPS, cls=(names,), box=(names,)))
    student(IMAGES)
    captured = distiller.capture(BOXES, LABELS)
    assert [tuple(x.shape[2:]) for x in captured.student_cls[0]] == [(8, 12), (4, 6), (2, 3)]
    distiller = distill(student, teacher, dataclasses.replace(TAPS, cls=(names[:2],), box=(names,)))
    student(IMAGES)
    with pytest.raises(ValueError, match=r"gave 2 maps in a forward; expected 3"):
        distiller.losses(BOXES, LABELS)


def test_packed_boxes_in_another_format():
    student, teacher = pair()
    distiller = distill(student, teacher)
    truth = {"batch_index": torch.tensor([0, 0, 1]), "labels": torch.cat(LABELS)}
    first, end = torch.cat(BOXES).split(2, dim=1)
    xywh = torch.cat([first, end - first], 1)
    ignore = torch.tensor([[0.0, 0.0, 40.0, 30.0]])
    size, sizes = torch.tensor([96.0, 64.0, 96.0, 64.0]), [(60, 96), (64, 50)]
    own = torch.tensor([[96.0, 60.0, 96.0, 60.0]] * 2 + [[50.0, 64.0, 50.0, 64.0]])
    for boxes, form in (
        (torch.cat(BOXES), {}),
        (xywh, {"box_format": "xywh"}),
        (xywh / size, {"box_format": "xywh", "normalized": True}),
        (xywh / own, {"box_format": "xywh", "normalized": True, "image_sizes": sizes}),
    ):
        student(IMAGES)
        found = distiller.capture(boxes, **truth, **form).regions
        want = sk.Regions.from_boxes(
            BOXES, LABELS, found.level_shapes, STRIDES, num_classes=4, image_sizes=form.get("image_sizes")
        )
        assert_same_regions(found, want)
    student(IMAGES)
    crowd = {"ignore_boxes": ignore, "ignore_batch_index": torch.tensor([1])}
    found = distiller.capture(torch.cat(BOXES), **truth, **crowd).regions
    want = sk.Regions.from_boxes(
        BOXES, LABELS, found.level_shapes, STRIDES, num_classes=4, ignore_boxes=[ignore[:0], ignore]
    )
    assert_same_regions(found, want)
    student(IMAGES)
    assert value(distiller.losses(torch.cat(BOXES), **truth, **crowd)) > 0
    for form in ({"batch_index": truth["batch_index"]}, {"box_format": "xywh"}, {"normalized": True}):
        student(IMAGES)
        with pytest.raises(ValueError, match="boxes is None; expected them beside batch_index, box_format or normal"):
            distiller.losses(**form)


class Ladder(Toy):
    """Levels of 8, 16 and 24 channels (times width), each from a module of its own, in a backbone that takes a mask."""

    class Backbone(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.levels = nn.ModuleList(nn.Conv2d(3, 8 * (i + 1) * width, s, s) for i, s in enumerate(STRIDES))

        def forward(self, images, mask=None, *, scale=1.0):
            images = images * scale if mask is None else images * scale * mask
            return {"maps": [level(images) for level in self.levels], "images": images}

    def __init__(self, width=1, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.backbone, self.seen = self.Backbone(width), []

    def forward(self, images, *others, **options):
        self.seen.append((others, options))
        return {"loss": sum(x.square().mean() for x in self.backbone(images, *others, **options)["maps"])}


NECK = tuple(f"backbone.levels.{i}" for i in range(3))


def test_channels_that_differ_from_level_to_level_have_adapters_of_their_own():
    student, teacher = Ladder(), Ladder(width=2, seed=1)
    taps = dataclasses.replace(TAPS, cls=(NECK,), box=(NECK,), anchor_on_box=False)
    distiller = distill(student, teacher, taps)
    assert [x.weight.shape[:2] for x in distiller.adapters["cls_0"]] == [(16, 8), (32, 16), (48, 24)]
    student(IMAGES)
    losses = distiller.losses(BOXES, LABELS)
    sum(losses.values()).backward()
    assert all(p.grad.abs().max() > 0 for p in [*student.backbone.parameters(), *distiller.parameters()])
    twin = distill(Ladder(), teacher, taps, channels=(((8, 16, 24), (16, 32, 24)), (8, 8)))
    assert list(twin.adapters) == ["cls_0"] and isinstance(twin.adapters["cls_0"][2], nn.Identity)
    with pytest.raises(ValueError, match=r"channels are \[8, 16\] for the student and \[1, 2, 3\] for the teacher"):
        distill(Ladder(), teacher, taps, channels=(((8, 16), (1, 2, 3)), (8, 8)))
    short = distill(student, teacher, taps, channels=(((8, 16), (16, 32)), (8, 8)))
    student(IMAGES)
    with pytest.raises(ValueError, match="there are 3 maps; expected 2, as channels= has for each level"):
        short.losses(BOXES, LABELS)


def test_a_selector_takes_the_maps_out_of_an_output():
    select = sk.taps.Select("backbone", lambda output, size: output["maps"] if size == (64, 96) else None)
    student, teacher = Ladder(), Ladder(seed=1)
    taps = dataclasses.replace(TAPS, cls=(NECK,), box=(NECK,), channels=(8, 16, 24))
    found = []
    for entry in (NECK, select):
        with distill(student, teacher, dataclasses.replace(taps, cls=(entry,), box=(entry,))) as distiller:
            student(IMAGES)
            found.append(value(distiller.losses(BOXES, LABELS)))
    assert found[0] == found[1] > 0
    taps = dataclasses.replace(taps, cls=("backbone",), box=("backbone",))
    distiller = distill(student, teacher, taps)
    student(IMAGES)
    with pytest.raises(
        ValueError, match=r"'backbone' gave a list; expected maps .B, C, H, W., or an entry sea_kernels"
    ):
        distiller.losses(BOXES, LABELS)


class Tokens(Toy):
    """As a transformer: a class token, then the pixels of two levels."""

    def __init__(self, seed=0):
        super().__init__(seed=seed)
        self.encoder, self.first = nn.Linear(8, 12), nn.Parameter(torch.zeros(1, 1, 8))

    def forward(self, images):
        levels = [x.flatten(2).mT for x in self.features(images)[:2]]
        return {"loss": self.encoder(torch.cat([self.first.expand(len(images), -1, -1), *levels], 1)).square().mean()}


def test_tokens_are_maps():
    student, teacher = Tokens(), Tokens(1)
    entry = sk.taps.Select("encoder", sk.taps.tokens(8, 16, skip=1))
    taps = dataclasses.replace(TAPS, cls=(entry,), box=(entry,), strides=(8, 16), channels=12)
    distiller = distill(student, teacher, taps)
    student(IMAGES)
    captured = distiller.capture(BOXES, LABELS)
    for x, y in zip(captured.student_cls[0], student.features(IMAGES)):
        torch.testing.assert_close(x, student.encoder(y.movedim(1, -1)).movedim(-1, 1))
    student(IMAGES)
    sum(distiller.losses(BOXES, LABELS).values()).backward()
    assert student.encoder.weight.grad.abs().max() > 0
    entry = sk.taps.Select("encoder", sk.taps.tokens(8, 16))
    distiller = distill(student, teacher, dataclasses.replace(taps, cls=(entry,), box=(entry,)))
    student(IMAGES)
    with pytest.raises(
        ValueError, match=r"has shape \(2, 121, 12\); expected tokens \[B, 120, C\]: 0 to skip, then.*8 x 12"
    ):
        distiller.losses(BOXES, LABELS)


@pytest.mark.parametrize("branch", ["cls", "box"])
def test_a_branch_may_have_no_maps(branch):
    student, teacher = pair()
    losses = {}
    for taps in (TAPS, dataclasses.replace(TAPS, **{branch: ()}, anchor_on_box=False)):
        for weights in ((1, 1, 1), "auto"):
            student.zero_grad()
            distiller = distill(student.eval(), teacher, taps, weights=weights)
            for _ in range(3):
                own = student(IMAGES)["loss"]
                found = distiller.losses(BOXES, LABELS)
                (own + sum(found.values())).backward()
            losses[bool(getattr(taps, branch)), weights] = [x.item() for x in distiller.unweighted]
            distiller.close()
    both, one = losses[True, (1, 1, 1)], losses[False, (1, 1, 1)]
    assert one == losses[False, "auto"]
    assert one == ([0, 0, both[2]] if branch == "cls" else [one[0], both[1], 0]) and both[0] >= one[0]


def test_a_bare_name_is_one_entry():
    taps = sk.taps.Taps("head.cls_tower.1", ["head.box_tower.1"], STRIDES)
    assert taps.cls == ("head.cls_tower.1",) and taps.box == ("head.box_tower.1",)


def test_names_of_levels_that_stand_as_sets():
    refused(
        r"'backbone.levels.0' gave 1 maps in a forward; expected 3 \(one set of maps, with a module for each level: ",
        taps=dataclasses.replace(TAPS, cls=NECK), models=(Ladder(), Ladder(seed=1)), channels=((8, 8), (8, 8)),
    )  # fmt: skip


def test_the_teacher_gets_all_that_the_tapped_module_got():
    student, teacher = Ladder(), Ladder(seed=1)
    taps = dataclasses.replace(TAPS, cls=(NECK,), box=(NECK,))
    mask, got = torch.ones(1, 1, 64, 96), []
    run = lambda model, images, *others, **options: got.append((others, options)) or model(images)  # noqa: E731
    for runs in (None, run, lambda model, images, mask=None: got.append(mask) or model(images)):
        distiller = distill(student, teacher, taps, teacher_taps=dataclasses.replace(taps, run=runs))
        student(IMAGES, mask, scale=2.0)
        distiller.losses(BOXES, LABELS)
        distiller.close()
    assert teacher.seen[0][0][0] is got[0][0][0] is mask and teacher.seen[0][1] == got[0][1] == {"scale": 2.0}
    assert got[1] is None and teacher.seen[1] == ((), {})  # what has a default may hold something else


def test_image_sizes_ignore_boxes_and_masks_reach_the_regions():
    student, teacher = pair()
    distiller = distill(student, teacher, center_ratio=0.25)
    student(IMAGES)
    sizes, ignore = [(60, 96), (64, 50)], [torch.zeros(0, 4), torch.tensor([[0.0, 0.0, 40.0, 30.0]])]
    regions = distiller.capture(BOXES, LABELS, sizes, ignore).regions
    options = {"num_classes": 4, "center_ratio": 0.25}
    shapes = regions.level_shapes
    want = sk.Regions.from_boxes(BOXES, LABELS, shapes, STRIDES, image_sizes=sizes, ignore_boxes=ignore, **options)
    for actual, expected in zip(regions.tensors(), want.tensors()):
        assert torch.equal(actual, expected)
    student(IMAGES)
    masks = [torch.zeros(len(b), 64, 96, dtype=torch.bool) for b in BOXES]
    masks[0][:, 5:20, 30:40] = masks[1][:, 3:9, 1:9] = True
    regions = distiller.capture(labels=LABELS, masks=masks).regions
    want = sk.Regions.from_masks(masks, LABELS, shapes, STRIDES, **options)
    assert torch.equal(regions.area, want.area)


def test_teacher_is_frozen_and_no_part_of_the_distiller():
    student, teacher = pair()
    teacher.train()
    before = {n: x.clone() for n, x in teacher.state_dict().items()}
    distiller = distill(student, teacher)
    assert not teacher.training and list(distiller.parameters()) == []
    student.train()
    distiller.train()
    teacher.train()  # by a trainer that walks over everything
    student(IMAGES)
    sum(distiller.losses(BOXES, LABELS).values()).backward()
    assert not teacher.training and all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    for name, x in teacher.state_dict().items():
        assert torch.equal(x, before[name]), name
    assert set(distiller.state_dict()) == {"step"}
    distiller.to(torch.float64)
    assert next(teacher.parameters()).dtype == torch.float64  # goes where the distiller goes


def test_relu_in_place_behind_a_tapped_convolution():
    """The captured map is the convolution's, before the ReLU that overwrites it."""
    student, teacher = pair()
    distiller = distill(student, teacher, dataclasses.replace(TAPS, cls=("head.cls_tower.0",)))
    student(IMAGES)
    maps = distiller.capture(BOXES, LABELS).student_cls[0]
    with torch.no_grad():
        x = student.features(IMAGES)[0]
        torch.testing.assert_close(maps[0].detach(), student.head.cls_tower[0](x))
    assert (maps[0] < 0).any()


def test_a_norm_before_a_relu_in_place():
    student, teacher = pair()
    for model in (student, teacher):
        model.head.box_tower.insert(1, nn.GroupNorm(4, 16))
    distiller = distill(student, teacher, dataclasses.replace(TAPS, box=("head.box_tower.1",)))
    student(IMAGES)
    assert (distiller.capture(BOXES, LABELS).student_box[0][0] < 0).any()


class Listed(Toy):
    """Its neck gives all levels at once, and somebody overwrites one, or the input."""

    def __init__(self, overwrite=None):
        super().__init__()
        self.neck, self.overwrite = nn.Identity(), overwrite

    def forward(self, images):
        images = images.clone()
        levels = self.neck(self.features(images))
        if self.overwrite is not None:
            (images if self.overwrite == "input" else levels[1]).mul_(0.5)
        return {"loss": self.head(levels)}


def test_a_module_may_give_all_levels_at_once():
    student, teacher = Listed(), Listed()
    distiller = distill(student, teacher, dataclasses.replace(TAPS, cls=("neck",)), channels=((8, 8), (16, 16)))
    student(IMAGES)
    assert [tuple(x.shape[2:]) for x in distiller.capture(BOXES, LABELS).student_cls[0]] == [(8, 12), (4, 6), (2, 3)]


@pytest.mark.parametrize(("overwrite", "what"), [("input", "input of 'backbone'"), ("levels", "map of 'neck'")])
def test_overwritten_input_or_list_is_an_error(overwrite, what):
    student, teacher = Listed(overwrite), Listed()
    distiller = distill(student, teacher, dataclasses.replace(TAPS, cls=("neck",)), channels=((8, 8), (16, 16)))
    student(IMAGES)
    with pytest.raises(RuntimeError, match=f"the student's {what} was overwritten"):
        distiller.losses(BOXES, LABELS)


def test_overwritten_map_is_an_error():
    student, teacher = pair()
    student.head.cls_tower[1].inplace = False
    student.head.cls_tower.insert(2, nn.Hardtanh(-1, 1, inplace=True))
    taps = dataclasses.replace(TAPS, cls=("head.cls_tower.1",))
    distiller = distill(student, teacher, taps)
    student(IMAGES)
    with pytest.raises(RuntimeError, match=r"map of 'head.cls_tower.1' was overwritten"):
        distiller.losses(BOXES, LABELS)


# --------------------------------------------------------------------------------------- what trainers do to a student


def test_gradient_accumulation_equals_the_sum_of_its_parts():
    student, teacher = pair()
    student.eval()  # the same norms for both
    distiller, parts = distill(student, teacher), []
    for seed in (0, 1):
        images, boxes, labels = batch(seed)
        student(images)
        sum(distiller.losses(boxes, labels).values()).backward()
        parts.append(gradients(student))
    student.zero_grad()
    images, boxes, labels = batch(1)
    student(images)
    sum(distiller.losses(boxes, labels).values()).backward()
    for name, x in gradients(student).items():
        torch.testing.assert_close(parts[1][name], parts[0][name] + x)


def test_evaluation_between_forward_and_losses_keeps_nothing():
    student, teacher = pair()
    distiller = distill(student, teacher)
    with torch.no_grad():
        student(IMAGES)
    assert not distiller._recorders[0].fired
    with pytest.raises(RuntimeError, match="has not run since the last losses"):
        distiller.losses(BOXES, LABELS)


def test_only_the_last_forward_counts():
    student, teacher = pair()
    student.eval()
    distiller = distill(student, teacher)
    student(IMAGES)
    want = value(distiller.losses(BOXES, LABELS))
    student(batch(5)[0])
    student.features(batch(6)[0])  # a forward that ended half-way
    student(IMAGES)
    student.head.cls_tower(torch.zeros(1, 8, 4, 4))  # a module called by somebody else
    assert value(distiller.losses(BOXES, LABELS)) == want


class Checkpointed(Toy):
    def __init__(self, **options):
        super().__init__()
        self.options = options

    def forward(self, images):
        return {"loss": checkpoint(self.head, self.features(images), **self.options)}


def test_checkpoint_fires_twice_and_counts_once():
    student, teacher = Checkpointed(use_reentrant=False).train(), pair()[1]
    distiller = distill(student, teacher)
    results = []
    for _ in range(2):
        student.zero_grad()
        own = student(IMAGES)["loss"]
        losses = distiller.losses(BOXES, LABELS)
        (own + sum(losses.values())).backward()
        results.append(value(losses))
        assert not distiller._recorders[0].fired
    plain = Toy().train()
    torch.testing.assert_close(results[0], 0.02 * sum(by_hand(plain, teacher)).item())


def test_reentrant_checkpoint_is_an_error():
    student, teacher = Checkpointed(use_reentrant=True).train(), pair()[1]
    distiller = distill(student, teacher)
    student(IMAGES)
    with pytest.raises(RuntimeError, match=r"'head.cls_tower.1' has no graph.*use_reentrant=False"):
        distiller.losses(BOXES, LABELS)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copy_of_the_student_takes_nothing_along(clone):
    """As an EMA makes it: neither the teacher is copied, nor is what the copy computes recorded."""
    student, teacher = pair()
    distiller = distill(student, teacher)
    gc.collect()
    before = sum(type(x) is Toy for x in gc.get_objects())
    twin = clone(student)
    assert sum(type(x) is Toy for x in gc.get_objects()) == before + 1
    student.eval(), twin.eval()
    student(IMAGES)
    want = value(distiller.losses(BOXES, LABELS))
    student(IMAGES)
    twin(batch(3)[0])
    assert value(distiller.losses(BOXES, LABELS)) == want


def test_copy_of_a_model_that_holds_a_distiller_shares_the_teacher():
    student, teacher = pair(width=24)
    both = nn.ModuleDict({"student": student, "distiller": distill(student, teacher)})
    twin = copy.deepcopy(both)
    assert twin["distiller"].teacher is teacher
    assert twin["distiller"].student is twin["student"] is not student
    assert twin["distiller"].adapters["cls_0"] is not both["distiller"].adapters["cls_0"]
    twin["student"](IMAGES)
    assert not both["distiller"]._recorders[0].fired and not twin["distiller"]._recorders[0].fired


def _hooks(model):
    tables = ("_forward_hooks", "_forward_pre_hooks")
    return [h for m in model.modules() for table in tables for h in getattr(m, table).values()]


def test_close_and_context_manager_remove_the_hooks():
    student, teacher = pair()
    with distill(student, teacher):
        assert _hooks(student) and _hooks(teacher)
    assert not _hooks(student) and not _hooks(teacher)


def test_a_forgotten_distiller_is_freed():
    """And its teacher, which the student's hooks do not hold."""
    student, teacher = pair()
    distiller, kept = weakref.ref(distill(student, teacher)), weakref.ref(teacher)
    student(IMAGES)
    del teacher
    gc.collect()
    assert distiller() is None and kept() is None
    student(IMAGES)  # its hooks hold nothing and do nothing


def test_maps_are_not_kept_after_the_step():
    student, teacher = pair()
    distiller = distill(student, teacher)
    student(IMAGES)
    kept = weakref.ref(distiller._recorders[0].fired["head.cls_tower.1"][0])
    sum(distiller.losses(BOXES, LABELS).values()).backward()
    gc.collect()
    assert kept() is None
    for recorder in distiller._recorders:
        assert not (recorder.fired or recorder.versions or recorder.open) and recorder.images is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_a_scaler(device, dtype):
    student, teacher = (m.to(device) for m in pair())
    images, boxes, labels = IMAGES.to(device), [b.to(device) for b in BOXES], [x.to(device) for x in LABELS]
    distiller = distill(student, teacher)
    student(images)
    exact = distiller.losses(boxes, labels)
    scaler = torch.amp.GradScaler(device, init_scale=256.0)
    with torch.autocast(device, dtype):
        own = student(images)["loss"]
        losses = distiller.losses(boxes, labels)
    assert student.head.predict.weight.dtype == torch.float32
    for name, x in losses.items():
        assert x.dtype == torch.float32
        torch.testing.assert_close(x, exact[name], rtol=0.05, atol=1e-3)
    scaler.scale(own + sum(losses.values())).backward()
    assert all(x.isfinite().all() for x in gradients(student).values())


def test_a_batch_that_was_made_under_inference_mode():
    """Its tensors have no version, and none of them can be kept for backward."""
    student, teacher = pair()
    student.backbone.requires_grad_(False)  # or the student itself would need the images in backward
    distiller, found = distill(student, teacher), []
    with torch.inference_mode():
        made = batch()
    for images, boxes, labels in (batch(), made):
        student(images)
        losses = distiller.losses(boxes, labels)
        sum(losses.values()).backward()
        found.append(value(losses))
    assert found[0] == found[1]


@pytest.mark.skipif(not CUDA, reason=NO_CUDA)
@pytest.mark.parametrize("weights", ["auto", (1, 1, 1)])
def test_a_step_on_a_gpu_does_not_synchronize(weights):
    """Nor do those that measure the weights and report them."""
    student, teacher = (m.cuda() for m in pair(width=24))
    images, boxes, labels = IMAGES.cuda(), [b.cuda() for b in BOXES], [x.cuda() for x in LABELS]
    distiller = distill(student, teacher, weights=weights)
    for mode in ("default", "error"):  # once to warm up
        distiller.weights = weights  # measures again
        torch.cuda.set_sync_debug_mode(mode)
        try:
            for _ in range(20):
                own = student(images)["loss"]
                losses = distiller.losses(boxes, labels, image_sizes=[(60, 96), (64, 50)])
                (own + sum(losses.values())).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.compile
@pytest.mark.parametrize("hooked", [["student"], ["compiled"], ["student", "compiled"]], ids="-".join)
def test_a_compiled_student_is_one_graph(hooked):
    """The hooks are traced: one graph, the same losses, no second compilation; over a compiled model too."""
    if len(hooked) == 2 and TorchVersion(torch.__version__) < (2, 13):
        pytest.skip("two distillers on one compiled student: torch 2.11 fails to compile it")
    student, teacher = pair()
    with distill(student, teacher) as distiller:
        student(IMAGES)
        want = value(distiller.losses(BOXES, LABELS))
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    models = {"student": student, "compiled": torch.compile(student, fullgraph=True, backend=counter)}
    distillers = [distill(models[name], teacher, TAPS) for name in hooked]  # before its first call
    for _ in range(3):
        student.zero_grad()
        models["compiled"](IMAGES)
        for distiller in distillers:
            losses = distiller.losses(BOXES, LABELS)
            torch.testing.assert_close(value(losses), want)
        sum(losses.values()).backward()
        assert student.backbone[0].weight.grad.abs().max() > 0
    assert counter.frame_count == 1

    @torch.compile(backend=counter)
    def step(images):
        return student(images)["loss"] + sum(distiller.losses(BOXES, LABELS).values())

    counts = []
    for _ in range(12):  # steps are counted without compiling anew
        step(IMAGES)
        counts.append(counter.frame_count)
    assert counts[1] == counts[-1]
    assert all(d.student is student for d in distillers)
    assert not any(n.startswith("_orig") for n in distiller.student_state_dict())


def _data_parallel(rank, _group, _meeting):
    wrap = nn.parallel.DistributedDataParallel
    student, teacher = pair(width=24)
    ddp = wrap(student)
    own_distiller = distill(ddp, teacher, TAPS, schedule=sk.Schedule(stop=3))
    distiller = wrap(own_distiller)  # it has adapters
    optimizer = torch.optim.SGD([*ddp.parameters(), *distiller.parameters()], 0.01)
    for step in range(4):
        images, boxes, labels = batch(10 * step + rank)
        losses = ddp(images) | distiller(boxes, labels)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    return {"student": own_distiller.student_state_dict(), "adapters": own_distiller.adapters.state_dict()}


@pytest.mark.processes
def test_two_processes_end_with_the_same_weights(tmp_path):
    """Two processes with other images end with the same weights of student and adapters, which have moved."""
    first, second = Meeting(tmp_path, 2).spawn(_data_parallel)
    begun = {"student": Toy().state_dict(), "adapters": distill(*pair(width=24), TAPS).adapters.state_dict()}
    for part in first:
        trained = {n: x for n, x in first[part].items() if not ("running" in n or "num_batches" in n)}
        assert trained and set(first[part]) == set(begun[part])
        for name, x in trained.items():
            torch.testing.assert_close(x, second[part][name])
        assert any(not torch.equal(x, begun[part][n]) for n, x in trained.items()), part


# --------------------------------------------------------------------------------- other widths, other strides, weights


def test_adapters_bring_the_student_to_the_teachers_width():
    student, teacher = pair(width=24)
    distiller = distill(student, teacher)
    assert len(distiller.adapters) == 3
    assert all(a.weight.shape == (24, 16, 1, 1) for a in distiller.adapters.values())
    student(IMAGES)
    sum(distiller.losses(BOXES, LABELS).values()).backward()
    assert all(p.grad.abs().max() > 0 for p in distiller.parameters())
    assert student.backbone[0].weight.grad.abs().max() > 0
    assert set(distiller.student_state_dict()) == set(student.state_dict())


def test_channels_can_be_told():
    student, teacher = pair(width=24)
    distiller = distill(student, teacher, channels=((16, 24), (16, 24)))
    assert len(distiller.adapters) == 3
    distiller = distill(student, teacher, channels=((16, 16), (16, 16)))
    student(IMAGES)
    with pytest.raises(ValueError, match=r"level 0 for 'head.cls_tower.1' has batch size and channels \(2, 24\)"):
        distiller.losses(BOXES, LABELS)


def test_teacher_of_another_stride_is_resampled_and_said_once(caplog):
    student, teacher = pair(stride=4)
    distiller = distill(student, teacher)
    with caplog.at_level(logging.WARNING, "sea_kernels"):
        for _ in range(2):
            student(IMAGES)
            assert all(x.isfinite() for x in distiller.losses(BOXES, LABELS).values())
    assert [r.args[0] for r in caplog.records] == ["head.cls_tower.1", "head.cls_tower.3", "head.box_tower.1"]
    student(IMAGES)
    captured = distiller.capture(BOXES, LABELS)
    with torch.no_grad():
        own = teacher.head.box_tower(teacher.features(IMAGES)[0])
        want = nn.functional.interpolate(own, size=(8, 12), mode="bilinear", align_corners=False)
    torch.testing.assert_close(captured.teacher_box[0][0], want)


def test_teacher_with_modules_of_other_names():
    student, teacher = pair()
    student.eval()
    distiller = distill(student, teacher)
    student(IMAGES)
    want = value(distiller.losses(BOXES, LABELS))
    teacher.other = teacher.head
    del teacher.head
    theirs = dataclasses.replace(
        TAPS,
        cls=tuple(name.replace("head", "other") for name in TAPS.cls),
        box=("other.box_tower.1",),
        run=lambda model, x: model.other(model.features(x)),
    )
    distiller = distill(student, teacher, teacher_taps=theirs)
    student(IMAGES)
    assert value(distiller.losses(BOXES, LABELS)) == want


class Given(Toy):
    """Shows its ground truth to a module."""

    def __init__(self):
        super().__init__()
        self.truth = nn.Identity()

    def forward(self, images):
        self.truth((BOXES, LABELS))
        return super().forward(images)


def test_targets_that_the_taps_see_give_way_to_those_given():
    sizes, student, teacher = [(60, 96), (64, 50)], Given(), Given()
    taps = dataclasses.replace(
        TAPS, targets="truth", read_targets=lambda output, with_masks: sk.taps.Targets(*output, sizes)
    )
    distiller = distill(student, teacher, taps)
    others = [torch.tensor([0, 2]), torch.tensor([3])]
    for given, labels in (((), LABELS), ((BOXES, others), others)):
        student(IMAGES)
        found = distiller.capture(*given).regions
        want = sk.Regions.from_boxes(BOXES, labels, found.level_shapes, STRIDES, image_sizes=sizes, num_classes=4)
        assert all(torch.equal(a, b) for a, b in zip(found.tensors(), want.tensors()))
    student(IMAGES)
    with pytest.raises(ValueError, match="labels not given; expected one tensor for each image beside boxes"):
        distiller.losses(BOXES)


def test_the_teacher_may_be_given_an_input_of_its_own():
    student, teacher = pair()
    distiller = distill(student, teacher)
    student(IMAGES)
    plain = value(distiller.losses(BOXES, LABELS))
    student(IMAGES)
    assert value(distiller.losses(BOXES, LABELS, teacher_input=2 * IMAGES + 1)) != plain


def test_a_schedule_warms_up_decays_and_stops():
    schedule = sk.Schedule(warmup=4, decay=6, stop=10)
    assert [schedule(s) for s in range(12)] == [0.25, 0.5, 0.75, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0, 0]
    assert [sk.Schedule(stop=2)(s) for s in range(4)] == [1, 1, 0, 0] and sk.Schedule()(10**9) == 1
    with pytest.raises(ValueError, match="decay is 5 with stop=5"):
        sk.Schedule(decay=5, stop=5)
    with pytest.raises(ValueError, match="warmup is -3; expected a number of steps"):
        sk.Schedule(warmup=-3)


def test_schedule_scales_the_losses_and_stops_the_teacher():
    student, teacher = pair(width=24)
    distiller = distill(student, teacher, schedule=sk.Schedule(warmup=2, stop=2))
    student.eval()
    student(IMAGES)
    half = value(distiller.losses(BOXES, LABELS))
    student(IMAGES)
    torch.testing.assert_close(2 * half, value(distiller.losses(BOXES, LABELS)))
    calls = []
    teacher.register_forward_hook(lambda *_: calls.append(1))
    student(IMAGES)
    losses = distiller.losses(BOXES, LABELS)
    assert value(losses) == 0 and not calls and not distiller._recorders[0].fired
    sum(losses.values()).backward()  # DDP waits for every adapter
    assert all(p.grad is not None for p in distiller.parameters())
    twin = distill(student, teacher)
    twin.load_state_dict(distiller.state_dict())
    assert twin.step == 3


# ------------------------------------------------------------------------------------------------- copies and dtypes


def test_a_copy_between_forward_and_losses_takes_no_maps_along():
    student, teacher = pair()
    distiller = distill(student, teacher)
    student(IMAGES)  # what it recorded has a graph, which cannot be copied
    copied = copy.deepcopy(nn.ModuleDict({"student": student, "distiller": distiller}))
    assert not copied["distiller"]._recorders[0].fired
    losses = distiller.losses(BOXES, LABELS)
    expected = by_hand(student, teacher)
    assert value(losses) == pytest.approx(0.02 * sum(expected).item(), rel=1e-4)


def test_emptied_modules_keep_the_teacher_and_the_step():
    """As after `meta`, where the adapters get memory and values later."""
    student, teacher = pair(width=24)
    with torch.device("meta"):
        student = Toy()
    distiller, before = distill(student, teacher), copy.deepcopy(teacher.state_dict())
    assert next(distiller.parameters()).is_meta
    distiller.step = 5
    distiller.to_empty(device="cpu")
    assert all(torch.equal(x, before[name]) for name, x in teacher.state_dict().items())
    assert not next(distiller.parameters()).is_meta and distiller.step == 5
    distiller.half()
    assert distiller.state_dict()["step"] == 5 and next(teacher.parameters()).dtype == torch.float16


# ----------------------------------------------------------------------------------------------- mistakes that are told


def warnings_of(caplog, student, teacher, steps, optimized):
    distiller = distill(student, teacher)
    optimizer = torch.optim.SGD([*student.parameters(), *(distiller.parameters() if optimized else ())], 1e-3)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "sea_kernels"):
        for _ in range(steps):
            student(IMAGES)
            optimizer.zero_grad()
            sum(distiller.losses(BOXES, LABELS).values()).backward()
            optimizer.step()
    return [r.getMessage() for r in caplog.records if "times as hard" not in r.getMessage()]


def test_adapters_that_no_optimizer_moves_are_told_once(caplog):
    wanted = ["no optimizer has moved the adapters in 100 steps: pass it distiller.parameters() too"]
    assert warnings_of(caplog, *pair(24), 100, optimized=False) == []
    assert warnings_of(caplog, *pair(24), 102, optimized=False) == wanted
    assert warnings_of(caplog, *pair(24), 102, optimized=True) == warnings_of(caplog, *pair(16), 102, False) == []


def test_losses_in_evaluation_are_told_once(caplog):
    student, teacher = pair()
    (said,) = warnings_of(caplog, student.eval(), teacher, 3, optimized=True)
    assert said.startswith("losses() while the student is in evaluation mode")


def test_copies_can_be_copied_and_pickled():
    distiller = distill(*pair(width=24), TAPS)
    distiller.step = 7
    for twin in (copy.deepcopy(copy.deepcopy(distiller)), pickle.loads(pickle.dumps(copy.deepcopy(distiller)))):
        assert twin.step == 7 and all(map(torch.equal, twin.state_dict().values(), distiller.state_dict().values()))


@pytest.mark.parametrize("width", [16, 24], ids=["without adapters", "adapters"])
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.float64)])
def test_student_and_teacher_of_two_dtypes(dtypes, width):
    """Each computes in its own dtype, as do the adapters, which the student's was when they were made."""
    student, teacher = pair(width=width)
    student.eval()
    distiller = distill(student, teacher)
    student(IMAGES)
    expected = distiller.losses(BOXES, LABELS)
    student.to(dtypes[0]), teacher.to(dtypes[1])
    student(IMAGES.to(dtypes[0]))
    losses = distiller.losses(BOXES, LABELS)
    for name, x in losses.items():
        assert x.item() == pytest.approx(expected[name].item(), rel=0.1), name
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in student.head.cls_tower.parameters())


# ------------------------------------------------------------------------------------------------------- bad input


def refused(match, kind=ValueError, run=True, taps=TAPS, losses=(BOXES, LABELS), models=None, **options):
    student, teacher = models or pair()
    with pytest.raises(kind, match=match):
        distiller = distill(student, teacher, taps, **options)
        if run:
            student(IMAGES)
        distiller.losses(*losses)


def test_bad_input_is_refused():
    replace = dataclasses.replace
    refused("has not run since the last losses", RuntimeError, run=False)
    refused("boxes and labels not given; expected them in losses.*the taps name no module", losses=())
    refused("labels not given", losses=(BOXES,))
    refused("student's taps name the module 'head.conv', which Toy lacks", taps=replace(TAPS, cls=("head.conv",)))
    refused("student's taps name the module 'stem', which Toy lacks", taps=replace(TAPS, input="stem"))
    refused(
        r"'head.cls_tower.1' gave 3 maps in a forward; expected 5", taps=replace(TAPS, strides=(8, 16, 32, 64, 128))
    )
    refused("'backbone.0' gave 1 maps in a forward; expected 3", taps=replace(TAPS, box=("backbone.0",)))
    refused("the taps name no module, neither for cls nor for box", taps=replace(TAPS, cls=(), box=()))
    refused("num_classes is None", taps=replace(TAPS, num_classes=None))
    refused("teacher's taps name 1 modules for cls", teacher_taps=replace(TAPS, cls=("head.cls_tower.1",)))
    refused("no ready taps for toy_detector.Toy", TypeError, taps=None)
    refused("weights is .1, 2.; expected 'auto', or three numbers", weights=(1, 2))
    refused("weights is 0.1; expected 'auto', or three numbers", weights=0.1)
    refused("weights is 'none'; expected 'auto', or three", weights="none")
    refused("share is .0.1, nan, 1.; expected a number, or three numbers", share=(0.1, math.nan, 1))
    refused("share is -1; expected numbers that are not negative", share=-1)
    refused("channels is ..16, 24.,.; expected", channels=((16, 24),))
    refused("labels.0..1. is 3; expected -1 <= label < 2", num_classes=2)
    with pytest.raises(ValueError, match="teacher is the student itself"):
        distill(*[pair()[0]] * 2, TAPS)
    with pytest.raises(TypeError, match=r"teacher is a str; expected a torch\.nn\.Module"):
        distill(pair()[0], "teacher.pth", TAPS)


def test_models_that_cannot_go_together_are_refused():
    student, teacher = pair()
    teacher.backbone = student.backbone
    with pytest.raises(ValueError, match=r"teacher shares 'backbone.0.weight' with the student"):
        distill(student, teacher)
    distiller = distill(student, Toy().to("meta"), TAPS)
    student(IMAGES)
    with pytest.raises(
        ValueError, match=r"the teacher is on meta; expected cpu, as its input \(distiller.to moves it\)"
    ):
        distiller.losses(BOXES, LABELS)
    distiller.close()
    with pytest.raises(RuntimeError, match="the distiller is closed"):
        distiller.losses(BOXES, LABELS)


def test_teacher_that_does_not_fire_or_has_other_levels():
    student, teacher = pair()
    distiller = distill(student, teacher, dataclasses.replace(TAPS, run=lambda model, x: model.backbone(x)))
    student(IMAGES)
    with pytest.raises(
        ValueError, match=r"the teacher's module 'head.cls_tower.1' gave 0 maps in a forward; expected one per level"
    ):
        distiller.losses(BOXES, LABELS)
    run = lambda model, x: model.head(model.features(x)[:2])  # noqa: E731
    distiller = distill(student, teacher, dataclasses.replace(TAPS, run=run))
    student(IMAGES)
    with pytest.raises(
        ValueError, match=r"the teacher's module 'head.cls_tower.1' gave 2 maps in a forward; expected 3"
    ):
        distiller.losses(BOXES, LABELS)


def test_a_frozen_map_is_an_error():
    student, teacher = pair()
    student.requires_grad_(False)
    student.head.predict.requires_grad_(True)
    distiller = distill(student, teacher)
    student(IMAGES)
    with pytest.raises(RuntimeError, match=r"'head.cls_tower.1' has no graph, so its loss would teach nothing"):
        distiller.losses(BOXES, LABELS)


def test_after_an_error_the_next_step_works():
    student, teacher = pair()
    distiller = distill(student, teacher)
    student(IMAGES)
    with pytest.raises(ValueError, match="boxes and labels not given"):
        distiller.losses()
    student(IMAGES)
    assert value(distiller.losses(BOXES, LABELS)) > 0
