"""Puts the emulated CUDA operators in the place of the CPU's, so that every test of the operators runs them."""

from types import SimpleNamespace

from . import build

try:
    from sea_kernels.native import saved as _sizes

    _name = "elements"
except ImportError:
    from sea_kernels import ops as _sizes

    _name = "saved_elements"

_installed = None
_elements = getattr(_sizes, _name)


def _elements_on_cuda(student, teacher, *rest):
    """Sizes of what is saved: those of CUDA's kernels, although the maps lie on the CPU."""
    maps = [[SimpleNamespace(shape=x.shape, dtype=x.dtype, is_cuda=True) for x in side] for side in (student, teacher)]
    return _elements(*maps, *rest)


def install(sources=None, **options):
    """Compiles csrc/cuda/ops/*.cu and registers their operators for the CPU; returns the module.

    sources: the names of some of the files (default: all); other operators remain those of the CPU.
    options: of build.load
    """
    global _installed
    uninstall()
    files = sorted(build.CSRC.glob("cuda/ops/*.cu"))
    files = [file for file in files if sources is None or file.stem in sources]
    _installed = build.load("operators", files, plain=["operators.cpp"], **options)
    _installed.install()
    if any(file.stem == "losses" for file in files):
        setattr(_sizes, _name, _elements_on_cuda)
    return _installed


def uninstall():
    """Gives the CPU its own operators back."""
    global _installed
    if _installed is not None:
        _installed.uninstall()
        setattr(_sizes, _name, _elements)
        _installed = None
