"""Puts the emulated CUDA operators in the place of the CPU's, so that every test of the operators runs them."""

from . import build

_installed = None


def install(**options):
    """Compiles csrc/cuda/ops (options: of build.load) and registers it for the CPU; returns the module."""
    global _installed
    uninstall()
    sources = ["operators.cpp", *sorted(build.CSRC.glob("cuda/ops/*.cu"))]
    _installed = build.load("operators", sources, **options)
    _installed.install()
    return _installed


def uninstall():
    """Gives the CPU its own operators back."""
    global _installed
    if _installed is not None:
        _installed.uninstall()
        _installed = None
