"""Hypothesis profiles; the devices that the suite runs on: the CPU, and a GPU where the build has kernels for it."""

import os

import pytest

# Before torch is imported: on a machine that does other work too, OpenMP's waiting threads would take its processors.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from cases import CUDA

from sea_kernels import ops

try:
    from hypothesis import settings
except ImportError:  # test_smoke.py needs pytest and torch alone; what uses hypothesis imports it and fails
    pass
else:
    settings.register_profile("dev", deadline=None, max_examples=60)
    settings.register_profile("ci", deadline=None, max_examples=60, derandomize=True, print_blob=True)
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if "CI" in os.environ else "dev"))


def pytest_addoption(parser):
    parser.addoption(
        "--emulate", type=int, metavar="ORDER", help="run the CUDA kernels on the CPU, threads in that order"
    )
    parser.addoption("--emulate-with", choices=["races", "sanitize"], help="an option of load() in emulator/build.py")


def pytest_configure(config):
    order = config.getoption("--emulate")
    if order is not None:
        from emulator import operators

        option = config.getoption("--emulate-with")
        operators.install(**({option: True} if option else {})).settings(seed=order)


def pytest_report_header(config):
    emulated = " CUDA kernels are emulated" if config.getoption("--emulate") is not None else ""
    return f"sea_kernels: {ops.LIBRARY_ERROR or ops.build_info()}{emulated}"


@pytest.fixture(scope="session", params=["cpu", "cuda"] if CUDA else ["cpu"])
def device(request):
    return request.param
