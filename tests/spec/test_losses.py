"""Losses, anchors and cosines: the values and gradients of the oracle's loops, in float64 to 1e-9."""

import math

import numpy as np
import oracle
import pytest
import tolerance
import torch
from cases import BF16, F16, F32, F64, VARIANTS, Inputs, make_inputs, make_regions, run
from hypothesis import given, settings
from hypothesis import strategies as st
from scenes import CASES, arrays, assert_near, assert_same_regions, build, expected_regions, make_maps, regions_of

import sea_kernels as sk

nan = math.nan
LOSS_CASES = {k: v for k, v in CASES.items() if k != "huge"}


@pytest.fixture(params=LOSS_CASES.values(), ids=LOSS_CASES)
def case(request):
    return request.param


def all_losses(student, teacher, regions):
    return (
        sk.anchor_loss(student, teacher, regions),
        sk.topological_distance_loss(student, teacher, regions),
        sk.localization_alignment_loss(student, teacher, regions),
    )


def test_anchors_are_means_and_cosines_are_of_every_pixel_with_every_anchor(case, backend, device):
    regions, (_, masks, _) = regions_of(case, device=device), expected_regions(case)
    features = make_maps(case, device=device)
    anchors = sk.anchor_pool(features, regions)
    wanted = oracle.anchors(arrays(features), masks)
    assert anchors.dtype == F64
    assert_near(anchors, np.stack(wanted))
    assert torch.equal(anchors[regions.area == 0], torch.zeros_like(anchors[regions.area == 0]))
    for f, a, m, c in zip(arrays(features), wanted, masks, sk.anchor_cosine(features, anchors, regions)):
        assert c.shape == (f.shape[0], len(m), *f.shape[2:])
        wanted_cosine = [
            [oracle.cosine(f[b, :, y, x], a[p]) for b in range(f.shape[0])]
            for y in range(f.shape[2])
            for x in range(f.shape[3])
            for p in range(len(m))
        ]
        wanted_cosine = np.array(wanted_cosine).reshape(*f.shape[2:], len(m), -1).transpose(3, 2, 0, 1)
        assert_near(c, wanted_cosine)


def test_anchor_cosine_of_an_empty_anchor_is_zero(case, backend, device):
    """Whatever is given for it, even NaN."""
    regions, features = regions_of(case, device=device), make_maps(case, requires_grad=True, device=device)
    anchors = torch.randn(len(features), regions.area.shape[1], 3, dtype=F64, device=device)
    anchors[regions.area == 0] = nan
    anchors.requires_grad_()
    cosines = sk.anchor_cosine(features, anchors, regions)
    for c, area in zip(cosines, regions.area):
        assert torch.equal(c.isfinite(), torch.ones_like(c, dtype=torch.bool))
        assert not c[:, area == 0].any()
    grads = torch.autograd.grad(sum(c.sum() for c in cosines), [anchors, *features])
    assert all(g.isfinite().all() for g in grads)
    assert not grads[0][regions.area == 0].any()


@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=str)
def test_losses_in_every_dtype(case, dtype, backend, device):
    """In every dtype of maps against the oracle on the same (rounded) values."""
    regions, (_, masks, extent) = regions_of(case, device=device), expected_regions(case)
    student, teacher = make_maps(case, 4, 1, dtype, device=device), make_maps(case, 4, 2, dtype, device=device)
    s, t = arrays(student), arrays(teacher)
    rtol = 1e-9 if dtype == F64 else 1e-4
    for loss, wanted in (
        (sk.anchor_loss(student, teacher, regions), oracle.anchor_loss(s, t, masks)),
        (
            sk.topological_distance_loss(student, teacher, regions, temperature=0.2),
            oracle.distance_loss(s, t, masks, 0.2),
        ),
        (
            sk.localization_alignment_loss(student, teacher, regions, temperature=2),
            oracle.localization_loss(s, t, extent, 2.0),
        ),
        (sk.localization_alignment_loss(student, teacher), oracle.localization_loss(s, t, None, 1.0)),
    ):
        assert loss.shape == () and loss.dtype == (F64 if dtype == F64 else F32)
        assert_near(loss, wanted, rtol)


def test_default_temperatures_are_a_tenth_and_one(backend, device):
    case = CASES["plain"]
    regions, (_, masks, _) = regions_of(case, device=device), expected_regions(case)
    student, teacher = make_maps(case, 4, 1, device=device), make_maps(case, 4, 2, device=device)
    s, t = arrays(student), arrays(teacher)
    assert_near(sk.topological_distance_loss(student, teacher, regions), oracle.distance_loss(s, t, masks, 0.1))
    assert_near(sk.localization_alignment_loss(student, teacher), oracle.localization_loss(s, t, None, 1.0))


@pytest.mark.parametrize("batches", [(2, 1), (1, 3)])
def test_sets_of_other_batch_sizes_where_there_are_no_regions(batches, backend, device):
    generator = torch.Generator().manual_seed(0)
    make = lambda b: torch.randn(b, 5, 4, 6, generator=generator).to(device)  # noqa: E731
    student, teacher = [[make(b).requires_grad_(True)] for b in batches], [[make(b)] for b in batches]
    loss = sk.localization_alignment_loss(student, teacher)
    alone = sum(sk.localization_alignment_loss(s, t) for s, t in zip(student, teacher))
    torch.testing.assert_close(loss, alone)
    leaves = [x for maps in student for x in maps]
    torch.testing.assert_close(torch.autograd.grad(loss, leaves), torch.autograd.grad(alone, leaves))


@pytest.mark.parametrize("temperature", [0.01, 0.1, 5.0])
@pytest.mark.parametrize("detach_anchors", [False, True])
def test_gradients_are_the_closed_formulas(case, temperature, detach_anchors, backend, device):
    regions, (_, masks, extent) = regions_of(case, device=device), expected_regions(case)
    student, teacher = make_maps(case, 4, 1, requires_grad=True, device=device), make_maps(case, 4, 2, device=device)
    s, t = arrays(student), arrays(teacher)
    distance = sk.topological_distance_loss(student, teacher, regions, temperature, detach_anchors)
    for loss, wanted in (
        (sk.anchor_loss(student, teacher, regions), oracle.anchor_gradient(s, t, masks)),
        (distance, oracle.distance_gradient(s, t, masks, temperature, detach_anchors)),
        (
            sk.localization_alignment_loss(student, teacher, regions, temperature),
            oracle.localization_gradient(s, t, extent, temperature),
        ),
        (
            sk.localization_alignment_loss(student, teacher, None, temperature),
            oracle.localization_gradient(s, t, None, temperature),
        ),
    ):
        for g, w in zip(torch.autograd.grad(loss, student), wanted):
            assert_near(g, w, 1e-8)


@pytest.mark.parametrize("anchor_on_box", [False, True])
@pytest.mark.parametrize("distance_on_box", [False, True])
def test_sea_loss_is_the_sum_of_the_single_losses(distance_on_box, anchor_on_box, backend, device):
    """Of two maps a branch, the box maps of other width; the gradient included."""
    case = CASES["crowd and padding"]
    regions = regions_of(case, device=device)
    student_cls, teacher_cls = (
        [make_maps(case, 4, i + k, requires_grad=k == 0, device=device) for i in (0, 1)] for k in (0, 9)
    )
    student_box, teacher_box = (
        [make_maps(case, 5, i + k, requires_grad=k == 20, device=device) for i in (0, 1)] for k in (20, 30)
    )
    out = sk.sea_loss(
        student_cls, teacher_cls, student_box, teacher_box, regions, 0.3, 2.0, False, distance_on_box, anchor_on_box
    )
    assert out._fields == ("anchor", "distance", "localization")

    def single(loss, student, teacher, *args):
        return sum(loss(s, t, *args) for s, t in zip(student, teacher))

    anchor = single(sk.anchor_loss, student_cls, teacher_cls, regions)
    if anchor_on_box:
        anchor = anchor + single(sk.anchor_loss, student_box, teacher_box, regions)
    distance = single(sk.topological_distance_loss, student_cls, teacher_cls, regions, 0.3)
    if distance_on_box:
        distance = distance + single(sk.topological_distance_loss, student_box, teacher_box, regions, 0.3)
    localization = single(sk.localization_alignment_loss, student_box, teacher_box, regions, 2.0)
    maps = [x for s in student_cls + student_box for x in s]
    for x, y in zip(out, (anchor, distance, localization)):
        assert_near(x, y.item())
        for g, w in zip(*(torch.autograd.grad(v, maps, retain_graph=True, materialize_grads=True) for v in (x, y))):
            torch.testing.assert_close(g, w)


@pytest.mark.parametrize("on_box", [False, True])
@pytest.mark.parametrize("branch", ["cls", "box"])
def test_a_branch_without_maps_adds_nothing(branch, on_box, backend, device):
    case = CASES["crowd and padding"]
    regions = regions_of(case, device=device)
    student, teacher = make_maps(case, 3, 1, requires_grad=True, device=device), make_maps(case, 3, 2, device=device)
    sides = ([student], [teacher], [], []) if branch == "cls" else ([], [], (student,), (teacher,))
    out = sk.sea_loss(*sides, regions, distance_on_box=on_box, anchor_on_box=on_box)
    compared = [True, True, False] if branch == "cls" else [on_box, on_box, True]
    single = sk.anchor_loss, sk.topological_distance_loss, sk.localization_alignment_loss
    for x, loss, there in zip(out, single, compared):
        assert_near(x, loss(student, teacher, regions).item() if there else 0.0)
    for gradient in torch.autograd.grad(sum(out), student):
        assert gradient.abs().max() > 0


def test_sea_loss_can_detach_the_anchors(backend, device):
    case = CASES["plain"]
    regions, student, teacher = (
        regions_of(case, device=device),
        make_maps(case, 3, 1, requires_grad=True, device=device),
        make_maps(case, 3, 2, device=device),
    )
    out = sk.sea_loss(
        student, teacher, make_maps(case, device=device), make_maps(case, device=device), regions, detach_anchors=True
    )
    wanted = sk.topological_distance_loss(student, teacher, regions, detach_anchors=True)
    for g, w in zip(torch.autograd.grad(out.distance, student), torch.autograd.grad(wanted, student)):
        torch.testing.assert_close(g, w)


def test_losses_of_several_sets_of_maps_add_up(backend, device):
    case = CASES["plain"]
    regions = regions_of(case, device=device)
    student, teacher = ([make_maps(case, 3, i + k, device=device) for i in (0, 1, 2)] for k in (0, 9))
    for loss in (
        sk.anchor_loss,
        sk.topological_distance_loss,
        sk.localization_alignment_loss,
    ):
        assert_near(loss(student, teacher, regions), sum(loss(s, t, regions).item() for s, t in zip(student, teacher)))
        assert_near(loss(student[:1], teacher[:1], regions), loss(student[0], teacher[0], regions).item())


def test_equal_maps_have_no_loss(case, backend, device):
    regions, maps = regions_of(case, device=device), make_maps(case, device=device)
    for v in sk.sea_loss(maps, maps, maps, maps, regions, distance_on_box=True):
        assert abs(v.item()) < 1e-12


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_a_norm_just_above_the_limit_has_a_direction(dtype, backend, device):
    """The limit is 1e-12 itself, of pixels and of anchors: on the square, float32 could hold neither."""
    none = torch.zeros(0, dtype=torch.int64, device=device)
    regions = build([torch.zeros(0, 4, device=device)], [none], [(1, 1)], [8])
    other = torch.tensor([3.0, 4.0], dtype=dtype, device=device)
    for norm, wanted in ((2e-12, 0.6), (0.5e-12, 0.0), (0.0, 0.0), (nan, nan)):
        x = torch.tensor([norm, 0.0], dtype=dtype, device=device)
        for pixel, anchor in ((x, other), (other, x)):
            (cosine,) = sk.anchor_cosine([pixel.view(1, 2, 1, 1)], anchor.view(1, 1, 2), regions)
            assert cosine.item() == pytest.approx(wanted, rel=1e-9 if dtype == F64 else 1e-5, nan_ok=True)


def test_a_level_without_a_valid_pixel_adds_nothing(backend, device):
    """A crowd over all of it; and no image in the batch."""
    case = CASES["plain"] | {"boxes": [[], []], "labels": [[], []], "ignore": [[(0, 0, 64, 48)]] * 2}
    empty = case | {"boxes": [], "labels": [], "ignore": []}
    none = torch.zeros(0, dtype=torch.int64, device=device)
    args = {"batch_index": none, "batch_size": 0}
    no_image = build(torch.zeros(0, 4, device=device), none, case["shapes"], case["strides"], **args)
    assert no_image.area.tolist() == [[0]] * 3
    assert sk.Regions(*no_image.tensors(), None, no_image.level_shapes, 0).masks(0).shape == (1, 0, 6, 8)
    for c, regions in ((case, regions_of(case, device=device)), (empty, no_image)):
        assert not regions.counted.any()
        student, teacher = make_maps(c, 3, 1, requires_grad=True, device=device), make_maps(c, 3, 2, device=device)
        anchor, distance, localization = sk.sea_loss(student, teacher, student, teacher, regions)
        assert anchor.item() == 0 and distance.item() == 0 and (localization.item() > 0) == (c is case)
        for loss in (anchor, distance):
            assert not any(g.any() for g in torch.autograd.grad(loss, student, retain_graph=True))
        assert all(g.isfinite().all() for g in torch.autograd.grad(localization, student))


@pytest.mark.parametrize("by", ["native", "reference"])
def test_losses_take_regions_of_either_backend(by, backend, device):
    case = CASES["plain"]
    own, student, teacher = (regions_of(case, device=device), *(make_maps(case, 3, i, device=device) for i in (1, 2)))
    with sk.backend(by):
        other = regions_of(case, device=device)
    for x, y in zip(all_losses(student, teacher, other), all_losses(student, teacher, own)):
        assert torch.equal(x, y)
    assert torch.equal(sk.anchor_pool(student, other), sk.anchor_pool(student, own))


def test_losses_have_the_wider_dtype_and_gradients_that_of_the_student(backend, device):
    """The teacher gets none, and nobody's maps are written to."""
    case = CASES["plain"]
    regions = regions_of(case, device=device)
    for student_dtype, teacher_dtype, wanted in ((BF16, F32, F32), (F16, F64, F64), (F64, BF16, F64)):
        student = make_maps(case, 3, 1, student_dtype, True, device)
        teacher = make_maps(case, 3, 2, teacher_dtype, True, device)
        before = [x.detach().clone() for x in student + teacher]
        for loss in (*all_losses(student, teacher, regions), sk.sea_loss(*(student, teacher) * 2, regions).anchor):
            assert loss.dtype == wanted
            grads = torch.autograd.grad(loss, student + teacher, allow_unused=True)
            assert all(g.dtype == student_dtype for g in grads[:3]) and all(g is None for g in grads[3:])
        assert all(torch.equal(x, y) for x, y in zip(before, student + teacher))
    features = make_maps(case, dtype=BF16, device=device)
    anchors = sk.anchor_pool(features, regions)
    assert anchors.dtype == F32
    assert sk.anchor_cosine(features, anchors.double(), regions)[0].dtype == F64


def test_losses_do_not_depend_on_the_layout_of_maps(backend, device):
    """channels_last, transposed, sliced and expanded maps give the values of contiguous ones."""
    case = CASES["crowd and padding"]
    regions = regions_of(case, device=device)
    student, teacher = (make_maps(case, 4, i, device=device) for i in (1, 2))
    wanted = all_losses(student, teacher, regions)
    for change in (
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        lambda x: torch.stack([x, x], dim=4).flatten(3)[..., ::2],
    ):
        changed = [change(x) for x in student]
        for x, y in zip(all_losses(changed, teacher, regions), wanted):
            torch.testing.assert_close(x, y)
    expanded = [x[:, :1].expand(-1, 4, -1, -1) for x in student]
    dense = [x.contiguous() for x in expanded]
    for x, y in zip(all_losses(expanded, teacher, regions), all_losses(dense, teacher, regions)):
        torch.testing.assert_close(x, y)


# ------------------------------------------------------------------------------------ channels that differ by level

LOSSES = [name for name in VARIANTS if name not in ("anchor_pool", "anchor_cosine")]


def sum_of_levels(variant, inputs, regions_of_levels, backend):
    """The outputs of one call for each level, summed up, and the gradients in the order of a call for all levels."""
    results = []
    for level, regions in enumerate(regions_of_levels):
        names = ("cls", "cls_teacher", "box", "box_teacher")
        sets = [[[maps[level]] for maps in getattr(inputs, name)] for name in names]
        results.append(run(variant, Inputs(*sets, inputs.anchors), regions, backend))
    outputs, gradients = zip(*results)
    return [sum(x) for x in zip(*outputs)], [x for maps in list(zip(*gradients))[:-1] for x in maps]


def assert_sum_of_levels(variant, channels, box_channels, dtype, seeds, sets=1, device="cpu", **scene):
    """The call for all levels, by the rule: as exact as plain PyTorch that is called for each level alone."""
    shapes, strides = scene.pop("shapes"), scene.pop("strides")
    found, plain, exact = [], [], []
    for seed in range(seeds):
        whole = make_regions(device, shapes=shapes, strides=strides, seed=seed, **scene)
        each = [make_regions(device, shapes=[h], strides=[s], seed=seed, **scene) for h, s in zip(shapes, strides)]
        inputs = make_inputs(whole, channels, box_channels, sets, dtype, seed=seed, device=device)
        outputs, gradients = run(variant, inputs, whole)
        found.append(outputs)
        sums = [sum_of_levels(variant, x, each, "reference") for x in (inputs, inputs.map(torch.Tensor.double))]
        plain.append(sums[0][0])
        exact.append(sums[1][0])
        for i, x in enumerate(zip(gradients[:-1], sums[0][1], sums[1][1], strict=True)):
            tolerance.assert_close(*x, tolerance.GRADIENT, f"gradient {i}", 1e-11 if dtype == F64 else 0.0)
    for outputs in zip(*(zip(*x) for x in (found, plain, exact))):
        tolerance.assert_scalars_close(*outputs)


@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=str)
@pytest.mark.parametrize("variant", LOSSES)
def test_channels_may_differ_from_level_to_level(variant, dtype, backend, device):
    """More than 32 masks, three images, odd widths; the two branches change their channels at other levels."""
    scene = {"batch": 3, "number": 60, "num_classes": 30, "strides": [13, 26, 40, 80]}
    scene["shapes"] = [(13, 17), (7, 9), (4, 5), (2, 3)]
    assert make_regions(**scene).area.shape[1] > 32
    assert_sum_of_levels(variant, [40, 24, 24, 33], [8, 8, 8, 12], dtype, 8, device=device, **scene)


@st.composite
def sets_of_channels(draw):
    levels = draw(st.integers(1, 4))
    channels = st.lists(st.sampled_from([1, 3, 8, 33]), min_size=levels, max_size=levels)
    sides = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=levels, max_size=levels)
    scene = {"shapes": draw(sides), "strides": [16, 20, 40, 70][:levels]}
    scene |= {"batch": draw(st.integers(0, 3)), "number": draw(st.sampled_from([0, 5, 17, 50])), "num_classes": 40}
    return draw(channels), draw(channels), draw(st.integers(1, 2)), scene


@settings(max_examples=30)
@given(drawn=sets_of_channels())
def test_any_channels_of_levels_give_the_sum_of_the_levels(drawn, backend):
    channels, box_channels, sets, scene = drawn
    assert_sum_of_levels("sea_loss, everything", channels, box_channels, F64, 1, sets, **scene)


def test_masks_of_some_levels_are_those_of_all(backend, device):
    regions = make_regions(device, 60, 3, 3, 30, shapes=[(13, 17), (7, 9), (4, 5)], strides=[13, 26, 40])
    for start, stop in ((0, 1), (1, 3), (2, 3)):
        some = regions._levels(start, stop)
        alone = make_regions(
            device, 60, 3, 3, 30, shapes=regions.level_shapes[start:stop], strides=[13, 26, 40][start:stop]
        )
        assert_same_regions(some, alone)
