"""One training step of the losses for a profiler, and what the profiler saw, kernel by kernel.

python benchmarks/profile_step.py --workload W1 --ncu DIR    # DIR/profile_W1.json and what ncu wrote: ncu_W1.*
"""

import argparse
import contextlib
import csv
import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import measure
import report
import torch
from steps import sea_losses, training_step
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from workloads import WORKLOADS, make_inputs

TIME, READ, WRITTEN = "gpu__time_duration.sum", "dram__bytes_read.sum", "dram__bytes_write.sum"
INSTRUCTIONS = "smsp__inst_executed.sum"  # of warps
BUSIEST, BUSY = "sm__cycles_active.max", "sm__cycles_active.avg"  # of a multiprocessor
SECTIONS = "SpeedOfLight MemoryWorkloadAnalysis LaunchStats Occupancy WarpStateStats SourceCounters".split()
METRICS = {  # of one launch; those of a kernel are means, weighted by time
    "dram_percent": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm_percent": "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "tensor_percent": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed",
    "occupancy_percent": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "l2_hit_percent": "lts__t_sector_hit_rate.pct",
    "registers": "launch__registers_per_thread",
    "shared_bytes": "launch__shared_mem_per_block_dynamic",
    "blocks": "launch__grid_size",
    "threads": "launch__block_size",
    "local_instructions": "smsp__sass_inst_executed_op_local.sum",
    "bank_conflicts": "l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum",
}
UNITS = {"ns": 1, "nsecond": 1, "us": 1e3, "usecond": 1e3, "ms": 1e6, "msecond": 1e6}
UNITS |= {"byte": 1, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9}
STALL = r"smsp__average_warps_issue_stalled_(\w+)_per_issue_active\.ratio"  # of the section WarpStateStats


def run_step(workload, device, before, after):
    """One step between `before()` and `after()`, on other maps than those of the warm-up."""
    inputs = make_inputs(workload, workload.choose_boxes(), device, 2)
    step = training_step(partial(sea_losses, workload))
    for _ in range(2):
        step(inputs[0], lambda: None)
    torch.cuda.synchronize()
    before()
    step(inputs[1], lambda: None)
    torch.cuda.synchronize()
    after()


def kernel_name(name):
    """Without what it returns and takes."""
    return re.sub(r"^void |\(.*", "", name.replace("(anonymous namespace)::", ""))


def operations(workload, device):
    """What runs on the GPU in one step: name, times and microseconds of every kernel, copy and fill."""
    log = profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])
    run_step(workload, device, log.start, log.stop)
    found = {}
    for e in log.profiler.kineto_results.events():
        if e.device_type() == DeviceType.CUDA:
            name = kernel_name(e.name())
            times, total = found.get(name, (0, 0))
            found[name] = times + 1, total + e.duration_ns() / 1e3
    return [{"name": name, "times": times, "us": round(us, 2)} for name, (times, us) in found.items()]


def launches(path):
    """The launches in a CSV file of ncu's page "raw", in order: column -> number, and "Kernel Name".

    What ncu has no value for is left out. Times are in ns and sizes in bytes.
    """
    lines = Path(path).read_text().splitlines()
    start = next((i for i, text in enumerate(lines) if text.startswith('"ID"')), None)
    if start is None:
        raise SystemExit(f"{path} holds no table of ncu: {' '.join(lines)[:300]}")
    units, *rows = csv.DictReader(lines[start:])
    unknown = {k: units.get(k) for k in (TIME, READ, WRITTEN) if units.get(k) not in UNITS}
    if unknown:
        raise SystemExit(f"{path} has unknown units: {unknown}")
    out = []
    for row in rows:
        out.append({"Kernel Name": row.pop("Kernel Name")})
        for column, text in row.items():
            with contextlib.suppress(ValueError):  # n/a
                out[-1][column] = float(text.replace(",", "")) * UNITS.get(units[column], 1)
    return out


def summarize(rows, copy_rate, least_bytes):
    """Of each kernel its launches, time, bytes and instructions, its share of the copy bandwidth, and METRICS."""
    groups = {}
    for row in rows:
        groups.setdefault(kernel_name(row["Kernel Name"]), []).append(row)

    def total(group, metric):
        return sum(row.get(metric, 0) for row in group)

    def mean(group, metric):
        values = [(row[metric], row[TIME]) for row in group if metric in row]
        return round(sum(v * t for v, t in values) / sum(t for _, t in values), 3) if values else None

    def entry(group):
        ns, read, written = (total(group, m) for m in (TIME, READ, WRITTEN))
        share = (read + written) / (ns / 1e9) / copy_rate
        out = {"ms": ns / 1e6, "bytes_read": read, "bytes_written": written, "copy_share": round(share, 4)}
        instructions, busiest, busy = (total(group, m) or None for m in (INSTRUCTIONS, BUSIEST, BUSY))
        return out | {"instructions": instructions, "largest_over_mean": busy and round(busiest / busy, 3)}

    kernels = []
    for name, group in groups.items():
        stalls = {m[1]: mean(group, m[0]) for m in (re.fullmatch(STALL, column) for column in group[0]) if m}
        stalls = sorted(((k, v) for k, v in stalls.items() if k != "selected"), key=lambda x: -x[1])
        means = {key: mean(group, metric) for key, metric in METRICS.items()}
        kernels.append({"name": name, "launches": len(group)} | entry(group) | means | {"stalls": dict(stalls[:4])})
    whole = {"launches": len(rows)} | entry(rows)
    whole["of_least_bytes"] = round((whole["bytes_read"] + whole["bytes_written"]) / least_bytes, 3)
    return {"step": whole, "kernels": kernels}


COLUMNS = {
    "": lambda row: row["name"][:60],
    "launches": "{launches}",
    "us": "{us:.1f}",
    "MiB read": "{read_mib:.4g}",
    "MiB written": "{written_mib:.4g}",
    "of copy rate": "{copy_share:.1%}",
    "M instructions": "{millions:.4g}",
    "largest over mean": "{largest_over_mean:.2f}",
    "SM": "{sm_percent:.0f}%",
    "occupancy": "{occupancy_percent:.0f}%",
    "L2 hits": "{l2_hit_percent:.0f}%",
    "registers": "{registers:.0f}",
}


def show_table(summary):
    rows = []
    for k in [*summary["kernels"], {"name": "the step", **summary["step"]}]:
        known = {key: value for key, value in k.items() if value is not None}
        known |= {"us": 1e3 * k["ms"], "read_bytes": k["bytes_read"], "written_bytes": k["bytes_written"]}
        rows.append(known | ({"millions": k["instructions"] / 1e6} if k["instructions"] else {}))
    print(report.row_table(rows, COLUMNS))
    print(f"bytes moved: {summary['step']['of_least_bytes']:.2f} times the least")


def by_ncu(name, folder):
    """One step of the workload under ncu. Caches and clocks are left as they are, as in training."""
    path = folder / f"ncu_{name}"
    step = [sys.executable, __file__, "--workload", name]
    options = "--clock-control none --cache-control none --profile-from-start off --force-overwrite".split()
    sections = [x for section in SECTIONS for x in ("--section", section)]
    least = [TIME, READ, WRITTEN, INSTRUCTIONS]
    every = [*sections, "--metrics", ",".join([*least, BUSIEST, BUSY, *METRICS.values()])]
    for chosen in (every, ["--metrics", ",".join(least)]):  # fewer where this ncu refuses some
        done = subprocess.run(["ncu", *options, *chosen, "--export", path, *step])
        if done.returncode == 0:
            break
    else:
        raise SystemExit(f"ncu failed: exit status {done.returncode}")
    table = path.with_suffix(".csv")
    with open(table, "w") as file:
        show = ["ncu", "--import", f"{path}.ncu-rep", "--csv", "--page", "raw", "--print-units", "base"]
        subprocess.run(show, stdout=file, check=True)
    rate = measure.rates(torch.device("cuda"), torch.float32)["copy"]
    summary = summarize(launches(table), rate, WORKLOADS[name].least_bytes)
    (folder / f"profile_{name}.json").write_text(json.dumps(summary, indent=1) + "\n")
    show_table(summary)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workload", choices=WORKLOADS, default="W1")
    parser.add_argument("--ncu", type=Path, metavar="DIR", help="else only the step runs, as ncu needs it")
    args = parser.parse_args(argv)
    if args.ncu:
        by_ncu(args.workload, args.ncu)
    else:
        device = torch.device("cuda")
        run_step(WORKLOADS[args.workload], device, torch.cuda.profiler.start, torch.cuda.profiler.stop)


if __name__ == "__main__":
    report.run(main)
