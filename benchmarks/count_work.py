"""Counts what the CUDA kernels execute in a step of a workload, without a GPU: tables, and a lower bound of its time.

    python benchmarks/count_work.py W1 W2 --device H200            # last "W1: 6.70x ...": bound over byte floor
    python benchmarks/count_work.py W1 --kernels pool --columns 8  # one kernel, some of its blocks: half a minute
    python benchmarks/count_work.py W1 --json benchmarks/results/counted-2026-11-26
    python benchmarks/count_work.py W1 --against                   # fails where a kernel grew by more than 5%

The PTX that nvcc makes of the kernels is translated to C++ and run on the CPU (tests/ptx/README.md). Needs nvcc, ptxas,
g++, and `pip install ".[count]"`. PTX that can trap is an error, and so is what ptxas warns of. Shapes, strides,
layouts, grids and slices are those of the full workload. Maps are 32 MB of random numbers again and again, in the same
memory. Where columns of the grid are left out, what they execute is worked out from their tiles, and results are wrong;
what is executed does not depend on them, but for pixels and anchors of norm zero.
"""

import argparse
import ctypes
import json
import mmap
import os
import re
import sys
import tempfile
import time
from pathlib import Path

sys.path.extend(str(Path(__file__).resolve().parents[1] / folder) for folder in ("tests", "benchmarks", ""))

import first_look
import torch
from emulator import operators
from ptx import build, counted, tables
from report import commit
from steps import make_regions
from workloads import WORKLOADS

import sea_kernels as sk

PERIOD = 32 << 20  # bytes
ARCHITECTURES = {"A100": 80, "H100": 90, "H200": 90}
COLUMNS = {"W1": 0, "W4": 2}  # where not given: all of W1, 6 of the others
UNEVEN = ("pool", "backward")  # the work of their blocks depends on the boxes: all are run unless --columns is given
DEAL_OUT_TILES = set(first_look.KERNELS)
MOST_GROWTH = 0.05
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_kept = []


def random_file(dtype):
    """Values as after a ReLU, with some left below zero so that no pixel is all zero."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(PERIOD // dtype.itemsize, generator=generator)
    values = torch.where(values < 0, values * 0.1, values).to(dtype)
    fd = os.memfd_create("maps")
    os.truncate(fd, PERIOD)
    with mmap.mmap(fd, PERIOD) as m:
        m.write(ctypes.string_at(values.data_ptr(), PERIOD))
    return fd


def repeated(fd, count, dtype, start):
    """A tensor of `count` elements: the file from `start` on, again and again."""
    size = count * dtype.itemsize
    room = -(-size // 4096) * 4096
    base = _libc.mmap(None, room, 0, 0x4022, -1, 0)  # private, anonymous, no memory behind it
    at, offset = 0, start
    while at < room:
        n = min(PERIOD - offset, room - at)
        if _libc.mmap(base + at, n, 3, 0x11, fd, offset) != base + at:  # shared, at this address
            raise OSError(ctypes.get_errno(), "mmap")
        at, offset = at + n, 0
    buffer = (ctypes.c_char * size).from_address(base)
    _kept.append(buffer)
    return torch.frombuffer(buffer, dtype=dtype)


def make_maps(w, fd, salt):
    """The maps of one branch of one side, [maps][levels]."""
    dtype, out = getattr(torch, w.dtype), []
    for m in range(w.maps):
        levels = []
        for i, (height, width) in enumerate(w.level_shapes):
            start = (salt * 1237 + m * 331 + i * 57) % (PERIOD // 4096) * 4096
            flat = repeated(fd, w.batch * w.channels * height * width, dtype, start)
            if w.channels_last:
                levels.append(flat.view(w.batch, height, width, w.channels).permute(0, 3, 1, 2))
            else:
                levels.append(flat.view(w.batch, w.channels, height, width))
        out.append(levels)
    return out


def check_tiles(launches):
    """Without a kernel's tiles, columns cannot be left out, and the tables lack what a tile takes."""
    told = {build.short_name(launch["kernel"]): bool(launch["kinds"]) for launch in launches}
    if missing := sorted(name for name in DEAL_OUT_TILES & set(told) if not told[name]):
        raise SystemExit(
            f"which tiles the blocks of {', '.join(missing)} have is not known: "
            "tests/ptx/cuda/launch.h does not fit csrc/cuda/launch.h and pyramid.cuh any more"
        )


def check_ptx(kernels):
    """A branch that cannot be taken may not be left to a trap: the compiler keeps it."""
    if trapping := sorted({build.short_name(name) for name, text in kernels.items() if re.search(r"\btrap;", text)}):
        raise SystemExit(f"the PTX of {', '.join(trapping)} has a trap")


def count(name, w, options, only, columns, tell):
    """Runs a step and counts it: what tables.show() wants. only: names of kernels; None: all."""
    architecture = options.architecture or ARCHITECTURES[options.device]
    kernels = dict.fromkeys(["losses", "pool"], only) if only else None
    module = operators.install(
        ["losses", "pool", "regions"], architecture, count=True, dtypes=[w.dtype], kernels=kernels, tell=tell
    )
    slices = counted.DEVICES[options.device]["sms"]  # csrc/cuda/device.h
    check_ptx(module.kernels)
    module.settings(slices=slices, largest_filled=1 << 20)
    library = ctypes.CDLL(str(module.library))
    library.ptxrun_count(columns, options.products, kernels is not None)

    fd = random_file(getattr(torch, w.dtype))
    student, teacher = [[make_maps(w, fd, 2 * side + branch) for branch in range(2)] for side in range(2)]
    flat = [x.requires_grad_(True) for branch in student for levels in branch for x in levels]
    regions = make_regions(w, w.choose_boxes())
    tell(f"{name}: forward")
    losses = sk.sea_loss(student[0], teacher[0], student[1], teacher[1], regions)
    peak = module.peak_bytes() + sum(x.nbytes for x in regions.tensors())
    tell(f"{name}: backward")
    torch.autograd.grad(sum(losses), flat)
    operators.uninstall()
    os.close(fd)
    with tempfile.NamedTemporaryFile() as file:
        if library.ptxrun_count_write(file.name.encode()):
            raise SystemExit(f"cannot write {file.name}")
        launches = json.loads(Path(file.name).read_text())
    check_tiles(launches)
    _kept.clear()
    about = {
        "workload": name,
        "text": str(w),
        "columns": columns,
        "slices": slices,
        "floor_bytes": w.least_bytes,
        "anchors": 1 + 2 * int((regions.classes >= 0).sum()),
        "rows": regions.area.shape[1],
        "shapes": w.level_shapes,
        "peak_bytes": peak,  # in forward, of the losses and the regions
        "student_bytes": 2 * w.branch_bytes,
    }
    tell(f"{name}: counted; machine code" if not options.no_sass else f"{name}: counted")
    return counted.make(
        about, launches, module.kernels, options.device, architecture, None if options.no_sass else build.CACHE
    )


def rounded(x):
    """Numbers to six digits, wherever they are."""
    if isinstance(x, dict):
        return {key: rounded(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [rounded(value) for value in x]
    return float(f"{x:.6g}") if isinstance(x, float) else x


def write(result, folder):
    """FOLDER/W1.json, a line for each kernel: what first_look.py and --against read."""
    folder.mkdir(parents=True, exist_ok=True)
    shown = {"by line", "tile costs", "ptx classes"}  # in tables alone
    head = {"commit": commit(), "device": result["device"], "about": result["about"]}
    kernels = (
        f"  {json.dumps(name)}: {json.dumps(rounded({key: x for key, x in k.items() if key not in shown}))}"
        for name, k in result["kernels"].items()
    )
    text = json.dumps(head)[:-1] + ',\n "kernels": {\n' + ",\n".join(kernels) + "\n }}\n"
    (folder / f"{result['about']['workload']}.json").write_text(text)


def growth(kernels, before):
    """A line for each kernel that executes more instructions than the table says, by more than MOST_GROWTH."""
    for name, k in kernels.items():
        if name not in before:
            yield f"{name} is not in the table; it executes {k['sass']:,.0f} instructions"
        elif k["sass"] > (1 + MOST_GROWTH) * before[name]["sass"]:
            more = k["sass"] / before[name]["sass"] - 1
            yield f"{name} executes {k['sass']:,.0f} instructions, {more:.1%} more than the table says"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="+", choices=WORKLOADS)
    parser.add_argument("--device", choices=counted.DEVICES, default="H200")
    parser.add_argument("--architecture", type=int, choices=(80, 90), help="default: the device's")
    parser.add_argument("--kernels", type=lambda x: x.split(","), help="only these, e.g. pool,backward")
    parser.add_argument(
        "--columns",
        type=int,
        help="of the grid, about so many are run; 0: all (default: W1 0, W4 2, else 6; pool and backward always 0)",
    )
    parser.add_argument("--products", action="store_true", help="matrix products are computed: results are right")
    parser.add_argument("--no-sass", action="store_true", help="PTX is counted alone")
    parser.add_argument("--lines", type=int, default=10, help="in each table of the sources' lines")
    parser.add_argument("--json", type=Path, metavar="FOLDER", help="gets W1.json and so on")
    parser.add_argument(
        "--against",
        action="store_true",
        help=f"fails where a kernel executes over {MOST_GROWTH:.0%}% more than the newest table of benchmarks/results",
    )
    options = parser.parse_args()
    start = time.monotonic()
    last, grown = [], []

    def tell(text):
        print(f"[{time.monotonic() - start:4.0f} s] {text}", file=sys.stderr, flush=True)

    for name in options.workloads:
        columns = COLUMNS.get(name, 6) if options.columns is None else options.columns
        if options.columns is None and options.kernels and set(options.kernels) <= set(UNEVEN):
            columns = 0
        result = count(name, WORKLOADS[name], options, options.kernels, columns, tell)
        uneven = [kernel for kernel in UNEVEN if kernel in result["kernels"]]
        if options.columns is None and columns > 0 and uneven:
            tell(f"{name}: all blocks of {' and '.join(uneven)}")
            whole = count(name, WORKLOADS[name], options, uneven, 0, tell)["kernels"]
            result["kernels"] |= {kernel: whole[kernel] for kernel in uneven}
        bound, even, floor = tables.show(result, options.lines)
        if options.json:
            write(result, options.json)
        if options.against:
            grown += (f"{name}: {line}" for line in growth(result["kernels"], first_look.counted(name)))
        if options.kernels:
            line = f"{name}, {' '.join(options.kernels)} only: {bound:.3f} ms"
        else:
            line = f"{name}: {bound / floor:.2f}x"
        line += f" (bound {bound:.3f} ms over a floor of {floor:.3f} ms on {options.device}; "
        line += f"{even / floor:.2f}x were all blocks alike)"
        print(f"\n{line}", flush=True)
        last.append(line)
        tell(f"{name}: done")
    if len(last) > 1:
        print("\n" + "\n".join(last))
    if grown:
        raise SystemExit("\n".join(grown))


if __name__ == "__main__":
    main()
