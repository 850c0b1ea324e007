"""Which backend runs: within a context, from the environment, and never another one in silence."""

from pathlib import Path

import programs
import pytest

import sea_kernels as sk
from sea_kernels import backends


def test_backend_is_set_within_its_context_alone():
    assert backends.current_backend() == "native"
    with sk.backend("reference"):
        assert backends.current_backend() == "reference"
        with sk.backend("native"):
            assert backends.current_backend() == "native"
        assert backends.current_backend() == "reference"
    with pytest.raises(KeyError), sk.backend("reference"):
        raise KeyError
    assert backends.current_backend() == "native"


@pytest.mark.parametrize("name", ["cuda", "", None, 3])
def test_an_unknown_backend_is_refused(name):
    with pytest.raises(ValueError, match=r"backend is .*; expected one of native, reference"), sk.backend(name):
        pass
    assert backends.current_backend() == "native"


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


def test_the_environment_sets_the_backend():
    code = USE + "regions, value = use(); print(regions.dense is not None, value, sk.backends.current_backend())"
    assert python(code, SEA_KERNELS_BACKEND="reference").stdout.split() == ["True", "1.0", "reference"]
    done = python("import sea_kernels", SEA_KERNELS_BACKEND="fast")
    assert done.returncode != 0
    assert "SEA_KERNELS_BACKEND is 'fast'; expected one of native, reference" in done.stderr.splitlines()[-1]


def test_an_unknown_instruction_set_stops_the_kernels_and_not_the_reference():
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
