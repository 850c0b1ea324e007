"""What every benchmark prints and writes: progress, tables, where a result comes from, files."""

import argparse
import datetime
import functools
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import measure
import torch
from tabulate import tabulate
from torch.utils import collect_env
from tqdm import tqdm

import sea_kernels as sk

DEFAULT_ALLOCATOR = "--default-allocator"
tqdm.monitor_interval = 0  # no thread beside what is timed


class Progress:
    """What is being done, on standard error: a bar on a terminal, elsewhere a line for each kind of work.

    The kind is the text up to its colon. More lines of one kind come every five seconds at most.
    """

    def __init__(self, total: int, done: int = 0):
        self.total, self.done, self.start = total, done, time.monotonic()
        self.kind, self.printed = None, 0.0
        self.bar = tqdm(total=total, initial=done, disable=None, leave=False, dynamic_ncols=True)

    def __call__(self, text: str) -> None:
        self.done += 1
        self.bar.set_description_str(text, refresh=False)
        self.bar.update()
        self.bar.refresh()
        kind, now = text.partition(":")[0], time.monotonic()
        if self.bar.disable and (kind != self.kind or now - self.printed > 5):
            say(f"[{now - self.start:6.1f} s] {self.done} of {self.total}: {text}")
            self.kind, self.printed = kind, now

    def close(self) -> float:
        """Seconds since the start."""
        self.bar.close()
        return round(time.monotonic() - self.start, 1)


def say(text: str) -> None:
    """A line on standard error, above a bar if there is one."""
    tqdm.write(text, file=sys.stderr)
    sys.stderr.flush()


# ----------------------------------------------------------------------------------------------------------- tables


def table(header: list[str], lines: list[list[str]]) -> str:
    """In Markdown: the first column aligned left, all others right."""
    align = ["left"] + ["right"] * (len(header) - 1)
    return tabulate(lines, header, tablefmt="pipe", colalign=align, disable_numparse=True)


def row_table(rows: list[dict], columns: dict[str, str | Callable[[dict], str]]) -> str:
    """Header -> what stands in a row's cell: a format string of the row's keys, or a function of the row."""
    return table([*columns], [[cell(row, column) for column in columns.values()] for row in rows])


def cell(row: dict, column: str | Callable[[dict], str]) -> str:
    """ "-" where the row lacks a key of the format string. `x_mib` stands for `x_bytes` in MiB."""
    try:
        return column(row) if callable(column) else column.format_map(_Row(row))
    except KeyError:
        return "-"


class _Row(dict):
    def __missing__(self, key):
        if not key.endswith("_mib"):
            raise KeyError(key)
        return self[key.removesuffix("_mib") + "_bytes"] / 2**20


def label(row: dict) -> str:
    """The name of a row, and why it was not measured."""
    return row["name"] + (f": {row['left_out'][:40]}" if "left_out" in row else "")


# ----------------------------------------------------------------------------------------------------------- origin


@functools.cache  # asks pip and compilers, which takes a second
def environment() -> dict:
    """What torch's own report of a machine says, without what names it or its folders."""
    found = collect_env.get_env_info()._asdict()
    keys = ("os", "libc_version", "python_platform", "gcc_version", "cuda_runtime_version", "nvidia_driver_version")
    cpu = [x for x in (found["cpu_info"] or "").splitlines() if not x.startswith("Vulnerability")]
    return {key: found[key] for key in (*keys, "nvidia_gpu_models", "pip_packages")} | {"cpu_info": cpu}


def machine(device: torch.device) -> dict:
    """torch's report, and what it lacks."""
    cpu = next((x.split(":")[1].strip() for x in environment()["cpu_info"] if x.startswith("Model name")), None)
    gpu = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    return {
        "device": gpu.name if gpu else cpu,
        "capability": f"{gpu.major}.{gpu.minor}" if gpu else None,
        "multiprocessors": gpu.multi_processor_count if gpu else None,
        "memory_gib": gpu.total_memory / 2**30 if gpu else None,
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "allocator": "malloc that keeps its pages" if measure.keeps_pages() else "malloc as the system has it",
        "cache_mib": measure.cache_bytes(device) / 2**20,
        "environment": environment(),
    }


def provenance(program: str, argv: list[str] | None, device: torch.device) -> dict:
    """Where a report comes from: command (files by their names), date, commit, machine, versions, build."""
    argv = [re.sub(r"[^=]*/", "", argument.rstrip("/")) for argument in (sys.argv[1:] if argv is None else argv)]
    return {
        "command": f"python benchmarks/{program} {shlex.join(argv)}".rstrip(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(device),
        "versions": {
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "sea_kernels": sk.__version__,
        },
        "build": sk.build_info(),
    }


def commit() -> str | None:
    """What SEA_KERNELS_COMMIT says; else that of the source tree. A copy may lie in another project's repository."""

    def git(*arguments):
        return subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()

    if told := os.environ.get("SEA_KERNELS_COMMIT"):
        return told
    try:
        return git("rev-parse", "HEAD") + " with changes" * bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.CalledProcessError):
        return None


# --------------------------------------------------------------------------------------------------------- programs


def begin() -> None:
    """Ends the program where the kernels cannot run."""
    if sk.native.library.LIBRARY_ERROR:
        raise SystemExit(f"sea_kernels cannot run: {sk.native.library.LIBRARY_ERROR}")
    torch.manual_seed(0)


def choose_allocator() -> None:
    """To be called at the start of every process that times something on a CPU."""
    if DEFAULT_ALLOCATOR not in sys.argv:
        measure.keep_pages()


def run(main: Callable[[], None]) -> None:
    """A program to its end, which is quiet where the reader of its output has gone (`| head`)."""
    choose_allocator()
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python's own last flush raises again
        raise SystemExit(1) from None


def parser(description: str) -> argparse.ArgumentParser:
    """With the options that all timed programs have."""
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.add_argument("--annotations", type=Path, metavar="FILE", help="COCO annotations; else boxes are sampled")
    parser.add_argument("--smoke", action="store_true", help="tiny inputs: checks the program, not the speed")
    parser.add_argument(DEFAULT_ALLOCATOR, action="store_true", help="with malloc as it is; else it keeps its pages")
    parser.add_argument("--out", type=Path, metavar="DIR", default=Path(__file__).parent / "out")
    return parser


def save(report: dict, path: Path, draw: Callable[[dict, Path], None]) -> None:
    """The report as PATH.json, and what draw(report, file) makes of it as PATH.png."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    draw(report, path.with_suffix(".png"))
    print(f"\nWritten after {report['seconds']:.0f} s: {path}.json, {path}.png")
