"""sea_kernels.taps.candidates lists the modules that compute maps, and leaves the model as it was."""

import collections
import dataclasses

import pytest
import torch
from torch import nn
from toy_detector import STRIDES, TAPS, Toy, batch

import sea_kernels as sk

IMAGES, BOXES, LABELS = batch()
LEVELS = ((8, 12), (4, 6), (2, 3))
TOWERS = [f"head.{n}" for n in ("cls_tower.0", "cls_tower.1", "cls_tower.2", "cls_tower.3", "cls_tower")]
TOWERS += [f"head.{n}" for n in ("box_tower.0", "box_tower.1", "box_tower", "predict")]


def test_modules_with_a_map_for_each_level_come_first_in_forward_order():
    found = sk.taps.candidates(Toy(), IMAGES)
    assert [x.name for x in found] == [*TOWERS, "backbone.0", "backbone.1", "backbone"]
    assert found[1] == (
        "head.cls_tower.1",
        "ReLU",
        3,
        tuple((2, 16, *hw) for hw in LEVELS),
        ((8, 8), (16, 16), (32, 32)),
    )
    assert found[-3] == ("backbone.0", "Conv2d", 1, ((2, 8, 8, 12),), ((8, 8),))


def test_the_table():
    head, *rows = repr(sk.taps.candidates(Toy(), IMAGES[:, :, :, :90])).splitlines()
    assert head == "module            class        calls  C x H x W of each map  strides"
    assert rows[1] == "head.cls_tower.1  ReLU         3      16x8x11 16x4x6 16x2x3  8x8.182 16x15 32x30"
    assert rows[-1] == "backbone          Sequential   1      8x8x11                 8x8.182" and len(rows) == 12


def test_the_table_cuts_a_row_of_more_than_eight_maps():
    """As YOLO11's one activation, which all its blocks share: 77 calls."""
    for calls, end in ((8, ""), (9, " ...")):
        (found,) = table = sk.taps.candidates(Around(Pyramid(lambda maps: maps[1])), IMAGES, again=calls - 1)
        assert len(found.shapes) == calls
        row = f"inner   Pyramid  {calls}      {' '.join(['3x8x12'] * 8)}{end}  {' '.join(['8'] * 8)}{end}"
        assert repr(table).splitlines()[1] == row


def test_what_it_finds_serves_as_taps():
    student, teacher = Toy(), Toy(seed=1)
    found = {x.name: x for x in sk.taps.candidates(student, IMAGES)}
    strides = found[TAPS.cls[0]].strides
    assert [s for s, _ in strides] == list(STRIDES)
    with sk.SEADistiller(student, teacher, dataclasses.replace(TAPS, strides=strides)) as distiller:
        student(IMAGES)
        assert all(x.isfinite() for x in distiller.losses(BOXES, LABELS).values())


@dataclasses.dataclass
class Fields:
    maps: list
    scores: torch.Tensor


@dataclasses.dataclass
class Slots:
    __slots__ = ("maps",)
    maps: tuple


class ModelOutput(collections.OrderedDict):
    """As in transformers, where it is a dataclass too."""


class Pyramid(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.wrap = wrap

    def forward(self, x):
        return self.wrap([nn.functional.avg_pool2d(x, k) for k in (4, 8, 16)])


class Around(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, images, *, again=0):
        for _ in range(again):
            self.inner(images)
        self.inner(images)


WRAPS = {
    "list": list,
    "tuple": tuple,
    "dict": lambda maps: {f"p{k}": x for k, x in enumerate(maps)},
    "dataclass": lambda maps: Fields(maps, maps[0].mean((2, 3))),
    "dataclass with slots": lambda maps: Slots(tuple(maps)),
    "ModelOutput": lambda maps: ModelOutput(features=tuple(maps), pooled=maps[0].mean((2, 3)), none=None),
    "nested": lambda maps: {"low": [{"x": maps[0]}], "high": (Slots((maps[1],)), maps[2])},
}


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_several_maps_in_one_output(wrap):
    shapes = ((2, 3, 16, 24), (2, 3, 8, 12), (2, 3, 4, 6))
    strides = ((4, 4), (8, 8), (16, 16))
    assert sk.taps.candidates(Around(Pyramid(wrap)), IMAGES) == [("inner", "Pyramid", 1, shapes, strides)]


def test_keywords_reach_the_model():
    (found,) = sk.taps.candidates(Around(Pyramid(lambda maps: maps[0])), images=IMAGES, again=2)
    assert found.calls == 3 and len(found.shapes) == len(found.strides) == 3


def test_a_shared_module_has_its_first_name_and_all_its_calls():
    model = Toy()
    model.head.box_tower = model.head.cls_tower
    found = sk.taps.candidates(model, IMAGES)
    assert found[0].name == "head.predict"  # the only one with as many sizes as maps
    assert {x.name: x.calls for x in found if "tower" in x.name} == dict.fromkeys(TOWERS[:5], 6)
    pairs = [hw for hw in LEVELS for _ in range(2)]  # both towers of a level, then the next level
    assert next(x for x in found if x.name == "head.cls_tower").shapes == tuple((2, 16, *hw) for hw in pairs)


def test_maps_of_another_batch_and_of_one_pixel_are_left_out():
    class Rois(nn.Module):
        def forward(self, x):
            return x.new_zeros(7, 8, 14, 14), x

    model = nn.Sequential(nn.Conv2d(3, 8, 8, 8), Rois(), nn.Identity())
    model[2].forward = lambda maps: nn.functional.adaptive_avg_pool2d(maps[1], 1)
    found = sk.taps.candidates(model, IMAGES)
    assert [(x.name, x.shapes) for x in found] == [("0", ((2, 8, 8, 12),)), ("1", ((2, 8, 8, 12),))]


def test_without_images_of_three_channels_strides_are_not_known():
    found = sk.taps.candidates(nn.Sequential(nn.Conv2d(1, 8, 8, 8)), IMAGES[:, :1])
    assert [(x.name, x.strides) for x in found] == [("0", ()), ("", ())]
    assert "(itself)  Sequential  1      8x8x12" in repr(found)


class Noisy(Toy):
    """Draws random numbers, and fails in its head where it is told to."""

    def __init__(self, fails=False):
        super().__init__()
        self.fails, self.seen = fails, []

    def forward(self, images):
        self.seen.append((torch.is_grad_enabled(), any(x.training for x in self.modules())))
        out = super().forward(images + torch.randn_like(images))
        if self.fails:
            raise OSError("no such head")
        return out


@pytest.mark.parametrize("fails", [False, True], ids=["returns", "raises"])
def test_the_model_stays_as_it_was(fails):
    """Modes, running statistics, gradients, random numbers; no hook stays, not even where the model raises."""
    model = Noisy(fails).train()
    model.backbone[1].eval()  # as detectors freeze their norms
    model.head.eval()
    model.head.predict.train()
    theirs = model.head.register_forward_hook(lambda *_: None)
    modes = {n: x.training for n, x in model.named_modules()}
    state = {n: x.clone() for n, x in model.state_dict().items()}
    before, grad = torch.get_rng_state(), torch.is_grad_enabled()
    if fails:
        with pytest.raises(OSError, match=r"^no such head$"):
            sk.taps.candidates(model, IMAGES)
    else:
        assert len(sk.taps.candidates(model, IMAGES)) == 12
    assert model.seen == [(False, False)]
    assert {n: x.training for n, x in model.named_modules()} == modes and torch.is_grad_enabled() == grad
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(x, state[n]) for n, x in model.state_dict().items())
    assert not any(p.grad is not None for p in model.parameters())
    hooks = [list(x._forward_hooks) for x in model.modules() if x._forward_hooks or x._forward_pre_hooks]
    assert hooks == [[theirs.id]]


def test_running_statistics_of_a_model_in_training_stay():
    model = Toy().train()
    sk.taps.candidates(model, IMAGES)
    norm = model.backbone[1]
    assert norm.training and norm.num_batches_tracked == 0 and not norm.running_mean.any()


@pytest.mark.compile
@pytest.mark.parametrize("how", ["wrapped", "in place", "a part"])
def test_a_compiled_model_runs_as_its_source(how):
    """What was compiled before does not see new hooks."""
    torch._dynamo.reset()
    model = Toy()
    want = [tuple(x) for x in sk.taps.candidates(model, IMAGES)]
    compiled = model
    if how == "wrapped":
        compiled = torch.compile(model, backend="eager")
    elif how == "in place":
        model.compile(backend="eager")
    else:
        model.head.compile(backend="eager")
    with torch.no_grad():
        compiled.eval()(IMAGES)
    assert sk.taps.candidates(compiled, IMAGES) == want


def test_a_model_in_data_parallel(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        found = sk.taps.candidates(nn.parallel.DistributedDataParallel(Toy()), IMAGES)
    finally:
        torch.distributed.destroy_process_group()
    assert found == sk.taps.candidates(Toy(), IMAGES)


def test_the_error_for_an_unknown_model_names_it():
    with pytest.raises(TypeError, match=r"sea_kernels\.taps\.candidates\(model, images\) lists$"):
        sk.taps.find(Toy())


@pytest.mark.parametrize(
    "name, hint",
    [
        ("cls_tower.1", r"; did you mean 'head\.cls_tower\.1'( or '[\w.]+')*\?$"),
        ("module.head.predict", r"; did you mean 'head\.predict'( or '[\w.]+')*\?$"),
        ("head.predict.weight", r"; did you mean 'head\.predict'\?$"),
        ("stem", "which Toy lacks$"),
    ],
)
def test_a_wrong_name_gets_near_ones(name, hint):
    with pytest.raises(ValueError, match=f"the module '{name}', which Toy lacks") as error:
        sk.SEADistiller(Toy(), Toy(), dataclasses.replace(TAPS, cls=(name,)))
    error.match(hint)
