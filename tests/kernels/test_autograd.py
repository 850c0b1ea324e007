"""What the kernels save for backward and compute again, which changes of a map they notice, and what they refuse."""

from dataclasses import replace

import pytest
import torch
from cases import CALLS, VARIANTS, make_inputs, make_maps, make_regions, upstream
from cases import run as gradients_of

import sea_kernels as sk
from sea_kernels.native import saved as sizes_of_saved
from sea_kernels.native.library import run


@pytest.mark.cpu_kernels
def test_saved_and_recomputed_gradients_agree():
    """What is not saved is computed again: the operator's own gradients agree to the last bits."""
    regions = make_regions(number=6)
    inputs = make_inputs(regions, 40, 24)
    student, teacher = (
        list(s[0] + b[0]) for s, b in ((inputs.cls, inputs.box), (inputs.cls_teacher, inputs.box_teacher))
    )
    tensors, losses, one, temperatures = regions.tensors(), [3, 7], torch.ones(()), (0.1, 1.0)
    gradients = []
    for share in ((0, 1), (1000, 1)):
        sizes = sizes_of_saved.elements(student, teacher, losses, regions.area.shape[1], False, share)
        *_, saved = torch.ops.sea_kernels.sea_loss(student, teacher, losses, tensors, *temperatures, *sizes)
        assert (saved[0].numel() > 0) == (share[0] > 0)
        gradients.append(
            torch.ops.sea_kernels.sea_loss_backward(
                one, one, one, student, teacher, losses, tensors, saved, *temperatures
            )
        )
    for x, y in zip(*gradients):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6 * x.abs().max().item())


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


def test_backward_may_run_twice_through_one_graph(device):
    """With retain_graph the same gradients again; without it torch's own error."""
    regions = make_regions(device)
    inputs = make_inputs(regions, device=device).map(lambda x: x.requires_grad_())
    loss = sum(CALLS["sea_loss"](inputs, regions))
    first = torch.autograd.grad(loss, inputs.cls[0], retain_graph=True)
    for x, y in zip(first, torch.autograd.grad(loss, inputs.cls[0])):
        assert torch.equal(x, y)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, inputs.cls[0])


@pytest.mark.cpu_kernels
def test_an_operator_without_memory_raises_the_error_of_torch():
    regions = make_regions(levels=1).tensors()
    huge = torch.zeros(1).expand(2**20, 2**20, 64, 64)
    with pytest.raises(torch.OutOfMemoryError, match=f"sea_kernels: cannot allocate {2**54} bytes"):
        run("anchor_pool_backward", torch.zeros(1, 13, 2**20), [huge], regions)


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


# ------------------------------------------------------------------------------------------------------- saved memory


def saved_bytes(f, inputs):
    """Bytes that live from forward to backward and were not there before."""
    before = {x.untyped_storage().data_ptr() for x in inputs}
    saved = {}

    def pack(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in before:
            saved[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        outputs = f()
    assert any(x.requires_grad for x in outputs)
    return sum(saved.values())


@pytest.mark.parametrize("categories", [1, 13, 100, 400])
def test_saved_memory_is_below_15_percent_of_the_maps(categories, device):
    """Batch 2 of 800 x 1344, 256 channels, a map a branch: under 15% of the student's maps, the regions included.

    CUDA keeps the unit anchors too: with 400 categories in two images, 30%.
    """
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

    saved = saved_bytes(losses, [x for s in maps for x in s])
    most = 0.3 if device == "cuda" and categories == 400 else 0.15
    assert saved < most * sum(x.numel() * 4 for s in maps for x in s)


# ---------------------------------------------------------------------------------------------------------- torch.func


def scalar(variant, inputs, regions):
    """The weighted sum of its outputs as a function of the first map of the first branch that it has."""
    call, options = VARIANTS[variant]
    branch = "box" if variant.startswith("localization") else "cls"
    (first, *maps), *sets = getattr(inputs, branch)

    def f(x):
        outputs = call(replace(inputs, **{branch: [[x, *maps], *sets]}), regions, **options)
        return sum((x * y).sum() for x, y in zip(outputs, upstream(outputs)))

    return f, first


@pytest.mark.parametrize("teacher", ["plain", "inference"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_torch_func_gives_the_same_gradients(variant, teacher, device):
    regions = make_regions(device)
    inputs = make_inputs(regions, device=device)
    outputs, gradients = gradients_of(variant, inputs, regions)
    if teacher == "inference":
        with torch.inference_mode():
            inputs.cls_teacher = [[x.clone() for x in maps] for maps in inputs.cls_teacher]
            inputs.box_teacher = [[x.clone() for x in maps] for maps in inputs.box_teacher]
    f, x = scalar(variant, inputs, regions)
    wanted = gradients[len(inputs.cls_teacher[0]) if variant.startswith("localization") else 0]
    value, pull = torch.func.vjp(f, x)
    torch.testing.assert_close(value, sum((x * y).sum() for x, y in zip(outputs, upstream(outputs))))
    for gradient in (torch.func.grad(f)(x), *pull(torch.ones_like(value))):
        assert torch.equal(gradient, wanted)
    if variant == "anchor_cosine":
        of_anchors = torch.func.grad(lambda a: scalar(variant, replace(inputs, anchors=a), regions)[0](x))
        assert torch.equal(of_anchors(inputs.anchors), gradients[-1])


def test_torch_func_of_a_module(device):
    """functional_call with parameters; the same as backward()."""
    regions = make_regions(device)
    inputs = make_inputs(regions, 8, 8, device=device)
    layer = torch.nn.Conv2d(8, 8, 1).to(device)

    def loss(parameters):
        maps = [torch.func.functional_call(layer, parameters, (x,)) for x in inputs.cls[0]]
        return sum(CALLS["sea_loss"](replace(inputs, cls=[maps]), regions))

    parameters = dict(layer.named_parameters())
    loss(parameters).backward()
    for name, gradient in torch.func.grad(loss)({k: x.detach() for k, x in parameters.items()}).items():
        assert torch.equal(gradient, parameters[name].grad), name


@pytest.mark.parametrize("variant", CALLS)
def test_torch_func_refuses_what_has_no_formula(variant, device):
    """Second derivatives, also of a sum of which another term has one; forward mode; vmap."""
    regions = make_regions(device)
    f, x = scalar(variant, make_inputs(regions, device=device), regions)
    grad, refused = torch.func.grad, "has no second derivative: its gradient cannot be differentiated"
    leaf = x.clone().requires_grad_()
    for second in (
        lambda: grad(lambda y: grad(f)(y).sum())(x),
        lambda: grad(lambda y: grad(lambda z: f(z) + z.pow(3).sum())(y).sum())(x),
        lambda: torch.autograd.grad(grad(f)(leaf).sum(), leaf),
        lambda: torch.autograd.grad(torch.func.vjp(f, leaf)[1](torch.ones((), device=device))[0].sum(), leaf),
    ):
        with pytest.raises(RuntimeError, match=refused):
            second()
    for transformed, message in (
        (lambda: torch.func.hessian(f)(x), "vmap"),
        (lambda: torch.func.vmap(f)(x[None]), "vmap"),
        (lambda: torch.func.vmap(grad(f))(x[None]), "vmap"),
        (lambda: torch.func.jvp(f, (x,), (x,)), "jvp"),
    ):
        with pytest.raises(RuntimeError, match=message):
            transformed()
