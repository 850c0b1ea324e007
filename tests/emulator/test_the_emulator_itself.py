"""The emulator that runs the CUDA kernels on the CPU: what is right comes out right, what is wrong is noticed."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from emulator import build

pytestmark = pytest.mark.skipif(bool(build.missing()), reason=build.missing())

SEEDS = [0, 1, 2, 3, 12345]


def load(**options):
    return build.load("selftest", ["selftest.cpp"], **options)


@pytest.fixture(scope="module")
def module():
    return load()


@pytest.fixture(params=SEEDS)
def emulated(module, request):
    module.settings(seed=request.param)
    yield module
    module.settings()


@pytest.fixture
def default(module):
    module.settings()
    module.launches()
    yield module
    module.settings()


def normal(*shape, dtype=np.float32):
    return np.random.default_rng(0).standard_normal(shape).astype(dtype)


# ------------------------------------------------------------------------------------------------------- barriers


def test_block_sum(emulated):
    x = normal(5, 256)
    np.testing.assert_allclose(emulated.block_sum(x, 256, False), x.sum(1), rtol=1e-5, atol=1e-5)


def test_a_missing_barrier_shows(emulated):
    assert np.isnan(emulated.block_sum(normal(5, 256), 256, True)).any()


# ------------------------------------------------------------------------------------------------------- copies

RIGHT, NO_WAIT, WAIT_TOO_WEAK, NO_BARRIER_AFTER_WAIT, NO_BARRIER_BEFORE_REUSE, NO_WAIT_AT_ALL = range(6)


@pytest.mark.parametrize("steps, threads", [(1, 32), (2, 128), (7, 128)])
def test_pipeline(emulated, steps, threads):
    x = np.rint(normal(steps, threads // 32, 32, 4) * 9)  # whole numbers: any order has the same sum
    sums = np.roll(x.sum((0, 1, 3)), -1)  # thread t sums what t + 1, t + 33, ... have copied
    np.testing.assert_array_equal(emulated.pipeline(x, threads, 16, RIGHT), np.tile(sums, threads // 32))


@pytest.mark.parametrize("valid", [0, 4, 7])
def test_bytes_that_are_not_valid_are_zero(emulated, valid):
    x = np.abs(normal(3, 4, 32, 4)) + 1
    x.view(np.uint8).reshape(3, 4, 32, 16)[..., valid:] = 0
    read = np.abs(normal(3, 4, 32, 4)) + 1
    np.testing.assert_allclose(
        emulated.pipeline(read, 128, valid, RIGHT), np.tile(np.roll(x.sum((0, 1, 3)), -1), 4), rtol=1e-6
    )


@pytest.mark.parametrize("mode", [NO_WAIT, WAIT_TOO_WEAK, NO_BARRIER_AFTER_WAIT, NO_BARRIER_BEFORE_REUSE])
def test_a_missing_wait_or_barrier_of_a_copy_shows(emulated, mode):
    assert np.isnan(emulated.pipeline(normal(7, 4, 32, 4), 128, 16, mode)).any()


def test_copies_that_nobody_waits_for(emulated):
    with pytest.raises(RuntimeError, match=r"kernel pipeline, .* exits while asynchronous copies are under way"):
        emulated.pipeline(normal(1, 4, 32, 4), 128, 16, NO_WAIT_AT_ALL)


# ------------------------------------------------------------------------------------------------------- warps


def products(a, b):
    """The emulator's: in float32, in order of k."""
    c = np.zeros((16, 16), np.float32)
    for k in range(16):
        c += a[:, k : k + 1].astype(np.float32) * b[k : k + 1].astype(np.float32)
    return c


@pytest.mark.parametrize("type", ["bfloat16", "half", "tf32"])
def test_product(emulated, type):
    a, b = (torch.randn(16, 16, generator=torch.Generator().manual_seed(i)) for i in range(2))
    if type == "tf32":  # the low 13 bits do not count
        a, b = ((x.view(torch.int32) & ~0x1FFF).view(torch.float32) for x in (a, b))
        given = [(x.view(torch.int32) | 0x0ABC).view(torch.float32).numpy() for x in (a, b)]
    else:
        a, b = (x.to(getattr(torch, type)) for x in (a, b))
        given = [x.view(torch.int16).numpy() for x in (a, b)]
    expected = products(a.float().numpy(), b.float().numpy())
    np.testing.assert_array_equal(emulated.product(type, *given), expected)


@pytest.mark.parametrize("width", [1, 2, 8, 32])
@pytest.mark.parametrize("by", [0, 1, 5, 8, 31, 32])
def test_shuffles(emulated, by, width):
    x = normal(32, dtype=np.float64)
    lane = np.arange(32)
    first = lane // width * width
    by %= 32
    up = np.where(lane - by >= first, lane - by, lane)
    down = np.where(lane + by < first + width, lane + by, lane)
    xor = np.where(lane ^ by < first + width, lane ^ by, lane)
    np.testing.assert_array_equal(emulated.shuffles(x, by, width), x[[first + by % width, up, down, xor]])


@pytest.mark.parametrize("low, high", [(0, 3), (1, 3), (0, 1)])
def test_votes(emulated, low, high):
    x = np.random.default_rng(0).integers(low, high, 64).astype(np.int32)
    warps = x.reshape(2, 32)
    bits = np.array([sum(int(v > 0) << i for i, v in enumerate(warp)) for warp in warps])
    odd = np.arange(64) % 2 == 1

    def of_warp(values):
        return np.repeat(values, 32)

    expected = [
        np.full(64, (x > 0).sum()),
        np.full(64, (x > 0).all()),
        np.full(64, (x > 0).any()),
        of_warp(bits),
        of_warp(bits != 0),
        of_warp(bits == 0xFFFFFFFF),
        of_warp(warps.sum(1)),
        of_warp(np.bitwise_or.reduce(warps, 1)),
        np.where(odd, of_warp(bits & 0xAAAAAAAA), -1),
        np.where(odd, x, of_warp(warps[:, ::2].sum(1))),
    ]
    np.testing.assert_array_equal(emulated.votes(x), np.array(expected).astype(np.uint32).view(np.int32))


# ------------------------------------------------------------------------------------------------------- order


def test_order_and_atomics(default):
    def turns(seed):
        default.settings(seed=seed)
        order, bins = default.order(3, 2, 2, 96, 0)
        assert sorted(order) == list(range(12 * 96))
        np.testing.assert_array_equal(bins, np.bincount(np.arange(12 * 96) % 7))
        return order.reshape(12, 3, 32)

    forward = turns(0)
    np.testing.assert_array_equal(forward.ravel(), np.arange(12 * 96))
    np.testing.assert_array_equal(turns(1).ravel(), np.arange(12 * 96)[::-1])
    shuffled = turns(2)
    np.testing.assert_array_equal(shuffled, turns(2))
    assert (shuffled != turns(3)).any()
    # blocks, the warps of a block and the lanes of a warp one after another, each of them shuffled
    for axes in ((1, 2), (2,), ()):
        first, last = shuffled.min(axes), shuffled.max(axes)
        assert (last - first == np.prod([shuffled.shape[a] for a in axes], dtype=int) - 1).all()
        assert (np.diff(first, axis=-1) < 0).any() and (np.diff(first, axis=-1) > 0).any()


def test_launches_are_counted(default):
    default.order(2, 1, 1, 32, 0)
    default.order(1, 1, 1, 32, 0)
    default.block_sum(normal(32), 32, False)
    assert default.launches() == {"order": 2, "block_sum": 1}
    assert default.launches() == {}


# ------------------------------------------------------------------------------------------------------- errors


def test_grids(default):
    default.order(1, 65535, 1, 1, 0)
    for grid in (1, 65536, 1), (1, 1, 65536), (1 << 31, 1, 1):
        with pytest.raises(RuntimeError, match=r"kernel order: grid .* is larger"):
            default.order(*grid, 32, 0)
    for threads in 1025, 0, -1:
        with pytest.raises(RuntimeError, match=f"kernel order: {threads} threads"):
            default.order(1, 1, 1, threads, 0)
    default.order(1, 1, 1, 32, 227 * 1024)
    with pytest.raises(RuntimeError, match="232449 bytes of shared memory; the limit is 232448"):
        default.order(1, 1, 1, 32, 227 * 1024 + 1)
    default.settings(shared_memory_limit=1000)
    with pytest.raises(RuntimeError, match="limit is 1000"):
        default.order(1, 1, 1, 32, 1001)
    assert default.launches() == {"order": 2}


def test_an_empty_grid(default):
    for grid in (0, 1, 1), (1, 0, 1), (1, 1, 0):
        default.settings()
        default.order(*grid, 32, 0)
        default.settings(empty_grid_is_error=True)
        with pytest.raises(RuntimeError, match="empty grid"):
            default.order(*grid, 32, 0)
    assert default.launches() == {}


ERRORS = {  # in the order of selftest.cpp's `Error`: the thread that is named (None: any), what is said of it
    "exit before a barrier": (63, r"divergent: it has exited, but thread 0 waits at __syncthreads \(.*:\d+\)"),
    "another barrier": (63, r"divergent: it waits at __syncthreads_or .* thread 0 waits at __syncthreads \("),
    "a barrier elsewhere": (32, r"divergent: it waits at __syncthreads \(.*thread 0 waits at __syncthreads \("),
    "exit before a shuffle": (32, r"divergent: it waits at __shfl_xor_sync .*mask 0xffffffff.* thread 63 has exited"),
    "another shuffle": (None, r"divergent: it waits at __shfl_up_sync .*thread 63 waits at __shfl_down_sync"),
    "half a warp at a barrier": (None, r"divergent: it waits at __syncwarp .* waits at __syncthreads"),
    "mask without the lane": (None, r"__shfl_xor_sync \(.*\): mask 0x7fffffff does not name the lane itself"),
    "lane out of the mask": (None, r"__shfl_sync \(.*\): reads lane 16, which mask 0x0000ffff does not name"),
    "part of a warp": (32, r"divergent: .* thread 50 does not exist"),
    "overrun": ("", r"writes outside of its 1024 bytes of shared memory, at byte 1024"),
    "underrun": ("", r"writes outside of its 1024 bytes of shared memory, at byte -4"),
    "misaligned vector": (63, r"misaligned address \(emulator/selftest.cpp:\d+\)"),
    "array bounds": (63, r"index out of bounds \(emulator/selftest.cpp:\d+\)"),
    "division by zero": (63, r"integer division by zero"),
    "shift": (63, r"shift out of bounds"),
    "conversion": (63, r"number beyond its new type \(emulator/selftest.cpp:\d+\)"),
    "misaligned copy": (63, r"copy_async<16> \(.*\): the shared address is not aligned"),
    "copy beyond its size": (63, r"copy_async<8> \(.*\): `valid` is"),
    "copy to global memory": (63, r"copy_async<4> \(.*\): the shared address is not in shared memory"),
    "misaligned row": (63, r"load_matrices \(.*\): the row is not aligned"),
    "row behind shared memory": (63, r"load_matrices \(.*\): the row is not in shared memory"),
    "unfinished copy": (63, "exits while asynchronous copies are under way"),
    "exception": (63, "thrown by the kernel"),
}


@pytest.mark.parametrize("error", ERRORS)
def test_errors(emulated, error):
    number = 1 + list(ERRORS).index(error)
    thread, text = ERRORS[error]
    thread = r", thread \d+" if thread is None else "" if thread == "" else f", thread {thread}"
    with pytest.raises(RuntimeError) as caught:
        emulated.wrong(number, 50 if error == "part of a warp" else 64)
    assert re.match(rf"emulator: kernel wrong, block \(0, 0, 0\){thread}: {text}", str(caught.value))
    np.testing.assert_array_equal(emulated.wrong(0, 64), np.ones(64))  # the next launch is as if nothing had been
    test_pipeline(emulated, 7, 128)


# ------------------------------------------------------------------------------------------------------- numbers


def test_conversions(default):
    tails = [0, 1, 0xFFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001, 0xFFFF]  # around the ties of all three types
    bits = (np.arange(1 << 16, dtype=np.uint32) << 16)[:, None] | np.array(tails, np.uint32)
    bits = np.concatenate([bits.ravel(), bits.ravel() ^ 0x2000, bits.ravel() >> 3, bits.ravel() >> 3 | 1 << 31])
    x = bits.view(np.float32)
    number = ~np.isnan(x)
    bfloat16, half, tf32, rest, from_bfloat16, from_half = default.convert(x)
    for given, type in (bfloat16, torch.bfloat16), (half, torch.float16):
        expected = torch.from_numpy(x).to(type).view(torch.int16).numpy().view(np.uint16)
        np.testing.assert_array_equal(given[number], expected[number])
        assert (given[~number] == 0x7FFF).all()
    for given, type in (from_bfloat16, torch.bfloat16), (from_half, torch.float16):
        expected = torch.arange(1 << 16).to(torch.int16).view(type).float().numpy()
        np.testing.assert_array_equal(given, expected)  # NaN equals NaN
        assert (np.signbit(given) == np.signbit(expected)).all()
    assert np.isnan(rest[~number]).all()
    near = number & np.isfinite(tf32) & (np.abs(x) >= 2.0**-126)
    assert (tf32[near].view(np.uint32) & 0x1FFF == 0).all()
    step = 2.0 ** (np.frexp(x[near].astype(np.float64))[1] - 11)
    error = np.abs(tf32[near].astype(np.float64)) - np.abs(x[near].astype(np.float64))
    assert (error <= step / 2).all() and (error > -step / 2).all()  # ties go away from zero
    assert (rest[near].view(np.uint32) & 0x1FFF == 0).all()
    normal = np.abs(x[near]) >= 2.0**-103  # so that the rest is one
    left = x[near].astype(np.float64) - tf32[near] - rest[near]
    assert (np.abs(left) <= 2.0**-11 * step)[normal].all()


# ------------------------------------------------------------------------------------------------------- building


def test_edits():
    with pytest.raises(build.BuildError, match="#error edited"):
        load(edits=[("map.h", "#pragma once", "#error edited")])
    for old in "no such text", "int64_t":
        with pytest.raises(build.BuildError, match=r"map\.h has \d+ times, not once"):
            load(edits=[("map.h", old, "")])


def test_two_builds_are_two_modules(module, with_races):
    assert module.__file__ != with_races.__file__
    module.settings(shared_memory_limit=0)
    with_races.sharing(0)
    with pytest.raises(RuntimeError, match="limit is 0"):
        module.sharing(0)
    module.settings()


def test_defines():
    with pytest.raises(build.BuildError, match="defined_here"):
        load(defines=["SumParams=defined_here;"])


def test_what_is_missing_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(build, "CACHE", tmp_path)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pybind11", None)
        with pytest.raises(build.BuildError, match="pip install pybind11"):
            load()
    with monkeypatch.context() as patch:
        patch.setenv("PATH", "")
        with pytest.raises(build.BuildError, match="apt-get install g\\+\\+"):
            load()
    gxx = tmp_path / "g++"
    gxx.write_text("#!/bin/sh\nexit 1\n")
    gxx.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(build.BuildError, match="apt-get install libboost-context-dev"):
        load()


# ------------------------------------------------------------------------------------------------------- races

RACES = {  # in the order of selftest.cpp's `Sharing`: what is said of each
    "no __syncwarp": r"byte \d+ of shared memory: a (read|write) at .*; by thread \d+ of block .* a (read|write)",
    "a vote for __syncwarp": r"byte \d+ of shared memory",
    "no atomic": r"global memory \(0x.*\): a read at selftest.cpp:\d+; by thread \d+ of block .* a write at selftest",
    "a plain read beside an atomic": r"global memory .* an atomic change at ",
    "blocks that overlap": r"global memory .* a write at .* a write at ",
    "a write after reads": r"byte \d+ of shared memory: a (read|write) at .* a (read|write) at ",
}


@pytest.fixture(scope="module")
def with_races():
    return load(races=True)


@pytest.mark.parametrize("seed", SEEDS)
def test_races(with_races, seed):
    with_races.settings(seed=seed)
    for number, text in enumerate(RACES.values(), start=1):
        with pytest.raises(RuntimeError, match=rf"kernel sharing, .*, thread \d+: race on {text}"):
            with_races.sharing(number)
        count, out = with_races.sharing(0)
        assert count == 128
        np.testing.assert_array_equal(out, np.tile(np.arange(64) ^ 1, 2))
    with pytest.raises(RuntimeError, match=r"kernel block_sum, .* race on byte"):
        with_races.block_sum(normal(5, 256), 256, True)
    for mode in NO_WAIT, WAIT_TOO_WEAK, NO_BARRIER_AFTER_WAIT, NO_BARRIER_BEFORE_REUSE:
        with pytest.raises(RuntimeError, match=r"kernel pipeline, .* race on byte"):
            with_races.pipeline(normal(7, 4, 32, 4), 128, 16, mode)
    # what is right has none
    test_block_sum(with_races)
    test_pipeline(with_races, 7, 128)
    test_votes(with_races, 0, 3)
    for type in "half", "tf32":
        test_product(with_races, type)
    with_races.order(3, 2, 2, 96, 0)


# ------------------------------------------------------------------------------------------------------- memory

SANITIZED = """
import sys
import numpy as np
from emulator import build

module = build.load("selftest", ["selftest.cpp"], sanitize=True)
x = np.ones((3, 4, 32, 4), np.float32)
for seed in range(3):
    module.settings(seed=seed)
    assert (module.pipeline(x, 128, 16, 0) == 3 * 4 * 4).all()
    assert (module.block_sum(x, 128, False) == 128).all()
    assert (module.product("tf32", x, x) == 16).all()
    for error in range(1, 24):
        if error not in (10, 11):  # outside of shared memory: AddressSanitizer ends the process
            try:
                module.wrong(error, 50 if error == 9 else 64)
            except RuntimeError:
                pass
            else:
                raise AssertionError(error)
        assert (module.wrong(0, 64) == 1).all()
print("until here all is well", flush=True)
module.{call}
"""


@pytest.mark.parametrize(
    "call, report",
    [
        ("wrong(10, 64)", "use-after-poison"),
        ("wrong(11, 64)", "use-after-poison"),
        ("product('tf32', x, x[0, 0, 0].copy())", "heap-buffer-overflow"),
        ("product('half', x, x[0, 0, 0].copy())", "copy_async<16> .* reads out of bounds"),
    ],
)
def test_address_sanitizer(call, report):
    done = subprocess.run(
        [sys.executable, "-c", SANITIZED.format(call=call)],
        cwd=Path(__file__).parents[1],
        env={**os.environ, **build.sanitizer_environment()},
        text=True,
        capture_output=True,
    )
    assert done.stdout == "until here all is well\n", done.stderr
    assert done.returncode != 0 and re.search(report, done.stderr)


def test_address_sanitizer_needs_its_runtime():
    with pytest.raises(build.BuildError, match="sanitizer_environment"):
        load(sanitize=True)
