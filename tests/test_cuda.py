"""What only a GPU can show: streams, captured graphs, synchronisation, alignment, two devices, sizes past 2^31."""

import pytest
import torch
from cases import BF16, CUDA, F32, NO_CUDA, VARIANTS, make_boxes, make_inputs, make_maps, make_regions, run

import sea_kernels as sk

pytestmark = pytest.mark.skipif(not CUDA, reason=NO_CUDA)

SHAPES, STRIDES = [(20, 28), (10, 14), (5, 7)], [8, 16, 32]


def equal(xs, ys):
    return all((x is None and y is None) or torch.equal(x, y) for x, y in zip(xs, ys))


def step(boxes, labels, index, inputs):
    """Regions from packed boxes, the losses, the gradients: what is done in one step of training."""
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
    losses = sk.sea_loss(inputs.cls, inputs.cls_teacher, inputs.box, inputs.box_teacher, regions)
    return [*losses, *torch.autograd.grad(sum(losses), inputs.leaves()[:6])]


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
                torch.testing.assert_close(x.cpu(), y, rtol=1e-3, atol=1e-4)
    for x, y in zip(regions.tensors(), make_regions("cpu").tensors()):
        assert torch.equal(x.cpu(), y)


def test_side_stream():
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


def test_capture_and_replay():
    """One captured graph, boxes included, serves every step: other boxes, other numbers of them, other maps."""
    boxes, inputs = padded_boxes(20), leaves()
    stream = torch.cuda.Stream()
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


def test_no_synchronisation():
    """Nothing in a step waits for the device; lists of sizes and boxes included."""
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
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("dtype", [F32, BF16, torch.float16], ids=str)
@pytest.mark.parametrize("offset", [1, 2, 3, 5, 7])
def test_misaligned_views(offset, dtype):
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


def test_past_two_to_the_31_elements():
    """A whole map of that size, in bfloat16: the last pixels take part, and the gradient reaches them."""
    channels, side = 1024, 1536  # 2.4e9 elements
    free, _ = torch.cuda.mem_get_info()
    assert free > 30 * 2**30, "needs 30 GiB of free memory"
    x = torch.zeros(1, channels, side, side, dtype=BF16, device="cuda")
    x[..., -8:, -8:] = 1
    x.requires_grad_()
    box = torch.tensor([[side - 8.0, side - 8.0, side, side]], device="cuda")
    labels, index = torch.zeros(2, 1, dtype=torch.int64, device="cuda")
    regions = sk.Regions.from_boxes(box, labels, [(side, side)], [1], batch_index=index, batch_size=1)
    anchors = sk.anchor_pool([x], regions)
    assert torch.equal(anchors[0, 0], torch.zeros_like(anchors[0, 0]))
    assert torch.equal(anchors[0, 1:], torch.ones_like(anchors[0, 1:]))
    (gradient,) = torch.autograd.grad(anchors[0, 2].sum(), x)
    assert gradient[0, -1, -1, -1].item() == pytest.approx(1 / 48, rel=1e-2) and gradient[0, -1, 0, 0].item() == 0


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
