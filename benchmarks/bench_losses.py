"""Times the losses of sea_kernels, from ground-truth boxes to the student's gradients, against plain PyTorch.

    python benchmarks/bench_losses.py [--annotations instances_val2017.json] [--device cuda --workload W1] [--full]

In one run on one device: the native kernels, the reference in eager mode and under torch.compile (on a GPU all but
eager in CUDA graphs too), and an FGD-style and a CWD-style loss as context. Prints a table, and writes a JSON file with
every sample and a picture. README.md beside this file says what each column means.
"""

import argparse
import dataclasses
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import boxes as box_sources
import measure
import plot
import report
import torch
from steps import EAGER, NATIVE, compiled_step, make_regions, make_steps, measure_rows
from workloads import SMOKE, WORKLOADS, Workload, make_inputs, sweeps

COLUMNS = {
    "": report.label,
    "forward ms": "{forward_ms:.4g}",
    "forward+backward ms": "{step_ms:.4g}",
    "times the floor": "{floor_ratio:.2f}",
    "vs eager": "{eager_ratio:.2f}x",
    "vs compiled": "{compiled_ratio:.2f}x",
    "page faults": "{page_faults:.4g}",
    "fresh pages add ms": "{fresh_pages_ms:+.3g}",
    "launches": "{launches}",
    "syncs": "{synchronizations}",
    "peak MiB": "{peak_mib:.4g} ({peak_percent:.1f}%)",
    "saved MiB": "{saved_mib:.4g} ({saved_percent:.1f}%)",
    "of copy rate": "{bandwidth_share:.1%}",
}
SWEEP_COLUMNS = {
    "": "{sweep}",
    "value": "{label}",
    "sea_kernels ms": "{step_ms:.4g}",
    "times the floor": "{floor_ratio:.2f}",
    "vs eager": "{eager_ratio:.2f}x",
    "vs compiled": "{compiled_ratio:.2f}x",
    "peak": "{peak_percent:.1f}%",
    "saved": "{saved_percent:.1f}%",
}


def floors(workload: Workload, boxes: box_sources.Boxes, rates: dict) -> dict:
    """What the hardware must at least do for one step, and how long that takes at the rates measured in this run.

    On a CPU the same cores move the bytes and multiply: its floor is the sum of both times. On a GPU it is the longer.
    """
    regions = make_regions(workload, boxes)
    anchors = (regions.area > 0).sum(1)
    # Distances: cosines of student and teacher, gradient of the anchors, gradient of the pixels.
    operations = 4 * 2 * workload.channels * workload.maps * float((regions.counted * anchors).sum())
    gemm = rates.get(f"gemm_{workload.dtype}", rates["gemm_float32"])
    if workload.dtype == "float32":  # three products of TF32 parts are as exact
        gemm = max(gemm, rates.get("gemm_tf32", 0) / 3)
    bytes_ms, operations_ms = 1e3 * workload.least_bytes / rates["copy"], 1e3 * operations / gemm
    return {
        "ms": max(bytes_ms, operations_ms) if boxes.boxes.is_cuda else bytes_ms + operations_ms,
        "pixels": workload.pixels,
        "valid_pixels": int(regions.counted.sum()),
        "anchors_of_level": anchors.tolist(),
        "least_bytes": workload.least_bytes,
        "least_bytes_ms": bytes_ms,
        "least_operations": operations,
        "least_operations_ms": operations_ms,
    }


def show(result: dict) -> None:
    workload = Workload(**result["workload"])
    machine, floor, rates = (result[key] for key in ("machine", "floor", "rates"))
    gemms = ", ".join(f"{k.removeprefix('gemm_')} {v / 1e9:,.0f} GFLOP/s" for k, v in rates.items() if k != "copy")
    deviations = ", ".join(f"{row['name']} {row['deviation']:.1e}" for row in result["rows"] if "deviation" in row)
    print(
        f"\n{machine['device']}, {machine['threads']} threads, torch {result['versions']['torch']} "
        f"({machine['instruction_set']}), sea_kernels {result['build']['cpu_in_use']}, {machine['allocator']}\n"
        f"Workload: {workload}\n"
        f"Boxes: {result['boxes']['source']}; {floor['valid_pixels']} of {floor['pixels']} pixels are valid\n"
        f"Feature set: {2 * workload.branch_bytes / 2**20:.4g} MiB; {result['batches']} batches in turn\n"
        f"Rates: copy {rates['copy'] / 1e9:.4g} GB/s; matrix product {gemms}\n"
        f"Floor: {floor['ms']:.3g} ms, from {floor['least_bytes'] / 2**20:.4g} MiB moved: "
        f"{floor['least_bytes_ms']:.3g} ms; {floor['least_operations'] / 1e9:.3g} GFLOP: "
        f"{floor['least_operations_ms']:.3g} ms\n"
        f"Largest deviation of a loss or of a map's gradient from the {EAGER}: {deviations}\n"
    )
    print(report.row_table(result["rows"], COLUMNS))
    points = [
        next(row for row in point["rows"] if row["name"] == NATIVE)
        | {"sweep": name if k == 0 else "", "label": point["label"]}
        for name, points in result["sweeps"].items()
        for k, point in enumerate(points)
    ]
    if points:
        print("\n" + report.row_table(points, SWEEP_COLUMNS))


def compare_with_floor(rows: list[dict], floor: dict) -> list[dict]:
    return [row | {"floor_ratio": row["step_ms"] / floor["ms"]} if "bandwidth_share" in row else row for row in rows]


def add_fresh_pages(rows: list[dict]) -> list[dict]:
    """Adds each row's extra time with default malloc, measured in a child process."""
    report.say("\nThe same with malloc as the system has it, in a process of its own")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, *sys.argv[1:], report.DEFAULT_ALLOCATOR, "--out", folder]
        if subprocess.run(command, stdout=subprocess.DEVNULL).returncode != 0:
            report.say("It failed: what fresh pages add is left out")
            return rows
        fresh = json.loads(next(Path(folder).glob("*.json")).read_text())["rows"]
    fresh = {row["name"]: row for row in fresh if "step_ms" in row}
    for row in rows:
        if "step_ms" in row and (again := fresh.get(row["name"])):
            row["fresh_step_samples_ms"] = again["step_samples_ms"]
            row["fresh_pages_ms"] = again["step_ms"] - row["step_ms"]
    return rows


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = report.parser(__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workload", choices=WORKLOADS, default="default")
    parser.add_argument("--full", action="store_true", help="more repeats, all sweeps, torch.compile in them too")
    parser.add_argument("--no-compile", action="store_true", help="without the rows of torch.compile")
    parser.add_argument("--autotune", action="store_true", help="a row for torch.compile's max-autotune too")
    parser.add_argument("--compile-only", action="store_true", help="only fill torch.compile's cache for this workload")
    budget_help = "of the main table: past it fewer repeats, and no torch.compile that takes more than half of it"
    parser.add_argument("--budget", type=float, metavar="SECONDS", default=math.inf, help=budget_help)
    return parser.parse_args(argv)


def run(args: argparse.Namespace, argv: list[str] | None) -> dict | None:
    device = torch.device(args.device)
    base = SMOKE if args.smoke else WORKLOADS[args.workload]
    repeats, sweep_repeats = (2, 2) if args.smoke else (15, 7) if args.full else (9, 3)
    batches = 1 if args.smoke else None
    boxes = base.choose_boxes(args.annotations)
    workload = base.with_boxes(boxes)
    if args.default_allocator:
        swept = {}
    elif args.smoke:
        swept = {"batch size": [(str(n), dataclasses.replace(base, batch=n)) for n in (1, 2)]}
    elif args.full or args.workload == "default":
        swept = sweeps(base, args.full)
    else:
        swept = {}
    points = {point for points in swept.values() for _, point in points}

    if args.compile_only:
        report.say("compiling, which may take minutes")
        compiled_step(workload)(*make_inputs(workload, boxes, device, 1), lambda: None)
        return None
    inputs = make_inputs(workload, boxes, device, batches)
    compiled = not (args.smoke or args.no_compile)
    makers = make_steps(workload, inputs, compiled, context=True, autotune=args.autotune)
    tell = report.Progress(1 + 2 * len(makers) + repeats + len(points))
    tell("rates of the machine: copies and matrix products")
    rates = measure.rates(device, getattr(torch, workload.dtype), small=args.smoke)
    result = {
        **report.provenance("bench_losses.py", argv, device),
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
    result["rows"] = compare_with_floor(result["rows"], result["floor"])
    del inputs, makers

    measured = {}
    for point in sorted(points, key=lambda w: w.branch_bytes):
        tell(f"sweep: {point}")
        inputs = make_inputs(point, point.choose_boxes(), device, batches)
        makers = make_steps(point, inputs, compiled=args.full, context=False)
        rows = measure_rows(point, inputs, makers, device, sweep_repeats, rates["copy"], tell=lambda text: None)
        rows = compare_with_floor(rows, floors(point, inputs[0].boxes, rates))
        measured[point] = {"workload": dataclasses.asdict(point), "rows": rows}
        del inputs, makers
    result["sweeps"] = {
        name: [{"label": label} | measured[point] for label, point in points] for name, points in swept.items()
    }
    result["seconds"] = tell.close()
    if measure.keeps_pages() and device.type == "cpu":
        result["rows"] = add_fresh_pages(result["rows"])
    return result


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    report.begin()
    result = run(args, argv)
    if result is not None:
        show(result)
        name = "bench_losses" + ("" if args.workload == "default" else f"_{args.workload}")
        report.save(result, args.out / name, plot.draw)


if __name__ == "__main__":
    report.run(main)
