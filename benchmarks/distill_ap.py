"""Trains torchvision's FCOS with and without distillation and compares COCO's average precision.

    python benchmarks/distill_ap.py [--preset cpu] [--jobs 2] [--out DIR] [--budget SECONDS]

A teacher is trained once; then the same student with every method of distillation, from the same initialization on the
same batches, for several seeds. Each method's weight is chosen by the same rule, its share on a tuning set of images.
Every finished run is a JSON file in --out, an unfinished one has a checkpoint: the next call goes on where the last one
ended. Prints tables; writes them, a JSON file and a picture. README.md beside this file says what each row is.
"""

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import math
import multiprocessing
import re
import statistics
import time
from collections.abc import Callable
from concurrent import futures
from dataclasses import dataclass, field
from pathlib import Path

import balance
import fcos
import peers
import report
import shapes
import torch
import torchvision
from plot import plt
from torch import Tensor
from tqdm import tqdm

import sea_kernels as sk

SEA = ("anchor", "distance", "localization")


@dataclass(frozen=True)
class Row:
    """What a student learns from besides the detection loss."""

    terms: tuple[str, ...] = ()  # each with a weight of its own
    factor: float = 1.0  # on all weights
    center_ratio: float = 0.5
    options: dict = field(default_factory=dict)  # of sk.sea_loss
    boxes: str = "labels"  # of the regions: "labels", or "teacher" for what the teacher detects


ALONE, TEACHER = "student alone", "teacher"
ROWS = {
    ALONE: Row(),
    "pixel matching": Row(("pixel",)),
    "score-weighted": Row(("score",)),
    "CWD": Row(("cwd",)),
    "L2 on the box branch": Row(("pixel_box",)),
    "anchor": Row(("anchor",)),
    "distance": Row(("distance",)),
    "localization": Row(("localization",)),
    "all three": Row(SEA),
}
ABLATIONS = {
    **{" + ".join(pair): Row(pair) for pair in itertools.combinations(SEA, 2)},
    **{f"distance, temperature {t:g}": Row(("distance",), options={"distance_temperature": t}) for t in (0.01, 1, 5)},
    **{
        f"localization, temperature {t:g}": Row(("localization",), options={"localization_temperature": t})
        for t in (0.1, 0.5, 5)
    },
    **{f"all three, weights times {x:g}": Row(SEA, factor=x) for x in (0.1, 0.3, 3, 10)},
    **{f"all three, center ratio {x:g}": Row(SEA, center_ratio=x) for x in (0.25, 0.75)},
    "all three, detached anchors": Row(SEA, options={"detach_anchors": True}),
    "all three, distance on both branches": Row(SEA, options={"distance_on_box": True}),
    "all three, teacher's boxes": Row(SEA, boxes="teacher"),
}
EVERY_ROW = ROWS | ABLATIONS
FIRST = (ALONE, "all three", "pixel matching")  # of every seed: the first runs already say something
TEACHERS_SCORE = 0.3  # a detection of the teacher that stands in for a label has at least this score
TUNING_SEED = 1000  # none of the seeds in the tables


@dataclass(frozen=True)
class Preset:
    size: int  # of an image, in pixels
    largest: float  # side of an object
    train: int  # images
    tune: int
    val: int
    channels: int  # of FPN and head, the same for student and teacher: no adapters
    convolutions: int  # of each tower
    student: fcos.Net
    teacher: fcos.Net
    batch: int
    student_images: int  # that one student sees, in as many passes over the train set as that takes
    tuning_images: int  # the same of a run that only helps to choose the share
    teacher_images: int
    rate: float  # the highest learning rate (AdamW, one cycle)
    shares: tuple[float, ...]  # to choose from
    points: int = 5  # of a curve: evaluations, evenly over the steps; at each there is a checkpoint


_SMALL = fcos.Net(12, (16, 32, 48, 64), (0, 1, 1, 0)), fcos.Net(24, (32, 64, 96, 128), (1, 2, 2, 1))
_LARGE = fcos.Net(16, (24, 48, 72, 96), (0, 1, 1, 0)), fcos.Net(32, (64, 128, 192, 256), (1, 3, 3, 2))
PRESETS = {
    "gpu": Preset(256, 200, 16384, 1000, 2000, 64, 3, *_LARGE, 32, 131072, 65536, 262144, 2e-3, (0.1, 0.3)),
    "cpu": Preset(128, 112, 8192, 400, 800, 32, 2, *_SMALL, 8, 46080, 23040, 61440, 2e-3, (0.1, 0.3)),
    "tiny": Preset(64, 50, 32, 8, 8, 16, 1, *_SMALL, 4, 16, 8, 16, 2e-3, (0.1, 0.3), 2),
}


@dataclass(frozen=True)
class Run:
    row: str
    seed: int
    rule: str | None = None
    share: float | None = None  # None where there is no distillation, or where tuning has to choose it first
    tuning: bool = False  # evaluated on the tuning set

    @property
    def name(self) -> str:
        weights = "" if self.share is None else f", {self.rule} {self.share:g}"
        return f"{self.row}{weights}, seed {self.seed}"

    def file(self, out: Path) -> Path:
        return out / ("tuning" if self.tuning else "runs") / (re.sub(r"[^\w.]+", "_", self.name) + ".json")

    def images(self, preset: Preset) -> int:
        student = preset.tuning_images if self.tuning else preset.student_images
        return preset.teacher_images if self.row == TEACHER else student

    def effort(self, preset: Preset) -> float:
        """In images of a student alone, as measured on a CPU."""
        return self.images(preset) * (2.4 if self.row == TEACHER else 1.8 if EVERY_ROW[self.row].terms else 1)


# ------------------------------------------------------------------------------------------------------------- data


@functools.cache
def scenes(preset: Preset, kind: str, device: str) -> shapes.Scenes:
    """kind: "train", "tune" or "val", which share no image."""
    seed = {"train": 1, "val": 2, "tune": 3}[kind]
    return shapes.generate(getattr(preset, kind), preset.size, seed, preset.largest, device)


def batches(preset: Preset, images: int, seed: int) -> Tensor:
    """Numbers of train images, `[steps, batch]`: as many shuffled passes as it takes."""
    generator = torch.Generator().manual_seed(seed)
    passes = [torch.randperm(preset.train, generator=generator) for _ in range(math.ceil(images / preset.train))]
    steps = images // preset.batch
    return torch.cat(passes)[: steps * preset.batch].view(steps, preset.batch)


def make(preset: Preset, net: fcos.Net, seed: int, device):
    torch.manual_seed(seed)
    return fcos.make(net, preset.channels, preset.convolutions, len(shapes.CATEGORIES), preset.size, device)


def trained_teacher(preset: Preset, out: Path, device: str):
    model = make(preset, preset.teacher, 0, device)
    model.load_state_dict(torch.load(out / "teacher.pt", map_location=device, weights_only=True))
    return model


def teachers_boxes(preset: Preset, out: Path, device: str, teacher) -> dict[str, Tensor]:
    """What the teacher detects in the train set: `boxes` `[N, most, 4]`, `labels` `[N, most]`, padded by label -1."""
    path = out / "teachers_boxes.pt"
    if not path.exists():
        found = [{k: x[one["scores"] >= TEACHERS_SCORE] for k, x in one.items()} for one in
                 fcos.detect(teacher, scenes(preset, "train", device))]  # fmt: skip
        pad = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
        save(path, {"boxes": pad([x["boxes"] for x in found]),
                    "labels": pad([x["labels"] for x in found], padding_value=-1)})  # fmt: skip
    return torch.load(path, map_location=device, weights_only=True)


# ----------------------------------------------------------------------------------------------------- distillation


def _score_taps(model) -> sk.taps.Taps:
    """The neck's maps, and the class scores where teacher and student have them."""

    def run(model, images):
        model.head.classification_head(list(model.backbone(images).values()))

    found = sk.taps.find(model)
    cls = "backbone", "head.classification_head.cls_logits"
    return dataclasses.replace(found, cls=cls, box=("backbone",), run=run)


class Distillation:
    """One row's losses between a student in training and the teacher, weighted by one rule."""

    def __init__(self, student, teacher, row: Row, rule: str, share: float, channels: int):
        self.row, self.balance = row, balance.Balance(row.terms, rule, share * row.factor)
        taps = _score_taps(student) if "score" in row.terms else None
        # weights of 1: the rule is applied here, as to all methods
        self.distiller = sk.SEADistiller(
            student, teacher, taps, weights=(1, 1, 1), center_ratio=row.center_ratio, **row.options
        )
        self.projectors = peers.Projectors(len(fcos.STRIDES), channels) if "score" in row.terms else None
        if self.projectors is not None:
            self.projectors.to(next(student.parameters()).device)

    def parameters(self) -> list[Tensor]:
        return [] if self.projectors is None else list(self.projectors.parameters())

    def losses(self, step: int, detection: Tensor, measure: bool, **regions) -> dict[str, Tensor]:
        """The weighted losses after the student's forward. Measured steps have none: they train on detection alone."""
        if measure or self.balance.measures(step):
            self._measure(step, detection, self.distiller.capture(**regions))
            return {}
        if set(self.row.terms) <= set(SEA):
            found = self.distiller.losses(**regions)
            found = {name: found[f"loss_sea_{name}"] for name in self.row.terms}
        else:
            found = self._unweighted(self.distiller.capture(**regions))
        weights = self.balance.weights
        return {k: weights[k] * x for k, x in found.items()}

    def _unweighted(self, capture) -> dict[str, Tensor]:
        student_cls, teacher_cls, student_box, teacher_box, _ = capture
        if set(self.row.terms) <= set(SEA):
            found = sk.sea_loss(*capture, **self.row.options)._asdict()
            return {name: found[name] for name in self.row.terms}
        both = student_cls + student_box, teacher_cls + teacher_box
        losses: dict[str, Callable[[], Tensor]] = {
            "pixel": lambda: peers.pixel_loss(*both),
            "pixel_box": lambda: peers.pixel_loss(student_box, teacher_box),
            "cwd": lambda: peers.cwd_loss(*both),
            "score": lambda: peers.score_weighted_loss(self.projectors(student_box), teacher_box, teacher_cls[1]),
        }
        return {name: losses[name]() for name in self.row.terms}

    def _measure(self, step, detection, capture):
        def cut(sets):
            return [[x.detach().requires_grad_() for x in levels] for levels in sets]

        def flat(capture):  # the classification maps of the score's taps are not compared
            sets = capture.student_box if "score" in self.row.terms else capture.student_cls + capture.student_box
            return [x for levels in sets for x in levels]

        # A loss's gradient at a map is what reaches it directly, not through the tower's later maps.
        leaves = capture._replace(student_cls=cut(capture.student_cls), student_box=cut(capture.student_box))
        losses = self._unweighted(leaves)
        if self.balance.rule == "values":
            self.balance.measure(step, detection.item(), {k: x.item() for k, x in losses.items()})
        else:
            own = {k: balance.gradient_norm(x, flat(leaves)) for k, x in losses.items()}
            self.balance.measure(step, balance.gradient_norm(detection, flat(capture)), own)


# --------------------------------------------------------------------------------------------------------- training


def perform(run: Run, preset: Preset, out: Path, device: str, deadline: float, progress: Callable[[float], None]):
    """Trains and evaluates: writes the run's file. Returns False if it stopped at a checkpoint after the deadline."""
    is_teacher = run.row == TEACHER
    row = Row() if is_teacher else EVERY_ROW[run.row]
    data = scenes(preset, "train", device)
    model = make(preset, preset.teacher if is_teacher else preset.student, run.seed, device).train()
    distillation, boxes = None, None
    if row.terms:
        teacher = trained_teacher(preset, out, device)
        boxes = teachers_boxes(preset, out, device, teacher) if row.boxes == "teacher" else None
        distillation = Distillation(model, teacher, row, run.rule, run.share, preset.channels)
    parameters = [*model.parameters(), *(distillation.parameters() if distillation else [])]
    decayed, others = ([p for p in parameters if (p.dim() > 1) == decays] for decays in (True, False))
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=preset.rate, fused=True)
    order = batches(preset, run.images(preset), run.seed)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, preset.rate, len(order), pct_start=0.2)
    ends = [round(len(order) * (i + 1) / preset.points) for i in range(preset.points)]

    checkpoint, first, curve, seconds = run.file(out).with_suffix(".pt"), 0, [], 0.0
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    if distillation and distillation.projectors:
        parts["projectors"] = distillation.projectors
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=False)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        if distillation:
            distillation.balance = state["balance"]
        first, curve, seconds = state["step"], state["curve"], state["seconds"]
        progress(run.effort(preset) * first / len(order))

    begin, sums, counts = time.monotonic() - seconds, {}, {}
    for step in range(first, len(order)):
        if time.time() > deadline and step in ends and step > first:
            return False
        index = order[step].to(device)
        detection = sum(model(fcos.images(data, index), fcos.targets(data, index)).values())
        losses = {"detection": detection}
        if distillation:
            regions = {}
            if boxes:
                there = [x >= 0 for x in boxes["labels"][index]]
                regions = {k: [x[t] for x, t in zip(boxes[k][index], there)] for k in ("boxes", "labels")}
            losses |= distillation.losses(step, detection, step + 1 in ends, **regions)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 10.0)
        optimizer.step()
        schedule.step()
        for k, x in losses.items():
            sums[k], counts[k] = sums.get(k, 0.0) + x.detach(), counts.get(k, 0) + 1
        progress(run.effort(preset) / len(order))
        if step + 1 in ends:
            metrics = fcos.evaluate(model, scenes(preset, "tune" if run.tuning else "val", device), shapes.CATEGORIES)
            means = {k: float(x) / counts[k] for k, x in sums.items()}
            if not math.isfinite(means["detection"]):
                raise FloatingPointError(f"{run.name}: the loss is {means['detection']} before step {step + 1}")
            curve.append({"images": (step + 1) * preset.batch, "metrics": metrics, "losses": means})
            sums, counts, seconds = {}, {}, time.monotonic() - begin
            state = {name: part.state_dict() for name, part in parts.items()}
            state |= {"step": step + 1, "curve": curve, "seconds": seconds}
            save(checkpoint, state | {"balance": distillation and distillation.balance})
    if is_teacher:
        save(out / "teacher.pt", model.state_dict())
    result = dataclasses.asdict(run) | {"metrics": curve[-1]["metrics"], "curve": curve, "seconds": seconds}
    if distillation:
        result |= {"weights": distillation.balance.weights, "measured": distillation.balance.measured}
    write(run.file(out), result)
    checkpoint.unlink()
    return True


# ------------------------------------------------------------------------------------------------------------- runs


def read(path: Path):
    return json.loads(path.read_text())


def write(path: Path, value) -> None:
    _replace(path, lambda part: part.write_text(json.dumps(value, indent=1) + "\n"))


def save(path: Path, value) -> None:
    _replace(path, lambda part: torch.save(value, part))


def _replace(path, store):
    part = path.with_suffix(".part")  # an interrupted write leaves no file that looks finished
    store(part)
    part.replace(path)


def tuned_row(name: str) -> str:
    """The row whose tuning says which share this row gets."""
    terms = EVERY_ROW[name].terms
    return next((row for row in ROWS if ROWS[row].terms == terms), "all three")


def tuning_runs(row: str, rule: str, preset: Preset) -> list[Run]:
    return [Run(row, TUNING_SEED, rule, share, tuning=True) for share in preset.shares]


def chosen_share(row: str, rule: str, preset: Preset, out: Path) -> float | None:
    """The one with the best AP on the tuning set. None: its runs are not all finished."""
    runs = tuning_runs(tuned_row(row), rule, preset)
    if not all(run.file(out).exists() for run in runs):
        return None
    return max(runs, key=lambda run: read(run.file(out))["metrics"]["AP"]).share


def plan(args: argparse.Namespace, preset: Preset) -> list[Run]:
    """All runs of this call in their order, finished ones included."""
    rows, seeds = sorted(args.rows, key=lambda row: (*FIRST, row).index(row)), range(args.seeds)
    distilled = [row for row in rows if row != TEACHER and EVERY_ROW[row].terms]
    runs = [Run(TEACHER, 0)] * (TEACHER in rows or bool(distilled))
    runs += [Run(ALONE, seed) for seed in seeds if ALONE in rows]
    if args.share is None:
        tuned = dict.fromkeys(map(tuned_row, distilled))
        runs += [run for row in tuned for run in tuning_runs(row, args.rule, preset)]
    for seed, row in itertools.product(seeds, distilled):
        share = chosen_share(row, args.rule, preset, args.out) if args.share is None else args.share
        runs.append(Run(row, seed, args.rule, share))
    return runs


def ready(run: Run, out: Path) -> bool:
    if run.row in (ALONE, TEACHER):
        return True
    return run.share is not None and Run(TEACHER, 0).file(out).exists()


class Progress:
    """A bar on a terminal, elsewhere a line every half minute: how much is done, and how long it will still take."""

    def __init__(self, total: float):
        self.bar = tqdm(total=total, disable=None, smoothing=0, bar_format="{percentage:5.1f}% [{elapsed}<{remaining}]")
        self.done, self.total, self.start, self.printed = 0.0, total, time.monotonic(), 0.0

    def __call__(self, effort: float) -> None:
        self.done += effort
        self.bar.update(effort)
        now = time.monotonic()
        if self.bar.disable and now - self.printed > 30:
            left = (now - self.start) * (self.total / self.done - 1) if self.done else 0.0
            tell(f"{self.done / self.total:.1%}, about {tqdm.format_interval(max(0.0, left))} left")
            self.printed = now


_start = time.monotonic()
_queue = None  # in a process of the pool: where its progress goes


def tell(text: str) -> None:
    report.say(f"[{tqdm.format_interval(time.monotonic() - _start)}] {text}")


def _begin_process(queue) -> None:
    global _queue
    _queue = queue
    torch.set_num_threads(1)


def _perform_in_process(*arguments):
    waiting, printed = 0.0, time.monotonic()

    def progress(effort):
        nonlocal waiting, printed
        waiting += effort
        if time.monotonic() - printed > 1:
            _queue.put(waiting)
            waiting, printed = 0.0, time.monotonic()

    done = perform(*arguments, progress)
    _queue.put(waiting)
    return done


def pending(args: argparse.Namespace, preset: Preset) -> list[Run]:
    return [run for run in plan(args, preset) if not run.file(args.out).exists()]


def work(args: argparse.Namespace, preset: Preset) -> None:
    """Does what is not done yet. When the budget is spent, runs in progress end at their next checkpoint."""
    out, deadline, todo = args.out, time.time() + args.budget, pending(args, preset)
    if not todo or args.budget <= 0:
        return
    tell(f"{len(todo)} runs are to do")
    progress, running = Progress(sum(run.effort(preset) for run in todo)), {}
    with contextlib.ExitStack() as stack:
        if args.jobs > 1:
            context = multiprocessing.get_context("spawn")
            queue = context.SimpleQueue()
            pool = stack.enter_context(futures.ProcessPoolExecutor(args.jobs, context, _begin_process, (queue,)))
        while True:
            todo = pending(args, preset)  # what tuning chooses and what the teacher allows changes with every run
            free = [run for run in todo if ready(run, out) and run not in running.values()]
            free = free[: args.jobs - len(running)] if time.time() < deadline else []
            if not free and not running:
                break
            for run in free:
                tell(f"begins: {run.name}")
                arguments = run, preset, out, args.device, deadline
                if args.jobs > 1:
                    running[pool.submit(_perform_in_process, *arguments)] = run
                else:
                    perform(*arguments, progress)
                    _say_result(run, out)
            for future in futures.wait(running, 1, futures.FIRST_COMPLETED).done:
                run = running.pop(future)
                future.result()  # raises what the run raised, once the other runs in progress have ended
                _say_result(run, out)
            while args.jobs > 1 and not queue.empty():
                progress(queue.get())
    progress.bar.close()
    if todo := pending(args, preset):
        tell(f"the budget of {args.budget:g} s is spent; {len(todo)} runs are left for the next call")


def _say_result(run, out):
    if run.file(out).exists():
        result = read(run.file(out))
        tell(f"{run.name}: {in_words(result['metrics'])}; {result['seconds']:.0f} s")


# ----------------------------------------------------------------------------------------------------------- output

# Quantiles 0.975 of Student's t; beyond, the last one is a little too wide.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def in_words(metrics: dict) -> str:
    return ", ".join(f"{k} {metrics[k]:.2f}" for k in fcos.METRICS)


def collect(out: Path) -> list[dict]:
    """Of all finished runs, one entry for each row, rule and share: values, means, deviations, gains over ALONE."""
    groups: dict[tuple, list[dict]] = {}
    for file in sorted((out / "runs").glob("*.json")):
        result = read(file)
        groups.setdefault((result["row"], result["rule"], result["share"]), []).append(result)
    rank = [*EVERY_ROW, TEACHER]
    alone = {r["seed"]: r["metrics"] for r in groups.get((ALONE, None, None), [])}
    rows = []
    for key in sorted(groups, key=lambda key: (rank.index(key[0]), key[1] or "", key[2] or 0)):
        results = sorted(groups[key], key=lambda r: r["seed"])
        row = {"name": key[0], "rule": key[1], "share": key[2], "seeds": [r["seed"] for r in results], "runs": results}
        values = {k: [r["metrics"][k] for r in results] for k in fcos.METRICS}
        row |= {"values": values, "mean": {k: statistics.fmean(v) for k, v in values.items()}}
        row["deviation"] = {k: statistics.stdev(v) if len(v) > 1 else None for k, v in values.items()}
        pairs = [r for r in results if r["seed"] in alone]
        if pairs and key[0] not in (ALONE, TEACHER):
            row["gain"] = {k: interval([r["metrics"][k] - alone[r["seed"]][k] for r in pairs]) for k in fcos.METRICS}
        rows.append(row)
    return rows


def interval(differences: list[float]) -> dict:
    """Mean and, of two seeds or more, half the width of the 95% confidence interval."""
    n = len(differences)
    half = None if n < 2 else _T[min(n - 1, len(_T)) - 1] * statistics.stdev(differences) / n**0.5
    return {"mean": statistics.fmean(differences), "half": half, "differences": differences}


def _plus_minus(mean: float, spread: float | None, form: str = "{:.2f}") -> str:
    return form.format(mean) + (f" ± {spread:.2f}" if spread is not None else "")


def markdown(result: dict) -> str:
    header = ["", "share", *fcos.METRICS, "AP over student alone", "seeds"]
    rules = {row["rule"] for row in result["rows"] if row["rule"]}
    lines = []
    for row in result["rows"]:
        cells = [_plus_minus(row["mean"][k], row["deviation"][k]) for k in fcos.METRICS]
        gain = row.get("gain")
        cells.append(_plus_minus(gain["AP"]["mean"], gain["AP"]["half"], "{:+.2f}") if gain else "-")
        share = "-" if row["share"] is None else f"{row['share']:g}" + f" ({row['rule']})" * (len(rules) > 1)
        lines.append([row["name"], share, *cells, str(len(row["seeds"]))])
    p, m = result["settings"], result["machine"]
    text = (
        f"{m['device']}, {m['threads']} threads, torch {result['versions']['torch']}, "
        f"torchvision {result['versions']['torchvision']}; preset {result['preset']}\n"
        f"{p['size']}x{p['size']}, objects of 8 to {p['largest']:g} pixels; {p['train']} train, {p['tune']} tuning and "
        f"{p['val']} validation images; batch {p['batch']}; a student sees {p['student_images']} images "
        f"({p['tuning_images']} in tuning), the teacher {p['teacher_images']}\n"
    )
    for rule in sorted(rules):
        text += (
            f"Weights by {rule}: each loss has a share of the detection loss: the {balance.RULES[rule]}, measured at "
            f"every {balance.EVERY}th of the first {balance.UNTIL} steps, then frozen\n"
        )
    text += (
        "Mean and sample deviation over the seeds; every row of one seed has the same initialization and batches, so "
        "gains are paired (mean and 95% confidence interval); one teacher\n\n" + report.table(header, lines)
    )
    if result["tuning"]:
        shares = sorted({run["share"] for run in result["tuning"]})
        found = {(run["row"], run["rule"], run["share"]): run["metrics"]["AP"] for run in result["tuning"]}
        lines = [
            [f"{row} ({rule})", *(f"{found[row, rule, x]:.2f}" if (row, rule, x) in found else "-" for x in shares)]
            for row, rule in dict.fromkeys(key[:2] for key in found)
        ]
        text += "\n\nAP on the tuning set, which chose the shares\n\n"
        text += report.table(["", *(f"share {x:g}" for x in shares)], lines)
    return text


def draw(result: dict, path: Path) -> None:
    rows = result["rows"]
    size = (13, max(4.5, 0.36 * len(rows) + 1.6))
    figure, (bars, curves) = plt.subplots(1, 2, figsize=size, layout="constrained")
    gains = [row for row in rows if "gain" in row]
    for y, row in enumerate(gains):
        gain = row["gain"]["AP"]
        bars.barh(y, gain["mean"], xerr=gain["half"] or 0, color=_color(row), capsize=3)
        bars.plot(gain["differences"], [y] * len(gain["differences"]), "k.", markersize=4)
    bars.set_yticks(range(len(gains)), [_label(row) for row in gains])
    bars.invert_yaxis()
    bars.axvline(0, color="black", linewidth=0.8)
    bars.set_xlabel("AP over the student alone (bar: mean, whisker: 95% interval, dots: seeds)")
    for row in rows:
        points = [[point["metrics"]["AP"] for point in run["curve"]] for run in row["runs"]]
        images = [point["images"] / 1000 for point in row["runs"][0]["curve"]]
        style = {"color": "black", "linestyle": "--" if row["name"] == TEACHER else "-"}
        curves.plot(
            images,
            [statistics.fmean(x) for x in zip(*points)],
            label=_label(row),
            **(style if row["name"] in (ALONE, TEACHER) else {"alpha": 0.8}),
        )
    curves.set_xlabel("thousand images")
    curves.set_ylabel("AP")
    curves.legend(fontsize=8, frameon=False)
    for axis in (bars, curves):
        axis.spines[["top", "right"]].set_visible(False)
    p = result["settings"]
    figure.suptitle(
        f"{result['machine']['device']}, {p['size']}x{p['size']}, {p['val']} validation images", fontsize=10
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _label(row):
    return row["name"] + (f" ({row['rule']} {row['share']:g})" if row["rule"] else "")


def _color(row):
    return "#4477aa" if set(EVERY_ROW[row["name"]].terms) <= set(SEA) else "#cc6677"


# ------------------------------------------------------------------------------------------------------------- main


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--preset", choices=PRESETS, help="default: gpu where there is one, else cpu; tiny: a check")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rule", choices=balance.RULES, default="gradients", help="what a share is a share of")
    parser.add_argument("--share", type=float, help="of every method; default: tuning chooses one for each")
    parser.add_argument(
        "--rows",
        nargs="+",
        choices=[*EVERY_ROW, TEACHER],
        default=list(ROWS),
        metavar="ROW",
        help=f"default: {', '.join(ROWS)}; also: {', '.join([*ABLATIONS, TEACHER])}",
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes of one thread each")
    parser.add_argument(
        "--budget", type=float, metavar="SECONDS", default=math.inf, help="then stops; 0: only the tables"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", default=Path(__file__).parent / "out" / "distill_ap")
    return parser.parse_args(argv)


def settings(out: Path, preset: Preset) -> dict:
    """Those of this call, which those of the runs in --out must equal."""
    now = json.loads(json.dumps(dataclasses.asdict(preset)))
    path = out / "settings.json"
    if path.exists() and read(path) != now:
        raise SystemExit(f"{out} holds runs of other settings: choose another --out")
    write(path, now)
    return now


def main(argv: list[str] | None = None) -> None:
    global _start
    _start = time.monotonic()
    args = arguments(argv)
    name = args.preset or ("gpu" if args.device.startswith("cuda") else "cpu")
    preset = PRESETS[name]
    for folder in ("runs", "tuning"):
        (args.out / folder).mkdir(parents=True, exist_ok=True)
    of_this_call = settings(args.out, preset)
    work(args, preset)
    rows = collect(args.out)
    if not rows:
        raise SystemExit(f"no run in {args.out} is finished")
    result = report.provenance("distill_ap.py", argv, torch.device(args.device))
    result["versions"]["torchvision"] = torchvision.__version__
    result |= {
        "preset": name,
        "settings": of_this_call,
        "categories": shapes.CATEGORIES,
        "rows": rows,
        "tuning": [read(file) for file in sorted((args.out / "tuning").glob("*.json"))],
    }
    text = markdown(result)
    print("\n" + text)
    (args.out / "distill_ap.md").write_text(text + "\n")
    write(args.out / "distill_ap.json", result)
    draw(result, args.out / "distill_ap.png")
    tell(f"written: {args.out / 'distill_ap'}.md, .json, .png")


if __name__ == "__main__":
    report.run(main)
