"""The accuracy study: data, detector, evaluation, peers' losses, rule of the weights, rows, going on after a stop."""

import dataclasses
import importlib
import json
import math
from pathlib import Path

import pytest
import torch
from detectors import require

import sea_kernels as sk

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
pytest.importorskip("pycocotools", reason="the evaluation needs pycocotools")
pytest.importorskip("matplotlib", reason="the picture needs matplotlib")


@pytest.fixture(autouse=True)
def setting(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on images this small, threads that wait for each other would take most of the time
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def shapes():
    return importlib.import_module("shapes")


@pytest.fixture
def small():
    require("torchvision")
    return importlib.import_module("small_detectors")


@pytest.fixture
def runs(small):
    return importlib.import_module("distill_runs")


@pytest.fixture
def distill(runs):
    return importlib.import_module("distill_ap")


def test_an_image_depends_on_the_seed_and_its_number_alone(shapes):
    few, many, other = (shapes.generate(n, 32, seed) for n, seed in ((3, 5), (70, 5), (3, 6)))
    for name in ("images", "boxes", "labels"):
        assert torch.equal(getattr(few, name), getattr(many, name)[:3])
    assert not torch.equal(few.images, other.images)
    assert not torch.equal(many.images[64:67], many.images[:3])  # another chunk


def test_boxes_enclose_the_painted_pixels(shapes, monkeypatch):
    monkeypatch.setattr(shapes, "_OCCLUDERS", 0)
    size = 96
    scenes = shapes.generate(64, size, 0, owners=True)
    there = scenes.labels >= 0
    assert there.any(1).all() and there.sum(1).max() == shapes.MOST
    boxes = scenes.boxes[there]
    assert (boxes >= 0).all() and (boxes <= size).all() and (boxes[:, :2] < boxes[:, 2:]).all()
    whole = 0
    for image, k in there.nonzero().tolist():
        ys, xs = (scenes.owners[image] == k).nonzero().unbind(1)
        assert len(ys), "an object is hidden"
        seen = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
        box = scenes.boxes[image, k].long().tolist()
        assert seen[0] >= box[0] and seen[1] >= box[1] and seen[2] <= box[2] and seen[3] <= box[3]
        if k + 1 == there[image].sum():  # nothing lies over the last one
            assert [int(x) for x in seen] == box
            whole += 1
    assert whole == 64
    counts = scenes.labels[there].bincount(minlength=len(shapes.CATEGORIES))
    assert counts.argmax() == 0 and counts.min() > 0  # unbalanced, and all are there


def test_an_image_shows_its_objects(shapes, monkeypatch):
    """Take a plain object: its pixels have one color but for the noise, and that of its surroundings differs."""
    monkeypatch.setattr(shapes, "_OCCLUDERS", 0)
    scenes = shapes.generate(64, 96, 1, owners=True)
    plain = [(i, k) for i, k in (scenes.labels >= 0).nonzero().tolist() if scenes.labels[i, k] % 3 == 0]
    for image, k in plain:
        pixels = scenes.images[image][:, scenes.owners[image] == k].float()
        assert (pixels.amax(1) - pixels.amin(1)).max() <= 2 * 0.05 * 255 + 1


# --------------------------------------------------------------------------------------------------------- detector


def scattered():
    """Two images with objects of three sizes; a third image has none."""
    boxes = torch.zeros(3, 4, 4)
    labels = torch.full((3, 4), -1)
    boxes[0, :3] = torch.tensor([[4.0, 4, 20, 22], [64, 70, 120, 125], [80, 8, 112, 40]])
    boxes[1, :2] = torch.tensor([[1.0, 2, 127, 126], [30, 30, 40, 38]])
    labels[0, :3], labels[1, :2] = torch.tensor([3, 0, 11]), torch.tensor([5, 5])
    return boxes, labels


def test_perfect_answers_have_ap_100(small, shapes):
    boxes, labels = scattered()

    def metrics(boxes, labels, truth=labels):
        found = [
            {"boxes": b[x >= 0], "scores": torch.ones(int((x >= 0).sum())), "labels": x[x >= 0]}
            for b, x in zip(boxes, labels)
        ]
        return small.coco_metrics(found, scattered()[0], truth, shapes.CATEGORIES)

    perfect = metrics(boxes, labels)
    of_category = perfect.pop("categories")
    assert perfect == pytest.approx(dict.fromkeys(small.METRICS, 100.0), abs=0.1)
    assert [i for i, name in enumerate(shapes.CATEGORIES) if of_category[name] > 99] == [0, 3, 5, 11]
    assert min(of_category.values()) == -100  # none of that category
    assert metrics(boxes, labels.where(labels != 3, 4))["AP"] == pytest.approx(75.0, abs=0.1)  # 1 of 4 is never found
    moved = metrics(boxes + 3, labels)  # IoU of a large box stays above 0.75, that of a small one falls below 0.5
    assert moved["AP50"] < 90 and moved["APl"] > moved["APs"]
    assert metrics(boxes, torch.full_like(labels, -1))["AP"] == 0


def test_the_detector_is_torchvisions_and_every_level_has_objects_to_find(small, shapes, monkeypatch):
    from torchvision.models.detection import FCOS

    data = shapes.generate(64, 128, 1, 112)
    model = small.fcos(small.Net(8, (8, 8, 8, 8), (0, 0, 0, 0)), 16, 1, 12, 128)
    assert isinstance(model, FCOS) and sk.taps.find(model).num_classes == 12
    matched = []
    monkeypatch.setattr(model.head, "compute_loss", lambda *arguments: matched.append(arguments[3]) or {})
    model(small.images(data, torch.arange(64)), small.targets(data, torch.arange(64)))
    there = torch.stack(matched[0])
    of_level = [(x >= 0).sum() for x in there.split([256, 64, 16], 1)]
    assert min(of_level) > 20
    found = [len(set(m[m >= 0].tolist())) for m in there]  # objects that some pixel answers for
    assert sum(found) > 0.95 * int((data.labels >= 0).sum())


# ----------------------------------------------------------------------------------------------------- peers' losses


def test_peers_losses_are_what_a_hand_computes():
    peers = importlib.import_module("peers")
    student, teacher = torch.zeros(1, 2, 1, 2), torch.zeros(1, 2, 1, 2)
    student[0, :, 0] = torch.tensor([[1.0, 3.0], [0.0, 1.0]])  # channels, pixels
    teacher[0, :, 0] = torch.tensor([[0.0, 1.0], [2.0, 1.0]])
    pair = [[student]], [[teacher]]
    assert peers.pixel_loss(*pair) == (1 + 4 + 4 + 0) / 4
    assert peers.pixel_loss([[student, student]], [[teacher, student]]) == 9 / 4  # levels add up

    # Scores 0.75 and 0.5: the highest of each pixel. Squared differences, means over channels: 5 / 2 and 4 / 2.
    logits = torch.tensor([[-1.0, 0.0], [math.log(3), -2.0]]).view(1, 2, 1, 2)
    loss = peers.score_weighted_loss(*pair, [logits])
    assert loss.item() == pytest.approx((0.75 * 2.5 + 0.5 * 2) / 1.25)

    def kl(a, b):  # of the softmax over two positions
        p, q = 1 / (1 + math.exp(-a)), 1 / (1 + math.exp(-b))
        return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))

    assert peers.cwd_loss(*pair).item() == pytest.approx((kl(1, 2) + kl(-1, 1)) / 2)  # differences of the positions


def test_a_projector_is_two_convolutions_of_each_level_with_a_relu_between():
    projectors = importlib.import_module("peers").Projectors(2, 3)
    maps = [[torch.randn(2, 3, 4, 4), torch.randn(2, 3, 2, 2)]]
    out = projectors(maps)
    for x, y, (first, _, second) in zip(maps[0], out[0], projectors):
        hidden = torch.einsum("oc,bchw->bohw", first.weight[:, :, 0, 0], x) + first.bias[:, None, None]
        torch.testing.assert_close(
            y, torch.einsum("oc,bchw->bohw", second.weight[:, :, 0, 0], hidden.relu()) + second.bias[:, None, None]
        )
    assert not torch.equal(projectors[0][0].weight, projectors[1][0].weight)


# ------------------------------------------------------------------------------------------------ rule of the weights


def test_a_weight_is_an_average_of_logarithms_and_then_frozen():
    balance = importlib.import_module("balance")
    rule = balance.Balance(("a", "b"), "gradients", 0.1)
    assert rule.weights == {"a": 0, "b": 0}
    assert [step for step in range(600) if rule.measures(step)] == list(range(0, 512, 8))
    rule.measure(0, {"gradients": {"a": (8.0, 2.0), "b": (8.0, 0.0)}, "values": {"a": (1.0, 9.0)}})
    assert rule.weights == {"a": pytest.approx(0.4), "b": 0}  # b has no gradient yet
    rule.measure(8, {"gradients": {"a": (1.0, 1.0), "b": (1.0, 4.0)}})
    assert rule.weights == {"a": pytest.approx(0.1 * 4**0.5), "b": pytest.approx(0.1 / 4)}
    for step in range(16, 512, 8):
        rule.measure(step, {"gradients": {"a": (math.e, 1.0), "b": (math.e, math.nan)}})
    log = math.log(4)
    for n, x in enumerate([0.0] + [1.0] * 62, 1):
        new = max(1 / (n + 1), 0.1)
        log = (1 - new) * log + new * x
    frozen = rule.weights
    assert frozen == {"a": pytest.approx(0.1 * math.exp(log)), "b": pytest.approx(0.1 / 4)}
    rule.measure(700, {"gradients": {"a": (100.0, 1.0), "b": (100.0, 1.0)}})
    assert rule.weights == frozen and rule.measured[-1] == {"step": 700, "gradients": {"a": 100.0, "b": 100.0}}


def test_a_loss_is_measured_against_detection_at_the_maps_that_it_compares():
    balance = importlib.import_module("balance")
    first, second = (torch.ones(2, requires_grad=True) for _ in range(2))
    x = first * 1  # maps of the student: the second is made from the first
    y = x + second
    leaves = [m.detach().requires_grad_() for m in (x, y)]
    losses = {
        "both": (3 * leaves[0]).sum() + (4 * leaves[1]).sum(),
        "last": (6 * leaves[1]).sum(),
        "none": 0 * leaves[0][0],
    }
    found = balance.pulls((2 * y).sum() + (5 * x).sum(), [x, y], losses, leaves)
    assert found == {
        "both": (pytest.approx((2 * 7**2 + 2 * 2**2) ** 0.5), pytest.approx(50**0.5)),
        "last": (pytest.approx(8**0.5), pytest.approx(72**0.5)),
        "none": (0, 0),
    }


# -------------------------------------------------------------------------------------------------------------- rows


@pytest.fixture
def little(runs, monkeypatch):
    preset = dataclasses.replace(runs.PRESETS["tiny"], train=16, student_images=12, points=1)
    monkeypatch.setitem(runs.PRESETS, "tiny", preset)
    return preset


@pytest.fixture
def step(runs, small, shapes, little):
    """step(row, rule, share): the distillation, the detection loss and the student's maps of one forward."""
    data = shapes.generate(4, little.size, 1, little.largest)

    def run(row, rule="gradients", share=0.2, preset=little):
        student, teacher = (
            runs.make(preset, preset.student, 0, "cpu").train(),
            runs.make(preset, preset.teacher, 1, "cpu"),
        )
        distillation = runs.Distillation(student, teacher, row, rule, share, preset.channels)
        maps, capture = [], distillation.distiller._capture

        def captured(*arguments, **options):
            found, leaves = capture(*arguments, **options)
            distillation.seen = found
            maps[:] = [x for sets in (found.student_cls, found.student_box) for levels in sets for x in levels]
            return found, leaves

        distillation.distiller._capture = captured

        def forward():
            return sum(student(small.images(data, torch.arange(4)), small.targets(data, torch.arange(4))).values())

        return distillation, forward, maps

    return run


def gradient(loss, maps):
    found = torch.autograd.grad(loss, maps, retain_graph=True, allow_unused=True)
    return torch.cat([torch.zeros(x.numel()) if g is None else g.flatten() for x, g in zip(maps, found)])


def test_a_measured_step_adds_nothing_and_then_a_loss_pulls_by_its_share(runs, step):
    """With one map a branch no map is made from another: a loss's whole gradient is what reaches it directly."""
    for name in runs.ROWS:
        row = runs.EVERY_ROW[name]
        if not row.terms:
            continue
        distillation, forward, maps = step(row)
        assert distillation.losses(0, forward(), False) == {}
        detection = forward()
        losses = distillation.losses(1, detection, False)
        assert tuple(losses) == row.terms
        if "score" in row.terms:
            maps = maps[-3:]
            assert all(x.shape[1] == 16 for x in maps)
        whole = gradient(detection, maps)
        for term, loss in losses.items():
            own = gradient(loss, maps)
            compared = torch.cat([g.any().expand(g.numel()) for g in own.split([x.numel() for x in maps])])
            assert own.norm() / whole[compared].norm() == pytest.approx(0.2, rel=0.02), (name, term)


def test_a_measured_loss_does_not_reach_a_map_through_the_maps_that_are_made_from_it(runs, step, little):
    distillation, forward, maps = step(runs.ROWS["pixel matching"], preset=dataclasses.replace(little, convolutions=2))
    detection = forward()
    distillation.losses(0, detection, False)
    teacher = [
        x for s in (distillation.seen.teacher_cls, distillation.seen.teacher_box) for levels in s for x in levels
    ]
    assert len(maps) == len(teacher) == 12
    own = torch.cat([(2 * (s - t) / s.numel()).flatten() for s, t in zip(maps, teacher)]).norm()
    ratio = gradient(detection, maps).norm() / own
    assert distillation.balance.weights["pixel"] == pytest.approx(0.2 * ratio.item(), rel=1e-4)


def test_by_values_a_loss_is_worth_its_share(runs, step):
    distillation, forward, _ = step(runs.EVERY_ROW["all three"], "values")
    distillation.losses(0, forward(), False)
    detection = forward()
    for loss in distillation.losses(1, detection, False).values():
        assert loss.item() == pytest.approx(0.2 * detection.item(), rel=0.02)


def test_no_two_rows_pull_the_same_way(runs, step, little):
    pulls = {}
    teachers = {"boxes": [torch.tensor([[8.0, 8, 40, 56]])] * 4, "labels": [torch.tensor([3])] * 4}
    for name, row in runs.EVERY_ROW.items():
        if not row.terms:
            continue
        distillation, forward, maps = step(row)
        regions = teachers if row.boxes == "teacher" or row.parts > 1 else {}
        distillation.losses(0, forward(), False, **regions)
        losses = distillation.losses(1, forward(), False, **regions)
        if "score" not in row.terms:
            pulls[name] = gradient(sum(losses.values()), maps)
    for name, pull in pulls.items():
        assert all(other == name or (pull - x).norm() > 1e-3 * pull.norm() for other, x in pulls.items()), name
    box = len(pulls["anchor"]) // 2
    for name, branches in {
        "pixel matching": (1, 1),
        "CWD": (1, 1),
        "L2 on the box branch": (0, 1),
        "anchor": (1, 1),
        "distance": (1, 0),
        "localization": (0, 1),
    }.items():
        assert (pulls[name][:box].any(), pulls[name][box:].any()) == branches, name


@pytest.mark.parametrize("name", ["all three", "score-weighted", "CWD", "all three, anchors of half a batch"])
def test_a_remembered_teacher_gives_the_losses_of_the_teacher_itself(runs, small, shapes, little, name):
    row = dataclasses.replace(runs.EVERY_ROW[name], parts=min(2, runs.EVERY_ROW[name].parts))
    data, index = shapes.generate(8, little.size, 1, little.largest), torch.tensor([6, 1, 3, 4])
    teacher = runs.make(little, little.teacher, 1, "cpu")
    with torch.no_grad():  # running statistics other than those of a new model, which count in evaluation mode alone
        teacher.backbone(teacher.transform(small.images(data, torch.arange(8)))[0].tensors)
    remembered = runs.Remembered(runs.teachers_maps(teacher, data, batch=3))
    found = []
    for one in (teacher, remembered):
        student = runs.make(little, little.student, 0, "cpu").train()
        distillation = runs.Distillation(student, one, row, "gradients", 0.3, little.channels)
        shown = small.targets(data, index)
        regions = {k: [x[k] for x in shown] for k in ("boxes", "labels")} if row.parts > 1 else {}
        for step in range(2):  # the first one measures
            torch.manual_seed(2)
            detection = sum(student(small.images(data, index), shown).values())
            losses = distillation.losses(step, detection, False, index, **regions)
        found.append(losses)
    assert found[0].keys() == found[1].keys() == set(row.terms)
    for term in row.terms:
        torch.testing.assert_close(found[0][term], found[1][term], rtol=1e-4, atol=0)
        assert found[0][term] > 0


def test_anchors_of_a_part_of_the_batch(runs, step, small):
    """Those of two images at a time, as in each of two processes; then the mean of the losses."""
    row = runs.EVERY_ROW["all three, anchors of half a batch"]
    distillation, forward, _ = step(row)
    boxes = [torch.tensor([[8.0 * i, 8, 40, 56]]) for i in range(4)]
    truth = {"boxes": boxes, "labels": [torch.tensor([i]) for i in (3, 1, 3, 3)]}
    forward()
    capture = distillation.distiller.capture(**truth)
    found = distillation._unweighted(capture, truth)
    halves = []
    for rest in (slice(0, 2), slice(2, 4)):
        sides = [[[x[rest] for x in levels] for levels in sets] for sets in capture[:4]]
        own = [x[rest] for x in truth.values()]
        regions = sk.Regions.from_boxes(*own, capture.regions.level_shapes, small.STRIDES, num_classes=12)
        halves.append(sk.sea_loss(*sides, regions))
    for name, x in found.items():
        torch.testing.assert_close(x, (getattr(halves[0], name) + getattr(halves[1], name)) / 2)
    assert found["anchor"] != distillation._unweighted(capture, truth | {"labels": truth["labels"][::-1]})["anchor"]


def perform(runs, preset, out, run, deadline=math.inf):
    (out / "runs").mkdir(parents=True, exist_ok=True)
    runs.perform(run, preset, out, "cpu", deadline, lambda effort: None)
    return json.loads(run.file(out).read_text()) if run.file(out).exists() else None


def test_runs_of_a_seed_differ_by_their_losses_alone(runs, little, tmp_path):
    perform(runs, little, tmp_path, runs.Run("teacher", 0))
    first = dataclasses.replace(little, points=3)  # of its three steps the first and those of the curve measure
    alone = perform(runs, little, tmp_path, runs.Run("student alone", 0))
    again = perform(runs, little, tmp_path / "again", runs.Run("student alone", 0))
    other = perform(runs, little, tmp_path, runs.Run("student alone", 1))
    score = perform(runs, little, tmp_path, runs.Run("score-weighted", 0, "gradients", 0.1))
    measured = perform(runs, first, tmp_path, runs.Run("all three", 0, "values", 0.1))
    weak, strong = (perform(runs, little, tmp_path, runs.Run("all three", 0, "values", x)) for x in (0.2, 0.4))
    losses = [x["curve"][-1]["losses"] for x in (alone, again, other, score, weak, strong)]
    assert losses[0] == losses[1] and losses[0]["detection"] != losses[2]["detection"]
    assert set(losses[3]) == {"detection", "score"} and losses[3]["detection"] != losses[0]["detection"]
    assert set(measured["curve"][-1]["losses"]) == {"detection"}
    # Only the second of three steps distills: so the first step's loss and the weights are measured on equal students.
    assert [x["step"] for x in weak["measured"]] == [0, 2]
    for k in ("anchor", "distance", "localization"):
        assert losses[5][k] == pytest.approx(2 * losses[4][k], rel=1e-4)


def test_a_run_goes_on_where_it_stopped(runs, little, tmp_path):
    preset = dataclasses.replace(little, student_images=24, points=3)
    for out in (tmp_path / "whole", tmp_path / "parts"):
        perform(runs, little, out, runs.Run("teacher", 0))
    run = runs.Run("score-weighted", 0, "gradients", 0.1)
    whole = perform(runs, preset, tmp_path / "whole", run)
    assert perform(runs, preset, tmp_path / "parts", run, deadline=0) is None
    assert perform(runs, preset, tmp_path / "parts", run, deadline=0) is None
    assert torch.load(run.file(tmp_path / "parts").with_suffix(".pt"), weights_only=False)["step"] == 4
    parts = perform(runs, preset, tmp_path / "parts", run)
    assert {k: v for k, v in parts.items() if k != "seconds"} == {k: v for k, v in whole.items() if k != "seconds"}
    assert [p["images"] for p in whole["curve"]] == [8, 16, 24]
    assert not list((tmp_path / "parts" / "runs").glob("*.p*t"))


def test_a_two_stage_detector_learns_by_the_same_losses(runs, little, tmp_path):
    preset = dataclasses.replace(little, detector="faster_rcnn")
    perform(runs, preset, tmp_path, runs.Run(runs.TEACHER, 0))
    maps = torch.load(tmp_path / "teachers_maps.pt")
    assert [x.shape[1:] for x in maps["rpn.head.conv"]] == [(16, 8, 8), (16, 4, 4), (16, 2, 2)]
    result = perform(runs, preset, tmp_path, runs.Run("all three", 0, "gradients", 0.3))
    assert set(result["weights"]) == set(runs.SEA) and all(w > 0 for w in result["weights"].values())


def test_the_teachers_boxes_stand_in_for_labels(runs, little, tmp_path, monkeypatch):
    perform(runs, little, tmp_path, runs.Run("teacher", 0))
    monkeypatch.setattr(runs, "TEACHERS_SCORE", 0.0)  # an untrained teacher is sure of nothing
    run = runs.Run("all three, teacher's boxes", 0, "gradients", 0.1)
    without = perform(runs, little, tmp_path, runs.Run("all three", 0, "gradients", 0.1))
    result = perform(runs, little, tmp_path, run)
    found = torch.load(tmp_path / "teachers_boxes.pt")
    assert found["boxes"].shape[:2] == found["labels"].shape and len(found["labels"]) == little.train
    assert result["measured"][0]["gradients"]["anchor"] != without["measured"][0]["gradients"]["anchor"]


# ------------------------------------------------------------------------------------------------- plan and program


def arguments(distill, out, *more):
    return distill.arguments(["--preset", "tiny", "--device", "cpu", "--out", str(out), *more])


def test_a_look_at_what_a_student_learned(runs, little, tmp_path, capsys):
    look = importlib.import_module("distill_look")
    perform(runs, little, tmp_path, runs.Run(runs.TEACHER, 0))
    perform(runs, little, tmp_path, runs.Run("all three", 0, "gradients", 0.3))
    look.main(["--out", str(tmp_path), "--preset", "tiny", "--drawn", "all three"])
    lines = [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines() if "|" in line]
    assert lines[2:] == [look.UNTRAINED, "all three"]
    assert (tmp_path / "look.png").stat().st_size > 1000

    same = runs.trained_teacher(little, tmp_path, "cpu")
    teacher = runs.trained_teacher(little, tmp_path, "cpu")
    data = runs.scenes(little, "val", "cpu")
    for capture in look.captures(same, teacher, data):
        found = look.likeness(capture)
        for kind in ("background", "center", "edge"):
            assert found[kind] == pytest.approx(1)
        assert abs(found["distance loss"]) < 1e-6 and abs(found["localization loss"]) < 1e-6
        other = [[-x for x in maps] for maps in capture.student_cls]
        found = look.likeness(capture._replace(student_cls=other))
        assert found["center"] < 0.9 and found["pixel"] < 0.9


def test_tuning_comes_before_the_runs_that_it_serves(distill, runs, tmp_path):
    (tmp_path / "tuning").mkdir()
    args = arguments(
        distill,
        tmp_path,
        "--rows",
        "student alone",
        "distance",
        "distance, temperature 5",
        "all three",
        "--share",
        "0.1",
        "0.3",
    )
    planned = distill.plan(args)
    assert planned[0] == runs.Run("teacher", 0)
    assert [r.row for r in planned[1:4]] == ["student alone"] * 3
    tuning = [r for r in planned if r.tuning]
    assert [(r.row, r.share) for r in tuning] == [(n, x) for n in ("all three", "distance") for x in (0.1, 0.3)]
    assert {r.seed for r in tuning}.isdisjoint({0, 1, 2})
    rest = planned[4 + len(tuning) :]
    assert [r.row for r in rest] == ["all three", "distance", "distance, temperature 5"] * 3
    assert all(r.share is None and not distill.ready(r, tmp_path) for r in rest)
    for run, ap in zip(tuning, (5.0, 6.0, 8.0, 7.0)):
        runs.write(run.file(tmp_path), {"metrics": {"AP": ap}})
    chosen = {r.row: r.share for r in distill.plan(args) if r.share and not r.tuning}
    assert chosen == {"all three": 0.3, "distance": 0.1, "distance, temperature 5": 0.1}
    fixed = distill.plan(arguments(distill, tmp_path, "--share", "0.2", "--rows", "distance", "--seeds", "1"))
    assert fixed == [runs.Run("teacher", 0), runs.Run("distance", 0, "gradients", 0.2)]


def test_no_two_runs_share_a_file(distill, runs, tmp_path):
    args = arguments(distill, tmp_path, "--share", "0.1", "--rows", *runs.EVERY_ROW)
    planned = distill.plan(args) + [r for row in runs.ROWS for r in distill.tuning_runs(row, args)]
    assert len({r.file(tmp_path) for r in planned}) == len(planned)


def test_a_second_call_goes_on_and_a_third_does_nothing(distill, runs, little, tmp_path, monkeypatch, capsys):
    rows = ("student alone", "pixel matching", "all three")
    done, perform = [], distill.perform

    def counted(run, *more):
        done.append(run)
        if len(done) == 3:
            raise KeyboardInterrupt
        return perform(run, *more)

    monkeypatch.setattr(distill, "perform", counted)
    options = "--preset tiny --device cpu --seeds 1 --jobs 1 --share 0.1 0.3".split()
    call = [*options, "--out", str(tmp_path), "--rows", *rows]
    with pytest.raises(KeyboardInterrupt):
        distill.main(call)
    assert [r.row for r in done] == ["teacher", "student alone", "all three"] and done[-1].tuning
    first = (tmp_path / "runs" / "student_alone_seed_0.json").read_text()
    distill.main([*call, "--budget", "0"])
    assert len(done) == 3 and "| student alone" in capsys.readouterr().out
    distill.main(call)
    assert len(done) == 3 + 4 + 2 and not any(r.tuning for r in done[-2:])
    assert (tmp_path / "runs" / "student_alone_seed_0.json").read_text() == first
    capsys.readouterr()
    distill.main(call)
    assert len(done) == 9

    text = capsys.readouterr().out
    assert text.strip() == (tmp_path / "distill_ap.md").read_text().strip()
    assert all(f"| {row} " in text for row in (*rows, "teacher")) and "AP on the tuning set" in text
    assert "| all three (gradients 0.1): distance " in text or "| all three (gradients 0.3): distance " in text
    report = json.loads((tmp_path / "distill_ap.json").read_text())
    assert {"commit", "machine", "versions", "settings", "rows", "tuning"} <= set(report)
    assert len(report["tuning"]) == 4 and len(report["rows"]) == 4
    assert (tmp_path / "distill_ap.png").stat().st_size > 1000
    monkeypatch.setitem(runs.PRESETS, "tiny", dataclasses.replace(little, rate=1e-3))
    with pytest.raises(SystemExit, match="other settings"):
        distill.main(call)


def test_two_processes_find_what_one_finds(distill, tmp_path):
    call = [
        "--preset",
        "tiny",
        "--device",
        "cpu",
        "--seeds",
        "1",
        "--share",
        "0.1",
        "--rows",
        "student alone",
        "anchor",
    ]
    found = []
    for jobs in ("1", "2"):
        distill.main([*call, "--jobs", jobs, "--out", str(tmp_path / jobs)])
        found.append({f.name: json.loads(f.read_text()) for f in (tmp_path / jobs / "runs").glob("*.json")})
        assert all(run.pop("seconds") > 0 for run in found[-1].values())
    assert len(found[0]) == 3 and found[0] == found[1]


def test_gains_are_paired_by_seed(runs, tmp_path):
    tables = importlib.import_module("distill_tables")
    (tmp_path / "runs").mkdir()
    for row, values in {
        "student alone": (10.0, 20.0, 30.0),
        "anchor": (11.0, 22.0, 33.0),
        "distance": (9.0, 23.0),
        "all three": (14.0, 20.0, 40.0),
        "teacher": (40.0,),
    }.items():
        for seed, ap in enumerate(values):
            share = {} if row in ("student alone", "teacher") else {"rule": "gradients", "share": 0.1}
            run = runs.Run(row, seed, **share)
            metrics = dict.fromkeys(("AP", "AP50", "AP75", "APs", "APm", "APl"), ap)
            runs.write(run.file(tmp_path), dataclasses.asdict(run) | {"metrics": metrics})
    rows = {row["name"]: row for row in tables.collect(tmp_path)}
    assert list(rows) == ["student alone", "anchor", "distance", "all three", "teacher"]
    assert rows["student alone"]["mean"]["AP"] == 20 and rows["student alone"]["deviation"]["AP"] == 10
    gain = rows["anchor"]["gain"]["AP"]  # differences 1, 2, 3
    assert gain["mean"] == 2 and gain["half"] == pytest.approx(4.303 / 3**0.5)
    gain = rows["distance"]["gain"]["AP"]  # differences -1 and 3
    assert gain["mean"] == 1 and gain["half"] == pytest.approx(12.706 * 8**0.5 / 2**0.5)
    assert rows["distance"]["all three over it"]["AP"]["differences"] == [5, -3]
    assert "all three over it" not in rows["all three"]
    assert rows["teacher"]["deviation"]["AP"] is None and "gain" not in rows["teacher"]
    assert tables.interval([1.0])["half"] is None


def test_the_pull_of_a_loss_is_its_weight_over_what_was_measured_at_each_point(distill):
    tables = importlib.import_module("distill_tables")
    measured = [{"gradients": {"anchor": x}} for x in (9.0, 2.0, 4.0)]  # the first one is from the start of training
    runs = [{"curve": [0, 0], "weights": {"anchor": w}, "measured": measured} for w in (0.2, 0.4)]
    assert tables._pulls({"runs": runs}, "anchor") == ["0.15", "0.075"]
    runs[0]["measured"] = [{"gradients": {}}, *measured[1:]]
    assert tables._pulls({"runs": runs}, "anchor") == ["0.15", "0.075"]
    runs[0]["measured"] = [*measured[:2], {"gradients": {}}]
    assert tables._pulls({"runs": runs}, "anchor") == ["0.15", "-"]
