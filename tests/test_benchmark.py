"""The benchmark runs, writes what it promises, and its sampler and its memory meter are right. No timing is checked."""

import importlib
import json
import os
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def benchmark_module(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.fixture(params=["sampled", "annotated"])
def box_source(request):
    if request.param == "sampled":
        return []
    if "SEA_KERNELS_DATA" not in os.environ:
        pytest.skip("SEA_KERNELS_DATA is not set")
    return ["--annotations", str(Path(os.environ["SEA_KERNELS_DATA"]) / "instances_val2014_100.json")]


def test_a_tiny_run_writes_table_json_and_picture(benchmark_module, box_source, tmp_path, capsys):
    benchmark_module("bench_losses").main(["--smoke", "--device", "cpu", "--out", str(tmp_path), *box_source])
    out, err = capsys.readouterr()
    assert "| sea_kernels " in out and "| eager reference " in out and "| CWD-style " in out
    assert " of " in err  # progress

    report = json.loads((tmp_path / "bench_losses.json").read_text())
    assert {"command", "date", "commit", "machine", "versions", "workload", "boxes", "rates", "floor"} <= set(report)
    assert ("COCO annotations" if box_source else "sampler") in report["boxes"]["source"]
    assert report["rates"]["copy"] > 0 and report["rates"]["gemm_float32"] > 0
    rows = {row["name"]: row for row in report["rows"]}
    assert list(rows) == ["sea_kernels", "eager reference", "FGD-style", "CWD-style"]
    for row in rows.values():
        assert 0 < row["forward_ms"] <= row["step_ms"]
        assert len(row["step_samples_ms"]) == len(row["forward_samples_ms"]) == 2
        assert row["peak_bytes"] >= row["kept_bytes"] > 0
    assert rows["sea_kernels"]["deviation"] < 1e-4
    assert rows["eager reference"]["eager_ratio"] == 1
    # 252 pixels of 16 channels in float32; the gradient counts once, the reads as in Workload.least_bytes.
    assert rows["sea_kernels"]["least_bytes"] == (7 + 5) * 252 * 16 * 4
    assert [point["label"] for point in report["sweeps"]["batch size"]] == ["1", "2"]

    picture = (tmp_path / "bench_losses.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 10_000


def test_the_table_is_refused_where_the_results_differ(benchmark_module, tmp_path, monkeypatch, capsys):
    bench = benchmark_module("bench_losses")
    native = bench.sk.sea_loss

    def wrong(*args):
        losses = native(*args)
        return losses._replace(anchor=losses.anchor * 1.01) if bench.sk.ops.current_backend() == "native" else losses

    monkeypatch.setattr(bench.sk, "sea_loss", wrong)
    with pytest.raises(SystemExit, match="deviates"):
        bench.main(["--smoke", "--device", "cpu", "--out", str(tmp_path)])
    assert "| sea_kernels " not in capsys.readouterr().out and not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------------------------------------- sampler


def test_sampled_boxes_follow_coco(benchmark_module):
    """train2017: 7.3 boxes and 2.9 categories an image, a third of the boxes below 32 and a third above 96 pixels."""
    images = 2000
    drawn = benchmark_module("boxes").sample(images, 480, 640)
    counts = drawn.batch_index.bincount(minlength=images).float()
    assert 6.8 < counts.mean() < 7.9
    assert 14 <= counts.quantile(0.9) <= 18
    categories = (drawn.batch_index * 80 + drawn.labels).unique().numel() / images
    assert 2.6 < categories < 3.2
    shares = drawn.labels.bincount(minlength=80) / len(drawn.labels)
    assert shares.argmax() == 0 and 0.25 < shares[0] < 0.36  # person
    x1, y1, x2, y2 = drawn.boxes.unbind(1)
    side = ((x2 - x1) * (y2 - y1)).sqrt()
    assert 0.22 < (side < 32).float().mean() < 0.40
    assert 0.28 < (side > 96).float().mean() < 0.42
    assert (x1 >= 0).all() and (y1 >= 0).all() and (x2 <= 640).all() and (y2 <= 480).all() and (side > 0).all()


@pytest.mark.parametrize(
    ("batch", "boxes", "categories", "num_classes"),
    [(2, 14, 13, 80), (2, 14, 1, 80), (16, 130, 31, 80), (2, 400, 400, 1203), (3, 1, 1, 80), (2, 0, 0, 80)],
)
def test_sampled_numbers_are_exact(benchmark_module, batch, boxes, categories, num_classes):
    sample = benchmark_module("boxes").sample
    drawn = sample(batch, 800, 1344, boxes, categories, num_classes)
    assert len(drawn.boxes) == len(drawn.labels) == len(drawn.batch_index) == boxes
    assert drawn.categories == categories
    assert not boxes or (drawn.labels.max() < num_classes and drawn.batch_index.max() < batch)
    assert torch.equal(drawn.boxes, sample(batch, 800, 1344, boxes, categories, num_classes).boxes)


def test_impossible_numbers_are_refused(benchmark_module):
    with pytest.raises(ValueError, match="3 boxes cannot show exactly 4"):
        benchmark_module("boxes").sample(2, 800, 1344, boxes=3, categories=4)


def test_annotated_images_are_scaled_as_detectors_do(benchmark_module, tmp_path):
    pytest.importorskip("pycocotools")
    annotation = {"area": 1.0, "iscrowd": 0, "segmentation": []}
    coco = {
        "images": [
            {"id": 7, "width": 640, "height": 480},
            {"id": 8, "width": 1000, "height": 400},
            {"id": 9, "width": 480, "height": 640},  # portrait: left out
        ],
        "categories": [{"id": 3, "name": "a"}, {"id": 90, "name": "b"}],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 90, "bbox": [6, 12, 60, 120], **annotation},
            {"id": 2, "image_id": 7, "category_id": 3, "bbox": [0, 0, 640, 480], **annotation, "iscrowd": 1},
            {"id": 3, "image_id": 8, "category_id": 3, "bbox": [100, 100, 50, 50], **annotation},
            {"id": 4, "image_id": 9, "category_id": 3, "bbox": [100, 100, 50, 50], **annotation},
        ],
    }
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(coco))
    drawn = benchmark_module("boxes").from_annotations(path, 2, 800, 1344, boxes=2, categories=2)
    assert drawn.image_sizes == [(800, 1067), (538, 1344)]
    assert drawn.labels.tolist() == [1, 0] and drawn.batch_index.tolist() == [0, 1] and drawn.num_classes == 2
    torch.testing.assert_close(drawn.boxes[0], torch.tensor([10.0, 20.0, 110.0, 220.0]))
    torch.testing.assert_close(drawn.boxes[1], torch.tensor([134.4, 134.4, 201.6, 201.6]))
    assert drawn.ignore_batch_index.tolist() == [0] and len(drawn.ignore_boxes) == 1
    assert "images 7, 8" in drawn.source


# ------------------------------------------------------------------------------------------------------ memory meter

MIB = 2**20


class _Allocates(torch.autograd.Function):
    """Allocates so many MiB: kept until backward, for the time of forward, for the time of backward."""

    @staticmethod
    def forward(ctx, x, kept, in_forward, in_backward):
        ctx.in_backward = in_backward
        torch.empty(in_forward * MIB, dtype=torch.uint8)
        ctx.save_for_backward(x, torch.empty(kept * MIB, dtype=torch.uint8))
        return x.new_zeros(())

    @staticmethod
    def backward(ctx, upstream):
        x, _ = ctx.saved_tensors
        gradient = torch.empty_like(x)
        torch.empty(ctx.in_backward * MIB, dtype=torch.uint8)
        return gradient, None, None, None


@pytest.mark.parametrize(
    ("kept", "in_forward", "in_backward", "peak"),
    [(3, 5, 2, 5), (3, 1, 2, 5), (0, 4, 7, 7), (6, 0, 0, 6)],
)
def test_memory_meter_counts_known_allocations(benchmark_module, kept, in_forward, in_backward, peak):
    """Inputs count in neither figure and gradients not in the peak."""
    bench, measure = benchmark_module("bench_losses"), benchmark_module("measure")
    x = torch.zeros(9 * MIB // 4, requires_grad=True)
    maps = bench.Inputs([[x]], [], [], [], None)
    step = bench.training_step(lambda _: (_Allocates.apply(x, kept, in_forward, in_backward),))
    step(maps, lambda: None)
    measured_peak, measured_kept = measure.memory(step, maps, torch.device("cpu"))
    small = 4096  # the losses themselves
    assert kept * MIB <= measured_kept <= kept * MIB + small
    assert peak * MIB <= measured_peak <= peak * MIB + small


def test_memory_meter_sees_inside_operators(benchmark_module):
    """exp and log_softmax each keep their result; the gradients in between come and go inside backward."""
    bench, measure = benchmark_module("bench_losses"), benchmark_module("measure")
    x = torch.zeros(256, 4096, requires_grad=True)  # 4 MiB
    maps = bench.Inputs([[x]], [], [], [], None)
    step = bench.training_step(lambda _: (x.exp().log_softmax(1).sum(),))
    peak, kept = measure.memory(step, maps, torch.device("cpu"))
    assert 8 * MIB <= kept <= 8 * MIB + 4096
    assert kept <= peak <= 16 * MIB + 4096


def test_memory_meter_ignores_what_was_there_before(benchmark_module):
    measure = benchmark_module("measure")
    # Freed but never allocated in the log; allocated, freed; a result, which counts in kept only.
    events = [(0, 1, -100), (1, 2, 8), (2, 3, 4), (3, 2, -8), (4, 4, 50), (5, None, 0), (6, 5, 2), (7, 5, -2)]
    assert measure._account(events, results={4}) == (12, 54)
