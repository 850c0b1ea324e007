"""`python -m sea_kernels`: what was built, what runs where, and why not if not. `... show` draws regions."""

import argparse
import math
import os
import platform
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from . import coco, ground_truth, page, pictures, plot
from .backends import current_backend
from .native import library
from .native.schemas import KERNELS
from .pictures import read as _read_picture
from .regions import Regions


def report() -> str:
    error = library.LIBRARY_ERROR
    info = {"cpu": [], "cpu_available": [], "cuda": None, "why_no_cuda": "unknown"} if error else library.build_info()
    missing = "the library did not load"
    why_not = {"CPU": missing if error else "not compiled", "CUDA": missing if error else info["why_no_cuda"]}
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    unfit = [f"{gpu}: {why}" for i, gpu in enumerate(gpus) if (why := library.lacks_code(i))]
    lines = {
        "python": platform.python_version(),
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}, GPU {', '.join(gpus) or 'none'}",
        "library": f"{library.library_path() or 'none'}: {'not loaded: ' + error if error else 'loaded'}",
        "CPU compiled": " ".join(info["cpu"]) or missing,
        "CPU available": " ".join(info["cpu_available"]) or missing,
        "CPU in use": info.get("cpu_in_use", missing),
        "CUDA compiled": f"{info['cuda']} for {' '.join(info['architectures'])}" if info["cuda"] else why_not["CUDA"],
        **({"cannot run on": "; ".join(unfit)} if unfit else {}),
        "backend": current_backend(),
        "": "",
        "operator": "CPU  CUDA",
    }
    for name in KERNELS:
        runs = {device: not error and library.has_kernel(name, device) for device in why_not}
        lines[name] = "  ".join("yes" if runs[device] else f"no: {why}" for device, why in why_not.items())
    width = max(map(len, lines))
    return "\n".join(f"{name:<{width}}  {text}".rstrip() for name, text in lines.items())


def _draw(picture: Path, truth: ground_truth.Truth, args: argparse.Namespace, out: str) -> tuple[str, tuple]:
    """What to print of a picture, and what is to be written: its figure, the rows of its table of areas."""
    image = _read_picture(picture)
    h, w = size = image.shape[1], image.shape[2]
    turned = pictures.orientation(picture)
    said = tuple(n if theirs is None else theirs for n, theirs in zip(size, truth.size))
    if said != size:
        why = f", as before its EXIF orientation {turned} turns it" if turned > 4 and said == (w, h) else ""
        raise ValueError(
            f"{picture} has {h} x {w} pixels (height x width); {args.boxes} says {said[0]} x {said[1]}{why}"
        )
    height, width = args.size or (math.ceil(n / args.pad_to) * args.pad_to for n in size)
    if height < h or width < w:
        raise ValueError(f"--size is {height} x {width}; expected at least {h} x {w}, as {picture}")
    rows, crowds = truth.boxes(h, w)
    table = torch.tensor(rows, dtype=torch.float64).view(-1, 5)
    ignore = torch.tensor(crowds, dtype=torch.float32).view(-1, 4)
    boxes = table[:, :4].float()
    found = Regions.from_boxes(
        [boxes], [table[:, 4].long()],
        [(math.ceil(height / s), math.ceil(width / s)) for s in args.strides], args.strides,
        num_classes=max(len(truth.names), 1), center_ratio=args.center_ratio, image_sizes=[size], ignore_boxes=[ignore],
    )  # fmt: skip
    image = torch.nn.functional.pad(image, (0, width - w, 0, height - h))
    figure = plot.regions(image, found, args.strides, names=truth.names, boxes=[boxes], ignore_boxes=[ignore])
    orientation = f", turned by its EXIF orientation {turned}" if turned > 1 else ""
    lines = [
        f"wrote {out}: {picture}, {h} x {w} pixels{orientation}, padded to {height} x {width}; {truth.source}"
        f"{len(rows)} boxes of {int((found.classes >= 0).sum())} categories, {len(crowds)} crowd"
    ]
    for level, stride in enumerate(args.strides):
        count = plot.kinds(found, level).flatten().bincount(minlength=len(plot.KINDS)).tolist()
        parts = ", ".join(f"{n} {kind}" for n, kind in zip(count, plot.KINDS) if n)
        lines.append(f"level {level}, stride {stride:g}: {parts}")
    return "\n".join(lines), (figure, page.areas(found, args.strides, truth.names))


def show(args: argparse.Namespace) -> Iterator[str]:
    """Draws the regions of each picture on every level. Yields what to print. All boxes are read before that."""
    plot.figure_type()  # says that matplotlib is missing
    listed = pictures.listed(args.images)
    several = len(listed) > 1 or any(path.is_dir() for path in args.images)
    find, truths, missing = ground_truth.reader(args.boxes, len(listed)), {}, []
    for picture, folder in listed:
        try:
            truths[picture] = find(picture, folder)
        except coco.NoEntryError as error:
            if picture in args.images:
                raise
            missing.append(str(error))
    if not truths:
        raise ValueError(missing[0])
    if missing:
        yield f"left out {len(missing)} of {len(listed)} pictures: {missing[0]}{', ...' * (len(missing) > 1)}"
    sections = []
    top = os.path.commonpath([os.path.dirname(os.path.abspath(picture)) for picture in truths])
    for picture, truth in truths.items():
        out = args.html or args.out or Path("regions" if several else "regions.png")
        if several and not args.html:
            out = out / f"{os.path.relpath(os.path.abspath(picture), top)}.png"
        said, (figure, rows) = _draw(picture, truth, args, out)
        if args.html:
            sections.append(
                page.section(
                    str(picture), said.partition("\n")[0].removeprefix(f"wrote {out}: {picture}, "), figure, rows
                )
            )
        else:
            if several:
                out.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(out)
        yield said
    if args.html:
        args.html.write_bytes(page.html(sections))


def _positive(kind: type):
    def read(text: str):
        value = kind(text)
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not above 0 and finite")
        return value

    return read


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m sea_kernels", description="Without a command: what was built, what runs where, and why not."
    )
    commands = parser.add_subparsers(dest="command")
    about = "draw the regions of pictures on every level"
    command = commands.add_parser("show", help=about, description=about.capitalize() + "; needs matplotlib.")
    command.add_argument("images", type=Path, nargs="+", help="picture files, or folders of them")
    command.add_argument(
        "boxes", type=Path,
        help="a COCO annotation file that names the pictures; or a folder with a text file of YOLO's for each, such as "
        "their own (classes.txt has the names); or, for one picture, such a text file, or lines `x1 y1 x2 y2 label` in "
        "pixels, by space or comma, where the label `ignore` marks a crowd",
    )  # fmt: skip
    written = command.add_mutually_exclusive_group()
    written.add_argument("--out", type=Path, help="default: regions.png, or for several pictures the folder regions")
    written.add_argument(
        "--html", type=Path, metavar="PAGE", help="write one page of all pictures and the areas of their regions"
    )
    command.add_argument(
        "--strides", type=_positive(float), nargs="+", default=[8, 16, 32, 64, 128], metavar="STRIDE",
        help="of the levels; default: 8 16 32 64 128",
    )  # fmt: skip
    padding = command.add_mutually_exclusive_group()
    padding.add_argument(
        "--pad-to", type=_positive(int), default=1, metavar="MULTIPLE", help="pad height and width to a multiple"
    )
    padding.add_argument(
        "--size", type=_positive(int), nargs=2, metavar=("HEIGHT", "WIDTH"), help="pad to this size, as a batch does"
    )
    command.add_argument("--center-ratio", type=float, default=0.5, help="default: %(default)s")
    args = parser.parse_args(arguments)
    if args.command is None:
        print(report())
        return 0
    try:
        for said in show(args):
            print(said, flush=True)
    except (ImportError, OSError, TypeError, ValueError, RuntimeError) as error:
        print(f"{command.prog}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # ends without a word where the reader of a pipe has gone
    sys.stdout.reconfigure(errors="backslashreplace")  # file names may have letters that the terminal has not
    sys.exit(main())
