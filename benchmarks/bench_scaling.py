"""Times the losses of sea_kernels on several processes: what anchors over the global batch cost in communication.

    python benchmarks/bench_scaling.py [--annotations instances_val2017.json] [--ranks 1 2 4]

For every number of processes, each with images of its own: steps with local anchors, steps with those of the whole
group, and the latter's work without its all-reduces; then the all-reduces alone. Prints tables, and writes a JSON file
with every sample and a picture. README.md beside this file says what each column means.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import tempfile
import time
from functools import partial
from pathlib import Path

import boxes as box_sources
import measure
import plot
import report
import torch
import torch.distributed as dist
from steps import TOLERANCE, deviation, sea_losses, training_step
from workloads import SMOKE, WORKLOADS, Inputs, Workload, make_inputs

from sea_kernels import group as groups

LOCAL, SAME, GLOBAL = "local anchors", "same work, no all-reduce", "global batch"
ROWS = {LOCAL: "#bbbbbb", SAME: "#99bbdd", GLOBAL: "#4477aa"}  # with their colors in the picture
GPU_RUNS = 40  # steps in one sample on a GPU; every rank has to take as many
PARAMETERS = 32e6  # of FCOS-R50; DDP all-reduces their gradients in float32

ROW_COLUMNS = {
    "ranks": "{ranks}",
    "threads": "{threads}",
    "row": "{name}",
    "forward ms": "{forward_ms:.4g}",
    "step ms": "{step_ms:.4g}",
    "weak scaling": "{efficiency:.0%}",
}
RUN_COLUMNS = {
    "ranks": "{ranks}",
    "global / same work": "{ratio:.3f}x",
    "global / local anchors": "{ratio_to_local:.3f}x",
    "all-reduces": lambda run: str(len(run["messages"])),
    "message MiB": "{message_mib:.3g}",
    "sent MiB": "{sent_mib:.3g}",
    "of DDP's gradients": "{of_ddp_gradients:.1%}",
}
MESSAGE_COLUMNS = {
    "ranks": "{ranks}",
    "message": "{message}",
    "KiB": "{kib:.4g}",
    "alone ms": "{alone_ms:.3g}",
    "added to the step ms": "{added_ms:.3g}",
}


# ------------------------------------------------------------------------------------------------------ all-reduces


def messages(w: Workload) -> dict[str, int]:
    """Bytes of every all-reduce of one step, by the shapes."""
    levels, element = len(w.strides), 8 if w.dtype == "float64" else 4
    one = levels * (1 + 2 * w.num_classes) * w.channels * element  # the anchors of one set of maps on one side
    return {
        # In float64: areas of all rows and of two spare ones, the categories present and a spare, pixels, images.
        "regions": 8 * (levels * (3 + 2 * w.num_classes) + w.num_classes + 1 + levels + 1),
        "anchors": 3 * w.maps * one,  # both sides of the classification branch, the sides' difference of the other
        "gradients of the anchors": w.maps * one,  # of the sets with distances, those of the classification branch
    }


def sent_bytes(size: float, ranks: int) -> float:
    """By every rank in a ring, which sends no more than it must."""
    return 2 * (ranks - 1) / ranks * size


@contextlib.contextmanager
def all_reduce_is(function):
    own, groups.all_reduce = groups.all_reduce, function
    try:
        yield
    finally:
        groups.all_reduce = own


def recorded(step, x: Inputs) -> tuple[tuple, list[torch.Tensor]]:
    """(what one run of the step returns, the sums that its all-reduces return)."""
    own, sums = groups.all_reduce, []

    def record(message, group):
        sums.append(own(message, group))
        return sums[-1]

    with all_reduce_is(record):
        return step(x, lambda: None), sums


def without_all_reduce(step, sums: list[torch.Tensor]):
    """The step with sums from an earlier run: on the same values it computes the same, and waits for nobody."""

    def again(x, mark):
        rest = iter(sums)
        with all_reduce_is(lambda message, group: next(rest)):
            return step(x, mark)

    return again


# --------------------------------------------------------------------------------------------------------- one rank


def of_rank(boxes: box_sources.Boxes, rank: int, batch: int) -> box_sources.Boxes:
    """The boxes of images rank * batch and following: a rank has the same images whatever the number of ranks."""
    first = rank * batch
    own = boxes.batch_index // batch == rank
    box, labels, index = boxes.boxes[own], boxes.labels[own], boxes.batch_index[own] - first
    ignore, ignore_index, sizes = boxes.ignore_boxes, boxes.ignore_batch_index, boxes.image_sizes
    if ignore is not None:
        own = ignore_index // batch == rank
        ignore, ignore_index = ignore[own], ignore_index[own] - first
    if sizes is not None:
        sizes = sizes[first : first + batch]
    return box_sources.Boxes(box, labels, index, ignore, ignore_index, sizes, boxes.num_classes, boxes.source)


def workload_of(base: Workload, boxes: box_sources.Boxes) -> Workload:
    """`base` with these boxes; maps as large as padding to the largest image of the rank makes them."""
    height, width = box_sources.padded_size(boxes.image_sizes or [(base.height, base.width)])
    return dataclasses.replace(base.with_boxes(boxes), height=height, width=width)


def sample(step, inputs: list, k: int) -> tuple[float | None, float]:
    """Milliseconds (forward, whole) on this rank of a step that all ranks begin together."""
    dist.barrier()
    if dist.get_backend() == "nccl":
        return measure.sample_cuda(step, inputs, GPU_RUNS)
    return measure.sample_cpu(step, inputs[k % len(inputs)])


def slowest(samples: list) -> list:
    """Of every sample the time of the slowest rank."""
    ranks = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, samples)
    return [max(times) for times in zip(*ranks, strict=True)]


def run_rank(rank: int, ranks: int, args: argparse.Namespace, base, boxes, progress, folder: str) -> None:
    """One process of `ranks`; the first one writes down what all have measured."""
    report.choose_allocator()
    device = torch.device("cuda", rank) if args.backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.set_num_threads(max(1, cores() // ranks))
    dist.init_process_group(
        args.backend,
        init_method=f"file://{folder}/meet_{ranks}",
        rank=rank,
        world_size=ranks,
        device_id=device if device.type == "cuda" else None,
    )
    tell = report.Progress(*progress) if rank == 0 else lambda text: None
    tell(f"{ranks} ranks, maps and warm-up")
    own = of_rank(boxes, rank, base.batch)
    workload = workload_of(base, own)
    inputs = make_inputs(workload, own, device, 1 if args.smoke else None)

    together = training_step(partial(sea_losses, workload, group=dist.group.WORLD))
    expected, sums = recorded(together, inputs[0])
    steps = {
        LOCAL: training_step(partial(sea_losses, workload)),
        SAME: without_all_reduce(together, sums),
        GLOBAL: together,
    }
    for step in steps.values():
        step(inputs[0], lambda: None)
    difference = deviation(steps[SAME](inputs[0], lambda: None), expected)
    if not difference <= TOLERANCE[workload.dtype]:
        raise SystemExit(f"without all-reduce the step computes something else (by {difference:.1e})")
    del expected

    times = {name: measure.Times() for name in ROWS}
    for k in range(args.repeats):
        tell(f"{ranks} ranks: repeat {k + 1} of {args.repeats}")
        for j, (name, step) in enumerate(steps.items()):
            forward, whole = sample(step, inputs, j + k)
            times[name].forward.append(forward)
            times[name].step.append(whole)

    of_message, alone = {}, {}
    tell(f"{ranks} ranks, all-reduces alone")
    if ranks > 1:  # a group of one sends nothing
        group = groups.join(dist.group.WORLD)
        call = lambda x, mark: groups.all_reduce(x, group)  # noqa: E731
        for name, message in zip(messages(workload), sums, strict=True):
            of_message[name] = message.nbytes
            alone[name] = slowest([sample(call, [message], 0)[1] for _ in range(args.repeats)])

    of_ranks = [None] * ranks
    dist.all_gather_object(of_ranks, dataclasses.asdict(workload))
    result = {
        "ranks": ranks,
        "threads": torch.get_num_threads(),
        "workloads": of_ranks,
        "deviation": max(slowest([difference])),
        "rows": [
            {"name": name, "step_samples_ms": slowest(t.step), "forward_samples_ms": slowest(t.forward)}
            for name, t in times.items()
        ],
        "messages": of_message,
        "all_reduce_samples_ms": alone,
    }
    if rank == 0:
        tell.close()
        Path(folder, f"result_{ranks}").write_text(json.dumps(result))
    dist.destroy_process_group()


# ----------------------------------------------------------------------------------------------------------- results


def cores() -> int:
    return len(os.sched_getaffinity(0))


def summarize(measured: list[dict], backend: str) -> None:
    """Adds medians, ratios, bytes and efficiency to what the runs have measured."""

    def row_of(run, name):
        return next(row for row in run["rows"] if row["name"] == name)

    def pixels(run):
        return sum(Workload(**w).pixels for w in run["workloads"])

    def workers(run):  # cores or GPUs at work
        return run["ranks"] if backend == "nccl" else min(cores(), run["ranks"] * run["threads"])

    one = next((run for run in measured if run["ranks"] == 1), None)
    for run in measured:
        for row in run["rows"]:
            row |= {f"{k}_ms": measure.median(row[f"{k}_samples_ms"]) for k in ("step", "forward")}
            if one is not None:
                # As if all pixels of all ranks were shared out evenly to all workers.
                ideal = pixels(run) / pixels(one) * workers(one) / workers(run)
                row["efficiency"] = row_of(one, row["name"])["step_ms"] * ideal / row["step_ms"]
        step = {name: row_of(run, name)["step_samples_ms"] for name in ROWS}
        size = sum(run["messages"].values())
        run |= {
            "ratio": measure.median([a / b for a, b in zip(step[GLOBAL], step[SAME], strict=True)]),
            "ratio_to_local": measure.median([a / b for a, b in zip(step[GLOBAL], step[LOCAL], strict=True)]),
            "added_ms": measure.median([a - b for a, b in zip(step[GLOBAL], step[SAME], strict=True)]),
            "message_bytes": size,
            "sent_bytes": sent_bytes(size, run["ranks"]),
            "of_ddp_gradients": size / (4 * PARAMETERS),
        }


def show(result: dict) -> None:
    machine, measured = result["machine"], result["measured"]
    on = f"{machine['cores']} cores" if result["backend"] == "gloo" else "a GPU for each rank"
    print(
        f"\n{machine['device']}, {on}, {result['backend']}, torch {result['versions']['torch']}\n"
        f"Each rank: {Workload(**result['workload'])} (sizes and boxes of the first)\n"
        f"Boxes of all ranks: {result['boxes']['source']}\n"
    )
    if result["left_out"]:
        print(f"Skipped, because there are fewer GPUs: {', '.join(map(str, result['left_out']))} ranks\n")
    first = {"ranks": "", "threads": ""}
    rows = [run | row | (first if k else {}) for run in measured for k, row in enumerate(run["rows"])]
    print(report.row_table(rows, ROW_COLUMNS))
    print("\n" + report.row_table(measured, RUN_COLUMNS))
    rows = []
    for run in measured:
        for name, size in run["messages"].items():
            samples = run["all_reduce_samples_ms"][name]
            row = {"ranks": run["ranks"], "message": name, "kib": size / 2**10, "alone_ms": measure.median(samples)}
            rows.append(row)
        if run["messages"]:
            own = rows[-len(run["messages"]) :]
            total = {key: sum(row[key] for row in own) for key in ("kib", "alone_ms")}
            rows.append(run | total | {"message": "all of a step"})
    if rows:
        print("\n" + report.row_table(rows, MESSAGE_COLUMNS))


def draw(result: dict, path: Path) -> None:
    figure, axis = plot.plt.subplots(figsize=(6.5, 4.2), layout="constrained")
    measured, nccl = result["measured"], result["backend"] == "nccl"
    for j, (name, color) in enumerate(ROWS.items()):
        values = [run["rows"][j]["step_ms"] for run in measured]
        axis.bar([x + 0.27 * (j - 1) for x in range(len(measured))], values, 0.25, color=color, label=name)
    for x, run in enumerate(measured):
        if run["messages"]:
            y = run["rows"][-1]["step_ms"]
            axis.text(x + 0.27, y, f"{run['ratio']:.2f}x", ha="center", va="bottom", fontsize=9)
    axis.set_xticks(range(len(measured)), [f"{r['ranks']}" + f" x {r['threads']}" * (not nccl) for r in measured])
    axis.set_xlabel("GPUs" if nccl else f"processes x threads on {result['cores']} cores")
    axis.set_ylabel("ms of one step, slowest rank")
    axis.set_title(
        f"{result['machine']['device']}, {result['backend']}, torch {result['versions']['torch']}\n"
        "The ratio is to the same work without all-reduce",
        fontsize=10,
        loc="left",
    )
    axis.spines[["top", "right"]].set_visible(False)
    axis.margins(y=0.35)  # room for the legend
    axis.legend(frameon=False, fontsize=9, loc="upper left")
    figure.savefig(path, dpi=120)
    plot.plt.close(figure)


# -------------------------------------------------------------------------------------------------------------- main


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = report.parser(__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", metavar="N", help="default: 1 2 4; 1 2 with --smoke")
    parser.add_argument("--backend", choices=("gloo", "nccl"), help="default: nccl where there are several GPUs")
    parser.add_argument("--repeats", type=int, metavar="N", help="default: 25; 2 with --smoke")
    args = parser.parse_args(argv)
    gpus = torch.cuda.device_count() if dist.is_nccl_available() else 0
    args.backend = args.backend or ("nccl" if gpus > 1 else "gloo")
    args.ranks = sorted(set(args.ranks or ((1, 2) if args.smoke else (1, 2, 4))))
    if args.repeats is None:
        args.repeats = 2 if args.smoke else 25
    if min(*args.ranks, args.repeats) < 1:
        parser.error("ranks or repeats are below 1; expected at least 1")
    args.left_out = [n for n in args.ranks if args.backend == "nccl" and n > gpus]
    args.ranks = [n for n in args.ranks if n not in args.left_out]
    if not args.ranks:
        parser.error(f"nccl wants a GPU for each rank, and there are {gpus}")
    return args


def run(args: argparse.Namespace, argv: list[str] | None) -> dict:
    base = SMOKE if args.smoke else WORKLOADS["default" if args.backend == "gloo" else "W1"]
    boxes = box_sources.choose(args.annotations, base.batch * max(args.ranks), base.height, base.width)
    total = len(args.ranks) * (2 + args.repeats)  # what the first ranks have to tell
    start, measured = time.monotonic(), []
    if args.left_out:
        report.say(f"{args.left_out} ranks are skipped: there are fewer GPUs")
    with tempfile.TemporaryDirectory() as folder:
        for k, n in enumerate(args.ranks):
            rest = n, args, base, boxes, (total, total // len(args.ranks) * k), folder
            if n == 1:
                run_rank(0, *rest)
            else:
                torch.multiprocessing.spawn(run_rank, rest, nprocs=n)
            measured.append(json.loads(Path(folder, f"result_{n}").read_text()))
    summarize(measured, args.backend)
    return {
        **report.provenance("bench_scaling.py", argv, torch.device("cuda" if args.backend == "nccl" else "cpu")),
        "backend": args.backend,
        "cores": cores(),
        "workload": measured[0]["workloads"][0],
        "boxes": {"source": boxes.source, "image_sizes": boxes.image_sizes},
        "left_out": args.left_out,
        "measured": measured,
        "seconds": round(time.monotonic() - start, 1),
    }


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    report.begin()
    result = run(args, argv)
    show(result)
    report.save(result, args.out / "bench_scaling", draw)


if __name__ == "__main__":
    report.run(main)
