"""Counts what the CUDA kernels execute in one step of a workload, without a GPU: tables, and a lower bound of its time.

    python benchmarks/count_work.py W1 W2 --device H200            # last for each: "W1: 6.70x ...", bound over byte floor
    python benchmarks/count_work.py W1 --kernels pool --columns 8  # one kernel, some of its blocks: a minute
    python benchmarks/count_work.py W3 --device A100 --json W3.json

The PTX that nvcc makes of the kernels is translated to C++ and run on the CPU (tests/ptx/README.md). Needs nvcc, ptxas,
g++, and the packages pybind11, scipy and nvidia-cuda-nvdisasm. Shapes, strides, layouts, grids and slices are those of
the full workload. Maps are 32 MB of random numbers again and again, in the same memory. Where columns of the grid are
left out, what they execute is worked out from their tiles, and results are wrong; what is executed does not depend on
them, but for pixels and anchors of norm zero.
"""

import argparse
import ctypes
import json
import mmap
import os
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests")]

import torch
from emulator import operators
from ptx import build, report
from steps import make_regions
from workloads import WORKLOADS

import sea_kernels as sk

PERIOD = 32 << 20  # bytes
ARCHITECTURES = {"A100": 80, "H100": 90, "H200": 90}
COLUMNS = {"W1": 0, "W4": 2}  # where not given: all of W1, 6 of the others
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


def count(name, w, options, tell):
    """Runs a step and counts it: what report.make() wants."""
    architecture = options.architecture or ARCHITECTURES[options.device]
    kernels = {"losses": options.kernels} if options.kernels else None
    columns = COLUMNS.get(name, 6) if options.columns is None else options.columns
    module = operators.install(
        ["losses", "regions"], architecture, count=True, dtypes=[w.dtype], kernels=kernels, tell=tell
    )
    slices = report.DEVICES[options.device]["sms"]  # csrc/cuda/device.h
    module.settings(slices=slices, largest_filled=1 << 20)
    library = ctypes.CDLL(str(module.library))
    library.ptxrun_count(columns, options.products, kernels is not None)

    fd = random_file(getattr(torch, w.dtype))
    student, teacher = [[make_maps(w, fd, 2 * side + branch) for branch in range(2)] for side in range(2)]
    flat = [x.requires_grad_(True) for branch in student for levels in branch for x in levels]
    regions = make_regions(w, w.choose_boxes())
    tell(f"{name}: forward")
    losses = sk.sea_loss(student[0], teacher[0], student[1], teacher[1], regions)
    tell(f"{name}: backward")
    torch.autograd.grad(sum(losses), flat)
    operators.uninstall()
    os.close(fd)
    with tempfile.NamedTemporaryFile() as file:
        if library.ptxrun_count_write(file.name.encode()):
            raise SystemExit(f"cannot write {file.name}")
        launches = json.loads(Path(file.name).read_text())
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
    }
    tell(f"{name}: counted; machine code" if not options.no_sass else f"{name}: counted")
    return report.make(
        about, launches, module.kernels, options.device, architecture, None if options.no_sass else build.CACHE
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="+", choices=WORKLOADS)
    parser.add_argument("--device", choices=report.DEVICES, default="H200")
    parser.add_argument("--architecture", type=int, choices=(80, 90), help="default: the device's")
    parser.add_argument("--kernels", type=lambda x: x.split(","), help="only these, e.g. pool,backward")
    parser.add_argument(
        "--columns", type=int, help="of the grid, about so many are run; 0: all (default: W1 0, W4 2, else 6)"
    )
    parser.add_argument("--products", action="store_true", help="matrix products are computed: results are right")
    parser.add_argument("--no-sass", action="store_true", help="PTX is counted alone")
    parser.add_argument("--lines", type=int, default=10, help="of the sources, in each table of lines")
    parser.add_argument("--json", type=Path, help="a folder for the reports as JSON")
    options = parser.parse_args()
    start = time.monotonic()
    last = []
    for name in options.workloads:
        tell = lambda text: print(f"[{time.monotonic() - start:4.0f} s] {text}", file=sys.stderr, flush=True)  # noqa: E731
        counted = count(name, WORKLOADS[name], options, tell)
        bound, even, floor = report.show(counted, options.lines)
        if options.json:
            options.json.mkdir(parents=True, exist_ok=True)
            kept = {k: v for k, v in counted.items() if k != "lines"}
            (options.json / f"{name}-{options.device}.json").write_text(json.dumps(kept, indent=1, default=float))
        if options.kernels:
            line = f"{name}, {' '.join(options.kernels)} only: {bound:.3f} ms"
        else:
            line = f"{name}: {bound / floor:.2f}x"
        line += f" (bound {bound:.3f} ms over a floor of {floor:.3f} ms on {options.device}; {even / floor:.2f}x were all blocks alike)"
        print(f"\n{line}", flush=True)
        last.append(line)
        tell(f"{name}: done")
    if len(last) > 1:
        print("\n" + "\n".join(last))


if __name__ == "__main__":
    main()
