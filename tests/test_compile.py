"""torch.compile with fullgraph=True, and opcheck of every operator."""

import warnings

import pytest
import torch
import torch.compiler.config
from cases import BF16, CALLS, F16, F32, F64, make_boxes, make_inputs, make_maps, make_regions, upstream
from torch._dynamo.eval_frame import _debug_get_cache_entry_list

import sea_kernels as sk
from sea_kernels import ops

compiles = pytest.mark.compile
SHAPES, STRIDES = [(10, 14), (5, 7)], [16, 32]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of its compiler
        # inductor's cache on disk would hand out what it compiled for another version of an operator's fake
        with torch.compiler.config.patch(force_disable_caches=True):
            yield
    torch._dynamo.reset()


def compiled(f, backend="aot_eager", **options):
    return torch.compile(f, fullgraph=True, backend=backend, **options)


def graphs(f):
    """How many graphs of f there are."""
    return len(_debug_get_cache_entry_list(f.__code__))


def assert_same(f, g, arguments, leaves):
    """Values and gradients; the kernels are the same, so the bits are."""
    results = []
    for function in (f, g):
        outputs = function(*arguments)
        outputs = list(outputs) if isinstance(outputs, (list, tuple)) else [outputs]
        results.append([*outputs, *torch.autograd.grad(outputs, leaves, upstream(outputs), allow_unused=True)])
    for x, y in zip(*results):
        assert (x is None) == (y is None)
        if x is not None:
            torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7)


def all_losses(regions, inputs):
    """Every public function that gives a scalar or a tensor, in one graph."""
    parts = sk.sea_loss(inputs.cls, inputs.cls_teacher, inputs.box, inputs.box_teacher, regions)
    anchors = sk.anchor_pool(inputs.cls[0], regions)
    cosines = sk.anchor_cosine(inputs.cls[0], anchors, regions)
    return sum(parts) + sk.anchor_loss(inputs.cls, inputs.cls_teacher, regions) + sum(c.square().sum() for c in cosines)


def packed_regions(boxes, labels, index, sizes=None, **options):
    return sk.Regions.from_boxes(
        boxes,
        labels,
        SHAPES,
        STRIDES,
        num_classes=80,
        batch_index=index,
        batch_size=2,
        image_sizes=sizes,
        **options,
    )


@compiles
@pytest.mark.parametrize("name", CALLS)
def test_every_function(name, device):
    """One graph for other values, other boxes in the same number; student bfloat16, teacher float32."""
    f = lambda inputs, regions: CALLS[name](inputs, regions)  # noqa: E731
    fast = compiled(f)
    for seed in range(2):
        regions = make_regions(device, seed=seed)
        inputs = make_inputs(regions, 12, 8, 1, BF16, F32, seed, device).map(lambda x: x.requires_grad_())
        assert_same(f, fast, (inputs, regions), inputs.leaves())
    assert graphs(f) == 1


@compiles
@pytest.mark.parametrize("name", ["distance", "localization", "sea_loss"])
def test_options_and_sets(name, device):
    options = {
        "distance": {"temperature": 0.3, "detach_anchors": True},
        "localization": {"temperature": 3},
        "sea_loss": {"distance_on_box": True, "distance_temperature": 0.3, "localization_temperature": 2.0},
    }[name]
    f = lambda inputs, regions: CALLS[name](inputs, regions, **options)  # noqa: E731
    regions = make_regions(device)
    inputs = make_inputs(regions, 12, 8, 2, device=device).map(lambda x: x.requires_grad_())
    assert_same(f, compiled(f), (inputs, regions), inputs.leaves())


@compiles
@pytest.mark.parametrize("where", ["inside", "argument", "closure"])
def test_regions_inside_and_outside(where, device):
    """Packed boxes, image sizes as a tensor, ignore boxes; a graph serves all values."""
    inputs = make_inputs(packed_regions(*[x.to(device) for x in make_boxes(4)]), 12, 8, device=device)
    inputs = inputs.map(lambda x: x.requires_grad_())

    def build(seed):
        boxes, labels, index = (x.to(device) for x in make_boxes(4, seed=seed))
        sizes = torch.tensor([[150, 224], [160, 100 + seed]], device=device)
        ignore = {"ignore_boxes": boxes[2:] + seed, "ignore_batch_index": index[2:]}
        return boxes, labels, index, sizes, ignore

    closure = packed_regions(*build(0)[:4], **build(0)[4])
    f, prepare = {
        "inside": (lambda i, boxes, labels, index, sizes, ignore: all_losses(
            packed_regions(boxes, labels, index, sizes, **ignore), i), build),
        "argument": (lambda i, r: all_losses(r, i), lambda s: (packed_regions(*build(s)[:4], **build(s)[4]),)),
        "closure": (lambda i: all_losses(closure, i), lambda s: ()),
    }[where]  # fmt: skip
    fast = compiled(f)
    for seed in range(4):
        assert_same(f, fast, (inputs, *prepare(seed)), inputs.leaves())
    assert graphs(f) == 1


NUMBERS = [0, 1, 2, 15, 16, 40, 80, 81, 300]  # 16: the masks fill a word; 80: all categories
ORDERS = {"up": NUMBERS, "down": NUMBERS[::-1], "shuffled": NUMBERS[::2] + NUMBERS[1::2]}


@compiles
@pytest.mark.parametrize(("dynamic", "order"), [(None, "up"), (None, "down"), (None, "shuffled"), (True, "down")])
@pytest.mark.parametrize("where", ["inside", "argument"])
def test_three_graphs_for_all_numbers_of_packed_boxes(dynamic, where, order, device):
    """No box, one, and more: torch specialises 0 and 1. The number of categories and of words splits no graph.

    Left to itself, torch takes the first number of boxes for the only one: where that is above 1 it is one graph more.
    """
    fixed = packed_regions(*[x.to(device) for x in make_boxes(1)])
    inputs = make_inputs(fixed, 12, 9, device=device).map(lambda x: x.requires_grad_())

    def inside(i, boxes, labels, index):
        return list(sk.sea_loss(i.cls, i.cls_teacher, i.box, i.box_teacher, packed_regions(boxes, labels, index)))

    def outside(i, regions):
        return list(sk.sea_loss(i.cls, i.cls_teacher, i.box, i.box_teacher, regions))

    f = inside if where == "inside" else outside
    fast = compiled(f, dynamic=dynamic)
    for number in ORDERS[order]:
        boxes = [x.to(device) for x in make_boxes(number, num_classes=80, seed=number)]
        arguments = boxes if where == "inside" else [packed_regions(*boxes)]
        assert_same(f, fast, (inputs, *arguments), inputs.leaves()[:4])
    allowed = 4 if order == "down" and where == "inside" and not dynamic else 3
    assert graphs(f) <= allowed


@compiles
def test_marked_dynamic_boxes_give_one_graph(device):
    """torch.compile's way to say from the first call that the number of boxes changes."""
    inputs = make_inputs(packed_regions(*[x.to(device) for x in make_boxes(1)]), 12, 9, device=device)

    def f(boxes, labels, index):
        return all_losses(packed_regions(boxes, labels, index), inputs)

    fast = compiled(f)
    for number in (5, 2, 17, 79, 80, 81, 300):
        boxes = [x.to(device) for x in make_boxes(number, num_classes=80, seed=number)]
        for x in boxes:
            torch._dynamo.mark_dynamic(x, 0)
        torch.testing.assert_close(fast(*boxes), f(*boxes))
    assert graphs(f) == 1


@compiles
def test_lists_of_boxes(device):
    """The list form: a graph for each pattern of 0, 1 and more boxes an image, none for their values."""
    regions = make_regions(device, shapes=SHAPES, strides=STRIDES)
    inputs = make_inputs(regions, 12, 8, device=device).map(lambda x: x.requires_grad_())

    def f(i, boxes, labels):
        sizes = [(150, 224), (160, 200)]
        return all_losses(
            sk.Regions.from_boxes(boxes, labels, SHAPES, STRIDES, image_sizes=sizes, ignore_boxes=boxes), i
        )

    fast = compiled(f)
    for seed, counts in enumerate([(3, 4), (3, 4), (5, 2), (9, 6)]):
        boxes = [make_boxes(n, seed=seed + b)[0].to(device) for b, n in enumerate(counts)]
        labels = [make_boxes(n, seed=seed + b)[1].to(device) for b, n in enumerate(counts)]
        assert_same(f, fast, (inputs, boxes, labels), inputs.leaves())
    assert graphs(f) <= 2


@compiles
def test_dynamic_maps(device):
    """Other sizes of images: one graph with dynamic shapes, the regions built inside."""

    def f(student, teacher, boxes, labels, index):
        regions = sk.Regions.from_boxes(
            boxes, labels, [x.shape[2:] for x in student], STRIDES, batch_index=index, batch_size=student[0].shape[0]
        )
        return list(sk.sea_loss(student, teacher, student, teacher, regions))

    fast = compiled(f, dynamic=True)
    boxes = [x.to(device) for x in make_boxes(17)]
    for batch, h, w in (
        (3, 16, 10),
        (3, 12, 28),
        (5, 20, 14),
    ):  # equal sizes of the first call stay equal
        shapes = [(h, w), (h // 2, w // 2)]
        student = [x.requires_grad_() for x in make_maps(shapes, batch, 13, 1, device=device)]
        teacher = make_maps(shapes, batch, 13, 2, device=device)
        assert_same(f, fast, (student, teacher, *boxes), student)
    assert graphs(f) == 1


@compiles
def test_inductor(device):
    """The default compiler on a step as it is trained: a layer, regions inside, the loss, backward."""
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(8, 12, 3, padding=1).to(device)
    boxes = [x.to(device) for x in make_boxes(5)]
    x, teacher = make_maps(SHAPES, 2, 8, device=device), make_maps(SHAPES, 2, 12, 1, device=device)

    def f(x, teacher, boxes, labels, index):
        student = [layer(y) for y in x]
        losses = sk.sea_loss(student, teacher, student, teacher, packed_regions(boxes, labels, index))
        return losses.anchor + 2 * losses.distance + 3 * losses.localization

    fast = compiled(f, "inductor")
    for seed in range(2):
        boxes = [y.to(device) for y in make_boxes(5, seed=seed)]
        values = f(x, teacher, *boxes), fast(x, teacher, *boxes)
        torch.testing.assert_close(*values, rtol=1e-4, atol=1e-5)
        for g, w in zip(*(torch.autograd.grad(v, list(layer.parameters())) for v in values)):
            torch.testing.assert_close(g, w, rtol=1e-3, atol=1e-4)


@compiles
def test_changing_the_backend_compiles_once_more(device):
    regions = make_regions(device)
    inputs = make_inputs(regions, 12, 8, device=device).map(lambda x: x.requires_grad_())
    f = lambda i, r: CALLS["sea_loss"](i, r)  # noqa: E731
    fast = compiled(f)
    for backend in ("native", "reference", "native", "reference"):
        with sk.backend(backend):
            outputs = fast(inputs, regions)
            torch.autograd.grad(sum(outputs), inputs.leaves()[:6])
            for x, y in zip(outputs, f(inputs, regions)):
                torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)
    assert graphs(f) == 2


@compiles
@pytest.mark.parametrize("name", CALLS)
def test_second_derivatives_are_refused(name, device):
    """Compiled code refuses too: torch itself, or our backward."""
    regions = make_regions(device)
    inputs = make_inputs(regions, 12, 8, device=device).map(lambda x: x.requires_grad_())
    outputs = compiled(lambda i, r: CALLS[name](i, r))(inputs, regions)
    with pytest.raises(RuntimeError, match=r"second derivative|double backward|create_graph"):
        gradients = torch.autograd.grad(
            sum(x.sum() for x in outputs), inputs.leaves(), create_graph=True, allow_unused=True
        )
        torch.autograd.grad(
            sum(x.square().sum() for x in gradients if x is not None), inputs.leaves(), allow_unused=True
        )


@compiles
def test_bad_values_are_refused_in_compiled_code(device):
    """The ValueError of the operator's Python entry arrives as it is."""
    if device != "cpu":
        return  # values on a GPU are not looked at

    def f(boxes, labels, index):
        return packed_regions(boxes, labels, index).area

    fast = compiled(f)
    boxes, labels, index = make_boxes(4)
    fast(boxes, labels, index)
    with pytest.raises(ValueError, match=r"labels\[2\] is 80; expected -1 <= label < 80"):
        fast(boxes, torch.tensor([0, 1, 80, 2]), index)
    boxes[1, 2] = float("nan")
    with pytest.raises(ValueError, match=r"boxes\[1\] is .*nan"):
        fast(boxes, labels, index)


# ------------------------------------------------------------------------------------------------------------ opcheck

REGIONS = {
    "boxes": lambda device: make_regions(device, 4),
    "no box": lambda device: make_regions(device, 0),
    "one box": lambda device: make_regions(device, 1, levels=1, num_classes=1),
    "many": lambda device: make_regions(device, 40, levels=2, num_classes=80),
}


def check(name, *arguments, values=True):
    """values=False: not the values, where a part of the results is never written."""
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    operator = getattr(torch.ops.sea_kernels, name).default
    torch.library.opcheck(operator, arguments, test_utils=tests[: None if values else 3])


def region_arguments(device, number, listed, dtype=F32):
    boxes, labels, index = (x.to(device) for x in make_boxes(number, dtype=dtype))
    rows = (boxes, labels, None, [number, 0]) if listed else (boxes, labels, index, [])
    ignore = (boxes[:1], None, [1 if number else 0, 0]) if listed else (boxes[:1], index[:1], [])
    sizes = (None, [150, 220, 160, 224]) if listed else (torch.tensor([[9, 9], [8, 8]], device=device), [])
    return (*rows, *ignore, *sizes, 2, [10, 14, 5, 7], [16.0, 16.0, 32.0, 30.5], 80, 0.5)


@compiles
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("listed", [True, False], ids=["list", "packed"])
@pytest.mark.parametrize("number", [0, 1, 5, 90])
def test_opcheck_regions(number, listed, dtype, device):
    arguments = region_arguments(device, number, listed, dtype)
    check("regions", *arguments, False)
    check("rasterize", *arguments, None)
    check("rasterize", *arguments, torch.arange(80, device=device) % 7 == 3)


@compiles
@pytest.mark.parametrize(
    ("layout", "dtype"),
    [("contiguous", F64), ("contiguous", BF16), ("channels_last", F32), ("sliced", BF16), ("expanded", F64)],
    ids=str,
)
def test_opcheck_layouts(layout, dtype, device):
    regions = make_regions(device, 4, levels=2)
    check_operators(make_inputs(regions, 12, 8, dtype=dtype, device=device).layout(layout), regions)


@compiles
@pytest.mark.parametrize("kind", REGIONS)
def test_opcheck_regions_given(kind, device):
    regions = REGIONS[kind](device)
    check_operators(make_inputs(regions, 70, 8, dtype=F16, teacher_dtype=F32, device=device), regions)


def check_operators(inputs, regions):
    tensors, features, anchors = regions.tensors(), inputs.cls[0], inputs.anchors
    one = torch.ones((), dtype=anchors.dtype, device=anchors.device)
    check("anchor_pool", features, tensors)
    check("anchor_pool_backward", anchors, features, tensors)
    check("anchor_cosine", features, anchors, tensors)
    cosines = torch.ops.sea_kernels.anchor_cosine(features, anchors, tensors)
    check("anchor_cosine_backward", cosines, features, anchors, tensors)
    student, teacher = features + inputs.box[0], inputs.cls_teacher[0] + inputs.box_teacher[0]
    masks, losses = tensors[1].shape[1], [3, 5]

    def sizes(losses, detach=False, share=ops.SAVED_SHARE):
        return ops.saved_elements(student, teacher, losses, masks, detach, share)

    for flags, softmax in ((losses, sizes(losses)[2]), ([3, 4], sizes([3, 4])[2]), (losses, 0)):
        elements = ops.anchor_elements(student, flags, masks)
        check("sea_loss_pool", student, teacher, flags, tensors, 2.0, elements, softmax)
    elements = ops.anchor_elements(student, losses, masks), sizes(losses)[2]
    apart = torch.ops.sea_kernels.sea_loss_pool(student, teacher, losses, tensors, 2.0, *elements)
    check("sea_loss", student, teacher, losses, tensors, 0.1, 1.0, 0, 0, 0)
    check("sea_loss_compare", student, teacher, losses, tensors, apart[0], 0.1, 0, 0)
    for detach in (False, True):
        for share in ((0, 1), (1000, 1)):
            elements = sizes(losses, detach, share)
            options = (student, teacher, losses, tensors, 0.1, 1.0, *elements)
            check("sea_loss", *options, values=False)
            saved = torch.ops.sea_kernels.sea_loss(*options)[3]
            for grads in ((one, one, one), (None, one, None)):
                check("sea_loss_backward", *grads, student, teacher, losses, tensors, saved, 0.1, 1.0)
            compared = (student, teacher, losses, tensors, apart[0], 0.1, *elements[:2])
            check("sea_loss_compare", *compared, values=False)
            saved = [*torch.ops.sea_kernels.sea_loss_compare(*compared)[2:], apart[2], apart[0]]
            check("sea_loss_backward", one, one, one, student, teacher, losses, tensors, saved, 0.1, 2.0)


@compiles
def test_opcheck_localization_without_regions(device):
    """And of one set alone."""
    student, teacher = make_maps(SHAPES, 2, 8, 1, BF16, device), make_maps(SHAPES, 2, 8, 2, F32, device)
    one = torch.ones((), device=device)
    maps = (student, teacher, [ops.LOCALIZATION], [])
    sizes = ops.saved_elements(*maps[:3], 0, False)
    for saved in (sizes, (0, 0, 0)):
        check("sea_loss", *maps, 0.1, 2.0, *saved)
    saved = torch.ops.sea_kernels.sea_loss(*maps, 0.1, 2.0, *sizes)[3]
    check("sea_loss_backward", None, None, one, *maps, saved, 0.1, 2.0)


def test_every_operator_has_a_kernel_and_a_fake(device):
    for name in ops.OPERATORS:
        assert ops.has_kernel(name, device.upper()), name
        if name != "build_info":
            fake = torch._library.simple_registry.singleton.find(f"sea_kernels::{name}").fake_impl.kernel
            assert fake is not None, name
