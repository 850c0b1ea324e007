"""Puts the emulated CUDA operators in the place of the CPU's, so that every test of the operators runs them."""

from types import SimpleNamespace

from sea_kernels.native import saved

from . import build

_installed = None
_elements = saved.elements


def _elements_on_cuda(student, teacher, *rest):
    """Sizes of what is saved: those of CUDA's kernels, although the maps lie on the CPU."""
    maps = [[SimpleNamespace(shape=x.shape, dtype=x.dtype, is_cuda=True) for x in side] for side in (student, teacher)]
    return _elements(*maps, *rest)


def install(sources=None, architecture=None, **options):
    """Compiles csrc/cuda/ops/*.cu and registers their operators for the CPU; returns the module.

    sources: the names of some of the files (default: all); other operators remain those of the CPU.
    architecture: 80 or 90: the kernels are the PTX that nvcc makes of them for it (tests/ptx), not the emulator's
    options: of build.load, the emulator's or that of tests/ptx
    """
    global _installed
    uninstall()
    files = sorted(build.CSRC.glob("cuda/ops/*.cu"))
    files = [file for file in files if sources is None or file.stem in sources]
    if architecture:
        from ptx import build as ptx

        _installed = ptx.load(architecture, [file.stem for file in files], **options)
    else:
        _installed = build.load("operators", files, plain=["operators.cpp"], **options)
    _installed.install()
    if any(file.stem == "losses" for file in files):
        saved.elements = _elements_on_cuda
    return _installed


def uninstall():
    """Gives the CPU its own operators back."""
    global _installed
    if _installed is not None:
        _installed.uninstall()
        saved.elements = _elements
        _installed = None
