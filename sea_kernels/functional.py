"""The losses: checks, then one autograd function, then one operator.

Every function gives the gradient of the student's maps (`anchor_pool`, `anchor_cosine`: of all their inputs). None
synchronises with the device. Second derivatives are refused.
What regions of a group of processes change stands at :func:`sea_loss`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import checks, distributed, ops, reference
from .reference import SEALoss, localization_share
from .regions import Regions

Maps = Sequence[Tensor] | Sequence[Sequence[Tensor]]


def _refuse_second_derivative(name: str) -> None:
    # once_differentiable would silently drop this function's term under create_graph
    if torch.is_grad_enabled():
        raise RuntimeError(f"{name} has no second derivative: its backward cannot run with create_graph=True")


def _needs_gradient(*tensors: Tensor) -> bool:
    # Without one the operator is called as it is: nothing is saved; and torch.compile, where no input needs a gradient,
    # may call the forward of a Function with variable arguments without its ctx.
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _save(ctx, *tensors: Tensor) -> None:
    # save_for_backward refuses inference tensors, as the maps of a teacher often are: nobody can tell if they changed
    inference = [False if torch.compiler.is_compiling() else x.is_inference() for x in tensors]
    ctx.inference = [x if yes else None for x, yes in zip(tensors, inference)]
    ctx.save_for_backward(*[x for x, yes in zip(tensors, inference) if not yes])


def _saved(ctx) -> list[Tensor]:
    rest = iter(ctx.saved_tensors)
    return [next(rest) if x is None else x for x in ctx.inference]


class _AnchorPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, regions, *features):
        _save(ctx, *regions, *features)
        return torch.ops.sea_kernels.anchor_pool(features, regions)

    @staticmethod
    def backward(ctx, gradient):
        _refuse_second_derivative("anchor_pool")
        tensors = _saved(ctx)
        regions, features = tensors[:5], tensors[5:]
        return None, *torch.ops.sea_kernels.anchor_pool_backward(gradient.contiguous(), features, regions)


class _AnchorCosine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, regions, anchors, *features):
        _save(ctx, *regions, anchors, *features)
        return tuple(torch.ops.sea_kernels.anchor_cosine(features, anchors, regions))

    @staticmethod
    def backward(ctx, *gradients):
        _refuse_second_derivative("anchor_cosine")
        tensors = _saved(ctx)
        regions, anchors, features = tensors[:5], tensors[5], tensors[6:]
        out = torch.ops.sea_kernels.anchor_cosine_backward(gradients, features, anchors, regions)
        return None, out[-1], *out[:-1]


def _sea_loss(student, teacher, losses, regions, temperatures, group, saved=(0, 0, 0)):
    """(anchor, distance, localization, saved) of the operators; with a group the anchors are those of all its ranks."""
    if group is None or not any(flags & (ops.ANCHOR | ops.DISTANCE) for flags in losses):
        return torch.ops.sea_kernels.sea_loss(student, teacher, losses, regions, *temperatures, *saved)
    saved_elements, gradient_elements, softmax_elements = saved
    distance_temperature, localization_temperature = temperatures
    pool, compare = torch.ops.sea_kernels.sea_loss_pool, torch.ops.sea_kernels.sea_loss_compare
    # What a process pools is divided by the area of all: the sum is the mean.
    sizes = ops.anchor_elements(student, losses, regions[1].shape[1]), softmax_elements
    anchors, localization, softmax = pool(student, teacher, losses, regions, localization_temperature, *sizes)
    anchors = distributed.all_reduce(anchors, group)
    sizes = saved_elements, gradient_elements
    anchor, distance, saved, gradients = compare(
        student, teacher, losses, regions, anchors, distance_temperature, *sizes
    )
    if gradient_elements:
        # Here, not in backward: a process that skips backward leaves nobody waiting.
        gradients = distributed.all_reduce(gradients, group)
    # CUDA's kernels save what they make of the anchors, the CPU's may have to begin with them again.
    again = [] if anchors.is_cuda else [anchors]
    return anchor, distance, localization, [saved, gradients, softmax, *again]


class _SEALoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, losses, regions, teacher, temperatures, detach_anchors, group, *student):
        masks = regions[1].shape[1] if regions else 0
        sizes = ops.saved_elements(student, teacher, losses, masks, detach_anchors)
        *values, saved = _sea_loss(student, teacher, losses, regions, temperatures, group, sizes)
        ctx.losses, ctx.temperatures, ctx.group = losses, temperatures, group
        ctx.count = len(student), len(regions)
        _save(ctx, *student, *teacher, *regions, *saved)
        ctx.set_materialize_grads(False)
        return tuple(values)

    @staticmethod
    def backward(ctx, anchor, distance, localization):
        _refuse_second_derivative("sea_loss")
        if ctx.group is not None and anchor is not None:
            anchor = anchor * ctx.group.size  # every rank has the whole loss, which their sum counts so often
        maps, regions = ctx.count
        tensors = _saved(ctx)
        student, teacher = tensors[:maps], tensors[maps : 2 * maps]
        gradients = torch.ops.sea_kernels.sea_loss_backward(
            anchor, distance, localization, student, teacher, ctx.losses,
            tensors[2 * maps : 2 * maps + regions], tensors[2 * maps + regions :], *ctx.temperatures,
        )  # fmt: skip
        return None, None, None, None, None, None, *gradients


def _losses(
    sets: list, regions: Regions | None, distance_temperature=0.1, localization_temperature=1.0, detach_anchors=False
) -> SEALoss:
    """sets: (student, teacher, loss flags) of every set of maps."""
    student = []
    for x in [x for maps, _, _ in sets for x in maps]:
        # torch.compile does not trace a Function that is given one tensor twice, as of a map in both branches
        student.append(x.view_as(x) if any(x is y for y in student) else x)
    teacher = [x.detach() for _, maps, _ in sets for x in maps]
    ops.require("sea_loss", student[0].device)
    flags, temperatures = [flags for _, _, flags in sets], (distance_temperature, localization_temperature)
    tensors = regions.tensors() if regions is not None else []
    group = regions.group if regions is not None else None
    if group is not None:
        tensors[2] = tensors[2] + distributed.compare(  # counted: nothing is sent before
            group, tensors[2], f"sea_loss of the losses {flags} in {checks.compute_dtype(student, teacher)}",
            {f"channels[{i}]": maps[0].shape[1] for i, (maps, _, _) in enumerate(sets)}
            | {"detach_anchors": int(detach_anchors)},
            {"distance_temperature": distance_temperature, "localization_temperature": localization_temperature},
        )  # fmt: skip
    if _needs_gradient(*student):
        losses = _SEALoss.apply(flags, tensors, teacher, temperatures, detach_anchors, group, *student)
    else:
        losses = _sea_loss(student, teacher, flags, tensors, temperatures, group)[:3]
    if group is None:
        return SEALoss(*losses)
    # The mean of all ranks' losses is that of one process with the whole batch; what a rank's backward gives is the
    # gradient of their sum.
    anchor, distance, localization = losses
    share = localization_share(regions, localization.dtype)
    return SEALoss(anchor, distance * group.size, localization * share)


def _pairs(student_name: str, student: Maps, teacher_name: str, teacher: Maps) -> list[tuple[list, list]]:
    """The checked sets of maps: (student's, teacher's) of each."""
    student, teacher = checks.pyramid(student_name, student), checks.pyramid(teacher_name, teacher)
    checks.match(student_name, student, teacher_name, teacher)
    return list(zip(student, teacher))


def anchor_pool(features: Sequence[Tensor], regions: Regions) -> Tensor:
    """Anchors: the mean of the features over every mask of every level, over the whole batch (SEA, arXiv 2203.00862).

    `a[l, p] = sum_u m_p(u) F_l(u) / area[l, p]`, zero where the area is zero.

    Args:
        features: L maps `[B, C, H_l, W_l]` of one dtype (float32, float64, float16, bfloat16), any strides; NCHW and
            channels_last are read as they lie.
        regions: the masks, of the same levels and batch. With a group the mean is over the images of all its ranks:
            one all-reduce, and one more in backward, of the gradient of the anchors, so that it is that of the sum of
            what all ranks make of them. All ranks must call it, and run backward.

    Returns:
        `[L, P, C]`, float32 (float64 for float64 maps). Gradient flows to the features.

    Raises:
        TypeError, ValueError: an argument of wrong type, shape, dtype or device. On every rank of a group, when it is
            first used: other channels or another dtype on some rank.
        RuntimeError: no kernel for the device; a second derivative; a rank of the group failed, or did not come within
            its timeout.
    """
    if ops.current_backend() == "reference":
        return reference.anchor_pool(features, regions)
    features = checks.maps("features", features)
    checks.regions("regions", regions, "features", [features])
    ops.require("anchor_pool", features[0].device)
    tensors = regions.tensors()
    if regions.group is not None:
        call = f"anchor_pool in {checks.compute_dtype(features)}"
        tensors[2] = tensors[2] + distributed.compare(
            regions.group, tensors[2], call, {"channels": features[0].shape[1]}
        )
    if _needs_gradient(*features):
        own = _AnchorPool.apply(tensors, *features)
    else:
        own = torch.ops.sea_kernels.anchor_pool(features, tensors)
    # What a process pools is divided by the area of all: the sum is the mean.
    return distributed.differentiable_sum(own, regions.group)


def anchor_cosine(features: Sequence[Tensor], anchors: Tensor, regions: Regions) -> list[Tensor]:
    """Cosines between every pixel, counted or not, and every anchor of its level (SEA, arXiv 2203.00862).

    `cos(F_l(u), a[l, p])`; 0 for an empty anchor, and for a pixel or anchor of norm at most 1e-12, which then gets no
    gradient.

    Args:
        features: L maps `[B, C, H_l, W_l]`, as for :func:`anchor_pool`.
        anchors: `[L, P, C]`, any floating dtype.
        regions: says which anchors are empty.

    Returns:
        L maps `[B, P, H_l, W_l]`, float32 (float64 if a map or the anchors are). Gradient flows to features and
        anchors.

    Raises:
        As :func:`anchor_pool`.
    """
    if ops.current_backend() == "reference":
        return reference.anchor_cosine(features, anchors, regions)
    features = checks.maps("features", features)
    checks.regions("regions", regions, "features", [features])
    checks.anchors("anchors", anchors, regions, features)
    ops.require("anchor_cosine", features[0].device)
    anchors = anchors.to(checks.compute_dtype(features, [anchors])).contiguous()
    if not _needs_gradient(anchors, *features):
        return torch.ops.sea_kernels.anchor_cosine(features, anchors, regions.tensors())
    return list(_AnchorCosine.apply(regions.tensors(), anchors, *features))


def anchor_loss(student: Maps, teacher: Maps, regions: Regions) -> Tensor:
    """Anchor loss: squared difference of student's and teacher's anchors (SEA, arXiv 2203.00862).

    `sum_l mean_{p: area > 0} mean_c (aS - aT)^2`, summed over the sets of maps. A level without a counted pixel adds 0.

    Args:
        student, teacher: L maps `[B, C, H_l, W_l]`, or a list of M such lists (one for each convolution of a branch).
            Shapes must agree; each side has one dtype of its own (float32, float64, float16, bfloat16).
        regions: the masks, of the same levels and batch.

    Returns:
        A scalar, float32 (float64 if any map is). Gradient flows to the student's maps, never to the teacher's.

    Raises:
        As :func:`anchor_pool`.
    """
    if ops.current_backend() == "reference":
        return reference.anchor_loss(student, teacher, regions)
    pairs = _pairs("student", student, "teacher", teacher)
    checks.regions("regions", regions, "student", [s for s, _ in pairs])
    return _losses([(s, t, ops.ANCHOR) for s, t in pairs], regions).anchor


def topological_distance_loss(
    student: Maps, teacher: Maps, regions: Regions, temperature: float = 0.1, detach_anchors: bool = False
) -> Tensor:
    """Topological distance loss: divergence of the pixels' distances to the anchors (SEA, arXiv 2203.00862).

    With `q(u) = softmax_p(cos(F(u), a_p) / temperature)` over the non-empty anchors of the level, the student's with
    its own anchors and the teacher's with the teacher's: `sum_l mean_u KL(qT(u) || qS(u))` over the counted pixels.

    Args:
        student, teacher, regions: as for :func:`anchor_loss`.
        temperature: 1e-6 to 1e6; the default is ours.
        detach_anchors: cut the gradient that reaches the student through its own anchors.

    Returns, Raises:
        As :func:`anchor_loss`.
    """
    if ops.current_backend() == "reference":
        return reference.topological_distance_loss(student, teacher, regions, temperature, detach_anchors)
    pairs = _pairs("student", student, "teacher", teacher)
    checks.regions("regions", regions, "student", [s for s, _ in pairs])
    temperature = checks.temperature("temperature", temperature)
    sets = [(s, t, ops.DISTANCE) for s, t in pairs]
    return _losses(sets, regions, distance_temperature=temperature, detach_anchors=detach_anchors).distance


def localization_alignment_loss(
    student: Maps, teacher: Maps, regions: Regions | None = None, temperature: float = 1.0
) -> Tensor:
    """Localisation alignment loss: divergence of the spatial softmax of every channel (SEA, arXiv 2203.00862).

    With `p[b, c] = softmax(X[b, c] / temperature)` over the positions:
    `sum_l temperature^2 / (B C) sum_{b,c} KL(pT || pS)`.

    Args:
        student, teacher: as for :func:`anchor_loss`.
        regions: given, positions beyond an image's own size are left out of the softmax.
        temperature: 1e-6 to 1e6; the default is ours.

    Returns, Raises:
        As :func:`anchor_loss`.
    """
    if ops.current_backend() == "reference":
        return reference.localization_alignment_loss(student, teacher, regions, temperature)
    pairs = _pairs("student", student, "teacher", teacher)
    if regions is not None:
        checks.regions("regions", regions, "student", [s for s, _ in pairs])
    temperature = checks.temperature("temperature", temperature)
    sets = [(s, t, ops.LOCALIZATION) for s, t in pairs]
    return _losses(sets, regions, localization_temperature=temperature).localization


def sea_loss(
    student_cls: Maps,
    teacher_cls: Maps,
    student_box: Maps,
    teacher_box: Maps,
    regions: Regions,
    distance_temperature: float = 0.1,
    localization_temperature: float = 1.0,
    detach_anchors: bool = False,
    distance_on_box: bool = False,
    anchor_on_box: bool = True,
) -> SEALoss:
    """The three losses of SEA from the fewest passes over memory (arXiv 2203.00862).

    Classification maps take part in the anchor and the distance loss, box maps in the anchor and the localisation loss
    (and in the distance loss with `distance_on_box`). The values are those of the single functions, `anchor` being the
    sum over both branches (over the classification maps alone without `anchor_on_box`).

    With regions of a group the anchors are those of the images of all its ranks, all of which must make this call. On
    each of `world` ranks the anchor loss is that of the whole batch, the distance loss `world / (counted pixels of all
    ranks)` times the sum over its own pixels, the localisation loss `world T^2 / (images of all ranks C)` times the sum
    over its own images: their mean over the ranks is the loss of one process with the whole batch. A rank's backward
    gives the gradient of the sum of all ranks' losses with respect to its own maps, so that gradients which are
    averaged over the ranks, as by DDP and FSDP, are those of the whole batch. Communicated, both times in forward, are
    the anchors of all levels, maps and sides (without distances, the difference of the sides) in one all-reduce, and
    the distances' gradient of the student's in another; backward takes the gradients that reach the losses to be the
    same on every rank. The same goes for the single functions.

    Args:
        student_cls, teacher_cls, student_box, teacher_box: as for :func:`anchor_loss`; each has one dtype of its own.
        regions: the masks, of the same levels and batch; also handed to the localisation loss. They may have a group.
        distance_temperature, localization_temperature: 1e-6 to 1e6; the defaults are ours.
        detach_anchors: cut the distance loss's gradient that reaches the student through its own anchors.
        distance_on_box: box maps take part in the distance loss as well.
        anchor_on_box: box maps take part in the anchor loss.

    Returns:
        Three scalars `(anchor, distance, localization)`, unweighted; float32 (float64 if any map is). Gradient flows to
        the student's maps, never to the teacher's.

    Raises:
        As :func:`anchor_pool`.
    """
    if ops.current_backend() == "reference":
        return reference.sea_loss(
            student_cls, teacher_cls, student_box, teacher_box, regions,
            distance_temperature, localization_temperature, detach_anchors, distance_on_box, anchor_on_box,
        )  # fmt: skip
    cls = _pairs("student_cls", student_cls, "teacher_cls", teacher_cls)
    box = _pairs("student_box", student_box, "teacher_box", teacher_box)
    checks.regions("regions", regions, "student_cls", [s for s, _ in cls])
    checks.regions("regions", regions, "student_box", [s for s, _ in box])
    box_flags = ops.LOCALIZATION | (ops.ANCHOR if anchor_on_box else 0) | (ops.DISTANCE if distance_on_box else 0)
    sets = [(s, t, ops.ANCHOR | ops.DISTANCE) for s, t in cls] + [(s, t, box_flags) for s, t in box]
    return _losses(
        sets,
        regions,
        checks.temperature("distance_temperature", distance_temperature),
        checks.temperature("localization_temperature", localization_temperature),
        detach_anchors,
    )
