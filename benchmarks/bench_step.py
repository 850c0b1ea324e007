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
import math
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import bench_losses as bench
import boxes as box_sources
import measure
import plot
import torch
from bench_losses import COMPILED, EAGER, NATIVE
from torch.utils.flop_counter import FlopCounterMode

import sea_kernels as sk

STUDENT, OPTIMIZER, TEACHER = "student, detection losses", "optimizer step", "teacher"
WITHOUT, WITH = "whole step without distillation", "whole step with "
ROWS = (NATIVE, EAGER, COMPILED)
COLORS = ("#4477aa", "#99bbdd", "#bbbbbb", "#998833", "#cc6677", "#eeaaaa")

# What the prediction for a GPU takes from elsewhere.
SEA_MS = 0.42  # W1 in a CUDA graph on an H200: csrc/README.md, itself a prediction
COPY_RATE = 4.3e12  # bytes a second on an H200: csrc/README.md
BF16_PEAK = 989e12  # operations a second of an H100 or H200 (SXM), dense: its data sheet
PEAK_SHARE = 0.4  # of that, for all convolutions of the step: an assumption


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

    @property
    def padded_size(self) -> list[int]:
        """As torchvision pads: to the largest image, and to whole pixels of P5."""
        return [32 * math.ceil(max(image.shape[d] for image in self.images) / 32) for d in (1, 2)]


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
    """(workload, inputs) of bench_losses.py, from the maps of one step."""
    batch = training.batch
    with autocast(batch, training.amp):
        training.student(batch.images, batch.targets)
        maps = training.distiller.capture(**batch.truth)[:4]
    dtypes = {x.dtype for sets in maps for levels in sets for x in levels}
    if len(dtypes) > 1:
        raise SystemExit(f"the maps of student and teacher have the dtypes {dtypes}; expected a single one")
    height, width = batch.padded_size
    first = maps[0][0][0]
    workload = bench.Workload(
        batch=len(batch.images),
        height=height,
        width=width,
        channels=first.shape[1],
        maps=len(maps[0]),
        dtype=str(first.dtype).removeprefix("torch."),
        boxes=len(batch.boxes.labels),
        categories=batch.boxes.categories,
        num_classes=batch.boxes.num_classes,
        channels_last=not first.is_contiguous(),
    )
    inputs = bench.make_inputs(workload, batch.boxes, device, count)
    with torch.no_grad():
        for x in inputs:
            for to, of in zip((x.student_cls, x.teacher_cls, x.student_box, x.teacher_box), maps, strict=True):
                for m in range(workload.maps):
                    for a, b in zip(to[m], of[m], strict=True):
                        if a.shape != b.shape:
                            raise SystemExit(f"a map is {list(b.shape)}; expected {list(a.shape)}, by its stride")
                        a.copy_(b)
    return workload, inputs


def compiled_step(workload: bench.Workload):
    """The reference under torch.compile: the regions, and one map of each branch at a time, which all share one graph.

    A graph of all maps takes too long to compile for a quick run.
    """
    options = {"fullgraph": True, "dynamic": False}
    make_regions = torch.compile(lambda boxes: bench.make_regions(workload, boxes), **options)
    one_map = torch.compile(lambda *maps: tuple(sk.sea_loss(*([x] for x in maps[:4]), maps[4])), **options)

    def losses(x: bench.Inputs):
        regions = make_regions(x.boxes)
        sets = zip(x.student_cls, x.teacher_cls, x.student_box, x.teacher_box, strict=True)
        return tuple(sum(terms) for terms in zip(*(one_map(*maps, regions) for maps in sets), strict=True))

    return bench.training_step(losses, "reference")


# ------------------------------------------------------------------------------------------------------- prediction


def operations(model: torch.nn.Module, batch: int, height: int, width: int, training: bool) -> int:
    """Of the convolutions, forward and backward; or forward alone, as far as the maps of the towers need.

    The model is on the meta device, where nothing is computed.
    """
    x = torch.empty(batch, 3, height, width, device="meta")
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(training):
        levels = list(model.backbone(x).values())
        if training:
            sum(y.sum() for y in model.head(levels).values()).backward()
        else:
            for branch in (model.head.classification_head, model.head.regression_head):
                for level in levels:
                    branch.conv(level)
    return counter.get_total_flops()


def prediction() -> dict:
    """For a GPU: a step as it is trained (W1) by its operations alone, beside the predicted time of the losses."""
    w = bench.WORKLOADS["W1"]
    with torch.device("meta"):
        student, teacher = fcos("resnet50", w.num_classes), fcos("resnet101", w.num_classes)
    size = w.batch, w.height, w.width
    student_operations = operations(student, *size, training=True)
    teacher_operations = operations(teacher, *size, training=False)
    student_ms, teacher_ms = (1e3 * n / (PEAK_SHARE * BF16_PEAK) for n in (student_operations, teacher_operations))
    return {
        "measured_on_a_gpu": False,
        "workload": dataclasses.asdict(w),
        "sea_ms": SEA_MS,
        "sea_least_bytes": w.least_bytes,
        "copy_rate": COPY_RATE,
        "sea_least_bytes_ms": 1e3 * w.least_bytes / COPY_RATE,
        # Autocast has GroupNorm give float32, and so are the maps of torchvision's towers.
        "sea_least_bytes_float32_ms": 1e3 * dataclasses.replace(w, dtype="float32").least_bytes / COPY_RATE,
        "student_operations": student_operations,
        "teacher_operations": teacher_operations,
        "bf16_peak": BF16_PEAK,
        "peak_share": PEAK_SHARE,
        "student_ms": student_ms,
        "teacher_ms": teacher_ms,
        "added_to_student": SEA_MS / student_ms,
        "added_to_student_and_teacher": SEA_MS / (student_ms + teacher_ms),
        "added_to_student_at_peak": SEA_MS / (student_ms * PEAK_SHARE),
    }


def prediction_text(p: dict) -> str:
    w = bench.Workload(**p["workload"])
    return (
        f"PREDICTION for an H200; nothing in this paragraph was measured on a GPU. {w}.\n"
        f"Convolutions of the student's step: {p['student_operations'] / 1e12:.3g} TFLOP; of the teacher's maps: "
        f"{p['teacher_operations'] / 1e12:.3g} TFLOP. At an assumed {p['peak_share']:.0%} of the bf16 peak "
        f"({p['bf16_peak'] / 1e12:.0f} TFLOP/s), and as if all else took no time: "
        f"{p['student_ms']:.3g} and {p['teacher_ms']:.3g} ms.\n"
        f"The losses: {p['sea_least_bytes'] / 2**20:.4g} MiB moved at least, {p['sea_least_bytes_ms']:.2g} ms at "
        f"{p['copy_rate'] / 1e12:.2g} TB/s ({p['sea_least_bytes_float32_ms']:.2g} ms with float32 maps, as autocast "
        f"gives them after GroupNorm); predicted in a CUDA graph: {p['sea_ms']:.2g} ms (csrc/README.md).\n"
        f"So they would add {p['added_to_student']:.1%} to the student's step and "
        f"{p['added_to_student_and_teacher']:.1%} to it and the teacher's; {p['added_to_student_at_peak']:.1%} to a "
        "student's step at the whole peak. A real step is slower than its convolutions, and the share smaller."
    )


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


def sea_table(report: dict) -> str:
    columns = {
        "": lambda r: r["name"] + (f": {r['left_out'][:40]}" if "left_out" in r else ""),
        "forward ms": lambda r: bench.cell(r, "forward_ms", "{:.4g}"),
        "backward ms": lambda r: bench.cell(r, "backward_ms", "{:.4g}"),
        "SEA ms": lambda r: bench.cell(r, "sea_ms", "{:.4g}"),
        "added to the student's step": lambda r: bench.cell(r, "added_to_student", "{:.1%}"),
        "added to student and teacher": lambda r: bench.cell(r, "added_to_student_and_teacher", "{:.1%}"),
        "sum of parts ms": lambda r: bench.cell(r, "parts_ms", "{:.4g}"),
        "whole step ms": lambda r: bench.cell(r, "whole_ms", "{:.4g}"),
        "peak of SEA MiB": lambda r: bench.mib(r, "peak"),
        "peak of whole step MiB": lambda r: bench.mib(r, "whole_peak"),
    }
    without = next(row for row in report["rows"] if row["name"] == WITHOUT)
    alone = {
        "name": "no distillation",
        "parts_ms": sum(report["parts"].values()) - report["parts"]["teacher forward"],
        "whole_ms": without["step_ms"],
        "whole_peak_bytes": without["peak_bytes"],
    }
    return bench.table(list(columns), [[column(r) for column in columns.values()] for r in (alone, *report["sea"])])


def show(report: dict) -> None:
    machine, parts = report["machine"], report["parts"]
    alone = sum(parts.values()) - parts["teacher forward"]
    print(
        f"\n{machine['device']}, {machine['threads']} threads, torch {report['versions']['torch']}\n"
        f"Student {report['models']['student']}, teacher {report['models']['teacher']}"
        f"{', autocast to bfloat16' * report['amp']}\n"
        f"Maps: {bench.Workload(**report['workload'])}\n"
        f"Boxes: {report['boxes']['source']}\n"
    )
    rows = [[name, f"{ms:.4g}", f"{ms / alone:.1%}"] for name, ms in parts.items()]
    print(bench.table(["", "ms", "of the student's step"], rows))
    print("\n" + sea_table(report))
    print("\n" + prediction_text(report["predicted"]))


def draw(report: dict, path: Path) -> None:
    """One bar a row: the step's parts, one after the other."""
    bars = [("no distillation", {k: v for k, v in report["parts"].items() if k != "teacher forward"})]
    for row in report["sea"]:
        if "sea_ms" in row:
            own = {"SEA forward": row["forward_ms"], "SEA backward": row["backward_ms"]}
            bars.append((row["name"], report["parts"] | own))
    figure, axis = plot.plt.subplots(figsize=(9, 1.5 + 0.6 * len(bars)), layout="constrained")
    names = [*report["parts"], "SEA forward", "SEA backward"]
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
    w, models = report["workload"], report["models"]
    axis.set_title(
        f"FCOS, {models['student']} taught by {models['teacher']}, batch {w['batch']}, {w['height']}x{w['width']}, "
        f"maps in {w['dtype']}\n{report['machine']['device']}, torch {report['versions']['torch']}",
        fontsize=10,
        loc="left",
    )
    figure.legend(loc="outside lower center", ncols=len(names), frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)
    plot.plt.close(figure)


# ------------------------------------------------------------------------------------------------------------- main


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--height", type=int, help="of the input (default: 320; 64 with --smoke)")
    parser.add_argument("--width", type=int, help="of the input (default: 320; 64 with --smoke)")
    parser.add_argument(
        "--amp", action="store_true", help="autocast to bfloat16 (slow on a CPU without such instructions)"
    )
    parser.add_argument("--annotations", type=Path, metavar="FILE", help="COCO annotations; else boxes are sampled")
    parser.add_argument("--smoke", action="store_true", help="tiny images and models: checks the program, no more")
    parser.add_argument("--no-compile", action="store_true", help="without the row of torch.compile")
    budget_help = "past it fewer repeats, and no torch.compile that takes more than half of it (default: 240)"
    parser.add_argument("--budget", type=float, metavar="SECONDS", default=240.0, help=budget_help)
    parser.add_argument("--threads", type=int, help="of torch on the CPU")
    parser.add_argument("--out", type=Path, metavar="DIR", default=Path(__file__).parent / "out")
    args = parser.parse_args(argv)
    for name in ("height", "width"):
        if getattr(args, name) is None:
            setattr(args, name, 64 if args.smoke else 320)
    if min(args.batch, args.height, args.width) < 1:
        parser.error(f"batch, height and width are {args.batch}, {args.height}, {args.width}; expected at least 1")
    return args


def run(args: argparse.Namespace) -> dict:
    device = torch.device(args.device)
    repeats = 2 if args.smoke else 9
    shape = args.batch, args.height, args.width
    boxes = box_sources.sample(*shape)
    if args.annotations:  # the images that come nearest to the sampler's numbers
        boxes = box_sources.from_annotations(args.annotations, *shape, len(boxes.labels), boxes.categories)
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
        **bench.make_steps(workload, inputs, compiled=False, context=False),
    }
    if not (args.smoke or args.no_compile):
        makers[COMPILED] = lambda: compiled_step(workload)
    tell = bench.Progress(1 + 2 * len(makers) + repeats)
    tell("copy and matrix product rates of the machine")
    rates = measure.rates(device, getattr(torch, workload.dtype), small=args.smoke)
    rows = bench.measure_rows(workload, inputs, makers, device, repeats, rates["copy"], tell, args.budget)
    parts, sea = summarize(rows)
    origin = measure.provenance("bench_step.py", args.argv, device)
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
        "predicted": prediction(),
    }


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    args.argv = sys.argv[1:] if argv is None else argv
    if sk.ops.LIBRARY_ERROR:
        raise SystemExit(f"sea_kernels cannot run: {sk.ops.LIBRARY_ERROR}")
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    start = time.monotonic()
    report = run(args)
    report["seconds"] = round(time.monotonic() - start, 1)
    show(report)
    measure.save(report, args.out / "bench_step", draw)


if __name__ == "__main__":
    main()
