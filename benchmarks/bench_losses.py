"""Times the losses of sea_kernels, from ground-truth boxes to the student's gradients, against plain PyTorch.

    python benchmarks/bench_losses.py [--annotations instances_val2017.json] [--device cuda --workload W1] [--full]

In one run on one device: the native kernels, the reference in eager mode and under torch.compile (on a GPU all but
eager in CUDA graphs too), and an FGD-style and a CWD-style loss as context. Prints a table, and writes a JSON file with
every sample and a picture. README.md beside this file says what each column means.
"""

import argparse
import contextlib
import dataclasses
import math
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import boxes as box_sources
import context_losses
import measure
import plot
import torch

import sea_kernels as sk

NATIVE, GRAPH, EAGER, COMPILED = "sea_kernels", "sea_kernels, CUDA graph", "eager reference", "torch.compile reference"
COMPILED_GRAPH, AUTOTUNED = f"{COMPILED}, CUDA graph", f"{COMPILED}, max-autotune"
SEA = (NATIVE, GRAPH, EAGER, COMPILED, COMPILED_GRAPH, AUTOTUNED)  # the rows that compute the same
ROOM = 32  # boxes an image that the CUDA graph has room for: a batch with fewer is padded
# How far the native kernels may be from the eager reference, relative to the largest gradient of a map, or to the loss.
# The gradients are rounded to the dtype of the map, in float16 to fixed steps of 6e-8 where they are small.
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 2e-2}


@dataclass(frozen=True)
class Workload:
    batch: int = 2
    height: int = 800
    width: int = 1344
    channels: int = 256
    maps: int = 1  # of each of the two branches
    dtype: str = "float32"
    boxes: int = 14
    categories: int = 13
    num_classes: int = 80
    channels_last: bool = False
    strides: tuple[int, ...] = (8, 16, 32, 64, 128)

    @property
    def level_shapes(self) -> list[tuple[int, int]]:
        return [(math.ceil(self.height / s), math.ceil(self.width / s)) for s in self.strides]

    @property
    def branch_bytes(self) -> int:
        """Of all maps of one branch on one side; a feature set is two of these."""
        pixels = self.batch * sum(h * w for h, w in self.level_shapes)
        return pixels * self.channels * self.maps * getattr(torch, self.dtype).itemsize

    @property
    def least_bytes(self) -> int:
        """What from boxes to gradients must read and write.

        Classification maps: student and teacher are read to pool the anchors, for the distances, and in backward (6
        reads), and the gradient is written. Box maps need no distances: 4 reads and the gradient.
        """
        return (6 + 1) * self.branch_bytes + (4 + 1) * self.branch_bytes

    def __str__(self) -> str:
        text = (
            f"batch {self.batch}, {self.height}x{self.width}, strides {self.strides[0]}..{self.strides[-1]}, "
            f"{self.channels} channels, {self.dtype}, {self.maps} map{'s' * (self.maps > 1)} a branch, "
            f"{self.boxes} boxes of {self.categories} categories"
        )
        return text + ", channels_last" * self.channels_last


_COCO_16 = Workload(batch=16, maps=4, dtype="bfloat16", boxes=130, categories=31)  # what 16 COCO images have
WORKLOADS = {
    "default": Workload(),
    "W1": Workload(maps=4, dtype="bfloat16", boxes=14, categories=5),  # FCOS-R50 as it is trained
    "W2": _COCO_16,
    "W3": dataclasses.replace(_COCO_16, dtype="float32"),
    "W4": dataclasses.replace(_COCO_16, boxes=400, categories=300, num_classes=1203),  # as crowded as LVIS
    "W5": dataclasses.replace(_COCO_16, channels_last=True),
}
SMOKE = Workload(height=64, width=96, channels=16, strides=(8, 16, 32))


def sweeps(base: Workload, full: bool) -> dict[str, list[tuple[str, Workload]]]:
    """Name of the sweep -> (label, workload) of its points: `base` with one thing changed."""

    def vary(**changes):
        return dataclasses.replace(base, **changes)

    def crowd(categories):  # as many boxes as it takes
        classes = base.num_classes if categories <= base.num_classes else 1203
        return vary(categories=categories, boxes=max(base.boxes, categories), num_classes=classes)

    sizes = [(400, 672), (600, 1008), (800, 1344), (1200, 2016)] if full else [(400, 672), (800, 1344)]
    counts = [1, 13, 50, 100, 200, 400] if full else [1, 13, 100, 400]
    dtypes = ["float32", "bfloat16", "float16"] if full else ["float32", "bfloat16"]
    return {
        "batch size": [(str(n), vary(batch=n)) for n in ([1, 2, 4, 8] if full else [1, 2, 4])],
        "image size": [(f"{h}x{w}", vary(height=h, width=w)) for h, w in sizes],
        "categories present": [(str(n), crowd(n)) for n in counts],
        "maps a branch": [(str(n), vary(maps=n)) for n in (1, 4)],
        "dtype": [(d, vary(dtype=d)) for d in dtypes],
    }


@dataclass
class Inputs:
    """One batch: the maps of both branches and both sides, `[m][l]`, and the boxes."""

    student_cls: list[list[torch.Tensor]]
    teacher_cls: list[list[torch.Tensor]]
    student_box: list[list[torch.Tensor]]
    teacher_box: list[list[torch.Tensor]]
    boxes: box_sources.Boxes

    @property
    def student(self) -> list[torch.Tensor]:
        return [x for level in (*self.student_cls, *self.student_box) for x in level]


def sample_boxes(w: Workload) -> box_sources.Boxes:
    return box_sources.sample(w.batch, w.height, w.width, w.boxes, w.categories, w.num_classes)


def make_inputs(workload: Workload, boxes: box_sources.Boxes, device: torch.device, count: int | None = None):
    """So many batches that together they are twice as large as the last cache (at most 16), or `count`.

    On a GPU two at least: its cache holds the end of what was read last.
    """
    size = 4 * workload.branch_bytes
    least = 2 if device.type == "cuda" else 1
    count = count or max(least, min(16, math.ceil(2 * measure.cache_bytes(device) / size)))
    generator = torch.Generator(device).manual_seed(0)
    layout = torch.channels_last if workload.channels_last else torch.contiguous_format

    def random_map(h, w):
        x = torch.randn(workload.batch, workload.channels, h, w, device=device, generator=generator)
        return x.to(getattr(torch, workload.dtype), memory_format=layout)

    def side():
        return [[[random_map(*s) for s in workload.level_shapes] for _ in range(workload.maps)] for _ in range(2)]

    def copied(maps, gradient):
        return [[x.clone().requires_grad_(gradient) for x in levels] for levels in maps]

    # Copies of the same values: other memory is all that it takes.
    student, teacher, boxes = side(), side(), boxes.to(device)
    return [
        Inputs(*(copied(maps[b], maps is student) for b in range(2) for maps in (student, teacher)), boxes)
        for _ in range(count)
    ]


# ------------------------------------------------------------------------------------------------------------- rows


def make_regions(workload: Workload, boxes: box_sources.Boxes, group=None) -> sk.Regions:
    return sk.Regions.from_boxes(
        boxes.boxes,
        boxes.labels,
        workload.level_shapes,
        list(workload.strides),
        num_classes=boxes.num_classes,
        batch_index=boxes.batch_index,
        batch_size=workload.batch,
        image_sizes=boxes.image_sizes,
        ignore_boxes=boxes.ignore_boxes,
        ignore_batch_index=boxes.ignore_batch_index,
        group=group,
    )


def sea_losses(workload: Workload, x: Inputs, group=None):
    regions = make_regions(workload, x.boxes, group)
    return tuple(sk.sea_loss(x.student_cls, x.teacher_cls, x.student_box, x.teacher_box, regions))


def training_step(forward, backend="native"):
    """A step as measure.py wants it, with the gradient of the sum of the losses."""
    weights: list[torch.Tensor] = []

    def step(x: Inputs, mark):
        with sk.backend(backend):
            losses = forward(x)
            mark()
            if not weights:  # once: to fill them would be launches that are not the losses'
                weights.extend(torch.ones_like(loss) for loss in losses)
            gradients = torch.autograd.grad(losses, x.student, weights)
        return [loss.detach() for loss in losses], gradients

    return step


class GraphStep:
    """The step of every input captured in a CUDA graph of its own, from boxes to gradients; one memory for all."""

    def __init__(self, step, inputs, room=None):
        if room:
            padded = inputs[0].boxes.padded(room)
            run, step = step, lambda x, mark: run(dataclasses.replace(x, boxes=padded), mark)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step(inputs[0], lambda: None)
        torch.cuda.current_stream().wait_stream(stream)
        self.captured, pool = {}, torch.cuda.graph_pool_handle()
        for x in inputs:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                results = step(x, lambda: None)
            self.captured[id(x)] = graph, results

    def __call__(self, x, mark):
        graph, results = self.captured[id(x)]
        graph.replay()
        return results


def compiled_step(workload: Workload, mode: str | None = None):
    compiled = torch.compile(partial(sea_losses, workload), fullgraph=True, dynamic=False, mode=mode)
    return training_step(compiled, "reference")


def make_steps(workload: Workload, inputs: list[Inputs], compiled: bool, context: bool, autotune: bool = False):
    """Name -> function that makes the step (a function, because capturing a graph runs it)."""
    sea = partial(sea_losses, workload)
    cuda = inputs[0].boxes.boxes.is_cuda
    steps = {EAGER: lambda: training_step(sea, "reference"), NATIVE: lambda: training_step(sea)}
    if context and cuda:
        steps[GRAPH] = lambda: GraphStep(training_step(sea), inputs, ROOM * workload.batch)
    if compiled:
        torch.compiler.reset()
        step = compiled_step(workload)
        steps[COMPILED] = lambda: step
        if context and cuda:
            steps[COMPILED_GRAPH] = lambda: GraphStep(step, inputs)
    if autotune:  # without its own CUDA graphs: they copy every input first
        steps[AUTOTUNED] = lambda: compiled_step(workload, "max-autotune-no-cudagraphs")
    if context:
        example = inputs[0].student[0]
        fgd = context_losses.FGDLoss(workload.channels, workload.strides).to(example).requires_grad_(False)
        cwd = context_losses.cwd_loss

        def fgd_losses(x):
            boxes = x.boxes.boxes, x.boxes.batch_index
            return fgd(x.student_cls, x.teacher_cls, *boxes), fgd(x.student_box, x.teacher_box, *boxes)

        def cwd_losses(x):
            return cwd(x.student_cls, x.teacher_cls), cwd(x.student_box, x.teacher_box)

        steps["FGD-style"] = lambda: training_step(fgd_losses)
        steps["CWD-style"] = lambda: training_step(cwd_losses)
    return steps


def deviation(result, expected) -> float:
    """The largest deviation of a loss or of a map's gradient, relative to its largest value; NaN counts as inf."""
    pairs = [pair for r, e in zip(result, expected, strict=True) for pair in zip(r, e, strict=True)]
    relative = [((a.float() - b.float()).abs().max() / b.float().abs().max().clamp(min=1e-30)).item() for a, b in pairs]
    return max(math.inf if math.isnan(r) else r for r in relative)


@contextlib.contextmanager
def time_limit(seconds: float):
    """TimeoutError once so many seconds are over: what comes after has a time to be ready by."""
    if seconds == math.inf:
        yield
        return

    def stop(*_):
        raise TimeoutError("not ready in time")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def measure_rows(workload, inputs, makers, device, repeats, copy_rate, tell, budget=math.inf) -> list[dict]:
    """Runs every step once to warm up and to compare its results, then measures memory, then time.

    A plain step for which the memory is too small, and one that does not compile within half of the `budget` (seconds),
    is left out; the native ones must run.
    """
    start = time.monotonic()
    steps, rows, expected = {}, {}, None
    for name, make in makers.items():
        if name == COMPILED_GRAPH and COMPILED not in steps:
            continue
        compiles = name in (COMPILED, COMPILED_GRAPH, AUTOTUNED)
        tell(f"{name}: warm-up" + ", compiling once: may take minutes" * (name in (COMPILED, AUTOTUNED)))
        rows[name] = {"name": name}
        try:
            with time_limit(start + budget / 2 - time.monotonic() if compiles else math.inf):
                step = make()
                result = step(inputs[0], lambda: None)
        except Exception as e:
            too_large = isinstance(e, torch.OutOfMemoryError)
            if name in (NATIVE, GRAPH) or not (compiles or too_large):
                raise
            rows[name]["left_out"] = "out of memory" if too_large else repr(e)[:300]
            print(f"{name} is left out: {rows[name]['left_out']}", file=sys.stderr)
            continue
        steps[name] = step
        if name == EAGER:
            expected = result
        if name in SEA and name != EAGER and expected is not None:
            rows[name]["deviation"] = deviation(result, expected)
            if name in (NATIVE, GRAPH) and not rows[name]["deviation"] <= TOLERANCE[workload.dtype]:
                raise SystemExit(
                    f"{name} deviates from the {EAGER} by {rows[name]['deviation']:.1e} of the largest value, "
                    f"{TOLERANCE[workload.dtype]:.0e} is allowed ({workload}): nothing was measured"
                )
    del expected, result

    for name, step in steps.items():
        tell(f"{name}: memory")
        row = rows[name]
        if not isinstance(step, GraphStep):  # its memory was allocated when it was captured
            peak, kept = measure.memory(step, inputs[0], device)
            row |= {"peak_bytes": peak, "kept_bytes": kept}
            row |= {f"{k}_percent": 100 * row[f"{k}_bytes"] / (2 * workload.branch_bytes) for k in ("peak", "kept")}
        if device.type == "cuda":
            row["launches"], row["synchronisations"] = measure.cuda_calls(step, inputs[0])

    progress = lambda k: tell(f"time: repeat {k + 1} of {repeats}")  # noqa: E731
    times = measure.interleave(steps, inputs, device, repeats, progress, start + budget)
    for name in steps:
        row = rows[name]
        row |= {"step_samples_ms": times[name].step, "forward_samples_ms": times[name].forward}
        row["step_ms"] = measure.median(times[name].step)
        if times[name].forward:
            row["forward_ms"] = measure.median(times[name].forward)
        if name in SEA:
            row["least_bytes"] = workload.least_bytes
            row["bandwidth_share"] = workload.least_bytes / (row["step_ms"] / 1e3) / copy_rate
        for other, key in ((EAGER, "eager_ratio"), (COMPILED, "compiled_ratio")):
            if other in steps:
                row[key] = measure.median(times[other].step) / row["step_ms"]
    return sorted(rows.values(), key=lambda row: SEA.index(row["name"]) if row["name"] in SEA else len(SEA))


# ----------------------------------------------------------------------------------------------------------- output


class Progress:
    """`[ 12.3 s] 4 of 30: what` on stderr."""

    def __init__(self, total: int):
        self.total, self.done, self.start = total, 0, time.monotonic()

    def __call__(self, text: str) -> None:
        self.done += 1
        elapsed = time.monotonic() - self.start
        print(f"[{elapsed:6.1f} s] {self.done} of {self.total}: {text}", file=sys.stderr, flush=True)


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table whose columns line up."""
    widths = [max(len(r[i]) for r in [header, *rows]) for i in range(len(header))]

    def line(cells):
        aligned = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
        return "| " + " | ".join(aligned) + " |"

    rule = ["-" * w if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join([line(header), line(rule), *map(line, rows)])


def cell(row: dict, key: str, form: str) -> str:
    return form.format(row[key]) if key in row else "-"


def main_table(rows: list[dict]) -> str:
    columns: dict[str, Callable[[dict], str]] = {
        "": lambda r: r["name"] + (f": {r['left_out'][:40]}" if "left_out" in r else ""),
        "forward ms": lambda r: cell(r, "forward_ms", "{:.4g}"),
        "forward+backward ms": lambda r: cell(r, "step_ms", "{:.4g}"),
        "vs eager": lambda r: cell(r, "eager_ratio", "{:.2f}x"),
        "vs compiled": lambda r: cell(r, "compiled_ratio", "{:.2f}x"),
        "launches": lambda r: cell(r, "launches", "{}"),
        "syncs": lambda r: cell(r, "synchronisations", "{}"),
        "peak MiB": lambda r: mib(r, "peak"),
        "kept MiB": lambda r: mib(r, "kept"),
        "least MiB moved": lambda r: mib(r, "least"),
        "of copy rate": lambda r: cell(r, "bandwidth_share", "{:.1%}"),
    }
    return table(list(columns), [[column(r) for column in columns.values()] for r in rows])


def mib(row: dict, what: str) -> str:
    if f"{what}_bytes" not in row:
        return "-"
    share = f" ({row[f'{what}_percent']:.1f}%)" if f"{what}_percent" in row else ""
    return f"{row[f'{what}_bytes'] / 2**20:.4g}{share}"


def sweep_table(sweep_rows: dict) -> str:
    header = ["", "value", "sea_kernels ms", "vs eager", "vs compiled", "peak", "kept", "of copy rate"]
    lines = []
    for name, points in sweep_rows.items():
        for k, point in enumerate(points):
            native = next(r for r in point["rows"] if r["name"] == NATIVE)
            lines.append(
                [
                    name if k == 0 else "",
                    point["label"],
                    cell(native, "step_ms", "{:.4g}"),
                    cell(native, "eager_ratio", "{:.2f}x"),
                    cell(native, "compiled_ratio", "{:.2f}x"),
                    cell(native, "peak_percent", "{:.1f}%"),
                    cell(native, "kept_percent", "{:.1f}%"),
                    cell(native, "bandwidth_share", "{:.1%}"),
                ]
            )
    return table(header, lines)


def floors(workload: Workload, boxes: box_sources.Boxes, rates: dict) -> dict:
    """What the hardware must at least do for one step, and how long that takes at the rates measured in this run."""
    regions = make_regions(workload, boxes)
    anchors = (regions.area > 0).sum(1)
    # Distances: cosines of student and teacher, gradient of the anchors, gradient of the pixels.
    operations = 4 * 2 * workload.channels * workload.maps * float((regions.counted * anchors).sum())
    gemm = rates.get(f"gemm_{workload.dtype}", rates["gemm_float32"])
    if workload.dtype == "float32":  # three products of TF32 parts are as exact
        gemm = max(gemm, rates.get("gemm_tf32", 0) / 3)
    return {
        "pixels": workload.batch * sum(h * w for h, w in workload.level_shapes),
        "counted_pixels": int(regions.counted.sum()),
        "anchors_of_level": anchors.tolist(),
        "least_bytes": workload.least_bytes,
        "least_bytes_ms": 1e3 * workload.least_bytes / rates["copy"],
        "least_operations": operations,
        "least_operations_ms": 1e3 * operations / gemm,
    }


def show(report: dict) -> None:
    workload = Workload(**report["workload"])
    machine, floor, rates = (report[key] for key in ("machine", "floor", "rates"))
    gemms = ", ".join(f"{k.removeprefix('gemm_')} {v / 1e9:,.0f} GFLOP/s" for k, v in rates.items() if k != "copy")
    deviations = ", ".join(f"{row['name']} {row['deviation']:.1e}" for row in report["rows"] if "deviation" in row)
    print(
        f"\n{machine['device']}, {machine['threads']} threads, torch {report['versions']['torch']}\n"
        f"Workload: {workload}\n"
        f"Boxes: {report['boxes']['source']}; {floor['counted_pixels']} of {floor['pixels']} pixels count\n"
        f"Feature set: {2 * workload.branch_bytes / 2**20:.4g} MiB; {report['batches']} batches in turn\n"
        f"Rates: copy {rates['copy'] / 1e9:.4g} GB/s; matrix product {gemms}\n"
        f"Floor: {floor['least_bytes'] / 2**20:.4g} MiB moved: {floor['least_bytes_ms']:.3g} ms; "
        f"{floor['least_operations'] / 1e9:.3g} GFLOP: {floor['least_operations_ms']:.3g} ms\n"
        f"Largest deviation of a loss or of a map's gradient from the {EAGER}: {deviations}\n"
    )
    print(main_table(report["rows"]))
    if report["sweeps"]:
        print("\n" + sweep_table(report["sweeps"]))


# ------------------------------------------------------------------------------------------------------------- main


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workload", choices=WORKLOADS, default="default")
    parser.add_argument("--annotations", type=Path, metavar="FILE", help="COCO annotations; else boxes are sampled")
    parser.add_argument("--full", action="store_true", help="more repeats, all sweeps, torch.compile in them too")
    parser.add_argument("--smoke", action="store_true", help="tiny maps, no compile: checks the program, not the speed")
    parser.add_argument("--no-compile", action="store_true", help="without the rows of torch.compile")
    parser.add_argument("--autotune", action="store_true", help="a row for torch.compile's max-autotune too")
    parser.add_argument(
        "--compile-only", action="store_true", help="fill torch.compile's cache for this workload, no more"
    )
    budget_help = "of the main table: past it fewer repeats, and no torch.compile that takes more than half of it"
    parser.add_argument("--budget", type=float, metavar="SECONDS", default=math.inf, help=budget_help)
    parser.add_argument("--threads", type=int, help="of torch on the CPU")
    parser.add_argument("--out", type=Path, metavar="DIR", default=Path(__file__).parent / "out")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> dict | None:
    device = torch.device(args.device)
    base = SMOKE if args.smoke else WORKLOADS[args.workload]
    repeats, sweep_repeats = (2, 2) if args.smoke else (15, 7) if args.full else (9, 3)
    batches = 1 if args.smoke else None

    if args.annotations:
        shape = base.batch, base.height, base.width
        boxes = box_sources.from_annotations(args.annotations, *shape, base.boxes, base.categories)
    else:
        boxes = sample_boxes(base)
    workload = dataclasses.replace(
        base, boxes=len(boxes.labels), categories=boxes.categories, num_classes=boxes.num_classes
    )
    if args.smoke:
        swept = {"batch size": [(str(n), dataclasses.replace(base, batch=n)) for n in (1, 2)]}
    elif args.full or args.workload == "default":
        swept = sweeps(base, args.full)
    else:
        swept = {}
    points = {point for points in swept.values() for _, point in points}

    if args.compile_only:
        compiled_step(workload)(*make_inputs(workload, boxes, device, 1), lambda: None)
        return None
    inputs = make_inputs(workload, boxes, device, batches)
    compiled = not (args.smoke or args.no_compile)
    makers = make_steps(workload, inputs, compiled, context=True, autotune=args.autotune)
    tell = Progress(1 + 2 * len(makers) + repeats + len(points))
    tell("copy and matrix product rates of the machine")
    rates = measure.rates(device, getattr(torch, workload.dtype), small=args.smoke)
    report = {
        **measure.provenance("bench_losses.py", args.argv, device),
        "workload": dataclasses.asdict(workload),
        "batches": len(inputs),
        "boxes": {
            "source": boxes.source,
            "ignore_boxes": 0 if boxes.ignore_boxes is None else len(boxes.ignore_boxes),
            "image_sizes": boxes.image_sizes,
        },
        "rates": rates,
        "floor": floors(workload, inputs[0].boxes, rates),
        "rows": measure_rows(workload, inputs, makers, device, repeats, rates["copy"], tell, args.budget),
    }
    del inputs, makers

    measured = {}
    for point in sorted(points, key=lambda w: w.branch_bytes):
        tell(f"sweep: {point}")
        inputs = make_inputs(point, sample_boxes(point), device, batches)
        makers = make_steps(point, inputs, compiled=args.full, context=False)
        rows = measure_rows(point, inputs, makers, device, sweep_repeats, rates["copy"], tell=lambda text: None)
        measured[point] = {"workload": dataclasses.asdict(point), "rows": rows}
        del inputs, makers
    report["sweeps"] = {
        name: [{"label": label} | measured[point] for label, point in points] for name, points in swept.items()
    }
    report["seconds"] = round(time.monotonic() - tell.start, 1)
    return report


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    args.argv = sys.argv[1:] if argv is None else argv
    if sk.ops.LIBRARY_ERROR:
        raise SystemExit(f"sea_kernels cannot run: {sk.ops.LIBRARY_ERROR}")
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    report = run(args)
    if report is None:
        return
    show(report)
    name = "bench_losses" + ("" if args.workload == "default" else f"_{args.workload}")
    measure.save(report, args.out / name, plot.draw)


if __name__ == "__main__":
    main()
