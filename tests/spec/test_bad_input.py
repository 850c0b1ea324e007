"""Bad input to the native functions: a ValueError or TypeError that names the argument, before anything is computed.

The tables are those of the reference: both backends refuse the same with the same words.
"""

import math
from pathlib import Path

import programs
import pytest
import torch
from cases import make_maps, make_regions
from test_reference import BAD, BAD_MAPS, GOOD
from torch.utils._python_dispatch import TorchDispatchMode

import sea_kernels as sk
from sea_kernels import Regions, ops


class Operators(TorchDispatchMode):
    """Which of our operators are called."""

    def __init__(self):
        super().__init__()
        self.called = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "sea_kernels":
            self.called.append(function._schema.name)
        return function(*args, **(kwargs or {}))


def refuses(error, message, call, *arguments, entry=()):
    """`entry`: operators that may be called, because they are what checks."""
    with Operators() as operators, pytest.raises(error, match=message):
        call(*arguments)
    assert set(operators.called) <= set(entry)


def test_operators_are_seen():
    """Else the tests below would show nothing."""
    with Operators() as operators:
        regions = make_regions()
        sk.anchor_pool(make_maps(regions.level_shapes), regions)
    assert operators.called == ["sea_kernels::regions", "sea_kernels::rasterize", "sea_kernels::anchor_pool"] or (
        operators.called == ["sea_kernels::regions", "sea_kernels::anchor_pool"]
    )


@pytest.mark.parametrize(("base", "changes", "error", "message"), BAD, ids=[m for *_, m in BAD])
def test_bad_boxes(base, changes, error, message):
    assert Regions.from_boxes(**base).bits is not None
    refuses(error, message, lambda: Regions.from_boxes(**(base | changes)), entry=["sea_kernels::regions"])


@pytest.fixture(scope="module")
def regions():
    index = torch.zeros(0, dtype=torch.int64)
    return Regions.from_boxes(torch.zeros(0, 4), index, [(6, 8), (3, 4)], [8, 16], batch_index=index, batch_size=2)


@pytest.mark.parametrize(("student", "teacher", "error", "message"), BAD_MAPS, ids=[m for *_, m in BAD_MAPS])
def test_bad_maps(student, teacher, error, message, regions):
    for loss in (sk.anchor_loss, sk.topological_distance_loss, sk.localization_alignment_loss):
        refuses(error, message, loss, student, teacher, regions)
    for name, arguments in (("cls", (student, teacher, GOOD, GOOD)), ("box", (GOOD, GOOD, student, teacher))):
        named = message.replace("student", f"student_{name}").replace("teacher", f"teacher_{name}")
        refuses(error, named, sk.sea_loss, *arguments, regions)
    if teacher is GOOD and not (isinstance(student, list) and student and isinstance(student[0], list)):
        if "regions" not in message:
            named = message.replace("student", "features")
            refuses(error, named, sk.anchor_pool, student, regions)
            refuses(error, named, sk.anchor_cosine, student, torch.zeros(2, 1, 3), regions)


def test_sets_of_different_numbers_of_levels():
    maps = make_maps([(6, 8), (3, 4), (2, 2)])
    sets = [maps[:2], maps[2:]]
    message = r"student\[1\] has 1 levels; expected 2, as student\[0\]"
    refuses(ValueError, message, sk.localization_alignment_loss, sets, sets)


@pytest.mark.parametrize("bad", [None, 3, "regions", [GOOD]], ids=str)
def test_bad_regions(bad):
    message = r"regions is a .*; expected sea_kernels.Regions"
    for call in (sk.anchor_loss, sk.topological_distance_loss):
        refuses(TypeError, message, call, GOOD, GOOD, bad)
    refuses(TypeError, message, sk.sea_loss, GOOD, GOOD, GOOD, GOOD, bad)
    refuses(TypeError, message, sk.anchor_pool, GOOD, bad)
    refuses(TypeError, message, sk.anchor_cosine, GOOD, torch.zeros(2, 1, 3), bad)
    if bad is not None:
        refuses(TypeError, message, sk.localization_alignment_loss, GOOD, GOOD, bad)


def test_features_are_one_set(regions):
    refuses(TypeError, r"features\[0\] is a list; expected a tensor", sk.anchor_pool, [GOOD, GOOD], regions)
    refuses(TypeError, r"features\[0\] is a list", sk.anchor_cosine, [GOOD], torch.zeros(2, 1, 3), regions)


@pytest.mark.parametrize(
    ("value", "error"),
    [("1", TypeError), (None, TypeError), (True, TypeError), (torch.tensor(1.0), TypeError)]
    + [(v, ValueError) for v in (0, -1.0, math.nan, math.inf)],
    ids=str,
)
def test_bad_temperatures(value, error, regions):
    for loss in (sk.topological_distance_loss, sk.localization_alignment_loss):
        refuses(error, r"^temperature is .*; expected a (finite )?number", loss, GOOD, GOOD, regions, value)
    for name in ("distance_temperature", "localization_temperature"):
        call = lambda name=name: sk.sea_loss(GOOD, GOOD, GOOD, GOOD, regions, **{name: value})  # noqa: E731
        refuses(error, rf"^{name} is .*; expected", call)


@pytest.mark.parametrize(
    ("anchors", "error", "message"),
    [
        ([], TypeError, r"anchors is a list; expected a tensor \[L, P, C\]"),
        (torch.zeros(2, 1, 3).long(), TypeError, r"anchors has dtype torch.int64; expected float32"),
        (torch.zeros(2, 1, 3).to_sparse(), TypeError, r"anchors has layout torch.sparse_coo"),
        (torch.zeros(2, 1, 3, device="meta"), ValueError, r"anchors is on meta; expected cpu"),
        (torch.zeros(2, 1, 4), ValueError, r"anchors has shape \[2, 1, 4\]; expected \[L, P, C\] = \[2, 1, 3\]"),
        (torch.zeros(2, 3, 3), ValueError, r"anchors has shape \[2, 3, 3\]"),
        (torch.zeros(1, 1, 3), ValueError, r"anchors has shape \[1, 1, 3\]"),
        (torch.zeros(1, 3), ValueError, r"anchors has shape \[1, 3\]"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_bad_anchors(anchors, error, message, regions):
    refuses(error, message, sk.anchor_cosine, GOOD, anchors, regions)


# ---------------------------------------------------------------------------------- backend, variables of the process


def test_backend_is_set_within_its_context_alone():
    assert ops.current_backend() == "native"
    with sk.backend("reference"):
        assert ops.current_backend() == "reference"
        with sk.backend("native"):
            assert ops.current_backend() == "native"
        assert ops.current_backend() == "reference"
    with pytest.raises(KeyError), sk.backend("reference"):
        raise KeyError
    assert ops.current_backend() == "native"


@pytest.mark.parametrize("name", ["cuda", "", None, 3])
def test_bad_backend(name):
    with pytest.raises(ValueError, match=r"backend is .*; expected one of native, reference"), sk.backend(name):
        pass
    assert ops.current_backend() == "native"


USE = """
import torch, sea_kernels as sk
none = torch.zeros(0, dtype=torch.int64)
def use():
    regions = sk.Regions.from_boxes(torch.zeros(0, 4), none, [(2, 2)], [8], batch_index=none, batch_size=1)
    maps = [torch.ones(1, 3, 2, 2)]
    return regions, sk.anchor_loss(maps, [x + 1 for x in maps], regions).item()
"""


def python(code, **variables):
    return programs.run("-c", code, env=variables, cwd=Path(__file__).parent)


def test_backend_from_the_environment():
    code = USE + "regions, value = use(); print(regions.dense is not None, value, sk.ops.current_backend())"
    assert python(code, SEA_KERNELS_BACKEND="reference").stdout.split() == ["True", "1.0", "reference"]
    done = python("import sea_kernels", SEA_KERNELS_BACKEND="fast")
    assert done.returncode != 0
    assert "SEA_KERNELS_BACKEND is 'fast'; expected one of native, reference" in done.stderr.splitlines()[-1]


def test_wrong_instruction_set():
    """Nothing runs on another one silently; the reference still does."""
    code = (
        USE
        + """
try:
    use()
except RuntimeError as error:
    print(error)
with sk.backend("reference"):
    print(use()[1])
"""
    )
    done = python(code, SEA_KERNELS_CPU="sse9")
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert "SEA_KERNELS_CPU is 'sse9'; expected one of baseline" in first and 'backend("reference")' in first
    assert second == "1.0"


LOSSES = """
import sys
sys.path.insert(0, sys.argv[1] if len(sys.argv) > 1 else TESTS)
import torch, cases
regions = cases.make_regions()
for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
    for layout in ("contiguous", "channels_last", "every second"):
        inputs = cases.make_inputs(regions, 70, 19, dtype=dtype).layout(layout)
        outputs, gradients = cases.run("sea_loss, everything", inputs, regions)
        print(*[x.item() for x in outputs], *[x.double().norm().item() for x in gradients[:6]])
"""


@pytest.mark.parametrize("name", ops.build_info()["cpu_available"] if not ops.LIBRARY_ERROR else ["baseline"])
def test_instruction_sets_agree(name):
    """Each computes what the one in use here computes, to rounding."""
    code = LOSSES.replace("sys.argv[1] if len(sys.argv) > 1 else TESTS", repr(str(Path(__file__).parent)))
    done, here = python(code, SEA_KERNELS_CPU=name), python(code)
    assert done.returncode == 0, done.stderr
    values, wanted = (torch.tensor([float(x) for x in d.stdout.split()]) for d in (done, here))
    assert len(values) == 12 * 9
    torch.testing.assert_close(values, wanted, rtol=2e-3, atol=0)
    torch.testing.assert_close(values[:27], wanted[:27], rtol=2e-6, atol=0)


# ---------------------------------------------------------------------------------------------------------- other GPUs


@pytest.mark.parametrize(
    "built, capability, runs",
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
    assert ops._runs_on(built, capability) == runs


def test_a_gpu_without_code_is_named(monkeypatch):
    """One clear error on an older GPU, before any kernel runs."""
    monkeypatch.setattr(ops, "LIBRARY_ERROR", None)
    monkeypatch.setattr(ops, "has_kernel", lambda name, key: True)
    monkeypatch.setattr(ops, "build_info", lambda: {"architectures": ["8.0+PTX", "9.0"]})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Tesla T4")
    ops._lacks_code.cache_clear()
    try:
        with pytest.raises(RuntimeError, match=r"on cuda:0: Tesla T4 has compute capability 7\.5, .* 8\.0\+PTX 9\.0"):
            ops.require("sea_loss", torch.device("cuda:0"))
    finally:
        ops._lacks_code.cache_clear()
