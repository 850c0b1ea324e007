"""The benchmark of several processes runs, counts what is sent, and compares like with like. No timing is checked."""

import dataclasses
import importlib
import json
from functools import partial
from pathlib import Path

import programs
import pytest
import torch

from sea_kernels import group as groups

ROOT = Path(__file__).parents[2]
ROWS = ["local anchors", "same work, no all-reduce", "global batch"]
# Three levels, 161 rows, 16 channels in float32: both sides of the branch with distances, of the other the difference;
# then the gradients of the former. The regions in float64: 3 levels of 163 areas, 81 flags, 3 numbers of pixels and one
# of images.
ANCHORS = 3 * 161 * 16 * 4
MESSAGES = {"regions": 8 * (3 * 163 + 81 + 3 + 1), "anchors": 3 * ANCHORS, "gradients of the anchors": ANCHORS}


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("bench_scaling")


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """(stdout, stderr, report, picture) of a tiny run."""
    out = tmp_path_factory.mktemp("scaling")
    command = ["benchmarks/bench_scaling.py", "--smoke", "--backend", "gloo", "--out", str(out)]
    run = programs.run(*command, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    report = json.loads((out / "bench_scaling.json").read_text())
    return run.stdout, run.stderr, report, (out / "bench_scaling.png").read_bytes()


def test_a_tiny_run_writes_tables_json_and_picture(smoke):
    out, err, report, picture = smoke
    for text in (*ROWS, "all of a step"):
        assert text in out
    assert "8 of 8: 2 ranks" in err  # progress, to its very end
    keys = {"command", "date", "commit", "machine", "versions", "build", "backend", "cores", "workload", "boxes"}
    assert keys | {"left_out", "measured", "seconds"} == set(report)
    assert report["backend"] == "gloo" and report["left_out"] == [] and "sampler" in report["boxes"]["source"]
    assert picture.startswith(b"\x89PNG") and len(picture) > 10_000

    for run in report["measured"]:
        assert [row["name"] for row in run["rows"]] == ROWS
        for row in run["rows"]:
            assert len(row["step_samples_ms"]) == len(row["forward_samples_ms"]) == 2
            assert 0 < row["forward_ms"] <= row["step_ms"] and row["efficiency"] > 0
        assert run["deviation"] < 1e-5
        local, same, whole = (row["step_samples_ms"] for row in run["rows"])
        assert run["ratio"] == pytest.approx((whole[0] / same[0] + whole[1] / same[1]) / 2)
        assert run["ratio_to_local"] == pytest.approx((whole[0] / local[0] + whole[1] / local[1]) / 2)
    first, second = (run["workloads"] for run in report["measured"])
    assert first[0] == second[0] == report["workload"] and len(second) == 2
    assert second[1]["boxes"] != second[0]["boxes"]  # images of its own


def test_a_tiny_run_counts_what_is_sent(smoke):
    _, _, report, _ = smoke
    one, two = report["measured"]
    assert one["messages"] == {} and one["sent_bytes"] == 0 and one["all_reduce_samples_ms"] == {}
    assert two["messages"] == MESSAGES
    total = sum(MESSAGES.values())
    assert two["message_bytes"] == two["sent_bytes"] == total  # 2 (n - 1) / n is 1
    assert two["of_ddp_gradients"] == pytest.approx(total / 128e6)
    assert {name: len(samples) for name, samples in two["all_reduce_samples_ms"].items()} == dict.fromkeys(MESSAGES, 2)


class TestStep:
    """What stands for several processes: a group of one, which calls all_reduce but sends nothing."""

    @pytest.fixture
    def step(self, bench, monkeypatch):
        """(workload, inputs, step)"""
        monkeypatch.setattr(groups, "join", lambda group: groups.Group("one", 1))
        monkeypatch.setattr(groups, "compare", lambda *_: torch.zeros((), dtype=torch.float64))
        workload = dataclasses.replace(bench.SMOKE, maps=2)
        (x,) = bench.make_inputs(workload, workload.choose_boxes(), torch.device("cpu"), 1)
        return workload, x, bench.training_step(partial(bench.sea_losses, workload, group=object()))

    @pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
    def test_the_messages_are_as_large_as_their_shapes_say(self, bench, step, dtype):
        workload, x, run = step
        workload = dataclasses.replace(workload, dtype=dtype)
        (x,) = bench.make_inputs(workload, x.boxes, torch.device("cpu"), 1)
        _, sums = bench.recorded(run, x)
        assert [s.nbytes for s in sums] == list(bench.messages(workload).values())
        wide = 2 if dtype == "float64" else 1
        assert list(bench.messages(workload).values()) == [MESSAGES["regions"], 6 * wide * ANCHORS, 2 * wide * ANCHORS]

    def test_the_work_without_all_reduce_is_the_same_and_sends_nothing(self, bench, step, monkeypatch):
        _, x, run = step
        expected, sums = bench.recorded(run, x)

        def refused(message, group):
            raise AssertionError("an all-reduce")

        monkeypatch.setattr(groups, "all_reduce", refused)
        again = bench.without_all_reduce(run, sums)
        for _ in range(2):
            losses, gradients = again(x, lambda: None)
            assert all(map(torch.equal, losses, expected[0])) and all(map(torch.equal, gradients, expected[1]))
        # It is the recorded sums that it goes on with: as if another rank had the same images, and other anchors.
        losses, _ = bench.without_all_reduce(run, [sums[0], 2 * sums[1], sums[2]])(x, lambda: None)
        torch.testing.assert_close(losses[0], 4 * expected[0][0])
        assert groups.all_reduce is refused  # put back


def test_a_rank_has_its_own_images_and_pads_them_itself(bench):
    boxes = bench.box_sources.Boxes(
        boxes=torch.arange(16.0).view(4, 4),
        labels=torch.tensor([3, 1, 3, 0]),
        batch_index=torch.tensor([3, 0, 2, 1]),
        ignore_boxes=torch.tensor([[0.0, 0, 9, 9], [1, 1, 8, 8]]),
        ignore_batch_index=torch.tensor([1, 3]),
        image_sizes=[(60, 50), (40, 97), (33, 32), (31, 64)],
        num_classes=80,
        source="",
    )
    own = bench.of_rank(boxes, 1, 2)
    assert own.labels.tolist() == [3, 3] and own.batch_index.tolist() == [1, 0]
    assert torch.equal(own.boxes, boxes.boxes[[0, 2]]) and own.image_sizes == [(33, 32), (31, 64)]
    assert own.ignore_boxes.tolist() == [[1, 1, 8, 8]] and own.ignore_batch_index.tolist() == [1]
    workload = bench.workload_of(bench.SMOKE, own)
    assert (workload.height, workload.width, workload.boxes, workload.categories) == (64, 64, 2, 1)
    first = bench.workload_of(bench.SMOKE, bench.of_rank(boxes, 0, 2))
    assert (first.height, first.width) == (64, 128)


def test_weak_scaling_is_of_the_cores_that_work_and_the_pixels_that_there_are(bench, monkeypatch):
    monkeypatch.setattr(bench, "cores", lambda: 2)
    w = dataclasses.asdict(bench.SMOKE)

    def run(ranks, threads, ms):
        rows = [{"name": n, "step_samples_ms": [ms], "forward_samples_ms": [ms / 2]} for n in bench.ROWS]
        return {"ranks": ranks, "threads": threads, "workloads": [w] * ranks, "rows": rows, "messages": {}}

    measured = [run(1, 2, 10.0), run(2, 1, 20.0), run(4, 1, 80.0)]
    bench.summarize(measured, "gloo")
    assert [m["rows"][0]["efficiency"] for m in measured] == [1, 1, 0.5]  # two cores all the time
    measured = [run(1, 1, 10.0), run(2, 1, 10.0), run(4, 1, 20.0)]
    bench.summarize(measured, "gloo")
    assert [m["rows"][0]["efficiency"] for m in measured] == [1, 1, 1]  # one core, then two
    measured = [run(1, 1, 10.0), run(4, 1, 20.0)]
    bench.summarize(measured, "nccl")
    assert [m["rows"][0]["efficiency"] for m in measured] == [1, 0.5]
    measured = [run(2, 1, 10.0)]
    bench.summarize(measured, "gloo")
    assert "efficiency" not in measured[0]["rows"][0]  # nothing to compare with


def test_ranks_beyond_the_gpus_are_left_out(bench, monkeypatch, capsys):
    monkeypatch.setattr(bench.dist, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    args = bench.arguments([])
    assert args.backend == "nccl" and args.ranks == [1, 2] and args.left_out == [4]
    assert bench.arguments(["--backend", "gloo"]).ranks == [1, 2, 4]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert bench.arguments([]).backend == "gloo"
    with pytest.raises(SystemExit):
        bench.arguments(["--backend", "nccl"])
    assert "there are 0" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--ranks", "--repeats"])
def test_numbers_are_positive(bench, option, capsys):
    with pytest.raises(SystemExit):
        bench.arguments([option, "0"])
    assert "expected at least 1" in capsys.readouterr().err
