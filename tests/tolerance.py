"""The tolerance rule: how far a result may be from float64, measured by how far plain PyTorch in the same dtype is."""

import torch

OUTPUT, GRADIENT = 2, 3  # times the error of plain PyTorch


def _double(x):
    return x.detach().to("cpu", torch.float64)


def _slack(dtype):
    """Of the largest value. Plain PyTorch in float64 has no error against itself: rounding is granted instead."""
    return (8 if dtype != torch.float64 else 1000) * torch.finfo(dtype).eps


def assert_close(actual, plain, exact, factor, what="", noise=0.0):
    """Tensors: the largest error is at most `factor` times that of `plain`, plus 8 eps of the largest value.

    `noise`: an absolute error that is granted too, where a value is the small difference of large ones.
    """
    assert (actual is None) == (plain is None) == (exact is None), what
    if exact is None:
        return
    assert actual.dtype == plain.dtype and actual.shape == exact.shape and actual.device == plain.device, what
    if actual.numel() == 0:
        return
    slack = _slack(actual.dtype)
    actual, plain, exact = _double(actual), _double(plain), _double(exact)
    assert actual.isfinite().all(), f"{what}: not finite"
    error, allowed = (actual - exact).abs().max().item(), (plain - exact).abs().max().item()
    bound = factor * allowed + slack * exact.abs().max().item() + noise
    assert error <= bound, f"{what}: error {error:.3e}, plain PyTorch has {allowed:.3e}, bound {bound:.3e}"


def assert_scalars_close(actual, plain, exact, what=""):
    """Lists of scalars, of one seed each: one by chance may be exact, so they are judged by root mean square."""
    slack = _slack(actual[0].dtype)
    assert all(a.dtype == p.dtype and a.shape == () for a, p in zip(actual, plain)), what
    actual, plain, exact = (torch.stack([_double(x) for x in xs]) for xs in (actual, plain, exact))
    error, allowed = ((x - exact).square().mean().sqrt().item() for x in (actual, plain))
    bound = OUTPUT * allowed + slack * exact.abs().max().item()
    assert error <= bound, f"{what}: error {error:.3e}, plain PyTorch has {allowed:.3e}, bound {bound:.3e}"


def assert_relative(actual, exact, limit, what=""):
    """Relative error in L2."""
    actual, exact = _double(actual), _double(exact)
    error, scale = (actual - exact).norm().item(), exact.norm().item()
    assert error <= limit * scale, f"{what}: relative error {error / max(scale, 1e-300):.3e}, limit {limit}"
