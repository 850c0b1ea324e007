"""What count_work.py makes of counts: the table that is committed, and what fails."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.extend(str(Path(__file__).resolve().parents[2] / folder) for folder in ("benchmarks", "tests"))

import count_work
import first_look
from ptx import sass


def test_a_table_is_read_as_it_was_written(tmp_path, monkeypatch):
    """By first_look.py, and by --against."""
    kernels = {"pool": {"sass": 1234567.89, "largest over mean": 1.25, "tiles": 12, "ms": {"issue": 0.1}}}
    counted = {"about": {"workload": "W1"}, "device": "H200", "kernels": kernels, "lines": object()}
    monkeypatch.setattr(first_look, "HERE", tmp_path)
    monkeypatch.setenv("SEA_KERNELS_COMMIT", "abc")
    for date, factor in (("2026-01-02", 2), ("2026-01-01", 1)):
        kernels["pool"]["tiles"] = 12 * factor
        count_work.write(counted, tmp_path / "results" / f"counted-{date}")
    assert first_look.counted("W1") == {"pool": kernels["pool"] | {"sass": 1234570.0, "tiles": 24}}
    assert first_look.load(tmp_path / "results/counted-2026-01-01/W1.json")["commit"] == "abc"
    assert first_look.counted("W2") == {}


def test_a_kernel_that_grows_is_named():
    before = {"pool": {"sass": 1e6}, "distance": {"sass": 2e6}, "moments": {"sass": 1.0}}
    assert not list(count_work.growth({"pool": {"sass": 1.04e6}, "distance": {"sass": 1e6}}, before))
    assert list(count_work.growth({"pool": {"sass": 1.06e6}, "distance": {"sass": 2e6}}, before)) == [
        "pool executes 1,060,000 instructions, 6.0% more than the table says"
    ]
    assert list(count_work.growth({"new": {"sass": 5.0}}, before)) == [
        "new is not in the table; it executes 5 instructions"
    ]


def test_tiles_that_nothing_is_known_of_are_an_error():
    launches = [
        {"kernel": "_ZN3sea4poolIfEEv", "kinds": [[1, 2, 3, [4]]]},
        {"kernel": "_ZN3sea6finishIfEEv", "kinds": []},
    ]
    count_work.check_tiles(launches)
    with pytest.raises(SystemExit, match=r"the blocks of distance have is not known: tests/ptx/cuda/launch\.h"):
        count_work.check_tiles([*launches, {"kernel": "_ZN3sea8distanceIfEEv", "kinds": []}])


def test_a_trap_is_an_error():
    count_work.check_ptx({"_ZN3sea4poolIfEEv": "ret;  // no trap"})
    with pytest.raises(SystemExit, match="the PTX of pool has a trap"):
        count_work.check_ptx({"_ZN3sea4poolIfEEv": "@%p1 bra L;\n\ttrap;\n"})


def test_the_committed_table_has_the_kernels_of_a_step():
    kernels = first_look.counted("W1")  # what .ci/run compares with
    assert {"pool", "distance_few", "backward", "distance_backward_few"} <= set(kernels)
    assert all(kernels[name]["tiles"] > 0 for name in count_work.DEAL_OUT_TILES & set(kernels))


LOOP = """
//## File "k.cuh", line 1
/*0000*/ MOV R1, R2 ;
.L_x_0:
//## File "k.cuh", line 2
/*0010*/ {} ;
//## File "k.cuh", line 3
/*0020*/ @P1 LDS R3, [R4] ;
//## File "k.cuh", line 4
/*0030*/ @P1 LDS R5, [R4] ;
//## File "k.cuh", line 1
/*0040*/ @P0 BRA `(.L_x_0) ;
/*0050*/ EXIT ;
"""


@pytest.mark.parametrize(
    "machine, ptx, chain",
    [
        ("BAR.SYNC 0x0", "bar.sync 0;", (("k.cuh", 2),)),
        ("LDSM.16.M88.4 R8, [R4]", "ldmatrix.sync.aligned;", (("ptx.cuh", 9), ("k.cuh", 2))),
    ],
)
def test_a_loop_runs_as_often_in_machine_code_as_in_ptx(machine, ptx, chain):
    """Although its predicated loads were in branches that never ran, and though a line of the chain is missing."""
    code = sass.Code(LOOP.format(machine).split("\n"))
    lines = {1: (("k.cuh", 1),), 2: chain, 3: (("k.cuh", 3),), 4: (("k.cuh", 4),)}
    blocks = [
        [(1, "mov.u32 %r1, %r2;")],
        [(2, ptx)],
        [(3, "ld.shared.u32 %r3, [%r4];"), (4, "ld.shared.u32 %r5, [%r4];")],
    ]
    counts, quality = sass.fit(code, blocks, np.array([1.0, 50.0, 0.0]), lines, warps=1)
    assert counts.tolist() == pytest.approx([1, 50, 1])
    assert quality == {"off": pytest.approx(0), "unmatched": 0}


def test_help_is_printed(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["count_work.py", "--help"])
    with pytest.raises(SystemExit, match="0"):
        count_work.main()
    assert "over 5% more" in capsys.readouterr().out
