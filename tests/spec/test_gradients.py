"""Gradients: finite differences in float64, which inputs get one, autocast and scaled losses."""

import pytest
import torch
from cases import BF16, CALLS, F32, F64, VARIANTS, make_inputs, make_maps, make_regions, run
from scenes import CASES, regions_of
from scenes import make_maps as maps_of
from torch.autograd import gradcheck

import sea_kernels as sk

SMALL = {"shapes": [(2, 3), (2, 2)], "strides": [80, (80, 112)]}


@pytest.fixture(scope="module")
def small(device):
    regions = make_regions(device, 5, num_classes=2, seed=2, **SMALL)
    assert (regions.area > 0).sum(1).tolist() == [5, 4] and regions.counted.tolist() == [11, 7]  # of 12 and 8 pixels
    return regions


def maps(*counts, device="cpu", requires_grad=True):
    """Sets of float64 maps of the small levels, each with its number of channels."""
    out = [make_maps(SMALL["shapes"], 2, c, seed, F64, device) for seed, c in enumerate(counts)]
    return [[x.requires_grad_(requires_grad) for x in s] for s in out]


def pairs(flat, levels=2):
    return [list(flat[i : i + levels]) for i in range(0, len(flat), levels)]


FUNCTIONS = {  # f(regions, teacher's sets, *student's maps): teacher's sets have 3, 3, 4 channels like the student's
    "anchor_pool": lambda r, t, *x: sk.anchor_pool(x[:2], r),
    "anchor_loss": lambda r, t, *x: sk.anchor_loss(x[:2], t[0], r),
    "anchor_loss, sets": lambda r, t, *x: sk.anchor_loss(pairs(x), t, r),
    "distance": lambda r, t, *x: sk.topological_distance_loss(x[:2], t[0], r, temperature=0.4),
    "distance, sets": lambda r, t, *x: sk.topological_distance_loss(pairs(x), t, r, temperature=1.5),
    "localization": lambda r, t, *x: sk.localization_alignment_loss(x[:2], t[0], r),
    "localization, no regions": lambda r, t, *x: sk.localization_alignment_loss(x[:2], t[0], temperature=0.3),
    "localization, sets": lambda r, t, *x: sk.localization_alignment_loss(pairs(x), t, r, temperature=3),
    "sea_loss": lambda r, t, *x: tuple(sk.sea_loss(x[:2], t[0], x[4:], t[2], r, distance_temperature=0.4)),
    "sea_loss, sets, distance_on_box": lambda r, t, *x: tuple(
        sk.sea_loss(pairs(x[:4]), t[:2], [x[4:]], t[2:], r, 0.5, 2.0, distance_on_box=True)
    ),
    "sea_loss, anchor_on_box=False": lambda r, t, *x: tuple(
        sk.sea_loss(x[:2], t[0], x[4:], t[2], r, distance_temperature=0.4, anchor_on_box=False)
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_are_finite_differences(name, small, backend, device):
    student = [x for s in maps(3, 3, 4, device=device) for x in s]
    teacher = [[x.detach().flip(0) for x in s] for s in maps(3, 3, 4, device=device)]
    if "sets" not in name:
        student = student[:2] + [x.detach() for x in student[2:4]] + student[4:]
    assert gradcheck(lambda *x: FUNCTIONS[name](small, teacher, *x), student)


@pytest.mark.parametrize("name", ["plain", "crowd and padding", "one pixel", "no box"])
def test_gradients_on_other_regions_are_finite_differences(name, backend, device):
    case = CASES[name] | {"shapes": [(2, 3), (1, 1)], "strides": [24, 64]}
    regions = regions_of(case, device=device)
    student, teacher = maps_of(case, 3, 1, requires_grad=True, device=device), maps_of(case, 3, 2, device=device)
    anchors = torch.randn(2, regions.area.shape[1], 3, dtype=F64, device=device, requires_grad=True)
    n = len(student)
    for f, inputs in (
        (lambda *x: sk.anchor_pool(x, regions), student),
        (lambda *x: tuple(sk.anchor_cosine(x[:n], x[n], regions)), [*student, anchors]),
        (lambda *x: sk.anchor_loss(x, teacher, regions), student),
        (lambda *x: sk.topological_distance_loss(x, teacher, regions), student),
        (lambda *x: sk.localization_alignment_loss(x, teacher, regions), student),
        (lambda *x: sum(sk.sea_loss(x, teacher, x, teacher, regions, distance_on_box=True)), student),
    ):
        assert gradcheck(f, inputs)


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)], ids=str)
def test_gradients_of_cosines_are_finite_differences(needs, small, backend, device):
    """To the features, to the anchors, to both; empty anchors get none."""
    features = maps(3, device=device, requires_grad=needs[0])[0]
    g = torch.Generator().manual_seed(0)
    anchors = torch.randn(2, small.area.shape[1], 3, generator=g, dtype=F64).to(device).requires_grad_(needs[1])
    assert gradcheck(lambda a, *x: tuple(sk.anchor_cosine(x, a, small)), (anchors, *features))
    if needs[1]:
        cosines = sk.anchor_cosine(features, anchors, small)
        (gradient,) = torch.autograd.grad([c.sum() for c in cosines], anchors)
        assert not gradient[small.area == 0].any() and gradient[small.area > 0].any(1).all()


def test_gradients_through_anchors_to_their_cosines_are_finite_differences(small, backend, device):
    """The path of the distance loss, out of public pieces."""
    assert gradcheck(lambda *x: tuple(sk.anchor_cosine(x, sk.anchor_pool(x, small), small)), maps(3, device=device)[0])


def test_detach_anchors_cuts_the_path_through_the_anchors(small, backend, device):
    """The loss once more out of public pieces with the anchors held; and of the detached loss the value is the same."""
    (student,), (teacher,) = maps(3, device=device), maps(3, device=device)
    teacher, temperature = [x.detach().flip(0) for x in teacher], 0.4

    def loss(*x):
        total = 0
        anchors = sk.anchor_pool([y.detach() for y in x], small), sk.anchor_pool(teacher, small)
        cosines = [sk.anchor_cosine(side, a, small) for side, a in zip((x, teacher), anchors)]
        for i, (s, t) in enumerate(zip(*cosines)):
            present, counted = small.area[i] > 0, small.masks(i).any(0)
            s, t = ((c[:, present] / temperature).log_softmax(1) for c in (s, t))
            total = total + (t.exp() * (t - s)).sum(1)[counted].mean()
        return total

    detached = sk.topological_distance_loss(student, teacher, small, temperature, detach_anchors=True)
    whole = sk.topological_distance_loss(student, teacher, small, temperature)
    torch.testing.assert_close(detached, loss(*student))
    assert torch.equal(detached, whole)
    wanted, got, through = (torch.autograd.grad(x, student) for x in (loss(*student), detached, whole))
    for w, g, t in zip(wanted, got, through):
        torch.testing.assert_close(g, w)
        assert not torch.allclose(g, t)
    fused = sk.sea_loss(student, teacher, student, teacher, small, temperature, detach_anchors=True)
    for w, g in zip(wanted, torch.autograd.grad(fused.distance, student)):
        torch.testing.assert_close(g, w)


# ------------------------------------------------------------------------------------------------ who gets a gradient


def test_the_teacher_gets_no_gradient(backend, device):
    regions = make_regions(device)
    inputs = make_inputs(regions, device=device).map(lambda x: x.requires_grad_())
    teacher = [x for s in inputs.cls_teacher + inputs.box_teacher for x in s]
    for name in ("anchor_loss", "distance", "localization", "sea_loss"):
        outputs = CALLS[name](inputs, regions)
        assert all(x.requires_grad for x in outputs)
        assert all(x is None for x in torch.autograd.grad(sum(outputs), teacher, allow_unused=True))


def test_each_of_the_three_losses_may_be_unused(backend, device):
    """Each part alone gives the gradient of the single loss; branches that it does not touch get none or zero."""
    regions = make_regions(device)
    inputs = make_inputs(regions, device=device)
    single = {
        "distance": run("distance", inputs, regions)[1],
        "localization": run("localization", inputs, regions)[1],
    }
    weights = {"distance": 0, "localization": 0}
    for part, wanted in single.items():
        # run() weighs its first output by the first of its upstream gradients
        leaves = inputs.map(lambda x: x.detach().requires_grad_())
        loss = getattr(sk.sea_loss(leaves.cls, leaves.cls_teacher, leaves.box, leaves.box_teacher, regions), part)
        first = torch.randn((), generator=torch.Generator().manual_seed(7)).to(loss)
        got = torch.autograd.grad(loss, leaves.leaves(), first, allow_unused=True)
        for g, w in zip(got, wanted):
            if w is None:
                assert g is None or not g.any()
            else:
                weights[part] += 1
                torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-7)
    assert weights == {"distance": 3, "localization": 3}


def test_the_anchor_loss_may_be_used_alone(backend, device):
    """What backward() is for: .grad of the maps; nothing else complains."""
    regions = make_regions(device)
    inputs = make_inputs(regions, device=device).map(lambda x: x.requires_grad_())
    losses = sk.sea_loss(inputs.cls, inputs.cls_teacher, inputs.box, inputs.box_teacher, regions)
    losses.anchor.backward()
    assert all(x.grad.any() for x in inputs.cls[0] + inputs.box[0])


def test_some_maps_need_no_gradient(backend, device):
    regions = make_regions(device)
    inputs = make_inputs(regions, device=device)
    _, wanted = run("sea_loss", inputs, regions)
    inputs.cls[0][1].requires_grad_()
    losses = sk.sea_loss(inputs.cls, inputs.cls_teacher, inputs.box, inputs.box_teacher, regions)
    g = torch.Generator().manual_seed(7)
    weighted = [torch.randn((), generator=g).to(x) * x for x in losses]
    (got,) = torch.autograd.grad(sum(weighted), inputs.cls[0][1])
    assert torch.equal(got, wanted[1])


def test_gradients_of_a_map_in_both_branches_add_up(backend, device):
    regions = make_regions(device)
    x, t = make_maps(regions.level_shapes, device=device), make_maps(regions.level_shapes, seed=1, device=device)
    x = [y.requires_grad_() for y in x]
    fused = sk.sea_loss(x, t, x, t, regions)
    singles = (
        2 * sk.anchor_loss(x, t, regions),
        sk.topological_distance_loss(x, t, regions),
        sk.localization_alignment_loss(x, t, regions),
    )
    for a, b in zip(fused, singles):
        torch.testing.assert_close(a, b)
    for a, b in zip(torch.autograd.grad(sum(fused), x), torch.autograd.grad(sum(singles), x)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


# ----------------------------------------------------------------------------------------------- autocast and scaling


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_autocast_changes_nothing(dtype, variant, backend, device):
    """Student bfloat16, teacher float32, as they come out of a student under autocast; and both float32."""
    regions = make_regions(device)
    inputs = make_inputs(regions, dtype=dtype, teacher_dtype=F32, device=device)
    outputs, gradients = run(variant, inputs, regions)
    assert all(x.dtype == F32 for x in outputs)
    with torch.autocast(device, dtype=BF16):
        again, again_gradients = run(variant, inputs, regions)
    assert all(torch.equal(x, y) for x, y in zip(outputs, again))
    if backend == "native":  # of the reference torch itself runs a backward within autocast in bfloat16
        assert all(x is y is None or torch.equal(x, y) for x, y in zip(gradients, again_gradients))


def test_losses_inside_and_outside_of_autocast_are_the_same(backend, device):
    """A convolution under autocast, the loss inside and outside of it."""
    regions = make_regions(device)
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(8, 16, 3, padding=1).to(device)
    x, teacher = (
        make_maps(regions.level_shapes, 2, 8, device=device),
        make_maps(regions.level_shapes, 2, 16, device=device),
    )
    gradients = []
    for inside in (True, False):
        with torch.autocast(device, dtype=BF16):
            student = [layer(y) for y in x]
            if inside:
                loss = sum(sk.sea_loss(student, teacher, student, teacher, regions))
        if not inside:
            loss = sum(sk.sea_loss(student, teacher, student, teacher, regions))
        assert student[0].dtype == BF16 and loss.dtype == F32
        gradients.append(torch.autograd.grad(loss, layer.weight)[0])
    assert gradients[0].isfinite().all() and torch.equal(*gradients)


def test_scaled_losses_have_scaled_gradients(backend, device):
    """As a GradScaler does it: by a power of two, exactly so in float32; what overflows in float16 shows."""
    regions = make_regions(device)
    inputs = make_inputs(regions, device=device).map(lambda x: x.requires_grad_())
    loss = sum(CALLS["sea_loss"](inputs, regions))
    plain = torch.autograd.grad(loss, inputs.cls[0], retain_graph=True)
    scaled = torch.autograd.grad(2.0**16 * loss, inputs.cls[0])
    for x, y in zip(plain, scaled):
        torch.testing.assert_close(2.0**16 * x, y, rtol=1e-6, atol=0)
    half = make_inputs(regions, dtype=torch.float16, device=device).map(lambda x: x.requires_grad_())
    gradients = torch.autograd.grad(2.0**40 * sum(CALLS["sea_loss"](half, regions)), half.cls[0])
    assert not all(x.isfinite().all() for x in gradients)
