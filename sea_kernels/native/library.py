"""The compiled library: loading it, what was built into it, and which devices it has kernels for."""

import functools
import json
import os
import re
from pathlib import Path

import torch

from ..compiling import assume_constant_result
from . import schemas  # noqa: F401  the operators have to be defined when the library is loaded

if tuple(int(n) for n in re.match(r"(\d+)\.(\d+)", torch.__version__).groups()) < (2, 11):
    raise ImportError(f"sea_kernels needs torch >= 2.11, and torch {torch.__version__} is installed")


def library_path() -> Path | None:
    """Where the compiled library lies; None where there is none."""
    path = Path(__file__).parents[1] / "_C.so"
    return path if path.exists() else None


def build_info() -> dict:
    """What was built: the instruction sets `cpu`, `cpu_available` and `cpu_in_use`, `cuda`, and `architectures`.

    Raises:
        RuntimeError: the library was not built, or does not load. The message says why.

    Example:
        >>> import sea_kernels as sk
        >>> sk.build_info()["cpu_in_use"] in sk.build_info()["cpu"]
        True
    """
    if LIBRARY_ERROR:
        raise RuntimeError(LIBRARY_ERROR)
    return json.loads(torch.ops.sea_kernels.build_info())


@assume_constant_result
def has_kernel(name: str, key: str) -> bool:
    """Whether an operator is there for "CPU" or "CUDA"."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return has(f"sea_kernels::{name}", key) or has(f"sea_kernels::{name}", "CompositeExplicitAutograd")


def run(name: str, *arguments):
    """Runs an operator. If it cannot allocate memory, it raises torch.OutOfMemoryError, as torch's own operators do.

    The stable ABI cannot throw that type. In compiled code, which calls the operator without this function, the error
    is a RuntimeError with the same message.
    """
    operator = getattr(torch.ops.sea_kernels, name)
    if torch.compiler.is_compiling():
        return operator(*arguments)
    try:
        return operator(*arguments)
    except RuntimeError as error:
        if str(error).startswith("sea_kernels: cannot allocate"):
            raise torch.OutOfMemoryError(str(error)) from None
        raise


def _load() -> str | None:
    """Loads the library; the reason where that fails."""
    path = library_path()
    if path is None:
        return (
            "its library was not built (no sea_kernels/_C.so): run `pip install .` with a C++ compiler installed "
            "and start Python outside the source tree, or run `pip install -e .`"
        )
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"its library does not load ({error}): run `pip install --force-reinstall .` with this torch"
    info, wish = json.loads(torch.ops.sea_kernels.build_info()), os.environ.get("SEA_KERNELS_CPU")
    if wish and wish not in info["cpu_available"]:
        return f"SEA_KERNELS_CPU is {wish!r}; expected one of {', '.join(info['cpu_available'])}"
    return None


LIBRARY_ERROR = _load()


def _runs_on(architecture: str, capability: tuple[int, int]) -> bool:
    """Whether a GPU runs what was built for an architecture: machine code of its generation, or earlier PTX."""
    major, minor, kind, ptx = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", architecture).groups()
    built = int(major), int(minor)
    if kind == "a":
        return built == capability
    return built <= capability and (built[0] == capability[0] or (ptx is not None and not kind))


@functools.cache
def _lacks_code(index: int | None) -> str | None:
    if not torch.cuda.is_available():  # a fake tensor's device
        return None
    capability, built = torch.cuda.get_device_capability(index), build_info()["architectures"]
    if any(_runs_on(architecture, capability) for architecture in built):
        return None
    return (
        f"{torch.cuda.get_device_name(index)} has compute capability {capability[0]}.{capability[1]}, and this build "
        f"is for {' '.join(built)} (8.0 is the earliest; build with TORCH_CUDA_ARCH_LIST for a later one)"
    )


@assume_constant_result
def lacks_code(index: int | None) -> str | None:
    """Why the kernels of this build cannot run on a GPU; None if they can."""
    return None if LIBRARY_ERROR else _lacks_code(index)  # torch.compile must not see the cache


def require(name: str, device: torch.device) -> None:
    """Raises if an operator has no kernel for a device. There is no silent fallback."""
    reason = LIBRARY_ERROR
    if reason is None and device.type in ("cpu", "cuda") and has_kernel(name, device.type.upper()):
        reason = lacks_code(device.index) if device.type == "cuda" else None
        if reason is None:
            return
    reason = reason or f"this build has no {device.type} kernels (see `python -m sea_kernels`)"
    raise RuntimeError(
        f"sea_kernels cannot run {name} on {device}: {reason}. The same in plain PyTorch: "
        'with sea_kernels.backend("reference"), or SEA_KERNELS_BACKEND=reference'
    )
