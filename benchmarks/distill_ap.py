"""Trains torchvision's FCOS with and without distillation and compares COCO's average precision.

    python benchmarks/distill_ap.py [--preset cpu] [--out DIR] [--budget SECONDS]

A teacher is trained once; then the same student with every method of distillation, from the same initialization on the
same batches, for several seeds. Each method's weight is chosen by the same rule, its share on a tuning set of images.
Every finished run is a JSON file in --out, an unfinished one has a checkpoint: the next call goes on where the last one
ended. Prints tables; writes them, a JSON file and a picture. README.md beside this file says what each row is.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import math
import multiprocessing
import time
from concurrent import futures
from pathlib import Path

import balance
import report
import shapes
import torch
import torchvision
from distill_runs import ABLATIONS, ALONE, EVERY_ROW, PRESETS, ROWS, TEACHER, Preset, Run, perform, read, write
from distill_tables import collect, draw, in_words, markdown
from tqdm import tqdm

FIRST = (ALONE, "all three", "pixel matching")  # of every seed: the first runs already say something
TUNING_SEED = 1000  # none of the seeds in the tables


def tuned_row(name: str) -> str:
    """The row whose tuning says which share this row gets."""
    terms = EVERY_ROW[name].terms
    return next((row for row in ROWS if ROWS[row].terms == terms), "all three")


def tuning_runs(row: str, args: argparse.Namespace) -> list[Run]:
    return [Run(row, TUNING_SEED, args.rule, share, tuning=True) for share in args.share]


def chosen_share(row: str, args: argparse.Namespace) -> float | None:
    """The one with the best AP on the tuning set. None: its runs are not all finished."""
    if len(args.share) == 1:
        return args.share[0]
    runs = tuning_runs(tuned_row(row), args)
    if not all(run.file(args.out).exists() for run in runs):
        return None
    return max(runs, key=lambda run: read(run.file(args.out))["metrics"]["AP"]).share


def plan(args: argparse.Namespace) -> list[Run]:
    """All runs of this call in their order, finished ones included."""
    rows, seeds = sorted(args.rows, key=lambda row: (*FIRST, row).index(row)), range(args.seeds)
    distilled = [row for row in rows if row != TEACHER and EVERY_ROW[row].terms]
    runs = [Run(TEACHER, 0)] * (TEACHER in rows or bool(distilled))
    runs += [Run(ALONE, seed) for seed in seeds if ALONE in rows]
    if len(args.share) > 1:
        runs += [run for row in dict.fromkeys(map(tuned_row, distilled)) for run in tuning_runs(row, args)]
    return runs + [
        Run(row, seed, args.rule, chosen_share(row, args)) for seed, row in itertools.product(seeds, distilled)
    ]


def ready(run: Run, out: Path) -> bool:
    if run.row in (ALONE, TEACHER):
        return True
    return run.share is not None and Run(TEACHER, 0).file(out).exists()


class Progress:
    """A bar on a terminal, elsewhere a line every half minute: how much is done, and how long it will still take."""

    def __init__(self, total: float):
        self.bar = tqdm(total=total, disable=None, smoothing=0, bar_format="{percentage:5.1f}% [{elapsed}<{remaining}]")
        self.done, self.total, self.start, self.printed = 0.0, total, None, 0.0

    def __call__(self, effort: float) -> None:
        now = time.monotonic()
        if self.start is None:  # images were made until now
            self.start = self.printed = now
        self.done += effort
        self.bar.update(effort)
        if self.bar.disable and now - self.printed > 30:
            left = (now - self.start) * (self.total / self.done - 1)
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


def pending(args: argparse.Namespace) -> list[Run]:
    return [run for run in plan(args) if not run.file(args.out).exists()]


def work(args: argparse.Namespace, preset: Preset) -> None:
    """Does what is not done yet. When the budget is spent, runs in progress end at their next checkpoint."""
    out, deadline, todo = args.out, time.time() + args.budget, pending(args)
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
            todo = pending(args)  # what tuning chooses and what the teacher allows changes with every run
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
    if todo := pending(args):
        tell(f"the budget of {args.budget:g} s is spent; {len(todo)} runs are left for the next call")


def _say_result(run, out):
    if run.file(out).exists():
        result = read(run.file(out))
        tell(f"{run.name}: {in_words(result['metrics'])}; {result['seconds']:.0f} s")


# ------------------------------------------------------------------------------------------------------------- main


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--preset", choices=PRESETS, help="default: gpu where there is one, else cpu; tiny: a check")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rule", choices=balance.RULES, default="gradients", help="what a share is a share of")
    parser.add_argument(
        "--share",
        type=float,
        nargs="+",
        default=[0.3, 1.0],
        help="if several, tuning chooses one for each method (default: 0.3 1)",
    )
    parser.add_argument(
        "--rows",
        nargs="+",
        choices=[*EVERY_ROW, TEACHER],
        default=list(ROWS),
        metavar="ROW",
        help=f"default: {'; '.join(ROWS)}. Also: {'; '.join([*ABLATIONS, TEACHER])}",
    )
    parser.add_argument(
        "--jobs", type=int, help="processes, of one thread each if several; default: 1 on a GPU, else 2"
    )
    parser.add_argument(
        "--budget", type=float, metavar="SECONDS", default=math.inf, help="then stops; 0: only the tables"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", default=Path(__file__).parent / "out" / "distill_ap")
    args = parser.parse_args(argv)
    args.jobs = args.jobs or (1 if args.device.startswith("cuda") else 2)
    return args


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
