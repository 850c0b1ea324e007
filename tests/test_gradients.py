"""Gradients: by finite differences in float64, which inputs get one, what is kept for them, second derivatives."""

import pytest
import torch
from cases import BF16, CALLS, F32, F64, VARIANTS, make_inputs, make_maps, make_regions, run
from torch.autograd import gradcheck

import sea_kernels as sk
from sea_kernels import ops

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
def test_gradcheck(name, small, device):
    student = [x for s in maps(3, 3, 4, device=device) for x in s]
    teacher = [[x.detach().flip(0) for x in s] for s in maps(3, 3, 4, device=device)]
    if "sets" not in name:
        student = student[:2] + [x.detach() for x in student[2:4]] + student[4:]
    assert gradcheck(lambda *x: FUNCTIONS[name](small, teacher, *x), student)


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)], ids=str)
def test_gradcheck_of_cosines(needs, small, device):
    """To the features, to the anchors, to both; empty anchors get none."""
    features = maps(3, device=device, requires_grad=needs[0])[0]
    g = torch.Generator().manual_seed(0)
    anchors = torch.randn(2, small.area.shape[1], 3, generator=g, dtype=F64).to(device).requires_grad_(needs[1])
    assert gradcheck(lambda a, *x: tuple(sk.anchor_cosine(x, a, small)), (anchors, *features))
    if needs[1]:
        cosines = sk.anchor_cosine(features, anchors, small)
        (gradient,) = torch.autograd.grad([c.sum() for c in cosines], anchors)
        assert not gradient[small.area == 0].any() and gradient[small.area > 0].any(1).all()


def test_gradcheck_of_pool_then_cosine(small, device):
    """The path of the distance loss, out of public pieces."""
    assert gradcheck(lambda *x: tuple(sk.anchor_cosine(x, sk.anchor_pool(x, small), small)), maps(3, device=device)[0])


def test_detach_anchors_cuts_the_path_through_the_anchors(small, device):
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


@pytest.mark.cpu_kernels
def test_saved_and_recomputed_give_the_same():
    """What is not saved is computed again: the operator's own gradients agree to the last bits."""
    regions = make_regions(number=6)
    inputs = make_inputs(regions, 40, 24)
    student, teacher = (
        list(s[0] + b[0]) for s, b in ((inputs.cls, inputs.box), (inputs.cls_teacher, inputs.box_teacher))
    )
    tensors, losses, one, temperatures = regions.tensors(), [3, 7], torch.ones(()), (0.1, 1.0)
    gradients = []
    for share in ((0, 1), (1000, 1)):
        sizes = ops.saved_elements(student, teacher, losses, regions.area.shape[1], False, share)
        *_, saved = torch.ops.sea_kernels.sea_loss(student, teacher, losses, tensors, *temperatures, *sizes)
        assert (saved[0].numel() > 0) == (share[0] > 0)
        gradients.append(
            torch.ops.sea_kernels.sea_loss_backward(
                one, one, one, student, teacher, losses, tensors, saved, *temperatures
            )
        )
    for x, y in zip(*gradients):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6 * x.abs().max().item())


# ------------------------------------------------------------------------------------------------ who gets a gradient


def test_the_teacher_gets_no_gradient(device):
    regions = make_regions(device)
    inputs = make_inputs(regions, device=device).map(lambda x: x.requires_grad_())
    teacher = [x for s in inputs.cls_teacher + inputs.box_teacher for x in s]
    for name in ("anchor_loss", "distance", "localization", "sea_loss"):
        outputs = CALLS[name](inputs, regions)
        assert all(x.requires_grad for x in outputs)
        assert all(x is None for x in torch.autograd.grad(sum(outputs), teacher, allow_unused=True))


def test_parts_of_sea_loss_may_be_unused(device):
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


def test_only_the_anchor_part_is_used(device):
    """What backward() is for: .grad of the maps; nothing else complains."""
    regions = make_regions(device)
    inputs = make_inputs(regions, device=device).map(lambda x: x.requires_grad_())
    losses = sk.sea_loss(inputs.cls, inputs.cls_teacher, inputs.box, inputs.box_teacher, regions)
    losses.anchor.backward()
    assert all(x.grad.any() for x in inputs.cls[0] + inputs.box[0])


def test_some_maps_need_no_gradient(device):
    regions = make_regions(device)
    inputs = make_inputs(regions, device=device)
    _, wanted = run("sea_loss", inputs, regions)
    inputs.cls[0][1].requires_grad_()
    losses = sk.sea_loss(inputs.cls, inputs.cls_teacher, inputs.box, inputs.box_teacher, regions)
    g = torch.Generator().manual_seed(7)
    weights = [torch.randn((), generator=g).to(x) for x in losses]
    (got,) = torch.autograd.grad(losses, inputs.cls[0][1], weights)
    assert torch.equal(got, wanted[1])


def test_one_map_in_both_branches(device):
    """Its gradients add up."""
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


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_a_map_that_is_changed_before_backward_is_noticed(who, device):
    regions = make_regions(device)
    inputs = make_inputs(regions, device=device).map(lambda x: x.requires_grad_())
    for name in ("anchor_loss", "distance", "sea_loss"):
        loss = sum(CALLS[name](inputs, regions))
        maps = inputs.cls if who == "student" else inputs.cls_teacher
        with torch.no_grad():
            maps[0][0].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_backward_twice_through_one_graph(device):
    """With retain_graph the same gradients again; without it torch's own error."""
    regions = make_regions(device)
    inputs = make_inputs(regions, device=device).map(lambda x: x.requires_grad_())
    loss = sum(CALLS["sea_loss"](inputs, regions))
    first = torch.autograd.grad(loss, inputs.cls[0], retain_graph=True)
    for x, y in zip(first, torch.autograd.grad(loss, inputs.cls[0])):
        assert torch.equal(x, y)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, inputs.cls[0])


# ----------------------------------------------------------------------------------------------- autocast and scaling


@pytest.mark.parametrize("variant", VARIANTS)
def test_autocast_changes_nothing(variant, device):
    """Student bfloat16, teacher float32, as they come out of a student under autocast."""
    regions = make_regions(device)
    inputs = make_inputs(regions, dtype=BF16, teacher_dtype=F32, device=device)
    outputs, gradients = run(variant, inputs, regions)
    assert all(x.dtype == F32 for x in outputs)
    with torch.autocast(device, dtype=BF16):
        again, again_gradients = run(variant, inputs, regions)
    for x, y in zip([*outputs, *gradients], [*again, *again_gradients]):
        assert (x is None and y is None) or torch.equal(x, y)


def test_student_under_autocast(device):
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


def test_scaled_losses_give_scaled_gradients(device):
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


# -------------------------------------------------------------------------------------------------- second derivatives


@pytest.mark.parametrize("name", CALLS)
def test_second_derivatives_are_refused(name, device):
    regions = make_regions(device)
    inputs = make_inputs(regions, device=device).map(lambda x: x.requires_grad_())
    outputs = CALLS[name](inputs, regions)
    with pytest.raises(RuntimeError, match=r"has no second derivative.*create_graph=True"):
        torch.autograd.grad([x.sum() for x in outputs], inputs.leaves(), create_graph=True, allow_unused=True)


def test_a_gradient_penalty_is_refused_and_not_silently_wrong(device):
    """Where another term of the loss has a second derivative, ours would silently be missing in the sum."""
    regions = make_regions(device)
    x = [y.requires_grad_() for y in make_maps(regions.level_shapes, device=device)]
    t = make_maps(regions.level_shapes, seed=1, device=device)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(sk.anchor_loss(x, t, regions) + sum(y.pow(3).sum() for y in x), x, create_graph=True)


# ------------------------------------------------------------------------------------------------------- kept memory


def kept_bytes(f, inputs):
    """Bytes that live from forward to backward and were not there before."""
    before = {x.untyped_storage().data_ptr() for x in inputs}
    kept = {}

    def pack(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in before:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        outputs = f()
    assert any(x.requires_grad for x in outputs)
    return sum(kept.values())


@pytest.mark.parametrize("categories", [1, 13, 100, 400])
def test_kept_memory_is_below_its_bound(categories, device):
    """Batch 2 of 800 x 1344, 256 channels, a map a branch: under 15% of the student's maps, the regions included."""
    shapes, strides = [(100, 168), (50, 84), (25, 42), (13, 21), (7, 11)], [8, 16, 32, 64, 128]
    pool = [torch.empty(2, 256, h, w, device=device) for h, w in shapes]
    one = [x.uniform_(-1, 1).requires_grad_() for x in pool]  # one set of maps in all places: only sizes matter here
    maps = [one, [x.detach().requires_grad_() for x in one]]
    teacher = [x.detach() for x in one]
    boxes = torch.rand(categories, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([1300.0, 780.0])
    boxes = torch.cat([boxes, boxes + 20], 1).to(device)
    index, labels = torch.arange(categories, device=device) % 2, torch.arange(categories, device=device)

    def losses():
        regions = sk.Regions.from_boxes(
            boxes, labels, shapes, strides, num_classes=1203, batch_index=index, batch_size=2
        )
        return sk.sea_loss(maps[0], teacher, maps[1], teacher, regions)

    kept = kept_bytes(losses, [x for s in maps for x in s])
    assert kept < 0.15 * sum(x.numel() * 4 for s in maps for x in s)
