"""The benchmark of a training step runs, writes what it promises, and its sums are right. No timing is checked."""

import importlib
import json
from pathlib import Path

import programs
import pytest
import torch
from detectors import require

ROOT = Path(__file__).parents[2]
PARTS = ["student forward", "student backward", "optimizer step", "teacher forward"]
WHOLE = [
    "whole step without distillation",
    "whole step with sea_kernels",
    "whole step with eager reference",
]


@pytest.fixture(autouse=True)
def torchvision():
    require("torchvision")


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("bench_step")


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """(stdout, report, picture) of a tiny run."""
    require("torchvision")
    out = tmp_path_factory.mktemp("step")
    command = ["benchmarks/bench_step.py", "--smoke", "--device", "cpu", "--out", str(out)]
    run = programs.run(*command, cwd=ROOT, env={"OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stderr
    return run.stdout, json.loads((out / "bench_step.json").read_text()), (out / "bench_step.png").read_bytes()


def test_a_tiny_run_writes_tables_json_and_picture(smoke):
    out, report, picture = smoke
    for name in (*PARTS, "no distillation", "sea_kernels", "eager reference"):
        assert f"| {name} " in out
    keys = {"command", "date", "commit", "machine", "versions", "build", "models", "amp", "workload", "boxes", "rates"}
    assert keys | {"rows", "parts", "sea", "seconds"} <= set(report)
    assert report["versions"]["torchvision"] and "sampler" in report["boxes"]["source"]
    assert report["models"] == {"student": "resnet18", "teacher": "resnet18"}
    wanted = {"batch": 2, "height": 64, "width": 64, "channels": 256, "maps": 4, "dtype": "float32"}
    assert wanted.items() <= report["workload"].items()
    rows = {row["name"]: row for row in report["rows"]}
    assert set(WHOLE) <= set(rows) and rows["sea_kernels"]["deviation"] < 1e-4
    assert all(len(row["step_samples_ms"]) == 2 and row["step_ms"] > 0 for row in rows.values())
    assert picture.startswith(b"\x89PNG") and len(picture) > 10_000


def test_the_parts_of_a_run_add_up(smoke):
    _, report, _ = smoke
    rows, parts = {row["name"]: row for row in report["rows"]}, report["parts"]
    assert list(parts) == PARTS

    def median(name):
        return torch.tensor(rows[name]["step_samples_ms"], dtype=torch.float64).quantile(0.5).item()

    student, optimizer, teacher = (median(n) for n in ("student, detection losses", "optimizer step", "teacher"))
    assert parts["student forward"] + parts["student backward"] == pytest.approx(student)
    assert sum(parts.values()) == pytest.approx(student + optimizer + teacher)
    assert [row["name"] for row in report["sea"]] == ["sea_kernels", "eager reference"]
    for row in report["sea"]:
        sea = median(row["name"])
        assert row["forward_ms"] + row["backward_ms"] == pytest.approx(sea) == pytest.approx(row["sea_ms"])
        assert row["added_to_student"] == pytest.approx(sea / (student + optimizer))
        assert row["added_to_student_and_teacher"] == pytest.approx(sea / (student + optimizer + teacher))
        assert row["parts_ms"] == pytest.approx(student + optimizer + teacher + sea)
        assert row["whole_ms"] == pytest.approx(median("whole step with " + row["name"]))
        assert row["peak_bytes"] > 0 and row["whole_peak_bytes"] > 0


def _rows(**changes):
    steps = {
        "student, detection losses": (10.0, 30.0),
        "optimizer step": (None, 10.0),
        "teacher": (None, 20.0),
        WHOLE[0]: (None, 41.0),
        WHOLE[1]: (None, 66.0),
        "sea_kernels": (1.0, 4.0),
        "torch.compile reference": (2.0, 8.0),
    }
    rows = [
        {"name": name, "step_ms": whole, "peak_bytes": 5} | ({"forward_ms": forward} if forward else {})
        for name, (forward, whole) in steps.items()
    ]
    return [{"name": r["name"], "left_out": changes[r["name"]]} if r["name"] in changes else r for r in rows]


def test_shares_are_of_the_steps_without_the_losses(bench):
    parts, (native, compiled) = bench.summarize(_rows())
    assert list(parts.values()) == [10, 20, 10, 20]
    assert native == {
        "name": "sea_kernels", "forward_ms": 1, "backward_ms": 3, "sea_ms": 4, "added_to_student": 0.1,
        "added_to_student_and_teacher": 4 / 60, "parts_ms": 64, "peak_bytes": 5, "whole_ms": 66, "whole_peak_bytes": 5,
    }  # fmt: skip
    assert compiled["added_to_student"] == 0.2 and "whole_ms" not in compiled


def test_a_row_that_is_left_out_says_why_and_a_part_must_run(bench):
    rows = _rows(**{"torch.compile reference": "not ready in time", WHOLE[1]: "out of memory"})
    _, (native, compiled) = bench.summarize(rows)
    assert compiled == {"name": "torch.compile reference", "left_out": "not ready in time"}
    assert native["sea_ms"] == 4 and "whole_ms" not in native
    with pytest.raises(SystemExit, match="teacher: out of memory"):
        bench.summarize(_rows(teacher="out of memory"))


def test_map_by_map_is_what_is_computed_at_once(bench, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    steps = importlib.import_module("steps")
    workload = bench.Workload(height=64, width=96, channels=16, maps=3, strides=(8, 16, 32))
    (x,) = bench.make_inputs(workload, workload.choose_boxes(), torch.device("cpu"), 1)
    results = bench.compiled_step(workload)(x, lambda: None)
    expected = steps.training_step(lambda x: steps.sea_losses(workload, x), "reference")(x, lambda: None)
    assert steps.deviation(results, expected) < 1e-5


def test_a_batch_has_the_boxes_of_its_images_and_is_padded_as_torchvision_does(bench):
    boxes = bench.box_sources.Boxes(
        boxes=torch.tensor([[1.0, 2, 30, 40], [3, 4, 20, 30], [5, 6, 7, 8]]),
        labels=torch.tensor([3, 1, 2]),
        batch_index=torch.tensor([1, 0, 1]),
        ignore_boxes=torch.tensor([[0.0, 0, 9, 9]]),
        ignore_batch_index=torch.tensor([1]),
        image_sizes=[(60, 50), (40, 97)],
        num_classes=80,
        source="",
    )
    batch = bench.make_batch(boxes, 2, 64, 128, torch.device("cpu"))
    assert [t["labels"].tolist() for t in batch.targets] == [[1], [3, 2]]
    assert batch.targets[1]["boxes"].tolist() == [[1, 2, 30, 40], [5, 6, 7, 8]]
    assert [len(b) for b in batch.ignore_boxes] == [0, 1]
    assert batch.truth["image_sizes"] == [(60, 50), (40, 97)]
    transform = bench.fcos("resnet18", 80).train().transform
    images, targets = transform(batch.images, batch.targets)
    assert list(images.tensors.shape[2:]) == bench.box_sources.padded_size(boxes.image_sizes) == [64, 128]
    assert torch.equal(targets[0]["boxes"], batch.targets[0]["boxes"])  # nothing is resized


@pytest.mark.parametrize("option", ["--batch", "--height", "--width"])
def test_sizes_are_positive(bench, option, capsys):
    with pytest.raises(SystemExit):
        bench.arguments([option, "0"])
    assert "expected at least 1" in capsys.readouterr().err
