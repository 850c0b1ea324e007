"""`python -m sea_kernels`: what was built, what runs where, and why not where not; `... show` draws regions."""

import argparse
import json
import math
import platform
import re
import sys
from pathlib import Path

import torch
from torch import Tensor

from . import ops, plot
from .regions import Regions


def report() -> str:
    error = ops.LIBRARY_ERROR
    info = {"cpu": [], "cpu_available": [], "cuda": None, "why_no_cuda": "unknown"} if error else ops.build_info()
    missing = "the library did not load"
    why_not = {"CPU": missing if error else "not compiled", "CUDA": missing if error else info["why_no_cuda"]}
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    unfit = [f"{gpu}: {why}" for i, gpu in enumerate(gpus) if (why := ops.lacks_code(i))]
    lines = {
        "python": platform.python_version(),
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}, GPU {', '.join(gpus) or 'none'}",
        "library": f"{ops.library_path() or 'none'}: {'not loaded: ' + error if error else 'loaded'}",
        "CPU compiled": " ".join(info["cpu"]) or missing,
        "CPU available": " ".join(info["cpu_available"]) or missing,
        "CPU in use": info.get("cpu_in_use", missing),
        "CUDA compiled": f"{info['cuda']} for {' '.join(info['architectures'])}" if info["cuda"] else why_not["CUDA"],
        **({"cannot run on": "; ".join(unfit)} if unfit else {}),
        "backend": ops.current_backend(),
        "": "",
        "operator": "CPU  CUDA",
    }
    for name in ops.KERNELS:
        runs = {device: not error and ops.has_kernel(name, device) for device in why_not}
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


def _read_coco(text: str, path: Path, picture: Path, size: tuple[int, int]) -> tuple[list, list, list]:
    """Rows (x1, y1, x2, y2, label) of one image, its crowds' boxes, and the categories' names by label."""
    try:
        data = json.loads(text)
        (entry, *_) = [i for i in data["images"] if Path(i["file_name"]).name == picture.name] or [None]
        categories = sorted(data["categories"], key=lambda c: c["id"])
        label = {c["id"]: n for n, c in enumerate(categories)}
        rows, crowds = [], []
        for a in data["annotations"] if entry else []:
            if a["image_id"] == entry["id"]:
                x, y, w, h = map(float, a["bbox"])
                box = (x, y, x + w, y + h)
                crowds.append(box) if a.get("iscrowd") else rows.append((*box, label[a["category_id"]]))
        names = [str(c["name"]) for c in categories]
    except json.JSONDecodeError as error:
        raise _BadInputError(f"{path} is not JSON: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _BadInputError(
            f"{path} is not a COCO annotation file (images, annotations, categories): {type(error).__name__} {error}"
        ) from None
    if entry is None:
        raise _BadInputError(f"{path} has no image of file_name {picture.name}")
    said = entry.get("height", size[0]), entry.get("width", size[1])
    if said != size:
        raise _BadInputError(
            f"{picture} has {size[0]} x {size[1]} pixels (height x width); {path} says {said[0]} x {said[1]}"
        )
    return rows, crowds, names


def _read_rows(text: str, path: Path) -> tuple[list, list, list]:
    """As `_read_coco`, from lines `x1 y1 x2 y2 label`."""
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
    """Draws the regions of one image on every level; returns what there is to say."""
    plot._figure_type()  # says that matplotlib is missing
    image = _read_picture(args.image)
    h, w = size = image.shape[1], image.shape[2]
    try:
        text = args.boxes.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise _BadInputError(f"{args.boxes} cannot be read: {error}") from None
    is_json = args.boxes.suffix.lower() == ".json"
    rows, crowds, names = _read_coco(text, args.boxes, args.image, size) if is_json else _read_rows(text, args.boxes)

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
