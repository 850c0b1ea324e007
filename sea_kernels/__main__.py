"""`python -m sea_kernels`: what was built, what runs where, and why not if not. `... show` draws regions."""

import argparse
import math
import platform
import re
import sys
from pathlib import Path

import torch
from torch import Tensor

from . import coco, plot
from .backends import current_backend
from .native import library
from .native.schemas import KERNELS
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


class _BadInputError(Exception):
    """What is wrong with a file, in one sentence."""


def _read_picture(path: Path) -> Tensor:
    """[3, H, W], uint8 or floating."""
    from matplotlib.image import imread

    try:
        picture = torch.tensor(imread(path))
    except Exception as error:  # a damaged picture can raise anything
        raise _BadInputError(f"{path} cannot be read as a picture: {error}") from None
    if picture.dim() == 2:
        picture = picture.unsqueeze(2)
    picture = picture.permute(2, 0, 1)
    picture = picture[:3] if len(picture) > 2 else picture[:1]  # without its opacity
    return picture.expand(3, -1, -1) if picture.dtype == torch.uint8 else picture.expand(3, -1, -1).float()


def _read_coco(path: Path, picture: Path, size: tuple[int, int]) -> tuple[list, list, list]:
    """Rows (x1, y1, x2, y2, label) of one image, the boxes of its crowds, and the categories' names by label."""
    annotations = coco.Annotations(path)
    image = annotations.find(picture.name)
    said = tuple(n if theirs is None else theirs for n, theirs in zip(size, image.size))
    if said != size:
        raise _BadInputError(
            f"{picture} has {size[0]} x {size[1]} pixels (height x width); {path} says {said[0]} x {said[1]}"
        )
    return [(*box, label) for box, label in zip(image.boxes, image.labels)], image.crowds, annotations.names


def _read_rows(path: Path) -> tuple[list, list, list]:
    """The same from lines `x1 y1 x2 y2 label`."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise _BadInputError(f"{path} cannot be read: {error}") from None
    boxes, crowds = [], []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#") or re.match(r"\s*x1\b", line):
            continue
        *sides, name = re.split(r"\s*,\s*|\s+", line.strip(), maxsplit=4)
        try:
            x1, y1, x2, y2 = map(float, sides)
        except ValueError:
            raise _BadInputError(f"{path}, line {number}: {line.strip()[:80]!r}; expected x1 y1 x2 y2 label") from None
        boxes.append(((x1, y1, x2, y2), name)) if name != "ignore" else crowds.append((x1, y1, x2, y2))
    names = sorted({name for _, name in boxes})
    return [(*box, names.index(name)) for box, name in boxes], crowds, names


def show(args: argparse.Namespace) -> str:
    """Draws the regions of one image on every level. Returns what to print."""
    plot._figure_type()  # says that matplotlib is missing
    image = _read_picture(args.image)
    h, w = size = image.shape[1], image.shape[2]
    is_json = args.boxes.suffix.lower() == ".json"
    rows, crowds, names = _read_coco(args.boxes, args.image, size) if is_json else _read_rows(args.boxes)

    height, width = args.size or (math.ceil(n / args.pad_to) * args.pad_to for n in size)
    if height < h or width < w:
        raise _BadInputError(f"--size is {height} x {width}; expected at least {h} x {w}, as {args.image}")
    image = torch.nn.functional.pad(image, (0, width - w, 0, height - h))
    table = torch.tensor(rows, dtype=torch.float64).view(-1, 5)
    ignore = torch.tensor(crowds, dtype=torch.float32).view(-1, 4)
    boxes = table[:, :4].float()
    found = Regions.from_boxes(
        [boxes], [table[:, 4].long()],
        [(math.ceil(height / s), math.ceil(width / s)) for s in args.strides], args.strides,
        num_classes=max(len(names), 1), center_ratio=args.center_ratio, image_sizes=[size], ignore_boxes=[ignore],
    )  # fmt: skip
    figure = plot.regions(image, found, args.strides, names=names, boxes=[boxes], ignore_boxes=[ignore])
    figure.savefig(args.out)
    lines = [
        f"wrote {args.out}: {args.image}, {h} x {w} pixels, padded to {height} x {width}; "
        f"{len(rows)} boxes of {int((found.classes >= 0).sum())} categories, {len(crowds)} crowd"
    ]
    for level, stride in enumerate(args.strides):
        count = plot.kinds(found, level).flatten().bincount(minlength=len(plot.KINDS)).tolist()
        said = ", ".join(f"{n} {kind}" for n, kind in zip(count, plot.KINDS) if n)
        lines.append(f"level {level}, stride {stride:g}: {said}")
    return "\n".join(lines)


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
    about = "draw the regions of one image on every level"
    command = commands.add_parser("show", help=about, description=about.capitalize() + "; needs matplotlib.")
    command.add_argument("image", type=Path, help="a picture file")
    command.add_argument(
        "boxes", type=Path,
        help="a COCO annotation file (.json) that names the picture, or lines `x1 y1 x2 y2 label`, by space or comma; "
        "the label `ignore` marks a crowd",
    )  # fmt: skip
    command.add_argument("--out", type=Path, default=Path("regions.png"), help="default: %(default)s")
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
        print(show(args))
    except (_BadInputError, ImportError, OSError, TypeError, ValueError, RuntimeError) as error:
        print(f"{command.prog}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
