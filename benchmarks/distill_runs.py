"""One run of the accuracy study: which rows and presets there are, and how a teacher or a student is trained."""

import dataclasses
import functools
import itertools
import json
import math
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import balance
import peers
import shapes
import small_detectors
import torch
from small_detectors import Net
from torch import Tensor, nn

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
    parts: int = 1  # of a batch, each with anchors of its own, as so many processes have them


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
    "all three, anchors of half a batch": Row(SEA, parts=2),
    "all three, anchors of each image": Row(SEA, parts=8),
}
EVERY_ROW = ROWS | ABLATIONS
TEACHERS_SCORE = 0.5  # of a detection that stands in for a label: 0.87 precise, 0.71 recall (tuning images, CPU preset)


@dataclass(frozen=True)
class Preset:
    size: int  # of an image, in pixels
    largest: float  # side of an object
    train: int  # images
    tune: int
    val: int
    channels: int  # of FPN and head, the same for student and teacher: no adapters
    convolutions: int  # of each tower
    student: Net
    teacher: Net
    batch: int
    student_images: int  # that one student sees, in as many passes over the train set as that takes
    tuning_images: int  # the same of a run that only helps to choose the share
    teacher_images: int
    rate: float  # the highest learning rate (AdamW, one cycle)
    remember: bool  # compute the teacher's maps of all train images once, and store them
    detector: str = "fcos"  # or "faster_rcnn"
    points: int = 5  # of a curve: evaluations, evenly over the steps; at each there is a checkpoint


_SMALL = (
    Net(12, (16, 32, 48, 64), (0, 1, 1, 0)),
    Net(24, (32, 64, 96, 128), (1, 2, 2, 1)),
)
_LARGE = (
    Net(16, (24, 48, 72, 96), (0, 1, 1, 0)),
    Net(32, (64, 128, 192, 256), (1, 3, 3, 2)),
)
PRESETS = {
    "gpu": Preset(256, 200, 16384, 1000, 2000, 64, 3, *_LARGE, 32, 131072, 65536, 262144, 4e-3, False),
    "cpu": Preset(128, 112, 8192, 400, 800, 32, 2, *_SMALL, 8, 30720, 15360, 61440, 4e-3, True),
    "tiny": Preset(64, 50, 32, 8, 8, 16, 1, *_SMALL, 4, 16, 8, 16, 4e-3, True, points=2),
}
PRESETS["cpu-two-stage"] = dataclasses.replace(
    PRESETS["cpu"], detector="faster_rcnn", student_images=15360, teacher_images=30720
)


@dataclass(frozen=True)
class Run:
    row: str
    seed: int
    rule: str | None = None
    share: float | None = None  # None: there is no distillation, or tuning has to choose the share first
    tuning: bool = False  # evaluated on the tuning set

    @property
    def name(self) -> str:
        weights = "" if self.share is None else f", {self.rule} {self.share:g}"
        return f"{self.row}{weights}, seed {self.seed}"

    def file(self, out: Path) -> Path:
        return out / ("tuning" if self.tuning else "runs") / (re.sub(r"[^\w.]+", "_", self.name) + ".json")

    def weights(self, out: Path) -> Path:
        """The trained student."""
        return out / "students" / self.file(out).relative_to(out).with_suffix(".pt")

    def images(self, preset: Preset) -> int:
        student = preset.tuning_images if self.tuning else preset.student_images
        return preset.teacher_images if self.row == TEACHER else student

    def effort(self, preset: Preset) -> float:
        """In images of a student alone, as measured on a CPU."""
        distilled = 1.3 if preset.remember else 1.8
        return self.images(preset) * (2.4 if self.row == TEACHER else distilled if EVERY_ROW[self.row].terms else 1)


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


def make(preset: Preset, net: Net, seed: int, device):
    torch.manual_seed(seed)
    return getattr(small_detectors, preset.detector)(
        net, preset.channels, preset.convolutions, len(shapes.CATEGORIES), preset.size, device
    )


def trained_teacher(preset: Preset, out: Path, device: str):
    model = make(preset, preset.teacher, 0, device)
    model.load_state_dict(torch.load(out / "teacher.pt", map_location=device, weights_only=True))
    return model


class Stored(nn.Module):
    """Replaces a tapped module of the teacher. Holds its maps of all train images, L of `[N, C, H_l, W_l]`."""

    def __init__(self, levels: list[Tensor]):
        super().__init__()
        self.levels, self.out_channels = levels, levels[0].shape[1]

    def forward(self, index: Tensor) -> list[Tensor]:
        return [x[index] for x in self.levels]


class Remembered(nn.ModuleDict):
    """Replaces the teacher by its stored maps, since images are not augmented. Input: indices `[B]` of train images."""

    def __init__(self, maps: dict[str, list[Tensor]]):
        super().__init__({self.key(name): Stored(levels) for name, levels in maps.items()})

    @staticmethod
    def key(name: str) -> str:
        return name.replace(".", "_")

    def taps(self, taps: sk.taps.Taps) -> sk.taps.Taps:
        """The given taps by the names of the modules here."""
        cls, box = (tuple(map(self.key, entries)) for entries in (taps.cls, taps.box))
        return dataclasses.replace(taps, cls=cls, box=box, run=None)

    def forward(self, index: Tensor) -> None:
        for stored in self.values():
            stored(index)


@torch.no_grad()
def teachers_maps(teacher, data: shapes.Scenes, batch: int = 64) -> dict[str, list[Tensor]]:
    """Runs the teacher on every image in evaluation mode: the maps of all modules that some row taps, by name."""
    taps, two_stage, maps, handles = sk.taps.find(teacher), hasattr(teacher, "rpn"), {}, []
    head = teacher.rpn.head if two_stage else teacher.head
    tapped = *taps.cls, *taps.box, *(() if two_stage else _score_taps(teacher).cls)

    def record(name, _module, _inputs, output):
        for level in output.values() if isinstance(output, dict) else [output]:
            found[name].append(level.contiguous())

    for name in dict.fromkeys(tapped):
        handles.append(teacher.get_submodule(name).register_forward_hook(functools.partial(record, name)))
        maps[name] = None
    teacher.eval()
    for index in torch.arange(len(data)).split(batch):
        found = {name: [] for name in maps}
        head(list(teacher.backbone(teacher.transform(small_detectors.images(data, index))[0].tensors).values()))
        for name, levels in found.items():
            maps[name] = maps[name] or [x.new_empty(len(data), *x.shape[1:]) for x in levels]
            for whole, part in zip(maps[name], levels):
                whole[index] = part
    for handle in handles:
        handle.remove()
    return maps


def teachers_boxes(preset: Preset, out: Path, device: str, teacher) -> dict[str, Tensor]:
    """What the teacher detects in the train set: `boxes` `[N, most, 4]`, `labels` `[N, most]`, padded by label -1."""
    path = out / "teachers_boxes.pt"
    if not path.exists():
        found = small_detectors.detect(teacher, scenes(preset, "train", device))
        sure = [one["scores"] >= TEACHERS_SCORE for one in found]
        pad = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True, padding_value=-1)
        save(path, {k: pad([one[k][s] for one, s in zip(found, sure)]) for k in ("boxes", "labels")})
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
        self.remembered = isinstance(teacher, Remembered)
        teacher_taps = teacher.taps(taps or sk.taps.find(student)) if self.remembered else None
        options = {"weights": (1, 1, 1), "center_ratio": row.center_ratio} | row.options
        self.distiller = sk.SEADistiller(student, teacher, taps, teacher_taps=teacher_taps, **options)
        # Modules that train along; of the rows here only Ultralytics' has any.
        self.projectors = peers.Projectors(len(small_detectors.STRIDES) if "score" in row.terms else 0, channels)
        self.projectors.to(next(student.parameters()).device)

    def losses(
        self, step: int, detection: Tensor, measure: bool, index: Tensor | None = None, **regions
    ) -> dict[str, Tensor]:
        """The weighted losses after the student's forward of the images `index`.

        Measured steps have none: they train on detection alone.
        """
        given = regions | ({"teacher_input": index} if self.remembered else {})
        if measure or self.balance.measures(step):
            self._measure(step, detection, self.distiller.capture(**given), regions)
            return {}
        if set(self.row.terms) <= set(SEA) and self.row.parts == 1:
            found = self.distiller.losses(**given)
            found = {name: found[f"loss_sea_{name}"] for name in self.row.terms}
        else:
            found = self._unweighted(self.distiller.capture(**given), regions)
        weights = self.balance.weights
        return {k: weights[k] * x for k, x in found.items()}

    def _unweighted(self, capture, regions) -> dict[str, Tensor]:
        student_cls, teacher_cls, student_box, teacher_box, _ = capture
        if set(self.row.terms) <= set(SEA):
            parts = [capture] if self.row.parts == 1 else self._split(capture, **regions)
            losses = [sk.sea_loss(*part, **self.row.options)._asdict() for part in parts]
            return {name: sum(x[name] for x in losses) / len(losses) for name in self.row.terms}
        both = student_cls + student_box, teacher_cls + teacher_box
        losses: dict[str, Callable[[], Tensor]] = {
            "pixel": lambda: peers.pixel_loss(*both),
            "pixel_box": lambda: peers.pixel_loss(student_box, teacher_box),
            "cwd": lambda: peers.cwd_loss(*both),
            "score": lambda: peers.score_weighted_loss(self.projectors(student_box), teacher_box, teacher_cls[1]),
        }
        return {name: losses[name]() for name in self.row.terms}

    def _split(self, capture, boxes, labels):
        """Captures of equal parts of the batch, whose boxes are in pixels of its images."""
        *sides, whole = capture
        for part in torch.arange(len(boxes)).chunk(self.row.parts):
            own = slice(int(part[0]), int(part[-1]) + 1)
            maps = [[[x[own] for x in levels] for levels in sets] for sets in sides]
            options = {"num_classes": self.distiller.num_classes, "center_ratio": self.row.center_ratio}
            yield (
                *maps,
                sk.Regions.from_boxes(boxes[own], labels[own], whole.level_shapes, small_detectors.STRIDES, **options),
            )

    def _measure(self, step, detection, capture, regions):
        def cut(sets):
            return [[x.detach().requires_grad_() for x in levels] for levels in sets]

        def flat(capture):
            return [x for sets in (capture.student_cls, capture.student_box) for levels in sets for x in levels]

        # A loss's own gradient at a map is what reaches it directly, not through the tower's later maps.
        leaves = capture._replace(student_cls=cut(capture.student_cls), student_box=cut(capture.student_box))
        losses = self._unweighted(leaves, regions)
        values = {k: (detection.item(), x.item()) for k, x in losses.items()}
        pulls = balance.pulls(detection, flat(capture), losses, flat(leaves))
        self.balance.measure(step, {"gradients": pulls, "values": values})


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
        if preset.remember:
            teacher = Remembered(torch.load(out / "teachers_maps.pt", map_location=device, mmap=True))
        distillation = Distillation(model, teacher, row, run.rule, run.share, preset.channels)
    parameters = [*model.parameters(), *(distillation.projectors.parameters() if distillation else [])]
    decayed, others = ([p for p in parameters if (p.dim() > 1) == decays] for decays in (True, False))
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=preset.rate, fused=True)
    order = batches(preset, run.images(preset), run.seed)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, preset.rate, len(order), pct_start=0.2)
    ends = [round(len(order) * (i + 1) / preset.points) for i in range(preset.points)]

    checkpoint, first, curve, seconds = run.file(out).with_suffix(".pt"), 0, [], 0.0
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    if distillation:
        parts["projectors"] = distillation.projectors
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=False)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        if distillation:
            distillation.balance = state["balance"]
        first, curve, seconds = state["step"], state["curve"], state["seconds"]

    begin, sums, counts = time.monotonic() - seconds, {}, {}
    for step in range(first, len(order)):
        if time.time() > deadline and step in ends and step > first:
            return False
        index = order[step].to(device)
        shown = small_detectors.targets(data, index, small_detectors.first_label(model))
        detection = sum(model(small_detectors.images(data, index), shown).values())
        losses = {"detection": detection}
        if distillation:
            regions = {}
            if row.parts > 1:
                regions = {k: [x[k] for x in small_detectors.targets(data, index)] for k in ("boxes", "labels")}
            if boxes:
                there = [x >= 0 for x in boxes["labels"][index]]
                regions = {k: [x[t] for x, t in zip(boxes[k][index], there)] for k in ("boxes", "labels")}
            losses |= distillation.losses(step, detection, step + 1 in ends, index, **regions)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 10.0)
        optimizer.step()
        schedule.step()
        for k, x in losses.items():
            sums[k], counts[k] = sums.get(k, 0.0) + x.detach(), counts.get(k, 0) + 1
        progress(run.effort(preset) / len(order))
        if step + 1 in ends:
            metrics = small_detectors.evaluate(
                model, scenes(preset, "tune" if run.tuning else "val", device), shapes.CATEGORIES
            )
            means = {k: float(x) / counts[k] for k, x in sums.items()}
            if not math.isfinite(means["detection"]):
                raise FloatingPointError(f"{run.name}: the loss is {means['detection']} before step {step + 1}")
            curve.append({"images": (step + 1) * preset.batch, "metrics": metrics, "losses": means})
            sums, counts, seconds = {}, {}, time.monotonic() - begin
            state = {name: part.state_dict() for name, part in parts.items()}
            state |= {"step": step + 1, "curve": curve, "seconds": seconds}
            save(checkpoint, state | {"balance": distillation and distillation.balance})
    save(out / "teacher.pt" if is_teacher else run.weights(out), model.state_dict())
    if is_teacher and preset.remember:
        save(out / "teachers_maps.pt", teachers_maps(model, data))
    result = dataclasses.asdict(run) | {"metrics": curve[-1]["metrics"], "curve": curve, "seconds": seconds}
    if distillation:
        result |= {"weights": distillation.balance.weights, "measured": distillation.balance.measured}
    write(run.file(out), result)
    checkpoint.unlink()
    return True


# ------------------------------------------------------------------------------------------------------------ files


def read(path: Path):
    return json.loads(path.read_text())


def write(path: Path, value) -> None:
    _replace(path, lambda part: part.write_text(json.dumps(value, indent=1) + "\n"))


def save(path: Path, value) -> None:
    _replace(path, lambda part: torch.save(value, part))


def _replace(path, store):
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")  # an interrupted write leaves no file that looks finished
    store(part)
    part.replace(path)
