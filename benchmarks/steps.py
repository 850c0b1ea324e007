"""The rows of the benchmarks: what computes the losses of one step, and how each is checked and measured."""

import contextlib
import dataclasses
import math
import signal
import time
from functools import partial

import context_losses
import measure
import report
import torch
from boxes import Boxes
from workloads import Inputs, Workload

import sea_kernels as sk

NATIVE, GRAPH, EAGER, COMPILED = "sea_kernels", "sea_kernels, CUDA graph", "eager reference", "torch.compile reference"
COMPILED_GRAPH, AUTOTUNED = f"{COMPILED}, CUDA graph", f"{COMPILED}, max-autotune"
SEA = (NATIVE, GRAPH, EAGER, COMPILED, COMPILED_GRAPH, AUTOTUNED)  # the rows that compute the same
ROOM = 32  # boxes per image that the CUDA graph has room for: a batch with fewer is padded
# How far the native kernels may be from the eager reference, relative to the largest gradient of a map, or to the loss.
# The gradients are rounded to the dtype of the map, in float16 to fixed steps of 6e-8 where they are small.
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 2e-2}


def make_regions(workload: Workload, boxes: Boxes, group=None) -> sk.Regions:
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
            # Kept: a replay reads the boxes where they were when the graph was captured.
            self.padded = inputs[0].boxes.padded(room)
            run, step = step, lambda x, mark: run(dataclasses.replace(x, boxes=self.padded), mark)
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
        fgd, cwd = context_losses.FGDLoss(workload.channels, workload.strides), context_losses.cwd_loss
        fgd = fgd.to(inputs[0].student[0]).requires_grad_(False)

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
    """TimeoutError after so many seconds."""
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

    A plain step that needs more memory than there is, and one that does not compile within half of the `budget`
    (seconds), is reported and skipped; the native ones must run.
    """
    start = time.monotonic()
    steps, rows, expected = {}, {}, None
    for name, make in makers.items():
        if name == COMPILED_GRAPH and COMPILED not in steps:
            continue
        compiles = name in (COMPILED, COMPILED_GRAPH, AUTOTUNED)
        tell(f"{name}: warm-up" + ", compiling once, which may take minutes" * (name in (COMPILED, AUTOTUNED)))
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
            report.say(f"{name} is skipped: {rows[name]['left_out']}")
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
            row["peak_bytes"], row["saved_bytes"] = measure.memory(step, inputs[0], device)
            row |= {f"{k}_percent": 100 * row[f"{k}_bytes"] / (2 * workload.branch_bytes) for k in ("peak", "saved")}
        if device.type == "cuda":
            row["launches"], row["synchronizations"] = measure.cuda_calls(step, inputs[0])

    progress = lambda k: tell(f"time: repeat {k + 1} of {repeats}")  # noqa: E731
    times = measure.interleave(steps, inputs, device, repeats, progress, start + budget)
    for name in steps:
        row = rows[name]
        row |= {"step_samples_ms": times[name].step, "forward_samples_ms": times[name].forward}
        row["step_ms"] = measure.median(times[name].step)
        if times[name].faults:
            row["page_faults"] = measure.median(times[name].faults)
        if times[name].forward:
            row["forward_ms"] = measure.median(times[name].forward)
        if name in SEA:
            row["least_bytes"] = workload.least_bytes
            row["bandwidth_share"] = workload.least_bytes / (row["step_ms"] / 1e3) / copy_rate
        for other, key in ((EAGER, "eager_ratio"), (COMPILED, "compiled_ratio")):
            if other in steps:
                row[key] = measure.median(times[other].step) / row["step_ms"]
    return sorted(rows.values(), key=lambda row: SEA.index(row["name"]) if row["name"] in SEA else len(SEA))
