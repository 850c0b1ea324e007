"""Times the losses of sea_kernels on several processes: what anchors over the global batch cost in communication.

    python benchmarks/bench_scaling.py [--annotations instances_val2017.json] [--ranks 1 2 4]

For every number of processes, each with images of its own: steps with anchors of its own, steps with those of the whole
group, and the latter's work without its all-reduces. Then a model of the all-reduces: fitted to those of this machine,
and for many GPUs. Prints tables, and writes a JSON file with every sample and a picture. README.md beside this file
says what each column means.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import os
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import bench_losses as bench
import boxes as box_sources
import measure
import plot
import torch
import torch.distributed as dist
from bench_step import SEA_MS  # of W1 on one GPU, a prediction

import sea_kernels as sk
from sea_kernels import distributed

ALONE, SAME, GLOBAL = "each for itself", "same work, no all-reduce", "global batch"
ROWS = (ALONE, SAME, GLOBAL)
COLORS = {ALONE: "#bbbbbb", SAME: "#99bbdd", GLOBAL: "#4477aa"}
GPU_RUNS = 40  # steps in one sample on a GPU; every rank has to take as many
SWEEP = [2**k for k in range(12, 25, 2)]  # bytes of the all-reduces that the model is fitted to
PARAMETERS = 32e6  # of FCOS-R50; DDP all-reduces their gradients in float32

# The model for many GPUs. All of these are assumptions, none is a measurement: of a node of eight H100s with NVSwitch,
# and of a network card of 400 Gbit/s for each GPU. More than a node counts as if every hop left its node.
GPUS = (8, 64, 512)
NODE = 8  # GPUs that NVLink connects
IN_NODE = {"latency_s": 5e-6, "bandwidth": 300e9}  # seconds a hop, bytes a second of one GPU
BETWEEN_NODES = {"latency_s": 15e-6, "bandwidth": 40e9}
# Student and teacher of W1 on a GPU by their convolutions alone: bench_step.py's prediction, itself no measurement.
TRAINING_STEP_MS = 6.1 + 2.9


# ------------------------------------------------------------------------------------------------------------- model


def messages(w: bench.Workload) -> dict[str, int]:
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


def all_reduce_seconds(size: float, ranks: int, latency_s: float, bandwidth: float) -> float:
    """Up and down a tree, never more hops than the 2 (ranks - 1) of a ring. Linear in latency and 1 / bandwidth."""
    return 2 * math.ceil(math.log2(ranks)) * latency_s + sent_bytes(size, ranks) / bandwidth


def fit(points: list[tuple[int, int, float]]) -> dict[str, float]:
    """Latency and bandwidth with the least relative errors at all-reduces (ranks, bytes, seconds)."""
    hops = [all_reduce_seconds(0, n, 1, 1) / t for n, _, t in points]
    sent = [sent_bytes(size, n) / t for n, size, t in points]
    table = torch.tensor([hops, sent], dtype=torch.float64).T
    latency, inverse = torch.linalg.lstsq(table, torch.ones(len(points), 1, dtype=torch.float64)).solution.flatten()
    # Where small messages are all noise, as in a tiny run, either could come out negative.
    return {"latency_s": max(latency.item(), 0.0), "bandwidth": 1 / max(inverse.item(), 1e-15)}


def gpu_model() -> dict:
    """What the all-reduces of W1 take on many GPUs, if nothing hides them."""
    w = bench.WORKLOADS["W1"]
    rows = []
    for n in GPUS:
        link = IN_NODE if n <= NODE else BETWEEN_NODES
        of_message = {name: 1e3 * all_reduce_seconds(size, n, **link) for name, size in messages(w).items()}
        total = sum(of_message.values())
        rows.append(
            {
                "gpus": n,
                "of_message_ms": of_message,
                "all_reduces_ms": total,
                "latency_ms": sum(1e3 * all_reduce_seconds(0, n, **link) for _ in of_message),
                "of_sea_step": total / SEA_MS,
                "of_training_step": total / TRAINING_STEP_MS,
                "ddp_gradients_ms": 1e3 * all_reduce_seconds(4 * PARAMETERS, n, **link),
            }
        )
    return {
        "measured_on_gpus": False,
        "workload": dataclasses.asdict(w),
        "messages": messages(w),
        "in_node": IN_NODE,
        "between_nodes": BETWEEN_NODES,
        "gpus_of_a_node": NODE,
        "sea_ms": SEA_MS,
        "training_step_ms": TRAINING_STEP_MS,
        "rows": rows,
    }


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


def workload_of(base: bench.Workload, boxes: box_sources.Boxes) -> bench.Workload:
    """`base` with these boxes; maps as large as padding to the largest image of the rank makes them."""
    sizes = boxes.image_sizes or [(base.height, base.width)]
    height, width = (32 * math.ceil(max(size[d] for size in sizes) / 32) for d in (0, 1))
    numbers = {"boxes": len(boxes.labels), "categories": boxes.categories, "num_classes": boxes.num_classes}
    return dataclasses.replace(base, height=height, width=width, **numbers)


@contextlib.contextmanager
def all_reduce_is(function):
    own, distributed.all_reduce = distributed.all_reduce, function
    try:
        yield
    finally:
        distributed.all_reduce = own


def recorded(step, x: bench.Inputs) -> tuple[tuple, list[torch.Tensor]]:
    """(what one run of the step returns, what each of its all-reduces does)."""
    own, sums = distributed.all_reduce, []

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


def sample(step, inputs: list, k: int) -> tuple[float | None, float]:
    """Milliseconds (forward, whole) on this rank of a step that all ranks begin together."""
    dist.barrier()
    if dist.get_backend() == "nccl":
        return measure._sample_cuda(step, inputs, GPU_RUNS)
    return measure._sample_cpu(step, inputs[k % len(inputs)])


def slowest(samples: list) -> list:
    """Of every sample the time of the slowest rank."""
    ranks = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, samples)
    return [max(times) for times in zip(*ranks, strict=True)]


def run_rank(rank: int, ranks: int, args: argparse.Namespace, base, boxes, tell, folder: str) -> None:
    """One process of `ranks`; the first one writes down what all have measured."""
    device = torch.device("cuda", rank) if args.backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.set_num_threads(threads_of(args, ranks))
    dist.init_process_group(
        args.backend,
        init_method=f"file://{folder}/meet_{ranks}",
        rank=rank,
        world_size=ranks,
        device_id=device if device.type == "cuda" else None,
    )
    tell = tell if rank == 0 else lambda text: None
    tell(f"{ranks} ranks: maps and warm-up")
    own = of_rank(boxes, rank, base.batch)
    workload = workload_of(base, own)
    inputs = bench.make_inputs(workload, own, device, 1 if args.smoke else None)

    together = bench.training_step(partial(bench.sea_losses, workload, group=dist.group.WORLD))
    expected, sums = recorded(together, inputs[0])
    steps = {
        ALONE: bench.training_step(partial(bench.sea_losses, workload)),
        SAME: without_all_reduce(together, sums),
        GLOBAL: together,
    }
    for step in steps.values():
        step(inputs[0], lambda: None)
    deviation = bench.deviation(steps[SAME](inputs[0], lambda: None), expected)
    if not deviation <= bench.TOLERANCE[workload.dtype]:
        raise SystemExit(f"without all-reduce the step computes something else (by {deviation:.1e})")
    del expected

    times = {name: measure.Times() for name in ROWS}
    for k in range(args.repeats):
        tell(f"{ranks} ranks: repeat {k + 1} of {args.repeats}")
        for j, (name, step) in enumerate(steps.items()):
            forward, whole = sample(step, inputs, j + k)
            times[name].forward.append(forward)
            times[name].step.append(whole)

    # Groups of one send nothing, and have nothing to calibrate.
    of_message = dict(zip(messages(workload), (s.nbytes for s in sums), strict=True)) if ranks > 1 else {}
    tell(f"{ranks} ranks: all-reduces alone")
    group, alone = distributed.join(dist.group.WORLD), {}
    for size in sorted({*SWEEP, *of_message.values()} if ranks > 1 else ()):
        message = torch.zeros(size // 4, device=device)
        call = lambda x, mark: distributed.all_reduce(x, group)  # noqa: E731
        call(message, None)
        alone[size] = slowest([sample(call, [message], 0)[1] for _ in range(args.repeats)])

    of_ranks = [None] * ranks
    dist.all_gather_object(of_ranks, dataclasses.asdict(workload))
    result = {
        "ranks": ranks,
        "threads": torch.get_num_threads(),
        "workloads": of_ranks,
        "deviation": max(slowest([deviation])),
        "rows": [
            {"name": name, "step_samples_ms": slowest(t.step), "forward_samples_ms": slowest(t.forward)}
            for name, t in times.items()
        ],
        "messages": of_message,
        "all_reduce_samples_ms": alone,
    }
    if rank == 0:
        Path(folder, f"result_{ranks}").write_text(json.dumps(result))
    dist.destroy_process_group()


# ----------------------------------------------------------------------------------------------------------- results


def cores() -> int:
    return len(os.sched_getaffinity(0))


def threads_of(args: argparse.Namespace, ranks: int) -> int:
    return args.threads or max(1, cores() // ranks)


def summarize(measured: list[dict], backend: str) -> None:
    """Adds medians, ratios, bytes and efficiency to what the runs have measured."""

    def row_of(run, name):
        return next(row for row in run["rows"] if row["name"] == name)

    def pixels(run):
        return sum(bench.Workload(**w).branch_bytes for w in run["workloads"])  # as many bytes for each

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
        run |= {
            "ratio": measure.median([a / b for a, b in zip(step[GLOBAL], step[SAME], strict=True)]),
            "ratio_to_alone": measure.median([a / b for a, b in zip(step[GLOBAL], step[ALONE], strict=True)]),
            "added_ms": measure.median([a - b for a, b in zip(step[GLOBAL], step[SAME], strict=True)]),
            "message_bytes": sum(run["messages"].values()),
            "sent_bytes": sent_bytes(sum(run["messages"].values()), run["ranks"]),
            "of_ddp_gradients": sum(run["messages"].values()) / (4 * PARAMETERS),
        }


def calibration(measured: list[dict]) -> dict | None:
    """The model with the latency and bandwidth of this machine, beside the SEA messages, to which it is not fitted."""
    times = {
        (run["ranks"], int(size)): measure.median(samples)
        for run in measured
        for size, samples in run["all_reduce_samples_ms"].items()
    }
    if not times:
        return None
    fitted = fit([(n, size, ms / 1e3) for (n, size), ms in times.items() if size in SWEEP])
    rows = [
        {
            "ranks": run["ranks"],
            "message": name,
            "bytes": size,
            "predicted_ms": 1e3 * all_reduce_seconds(size, run["ranks"], **fitted),
            "measured_ms": times[run["ranks"], size],
        }
        for run in measured
        for name, size in run["messages"].items()
    ]
    return fitted | {"rows": rows}


def show(report: dict) -> None:
    machine, measured = report["machine"], report["measured"]
    on = f"{machine['cores']} cores" if report["backend"] == "gloo" else "a GPU for each rank"
    print(
        f"\n{machine['device']}, {on}, {report['backend']}, torch {report['versions']['torch']}\n"
        f"Each rank: {bench.Workload(**report['workload'])} (sizes and boxes of the first)\n"
        f"Boxes of all ranks: {report['boxes']['source']}\n"
    )
    if report["left_out"]:
        print(f"Left out, as there are not so many GPUs: {', '.join(map(str, report['left_out']))} ranks\n")
    lines = [
        [
            str(run["ranks"]) if row["name"] == ROWS[0] else "",
            str(run["threads"]) if row["name"] == ROWS[0] else "",
            row["name"],
            f"{row['forward_ms']:.4g}",
            f"{row['step_ms']:.4g}",
            bench.cell(row, "efficiency", "{:.0%}"),
        ]
        for run in measured
        for row in run["rows"]
    ]
    print(bench.table(["ranks", "threads", "row", "forward ms", "step ms", "weak scaling"], lines))
    header = ["ranks", "global / same work", "global / each for itself", "all-reduces", "message MiB", "sent MiB"]
    lines = [
        [
            str(run["ranks"]),
            f"{run['ratio']:.3f}x",
            f"{run['ratio_to_alone']:.3f}x",
            str(len(run["messages"])),
            f"{run['message_bytes'] / 2**20:.3g}",
            f"{run['sent_bytes'] / 2**20:.3g}",
            f"{run['of_ddp_gradients']:.1%}",
        ]
        for run in measured
    ]
    print("\n" + bench.table([*header, "of DDP's gradients"], lines))
    if report["calibration"] is not None:
        print("\n" + calibration_text(report["calibration"], measured))
    print("\n" + gpu_text(report["model"]))


def calibration_text(c: dict, measured: list[dict]) -> str:
    lines = []
    for run in measured:
        rows = [row for row in c["rows"] if row["ranks"] == run["ranks"]]
        for row in rows:
            kib, predicted, alone = row["bytes"] / 2**10, row["predicted_ms"], row["measured_ms"]
            lines.append([str(run["ranks"]), row["message"], f"{kib:.4g}", f"{predicted:.3g}", f"{alone:.3g}", ""])
        if rows:
            total = [f"{sum(row[key] for row in rows):.3g}" for key in ("predicted_ms", "measured_ms")]
            kib = f"{run['message_bytes'] / 2**10:.4g}"
            lines.append([str(run["ranks"]), "all of a step", kib, *total, f"{run['added_ms']:.3g}"])
    return (
        f"The model fitted to this machine's all-reduces of {SWEEP[0] // 2**10} KiB to {SWEEP[-1] // 2**20} MiB: "
        f"{1e6 * c['latency_s']:.3g} us a hop, {c['bandwidth'] / 1e9:.3g} GB/s\n\n"
        + bench.table(["ranks", "message", "KiB", "predicted ms", "alone ms", "added to the step ms"], lines)
    )


def gpu_text(model: dict) -> str:
    links = [
        f"{1e6 * link['latency_s']:.3g} us a hop and {link['bandwidth'] / 1e9:.3g} GB/s a GPU {where}"
        for where, link in (("within a node", model["in_node"]), ("between nodes", model["between_nodes"]))
    ]
    lines = [
        [
            str(row["gpus"]),
            f"{row['all_reduces_ms']:.2g}",
            f"{row['latency_ms']:.2g}",
            f"{row['of_sea_step']:.0%}",
            f"{row['of_training_step']:.1%}",
            f"{row['ddp_gradients_ms']:.2g}",
        ]
        for row in model["rows"]
    ]
    header = ["GPUs", "all-reduces ms", "latency ms", "of the SEA step", "of student and teacher", "DDP's gradients ms"]
    return (
        "MODEL; nothing in this paragraph was measured on GPUs. Assumed: " + "; ".join(links) + ".\n"
        f"W1, {sum(model['messages'].values()) / 2**20:.3g} MiB in {len(model['messages'])} all-reduces that nothing "
        f"hides; SEA step {model['sea_ms']:.2g} ms, student and teacher {model['training_step_ms']:.2g} ms, both "
        f"predicted.\n\n" + bench.table(header, lines)
    )


def draw(report: dict, path: Path) -> None:
    """Measured steps over ranks; modelled all-reduces over GPUs."""
    figure, (steps, model) = plot.plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    measured, rows = report["measured"], report["model"]["rows"]
    for j, name in enumerate(ROWS):
        values = [run["rows"][j]["step_ms"] for run in measured]
        steps.bar([x + 0.27 * (j - 1) for x in range(len(measured))], values, 0.25, color=COLORS[name], label=name)
    for x, run in enumerate(measured):
        if run["messages"]:
            y = run["rows"][ROWS.index(GLOBAL)]["step_ms"]
            steps.text(x + 0.27, y, f"{run['ratio']:.2f}x", ha="center", va="bottom", fontsize=9)
    ticks = [f"{run['ranks']} x {run['threads']}" for run in measured]
    if report["backend"] == "nccl":
        ticks = [str(run["ranks"]) for run in measured]
    steps.set_xticks(range(len(measured)), ticks)
    steps.set_xlabel("GPUs" if report["backend"] == "nccl" else f"processes x threads on {report['cores']} cores")
    steps.set_ylabel("ms of one step, slowest rank")
    steps.set_title("Measured; the ratio is to the same work without all-reduce", fontsize=10, loc="left")

    latency = [row["latency_ms"] for row in rows]
    transfer = [row["all_reduces_ms"] - row["latency_ms"] for row in rows]
    model.bar(range(len(rows)), latency, 0.5, color=plot.FORWARD, label="latency")
    model.bar(range(len(rows)), transfer, 0.5, bottom=latency, color=plot.BACKWARD, label="transfer")
    model.axhline(report["model"]["sea_ms"], color=plot.PEAK, label="SEA step of W1, predicted")
    model.set_xticks(range(len(rows)), [str(row["gpus"]) for row in rows])
    model.set_xlabel("GPUs")
    model.set_ylabel("ms of a step's all-reduces")
    model.set_title("Model from assumed links, not measured", fontsize=10, loc="left")
    for axis in (steps, model):
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(y=0.35)  # room for the legend
        axis.legend(frameon=False, fontsize=9, loc="upper left")
    figure.suptitle(
        f"{report['machine']['device']}, {report['backend']}, torch {report['versions']['torch']}", fontsize=10
    )
    figure.savefig(path, dpi=120)
    plot.plt.close(figure)


# -------------------------------------------------------------------------------------------------------------- main


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", metavar="N", help="default: 1 2 4; 1 2 with --smoke")
    parser.add_argument("--backend", choices=("gloo", "nccl"), help="default: nccl where there are several GPUs")
    parser.add_argument("--annotations", type=Path, metavar="FILE", help="COCO annotations; else boxes are sampled")
    parser.add_argument("--repeats", type=int, metavar="N", help="default: 25; 2 with --smoke")
    parser.add_argument("--threads", type=int, help="of every rank; default: an even share of the cores")
    parser.add_argument("--smoke", action="store_true", help="tiny maps: checks the program, not the speed")
    parser.add_argument("--out", type=Path, metavar="DIR", default=Path(__file__).parent / "out")
    args = parser.parse_args(argv)
    gpus = torch.cuda.device_count() if dist.is_nccl_available() else 0
    args.backend = args.backend or ("nccl" if gpus > 1 else "gloo")
    args.ranks = sorted(set(args.ranks or ((1, 2) if args.smoke else (1, 2, 4))))
    if args.repeats is None:
        args.repeats = 2 if args.smoke else 25
    if min(*args.ranks, args.repeats, 1 if args.threads is None else args.threads) < 1:
        parser.error("ranks, repeats or threads are below 1; expected at least 1")
    args.left_out = [n for n in args.ranks if args.backend == "nccl" and n > gpus]
    args.ranks = [n for n in args.ranks if n not in args.left_out]
    if not args.ranks:
        parser.error(f"nccl wants a GPU for each rank, and there are {gpus}")
    return args


def run(args: argparse.Namespace) -> dict:
    base = bench.SMOKE if args.smoke else bench.WORKLOADS["default" if args.backend == "gloo" else "W1"]
    shape = base.batch * max(args.ranks), base.height, base.width
    boxes = box_sources.sample(*shape)
    if args.annotations:  # the images that come nearest to the sampler's numbers
        boxes = box_sources.from_annotations(args.annotations, *shape, len(boxes.labels), boxes.categories)
    each = 2 + args.repeats  # what the first rank has to tell
    tell = bench.Progress(each * len(args.ranks))
    if args.left_out:
        print(f"{args.left_out} ranks are left out: there are not so many GPUs", file=sys.stderr)
    measured = []
    with tempfile.TemporaryDirectory() as folder:
        for n in args.ranks:
            torch.multiprocessing.spawn(run_rank, (n, args, base, boxes, tell, folder), nprocs=n)
            tell.done += each  # the first rank told it to its own copy
            measured.append(json.loads(Path(folder, f"result_{n}").read_text()))
    summarize(measured, args.backend)
    return {
        **measure.provenance("bench_scaling.py", args.argv, torch.device("cuda" if args.backend == "nccl" else "cpu")),
        "backend": args.backend,
        "cores": cores(),
        "workload": dataclasses.asdict(workload_of(base, of_rank(boxes, 0, base.batch))),
        "boxes": {"source": boxes.source, "image_sizes": boxes.image_sizes},
        "left_out": args.left_out,
        "measured": measured,
        "calibration": calibration(measured),
        "model": gpu_model(),
        "seconds": round(time.monotonic() - tell.start, 1),
    }


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    args.argv = sys.argv[1:] if argv is None else argv
    if sk.ops.LIBRARY_ERROR:
        raise SystemExit(f"sea_kernels cannot run: {sk.ops.LIBRARY_ERROR}")
    report = run(args)
    show(report)
    measure.save(report, args.out / "bench_scaling", draw)


if __name__ == "__main__":
    main()
