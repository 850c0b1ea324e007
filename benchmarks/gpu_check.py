"""Everything that needs a GPU, offline, in calls of less than ten minutes each.

Before, where the wheel is built (git ignores carry/):
    NVCC_APPEND_FLAGS=-lineinfo pip wheel -w carry --no-deps .
    pip download -d carry --no-deps --python-version 3.12 pycocotools tabulate tqdm
    cp FOLDER/instances_val2014_100.json carry
Then, with carry/, on a machine with torch, pytest, pytest-xdist, hypothesis, numpy, matplotlib, ncu, compute-sanitizer
and nvcc:
    benchmarks/gpu_check.sh --part 1 --commit COMMIT --out DIR    # how fast are W1 to W5, are the kernels right
    benchmarks/gpu_check.sh --part 2 --commit COMMIT --out DIR    # first_look.py, profiles, torch.compile
    benchmarks/gpu_check.sh --part 3 --commit COMMIT --out DIR    # races, real boxes, torch.compile of W3 to W5
    benchmarks/gpu_check.sh --rehearse                            # without a GPU: all parts, as far as they go

The parts need nothing of each other. Where the machine is lent for a shorter time than a part may take, --seconds N
ends it early: what is last in its plan does not run.

Every step has its own time limit, and a step that fails costs no other one. DIR gets summary.txt, which says what
failed and what did not run, and reports_N.tar with all logs and results. Exit status 1 if any step failed or did not
run.
"""

import argparse
import contextlib
import gzip
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
AT_ONCE = ALONE = 8  # processes on the GPU; a step of that many runs alone
CALL = 570  # seconds that a part may take
GRACE = 5  # the last seconds of a limit: time to write what is known
TAR_BYTES, TARS = 15 << 20, 4  # a machine that is lent returns few files, of 16 MiB at most


class Step(NamedTuple):
    name: str  # what it prints goes to logs/NAME.log
    seconds: int
    processes: int  # that it has on the GPU
    command: tuple
    rehearsal: tuple = ()  # the command without a GPU; none: it is skipped
    shown: bool = False  # all of its output goes into the summary


# ------------------------------------------------------------------------------------------------------------ the plan
# Commands run in a folder outside the source tree, so that Python finds the installed package. Each writes to results/.


def python(program, *arguments):
    return (sys.executable, ROOT / "benchmarks" / program, *arguments)


def bench(workload, *arguments):
    return python("bench_losses.py", "--device", "cuda", "--workload", workload, *arguments)


def script(text, *arguments):
    return ("bash", "-o", "pipefail", "-c", text, "-", sys.executable, *arguments)


def tests(name, workers, chosen, *files):
    """Dealt out to so many processes. One whose CUDA context breaks is replaced (see tests/conftest.py)."""
    files = [ROOT / "tests" / x for x in files]
    report = ("--durations=10", f"--junitxml=results/{name}.xml", "-p", "no:cacheprovider")
    return (sys.executable, "-m", "pytest", "-v", *report, "-n", workers, "--dist", "worksteal", "-k", chosen, *files)


MACHINE = """
nvidia-smi && nvidia-smi -q -d CLOCK,POWER,TEMPERATURE,PERFORMANCE
for tool in nvcc ncu compute-sanitizer; do command -v $tool && $tool --version || echo "missing: $tool"; done
uname -a; lscpu | grep -E "^(Model name|CPU\\(s\\))"; free -g | head -2
"$1" -m pip list 2>/dev/null
"$1" -VV
"""
INSTALL = """
"$1" -m pip install -q --disable-pip-version-check --no-index --no-deps --no-compile --target site "${@:2}" &&
"$1" -c "import sea_kernels; print(sea_kernels.__file__)"
"""
KERNELS = """
"$1" - "$2" <<'END'
import sys
from sea_kernels.__main__ import report
from sea_kernels.native import library, schemas
print(report())
missing = [name for name in schemas.OPERATORS if not library.has_kernel(name, sys.argv[1])]
sys.exit(f"no kernel: {missing}") if missing else print("every operator has a kernel")
END
"""
# Tool, a port of its own, share. A warning of racecheck counts as well. torch asks the driver for what it does not
# always get, which is no error; memory that torch keeps would count as initialized.
SANITIZE = """
program=$2 report=results/$3_${5%/*}.txt options=()
[ "$3" != memcheck ] || options=(--report-api-errors no)
[ "$3" != initcheck ] || export PYTORCH_NO_CUDA_MEMORY_CACHING=1
compute-sanitizer --tool "$3" --port "$4" --error-exitcode 9 --launch-timeout 120 --print-limit 20 "${options[@]}" \\
  "$1" "$program" --share "$5" | tee "$report" && grep -q "SUMMARY: 0 " "$report"
"""
TABLE = '"$1" "$2" results/bench_losses*.json'
TESTS = "kernels", "spec", "integration", "tools/test_benchmark.py"
FEW_TESTS = "kernels/test_everything_once.py", "kernels/test_on_a_gpu.py"
SANITIZERS = "memcheck", "initcheck", "synccheck"  # and racecheck, which is slow


def plan(wheels=(), annotations="instances.json"):
    """Part -> its steps, in the order in which they begin."""
    setup, machine = script(INSTALL, *wheels), script(MACHINE)
    table = script(TABLE, ROOT / "benchmarks/table.py")
    look = python("first_look.py", "--out", "results/first_look.json")
    decided = python("first_look.py", "--table", "results")
    smoke = python("bench_losses.py", "--device", "cpu", "--smoke", "--out", "results")
    chosen = "(cuda or gpu) and not two_to_the_31"

    def compiled(workload):
        return Step(f"compile_{workload}", 150, 1, bench(workload, "--compile-only"))

    def measured(workload, seconds, *options, rehearsal=()):
        # torch.compile may take half of the budget: what follows it needs some 40 seconds.
        options = options or ("--budget", 2 * (seconds - 40))
        command = bench(workload, *options, "--out", "results")
        return Step(f"bench_{workload}", seconds, ALONE, command, rehearsal)

    def profiled(workload):
        command = python("profile_step.py", "--workload", workload, "--ncu", "results")
        return Step(f"profile_{workload}", 60, ALONE, command)

    def sanitized(tool, seconds, port):
        for share in ("0/2", "1/2"):
            command = script(SANITIZE, ROOT / "benchmarks/sanitize.py", tool, port + 100 * int(share[0]), share)
            on_cpu = python("sanitize.py", "--device", "cpu", "--share", share) if tool == "memcheck" else ()
            yield Step(f"{tool}_{share[0]}", seconds, 1, command, on_cpu)

    install = [
        Step("install", 30, ALONE, setup, setup),
        Step("kernels", 15, ALONE, script(KERNELS, "CUDA"), script(KERNELS, "CPU")),
    ]
    quick = "--no-compile", "--budget", 20
    first = [
        Step("machine", 15, ALONE, machine, machine),
        *install,
        measured("W1", 35, *quick, rehearsal=smoke),
        *(measured(workload, 35, *quick) for workload in ("W2", "W3", "W5", "W4")),
        Step("table", 15, ALONE, table, table, shown=True),
        Step("tests", 110, 4, tests("tests", 4, chosen, *TESTS), tests("tests", 1, "", *FEW_TESTS)),
        *(step for i, tool in enumerate(SANITIZERS) for step in sanitized(tool, 60, 50000 + 200 * i)),
    ]
    # torch.compile takes a third of its time where it finds its cache filled; nothing is timed beside it.
    second = [
        *install,
        Step("first_look", 60, ALONE, look, (*look, "--device", "cpu", "--smoke")),
        profiled("W2"),
        profiled("W1"),
        Step("decisions", 15, ALONE, decided, decided, shown=True),
        compiled("W1"),
        compiled("W2"),
        measured("W1", 60),
        measured("W2", 60),
        Step("table", 15, ALONE, table, table, shown=True),
    ]
    # Each takes a minute or more to compile. W3 and W4 need so much memory for it that neither does it beside another.
    third = [
        *install,
        *sanitized("racecheck", 130, 50800),
        Step("coco", 40, ALONE, bench("W1", "--no-compile", "--annotations", annotations, "--out", "results/coco")),
        Step("large_tests", 45, ALONE, tests("large_tests", 0, "gpu and two_to_the_31", "kernels")),
        *(measured(workload, 95) for workload in ("W3", "W4", "W5")),
        Step("table", 15, ALONE, table, table, shown=True),
    ]
    return {1: first, 2: second, 3: third}


def ends(steps):
    """When each step ends, in seconds from the start, if every one takes all of its time.

    They begin in order, each as soon as AT_ONCE allows it. What takes less time lets none end later than that.
    """
    now, out, running = 0, [], []
    for step in steps:
        while sum(processes for _, processes in running) + step.processes > AT_ONCE:
            now, _ = first = min(running)
            running.remove(first)
        out.append(now + step.seconds)
        running.append((out[-1], step.processes))
    return out


# ------------------------------------------------------------------------------------------------------------- running


class Summary:
    def __init__(self, path):
        self.path, self.lines, self.outcomes = path, [], []

    def say(self, text):
        print(text, flush=True)
        self.lines.append(text)
        self.path.write_text("\n".join(self.lines) + "\n")

    def step(self, outcome, name, text):
        self.outcomes.append((outcome, name))
        self.say(f"{outcome:8}{name}: {text}")

    def names(self, outcome):
        return [name for x, name in self.outcomes if x == outcome]


def own_group():
    os.setpgrp()  # not a session: what a machine ends with the call must include it
    # A shell starts its background processes with SIGINT ignored; a shell that begins so cannot trap it.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Running:
    """A step that has begun, in a process group of its own."""

    def __init__(self, step, command, end, environment):
        self.step, self.end, self.began, self.asked = step, end, time.monotonic(), False
        self.log = Path("logs", f"{step.name}.log")
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                [str(x) for x in command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                preexec_fn=own_group,
            )

    def signal(self, number):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def done(self):
        """Whether it has ended; one whose time is over is asked to end, as by Ctrl-C, then killed."""
        now = time.monotonic()
        if self.process.poll() is None and now < self.end:
            if now > self.end - GRACE and not self.asked:
                self.asked = True
                self.signal(signal.SIGINT)
            return False
        self.signal(signal.SIGKILL)  # also what it left running
        self.process.wait()
        return True

    def report(self, summary):
        step, took = self.step, time.monotonic() - self.began
        lines = [line[:300] for line in self.log.read_text(errors="replace").splitlines()]
        if self.asked or self.process.returncode == -signal.SIGKILL:
            summary.step("FAILED", step.name, f"not done in {took:.0f} s")
        elif self.process.returncode != 0:
            summary.step("FAILED", step.name, f"{took:.0f} s, exit status {self.process.returncode}")
        else:
            last = "" if step.shown or not lines else f": {lines[-1][:150]}"
            summary.step("ok", step.name, f"{took:.0f} s{last}")
            lines = lines if step.shown else []
        if lines:
            summary.say("\n".join(lines if step.shown else lines[-12:]))


def run(steps, seconds, rehearse, environment, summary, finished):
    """All steps in order, at most AT_ONCE processes at a time; finished() after each.

    A step may use the time that those before it have left: its own ends when it would if all took as long as they may.
    """
    waiting, running, begin = list(zip(steps, ends(steps))), [], time.monotonic()
    try:
        while waiting or running:
            while waiting and sum(r.step.processes for r in running) + waiting[0][0].processes <= AT_ONCE:
                step, planned = waiting.pop(0)
                end = begin + min(planned, seconds)
                command = step.rehearsal if rehearse else step.command
                if not command:
                    summary.step("skipped", step.name, "needs a GPU")
                elif end - time.monotonic() < 2 * GRACE:
                    summary.step("NOT RUN", step.name, "no time was left")
                else:
                    running.append(Running(step, command, end, environment))
            time.sleep(0.05)
            for r in [r for r in running if r.done()]:
                running.remove(r)
                r.report(summary)
                finished()
    finally:
        for r in running:
            r.signal(signal.SIGKILL)
            summary.step("FAILED", r.step.name, "the call ended")
        for step, _ in waiting:
            summary.step("NOT RUN", step.name, "the call ended")


def pack(folders, out):
    """Their files, compressed one by one, as OUT/reports_N.tar; the small ones first. Returns what found no room."""
    packed, tars, left_out = [], [[]], []
    for path in (path for folder in folders for path in folder.rglob("*") if path.is_file()):
        with contextlib.suppress(FileNotFoundError):  # a temporary file of a step that runs
            packed.append((path, gzip.compress(path.read_bytes(), 6)))
    for path, data in sorted(packed, key=lambda x: (len(x[1]), x[0])):
        room = TAR_BYTES - sum(len(x) + 2048 for _, x in tars[-1])
        if len(data) + 2048 > room and len(tars) < TARS and len(data) + 2048 <= TAR_BYTES:
            tars.append([])
        elif len(data) + 2048 > room:
            left_out.append(f"{path} ({len(data) / 2**20:.1f} MiB)")
            continue
        tars[-1].append((path, data))
    for number, files in enumerate(tars, 1):
        with tarfile.open(out / f"reports_{number}.tar", "w") as tar:
            for path, data in files:
                entry = tarfile.TarInfo(f"{path}.gz")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    return left_out


def wheels_to_install(wheel):
    """The newest one of the package, and whatever else was carried along."""
    found = [Path(wheel)] if wheel else [*ROOT.glob("carry/sea_kernels-*.whl"), *ROOT.glob("dist/sea_kernels-*.whl")]
    if not found:
        raise SystemExit("no wheel in carry/ or dist/, and no --wheel: build one as the first lines of this file say")
    others = [x for x in ROOT.glob("carry/*.whl") if not x.name.startswith("sea_kernels-")]
    return [max(found, key=lambda x: x.stat().st_mtime).resolve(), *sorted(others)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", type=int, choices=(1, 2, 3), help="default: all")
    parser.add_argument("--commit", help="of the wheel; else that of the repository around this file, if there is one")
    parser.add_argument("--out", type=Path, metavar="DIR", default=ROOT / "benchmarks/out/gpu_check")
    parser.add_argument("--wheel", metavar="FILE", help="default: the newest in carry/ or dist/")
    parser.add_argument("--seconds", type=float, default=CALL, help="that each part may take (default: %(default)s)")
    parser.add_argument("--only", metavar="REGEX", default="", help="steps whose names it is found in, and install")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU: runs what needs none, names the rest")
    args = parser.parse_args()
    begin, out, wheels = time.monotonic(), args.out.resolve(), wheels_to_install(args.wheel)
    annotations = Path(os.environ.get("SEA_KERNELS_DATA", ROOT / "carry"), "instances_val2014_100.json").resolve()
    out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))

    work = Path(tempfile.mkdtemp())
    os.chdir(work)
    folders = [Path("logs"), Path("results")]
    for folder in folders:
        folder.mkdir()
    tools = [Path("/usr/local/cuda/bin"), *Path("/opt/nvidia/nsight-compute").glob("*")]
    environment = os.environ | {
        "PATH": os.pathsep.join([os.environ["PATH"], *map(str, tools)]),
        "PYTHONPATH": str(work / "site"),
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "OMP_NUM_THREADS": "2",
        "PIP_ROOT_USER_ACTION": "ignore",
        "HYPOTHESIS_PROFILE": "ci",
        "TORCHINDUCTOR_CACHE_DIR": str(work / "inductor"),
        "TORCHINDUCTOR_COMPILE_THREADS": "8",
    }
    if annotations.exists():
        environment["SEA_KERNELS_DATA"] = str(annotations.parent)
    if args.commit:
        environment["SEA_KERNELS_COMMIT"] = args.commit

    summary = Summary(out / "summary.txt")
    summary.say(f"commit {args.commit or 'not told'}, {wheels[0].name}")
    try:
        parts = plan(wheels, annotations)
        for part in [args.part] if args.part else parts:
            summary.say(f"part {part}")
            chosen = [s for s in parts[part] if s.name == "install" or re.search(args.only, s.name)]
            if part > 1 and not args.part:
                chosen = [s for s in chosen if s not in parts[1]]  # it is installed
            run(chosen, args.seconds, args.rehearse, environment, summary, lambda: pack(folders, out))
    finally:
        for name in pack(folders, out):
            summary.say(f"too large to come back: {name}")
        shutil.rmtree(work, ignore_errors=True)
        summary.say(f"{len(summary.names('ok'))} steps are ok, in {time.monotonic() - begin:.0f} s")
        for outcome in ("FAILED", "NOT RUN", "skipped"):
            if names := summary.names(outcome):
                summary.say(f"{outcome}: {', '.join(names)}")
    sys.exit(bool(summary.names("FAILED") + summary.names("NOT RUN")))


if __name__ == "__main__":
    main()
