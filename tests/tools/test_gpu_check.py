"""What is planned for the first minutes on a GPU fits there; nothing that fails or hangs costs anything else."""

import gzip
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from itertools import pairwise
from pathlib import Path

import pytest
import test_benchmark

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
WORKLOADS = ("W1", "W2", "W3", "W4", "W5")


@pytest.fixture
def module(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.fixture
def check(module):
    return module("gpu_check")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name in ("logs", "results", "out"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def tool(folder, name, text):
    """A program of that name, first on a PATH."""
    file = folder / name
    file.write_text(f"#!/bin/bash\n{text}")
    file.chmod(0o755)
    return {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}


# ------------------------------------------------------------------------------------------------------------ the plan


def spans(check, steps):
    """(step, begin, end) of each step, where all take as long as they may."""
    return [(step, end - step.seconds, end) for step, end in zip(steps, check.ends(steps))]


@pytest.mark.parametrize("part", [1, 2, 3])
def test_a_part_fits_into_one_call(check, part):
    steps = check.plan()[part]
    planned = spans(check, steps)
    assert max(end for *_, end in planned) <= check.CALL <= 570
    assert all(begin <= later for (_, begin, _), (_, later, _) in pairwise(planned))
    for _, moment, _ in planned:
        now = [step for step, begin, end in planned if begin <= moment < end]
        assert sum(step.processes for step in now) <= 8, [step.name for step in now]
    assert all(step.seconds > 2 * check.GRACE and step.processes >= 1 for step in steps)
    assert len({step.name for step in steps}) == len(steps)
    for step in steps:
        for argument in map(str, step.command + step.rehearsal):
            assert not argument.startswith(str(BENCHMARKS.parent)) or Path(argument).exists()


def test_what_is_timed_runs_alone(check):
    steps = [step for steps in check.plan().values() for step in steps]
    timed = [step for step in steps if step.name.startswith(("bench_", "first_look", "profile", "large", "coco"))]
    assert {step.name for step in timed if step.name.startswith("bench_")} == {f"bench_{w}" for w in WORKLOADS}
    assert len(timed) == 15 and all(step.processes == check.AT_ONCE for step in timed)


def test_every_sanitizer_sees_every_call(check):
    found = {step.name: step.command[-1] for steps in check.plan().values() for step in steps if "check_" in step.name}
    assert found == {f"{t}_{k}": f"{k}/2" for t in ("memcheck", "racecheck", "initcheck", "synccheck") for k in (0, 1)}
    ports = [step.command[-2] for steps in check.plan().values() for step in steps if "check_" in step.name]
    assert len(set(ports)) == len(ports)


def test_the_largest_workloads_compile_alone(check, module):
    """And all arguments of the benchmark are such as it takes."""
    bench = module("bench_losses")
    compiled = {}
    for step in (step for steps in check.plan().values() for step in steps):
        if BENCHMARKS / "bench_losses.py" in step.command:
            args = bench.arguments([str(x) for x in step.command[2:]])
            assert args.device == "cuda"
            if not args.no_compile:
                compiled.setdefault(args.workload, []).append(step)
    assert sorted(compiled) == list(WORKLOADS)
    for workload in ("W3", "W4"):
        assert all(step.processes == check.AT_ONCE for step in compiled[workload])


@pytest.mark.parametrize(
    ("report", "status", "good"), [("0 errors", 0, True), ("1 error", 0, False), ("0 errors", 9, False)]
)
def test_a_sanitizer_that_reports_something_fails(check, folder, report, status, good):
    text = f'echo "$@"; echo "========= SUMMARY: {report}"; exit {status}'
    path = tool(folder, "compute-sanitizer", text)
    (step,) = [step for step in check.plan()[3] if step.name == "racecheck_1"]
    done = subprocess.run([str(x) for x in step.command], env=os.environ | path, capture_output=True, text=True)
    assert (done.returncode == 0) == good
    assert "--tool racecheck" in done.stdout and done.stdout.splitlines()[0].endswith("sanitize.py --share 1/2")


# ------------------------------------------------------------------------------------------------------------- running


def sh(check, name, text, seconds=60, processes=1, **options):
    return check.Step(name, seconds, processes, ("bash", "-c", text), **options)


def run(check, folder, *steps, seconds=60, rehearse=False):
    summary = check.Summary(folder / "out" / "summary.txt")
    check.run(steps, seconds, rehearse, dict(os.environ), summary, lambda: None)
    return summary


def test_a_step_that_fails_or_hangs_costs_no_other(check, folder, monkeypatch):
    monkeypatch.setattr(check, "GRACE", 5.0)  # a busy machine may need seconds to run the trap
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in the background of a shell
    summary = run(
        check,
        folder,
        sh(check, "broken", "echo so; exit 3"),
        sh(check, "hangs", "trap '' INT; sleep 60 & echo $! >child; wait; sleep 60", seconds=12),
        sh(check, "asked", "trap 'echo asked; exit 0' INT; while true; do sleep 0.01; done", seconds=12),
        sh(check, "shown", "echo one; echo two", 60, check.ALONE, shown=True),
    )
    signal.signal(signal.SIGINT, before)
    assert sorted(summary.names("FAILED")) == ["asked", "broken", "hangs"] and summary.names("ok") == ["shown"]
    text = (folder / "out" / "summary.txt").read_text()
    assert "broken: 0 s, exit status 3\nso\n" in text and "hangs: not done in" in text and text.endswith("one\ntwo\n")
    assert (folder / "logs" / "asked.log").read_text() == "asked\n"  # it could write what it knew
    left = Path("/proc", (folder / "child").read_text().strip(), "stat")  # of a dead one while nobody asks for it: Z
    assert not left.exists() or left.read_text().split()[2] == "Z"


@pytest.mark.parametrize("part", [1, 2, 3])
def test_no_more_run_at_once_than_are_allowed(check, folder, monkeypatch, part):
    """The real plan, with steps that end after they were asked a few times."""
    begun, live, most = [], [], []

    class Fake:
        def __init__(self, step, *_):
            self.step, self.left = step, 1 + len(step.name) % 5
            begun.append(step)
            live.append(step)
            most.append(sum(step.processes for step in live))

        def done(self):
            self.left -= 1
            return self.left == 0

        def report(self, summary):
            live.remove(self.step)

    monkeypatch.setattr(check, "Running", Fake)
    monkeypatch.setattr(check.time, "sleep", lambda seconds: None)
    steps = check.plan()[part]
    run(check, folder, *steps, seconds=check.CALL)
    assert begun == steps and max(most) == 8 and not live


def test_what_did_not_run_is_said(check, folder):
    steps = sh(check, "first", "true"), sh(check, "second", "true", rehearsal=("true",))
    assert run(check, folder, *steps, seconds=1).names("NOT RUN") == ["first", "second"]
    summary = run(check, folder, *steps, rehearse=True)
    assert summary.names("skipped") == ["first"] and summary.names("ok") == ["second"]


def test_reports_are_few_and_small(check, folder, monkeypatch):
    monkeypatch.setattr(check, "TAR_BYTES", 100_000)
    sizes = {"a": 60_000, "b": 60_000, "c": 60_000, "d": 60_000, "e": 61_000, "f": 200_000, "g": 10}
    contents = {name: os.urandom(size) for name, size in sizes.items()}
    for name, data in contents.items():
        (folder / "results" / name).write_bytes(data)
    left_out = check.pack([Path("logs"), Path("results")], folder / "out")
    assert [x.split(" ")[0] for x in left_out] == ["results/e", "results/f"]
    found, files = {}, sorted((folder / "out").iterdir())
    assert len(files) == check.TARS <= 7 and all(file.stat().st_size < 115_000 for file in files)
    for file in files:
        with tarfile.open(file) as tar:
            found |= {x.name: gzip.decompress(tar.extractfile(x).read()) for x in tar}
    assert found == {f"results/{name}.gz": contents[name] for name in "abcdg"}


def test_a_process_with_a_broken_context_is_replaced(monkeypatch, request):
    import torch

    conftest = request.config.pluginmanager.get_plugin(str(Path(__file__).parents[1] / "conftest.py"))

    def broken():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    monkeypatch.setattr(conftest, "CUDA", True)
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    conftest.pytest_runtest_logfinish()
    assert ended == []
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")
    conftest.pytest_runtest_logfinish()
    assert ended == [1]


# ------------------------------------------------------------------------------------------------------------- reports


def test_the_commit_is_the_one_that_was_told(module, monkeypatch):
    monkeypatch.setenv("SEA_KERNELS_COMMIT", "1234abcd")
    assert module("report").commit() == "1234abcd"


def test_ncu_is_asked_for_less_where_it_refuses(module, tmp_path, monkeypatch):
    (tmp_path / "table").write_text(test_benchmark.NCU)
    text = '[[ "$*" != *--import* ]] || exec cat {0}/table; echo "$@" >>{0}/calls; [[ "$*" != *--section* ]]'
    monkeypatch.setenv("PATH", tool(tmp_path, "ncu", text.format(tmp_path))["PATH"])
    profile, measure = module("profile_step"), module("measure")
    monkeypatch.setattr(measure, "rates", lambda *_: {"copy": 4e12})
    profile.main(["--workload", "W1", "--ncu", str(tmp_path)])
    full, least = (tmp_path / "calls").read_text().splitlines()
    assert "--section SpeedOfLight" in full and full.endswith("profile_step.py --workload W1")
    assert "--section" not in least and "dram__bytes_read.sum,dram__bytes_write.sum,smsp__inst_executed.sum" in least
    kernels = json.loads((tmp_path / "profile_W1.json").read_text())["kernels"]
    assert [k["name"] for k in kernels] == ["sea::pool<float>", "sea::loss"]


@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc")
@pytest.mark.parametrize("code", ["80", "90a"])
def test_the_rates_of_tensor_cores_compile(module, tmp_path, capfd, code):
    """Without a warning: ptxas says there where it makes products wait for each other."""
    assert module("first_look").build_mma_rate(code, tmp_path).exists()
    assert capfd.readouterr() == ("", "")


def test_one_table_has_what_was_measured_beside_what_was_counted(module, tmp_path, monkeypatch, capsys):
    look = module("first_look")
    counted = {"kernels": {"pool": {"sass": 6e6, "largest over mean": 2.5, "tiles": 1000}}}
    (tmp_path / "results/counted-2026-01-01").mkdir(parents=True)
    (tmp_path / "results/counted-2026-01-01/W2.json").write_text(json.dumps(counted))
    pool = {"name": "sea::pool<__nv_bfloat16>", "instructions": 7e6, "largest_over_mean": 2.25}
    finish = {"name": "sea::pool_finish<float>", "instructions": 1e9, "largest_over_mean": 9}
    (tmp_path / "profile_W2.json").write_text(json.dumps({"kernels": [pool, finish]}))
    operations = [{"name": "sea::pool<__nv_bfloat16>", "us": 1700.0}, {"name": "sea::pool_finish<float>", "us": 9.0}]
    looked = {
        "machine": {"device": "a card", "multiprocessors": 132, "cache_mib": 50.0},
        "rates": {"copy": 3e12},
        "W2": {"ms": 5.0, "graph_ms": 4.9, "copy_share": 0.41, "operations": operations},
        "failed": {"tensor": "no nvcc"},
    }
    (tmp_path / "first_look.json").write_text(json.dumps(looked))
    monkeypatch.setattr(look, "HERE", tmp_path)
    monkeypatch.setattr(sys, "argv", ["first_look.py", "--table", str(tmp_path)])
    look.main()
    out = capsys.readouterr().out
    cells = [[x.strip() for x in line.split("|")[1:-1]] for line in out.splitlines() if line.startswith("|")]
    table = {line[0]: line[1:] for line in cells}
    assert table["card"] == ["a card, 132 multiprocessors", "-"] and table["copy rate"] == ["3e+12 B/s", "-"]
    assert table["W2: step as a graph (of the copy rate)"] == ["4.9 ms (41%)", "-"]
    assert table["W2 pool: time"] == ["1700 us", "-"] and table["W1: step"] == ["-", "-"]
    assert table["W2 pool: largest multiprocessor (counted: block) over mean"] == ["2.25", "2.50"]
    assert table["W2 pool: warp instructions a tile"] == ["7,000", "6,000"]
    assert "tensor failed: no nvcc" in out and "of W1, W3, W4, W5" in out
