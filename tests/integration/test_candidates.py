"""sk.taps.candidates: the modules of a detector that give maps."""

import collections
import dataclasses

import pytest
import torch
from torch import nn
from toy_detector import Toy, batch

import sea_kernels as sk
from sea_kernels.taps import candidates

IMAGES = batch()[0]
LEVELS = [(8, 12), (4, 6), (2, 3)]


def test_modules_that_fire_for_every_level_come_first():
    model = Toy().train()
    before = {n: x.clone() for n, x in model.state_dict().items()}
    model.head.cls_tower.eval()
    found = candidates(model, IMAGES)
    towers = [f"head.{tower}.{i}" for tower, count in (("cls_tower", 4), ("box_tower", 2)) for i in range(count)]
    assert {x.name for x in found[:9]} == {*towers, "head.cls_tower", "head.box_tower", "head.predict"}
    assert [x.name for x in found[9:]] == ["backbone.0", "backbone.1", "backbone"]
    assert [x.name for x in found if x.name in towers] == towers  # in the order of the forward
    tower = next(x for x in found if x.name == "head.cls_tower.1")
    assert tower == ("head.cls_tower.1", "ReLU", 3, [(16, *shape) for shape in LEVELS], [8, 16, 32])
    # and the model is as it was
    assert model.training and model.backbone.training and not model.head.cls_tower.training
    assert all(torch.equal(x, before[n]) for n, x in model.state_dict().items())
    assert not any(x._forward_hooks for x in model.modules())


@dataclasses.dataclass
class Output:
    maps: list
    extra: dict


@pytest.mark.parametrize(
    "make",
    [
        lambda maps: maps,
        lambda maps: collections.OrderedDict(zip("abc", maps)),
        lambda maps: Output(maps, {"scores": torch.zeros(2, 5), "step": 3}),
        lambda maps: [(x, None) for x in maps],
    ],
)
def test_maps_inside_of_any_output(make):
    class Neck(nn.Module):
        def forward(self, features):
            return make(features)

    model = Toy()
    model.neck = Neck()
    model.forward = lambda *, pixels: model.neck(model.features(pixels))
    (found,) = (x for x in candidates(model, pixels=IMAGES) if x.name == "neck")
    assert found == ("neck", "Neck", 1, [(8, *shape) for shape in LEVELS], [8, 16, 32])


def test_a_wrapped_model_has_the_names_of_the_bare_one():
    assert candidates(torch.compile(Toy(), backend="eager"), IMAGES) == candidates(Toy(), IMAGES)


def test_an_error_of_the_model_is_raised_and_leaves_no_hook():
    model = Toy().train()
    with pytest.raises(RuntimeError, match="channels"):
        candidates(model, torch.zeros(1, 4, 64, 64))
    assert model.training and not any(x._forward_hooks for x in model.modules())


def test_an_unknown_model_is_told_of_it():
    with pytest.raises(TypeError, match=r"which sea_kernels.taps.candidates\(model, images\) lists"):
        sk.SEADistiller(Toy(), Toy())
