"""The benchmark runs, writes what it promises, and its sampler and its memory meter are right. No timing is checked."""

import gc
import importlib
import json
import os
import time
import weakref
from pathlib import Path
from unittest.mock import MagicMock

import programs
import pytest
import torch
from cases import CUDA, NO_CUDA

import sea_kernels as sk

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark_module(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on maps this small, threads that wait for each other would take most of the time
    yield importlib.import_module
    torch.set_num_threads(threads)


@pytest.fixture(params=["sampled", "annotated"])
def box_source(request):
    if request.param == "sampled":
        return []
    if "SEA_KERNELS_DATA" not in os.environ:
        pytest.skip("SEA_KERNELS_DATA is not set")
    return ["--annotations", str(Path(os.environ["SEA_KERNELS_DATA"]) / "instances_val2014_100.json")]


needs_cuda = pytest.mark.skipif(not CUDA, reason=NO_CUDA)
GPU_ROWS = ["sea_kernels, CUDA graph"]


@pytest.mark.parametrize("where", ["cpu", pytest.param("cuda", marks=needs_cuda)])
def test_a_tiny_run_writes_table_json_and_picture(benchmark_module, box_source, where, tmp_path, capsys):
    benchmark_module("bench_losses").main(["--smoke", "--device", where, "--out", str(tmp_path), *box_source])
    out, err = capsys.readouterr()
    assert "| sea_kernels " in out and "| eager reference " in out and "| CWD-style " in out
    assert " of " in err  # progress

    text = (tmp_path / "bench_losses.json").read_text()
    assert not any(folder in text for folder in (str(tmp_path), str(BENCHMARKS.parent), str(Path.home()) + "/"))
    report = json.loads(text)
    assert {"command", "date", "commit", "machine", "versions", "workload", "boxes", "rates", "floor"} <= set(report)
    assert ("COCO annotations" if box_source else "sampler") in report["boxes"]["source"]
    assert report["rates"]["copy"] > 0 and report["rates"]["gemm_float32"] > 0
    rows = {row["name"]: row for row in report["rows"]}
    graph = [name for name in GPU_ROWS if where == "cuda"]
    assert list(rows) == ["sea_kernels", *graph, "eager reference", "FGD-style", "CWD-style"]
    for name, row in rows.items():
        assert len(row["step_samples_ms"]) == 2 and row["step_ms"] > 0
        if name not in graph:
            assert 0 < row["forward_ms"] <= row["step_ms"] and len(row["forward_samples_ms"]) == 2
            assert row["peak_bytes"] >= row["saved_bytes"] > 0
        if where == "cuda":
            assert row["synchronizations"] == 0 or "style" in name
            assert row["launches"] == 1 if name in graph else row["launches"] > 1
    assert rows["sea_kernels"]["deviation"] < 1e-4
    assert rows["eager reference"]["eager_ratio"] == 1
    # 252 pixels of 16 channels in float32; the gradient counts once, the reads as in Workload.least_bytes.
    assert rows["sea_kernels"]["least_bytes"] == (7 + 5) * 252 * 16 * 4
    assert [point["label"] for point in report["sweeps"]["batch size"]] == ["1", "2"]

    picture = (tmp_path / "bench_losses.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 10_000


FAULTS = """
import resource, sys
sys.path.insert(0, sys.argv[1])
import measure, torch
if sys.argv[2] == "keeps":
    measure.keep_pages()
def step():
    torch.ones(2**24), torch.ones(2**20)
for _ in range(20):  # until small blocks lie elsewhere
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(measure.keeps_pages(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_pages_are_kept_from_step_to_step():
    """64 MiB a step, in pages of 4 KiB or, where the system gives them, 2 MiB."""
    results = {}
    for what in ("keeps", "default"):
        done = programs.run("-c", FAULTS, str(BENCHMARKS), what)
        results[what] = done.stdout.split()
    assert results["keeps"][0] == "True" and int(results["keeps"][1]) < 32
    assert results["default"][0] == "False" and int(results["default"][1]) > 5 * 32


def test_a_run_of_the_program_says_what_fresh_pages_add(tmp_path):
    done = programs.run(BENCHMARKS / "bench_losses.py", "--smoke", "--device", "cpu", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "bench_losses.json").read_text())
    assert report["machine"]["allocator"] == "malloc that keeps its pages" and "fresh pages" in done.stdout
    for row in report["rows"]:
        fresh = torch.tensor(row["fresh_step_samples_ms"], dtype=torch.float64).quantile(0.5).item()
        assert row["fresh_pages_ms"] == pytest.approx(fresh - row["step_ms"])


def test_the_floor_is_what_the_machine_must_do_at_its_own_rates(benchmark_module):
    bench, w = benchmark_module("bench_losses"), benchmark_module("workloads").SMOKE
    boxes = w.choose_boxes()
    floor = bench.floors(w, boxes, {"copy": 1e6, "gemm_float32": 1e9})
    regions = benchmark_module("steps").make_regions(w, boxes)
    anchors = [int((area > 0).sum()) for area in regions.area]
    products = 4 * 2 * 16 * sum(n * pixels for n, pixels in zip(anchors, regions.counted.tolist()))
    assert floor["least_bytes_ms"] == pytest.approx(12 * 252 * 16 * 4 / 1e3)
    assert floor["least_operations_ms"] == pytest.approx(products / 1e6)
    assert floor["ms"] == pytest.approx(floor["least_bytes_ms"] + floor["least_operations_ms"])
    rows = bench.compare_with_floor([{"step_ms": 3.0, "bandwidth_share": 0.1}, {"name": "CWD-style"}], {"ms": 2.0})
    assert rows == [{"step_ms": 3.0, "bandwidth_share": 0.1, "floor_ratio": 1.5}, {"name": "CWD-style"}]


def test_the_table_is_refused_where_the_results_differ(benchmark_module, tmp_path, monkeypatch, capsys):
    bench, native = benchmark_module("bench_losses"), sk.sea_loss

    def wrong(*args):
        losses = native(*args)
        return losses._replace(anchor=losses.anchor * 1.01) if sk.backends.current_backend() == "native" else losses

    monkeypatch.setattr(sk, "sea_loss", wrong)
    with pytest.raises(SystemExit, match="deviates"):
        bench.main(["--smoke", "--device", "cpu", "--out", str(tmp_path)])
    assert "| sea_kernels " not in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_a_report_names_files_without_their_folders(benchmark_module):
    arguments = ["--smoke", "--out=/home/someone/out", "--annotations", "/data/instances.json"]
    origin = benchmark_module("report").provenance("bench.py", arguments, torch.device("cpu"))
    assert origin["command"] == "python benchmarks/bench.py --smoke --out=out --annotations instances.json"
    assert {"device", "cpu", "cores", "threads", "instruction_set", "cache_mib"} < set(origin["machine"])


def test_progress_outside_a_terminal_is_a_line_for_each_kind_of_work(benchmark_module, capsys):
    tell = benchmark_module("report").Progress(5)
    for text in (
        "sea_kernels: warm-up",
        "time: repeat 1 of 3",
        "time: repeat 2 of 3",
        "time: repeat 3 of 3",
        "sweep: batch 1",
    ):
        tell(text)
    lines = [line.split("] ")[1] for line in capsys.readouterr().err.splitlines()]
    assert lines == ["1 of 5: sea_kernels: warm-up", "2 of 5: time: repeat 1 of 3", "5 of 5: sweep: batch 1"]


def test_a_cell_without_a_value_is_a_dash(benchmark_module):
    report = benchmark_module("report")
    columns = {"": report.label, "ms": "{step_ms:.4g}", "MiB": "{peak_mib:.4g} ({peak_percent:.1f}%)"}
    rows = [
        {"name": "a", "step_ms": 1.5, "peak_bytes": 2**20, "peak_percent": 50.0},
        {"name": "b", "left_out": "out of memory"},
    ]
    lines = [[x.strip() for x in line.split("|")[1:-1]] for line in report.row_table(rows, columns).splitlines()]
    assert lines[0] == ["", "ms", "MiB"] and lines[2:] == [["a", "1.5", "1 (50.0%)"], ["b: out of memory", "-", "-"]]


# ------------------------------------------------------------------------------------------- rows that are left out


def test_a_plain_row_without_enough_memory_is_left_out(benchmark_module, tmp_path, monkeypatch, capsys):
    """The others are measured, and the picture and the table have its place."""
    bench, native = benchmark_module("bench_losses"), sk.sea_loss

    def too_large(*args):
        if sk.backends.current_backend() == "reference":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return native(*args)

    monkeypatch.setattr(sk, "sea_loss", too_large)
    bench.main(["--smoke", "--device", "cpu", "--out", str(tmp_path)])
    assert "| eager reference: out of memory |" in capsys.readouterr().out
    path = tmp_path / "bench_losses.json"
    rows = {row["name"]: row for row in json.loads(path.read_text())["rows"]}
    assert rows["eager reference"] == {"name": "eager reference", "left_out": "out of memory"}
    assert rows["sea_kernels"]["step_ms"] > 0 and not {"eager_ratio", "deviation"} & set(rows["sea_kernels"])
    benchmark_module("table").main([str(path)])
    assert "| out of memory |" in capsys.readouterr().out


def test_the_native_kernels_are_never_left_out(benchmark_module, tmp_path, monkeypatch):
    bench = benchmark_module("bench_losses")

    def too_large(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(benchmark_module("steps"), "sea_losses", too_large)
    with pytest.raises(torch.OutOfMemoryError):
        bench.main(["--smoke", "--device", "cpu", "--out", str(tmp_path)])


def test_what_does_not_compile_in_half_of_the_budget_is_left_out(benchmark_module, monkeypatch, capsys):
    steps, workloads, measure = map(benchmark_module, ("steps", "workloads", "measure"))
    monkeypatch.setattr(steps, "compiled_step", lambda *_: lambda x, mark: time.sleep(60))
    w, device, began = workloads.SMOKE, torch.device("cpu"), time.monotonic()
    inputs = workloads.make_inputs(w, w.choose_boxes(), device, 1)
    makers = steps.make_steps(w, inputs, compiled=True, context=False)
    rows = steps.measure_rows(w, inputs, makers, device, 2, 1e9, lambda text: None, budget=2.0)
    assert time.monotonic() - began < 30
    rows = {row["name"]: row for row in rows}
    assert "not ready in time" in rows["torch.compile reference"]["left_out"]
    assert rows["sea_kernels"]["step_ms"] > 0 and rows["eager reference"]["eager_ratio"] == 1
    times = measure.interleave({"a": lambda x, mark: None}, [None], device, 9, deadline=time.monotonic() - 1)
    assert len(times["a"].step) == 3


def test_workloads_for_the_gpu_are_what_they_are_said_to_be(benchmark_module):
    workloads = benchmark_module("workloads")
    common = {"height": 800, "width": 1344, "channels": 256, "maps": 4, "strides": (8, 16, 32, 64, 128)}
    w2 = {"batch": 16, "boxes": 130, "categories": 31, "dtype": "bfloat16", "num_classes": 80}
    wanted = {
        "W1": w2 | {"batch": 2, "boxes": 14, "categories": 5},
        "W2": w2,
        "W3": w2 | {"dtype": "float32"},
        "W4": w2 | {"boxes": 400, "categories": 300, "num_classes": 1203},
        "W5": w2 | {"channels_last": True},
    }
    for name, fields in wanted.items():
        assert workloads.WORKLOADS[name] == workloads.Workload(**common, **fields)
    # 22,400 pixels an image: classification maps 6 times and their gradient, box maps 4 times and theirs.
    assert workloads.WORKLOADS["W1"].least_bytes == 12 * 2 * 22_400 * 256 * 4 * 2


def test_compile_only_runs_one_step_and_writes_nothing(benchmark_module, tmp_path, monkeypatch):
    bench, ran = benchmark_module("bench_losses"), []
    monkeypatch.setattr(bench, "compiled_step", lambda workload: lambda x, mark: ran.append((workload, x)))
    bench.main(["--smoke", "--device", "cpu", "--compile-only", "--out", str(tmp_path)])
    assert [workload.height for workload, _ in ran] == [64] and not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------- GPU's meters


def test_calls_of_cuda_are_counted(benchmark_module):
    names = ["cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernelEx", "cudaMemsetAsync", "cudaMemcpyAsync"]
    other = ["cudaStreamIsCapturing", "aten::copy_", "cudaEventRecord", "cudaFuncGetAttributes", "cudaMalloc"]
    waits = ["cudaStreamSynchronize", "cudaDeviceSynchronize", "cuStreamSynchronize", "cudaEventSynchronize"]
    count = benchmark_module("measure").count_calls
    assert count([*names, *other]) == (5, 0)
    assert count([*other, *waits]) == (0, 4)
    assert count(["cudaGraphLaunch"]) == (1, 0)
    assert count(["cudaMemcpy"]) == (1, 1)  # it waits


@needs_cuda
def test_launches_and_synchronizations_on_a_gpu(benchmark_module):
    """Known ones: two kernels, a fill and a copy; then a replayed graph; then what waits."""
    measure, x = benchmark_module("measure"), torch.ones(1000, device="cuda")
    cpu, y = torch.zeros(1000).pin_memory(), torch.empty_like(x)

    def step(inputs, mark):
        torch.sin_(torch.cos_(x))
        y.zero_()
        y.copy_(cpu, non_blocking=True)

    assert measure.cuda_calls(step, None) == (4, 0)
    assert measure.cuda_calls(lambda inputs, mark: x.sum().item(), None)[1] >= 1
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.sin_(torch.cos_(x))
    assert measure.cuda_calls(lambda inputs, mark: graph.replay(), None) == (1, 0)


def test_a_captured_graph_keeps_the_boxes_that_it_reads(benchmark_module, monkeypatch):
    """What replaces them in memory would be taken for boxes by every replay."""
    steps, workloads = map(benchmark_module, ("steps", "workloads"))
    w = workloads.SMOKE
    inputs = workloads.make_inputs(w, w.choose_boxes(), torch.device("cpu"), 1)
    read = []
    with monkeypatch.context() as m:
        m.setattr(torch, "cuda", MagicMock())
        graph = steps.GraphStep(lambda x, mark: read.append(weakref.ref(x.boxes.labels)), inputs, room=64)
    gc.collect()
    assert graph.captured and all(labels() is not None for labels in read)


@needs_cuda
def test_memory_meter_agrees_with_the_counters_of_the_gpu(benchmark_module):
    steps, workloads, measure = map(benchmark_module, ("steps", "workloads", "measure"))
    device, w = torch.device("cuda"), workloads.Workload(height=400, width=672, channels=64)
    (x,) = workloads.make_inputs(w, w.choose_boxes(), device, 1)
    for backend in ("native", "reference"):
        step = steps.training_step(lambda x: steps.sea_losses(w, x), backend)
        step(x, lambda: None)
        peak, saved = measure.memory(step, x, device)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before, at_mark = torch.cuda.memory_allocated(), []
        _, gradients = step(x, lambda: at_mark.append(torch.cuda.memory_allocated() - before))  # noqa: B023
        most = torch.cuda.max_memory_allocated() - before
        assert abs(saved - at_mark[0]) <= 0.02 * at_mark[0] + 64 * 512  # each is rounded up to 512 bytes
        returned = sum(g.numel() * g.element_size() for g in gradients)
        assert most - returned - 64 * 512 <= 1.02 * peak and peak <= 1.02 * most + 64 * 512


# ------------------------------------------------------------------------------------------------------------- profile

NCU = """==PROF== Connected to process 12
"ID","Kernel Name","Block Size","dram__bytes_read.sum","dram__bytes_write.sum","gpu__time_duration.sum",\
"launch__registers_per_thread","smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio",\
"smsp__average_warps_issue_stalled_selected_per_issue_active.ratio","sm__throughput.avg.pct_of_peak_sustained_elapsed"
"","","","Mbyte","byte","us","register/thread","inst","inst","%"
"0","void sea::pool<float>(sea::PoolParams)","(256, 1, 1)","3","1,000,000","1.0","64","8.0","1.0","10.0"
"1","void sea::(anonymous namespace)::loss(sea::LossParams)","(32, 1, 1)","0","0","1.0","16","2.0","1.0","n/a"
"2","void sea::pool<float>(sea::PoolParams)","(256, 1, 1)","3","1,000,000","3.0","64","4.0","1.0","30.0"
""".replace("\\\n", "")


def test_a_profile_of_ncu_becomes_one_entry_a_kernel(benchmark_module, tmp_path, capsys):
    table = tmp_path / "ncu.csv"
    table.write_text(NCU)
    module = benchmark_module("profile_step")
    report = module.summarize(module.launches(table), copy_rate=4e12, least_bytes=4e6)
    module.show_table(report)
    assert "2.00 times the least" in capsys.readouterr().out
    pool, loss = report["kernels"]
    assert [k["name"] for k in (pool, loss)] == ["sea::pool<float>", "sea::loss"]
    assert pool["launches"] == 2 and pool["ms"] == pytest.approx(4e-3) and pool["registers"] == 64
    assert (pool["bytes_read"], pool["bytes_written"]) == (6e6, 2e6)
    assert pool["copy_share"] == pytest.approx(8e6 / 4e-6 / 4e12)
    assert pool["sm_percent"] == 25 and loss["sm_percent"] is None  # weighted by time; n/a
    assert pool["stalls"] == {"long_scoreboard": 5} and pool["occupancy_percent"] is None
    assert report["step"]["launches"] == 3 and report["step"]["ms"] == pytest.approx(5e-3)
    for wrong, message in (("==ERROR== no counters", "no table of ncu"), (NCU.replace('"us"', '"fortnight"'), "units")):
        table.write_text(wrong)
        with pytest.raises(SystemExit, match=message):
            module.launches(table)


# ----------------------------------------------------------------------------------------------------------- sampler


def test_padding_changes_the_number_of_boxes_alone(benchmark_module):
    """What a captured graph is given: the regions are those of the boxes without it."""
    w, make_regions = benchmark_module("workloads").SMOKE, benchmark_module("steps").make_regions
    boxes = w.choose_boxes()
    padded = boxes.padded(64)
    assert [len(x) for x in (padded.boxes, padded.labels, padded.batch_index)] == [64] * 3
    assert padded.labels[14:].tolist() == [-1] * 50 and padded.categories == boxes.categories == 13
    assert torch.equal(boxes.padded(5).boxes, boxes.boxes)
    plain, wide = (make_regions(w, b) for b in (boxes, padded))
    assert torch.equal(plain.area, wide.area[:, : plain.area.shape[1]]) and torch.equal(plain.counted, wide.counted)


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
    annotation = {"area": 1.0, "iscrowd": 0, "segmentation": []}
    coco = {
        "images": [
            {"id": 7, "file_name": "7.jpg", "width": 640, "height": 480},
            {"id": 8, "file_name": "8.jpg", "width": 1000, "height": 400},
            {"id": 9, "file_name": "9.jpg", "width": 480, "height": 640},  # portrait: skipped
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
    """Allocates so many MiB: saved until backward, for the time of forward, for the time of backward."""

    @staticmethod
    def forward(ctx, x, saved, in_forward, in_backward):
        ctx.in_backward = in_backward
        torch.empty(in_forward * MIB, dtype=torch.uint8)
        ctx.save_for_backward(x, torch.empty(saved * MIB, dtype=torch.uint8))
        return x.new_zeros(())

    @staticmethod
    def backward(ctx, upstream):
        x, _ = ctx.saved_tensors
        gradient = torch.empty_like(x)
        torch.empty(ctx.in_backward * MIB, dtype=torch.uint8)
        return gradient, None, None, None


@pytest.mark.parametrize(
    ("saved", "in_forward", "in_backward", "peak"),
    [(3, 5, 2, 5), (3, 1, 2, 5), (0, 4, 7, 7), (6, 0, 0, 6)],
)
def test_memory_meter_counts_known_allocations(benchmark_module, saved, in_forward, in_backward, peak):
    """Inputs count in neither figure and gradients not in the peak."""
    steps, workloads, measure = map(benchmark_module, ("steps", "workloads", "measure"))
    x = torch.zeros(9 * MIB // 4, requires_grad=True)
    maps = workloads.Inputs([[x]], [], [], [], None)
    step = steps.training_step(lambda _: (_Allocates.apply(x, saved, in_forward, in_backward),))
    step(maps, lambda: None)
    measured_peak, measured_saved = measure.memory(step, maps, torch.device("cpu"))
    small = 4096  # the losses themselves
    assert saved * MIB <= measured_saved <= saved * MIB + small
    assert peak * MIB <= measured_peak <= peak * MIB + small


def test_memory_meter_sees_inside_operators(benchmark_module):
    """exp and log_softmax each save their result; the gradients in between come and go inside backward."""
    steps, workloads, measure = map(benchmark_module, ("steps", "workloads", "measure"))
    x = torch.zeros(256, 4096, requires_grad=True)  # 4 MiB
    maps = workloads.Inputs([[x]], [], [], [], None)
    step = steps.training_step(lambda _: (x.exp().log_softmax(1).sum(),))
    peak, saved = measure.memory(step, maps, torch.device("cpu"))
    assert 8 * MIB <= saved <= 8 * MIB + 4096
    assert saved <= peak <= 16 * MIB + 4096


def test_memory_meter_ignores_what_was_there_before(benchmark_module):
    measure = benchmark_module("measure")
    # Freed but never allocated in the log; allocated, freed; a result, which counts as saved only.
    events = [(0, 1, -100), (1, 2, 8), (2, 3, 4), (3, 2, -8), (4, 4, 50), (5, None, 0), (6, 5, 2), (7, 5, -2)]
    assert measure._account(events, results={4}) == (12, 54)
