"""Weights that set themselves: how hard each loss pulls at the student's maps, beside the student's own loss."""

import copy
import dataclasses
import logging
import math

import pytest
import torch
import torch._dynamo.testing
from ranks import Meeting
from torch import nn
from toy_detector import TAPS, Toy, batch

import sea_kernels as sk

IMAGES, BOXES, LABELS = batch()
FIRST = 2  # the first step that trains with our losses: 0 and 1 are measured
MAPS = {"cls": ("head.cls_tower.1", "head.cls_tower.3"), "box": ("head.box_tower.1",)}


def models(width=16):
    """The same in every step: norms do not move, and nothing is trained."""
    return Toy().eval(), Toy(width, seed=1)


def step(distiller, scale=1.0, factor=1.0):
    """The three losses of one step, and the gradients of the student: its own loss times `scale`, ours also `factor`"""
    student = distiller.student
    student.zero_grad()
    own = student(IMAGES)["loss"]
    losses = distiller.losses(BOXES, LABELS)
    (scale * (own + factor * sum(losses.values()))).backward()
    return list(losses.values()), {n: p.grad for n, p in student.named_parameters() if p.grad is not None}


def norm(gradients):
    return math.sqrt(sum(x.double().square().sum().item() for x in gradients))


def weights(distiller):
    return [float(x) for x in distiller.weights]


def expected(share=(0.3, 0.3, 0.3), anchor_on_box=True):
    """share times |gradient of the student's own loss| / |gradient of a loss at the maps that it compares|"""
    student, teacher = models()
    fired = {}
    hooks = [
        student.get_submodule(name).register_forward_hook(
            lambda _module, _args, x, name=name: fired.setdefault(name, []).append(x)
        )
        for branch in MAPS.values()
        for name in branch
    ]
    own = student(IMAGES)["loss"]
    for hook in hooks:
        hook.remove()
    maps = {branch: [fired[name] for name in names] for branch, names in MAPS.items()}
    flat = {branch: [x for sets in maps[branch] for x in sets] for branch in maps}
    leaves = {k: [[x.detach().requires_grad_() for x in sets] for sets in maps[k]] for k in maps}
    with sk.SEADistiller(student, teacher, TAPS) as distiller:
        student(IMAGES)
        captured = distiller.capture(BOXES, LABELS)
    losses = sk.sea_loss(
        leaves["cls"], captured.teacher_cls, leaves["box"], captured.teacher_box, captured.regions,
        anchor_on_box=anchor_on_box,
    )  # fmt: skip
    compared = ("cls", "box") if anchor_on_box else ("cls",), ("cls",), ("box",)
    out = []
    for part, loss, branches in zip(share, losses, compared):
        pull = torch.autograd.grad(loss, [x for b in branches for sets in leaves[b] for x in sets], retain_graph=True)
        whole = torch.autograd.grad(own, [x for b in branches for x in flat[b]], retain_graph=True)
        out.append(part * norm(whole) / norm(pull))
    return out


@pytest.mark.parametrize("share", [0.3, (1.0, 0.1, 0.0)])
@pytest.mark.parametrize("anchor_on_box", [True, False])
def test_each_loss_pulls_as_its_share_says(share, anchor_on_box):
    taps = dataclasses.replace(TAPS, anchor_on_box=anchor_on_box)
    distiller = sk.SEADistiller(*models(), taps, share=share)
    assert weights(distiller) == [0, 0, 0]
    losses, gradients = step(distiller)
    assert [x.item() for x in losses] == [0, 0, 0] and all(x > 0 for x in distiller.unweighted)
    step(distiller)
    own = Toy().eval()
    own(IMAGES)["loss"].backward()
    for name, p in own.named_parameters():  # the step that is measured trains on the student's own loss alone
        assert torch.equal(gradients[name], p.grad), name
    losses, gradients = step(distiller)
    wanted = expected(share if isinstance(share, tuple) else [share] * 3, anchor_on_box)
    assert weights(distiller) == pytest.approx(wanted, rel=1e-5)
    wanted = [w * x.item() for w, x in zip(wanted, distiller.unweighted)]
    assert [x.item() for x in losses] == pytest.approx(wanted, rel=1e-5)
    assert not torch.equal(gradients["head.cls_tower.0.weight"], own.head.cls_tower[0].weight.grad)


class Tokens(Toy):
    """As a transformer: a class token, then the pixels of two levels."""

    def __init__(self, encoder, seed=0):
        super().__init__(seed=seed)
        self.first, self.encoder = nn.Parameter(torch.zeros(1, 1, 8)), encoder()

    def forward(self, images):
        levels = [x.flatten(2).mT for x in self.features(images)[:2]]
        tokens = self.encoder(torch.cat([self.first.expand(len(images), -1, -1), *levels], 1))
        return {"loss": (tokens[0] if isinstance(tokens, list) else tokens)[:, 1:].square().mean()}


class Encoder(nn.Sequential):
    """Tokens in a list, beside a tensor that no loss sees."""

    def __init__(self):
        super().__init__(nn.Linear(8, 12))

    def forward(self, x):
        x = super().forward(x)
        return [x, 2 * x]


def test_maps_that_a_select_computes():
    """The student's own loss sees the tokens, not the maps that were made of them."""
    select = sk.taps.Select("encoder", lambda output, size: sk.taps.tokens(8, 16, skip=1)(output[0], size))
    taps = dataclasses.replace(TAPS, cls=(select,), box=(select,), strides=(8, 16), channels=12)
    student, teacher = Tokens(Encoder).eval(), Tokens(Encoder, 1)
    distiller = sk.SEADistiller(student, teacher, taps)
    for _ in range(FIRST + 1):
        step(distiller)
    seen = []
    hook = student.encoder.register_forward_hook(lambda _module, _args, output: seen.append(output[0]))
    own = student(IMAGES)["loss"]
    hook.remove()
    captured = distiller.capture(BOXES, LABELS)
    losses = sk.sea_loss(*captured)
    whole = norm(torch.autograd.grad(own, seen))
    wanted = []
    for loss, copies in zip(losses, (2, 1, 1)):  # the anchor loss compares the maps of both branches, which are one
        sets = captured.student_cls + captured.student_box
        pulls = torch.autograd.grad(loss, [x for maps in sets for x in maps], retain_graph=True, allow_unused=True)
        wanted.append(0.3 * math.sqrt(copies) * whole / norm([x for x in pulls if x is not None]))
    assert weights(distiller) == pytest.approx(wanted, rel=1e-5)


def test_what_multiplies_the_losses_is_seen():
    """Loss scaling changes nothing. Where a trainer multiplies our losses by 8, the weights are 8 times smaller."""
    distiller = sk.SEADistiller(*models(), TAPS)
    for _ in range(FIRST + 1):
        step(distiller, scale=1024.0, factor=8.0)
    assert weights(distiller) == pytest.approx([x / 8 for x in expected()], rel=1e-5)


def test_gradients_too_small_for_half_precision():
    """Only the student's own loss is scaled while it is measured."""
    found = []
    for dtype in (torch.float32, torch.float16):
        distiller = sk.SEADistiller(*models(), TAPS, distance_temperature=1000.0)
        for _ in range(FIRST + 1):
            with torch.autocast("cpu", torch.float16, enabled=dtype == torch.float16):
                own = distiller.student(IMAGES)["loss"]
                losses = distiller.losses(BOXES, LABELS)
            (2.0**12 * (own + sum(losses.values()))).backward()
        found.append(weights(distiller))
    assert found[1] == pytest.approx(found[0], rel=0.05)


def test_a_map_that_is_overwritten_behind_its_module_counts_as_it_was():
    """The convolution's output is a copy, as a ReLU works in place on it. The gradient at both is the same here."""
    student, teacher = models()
    inside = dataclasses.replace(TAPS, box=("head.box_tower.0",), cls=("head.cls_tower.0",))
    with torch.no_grad():  # nothing is negative
        for layer in (student.head.box_tower[0], student.head.cls_tower[0]):
            layer.bias.fill_(100.0)
    behind = dataclasses.replace(TAPS, cls=("head.cls_tower.1",))
    found = []
    for taps in (inside, behind):
        with sk.SEADistiller(student, teacher, taps) as distiller:
            assert bool(distiller._recorders[0].cloned) == (taps is inside)
            for _ in range(2):
                step(distiller)
            found.append(distiller.calibration.log_equal.tolist())
            assert distiller.calibration.count.tolist() == [1, 1, 1]
    # the teacher's maps differ, so compare what the student's own loss gave
    assert all(map(math.isfinite, found[0]))


def test_measurements_are_averaged_and_end():
    distiller = sk.SEADistiller(*models(), TAPS, schedule=lambda step: 0.5 * (step >= 3))
    wanted = [0.5 * x for x in expected()]
    for at in range(20):
        losses, _ = step(distiller)
        if at == 3:
            assert [x.item() for x in losses] == [0, 0, 0]
        elif at > 3:  # nothing changes, so neither does the average
            found = [x.item() / y.item() for x, y in zip(losses, distiller.unweighted)]
            assert found == pytest.approx(wanted, rel=1e-4)
        # measured: steps 3, 4, 6, 11, 19, each counted in the next one
        assert distiller.calibration.count.tolist() == [sum(at > x for x in (3, 4, 6, 11, 19))] * 3
    distiller.calibration.go_on(512)
    for _ in range(2):
        step(distiller)
    assert distiller.calibration.count.tolist() == [5, 5, 5]


@pytest.mark.parametrize("every", [1, 2, 8])
@pytest.mark.parametrize("begin", ["step", "weights", "schedule", "checkpoint"])
def test_measurements_begin_with_the_first_losses(begin, every):
    """Whatever the number of the step, and also where only some steps have losses."""
    on = [begin != "schedule"]
    schedule = {"schedule": lambda at: on[0] * (at % every == 0)}
    distiller = sk.SEADistiller(*models(), TAPS, **schedule, weights=(1, 1, 1) if begin == "weights" else "auto")
    distiller.step = 800
    if begin == "weights":
        distiller.weights = "auto"
    elif begin == "checkpoint":
        state = copy.deepcopy(distiller.state_dict())
        distiller = sk.SEADistiller(*models(), TAPS, **schedule)
        distiller.load_state_dict(state)
    on[0] = True
    for _ in range(FIRST * every + 1):
        losses, _ = step(distiller)
    assert weights(distiller) == pytest.approx(expected(), rel=1e-5)
    assert distiller.calibration.count.tolist() == [FIRST] * 3 and all(x > 0 for x in losses)


def test_the_newest_measurement_counts_a_tenth():
    distiller = sk.SEADistiller(*models(), TAPS)
    calibration = distiller.calibration
    for count, newest in ((0, 1), (1, 1 / 2), (5, 1 / 6), (40, 0.1)):
        calibration.count.fill_(count)
        calibration.log_equal.zero_()
        calibration.seen = torch.tensor([4.0, 12.0, 1.0, 4.0, 3.0, 1.0, 1.0, 4.0])
        calibration.settle(None)
        logs = [math.log(x) / 2 for x in (16.0, 1.0, 1.0)]  # of what is below: own / (pull * factor), squared
        assert calibration.log_equal.tolist() == pytest.approx([newest * x for x in logs], abs=1e-6)
        calibration.seen = torch.tensor([4.0, 0.0, 0.0, math.inf, 3.0, 1.0, 1.0, 1.0])
        calibration.settle(None)  # no gradient, or one that overflowed: not a measurement
        assert calibration.count.tolist() == [count + 1, count + 1, count + 1]
    calibration.seen = torch.tensor([1.0, 1.0, 2.0 * 100, 1.0 * 9, 1.0, 1.0, 1.0, 1.0])
    calibration.log_equal.zero_()
    calibration.settle(None)  # a weight 10 times too large is replaced, one 3 times too large averaged
    assert calibration.log_equal.exp().tolist() == pytest.approx([0.1, 3**-0.1, 1], rel=1e-5)


def test_a_student_that_begins_as_its_teacher():
    """Its first pull is rounding errors, or nothing: such a weight is never used."""
    student = Toy().train()
    distiller = sk.SEADistiller(student, copy.deepcopy(student), TAPS)
    optimizer = torch.optim.SGD(student.parameters(), 0.5)
    for at in range(64):
        images, boxes, labels = batch(at)
        own = student(images)["loss"]
        losses = distiller.losses(boxes, labels)
        optimizer.zero_grad()
        (own + sum(losses.values())).backward()
        optimizer.step()
        assert sum(losses.values()) < 3 * own.detach(), at
    assert all(x > 0 for x in weights(distiller))


class Neck(nn.Module):
    def forward(self, features, kind):
        return kind(2 * x for x in features)


class AllLevels(Toy):
    """Its neck gives all levels at once."""

    def __init__(self, kind, seed=0):
        super().__init__(seed=seed)
        self.neck, self.kind = Neck(), kind

    def forward(self, images):
        levels = self.neck(self.features(images), self.kind)
        return {"loss": self.head(levels.values() if isinstance(levels, dict) else levels)}


IN_PLACE = dataclasses.replace(TAPS, cls=("head.cls_tower.1", "head.cls_tower.2"))  # a ReLU works in place behind one
NECK = dataclasses.replace(TAPS, cls=("neck",), box=("neck",), anchor_on_box=False, channels=8)
TOKENS = sk.taps.Select("encoder", sk.taps.tokens(8, 16, skip=1))
COMPILED = {
    "tokens": (
        lambda **seed: Tokens(lambda: nn.Linear(8, 12), **seed),
        dataclasses.replace(TAPS, cls=(TOKENS,), box=(TOKENS,), strides=(8, 16), channels=12),
    ),
    "towers": (Toy, TAPS),
    "in place": (Toy, IN_PLACE),
    "list": (lambda **seed: AllLevels(list, **seed), NECK),
    "dict": (lambda **seed: AllLevels(lambda x: dict(zip("abc", x)), **seed), NECK),
}


@pytest.mark.compile
@pytest.mark.parametrize("kind", COMPILED)
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_a_compiled_student_is_measured_in_a_second_graph(compiler, kind):
    make, taps = COMPILED[kind]
    found = []
    for compiled in (False, True):
        torch._dynamo.reset()
        student, teacher = make().eval(), make(seed=1)
        counter = torch._dynamo.testing.CompileCounterWithBackend(compiler)
        model = torch.compile(student, backend=counter, fullgraph=True) if compiled else student
        distiller = sk.SEADistiller(model, teacher, taps)
        for _ in range(10):
            student.zero_grad()
            own = model(IMAGES)["loss"]
            (own + sum(distiller.losses(BOXES, LABELS).values())).backward()
        assert distiller.calibration.count.tolist() == [4, 4, 4] and counter.frame_count == 2 * compiled
        found.append((weights(distiller), student.backbone[0].weight.grad))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4)
    torch.testing.assert_close(found[0][1], found[1][1])


@pytest.mark.compile
def test_a_student_of_which_a_part_is_compiled():
    """A map that leaves the compiled part has a gradient outside of it too, which counts once."""
    found = []
    for compiled in (False, True):
        student, teacher = models()
        if compiled:
            student.head.cls_tower = torch.compile(student.head.cls_tower, backend="aot_eager")
            names = tuple(f"head.cls_tower._orig_mod.{i}" for i in (1, 3))
        taps = dataclasses.replace(TAPS, cls=names) if compiled else TAPS
        distiller = sk.SEADistiller(student, teacher, taps, teacher_taps=TAPS)
        for _ in range(FIRST + 1):
            step(distiller)
        found.append(weights(distiller))
    assert found[1] == pytest.approx(found[0], rel=1e-5)


# ------------------------------------------------------------------------------------------------- checkpoints, copies


def test_the_weights_go_on_from_a_checkpoint():
    """Also from one between a step that was measured and the next."""
    for steps in (1, 5):
        whole = sk.SEADistiller(*models(24), TAPS)
        for _ in range(steps):
            step(whole)
        resumed = sk.SEADistiller(*models(24), TAPS)
        state = whole.state_dict()
        kept = copy.deepcopy(state)
        resumed.load_state_dict(kept)
        assert resumed.step == steps
        for _ in range(6):
            ours, theirs = (torch.stack(step(x)[0]) for x in (whole, resumed))
            assert torch.equal(ours, theirs)
        assert all(torch.equal(x, kept[name]) for name, x in state.items() if name != "calibration.seen")


def test_checkpoints_of_fixed_weights_and_of_weights_that_set_themselves():
    fixed = sk.SEADistiller(*models(), TAPS, weights=(1, 1, 1))
    assert set(fixed.state_dict()) == {"step"}
    fixed.step = 1000
    automatic = sk.SEADistiller(*models(), TAPS)
    automatic.load_state_dict(fixed.state_dict())  # which measures from here on
    for _ in range(FIRST):
        step(automatic)
    step(automatic)
    assert weights(automatic) == pytest.approx(expected(), rel=1e-5) and automatic.step == 1003
    fixed.load_state_dict(automatic.state_dict())
    assert weights(fixed) == [1, 1, 1] and fixed.step == 1003


def test_weights_may_be_set():
    distiller = sk.SEADistiller(*models(), TAPS)
    for _ in range(FIRST + 1):
        step(distiller)
    measured = weights(distiller)
    distiller.weights = (1, 2, 3)
    losses, _ = step(distiller)
    wanted = [w * x.item() for w, x in zip((1, 2, 3), distiller.unweighted)]
    assert [x.item() for x in losses] == pytest.approx(wanted, rel=1e-6)
    distiller.weights = "auto"
    assert weights(distiller) == measured
    step(distiller)
    step(distiller)  # it is measured again from then on
    assert distiller.calibration.count.tolist() == [3, 3, 3]
    measured = weights(distiller)
    distiller.weights = distiller.weights  # fixed at what they are
    assert distiller.weights == tuple(measured)
    with pytest.raises(ValueError, match="weights is 3; expected 'auto', or three numbers"):
        distiller.weights = 3


def test_copies_and_dtypes_keep_the_weights():
    distiller = sk.SEADistiller(*models(24), TAPS)
    for _ in range(2):
        step(distiller)
    want = weights(distiller)
    assert weights(copy.deepcopy(distiller)) == want
    for change in (lambda x: x.half(), lambda x: x.to_empty(device="cpu"), lambda x: x.double()):
        change(distiller)
        assert weights(distiller) == want and distiller.step == 2
        assert distiller.calibration.log_equal.dtype == torch.float32


def test_buffers_follow_a_student_that_was_moved_alone():
    distiller = sk.SEADistiller(*models(), TAPS)
    distiller.step = 3
    distiller.calibration.to("meta")
    distiller._buffers["step"] = distiller._buffers["step"].to("meta")
    step(distiller)
    assert all(not x.is_meta for x in distiller.buffers()) and distiller.state_dict()["step"] == 4


# --------------------------------------------------------------------------------------------------- what cannot be


def test_a_loss_whose_gradient_is_hidden_is_an_error():
    distiller = sk.SEADistiller(*models(), TAPS)
    for _ in range(4):  # the first batches may have had nothing to learn from
        distiller.student(IMAGES)
        sum(distiller.losses(BOXES, LABELS).values()).backward()
    distiller.student(IMAGES)
    with pytest.raises(RuntimeError, match=r"weights is 'auto', but no gradient of the student's own loss reached its"):
        distiller.losses(BOXES, LABELS)


def test_transforms_of_functions():
    student, teacher = models()
    parameters = {name: x.detach() for name, x in student.named_parameters()}

    def loss(parameters):
        own = torch.func.functional_call(student, parameters, (IMAGES,))["loss"]
        return own + sum(distiller.losses(BOXES, LABELS).values())

    distiller = sk.SEADistiller(student, teacher, TAPS, weights=(1, 1, 1))
    found = [torch.func.grad(loss)(parameters) for _ in range(18)]  # 16 would be measured
    assert all(torch.equal(x, found[0][name]) for out in found for name, x in out.items())
    distiller.weights = "auto"
    with pytest.raises(RuntimeError, match=r"weights is 'auto', which measures nothing in torch\.func; expected numb"):
        torch.func.grad(loss)(parameters)


def test_a_step_that_fails_and_is_repeated_counts_no_measurement_twice():
    distiller = sk.SEADistiller(*models(), TAPS)
    for _ in range(4):
        step(distiller)
    for _ in range(2):
        distiller.student(IMAGES)
        with pytest.raises(ValueError, match="boxes and labels not given"):
            distiller.losses()
    step(distiller)
    assert distiller.calibration.count.tolist() == [3, 3, 3]


def test_steps_without_backward_measure_nothing():
    distiller = sk.SEADistiller(*models(), TAPS)
    for _ in range(2):
        distiller.student(IMAGES)
        distiller.losses(BOXES, LABELS)
    assert weights(distiller) == [0, 0, 0]


# ------------------------------------------------------------------------------------------------------------- the log


def logged(caplog, distiller, *steps):
    caplog.clear()
    with caplog.at_level(logging.WARNING, "sea_kernels"):
        for at in steps:
            distiller.calibration.go_on(at)
            step(distiller)
    return [x for x in (r.getMessage() for r in caplog.records) if "evaluation" not in x]


def test_the_weights_are_logged_once(caplog):
    distiller = sk.SEADistiller(*models(), TAPS)
    (said,) = logged(caplog, distiller, *range(18), 511, 512, 513)
    numbers = ", ".join(f"{x:.3g}" for x in weights(distiller))
    assert said == f"weights='auto' has measured 512 steps: weights=({numbers}) from now on"


def test_fixed_weights_that_are_far_off_are_told_once(caplog):
    equal = expected((1.0, 1.0, 1.0))
    distiller = sk.SEADistiller(*models(), TAPS, weights=(5 * equal[0], 0.5 * equal[1], 1e-5 * equal[2]))
    first, second = logged(caplog, distiller, *range(20))
    assert first.startswith("the anchor loss pulls 5 times as hard at the student's maps as the student's own loss")
    assert second.startswith("the localization loss pulls 1e-05 times as hard")
    caplog.clear()
    distiller.calibration.go_on(17)
    distiller.student(IMAGES)
    with pytest.raises(ValueError, match="boxes and labels not given"):
        distiller.losses()  # a step that fails tells nothing, as it is repeated
    assert not caplog.records


def test_a_loss_that_never_pulls_is_told(caplog):
    class WithoutBoxes(Toy):
        def forward(self, images):
            head = self.head
            maps = [head.predict(head.cls_tower(x) + 0 * head.box_tower(x)) for x in self.features(images)]
            return {"loss": sum(x.square().mean() for x in maps)}

    distiller = sk.SEADistiller(WithoutBoxes().eval(), models()[1], TAPS)
    (said,) = logged(caplog, distiller, *range(18))
    assert said.startswith("the weight of the localization loss is still 0 after 17 steps")
    without = sk.SEADistiller(*models(), dataclasses.replace(TAPS, box=()))  # as the taps say
    assert logged(caplog, without, *range(18)) == [] and weights(without)[2] == 0


# ----------------------------------------------------------------------------------------------------------- processes


def _weights_of_two(rank, _group, _meeting, given, width):
    student, teacher = models(width)
    model = nn.parallel.DistributedDataParallel(student)
    distiller = sk.SEADistiller(model, teacher, TAPS, group=given)
    call = nn.parallel.DistributedDataParallel(distiller) if list(distiller.parameters()) else distiller
    out = []
    for at in range(3):
        images, boxes, labels = batch(2 * at + rank)
        losses = model(images) | call(boxes, labels)
        sum(losses.values()).backward()
        out.append(weights(distiller))
    assert all(p.grad is not None for p in distiller.parameters())
    return out


def _one_skips_a_step(rank, _group, _meeting):
    student, teacher = models()
    model = nn.parallel.DistributedDataParallel(student)
    distiller = sk.SEADistiller(model, teacher, TAPS, weights=(1, 1, 1))
    for at in range(20):
        losses = model(IMAGES)
        if (rank, at) != (1, 3):
            losses |= distiller.losses(BOXES, LABELS)
        sum(losses.values()).backward()
    return distiller.step


@pytest.mark.processes
def test_a_rank_with_fixed_weights_may_skip_a_step(tmp_path):
    assert Meeting(tmp_path, 2).spawn(_one_skips_a_step) == [20, 19]


@pytest.mark.processes
@pytest.mark.parametrize(("given", "width"), [("local", 16), ("local", 24), ("world", 24)])
def test_weights_are_the_same_on_all_ranks(given, width, tmp_path):
    first, second = Meeting(tmp_path, 2).spawn(_weights_of_two, given, width)
    assert first == second and first[0] == [0, 0, 0] and all(x > 0 for x in first[2])
