"""Times a whole training step of a detector and what the losses of sea_kernels add to it.

    python benchmarks/bench_step.py [--annotations instances_val2017.json]
    python benchmarks/bench_step.py --device cuda --amp --height 800 --width 1344

torchvision's FCOS with ResNet-50, taught by one with ResNet-101. In one run on one device: the parts of the step, the
losses by the native kernels, by the reference in eager mode and under torch.compile, and whole steps. Prints tables,
and writes a JSON file with every sample and a picture. README.md beside this file says what each column means.
"""

import argparse
import copy
import dataclasses
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import boxes as box_sources
import measure
import plot
import report
import torch
from steps import COMPILED, EAGER, NATIVE, make_regions, make_steps, measure_rows, training_step
from workloads import Inputs, Workload, make_inputs

import sea_kernels as sk

STUDENT, OPTIMIZER, TEACHER = "student, detection losses", "optimizer step", "teacher"
WITHOUT, WITH = "whole step without distillation", "whole step with "
ROWS = (NATIVE, EAGER, COMPILED)
COLORS = ("#4477aa", "#99bbdd", "#bbbbbb", "#998833", "#cc6677", "#eeaaaa")

COLUMNS = {
    "": report.label,
    "forward ms": "{forward_ms:.4g}",
    "backward ms": "{backward_ms:.4g}",
    "SEA ms": "{sea_ms:.4g}",
    "added to the student's step": "{added_to_student:.1%}",
    "added to student and teacher": "{added_to_student_and_teacher:.1%}",
    "sum of parts ms": "{parts_ms:.4g}",
    "whole step ms": "{whole_ms:.4g}",
    "peak of SEA MiB": "{peak_mib:.4g}",
    "peak of whole step MiB": "{whole_peak_mib:.4g}",
}


def fcos(backbone: str, num_classes: int) -> torch.nn.Module:
    """As fcos_resnet50_fpn makes it for training from ImageNet's weights, of any depth and with random weights.

    Batch norm, the first convolution and the first stage are frozen. Images come in the size that they are to have.
    """
    try:
        from torchvision.models.detection import FCOS
        from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
        from torchvision.ops.feature_pyramid_network import LastLevelP6P7
    except Exception as e:  # one for another torch fails in its own ways
        raise SystemExit(f"bench_step.py needs a torchvision for torch {torch.__version__}: {e!r}") from e
    features = resnet_fpn_backbone(
        backbone_name=backbone,
        weights=None,
        trainable_layers=3,
        returned_layers=[2, 3, 4],
        extra_blocks=LastLevelP6P7(256, 256),
    )
    return FCOS(features, num_classes, _skip_resize=True)


@dataclass
class Batch:
    images: list[torch.Tensor]  # [3, height, width] before padding
    targets: list[dict[str, torch.Tensor]]
    ignore_boxes: list[torch.Tensor] | None
    boxes: box_sources.Boxes  # the same boxes, packed

    @property
    def truth(self) -> dict:
        """As a distiller takes it."""
        return {
            "boxes": [t["boxes"] for t in self.targets],
            "labels": [t["labels"] for t in self.targets],
            "image_sizes": self.boxes.image_sizes,
            "ignore_boxes": self.ignore_boxes,
        }


def make_batch(boxes: box_sources.Boxes, batch: int, height: int, width: int, device: torch.device) -> Batch:
    boxes = dataclasses.replace(boxes, image_sizes=boxes.image_sizes or [(height, width)] * batch).to(device)
    ignore = None
    if boxes.ignore_boxes is not None:
        ignore = [boxes.ignore_boxes[boxes.ignore_batch_index == b] for b in range(batch)]
    own = [boxes.batch_index == b for b in range(batch)]
    return Batch(
        images=[torch.randn(3, *size, device=device) for size in boxes.image_sizes],
        targets=[{"boxes": boxes.boxes[rows], "labels": boxes.labels[rows]} for rows in own],
        ignore_boxes=ignore,
        boxes=boxes,
    )


class Training:
    """A student in training, with its distiller or without one. The parts of its step are as measure.py wants them."""

    def __init__(self, student: torch.nn.Module, batch: Batch, amp: bool, distiller: "sk.SEADistiller | None" = None):
        self.student, self.batch, self.amp, self.distiller = student.train(), batch, amp, distiller
        self.trained = [p for p in student.parameters() if p.requires_grad]
        # The rate is zero so that every repeat computes the same; the step takes as long with any other.
        self.optimizer = torch.optim.SGD(self.trained, lr=0.0, momentum=0.9, weight_decay=1e-4)

    def losses(self) -> dict[str, torch.Tensor]:
        with autocast(self.batch, self.amp):
            losses = self.student(self.batch.images, self.batch.targets)
            if self.distiller is not None:
                losses |= self.distiller.losses(**self.batch.truth)
        return losses

    def forward_backward(self, _, mark):
        self.optimizer.zero_grad()
        losses = self.losses()
        mark()
        sum(losses.values()).backward()
        return [loss.detach() for loss in losses.values()], [p.grad for p in self.trained]

    def update(self, _, mark):
        self.optimizer.step()
        return [], []

    def step(self, backend: str = "native"):
        def step(x, mark):
            with sk.backend(backend):
                results = self.forward_backward(x, mark)
            self.optimizer.step()
            return results

        return step


def autocast(batch: Batch, amp: bool):
    return torch.autocast(batch.images[0].device.type, torch.bfloat16) if amp else nullcontext()


def teacher_step(teacher: torch.nn.Module, batch: Batch, amp: bool):
    """The teacher as far as its maps are needed, on the images that the student's transform has made ready."""
    taps = sk.taps.find(teacher)
    images = teacher.transform.train()(batch.images)[0].tensors  # train: else it resizes them

    def step(_, mark):
        with torch.no_grad(), autocast(batch, amp):
            taps.run(teacher, images)
        return [], []

    return step


def captured_inputs(training: Training, device: torch.device, count: int | None):
    """(workload, inputs): copies of the maps of one step."""
    batch = training.batch
    with autocast(batch, training.amp):
        training.student(batch.images, batch.targets)
        maps = training.distiller.capture(**batch.truth)[:4]
    dtypes = {x.dtype for sets in maps for levels in sets for x in levels}
    if len(dtypes) > 1:
        raise SystemExit(f"the maps of student and teacher have the dtypes {dtypes}; expected a single one")
    height, width = box_sources.padded_size(batch.boxes.image_sizes)
    first = maps[0][0][0]
    workload = Workload(
        batch=len(batch.images),
        height=height,
        width=width,
        channels=first.shape[1],
        maps=len(maps[0]),
        dtype=str(first.dtype).removeprefix("torch."),
        channels_last=not first.is_contiguous(),
    ).with_boxes(batch.boxes)
    inputs = make_inputs(workload, batch.boxes, device, count)
    with torch.no_grad():
        for x in inputs:
            for to, of in zip((x.student_cls, x.teacher_cls, x.student_box, x.teacher_box), maps, strict=True):
                for m in range(workload.maps):
                    for a, b in zip(to[m], of[m], strict=True):
                        if a.shape != b.shape:
                            raise SystemExit(f"a map is {list(b.shape)}; expected {list(a.shape)}, by its stride")
                        a.copy_(b)
    return workload, inputs


def compiled_step(workload: Workload):
    """The reference under torch.compile: the regions, and one map of each branch at a time, which all share one graph.

    A graph of all maps takes too long to compile for a quick run.
    """
    options = {"fullgraph": True, "dynamic": False}
    regions_of = torch.compile(lambda boxes: make_regions(workload, boxes), **options)
    one_map = torch.compile(lambda *maps: tuple(sk.sea_loss(*([x] for x in maps[:4]), maps[4])), **options)

    def losses(x: Inputs):
        regions = regions_of(x.boxes)
        sets = zip(x.student_cls, x.teacher_cls, x.student_box, x.teacher_box, strict=True)
        return tuple(sum(terms) for terms in zip(*(one_map(*maps, regions) for maps in sets), strict=True))

    return training_step(losses, "reference")


# ----------------------------------------------------------------------------------------------------------- results


def summarize(rows: list[dict]) -> tuple[dict[str, float], list[dict]]:
    """(milliseconds of the parts without the SEA losses, one entry for each way to compute these).

    A backward is the median of the whole less the median of the forward: parts add up to the medians that they are of.
    """
    by_name = {row["name"]: row for row in rows}
    for name in (STUDENT, OPTIMIZER, TEACHER, WITHOUT):
        if "left_out" in by_name[name]:
            raise SystemExit(f"{name}: {by_name[name]['left_out']}")
    student = by_name[STUDENT]
    parts = {
        "student forward": student["forward_ms"],
        "student backward": student["step_ms"] - student["forward_ms"],
        "optimizer step": by_name[OPTIMIZER]["step_ms"],
        "teacher forward": by_name[TEACHER]["step_ms"],
    }
    both = sum(parts.values())
    alone = both - parts["teacher forward"]
    sea = []
    for name in ROWS:
        row, whole = by_name.get(name), by_name.get(WITH + name, {})
        if row is None:
            continue
        sea.append({"name": name})
        if "left_out" in row:
            sea[-1]["left_out"] = row["left_out"]
            continue
        sea[-1] |= {
            "forward_ms": row["forward_ms"],
            "backward_ms": row["step_ms"] - row["forward_ms"],
            "sea_ms": row["step_ms"],
            "added_to_student": row["step_ms"] / alone,
            "added_to_student_and_teacher": row["step_ms"] / both,
            "parts_ms": both + row["step_ms"],
            "peak_bytes": row["peak_bytes"],
        }
        if "step_ms" in whole:
            sea[-1] |= {"whole_ms": whole["step_ms"], "whole_peak_bytes": whole["peak_bytes"]}
    return parts, sea


def show(result: dict) -> None:
    machine, parts = result["machine"], result["parts"]
    alone = sum(parts.values()) - parts["teacher forward"]
    without = next(row for row in result["rows"] if row["name"] == WITHOUT)
    print(
        f"\n{machine['device']}, {machine['threads']} threads, torch {result['versions']['torch']}\n"
        f"Student {result['models']['student']}, teacher {result['models']['teacher']}"
        f"{', autocast to bfloat16' * result['amp']}\n"
        f"Maps: {Workload(**result['workload'])}\n"
        f"Boxes: {result['boxes']['source']}\n"
    )
    lines = [[name, f"{ms:.4g}", f"{ms / alone:.1%}"] for name, ms in parts.items()]
    print(report.table(["", "ms", "of the student's step"], lines))
    first = {"name": "no distillation", "parts_ms": alone, "whole_ms": without["step_ms"]}
    first["whole_peak_bytes"] = without["peak_bytes"]
    print("\n" + report.row_table([first, *result["sea"]], COLUMNS))


def draw(result: dict, path: Path) -> None:
    """One bar a row: the step's parts, one after the other."""
    bars = [("no distillation", {k: v for k, v in result["parts"].items() if k != "teacher forward"})]
    for row in result["sea"]:
        if "sea_ms" in row:
            own = {"SEA forward": row["forward_ms"], "SEA backward": row["backward_ms"]}
            bars.append((row["name"], result["parts"] | own))
    figure, axis = plot.plt.subplots(figsize=(9, 1.5 + 0.6 * len(bars)), layout="constrained")
    names = [*result["parts"], "SEA forward", "SEA backward"]
    for y, (_, parts) in enumerate(bars):
        left = 0.0
        for name, color in zip(names, COLORS, strict=True):
            width = parts.get(name, 0)
            axis.barh(y, width, left=left, color=color, label=name if y == len(bars) - 1 else None)
            left += width
        axis.text(left, y, f" {left:.4g}", va="center", fontsize=9)
    axis.set_yticks(range(len(bars)), [name for name, _ in bars])
    axis.invert_yaxis()
    axis.margins(x=0.1)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_xlabel("ms of one training step, sum of its parts")
    w, models = result["workload"], result["models"]
    axis.set_title(
        f"FCOS, {models['student']} taught by {models['teacher']}, batch {w['batch']}, {w['height']}x{w['width']}, "
        f"maps in {w['dtype']}\n{result['machine']['device']}, torch {result['versions']['torch']}",
        fontsize=10,
        loc="left",
    )
    figure.legend(loc="outside lower center", ncols=len(names), frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)
    plot.plt.close(figure)


# ------------------------------------------------------------------------------------------------------------- main


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = report.parser(__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--height", type=int, help="of the input (default: 320; 64 with --smoke)")
    parser.add_argument("--width", type=int, help="of the input (default: 320; 64 with --smoke)")
    parser.add_argument(
        "--amp", action="store_true", help="autocast to bfloat16 (slow on a CPU without such instructions)"
    )
    parser.add_argument("--no-compile", action="store_true", help="without the row of torch.compile")
    budget_help = "past it fewer repeats, and no torch.compile that takes more than half of it (default: 240)"
    parser.add_argument("--budget", type=float, metavar="SECONDS", default=240.0, help=budget_help)
    args = parser.parse_args(argv)
    for name in ("height", "width"):
        if getattr(args, name) is None:
            setattr(args, name, 64 if args.smoke else 320)
    if min(args.batch, args.height, args.width) < 1:
        parser.error(f"batch, height and width are {args.batch}, {args.height}, {args.width}; expected at least 1")
    return args


def run(args: argparse.Namespace, argv: list[str] | None) -> dict:
    device = torch.device(args.device)
    repeats = 2 if args.smoke else 9
    shape = args.batch, args.height, args.width
    boxes = box_sources.choose(args.annotations, *shape)
    batch = make_batch(boxes, *shape, device)

    models = {"student": "resnet18", "teacher": "resnet18"} if args.smoke else {}
    models = {"student": "resnet50", "teacher": "resnet101"} | models
    student = fcos(models["student"], boxes.num_classes).to(device)
    teacher = fcos(models["teacher"], boxes.num_classes).to(device).eval().requires_grad_(False)
    # Copies, because a distiller's hooks hold on to maps.
    plain, plain_teacher = copy.deepcopy(student), copy.deepcopy(teacher)
    distiller = sk.SEADistiller(student, teacher, num_classes=boxes.num_classes)
    alone, distilled = Training(plain, batch, args.amp), Training(student, batch, args.amp, distiller)

    for name, loss in distilled.losses().items():
        if not loss.isfinite():
            raise SystemExit(f"{name} is {loss.item()} with these random weights: nothing was measured")
    workload, inputs = captured_inputs(distilled, device, 1 if args.smoke else None)
    makers = {
        STUDENT: lambda: alone.forward_backward,
        OPTIMIZER: lambda: alone.update,
        TEACHER: lambda: teacher_step(plain_teacher, batch, args.amp),
        WITHOUT: alone.step,
        WITH + NATIVE: distilled.step,
        WITH + EAGER: lambda: distilled.step("reference"),
        **make_steps(workload, inputs, compiled=False, context=False),
    }
    if not (args.smoke or args.no_compile):
        makers[COMPILED] = lambda: compiled_step(workload)
    tell = report.Progress(1 + 2 * len(makers) + repeats)
    tell("rates of the machine: copies and matrix products")
    rates = measure.rates(device, getattr(torch, workload.dtype), small=args.smoke)
    rows = measure_rows(workload, inputs, makers, device, repeats, rates["copy"], tell, args.budget)
    parts, sea = summarize(rows)
    origin = report.provenance("bench_step.py", argv, device)
    origin["versions"]["torchvision"] = sys.modules["torchvision"].__version__
    return {
        **origin,
        "models": models,
        "amp": args.amp,
        "workload": dataclasses.asdict(workload),
        "batches": len(inputs),
        "boxes": {"source": boxes.source, "image_sizes": batch.boxes.image_sizes},
        "rates": rates,
        "rows": rows,
        "parts": parts,
        "sea": sea,
        "seconds": tell.close(),
    }


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    report.begin()
    result = run(args, argv)
    show(result)
    report.save(result, args.out / "bench_step", draw)


if __name__ == "__main__":
    report.run(main)
