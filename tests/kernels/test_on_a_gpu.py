"""What only a GPU can show: streams, graphs, launches, synchronization, alignment, two devices, sizes past 2^31."""

from functools import partial
from pathlib import Path

import programs
import pytest
import torch
from cases import BF16, CUDA, F32, NO_CUDA, VARIANTS, make_boxes, make_inputs, make_maps, make_regions, run

import sea_kernels as sk

pytestmark = pytest.mark.skipif(not CUDA, reason=NO_CUDA)

ROOT = Path(__file__).parents[2]
SHAPES, STRIDES = [(20, 28), (10, 14), (5, 7)], [8, 16, 32]


def equal(xs, ys):
    return all((x is None and y is None) or torch.equal(x, y) for x, y in zip(xs, ys))


def losses(boxes, labels, index, inputs):
    """From packed boxes to the losses."""
    regions = sk.Regions.from_boxes(
        boxes,
        labels,
        SHAPES,
        STRIDES,
        num_classes=80,
        batch_index=index,
        batch_size=2,
        image_sizes=[(160, 224), (150, 180)],
        ignore_boxes=boxes[:1] + 20,
        ignore_batch_index=index[:1],
    )
    return sk.sea_loss(inputs.cls, inputs.cls_teacher, inputs.box, inputs.box_teacher, regions)


def step(boxes, labels, index, inputs, losses=losses):
    """From packed boxes to the gradients: what is done in one step of training."""
    parts = losses(boxes, labels, index, inputs)
    return [*parts, *torch.autograd.grad(sum(parts), inputs.leaves()[:6])]


def tensors(inputs):
    out = []
    inputs.map(out.append)
    return out


def padded_boxes(number, seed=0, room=40):
    """Packed boxes, padded by label -1 to a fixed number."""
    boxes, labels, index = make_boxes(room, num_classes=80, seed=seed)
    labels[number:] = -1
    return boxes.cuda(), labels.cuda(), index.cuda()


def leaves(dtype=F32, seed=0):
    regions = make_regions("cuda")
    return make_inputs(regions, dtype=dtype, device="cuda", seed=seed).map(lambda x: x.requires_grad_())


def test_cpu_and_gpu_agree():
    inputs, regions = leaves(), make_regions("cuda")
    for variant in VARIANTS:
        (outputs, gradients), (wanted, wanted_gradients) = (
            run(variant, inputs.map(lambda x: x.to(d)), make_regions(d))  # noqa: B023
            for d in ("cuda", "cpu")
        )
        for x, y in zip([*outputs, *gradients], [*wanted, *wanted_gradients]):
            if y is not None:
                torch.testing.assert_close(x.cpu(), y, rtol=1e-3, atol=1e-4 * max(y.abs().max().item(), 1e-3))
    for x, y in zip(regions.tensors(), make_regions("cpu").tensors()):
        assert torch.equal(x.cpu(), y)


def test_a_side_stream_is_used_and_waited_for():
    """Everything runs on the current stream: work that is late there is waited for, and by nobody else."""
    boxes, inputs = padded_boxes(20), leaves()
    wanted = step(*boxes, inputs)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    dirty = inputs.map(lambda x: torch.full_like(x, float("nan")).requires_grad_())
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        with torch.no_grad():
            for x, y in zip(tensors(dirty), tensors(inputs)):
                x.copy_(y)
        got = step(*boxes, dirty)
    stream.synchronize()
    assert equal(got, wanted)


def test_a_captured_graph_serves_other_boxes_and_maps():
    """One captured graph, boxes included, serves every step: other boxes, other numbers of them, other maps."""
    boxes, inputs = padded_boxes(20), leaves()
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for _ in range(2):
            step(*boxes, inputs)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = step(*boxes, inputs)
    for number, seed in ((20, 0), (3, 1), (40, 2), (0, 3)):
        fresh, other = padded_boxes(number, seed), leaves(seed=seed)
        wanted = step(*fresh, other)
        with torch.no_grad():
            for x, y in zip(boxes, fresh):
                x.copy_(y)
            for x, y in zip(tensors(inputs), tensors(other)):
                x.copy_(y)
        graph.replay()
        torch.cuda.synchronize()
        assert equal(captured, wanted)


def test_lists_of_boxes_in_a_captured_graph():
    """Sizes and numbers of boxes lie in the graph by value; long lists take more than one launch."""
    images = 300
    boxes = [make_boxes(b % 7, seed=b)[0].cuda() for b in range(images)]
    labels = [make_boxes(b % 7, seed=b)[1].cuda() for b in range(images)]
    sizes = [(150 + b % 10, 224 - b % 50) for b in range(images)]

    def build(device):
        rows, numbers = ([x.to(device) for x in xs] for xs in (boxes, labels))
        regions = sk.Regions.from_boxes(rows, numbers, SHAPES, STRIDES, image_sizes=sizes, ignore_boxes=rows[::-1])
        return regions.tensors()

    for x, y in zip(build("cuda"), build("cpu")):
        assert torch.equal(x.cpu(), y)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = build("cuda")
    for x in boxes:
        x += 11
    graph.replay()
    for x, y in zip(captured, build("cpu")):
        assert torch.equal(x.cpu(), y)


def test_a_step_does_not_synchronize():
    """Nothing in a step waits for the device by torch's doing; lists of sizes and boxes included."""
    boxes, inputs = padded_boxes(20), leaves()
    lists = [b.cuda() for b in make_boxes(20)[0].split(10)], [c.cuda() for c in make_boxes(20)[1].split(10)]
    step(*boxes, inputs)
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(*boxes, inputs)
        sk.Regions.from_boxes(*lists, SHAPES, STRIDES, image_sizes=[(160, 224), (150, 180)])
        with sk.backend("reference"):
            step(*boxes, inputs)
        with pytest.raises(RuntimeError, match="synchroniz"):
            sk.Regions.from_boxes(*lists, SHAPES, STRIDES, validate=True)
    finally:
        torch.cuda.set_sync_debug_mode(before)


def test_a_step_has_at_most_15_launches(monkeypatch):
    """As FCOS is trained, from packed boxes to gradients: at most 15 kernels, fills and copies, and nobody waits."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import measure
    import steps
    import workloads

    workload = workloads.WORKLOADS["W1"]
    (x,) = workloads.make_inputs(workload, workload.choose_boxes(), torch.device("cuda"), 1)
    train = steps.training_step(partial(steps.sea_losses, workload))
    train(x, lambda: None)
    launches, synchronizations = measure.cuda_calls(train, x)
    assert 3 <= launches <= 15 and synchronizations == 0


@pytest.mark.compile
def test_torch_compile_captures_cuda_graphs():
    """mode="reduce-overhead": regions, losses and backward are captured and replayed for other boxes and maps."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    fast = torch.compile(losses, fullgraph=True, mode="reduce-overhead")
    inputs = leaves()
    for seed in range(6):  # the first two runs warm up and capture
        boxes = padded_boxes(7 * seed, seed)
        with torch.no_grad():
            for x, y in zip(tensors(inputs), tensors(leaves(seed=seed))):
                x.copy_(y)
        torch.compiler.cudagraph_mark_step_begin()
        got = [x.clone() for x in step(*boxes, inputs, fast)]
        for x, y in zip(got, step(*boxes, inputs)):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-7)
    assert counters["inductor"]["cudagraph_skips"] == 0
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_same_bits_in_every_run(layout, dtype):
    """Many blocks, few categories and many, while other work takes multiprocessors away."""
    shapes, strides = [(100, 168), (50, 84), (13, 21)], [8, 16, 64]
    other, stream = torch.ones(2000, 2000, device="cuda"), torch.cuda.Stream()
    for number in (5, 200):
        regions = make_regions("cuda", number, shapes=shapes, strides=strides, num_classes=80)
        inputs = make_inputs(regions, 256, 64, sets=2, dtype=dtype, device="cuda").layout(layout)
        first = None
        for k in range(5):
            with torch.cuda.stream(stream):
                for _ in range(3 * k):
                    other @ other
            outputs, gradients = run("sea_loss, everything", inputs, regions)
            first = first or [*outputs, *gradients]
            assert equal(first, [*outputs, *gradients])


def test_a_failed_launch_is_an_exception():
    """In a process of its own: a device that has failed once refuses every launch."""
    code = """
import torch, cases
import sea_kernels as sk
regions = cases.make_regions("cuda")
maps = cases.make_maps(regions.level_shapes, device="cuda")
sk.anchor_pool(maps, regions)
torch._assert_async(torch.zeros((), device="cuda"))
try:
    torch.cuda.synchronize()
except RuntimeError:
    print("the device has failed", flush=True)
try:
    sk.anchor_pool(maps, regions)
except RuntimeError as error:
    print("RuntimeError:", error, flush=True)
"""
    done = programs.run("-c", code, cwd=Path(__file__).parents[1])
    assert done.stdout.startswith("the device has failed\nRuntimeError: "), done.stdout + done.stderr


@pytest.mark.parametrize("dtype", [F32, BF16, torch.float16], ids=str)
@pytest.mark.parametrize("offset", [1, 2, 3, 5, 7])
def test_views_that_are_not_aligned(offset, dtype):
    """Contiguous, but not at an address that is a multiple of 16 bytes."""
    regions = make_regions("cuda")
    inputs = make_inputs(regions, dtype=dtype, device="cuda")

    def move(x):
        return x.new_full((x.numel() + offset,), float("nan"))[offset:].view(x.shape).copy_(x)

    for variant in VARIANTS:
        (outputs, gradients), (wanted, wanted_gradients) = (
            run(variant, i, regions) for i in (inputs.map(move), inputs)
        )
        for x, y in zip([*outputs, *gradients], [*wanted, *wanted_gradients]):
            if y is not None:
                torch.testing.assert_close(x, y, rtol=1e-2 if x.dtype != F32 else 1e-4, atol=1e-5)


def large(channels, side):
    """A map of more than 2^31 elements, zero but for its last 8 x 8 pixels, and the regions of a box around these."""
    if torch.cuda.mem_get_info()[0] < 30 * 2**30:
        pytest.skip("less than 30 GiB of free GPU memory")
    x = torch.zeros(1, channels, side, side, dtype=BF16, device="cuda")
    box = torch.tensor([[side - 8.0, side - 8.0, side, side]], device="cuda")
    labels, index = torch.zeros(2, 1, dtype=torch.int64, device="cuda")
    return x, sk.Regions.from_boxes(box, labels, [(side, side)], [1], batch_index=index, batch_size=1)


def test_past_two_to_the_31_elements():
    """The last pixels take part, and the gradient reaches them."""
    x, regions = large(1024, 1536)
    assert x.numel() > 2**31
    x[..., -8:, -8:] = 1
    x.requires_grad_()
    anchors = sk.anchor_pool([x], regions)
    assert torch.equal(anchors[0, 0], torch.zeros_like(anchors[0, 0]))
    assert torch.equal(anchors[0, 1:], torch.ones_like(anchors[0, 1:]))
    (gradient,) = torch.autograd.grad(anchors[0, 2].sum(), x)
    assert gradient[0, -1, -1, -1].item() == pytest.approx(1 / 48, rel=1e-2) and gradient[0, -1, 0, 0].item() == 0


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_losses_past_two_to_the_31_elements(layout):
    """Zero pixels add nothing, so a map of 16 x 16 with the same last pixels has the same sum over its pixels."""
    values = [y.to("cuda", BF16) for s in (0, 1) for y in make_maps([(8, 8)], 1, 1024, s)]

    def sums(side):
        x, regions = large(1024, side)
        memory = torch.channels_last if layout == "channels_last" else torch.contiguous_format
        student, teacher = x.to(memory_format=memory, copy=True), x.to(memory_format=memory, copy=True)
        for y, v in zip((student, teacher), values):
            y[..., -8:, -8:] = v
        del x
        none = torch.zeros(1, 1, side, side, dtype=BF16, device="cuda")
        parts = sk.sea_loss([student.requires_grad_()], [teacher], [none], [none], regions)
        distance = regions.counted[0] * parts.distance
        (gradient,) = torch.autograd.grad(parts.anchor + distance, student)
        assert not gradient[..., : side - 8, -1].any() and not gradient[:, -1, : side - 8].any()
        return parts.anchor.detach(), distance.detach(), gradient[..., -8:, -8:].float()

    for got, wanted in zip(sums(1536), sums(16)):
        torch.testing.assert_close(got, wanted, rtol=1e-2, atol=1e-3 * wanted.abs().max().item())


def test_values_are_checked_only_on_request():
    """A bad box is skipped, never an access out of bounds; with validate=True it is an error."""
    boxes, labels, index = padded_boxes(20)
    bad = boxes.clone(), labels.clone(), index.clone()
    bad[0][3], bad[0][4, 2], bad[1][5], bad[2][6], bad[2][7] = float("nan"), -1e9, 99, 99, -7
    rows = torch.tensor([3, 4, 5, 6, 7], device="cuda")
    labels[rows] = -1
    call = {"level_shapes": SHAPES, "strides": STRIDES, "num_classes": 80, "batch_size": 2}
    skipped = sk.Regions.from_boxes(bad[0], bad[1], batch_index=bad[2], **call)
    for x, y in zip(skipped.tensors(), sk.Regions.from_boxes(boxes, labels, batch_index=index, **call).tensors()):
        assert torch.equal(x, y)
    with pytest.raises(ValueError, match=r"labels\[5\] is 99"):
        sk.Regions.from_boxes(bad[0], bad[1], batch_index=bad[2], validate=True, **call)


@pytest.mark.skipif(CUDA and torch.cuda.device_count() < 2, reason="only one CUDA device")
def test_the_device_is_that_of_the_tensors_and_not_the_current_one():
    maps = make_maps(SHAPES)
    wanted = sk.anchor_pool([x.to("cuda:0") for x in maps], make_regions("cuda:0"))
    assert torch.cuda.current_device() == 0
    second = [x.to("cuda:1") for x in maps]
    regions = make_regions("cuda:1")
    got = sk.anchor_pool(second, regions)
    assert got.device == torch.device("cuda:1") and torch.equal(got.cpu(), wanted.cpu())
    with pytest.raises(ValueError, match=r"on cuda:1; expected cuda:0"):
        sk.anchor_loss([x.to("cuda:0") for x in maps], second, make_regions("cuda:0"))
