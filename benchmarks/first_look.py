"""What decides how the kernels go on, measured in a minute on a GPU, and one table of it.

    python benchmarks/first_look.py --out DIR/first_look.json
    python benchmarks/first_look.py --table DIR    # with what profile_step.py --ncu has written there, if it has

The table has the newest counts of benchmarks/results beside what was measured; `-` stands for what is not known.
"""

import argparse
import dataclasses
import json
import re
import subprocess
import tempfile
from functools import partial
from pathlib import Path

import measure
import profile_step
import report
import torch
from steps import ROOM, GraphStep, sea_losses, training_step
from workloads import SMOKE, WORKLOADS, make_inputs

HERE = Path(__file__).parent
LARGE = "W2"  # the workload that is taken apart
LEVELS = f"{LARGE} with P3 and P4 alone"  # the others have strides for which loads are slow, and tiles of few pixels
MEASURED = ("W1", "W2", "W3", "W4", "W5")
KERNELS = ("pool", "distance", "distance_few")
KERNELS += ("backward", "distance_backward", "distance_backward_few", "distance_backward_some")
LEFT_OUT = (
    "Not measured, since the kernels would have to change for it: the time of single blocks (the busiest "
    "multiprocessor stands for them), `pool` with other numbers of stages."
)


# ------------------------------------------------------------------------------------------------------------- measured


def clocks(step, inputs):
    """What nvidia-smi says of the card while it runs the step."""
    fields = "clocks.sm", "clocks.max.sm", "clocks.mem", "power.draw", "power.limit", "temperature.gpu"
    card = f"GPU-{torch.cuda.get_device_properties(0).uuid}"
    ask = ["nvidia-smi", f"--id={card}", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    measure.sample_cuda(step, inputs, 100)
    process = subprocess.Popen(ask, stdout=subprocess.PIPE, text=True)
    while process.poll() is None:
        measure.sample_cuda(step, inputs, 10)
    return dict(zip((f.replace(".", "_") for f in fields), process.stdout.read().strip().split(", ")))


def graph_gap_us(nodes=200, cycles=20_000):
    """From the end of a kernel to the begin of the next in a CUDA graph: many short ones against one as long as all."""

    def replay_ms(count, cycles):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(count):
                torch.cuda._sleep(cycles)
        step = lambda inputs, mark: graph.replay()  # noqa: E731
        step(None, None)
        return measure.median([measure.sample_cuda(step, [None], 5)[1] for _ in range(5)])

    return 1e3 * (replay_ms(nodes, cycles) - replay_ms(1, nodes * cycles)) / (nodes - 1)


def build_mma_rate(code, folder):
    """The program of mma_rate.cu for one architecture, as "90a"."""
    program = Path(folder) / "mma_rate"
    target = ["-gencode", f"arch=compute_{code},code=sm_{code}"]
    subprocess.run(["nvcc", *target, "-o", program, HERE / "mma_rate.cu"], check=True)
    return program


def tensor_rates():
    major, minor = torch.cuda.get_device_capability()
    with tempfile.TemporaryDirectory() as folder:
        program = build_mma_rate(f"{major}{minor}" + "a" * (major == 9), folder)  # wgmma is in 9.0a alone
        return json.loads(subprocess.run([program], check=True, stdout=subprocess.PIPE, text=True).stdout)


def time_step(out, workload, device, copy_rate):
    """Into `out`: medians of five samples of the native step; on a GPU also as a graph, its kernels, clocks."""
    inputs = make_inputs(workload, workload.choose_boxes(), device)
    steps = {"ms": training_step(partial(sea_losses, workload))}
    steps["ms"](inputs[0], lambda: None)
    if device.type == "cuda":
        steps["graph_ms"] = GraphStep(training_step(partial(sea_losses, workload)), inputs, ROOM * workload.batch)
    times = measure.interleave(steps, inputs, device, 5)
    out |= {key: measure.median(times[key].step) for key in steps}
    out["copy_share"] = workload.least_bytes / copy_rate / min(out.values()) * 1e3
    if device.type == "cuda":
        out["operations"] = profile_step.operations(workload, device)
        out["clocks"] = clocks(steps["ms"], inputs)


def look(device, smoke):
    """A part that fails costs only its own lines of the table."""
    out = report.provenance("first_look.py", None, device) | {"failed": {}}
    out["rates"] = measure.rates(device, torch.bfloat16, small=smoke)
    large = SMOKE if smoke else WORKLOADS[LARGE]
    levels = dataclasses.replace(large, strides=large.strides[:2])
    parts = {}
    others = {name: SMOKE if smoke else WORKLOADS[name] for name in MEASURED if name != LARGE}
    for name, workload in ({LARGE: large, LEVELS: levels} | others).items():
        out[name] = {}
        parts[name] = partial(time_step, out[name], workload, device, out["rates"]["copy"])
    if device.type == "cuda":
        parts["tensor"] = lambda: out.update(tensor=tensor_rates())
        parts["graph gap"] = lambda: out.update(graph_gap_us=graph_gap_us())
    for name, measured in parts.items():
        try:
            measured()
        except Exception as e:
            out["failed"][name] = repr(e)[:300]
            report.say(f"{name} failed: {e!r}")
    return out


# ---------------------------------------------------------------------------------------------------------------- table


def load(path):
    return json.loads(path.read_text()) if path and path.exists() else {}


def counted(name):
    """Kernel -> what the newest count (count_work.py --json) has of it in a step of that workload.

    Read are "sass" (warp instructions), "largest over mean" (of the blocks' instructions) and, if it is there, "tiles".
    """
    files = sorted(HERE.glob(f"results/counted-*/{name}.json"))
    return load(files[-1] if files else None).get("kernels", {})


def of_kernel(kernel, rows):
    return [row for row in rows if re.search(rf"\b{kernel}\b", row["name"])]


def sum_of(key, rows):
    """None: no row has it."""
    values = [row[key] for row in rows if row.get(key) is not None]
    return sum(values) if values else None


def decisions(looked, profiles, counts):
    """The lines of the table: what, measured, counted. profiles, counts: workload -> what is known of its kernels."""
    lines = []

    def line(what, form, values, beside=None):
        """`-` where a value is missing."""
        known, other = ({k: v for k, v in (x or {}).items() if v is not None} for x in (values, beside))
        lines.append([what, report.cell(known, form), report.cell(other, form)])

    machine, rates, clocks = looked.get("machine"), looked.get("rates"), looked.get(LARGE, {}).get("clocks")
    line("card", "{device}, {multiprocessors} multiprocessors", machine)
    line("L2 cache", "{cache_mib:.4g} MiB", machine)
    line("copy rate", "{copy:.4g} B/s", rates)
    line("matrix product of torch, bfloat16", "{gemm_bfloat16:.4g} FLOP/s", rates)
    line("tensor cores: mma.sync", "{mma_sync:.4g} FLOP/s", looked.get("tensor"))
    line("tensor cores: wgmma with 64 columns", "{wgmma:.4g} FLOP/s", looked.get("tensor"))
    line(f"clock of the multiprocessors in {LARGE} (most)", "{clocks_sm} ({clocks_max_sm})", clocks)
    line(f"clock of the memory in {LARGE}", "{clocks_mem}", clocks)
    line(f"power in {LARGE} (limit)", "{power_draw} ({power_limit})", clocks)
    line("gap between the nodes of a graph", "{graph_gap_us:.2f} us", looked)
    for name in (*MEASURED, LEVELS):
        line(f"{name}: step", "{ms:.4g} ms", looked.get(name))
        line(f"{name}: step as a graph (of the copy rate)", "{graph_ms:.4g} ms ({copy_share:.0%})", looked.get(name))
    for name, profile in profiles.items():
        for kernel in KERNELS:
            rows, count = of_kernel(kernel, profile), counts.get(name, {}).get(kernel, {})
            if not rows and not count:
                continue
            for step in (name, LEVELS) if name == LARGE else (name,):
                seen = of_kernel(kernel, looked.get(step, {}).get("operations", []))
                line(f"{step} {kernel}: time", "{us:.0f} us", {"us": sum_of("us", seen)})
            ratios = [x.get("largest_over_mean") for x in rows[:1]] or [None], [count.get("largest over mean")]
            what = f"{name} {kernel}: largest multiprocessor (counted: block) over mean"
            line(what, "{ratio:.2f}", *({"ratio": x} for (x,) in ratios))
            tiles = count.get("tiles")
            each = [x and x / (tiles or 1e6) for x in (sum_of("instructions", rows), count.get("sass"))]
            unit = "a tile" if tiles else "in millions"
            line(f"{name} {kernel}: warp instructions {unit}", "{n:,.4g}", *({"n": x} for x in each))
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--smoke", action="store_true", help="tiny inputs: checks the program")
    parser.add_argument("--out", type=Path, metavar="FILE")
    parser.add_argument("--table", type=Path, metavar="DIR", help="only the table of what lies there")
    args = parser.parse_args()
    if args.table:
        looked = load(args.table / "first_look.json")
        profiles = {name: load(args.table / f"profile_{name}.json").get("kernels", []) for name in MEASURED}
        lines = decisions(looked, profiles, {name: counted(name) for name in profiles})
        print(report.table(["", "measured", "counted"], lines))
        for name, why in looked.get("failed", {"first_look.py": "see its log"}).items():
            print(f"{name} failed: {why}")
        if missing := [name for name, kernels in profiles.items() if not kernels]:
            print(f"No counters (ncu did not run or failed) of {', '.join(missing)}")
        print(LEFT_OUT)
    else:
        report.begin()
        args.out.write_text(json.dumps(look(torch.device(args.device), args.smoke), indent=1) + "\n")
        print(f"Written: {args.out.name}")


if __name__ == "__main__":
    main()
