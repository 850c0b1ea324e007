"""The backends and devices that the suite runs on, the emulator in the place of the CPU's kernels, hypothesis."""

import os

import pytest

# Before torch is imported: on a machine that does other work too, OpenMP's waiting threads would take its processors.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from cases import CUDA

import sea_kernels as sk
from sea_kernels.native import library

try:
    from hypothesis import HealthCheck, settings
except ImportError:  # test_everything_once.py needs pytest and torch alone; what uses hypothesis imports it and fails
    pass
else:
    # The backend fixture is the same for all examples of a test.
    common = {"deadline": None, "max_examples": 60, "suppress_health_check": [HealthCheck.function_scoped_fixture]}
    settings.register_profile("dev", **common)
    settings.register_profile("ci", **common, derandomize=True, print_blob=True)
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if "CI" in os.environ else "dev"))


BACKENDS = ("native", "reference")


def pytest_addoption(parser):
    parser.addoption(
        "--backend", choices=BACKENDS, help="only that one (default: both; native where the kernels are emulated)"
    )
    parser.addoption(
        "--emulate", type=int, metavar="ORDER", help="run the CUDA kernels on the CPU, threads in that order"
    )
    parser.addoption(
        "--emulate-with",
        choices=["races", "sanitize", "sm_80", "sm_90"],
        help="an option of load() in emulator/build.py; or the architecture whose PTX is run (tests/ptx)",
    )
    parser.addoption(
        "--emulate-dtypes",
        metavar="DTYPES",
        help="only the kernels for maps of these are compiled, such as bfloat16,float32: a fifth of the time",
    )


def pytest_configure(config):
    order = config.getoption("--emulate")
    if order is not None:
        from emulator import operators

        option, dtypes = config.getoption("--emulate-with"), config.getoption("--emulate-dtypes")
        ptx = option and option.startswith("sm_")
        options = {"architecture": int(option[3:])} if ptx else {option: True} if option else {}
        if dtypes:
            options["dtypes"] = dtypes.split(",")
        operators.install(**options).settings(seed=order)


def pytest_report_header(config):
    emulated = " CUDA kernels are emulated" if config.getoption("--emulate") is not None else ""
    return f"sea_kernels: {library.LIBRARY_ERROR or library.build_info()}{emulated}"


def pytest_generate_tests(metafunc):
    """Tests that take `backend` run once with each."""
    if "backend" in metafunc.fixturenames:
        config = metafunc.config
        emulated = "native" if config.getoption("--emulate") is not None else None
        chosen = config.getoption("--backend") or emulated
        metafunc.parametrize("backend", [chosen] if chosen else BACKENDS, indirect=True)


def pytest_runtest_logfinish():
    """A process whose CUDA context has failed would fail every test that follows: pytest-xdist starts another."""
    if CUDA and "PYTEST_XDIST_WORKER" in os.environ:
        try:
            torch.cuda.synchronize()
        except RuntimeError:  # it is said in the report of the test, which has been sent
            os._exit(1)


@pytest.fixture
def backend(request):
    """The name of the backend within which the test runs."""
    with sk.backend(request.param):
        yield request.param


@pytest.fixture(scope="session", params=["cpu", "cuda"] if CUDA else ["cpu"])
def device(request):
    return request.param
