"""Every instruction set of the CPU computes the same; which GPUs a build runs on."""

from pathlib import Path

import programs
import pytest
import tolerance
import torch
from cases import BF16, F16, F32, F64

from sea_kernels.native import library

PROGRAM = """
import sys, torch, cases
import sea_kernels as sk
results = {}
# Few categories and many channels: what backward needs is saved. Many and few: it is computed again. No whole vectors.
for number, channels in ((3, 70), (30, 21)):
    regions = cases.make_regions(number=number, num_classes=20)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for layout in ("contiguous", "channels_last", "every second"):
            inputs = cases.make_inputs(regions, channels, 19, dtype=dtype).layout(layout)
            for variant in cases.VARIANTS:
                outputs, gradients = cases.run(variant, inputs, regions)
                results[f"{variant}, {number} boxes, {layout}, {dtype}"] = outputs, gradients
    results[f"regions of {number} boxes"] = regions.tensors(), []
torch.save((sk.build_info()["cpu_in_use"], results), sys.argv[1])
"""
LIMIT = {F32: 2e-5, BF16: 2e-3, F16: 5e-4, F64: 1e-12}  # relative; 16-bit gradients are rounded to either side


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each instruction set of this machine computes, in a process of its own."""
    found = {}
    for name in library.build_info()["cpu_available"]:
        file = tmp_path_factory.mktemp(name) / "results"
        done = programs.run("-c", PROGRAM, str(file), env={"SEA_KERNELS_CPU": name}, cwd=Path(__file__).parents[1])
        assert done.returncode == 0, done.stderr
        in_use, found[name] = torch.load(file)
        assert in_use == name
    return found


@pytest.mark.cpu_kernels
@pytest.mark.skipif(bool(library.LIBRARY_ERROR), reason="no library")
def test_instruction_sets_agree(results):
    """Each is chosen by SEA_KERNELS_CPU and computes what the first does, to rounding."""
    first, *others = results
    for name in others:
        for what, (outputs, gradients) in results[name].items():
            wanted, wanted_gradients = results[first][what]
            for x, y in zip([*outputs, *gradients], [*wanted, *wanted_gradients]):
                assert (x is None) == (y is None), what
                if x is None or what.startswith("regions"):
                    assert x is y is None or torch.equal(x, y), f"{name}: {what}"
                else:
                    tolerance.assert_relative(x, y, LIMIT[x.dtype], f"{name}: {what}")


@pytest.mark.parametrize(
    ("built", "capability", "runs"),
    [
        ("8.0", (8, 0), True),
        ("8.0", (8, 6), True),
        ("8.0", (9, 0), False),
        ("8.0", (7, 5), False),
        ("8.6", (8, 0), False),
        ("8.0+PTX", (12, 1), True),
        ("8.0+PTX", (7, 5), False),
        ("9.0a", (9, 0), True),
        ("9.0a", (9, 1), False),
        ("10.0f", (10, 3), True),
        ("10.0f+PTX", (12, 0), False),
    ],
)
def test_which_gpus_an_architecture_runs_on(built, capability, runs):
    assert library._runs_on(built, capability) == runs


def test_a_gpu_without_code_is_named(monkeypatch):
    """One clear error on an older GPU, before any kernel runs."""
    monkeypatch.setattr(library, "LIBRARY_ERROR", None)
    monkeypatch.setattr(library, "has_kernel", lambda name, key: True)
    monkeypatch.setattr(library, "build_info", lambda: {"architectures": ["8.0+PTX", "9.0"]})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Tesla T4")
    library._lacks_code.cache_clear()
    try:
        with pytest.raises(RuntimeError, match=r"on cuda:0: Tesla T4 has compute capability 7\.5, .* 8\.0\+PTX 9\.0"):
            library.require("sea_loss", torch.device("cuda:0"))
    finally:
        library._lacks_code.cache_clear()
