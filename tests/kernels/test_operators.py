"""Every operator by torch.library.opcheck: its schema, its fake, its way through autograd and torch.compile."""

import pytest
import torch
from cases import BF16, F16, F32, F64, make_boxes, make_inputs, make_maps, make_regions

from sea_kernels import backends
from sea_kernels.native import library, schemas
from sea_kernels.native import saved as sizes_of_saved

SHAPES = [(10, 14), (5, 7)]

REGIONS = {
    "boxes": lambda device: make_regions(device, 4),
    "no box": lambda device: make_regions(device, 0),
    "one box": lambda device: make_regions(device, 1, levels=1, num_classes=1),
    "many": lambda device: make_regions(device, 40, levels=2, num_classes=80),
}


def opcheck(name, *arguments, compiled=True):
    """compiled=False: not through torch.compile, which compares values: a part of some results is never written."""
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    operator = getattr(torch.ops.sea_kernels, name).default
    torch.library.opcheck(operator, arguments, test_utils=tests[: None if compiled else 3])


def region_arguments(device, number, listed, dtype=F32):
    boxes, labels, index = (x.to(device) for x in make_boxes(number, dtype=dtype))
    rows = (boxes, labels, None, [number, 0]) if listed else (boxes, labels, index, [])
    ignore = (boxes[:1], None, [1 if number else 0, 0]) if listed else (boxes[:1], index[:1], [])
    sizes = (None, [150, 220, 160, 224]) if listed else (torch.tensor([[9, 9], [8, 8]], device=device), [])
    return (*rows, *ignore, *sizes, 2, [10, 14, 5, 7], [16.0, 16.0, 32.0, 30.5], 80, 0.5)


@pytest.mark.compile
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("listed", [True, False], ids=["list", "packed"])
@pytest.mark.parametrize("number", [0, 1, 5, 90])
def test_operators_that_make_regions(number, listed, dtype, device):
    arguments = region_arguments(device, number, listed, dtype)
    opcheck("regions", *arguments, False)
    opcheck("rasterize", *arguments, None)
    opcheck("rasterize", *arguments, torch.arange(80, device=device) % 7 == 3)


@pytest.mark.compile
@pytest.mark.parametrize(
    ("layout", "dtype"),
    [("contiguous", F64), ("contiguous", BF16), ("channels_last", F32), ("sliced", BF16), ("expanded", F64)],
    ids=str,
)
def test_operators_on_maps_of_any_layout(layout, dtype, device):
    """Fakes have the strides of what is computed; what torch.compile makes of an operator does not depend on them."""
    regions = make_regions(device, 4, levels=2)
    inputs = make_inputs(regions, 12, 8, dtype=dtype, device=device).layout(layout)
    check_operators(inputs, regions, [(False, (1000, 1))], compiled=False)


@pytest.mark.compile
@pytest.mark.parametrize("kind", REGIONS)
def test_operators_on_regions_of_any_number_of_boxes(kind, device):
    """Anchors detached or not, what backward needs saved or not: all four once, and all saved elsewhere."""
    regions = REGIONS[kind](device)
    inputs = make_inputs(regions, 70, 8, dtype=F16, teacher_dtype=F32, device=device)
    every = [(detach, share) for detach in (False, True) for share in ((0, 1), (1000, 1))]
    check_operators(inputs, regions, every if kind == "boxes" else every[1:2])


def check_operators(inputs, regions, options, compiled=True):
    """`options`: whether anchors are detached, and the share of the maps that may be saved."""

    def check(name, *arguments, compiled=compiled):
        opcheck(name, *arguments, compiled=compiled)

    tensors, features, anchors = regions.tensors(), inputs.cls[0], inputs.anchors
    one = torch.ones((), dtype=anchors.dtype, device=anchors.device)
    check("anchor_pool", features, tensors)
    check("anchor_pool_backward", anchors, features, tensors)
    check("anchor_cosine", features, anchors, tensors)
    cosines = torch.ops.sea_kernels.anchor_cosine(features, anchors, tensors)
    check("anchor_cosine_backward", cosines, features, anchors, tensors)
    student, teacher = features + inputs.box[0], inputs.cls_teacher[0] + inputs.box_teacher[0]
    masks, losses = tensors[1].shape[1], [3, 5]

    def sizes(losses, detach=False, share=sizes_of_saved.SHARE):
        return sizes_of_saved.elements(student, teacher, losses, masks, detach, share)

    for flags, softmax in ((losses, sizes(losses)[2]), ([3, 4], sizes([3, 4])[2]), (losses, 0)):
        elements = sizes_of_saved.anchor_elements(student, flags, masks)
        check("sea_loss_pool", student, teacher, flags, tensors, 2.0, elements, softmax)
    elements = sizes_of_saved.anchor_elements(student, losses, masks), sizes(losses)[2]
    apart = torch.ops.sea_kernels.sea_loss_pool(student, teacher, losses, tensors, 2.0, *elements)
    check("sea_loss", student, teacher, losses, tensors, 0.1, 1.0, 0, 0, 0)
    check("sea_loss_compare", student, teacher, losses, tensors, apart[0], 0.1, 0, 0)
    for detach, share in options:
        elements = sizes(losses, detach, share)
        arguments = (student, teacher, losses, tensors, 0.1, 1.0, *elements)
        check("sea_loss", *arguments, compiled=False)
        saved = torch.ops.sea_kernels.sea_loss(*arguments)[3]
        for grads in ((one, one, one), (None, one, None)):
            check("sea_loss_backward", *grads, student, teacher, losses, tensors, saved, 0.1, 1.0)
        arguments = (student, teacher, losses, tensors, apart[0], 0.1, *elements[:2])
        check("sea_loss_compare", *arguments, compiled=False)
        saved = [*torch.ops.sea_kernels.sea_loss_compare(*arguments)[2:], apart[2], apart[0]]
        check("sea_loss_backward", one, one, one, student, teacher, losses, tensors, saved, 0.1, 2.0)


@pytest.mark.compile
def test_operators_for_localization_without_regions(device):
    """And of one set alone."""
    student, teacher = make_maps(SHAPES, 2, 8, 1, BF16, device), make_maps(SHAPES, 2, 8, 2, F32, device)
    one = torch.ones((), device=device)
    maps = (student, teacher, [backends.LOCALIZATION], [])
    sizes = sizes_of_saved.elements(*maps[:3], 0, False)
    for saved in (sizes, (0, 0, 0)):
        opcheck("sea_loss", *maps, 0.1, 2.0, *saved)
    saved = torch.ops.sea_kernels.sea_loss(*maps, 0.1, 2.0, *sizes)[3]
    opcheck("sea_loss_backward", None, None, one, *maps, saved, 0.1, 2.0)


@pytest.mark.parametrize("change", [-1, 1])
def test_other_sizes_of_what_is_saved_are_refused(change, device):
    """Python computes them, for sets with every combination of losses."""
    regions, losses = make_regions(device, levels=2), [3, 7, 5, 1, 4]
    masks, one = regions.area.shape[1], torch.ones((), device=device)
    student, teacher = (
        [x for c in (40, 24, 7, 8, 9) for x in make_maps(regions.level_shapes, 2, c, seed, F32, device)]
        for seed in (1, 2)
    )
    call = (student, teacher, losses, regions.tensors())
    sizes = sizes_of_saved.elements(student, teacher, losses, masks, False, (1000, 1))
    pooled = sizes_of_saved.anchor_elements(student, losses, masks), sizes.softmax
    saved = torch.ops.sea_kernels.sea_loss(*call, 0.1, 1.0, *sizes)[3]
    assert [x.numel() for x in saved] == list(sizes)
    anchors = torch.ops.sea_kernels.sea_loss_pool(*call, 1.0, *pooled)[0]

    def wrong(good, i):
        """The numbers, or the numbers of elements of the tensors, but for one."""
        other = good[i] + change if isinstance(good[i], int) else one.new_zeros(good[i].numel() + change)
        return [*good[:i], other, *good[i + 1 :]]

    calls = [
        *(("sea_loss", *call, 0.1, 1.0, *wrong(sizes, i)) for i in range(3)),
        *(("sea_loss_pool", *call, 1.0, *wrong(pooled, i)) for i in range(2)),
        *(("sea_loss_compare", *call, anchors, 0.1, *wrong(sizes[:2], i)) for i in range(2)),
        ("sea_loss_compare", *call, *wrong([anchors], 0), 0.1, *sizes[:2]),
        *(("sea_loss_backward", one, one, one, *call, wrong(saved, i), 0.1, 1.0) for i in range(3)),
    ]
    for name, *arguments in calls:
        with pytest.raises(RuntimeError, match=r"sea_kernels: .* is \d+; expected \d+"):
            getattr(torch.ops.sea_kernels, name)(*arguments)


def test_every_operator_has_a_kernel_and_a_fake(device):
    for name in schemas.OPERATORS:
        assert library.has_kernel(name, device.upper()), name
        if name != "build_info":
            fake = torch._library.simple_registry.singleton.find(f"sea_kernels::{name}").fake_impl.kernel
            assert fake is not None, name
