"""torch.compile with fullgraph=True: how many graphs there are, and that they compute the same."""

import warnings

import pytest
import torch
import torch._functorch.config
import torch._inductor.config
from cases import BF16, CALLS, F32, make_boxes, make_inputs, make_maps, make_regions, upstream
from torch._dynamo.eval_frame import _debug_get_cache_entry_list

import sea_kernels as sk

pytestmark = pytest.mark.compile
SHAPES, STRIDES = [(10, 14), (5, 7)], [16, 32]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of its compiler
        # Caches on disk would hand out what was compiled for another version of an operator's fake. That of C++ serves:
        # it goes by the source.
        graphs = torch._inductor.config.patch(fx_graph_cache=False)
        with graphs, torch._functorch.config.patch(enable_autograd_cache=False):
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


def box_losses(regions, inputs):
    """The three losses alone, also on box maps: of the reference, a graph of all functions takes long to compile."""
    return list(
        sk.sea_loss(inputs.cls, inputs.cls_teacher, inputs.box, inputs.box_teacher, regions, distance_on_box=True)
    )


def anchor_loss(regions, inputs):
    return [sk.anchor_loss(inputs.cls, inputs.cls_teacher, regions)]


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


@pytest.mark.parametrize("name", CALLS)
def test_every_function_is_one_graph(name, device):
    """One graph for other values, other boxes in the same number; student bfloat16, teacher float32."""
    f = lambda inputs, regions: CALLS[name](inputs, regions)  # noqa: E731
    fast = compiled(f)
    for seed in range(2):
        regions = make_regions(device, seed=seed)
        inputs = make_inputs(regions, 12, 8, 1, BF16, F32, seed, device).map(lambda x: x.requires_grad_())
        assert_same(f, fast, (inputs, regions), inputs.leaves())
    assert graphs(f) == 1


@pytest.mark.parametrize("name", ["distance", "localization", "sea_loss"])
def test_options_and_several_sets_are_traced(name, device):
    options = {
        "distance": {"temperature": 0.3, "detach_anchors": True},
        "localization": {"temperature": 3},
        "sea_loss": {"distance_on_box": True, "distance_temperature": 0.3, "localization_temperature": 2.0},
    }[name]
    f = lambda inputs, regions: CALLS[name](inputs, regions, **options)  # noqa: E731
    regions = make_regions(device)
    inputs = make_inputs(regions, 12, 8, 2, device=device).map(lambda x: x.requires_grad_())
    assert_same(f, compiled(f), (inputs, regions), inputs.leaves())


@pytest.mark.parametrize("name", ["anchor_loss", "distance", "localization", "sea_loss"])
def test_channels_that_differ_from_level_to_level_are_one_graph(name, backend, device):
    """With one word of masks and with two. Beyond these numbers of boxes the CPU saves other tables: another graph."""
    f = lambda inputs, regions: CALLS[name](inputs, regions)  # noqa: E731
    fast = compiled(f)
    for number in (15, 17) if backend == "native" else (15,):
        regions = make_regions(device, number, num_classes=40)
        inputs = make_inputs(regions, [12, 8, 8], [8, 8, 5], 1, BF16, F32, device=device)
        inputs = inputs.map(lambda x: x.requires_grad_())
        inputs.anchors = None
        leaves = [x for maps in inputs.cls + inputs.box for x in maps]
        assert_same(f, fast, (inputs, regions), leaves)
    assert graphs(f) == 1


@pytest.mark.parametrize("where", ["inside", "argument", "closure"])
def test_regions_inside_as_argument_and_in_a_closure(where, backend, device):
    """Packed boxes, image sizes as a tensor, ignore boxes; a graph serves all values, a second one other numbers."""
    inputs = make_inputs(packed_regions(*[x.to(device) for x in make_boxes(4)]), 12, 8, device=device)
    inputs = inputs.map(lambda x: x.requires_grad_())

    def build(seed, number=4):
        boxes, labels, index = (x.to(device) for x in make_boxes(number, seed=seed))
        sizes = torch.tensor([[150, 224], [160, 100 + seed]], device=device)
        ignore = {"ignore_boxes": boxes[2:] + seed, "ignore_batch_index": index[2:]}
        return boxes, labels, index, sizes, ignore

    closure = packed_regions(*build(0)[:4], **build(0)[4])
    losses = all_losses if backend == "native" else box_losses if where == "inside" else anchor_loss
    f, prepare = {
        "inside": (lambda i, boxes, labels, index, sizes, ignore: losses(
            packed_regions(boxes, labels, index, sizes, **ignore), i), build),
        "argument": (lambda i, r: losses(r, i), lambda *a: (packed_regions(*build(*a)[:4], **build(*a)[4]),)),
        "closure": (lambda i: losses(closure, i), lambda *a: ()),
    }[where]  # fmt: skip
    fast = compiled(f)
    for seed in range(3):
        assert_same(f, fast, (inputs, *prepare(seed)), inputs.leaves())
    assert graphs(f) == 1
    for number in (7, 9, 12):
        assert_same(f, fast, (inputs, *prepare(number, number)), inputs.leaves())
    assert graphs(f) <= 2


NUMBERS = [0, 1, 2, 15, 16, 40, 80, 81, 300]  # 16: the masks fill a word; 80: all categories
ORDERS = {"up": NUMBERS, "down": NUMBERS[::-1], "shuffled": NUMBERS[::2] + NUMBERS[1::2]}


@pytest.mark.parametrize(("dynamic", "order"), [(None, "up"), (None, "down"), (None, "shuffled"), (True, "down")])
@pytest.mark.parametrize("where", ["inside", "argument"])
def test_three_graphs_serve_all_numbers_of_packed_boxes(dynamic, where, order, device):
    """No box, one, and more: torch specializes 0 and 1. The number of categories and of words splits no graph.

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


def test_two_graphs_serve_lists_of_boxes(device):
    """The list form: a graph for each pattern of 0, 1 and more boxes an image, none for their values."""
    regions = make_regions(device, shapes=SHAPES, strides=STRIDES)
    inputs = make_inputs(regions, 12, 8, device=device).map(lambda x: x.requires_grad_())

    def f(i, boxes, labels):
        sizes = [(150, 224), (160, 200)]
        return box_losses(
            sk.Regions.from_boxes(boxes, labels, SHAPES, STRIDES, image_sizes=sizes, ignore_boxes=boxes), i
        )

    fast = compiled(f)
    for seed, counts in enumerate([(3, 4), (3, 4), (5, 2), (9, 6)]):
        boxes = [make_boxes(n, seed=seed + b)[0].to(device) for b, n in enumerate(counts)]
        labels = [make_boxes(n, seed=seed + b)[1].to(device) for b, n in enumerate(counts)]
        assert_same(f, fast, (inputs, boxes, labels), inputs.leaves())
    assert graphs(f) <= 2


@pytest.mark.parametrize("sizes", ["list", "equal", "tensor"])
def test_relative_boxes_take_no_more_graphs(sizes, device):
    """Lists and packed ones, of any number, on images whose sizes are a list or a tensor."""
    given = {"list": [(150, 224), (160, 200)], "equal": [(160, 224)] * 2}.get(
        sizes, torch.tensor([[150, 224], [160, 200]])
    )
    given = given.to(device) if sizes == "tensor" else given
    form = {"normalized": True, "box_format": "cxcywh", "image_sizes": given}

    def packed(boxes, labels, index):
        return sk.Regions.from_boxes(boxes, labels, SHAPES, STRIDES, batch_index=index, batch_size=2, **form).tensors()

    def lists(boxes, labels):
        return sk.Regions.from_boxes(boxes, labels, SHAPES, STRIDES, **form).tensors()

    fast_packed, fast_lists = compiled(packed), compiled(lists)
    for seed, count in enumerate([3, 5, 9]):
        boxes, labels, index = (x.to(device) for x in make_boxes(count, seed=seed))
        boxes = boxes / 300
        for x, y in zip(fast_packed(boxes, labels, index), packed(boxes, labels, index)):
            assert torch.equal(x, y)
        cut = [boxes[:2], boxes[2:]], [labels[:2], labels[2:]]
        for x, y in zip(fast_lists(*cut), lists(*cut)):
            assert torch.equal(x, y)
    assert graphs(packed) <= 2 and graphs(lists) <= 3


def test_one_graph_serves_maps_of_all_sizes(backend, device):
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


def test_a_training_step_by_inductor(device):
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


def test_regions_of_masks_may_be_built_inside(backend, device):
    masks = [torch.rand(n, 40, 56, generator=torch.Generator().manual_seed(n)).to(device) < 0.02 for n in (2, 3)]
    labels = [torch.tensor([3, 1], device=device), torch.tensor([0, 3, 4], device=device)]
    maps = make_maps([(5, 7), (3, 4)], device=device)

    def f(masks, labels, maps):
        options = {"num_classes": 5, "image_sizes": [(40, 56), (33, 56)]}
        regions = sk.Regions.from_masks(masks, labels, [(5, 7), (3, 4)], [8, 16], **options)
        return [sk.anchor_pool(maps, regions), *regions.tensors()]

    for x, y in zip(compiled(f)(masks, labels, maps), f(masks, labels, maps)):
        assert torch.equal(x, y)


def test_regions_of_the_reference_by_inductor_are_the_same_bit_for_bit(device):
    """By the code that inductor writes, with strides whose reciprocals are not exact."""

    def f(boxes, labels, index):
        options = {"batch_index": index, "batch_size": 2, "image_sizes": [(47, 61), (33, 64)]}
        regions = sk.Regions.from_boxes(boxes, labels, [(7, 9), (4, 5)], [(6.9, 7.3), 13.3], num_classes=5, **options)
        return regions.tensors()

    fast = compiled(f, "inductor")
    with sk.backend("reference"):
        for seed in range(3):
            boxes, labels, index = (x.to(device) for x in make_boxes(8, size=(60, 60), seed=seed))
            boxes[:4] = boxes[:4].div(7.3).round() * 7.3  # on and beside the borders of pixels
            for x, y in zip(fast(boxes, labels, index), f(boxes, labels, index)):
                assert torch.equal(x, y)


def test_changing_the_backend_compiles_once_more(device):
    regions = make_regions(device)
    inputs = make_inputs(regions, 12, 8, device=device).map(lambda x: x.requires_grad_())
    f = lambda i, r: anchor_loss(r, i)  # noqa: E731
    fast = compiled(f)
    for backend in ("native", "reference", "native", "reference"):
        with sk.backend(backend):
            outputs = fast(inputs, regions)
            torch.autograd.grad(sum(outputs), inputs.leaves()[:3])
            for x, y in zip(outputs, f(inputs, regions)):
                torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)
    assert graphs(f) == 2


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
