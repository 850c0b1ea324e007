"""Trains a small detector with and without SEA distillation and compares COCO's average precision.

    python benchmarks/distill_ap.py [--preset cpu] [--out DIR] [--budget SECONDS]

A teacher is trained once; then the same student with every set of distillation losses, from the same initialization on
the same batches, for several seeds. Every finished run is a JSON file in --out: a second call continues where the first
one ended. Prints a table; writes it, a JSON file and a picture. README.md beside this file says what each row is.
"""

import argparse
import dataclasses
import json
import math
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import fcos
import report
import shapes
import torch
from plot import plt
from torch.nn import functional as F
from tqdm import tqdm

import sea_kernels as sk

SEA = ("anchor", "distance", "localization")
TERMS = ("pixel", "pixel_box", *SEA)
ROWS = {
    "student alone": (),
    "pixel matching": ("pixel",),
    "L2 on the box branch": ("pixel_box",),
    "anchor": ("anchor",),
    "distance": ("distance",),
    "localization": ("localization",),
    "anchor + distance": ("anchor", "distance"),
    "anchor + localization": ("anchor", "localization"),
    "distance + localization": ("distance", "localization"),
    "all three": SEA,
}
TEACHER = "teacher"
FIRST = ("student alone", "all three", "pixel matching")  # of every seed: the first runs already say something


@dataclass(frozen=True)
class Preset:
    size: int  # of an image, in pixels
    largest: float  # side of an object
    train: int  # images
    val: int
    strides: tuple[int, ...]
    channels: int  # of FPN and head, the same for student and teacher: no adapters
    convolutions: int  # of each tower
    student: fcos.Net
    teacher: fcos.Net
    batch: int
    student_images: int  # that one student sees, in as many passes over the train set as that takes
    teacher_images: int
    rate: float  # the highest learning rate (AdamW, one cycle)
    share: float  # each distillation loss over the detection loss, when training starts
    cache: bool  # keep the teacher's maps of the train set in memory (float16) instead of running the teacher
    seeds: int = 3


_SMALL = fcos.Net(12, (16, 32, 48, 64), (0, 1, 1, 0)), fcos.Net(24, (32, 64, 96, 128), (1, 2, 2, 1))
_LARGE = fcos.Net(16, (24, 48, 72, 96), (0, 1, 1, 0)), fcos.Net(32, (64, 128, 192, 256), (1, 3, 3, 2))
PRESETS = {
    "gpu": Preset(256, 200, 16384, 2000, (8, 16, 32, 64), 64, 3, *_LARGE, 64, 65536, 196608, 2e-3, 0.5, False),
    "cpu": Preset(128, 112, 6144, 500, (8, 16, 32), 32, 2, *_SMALL, 8, 9216, 16384, 2e-3, 0.5, True),
}
TINY = Preset(64, 50, 64, 32, (8, 16, 32), 16, 2, *_SMALL, 16, 64, 128, 2e-3, 0.5, True, 1)

_start = time.monotonic()


def tell(text: str) -> None:
    report.say(f"[{time.monotonic() - _start:7.1f} s] {text}")


# --------------------------------------------------------------------------------------------------------- training


def make_net(preset: Preset, net: fcos.Net, seed: int, device) -> fcos.FCOS:
    torch.manual_seed(seed)
    model = fcos.FCOS(net, preset.channels, preset.convolutions, len(shapes.CATEGORIES), preset.strides)
    return model.to(device, memory_format=torch.channels_last)


def batches(preset: Preset, images: int, seed: int) -> torch.Tensor:
    """Numbers of train images, `[steps, batch]`: as many shuffled passes as it takes."""
    generator = torch.Generator().manual_seed(seed)
    passes = [torch.randperm(preset.train, generator=generator) for _ in range(math.ceil(images / preset.train))]
    steps = images // preset.batch
    return torch.cat(passes)[: steps * preset.batch].view(steps, preset.batch)


class TeacherMaps:
    """The frozen teacher's maps for train images by number: `(cls, box)`, each `[m][l]`."""

    def __init__(self, teacher: fcos.FCOS, images: torch.Tensor, cache: bool):
        self.teacher, self.images, self.cached = teacher.eval(), images, None
        if cache:
            tell("the teacher's maps of all train images")
            parts = [[x.half() for x in self._run(part)] for part in tqdm(images.split(128), disable=None, leave=False)]
            self.cached = [torch.cat(x) for x in zip(*parts)]

    @torch.no_grad()
    def _run(self, images):
        out = self.teacher(images)
        return [x for maps in (out.cls_maps, out.box_maps) for levels in maps for x in levels]

    def __call__(self, index):
        flat = self._run(self.images[index]) if self.cached is None else [x[index] for x in self.cached]
        levels = len(self.teacher.strides)
        sets = [flat[i : i + levels] for i in range(0, len(flat), levels)]
        return sets[: len(sets) // 2], sets[len(sets) // 2 :]


def distillation_losses(terms, student: fcos.Output, teacher, boxes, labels, preset: Preset) -> dict:
    """The named terms, unweighted. `pixel` compares the maps that the anchor loss compares, pixel by pixel."""
    losses = {}
    cls, box = ((student.cls_maps, teacher[0]), (student.box_maps, teacher[1]))
    if "pixel" in terms:
        losses["pixel"] = _pixel_loss(*cls) + _pixel_loss(*box)
    if "pixel_box" in terms:
        losses["pixel_box"] = _pixel_loss(*box)
    if set(terms) & set(SEA):
        count, room = labels.shape
        regions = sk.Regions.from_boxes(
            boxes.view(-1, 4),
            labels.flatten(),
            [tuple(x.shape[-2:]) for x in student.cls],
            list(preset.strides),
            num_classes=len(shapes.CATEGORIES),
            batch_index=torch.arange(count, device=labels.device).repeat_interleave(room),
            batch_size=count,
        )
        sea = sk.sea_loss(*cls, *box, regions)._asdict()
        losses |= {name: sea[name] for name in SEA if name in terms}
    return losses


def _pixel_loss(student, teacher):
    """Squared difference: mean over batch, pixels and channels, summed over levels and maps as SEA's losses are."""
    return sum(F.mse_loss(s, t.to(s.dtype)) for ss, tt in zip(student, teacher) for s, t in zip(ss, tt))


def train(preset: Preset, net: fcos.Net, images: int, seed: int, scenes, name: str, teacher=None, weights=None):
    """Returns the model and the mean of every loss over the first and the last tenth of the steps.

    weights: of each distillation loss that takes part.
    """
    weights = weights or {}
    model = make_net(preset, net, seed, scenes.images.device).train()
    order = batches(preset, images, seed)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=preset.rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, preset.rate, len(order), pct_start=0.2)
    log = []
    for step, index in enumerate(tqdm(order, desc=name, disable=None, leave=False)):
        index = index.to(scenes.images.device)
        boxes, labels = scenes.boxes[index], scenes.labels[index]
        out = model(scenes.images[index])
        losses = {"detection": fcos.detection_loss(out, preset.strides, boxes, labels)}
        if weights:
            parts = distillation_losses(weights, out, teacher(index), boxes, labels, preset)
            losses |= {k: weights[k] * loss for k, loss in parts.items()}
        optimizer.zero_grad()
        sum(losses.values()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        schedule.step()
        log.append(torch.stack([x.detach() for x in losses.values()]))
        if step % max(1, len(order) // 8) == 0 or step + 1 == len(order):
            values = ", ".join(f"{k} {v:.3f}" for k, v in zip(losses, log[-1].tolist()))
            tell(f"{name}: step {step + 1} of {len(order)}: {values}")
    tenth = max(1, len(log) // 10)
    first, last = (torch.stack(part).mean(0).tolist() for part in (log[:tenth], log[-tenth:]))
    return model, {"first": dict(zip(losses, first)), "last": dict(zip(losses, last))}


def calibrate(preset: Preset, scenes, teacher) -> dict[str, float]:
    """Weights that make each loss `share` of the detection loss, over 8 batches of an untrained student; two digits."""
    model, sums = make_net(preset, preset.student, 0, scenes.images.device).train(), dict.fromkeys(TERMS, 0.0)
    detection = 0.0
    with torch.no_grad():
        for index in batches(preset, preset.student_images, 0)[:8]:
            index = index.to(scenes.images.device)
            boxes, labels = scenes.boxes[index], scenes.labels[index]
            out = model(scenes.images[index])
            detection += fcos.detection_loss(out, preset.strides, boxes, labels).item()
            for k, loss in distillation_losses(TERMS, out, teacher(index), boxes, labels, preset).items():
                sums[k] += loss.item()
    return {k: float(f"{preset.share * detection / value:.2g}") for k, value in sums.items()}


# ------------------------------------------------------------------------------------------------------------- runs


def runs(preset: Preset) -> list[tuple[str, int]]:
    """(row, seed) of the students in their order."""
    seeds = range(preset.seeds)
    rest = [row for row in ROWS if row not in FIRST]
    return [(row, seed) for seed in seeds for row in FIRST] + [(row, seed) for seed in seeds for row in rest]


def read(path: Path):
    return json.loads(path.read_text())


def write(path: Path, value) -> None:
    temporary = path.with_suffix(".part")  # an interrupted write leaves no file that looks finished
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    temporary.replace(path)


def run_file(out: Path, row: str, seed: int) -> Path:
    return out / "runs" / f"{row.replace(' ', '_')}-{seed}.json"


def measured(scenes, call) -> dict:
    """Trains by `call`, evaluates: what a run's file holds."""
    begin = time.monotonic()
    model, losses = call()
    middle = time.monotonic()
    metrics = fcos.evaluate(model, scenes, shapes.CATEGORIES)
    seconds = {"training": middle - begin, "evaluation": time.monotonic() - middle}
    return {"metrics": metrics, "losses": losses, "seconds": seconds, "model": model}


def work(args: argparse.Namespace, preset: Preset) -> None:
    """Does what is not done yet; returns early when the budget is spent."""
    out, device = args.out, torch.device(args.device)
    todo = [r for r in runs(preset) if r[0] in args.rows and not run_file(out, *r).exists()]
    if not todo or args.budget <= 0:
        return
    tell(f"{preset.train} train and {preset.val} validation images of {preset.size}x{preset.size}")
    train_set = shapes.generate(preset.train, preset.size, 1, preset.largest, device)
    val_set = shapes.generate(preset.val, preset.size, 2, preset.largest, device)

    checkpoint = out / "teacher.pt"
    teacher = make_net(preset, preset.teacher, 0, device)
    if run_file(out, TEACHER, 0).exists():
        teacher.load_state_dict(torch.load(checkpoint, map_location=device, weights_only=True))
    else:
        arguments = preset, preset.teacher, preset.teacher_images, 0, train_set, TEACHER
        result = measured(val_set, lambda: train(*arguments))
        teacher = result.pop("model")
        torch.save(teacher.state_dict(), checkpoint)
        write(run_file(out, TEACHER, 0), result | {"row": TEACHER, "seed": 0})
        tell(f"{TEACHER}: {in_words(result['metrics'])}")
    teacher.requires_grad_(False)
    maps = TeacherMaps(teacher, train_set.images, preset.cache)
    if not (out / "weights.json").exists():
        write(out / "weights.json", calibrate(preset, train_set, maps))
    weights = read(out / "weights.json")
    tell("weights: " + ", ".join(f"{k} {v:g}" for k, v in weights.items()))

    longest = 0.0
    for i, (row, seed) in enumerate(todo):
        if time.monotonic() - _start + longest > args.budget:
            tell(f"the budget of {args.budget:g} s is spent; {len(todo) - i} runs are left for the next call")
            return
        begin = time.monotonic()
        name = f"run {i + 1} of {len(todo)}, {row}, seed {seed}"
        own = {k: weights[k] for k in ROWS[row]}
        arguments = preset, preset.student, preset.student_images, seed, train_set, name, maps, own
        result = measured(val_set, lambda arguments=arguments: train(*arguments))
        del result["model"]
        write(run_file(out, row, seed), result | {"row": row, "seed": seed, "weights": own})
        tell(f"{name}: {in_words(result['metrics'])}")
        longest = max(longest, time.monotonic() - begin)


# ----------------------------------------------------------------------------------------------------------- output


def in_words(metrics: dict) -> str:
    return ", ".join(f"{k} {v:.2f}" for k, v in metrics.items())


def collect(out: Path, preset: Preset) -> list[dict]:
    """The rows that have a finished run: mean and sample deviation over its seeds."""
    rows = []
    for row in (*ROWS, TEACHER):
        files = [run_file(out, row, seed) for seed in range(preset.seeds)]
        results = [read(f) for f in files if f.exists()]
        if results:
            values = {k: [r["metrics"][k] for r in results] for k in fcos.METRICS}
            rows.append({"name": row, "seeds": [r["seed"] for r in results], "values": values, "runs": results})
            rows[-1]["mean"] = {k: statistics.fmean(v) for k, v in values.items()}
            rows[-1]["deviation"] = {k: statistics.stdev(v) if len(v) > 1 else None for k, v in values.items()}
    alone = {r["seed"]: r["metrics"]["AP"] for r in rows[0]["runs"]} if rows and rows[0]["name"] == FIRST[0] else {}
    for row in rows:
        gains = [r["metrics"]["AP"] - alone[r["seed"]] for r in row["runs"] if r["seed"] in alone]
        if gains and row["name"] not in (FIRST[0], TEACHER):
            deviation = statistics.stdev(gains) if len(gains) > 1 else None
            row["gain"] = {"mean": statistics.fmean(gains), "deviation": deviation}
    return rows


def with_deviation(mean: float, deviation: float | None, form: str = "{:.2f}") -> str:
    return form.format(mean) + (f" ± {deviation:.2f}" if deviation is not None else "")


def markdown(result: dict) -> str:
    header = ["", *fcos.METRICS, "AP over student alone", "seeds"]
    lines = []
    for row in result["rows"]:
        gain = row.get("gain")
        cells = [with_deviation(row["mean"][k], row["deviation"][k]) for k in fcos.METRICS]
        cells.append(with_deviation(gain["mean"], gain["deviation"], "{:+.2f}") if gain else "-")
        lines.append([row["name"], *cells, str(len(row["seeds"]))])
    p, m = result["settings"], result["machine"]
    weights = ", ".join(f"{k} {v:g}" for k, v in result["weights"].items())
    wanted = sum(1 for _ in runs(Preset(**p)))
    done = sum(len(row["seeds"]) for row in result["rows"] if row["name"] != TEACHER)
    return (
        f"{m['device']}, {m['threads']} threads, torch {result['versions']['torch']}; preset {result['preset']}; "
        f"{done} of {wanted} student runs are done\n"
        f"{p['size']}x{p['size']}, objects of 8 to {p['largest']:g} pixels; {p['train']} train and {p['val']} "
        f"validation images; batch {p['batch']}; a student sees {p['student_images']} images, "
        f"the teacher {p['teacher_images']}\n"
        f"Weights: {weights} (each loss is {p['share']:g} of the detection loss over the first 8 batches of an "
        "untrained student; no weight was tuned on the validation images)\n"
        "Mean and sample deviation over the seeds; every row of one seed has the same initialization and batches; "
        "one teacher\n\n" + report.table(header, lines)
    )


def draw(result: dict, path: Path) -> None:
    rows = result["rows"]
    figure, axis = plt.subplots(figsize=(8.5, 0.42 * len(rows) + 1.4), layout="constrained")
    for y, row in enumerate(rows):
        color = "#bbbbbb" if row["name"] in (FIRST[0], TEACHER) else "#4477aa" if _is_sea(row) else "#cc6677"
        axis.barh(y, row["mean"]["AP"], xerr=row["deviation"]["AP"] or 0, color=color, capsize=3)
        axis.plot(row["values"]["AP"], [y] * len(row["seeds"]), "k.", markersize=4)
    axis.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axis.invert_yaxis()
    values = [v for row in rows for v in row["values"]["AP"]]
    spread = max(values) - min(values)
    axis.set_xlim(max(0, min(values) - 0.4 * spread - 0.1), max(values) + 0.1 * spread + 0.1)
    axis.set_xlabel("AP (bar: mean, whisker: sample deviation, dots: seeds); the axis does not begin at 0")
    p = result["settings"]
    axis.set_title(f"{result['machine']['device']}, {p['size']}x{p['size']}, {p['val']} validation images", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _is_sea(row):
    return bool(set(ROWS[row["name"]]) & set(SEA))


# ------------------------------------------------------------------------------------------------------------- main


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--preset", choices=PRESETS, default="gpu")
    parser.add_argument(
        "--share",
        type=float,
        help="each distillation loss over the detection loss, when training starts (default: 0.5)",
    )
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help="only these rows")
    parser.add_argument("--tiny", action="store_true", help="seconds, one seed: checks the program, no more")
    parser.add_argument(
        "--budget",
        type=float,
        metavar="SECONDS",
        default=math.inf,
        help="starts no run that would end later; 0: only the table of finished runs",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", default=Path(__file__).parent / "out" / "distill_ap")
    return parser.parse_args(argv)


def settings(args: argparse.Namespace, preset: Preset) -> dict:
    """Those of this call, which those of the runs in --out must equal."""
    now = json.loads(json.dumps(dataclasses.asdict(preset)))
    path = args.out / "settings.json"
    if path.exists() and read(path) != now:
        raise SystemExit(f"{args.out} holds runs of other settings: choose another --out")
    write(path, now)
    return now


def main(argv: list[str] | None = None) -> None:
    global _start
    _start = time.monotonic()
    args = arguments(argv)
    preset = TINY if args.tiny else PRESETS[args.preset]
    if args.share is not None:
        preset = dataclasses.replace(preset, share=args.share)
    (args.out / "runs").mkdir(parents=True, exist_ok=True)
    of_this_call = settings(args, preset)
    work(args, preset)
    rows = collect(args.out, preset)
    if not rows:
        raise SystemExit(f"no run in {args.out} is finished")
    result = {
        **report.provenance("distill_ap.py", argv, torch.device(args.device)),
        "preset": "tiny" if args.tiny else args.preset,
        "settings": of_this_call,
        "categories": shapes.CATEGORIES,
        "weights": read(args.out / "weights.json") if (args.out / "weights.json").exists() else {},
        "rows": rows,
    }
    text = markdown(result)
    print("\n" + text)
    (args.out / "distill_ap.md").write_text(text + "\n")
    write(args.out / "distill_ap.json", result)
    draw(result, args.out / "distill_ap.png")
    tell(f"written: {args.out / 'distill_ap'}.md, .json, .png")


if __name__ == "__main__":
    report.run(main)
