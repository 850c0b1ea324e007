"""The detector trained with and without distillation: data, targets, evaluation, rows, continuing after a stop."""

import dataclasses
import importlib
import json
from pathlib import Path

import pytest
import torch

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
def fcos():
    return importlib.import_module("fcos")


@pytest.fixture
def distill():
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


STRIDES = (8, 16, 32)


def perfect(fcos, boxes, labels, classes, size):
    """An output that says what `targets` asks for."""
    levels = [(size // s, size // s) for s in STRIDES]
    points, sizes = fcos.locations(levels, STRIDES, "cpu")
    label, sides, centerness = fcos.targets(points, sizes, boxes, labels)
    scores = torch.where(label[..., None] == torch.arange(classes), 8.0, -8.0)
    split = [h * w for h, w in levels]

    def maps(x):
        return [y.transpose(1, 2).unflatten(2, hw) for y, hw in zip(x.split(split, 1), levels)]

    return fcos.Output(maps(scores), maps(sides), maps(torch.logit(centerness[..., None], 1e-4)), [], [])


def scattered(size):
    """Two images with objects of three sizes, no two of which share a pixel of any level; a third image has none."""
    boxes = torch.zeros(3, 4, 4)
    labels = torch.full((3, 4), -1)
    boxes[0, :3] = torch.tensor([[4.0, 4, 20, 22], [64, 70, 120, 125], [80, 8, 112, 40]])
    boxes[1, :2] = torch.tensor([[1.0, 2, 127, 126], [30, 30, 40, 38]])
    labels[0, :3], labels[1, :2] = torch.tensor([3, 0, 11]), torch.tensor([5, 5])
    assert boxes.max() <= size
    return boxes, labels


def test_pixels_answer_for_their_centers(fcos):
    points, sizes = fcos.locations([(2, 3), (1, 1)], (8, 16), "cpu")
    assert points.tolist() == [[4, 4], [12, 4], [20, 4], [4, 12], [12, 12], [20, 12], [8, 8]]
    assert sizes.tolist() == [8] * 6 + [16]
    boxes, labels = torch.tensor([[[2.0, 0, 10, 8], [0, 0, 24, 16], [0, 0, 24, 16]]]), torch.tensor([[7, 1, -1]])
    label, sides, centerness = fcos.targets(points, sizes, boxes, labels)
    assert label.tolist() == [[7, 1, 1, 1, 1, 1, -1]]  # the smallest of those that claim it; no box for the last level
    assert sides[0, 0].tolist() == [2 / 8, 4 / 8, 6 / 8, 4 / 8]
    assert centerness[0, 0].item() == pytest.approx((2 / 6) ** 0.5) and centerness[0, 2].item() < centerness[0, 1]


def test_perfect_answers_have_ap_100(fcos, shapes):
    boxes, labels = scattered(128)
    out = perfect(fcos, boxes, labels, 12, 128)
    metrics = fcos.coco_metrics(fcos.decode(out, STRIDES, 128), boxes, labels, shapes.CATEGORIES)
    assert metrics == pytest.approx(dict.fromkeys(fcos.METRICS, 100.0), abs=0.1)
    wrong = labels.where(labels != 3, 4)
    metrics = fcos.coco_metrics(fcos.decode(out, STRIDES, 128), boxes, wrong, shapes.CATEGORIES)
    assert metrics["AP"] == pytest.approx(75.0, abs=0.1)  # one of four categories is never found
    moved = boxes + 3  # IoU of a large box stays above 0.75, that of a small one falls below 0.5
    metrics = fcos.coco_metrics(fcos.decode(out, STRIDES, 128), moved, labels, shapes.CATEGORIES)
    assert metrics["AP50"] < 90 and metrics["APl"] > metrics["APs"]


def test_perfect_answers_have_the_least_detection_loss(fcos):
    boxes, labels = scattered(128)
    out = perfect(fcos, boxes, labels, 12, 128)
    best = fcos.detection_loss(out, STRIDES, boxes, labels)
    farther = out._replace(box=[x * 1.3 for x in out.box])
    silent = out._replace(cls=[torch.full_like(x, -8.0) for x in out.cls])
    assert best < 0.75  # what remains is the entropy of the centerness
    assert fcos.detection_loss(farther, STRIDES, boxes, labels) > best + 0.1
    assert fcos.detection_loss(silent, STRIDES, boxes, labels) > best + 0.5


def test_suppression_leaves_one_box_of_a_category(fcos):
    boxes, labels = torch.tensor([[[40.0, 40, 72, 72]]]), torch.tensor([[2]])
    out = perfect(fcos, boxes, labels, 12, 128)
    assert sum(int((x > 0).sum()) for x in out.cls) > 1  # several pixels find it
    found, scores, found_labels = fcos.decode(out, STRIDES, 128)
    assert (scores > 0).sum() == 1
    assert found_labels[0, 0] == 2 and torch.allclose(found[0, 0], boxes[0, 0])
    for x in out.cls:
        x[:, 7] = x[:, 2]  # as sure of a second category
    assert (fcos.decode(out, STRIDES, 128)[1] > 0).sum() == 2


@pytest.fixture
def little(distill):
    return dataclasses.replace(distill.TINY, train=16, val=8, batch=4, student_images=8, teacher_images=8)


def test_a_rows_loss_has_the_terms_it_names(distill, shapes, little):
    """Every row's gradient is that of the detection loss and its own terms, each with its weight; no two agree."""
    scenes = shapes.generate(4, little.size, 1, little.largest)
    teacher = distill.TeacherMaps(distill.make_net(little, little.teacher, 0, "cpu"), scenes.images, False)
    index = torch.arange(4)
    model = distill.make_net(little, little.student, 0, "cpu").train()
    out = model(scenes.images)
    maps = [x for sets in (out.cls_maps, out.box_maps) for levels in sets for x in levels]
    arguments = out, teacher(index), scenes.boxes, scenes.labels, little

    def gradient(terms):
        losses = distill.distillation_losses(terms, *arguments)
        assert set(losses) == set(terms)
        found = torch.autograd.grad(sum(losses.values()), maps, retain_graph=True, allow_unused=True)
        return torch.cat([torch.zeros(x.numel()) if g is None else g.flatten() for x, g in zip(maps, found)])

    single = {term: gradient((term,)) for term in distill.TERMS}
    rows = {row: gradient(terms) for row, terms in distill.ROWS.items() if terms}
    for row, g in rows.items():
        assert g.norm() > 0
        torch.testing.assert_close(g, sum(single[t] for t in distill.ROWS[row]), rtol=1e-4, atol=1e-7)
        for other, h in rows.items():
            assert other == row or (g - h).norm() > 1e-3 * g.norm(), (row, other)
    box = sum(x.numel() for levels in out.box_maps for x in levels)
    for term, branches in {"pixel": (1, 1), "pixel_box": (0, 1), "anchor": (1, 1), "distance": (1, 0)}.items():
        assert (single[term][:-box].any(), single[term][-box:].any()) == branches, term
    assert not single["localization"][:-box].any() and single["localization"][-box:].any()


def test_rows_of_a_seed_differ_by_their_losses_alone(distill, shapes, little):
    scenes = shapes.generate(little.train, little.size, 1, little.largest)
    live = distill.TeacherMaps(distill.make_net(little, little.teacher, 0, "cpu"), scenes.images, False)
    one_step = dataclasses.replace(little, student_images=4)

    def train(weights, seed=0, preset=one_step):
        model, log = distill.train(preset, little.student, preset.student_images, seed, scenes, "", live, weights)
        return model.state_dict(), log["first"]

    alone, log = train({})
    again, _ = train({})
    assert all(torch.equal(alone[k], again[k]) for k in alone)
    distilled, distilled_log = train({"anchor": 0.3, "localization": 0.7})
    assert set(log) == {"detection"} and set(distilled_log) == {"detection", "anchor", "localization"}
    assert distilled_log["detection"] == log["detection"]  # the same images, the same initialization
    assert any(not torch.equal(alone[k], distilled[k]) for k in alone)
    assert train({}, seed=1)[1]["detection"] != log["detection"]
    _, doubled = train({"anchor": 0.6, "localization": 0.7})
    assert doubled["anchor"] == pytest.approx(2 * distilled_log["anchor"], rel=1e-5)


def test_cached_maps_are_the_teachers(distill, shapes, little):
    scenes = shapes.generate(little.train, little.size, 1, little.largest)
    teacher = distill.make_net(little, little.teacher, 0, "cpu")
    live, cached = (distill.TeacherMaps(teacher, scenes.images, cache) for cache in (False, True))
    index = torch.tensor([5, 0, 11])
    out = teacher(scenes.images[index])
    for a, b, c in zip(live(index), cached(index), (out.cls_maps, out.box_maps)):
        for m in range(little.convolutions):
            for x, y, z in zip(a[m], b[m], c[m]):
                torch.testing.assert_close(x, z, rtol=1e-4, atol=1e-4)
                torch.testing.assert_close(x, y.float(), rtol=2e-3, atol=2e-3)


def test_a_second_call_goes_on_and_a_third_does_nothing(distill, little, tmp_path, monkeypatch, capsys):
    rows = {name: distill.ROWS[name] for name in ("student alone", "pixel matching", "distance", "all three")}
    monkeypatch.setattr(distill, "ROWS", rows)
    monkeypatch.setattr(distill, "TINY", little)
    trained = []
    train = distill.train

    def counted(preset, net, images, seed, scenes, name, *more):
        trained.append((name.split(", ")[1] if ", " in name else name, seed))
        if len(trained) == 3:
            raise KeyboardInterrupt
        return train(preset, net, images, seed, scenes, name, *more)

    monkeypatch.setattr(distill, "train", counted)
    call = ["--tiny", "--device", "cpu", "--out", str(tmp_path)]
    with pytest.raises(KeyboardInterrupt):
        distill.main(call)
    assert trained == [("teacher", 0), ("student alone", 0), ("all three", 0)]
    first = (tmp_path / "runs" / "student_alone-0.json").read_text()
    distill.main([*call, "--budget", "0"])
    assert len(trained) == 3 and "1 of 4 student runs are done" in capsys.readouterr().out
    distill.main([*call, "--rows", "all three"])
    assert trained[3:] == [("all three", 0)]
    distill.main(call)
    assert trained[3:] == [("all three", 0), ("pixel matching", 0), ("distance", 0)]
    assert (tmp_path / "runs" / "student_alone-0.json").read_text() == first
    with pytest.raises(SystemExit, match="other settings"):
        distill.main([*call, "--share", "0.1"])
    capsys.readouterr()
    distill.main(call)
    assert len(trained) == 6

    text = capsys.readouterr().out
    assert text.strip() == (tmp_path / "distill_ap.md").read_text().strip()
    assert all(f"| {row} " in text for row in (*rows, "teacher")) and "4 of 4 student runs" in text
    report = json.loads((tmp_path / "distill_ap.json").read_text())
    assert {"commit", "machine", "versions", "settings", "weights"} <= set(report)
    assert all(f"{k} {v:g}" in text for k, v in report["weights"].items())
    assert (tmp_path / "distill_ap.png").stat().st_size > 1000
    monkeypatch.setattr(distill, "TINY", dataclasses.replace(little, rate=1e-3))
    with pytest.raises(SystemExit, match="other settings"):
        distill.main(call)


def test_weights_make_every_loss_the_same_share_of_the_detection_loss(distill, shapes, little):
    scenes = shapes.generate(little.train, little.size, 1, little.largest)
    one = dataclasses.replace(little, student_images=4)  # one batch, that of the first step
    teacher = distill.TeacherMaps(distill.make_net(one, one.teacher, 3, "cpu"), scenes.images, False)
    weights = distill.calibrate(one, scenes, teacher)
    assert set(weights) == set(distill.TERMS)
    for term in distill.TERMS:
        _, log = distill.train(one, one.student, 4, 0, scenes, "", teacher, {term: weights[term]})
        assert log["first"][term] == pytest.approx(one.share * log["first"]["detection"], rel=0.06)  # two digits


def test_gains_are_paired_by_seed(distill, tmp_path):
    preset = dataclasses.replace(distill.TINY, seeds=3)
    (tmp_path / "runs").mkdir()
    for row, values in {"student alone": (10.0, 20.0, 30.0), "anchor": (11.0, 22.0), "teacher": (40.0,)}.items():
        for seed, ap in enumerate(values):
            metrics = dict.fromkeys(("AP", "AP50", "AP75", "APs", "APm", "APl"), ap)
            distill.write(distill.run_file(tmp_path, row, seed), {"row": row, "seed": seed, "metrics": metrics})
    rows = {row["name"]: row for row in distill.collect(tmp_path, preset)}
    assert list(rows) == ["student alone", "anchor", "teacher"]
    assert rows["student alone"]["mean"]["AP"] == 20 and rows["student alone"]["deviation"]["AP"] == 10
    assert rows["anchor"]["gain"] == {"mean": 1.5, "deviation": pytest.approx(0.5**0.5)}
    assert rows["teacher"]["deviation"]["AP"] is None and "gain" not in rows["teacher"]


def test_runs_that_say_most_come_first(distill):
    runs = distill.runs(distill.PRESETS["cpu"])
    assert runs[:3] == [("student alone", 0), ("all three", 0), ("pixel matching", 0)]
    assert [seed for _, seed in runs[:9]] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert sorted(set(runs)) == sorted((row, seed) for row in distill.ROWS for seed in range(3)) == sorted(runs)
