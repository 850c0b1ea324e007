"""Looks at what the students of the accuracy study learned: how near their maps and anchors are to the teacher's.

    python benchmarks/distill_look.py [--out DIR] [--drawn ROW ...]

Takes the runs of seed 0 that distill_ap.py has finished in --out. Prints a table over the validation images, beside a
student without training, and draws the cosines with the anchors of one image (look.png in --out).
"""

import argparse
from pathlib import Path

import distill_runs
import report
import shapes
import small_detectors
import torch
from distill_runs import ALONE, PRESETS, Run, read
from torch import Tensor

import sea_kernels as sk

UNTRAINED = "student before training"
BATCH = 8  # as the CPU's presets train, since anchors are means over a batch


def students(out: Path, preset) -> dict[str, torch.nn.Module]:
    """Of each row the student of seed 0, in the order of the rows."""
    found = {}
    for file in sorted((out / "runs").glob("*_seed_0.json")):
        run = read(file)
        run = Run(*(run[k] for k in ("row", "seed", "rule", "share")))
        if run.weights(out).exists() and run.row != distill_runs.TEACHER:
            model = distill_runs.make(preset, preset.student, 0, "cpu")
            model.load_state_dict(torch.load(run.weights(out), weights_only=True))
            found[run] = model
    order = list(distill_runs.EVERY_ROW)
    several = len({run.row for run in found}) < len(found)  # one row with several shares
    untrained = {UNTRAINED: distill_runs.make(preset, preset.student, 0, "cpu")}
    return untrained | {
        run.name if several else run.row: found[run] for run in sorted(found, key=lambda run: order.index(run.row))
    }


def captures(student, teacher, data: shapes.Scenes):
    """The maps and regions of each batch, in evaluation mode."""
    with sk.SEADistiller(student.eval(), teacher, weights=(1, 1, 1)) as distiller:
        for index in torch.arange(len(data)).split(BATCH):
            student(small_detectors.images(data, index))
            shown = small_detectors.targets(data, index)
            yield distiller.capture([x["boxes"] for x in shown], [x["labels"] for x in shown])


@torch.no_grad()
def likeness(capture) -> dict[str, Tensor]:
    """Mean cosines between student and teacher over the maps of both branches: of anchors of each kind, and of pixels.
    And the losses of distance and localization."""
    rows = {"background": slice(0, 1), "center": slice(1, None, 2), "edge": slice(2, None, 2)}
    cosines: dict[str, list[Tensor]] = {kind: [] for kind in (*rows, "pixel")}
    students, teachers = capture.student_cls + capture.student_box, capture.teacher_cls + capture.teacher_box
    for student, teacher in zip(students, teachers):
        anchors = [sk.anchor_pool(maps, capture.regions) for maps in (student, teacher)]
        found, there = torch.cosine_similarity(*anchors, dim=-1), anchors[1].any(-1)  # [L, P]
        for kind, of_kind in rows.items():
            cosines[kind].append(found[:, of_kind][there[:, of_kind]])
        cosines["pixel"] += [torch.cosine_similarity(s, t, dim=1).flatten() for s, t in zip(student, teacher)]
    losses = sk.sea_loss(*capture)
    means = {kind: torch.cat(x).mean() for kind, x in cosines.items()}
    return means | {"distance loss": losses.distance, "localization loss": losses.localization}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, metavar="DIR", default=Path(__file__).parent / "out" / "distill_ap")
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--drawn", nargs="+", metavar="ROW", default=[ALONE, "pixel matching", "all three"])
    parser.add_argument("--image", type=int, default=0, help="index of the validation image to draw")
    args = parser.parse_args(argv)
    preset = PRESETS[args.preset]
    data = distill_runs.scenes(preset, "val", "cpu")
    teacher = distill_runs.trained_teacher(preset, args.out, "cpu")
    lines, drawn = [], {}
    for name, student in students(args.out, preset).items():
        report.say(name)
        sums: dict[str, Tensor] = {}
        for i, capture in enumerate(captures(student, teacher, data)):
            for key, x in likeness(capture).items():
                sums[key] = sums.get(key, 0) + x
            if name in args.drawn and i == args.image // BATCH:
                drawn[name] = [x.detach() for x in capture.student_cls[-1]]
                target, regions = capture.teacher_cls[-1], capture.regions
        lines.append([name, *(f"{x / (i + 1):.3f}" for x in sums.values())])
    print(report.table(["", *(f"cosine, {k}" if "loss" not in k else k for k in sums)], lines))
    if drawn:
        index = torch.arange(len(data)).split(BATCH)[args.image // BATCH]
        figure = sk.plot.cosines(
            torch.stack(small_detectors.images(data, index)),
            drawn | {distill_runs.TEACHER: target},
            regions,
            small_detectors.STRIDES,
            image=args.image % BATCH,
            names=shapes.CATEGORIES,
        )
        figure.savefig(args.out / "look.png", dpi=80)
        report.say(f"written: {args.out / 'look.png'}")


if __name__ == "__main__":
    report.run(main)
