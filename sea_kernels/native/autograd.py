"""The native backend: autograd functions around the operators.

Forward and backward are one operator each, for all levels and maps. There are no collectives in backward. Second
derivatives raise an error.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import group as ranks
from ..backends import ANCHOR, DISTANCE, Options
from ..boxes import RasterInput
from ..regions import Regions
from . import saved
from .library import require, run


def rasterizer(given: RasterInput, validate: bool) -> Callable[[Tensor | None], tuple]:
    require("rasterize", given.boxes.device)

    def rasterize(present: Tensor | None) -> tuple:
        if present is None:
            return *run("regions", *given, validate), None
        return *run("rasterize", *given, present), None

    return rasterize


def anchor_pool(features: list[Tensor], regions: Regions) -> Tensor:
    require("anchor_pool", features[0].device)
    if _in_func():
        return _AnchorPoolInFunc.apply(regions.tensors(), *features)
    if _needs_gradient(*features):
        return _AnchorPool.apply(regions.tensors(), *features)
    return run("anchor_pool", features, regions.tensors())


def anchor_cosine(features: list[Tensor], anchors: Tensor, regions: Regions) -> list[Tensor]:
    require("anchor_cosine", features[0].device)
    anchors = anchors.contiguous()
    if _in_func():
        return list(_AnchorCosineInFunc.apply(regions.tensors(), anchors, *features))
    if _needs_gradient(anchors, *features):
        return list(_AnchorCosine.apply(regions.tensors(), anchors, *features))
    return run("anchor_cosine", features, anchors, regions.tensors())


def losses(
    student: Sequence[list[Tensor]], teacher: Sequence[list[Tensor]], regions: Regions | None, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    maps: list[Tensor] = []
    for x in [x for s in student for x in s]:
        # torch.compile does not trace a Function that gets one tensor twice, as a map that is in both branches.
        maps.append(x.view_as(x) if any(x is y for y in maps) else x)
    require("sea_loss", maps[0].device)
    fixed = [x.detach() for t in teacher for x in t]
    tensors, group = ([], None) if regions is None else (regions.tensors(), regions.group)
    flags, temperatures = list(options.losses), (options.distance_temperature, options.localization_temperature)
    if _in_func():
        return _LossesInFunc.apply(flags, tensors, fixed, temperatures, options.detach_anchors, group, *maps)[:3]
    if _needs_gradient(*maps):
        return _Losses.apply(flags, tensors, fixed, temperatures, options.detach_anchors, group, *maps)
    return _run(maps, fixed, flags, tensors, temperatures, group, saved.Elements())[:3]


def _run(
    student: Sequence[Tensor],
    teacher: list[Tensor],
    flags: list[int],
    regions: list[Tensor],
    temperatures: tuple[float, float],
    group: ranks.Group | None,
    elements: saved.Elements,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """(anchor, distance, localization, saved): pool, sum over the ranks, compare."""
    if group is None or not any(x & (ANCHOR | DISTANCE) for x in flags):
        # Nothing to sum: pool and compare in one operator. On the CPU, two calls cost a tiny call 17% of its time, and
        # the default workload 1 to 2% of its forward, and more memory at 400 categories.
        return run("sea_loss", student, teacher, flags, regions, *temperatures, *elements)
    distance_temperature, localization_temperature = temperatures
    count = saved.anchor_elements(student, flags, regions[1].shape[1])
    anchors, localization, softmax = run(
        "sea_loss_pool", student, teacher, flags, regions, localization_temperature, count, elements.softmax
    )
    anchors = ranks.all_reduce(anchors, group)
    sizes = elements.saved, elements.gradients
    anchor, distance, own, gradients = run(
        "sea_loss_compare", student, teacher, flags, regions, anchors, distance_temperature, *sizes
    )
    if elements.gradients != 0:
        # Summed here and not in backward, so that a process which skips backward leaves nobody waiting.
        gradients = ranks.all_reduce(gradients, group)
    # CUDA's kernels save what they compute from the anchors. The CPU's may have to begin with the anchors again.
    again = [] if anchors.is_cuda else [anchors]
    return anchor, distance, localization, [own, gradients, softmax, *again]


class _Losses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        *losses, tensors = _run_for_backward(*inputs)
        _save_losses(ctx, inputs, tensors)
        return tuple(losses)

    @staticmethod
    def backward(ctx, *gradients):
        _refuse_second_derivative("sea_loss")
        return *[None] * 6, *_losses_backward(ctx)(*gradients, *_saved(ctx))


def _run_for_backward(flags, regions, teacher, temperatures, detach_anchors, group, *student):
    masks = regions[1].shape[1] if regions else 0
    elements = saved.elements(student, teacher, flags, masks, detach_anchors)
    return _run(student, teacher, flags, regions, temperatures, group, elements)


def _save_losses(ctx, inputs, tensors) -> None:
    flags, regions, teacher, temperatures, _, group, *student = inputs
    ctx.flags, ctx.temperatures, ctx.group = flags, temperatures, group
    ctx.count = len(student), len(regions)
    _save(ctx, *student, *teacher, *regions, *tensors)
    ctx.set_materialize_grads(False)


def _losses_backward(ctx) -> Callable[..., Sequence[Tensor]]:
    flags, temperatures, group, (maps, regions) = ctx.flags, ctx.temperatures, ctx.group, ctx.count

    def backward(anchor, distance, localization, *tensors):
        student, teacher, rest = tensors[:maps], tensors[maps : 2 * maps], tensors[2 * maps :]
        return run(
            "sea_loss_backward", ranks.gradient_of_all(anchor, group), distance, localization,
            student, teacher, flags, rest[:regions], rest[regions:], *temperatures,
        )  # fmt: skip

    return backward


class _AnchorPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, regions, *features):
        ctx.count = len(regions)
        _save(ctx, *regions, *features)
        return run("anchor_pool", features, regions)

    @staticmethod
    def backward(ctx, gradient):
        _refuse_second_derivative("anchor_pool")
        return None, *_anchor_pool_backward(ctx)(gradient, *_saved(ctx))


def _anchor_pool_backward(ctx) -> Callable[..., Sequence[Tensor]]:
    n = ctx.count
    return lambda gradient, *tensors: run("anchor_pool_backward", gradient.contiguous(), tensors[n:], tensors[:n])


class _AnchorCosine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, regions, anchors, *features):
        ctx.count = len(regions)
        _save(ctx, *regions, anchors, *features)
        return tuple(run("anchor_cosine", features, anchors, regions))

    @staticmethod
    def backward(ctx, *gradients):
        _refuse_second_derivative("anchor_cosine")
        return None, *_anchor_cosine_backward(ctx, len(gradients))(*gradients, *_saved(ctx))


def _anchor_cosine_backward(ctx, levels: int) -> Callable[..., Sequence[Tensor]]:
    n = levels + ctx.count

    def backward(*tensors):
        gradients, regions, (anchors, *features) = tensors[:levels], tensors[levels:n], tensors[n:]
        *out, of_anchors = run("anchor_cosine_backward", gradients, features, anchors, regions)
        return of_anchors, *out

    return backward


# ----------------------------------------------------------------------------------------------------------- torch.func
# It takes Functions with a setup_context alone, and always runs backward as if for a second derivative. Outside they
# would cost every call: apply() binds the arguments to forward's signature.


class _LossesInFunc(torch.autograd.Function):
    @staticmethod
    def forward(*inputs):
        *losses, tensors = _run_for_backward(*inputs)
        return *losses, *tensors

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(*output[3:])
        _save_losses(ctx, inputs, output[3:])

    @staticmethod
    def backward(ctx, anchor, distance, localization, *_):
        tensors = anchor, distance, localization, *_saved(ctx)
        return *[None] * 6, *_Once.apply("sea_loss", _losses_backward(ctx), *tensors)


class _AnchorPoolInFunc(torch.autograd.Function):
    @staticmethod
    def forward(regions, *features):
        return run("anchor_pool", features, regions)

    @staticmethod
    def setup_context(ctx, inputs, output):
        regions, *features = inputs
        ctx.count = len(regions)
        _save(ctx, *regions, *features)

    @staticmethod
    def backward(ctx, gradient):
        return None, *_Once.apply("anchor_pool", _anchor_pool_backward(ctx), gradient, *_saved(ctx))


class _AnchorCosineInFunc(torch.autograd.Function):
    @staticmethod
    def forward(regions, anchors, *features):
        return tuple(run("anchor_cosine", features, anchors, regions))

    @staticmethod
    def setup_context(ctx, inputs, output):
        regions, anchors, *features = inputs
        ctx.count = len(regions)
        _save(ctx, *regions, anchors, *features)

    @staticmethod
    def backward(ctx, *gradients):
        backward = _anchor_cosine_backward(ctx, len(gradients))
        return None, *_Once.apply("anchor_cosine", backward, *gradients, *_saved(ctx))


class _Once(torch.autograd.Function):
    """A backward that may be part of a graph, but refuses to be differentiated."""

    @staticmethod
    def forward(name, backward, *tensors):
        return tuple(backward(*tensors))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.name = inputs[0]

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(f"{ctx.name} has no second derivative: its gradient cannot be differentiated")


def _in_func() -> bool:
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def _refuse_second_derivative(name: str) -> None:
    # once_differentiable would silently drop this function's term under create_graph.
    if torch.is_grad_enabled():
        raise RuntimeError(f"{name} has no second derivative: its backward cannot run with create_graph=True")


def _needs_gradient(*tensors: Tensor) -> bool:
    # Without a gradient the operator is called as it is, and nothing is saved. Also, where no input needs a gradient,
    # torch.compile may call the forward of a Function with variable arguments without its ctx.
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _save(ctx, *tensors: Tensor) -> None:
    # save_for_backward refuses inference tensors, which the maps of a teacher often are: it cannot see them change.
    inference = [False if torch.compiler.is_compiling() else x.is_inference() for x in tensors]
    ctx.inference = [x if yes else None for x, yes in zip(tensors, inference)]
    ctx.save_for_backward(*[x for x, yes in zip(tensors, inference) if not yes])


def _saved(ctx) -> list[Tensor]:
    rest = iter(ctx.saved_tensors)
    return [next(rest) if x is None else x for x in ctx.inference]
