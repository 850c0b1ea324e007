"""The public functions: checks, then the backend, then the sum over the ranks where regions have a group.

Gradient flows to the student's maps (with `anchor_pool` and `anchor_cosine`, to all maps and anchors). None of them
synchronizes with the device. Second derivatives raise an error.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from . import checks
from .backends import ANCHOR, DISTANCE, LOCALIZATION, Backend, Options, on_current_backend
from .regions import Regions, check_anchors, check_fit

Maps = Sequence[Tensor] | Sequence[Sequence[Tensor]]


class SEALoss(NamedTuple):
    """The three losses of one step, unweighted scalars."""

    anchor: Tensor
    distance: Tensor
    localization: Tensor


@on_current_backend
def anchor_pool(backend: Backend, features: Sequence[Tensor], regions: Regions) -> Tensor:
    """Anchors: the mean of the features over each mask of each level, over the whole batch (SEA, arXiv 2203.00862).

    `a[l, p] = sum_u m_p(u) F_l(u) / area[l, p]`, zero where the area is zero.

    Args:
        features: L maps `[B, C, H_l, W_l]` of one C and one dtype (float32, float64, float16, bfloat16), with any
            strides. NCHW and channels_last are read without a copy.
        regions: the masks, of the same levels and batch. With a group, the mean is over the images of all its ranks.
            Forward then takes one all-reduce, and backward takes one for the anchors' gradient, which is the sum of the
            gradients of all ranks. All ranks must make the call and run backward.

    Returns:
        `[L, P, C]`, float32 (float64 for float64 maps). Gradient flows to the features.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape, dtype or device. On the first use of a group, on
            every rank: the ranks differ in channels or dtype.
        RuntimeError: there is no kernel for the device; a second derivative; a rank of the group failed, or did not
            arrive within its timeout.

    Example:
        >>> import sea_kernels as sk, torch
        >>> boxes, labels = [torch.tensor([[0.0, 0.0, 32.0, 32.0]])], [torch.tensor([7])]
        >>> regions = sk.Regions.from_boxes(boxes, labels, [(4, 6)], [8])
        >>> sk.anchor_pool([torch.ones(1, 16, 4, 6)], regions).shape  # levels, masks, channels
        torch.Size([1, 3, 16])
    """
    features = checks.maps("features", features)
    check_fit("regions", regions, "features", [features])
    if regions.group is not None:
        call = f"anchor_pool of the {backend.name} backend in {checks.compute_dtype(features)}"
        regions = regions._consistent(call, {"channels": features[0].shape[1]})
    return regions._sum(backend.anchor_pool(features, regions))


@on_current_backend
def anchor_cosine(backend: Backend, features: Sequence[Tensor], anchors: Tensor, regions: Regions) -> list[Tensor]:
    """Cosines between every pixel, valid or not, and every anchor of its level (SEA, arXiv 2203.00862).

    `cos(F_l(u), a[l, p])`. It is 0 for an empty anchor, and for a pixel or anchor of norm at most 1e-12, which then
    gets no gradient.

    Args:
        features: L maps `[B, C, H_l, W_l]`, as for :func:`anchor_pool`.
        anchors: `[L, P, C]`, any floating dtype.
        regions: the masks, which say which anchors are empty.

    Returns:
        L maps `[B, P, H_l, W_l]`, float32 (float64 if a map or the anchors are). Gradient flows to features and
        anchors.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape, dtype or device.
        RuntimeError: there is no kernel for the device; a second derivative.

    Example:
        >>> import sea_kernels as sk, torch
        >>> boxes, labels = [torch.tensor([[0.0, 0.0, 32.0, 32.0]])], [torch.tensor([7])]
        >>> regions = sk.Regions.from_boxes(boxes, labels, [(4, 6)], [8])
        >>> features = [torch.randn(1, 16, 4, 6)]
        >>> sk.anchor_cosine(features, sk.anchor_pool(features, regions), regions)[0].shape
        torch.Size([1, 3, 4, 6])
    """
    features = checks.maps("features", features)
    check_fit("regions", regions, "features", [features])
    check_anchors("anchors", anchors, regions, features)
    return backend.anchor_cosine(features, anchors.to(checks.compute_dtype(features, [anchors])), regions)


@on_current_backend
def anchor_loss(backend: Backend, student: Maps, teacher: Maps, regions: Regions) -> Tensor:
    """Anchor loss: squared difference between the anchors of student and teacher (SEA, arXiv 2203.00862).

    `sum_l mean_{p: area > 0} mean_c (aS - aT)^2`, summed over the sets of maps. A level without a valid pixel adds 0.

    Args:
        student, teacher: L maps `[B, C, H_l, W_l]`, or a list of M such lists (one for each convolution of a branch).
            Shapes must agree between the sides. C may differ from level to level and from list to list. Each side has
            one dtype of its own (float32, float64, float16, bfloat16).
        regions: the masks, of the same levels and batch.

    Returns:
        A scalar, float32 (float64 if any map is). Gradient flows to the student's maps, never to the teacher's.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape, dtype or device. On the first use of a group, on
            every rank: the ranks differ in channels, dtype or options.
        RuntimeError: there is no kernel for the device; a second derivative; a rank of the group failed, or did not
            arrive within its timeout.

    Example:
        >>> import sea_kernels as sk, torch
        >>> boxes, labels = [torch.tensor([[0.0, 0.0, 32.0, 32.0]])], [torch.tensor([7])]
        >>> regions = sk.Regions.from_boxes(boxes, labels, [(4, 6)], [8])
        >>> sk.anchor_loss([torch.ones(1, 16, 4, 6)], [torch.full((1, 16, 4, 6), 3.0)], regions)
        tensor(4.)
    """
    student, teacher = checks.pairs("student", student, "teacher", teacher)
    check_fit("regions", regions, "student", student)
    return _losses(backend, student, teacher, regions, Options((ANCHOR,) * len(student))).anchor


@on_current_backend
def topological_distance_loss(
    backend: Backend,
    student: Maps,
    teacher: Maps,
    regions: Regions,
    temperature: float = 0.1,
    detach_anchors: bool = False,
) -> Tensor:
    """Topological distance loss: divergence of the pixels' distances to the anchors (SEA, arXiv 2203.00862).

    With `q(u) = softmax_p(cos(F(u), a_p) / temperature)` over the non-empty anchors of the level, where the student's
    pixels use the student's anchors and the teacher's pixels the teacher's: `sum_l mean_u KL(qT(u) || qS(u))` over the
    valid pixels u.

    Args:
        student, teacher, regions: as for :func:`anchor_loss`.
        temperature: 1e-6 to 1e6. The default is ours.
        detach_anchors: cut the gradient that reaches the student through its own anchors.

    Returns:
        A scalar, float32 (float64 if any map is). Gradient flows to the student's maps, never to the teacher's.

    Raises:
        TypeError, ValueError, RuntimeError: in the cases of :func:`anchor_loss`; a temperature out of range.

    Example:
        >>> import sea_kernels as sk, torch
        >>> boxes, labels = [torch.tensor([[0.0, 0.0, 32.0, 32.0]])], [torch.tensor([7])]
        >>> regions = sk.Regions.from_boxes(boxes, labels, [(4, 6)], [8])
        >>> student, teacher = [torch.randn(1, 16, 4, 6, requires_grad=True)], [torch.randn(1, 16, 4, 6)]
        >>> sk.topological_distance_loss(student, teacher, regions).backward()
        >>> student[0].grad.shape
        torch.Size([1, 16, 4, 6])
    """
    student, teacher = checks.pairs("student", student, "teacher", teacher)
    check_fit("regions", regions, "student", student)
    temperature = checks.temperature("temperature", temperature)
    flags = (DISTANCE,) * len(student)
    options = Options(flags, distance_temperature=temperature, detach_anchors=detach_anchors)
    return _losses(backend, student, teacher, regions, options).distance


@on_current_backend
def localization_alignment_loss(
    backend: Backend, student: Maps, teacher: Maps, regions: Regions | None = None, temperature: float = 1.0
) -> Tensor:
    """Localization alignment loss: divergence of the spatial softmax of each channel (SEA, arXiv 2203.00862).

    With `p[b, c] = softmax(X[b, c] / temperature)` over the positions of a level:
    `sum_l temperature^2 / (B C) sum_{b,c} KL(pT || pS)`.

    Args:
        student, teacher: as for :func:`anchor_loss`.
        regions: if given, positions beyond an image's own size are left out of the softmax.
        temperature: 1e-6 to 1e6. The default is ours.

    Returns:
        A scalar, float32 (float64 if any map is). Gradient flows to the student's maps, never to the teacher's.

    Raises:
        TypeError, ValueError, RuntimeError: in the cases of :func:`anchor_loss`; a temperature out of range.

    Example:
        >>> import sea_kernels as sk, torch
        >>> student, teacher = [torch.randn(1, 16, 4, 6, requires_grad=True)], [torch.randn(1, 16, 4, 6)]
        >>> sk.localization_alignment_loss(student, teacher).backward()
        >>> student[0].grad.shape
        torch.Size([1, 16, 4, 6])
    """
    student, teacher = checks.pairs("student", student, "teacher", teacher)
    if regions is not None:
        check_fit("regions", regions, "student", student)
    temperature = checks.temperature("temperature", temperature)
    options = Options((LOCALIZATION,) * len(student), localization_temperature=temperature)
    return _losses(backend, student, teacher, regions, options).localization


@on_current_backend
def sea_loss(
    backend: Backend,
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
    """The three losses of SEA with the fewest passes over memory (arXiv 2203.00862).

    Classification maps take part in the anchor and the distance loss, box maps in the anchor and the localization loss
    (and in the distance loss with `distance_on_box`). The values are those of the single functions. `anchor` is the sum
    over both branches (over the classification maps alone without `anchor_on_box`).

    If the regions have a group, the anchors are those of the images of all its ranks, and all ranks must make this
    call. On each of `world` ranks, the anchor loss is that of the whole batch. The distance loss is
    `world / (valid pixels of all ranks)` times the sum over the rank's own pixels, and the localization loss
    `world T^2 / (images of all ranks C)` times the sum over its own images. The mean over the ranks is the loss of one
    process with the whole batch. A rank's backward gives the gradient of the sum of all ranks' losses with respect to
    its own maps. So if gradients are averaged over the ranks, as by DDP and FSDP, they are those of the whole batch.
    Forward takes two all-reduces: one for the anchors of all levels, maps and sides (without distances, the difference
    of the sides), and one for the gradient of the distance loss with respect to the student's anchors. Where C changes
    from level to level, it takes them for each run of levels without a change. Backward communicates nothing, but
    assumes that the gradients of the losses are the same on every rank. All this also holds for the single functions.

    Args:
        student_cls, teacher_cls, student_box, teacher_box: as for :func:`anchor_loss`. Each has one dtype of its own.
            Both sides of one branch may be empty lists; the losses of that branch are then 0.
        regions: the masks, of the same levels and batch. The localization loss uses them too. They may have a group.
        distance_temperature, localization_temperature: 1e-6 to 1e6. The defaults are ours.
        detach_anchors: cut the gradient of the distance loss that reaches the student through its own anchors.
        distance_on_box: box maps take part in the distance loss as well.
        anchor_on_box: box maps take part in the anchor loss.

    Returns:
        Three scalars `(anchor, distance, localization)`, unweighted; float32 (float64 if any map is). Gradient flows to
        the student's maps, never to the teacher's.

    Raises:
        TypeError, ValueError, RuntimeError: in the cases of :func:`anchor_loss`; a temperature out of range.

    Example:
        >>> import sea_kernels as sk, torch
        >>> boxes, labels = [torch.tensor([[0.0, 0.0, 32.0, 32.0]])], [torch.tensor([7])]
        >>> regions = sk.Regions.from_boxes(boxes, labels, [(4, 6)], [8])
        >>> student = [torch.randn(1, 16, 4, 6, requires_grad=True)]
        >>> teacher = [torch.randn(1, 16, 4, 6)]
        >>> losses = sk.sea_loss(student, teacher, student, teacher, regions)
        >>> sum(losses).backward()
        >>> losses._fields
        ('anchor', 'distance', 'localization')
    """
    cls_student, cls_teacher = checks.pairs("student_cls", student_cls, "teacher_cls", teacher_cls, optional=True)
    box_student, box_teacher = checks.pairs(
        "student_box", student_box, "teacher_box", teacher_box, optional=len(cls_student) > 0
    )
    check_fit("regions", regions, "student_cls", cls_student)
    check_fit("regions", regions, "student_box", box_student)
    on_box = LOCALIZATION | (ANCHOR if anchor_on_box else 0) | (DISTANCE if distance_on_box else 0)
    options = Options(
        (ANCHOR | DISTANCE,) * len(cls_student) + (on_box,) * len(box_student),
        checks.temperature("distance_temperature", distance_temperature),
        checks.temperature("localization_temperature", localization_temperature),
        detach_anchors,
    )
    return _losses(backend, cls_student + box_student, cls_teacher + box_teacher, regions, options)


def _losses(
    backend: Backend, student: list[list], teacher: list[list], regions: Regions | None, options: Options
) -> SEALoss:
    if regions is None or regions.group is None:
        return SEALoss(*_sum_of_runs(backend, student, teacher, regions, options))
    dtype = checks.compute_dtype(*student, *teacher)
    regions = regions._consistent(
        f"sea_loss of the {backend.name} backend with the loss flags {list(options.losses)} in {dtype}",
        {f"channels[{i}][{level}]": x.shape[1] for i, maps in enumerate(student) for level, x in enumerate(maps)}
        | {"detach_anchors": int(options.detach_anchors)},
        {name: getattr(options, name) for name in ("distance_temperature", "localization_temperature")},
    )
    anchor, distance, localization = _sum_of_runs(backend, student, teacher, regions, options)
    return SEALoss(anchor, *regions._share(distance, localization))


def _sum_of_runs(
    backend: Backend, student: list[list], teacher: list[list], regions: Regions | None, options: Options
) -> Sequence[Tensor]:
    """The backend's losses, which take levels of one C each set: summed over the runs of levels where no C changes."""
    levels = range(1, len(student[0]))
    cuts = [i for i in levels if any(maps[i].shape[1] != maps[i - 1].shape[1] for maps in student)]
    if not cuts:
        return backend.losses(student, teacher, regions, options)
    parts = []
    for start, stop in zip([0, *cuts], [*cuts, len(student[0])]):
        sides = ([maps[start:stop] for maps in side] for side in (student, teacher))
        parts.append(backend.losses(*sides, None if regions is None else regions._levels(start, stop), options))
    return [sum(losses[1:], losses[0]) for losses in zip(*parts)]
