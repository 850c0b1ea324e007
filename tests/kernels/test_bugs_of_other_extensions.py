"""One test for every kind of bug that comparable extensions have had; test_on_a_gpu.py holds those that need one."""

import pytest
import torch
from cases import (
    BF16,
    CALLS,
    CUDA,
    F16,
    F32,
    F64,
    LAYOUTS,
    NO_CUDA,
    VARIANTS,
    make_inputs,
    make_maps,
    make_regions,
    run,
)

import sea_kernels as sk


def equal(xs, ys):
    return all((x is None and y is None) or torch.equal(x, y) for x, y in zip(xs, ys))


# --------------------------------------------------------------------------------- strides ignored; odd alignment


@pytest.mark.parametrize("dtype", [F32, BF16, F64], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_strides_are_not_ignored(variant, layout, dtype, device):
    """The same values in any strides give the same results; what lies beside a view is neither read nor written."""
    regions = make_regions(device, levels=4)
    strided = make_inputs(regions, 40, 19, dtype=dtype, device=device).layout(layout)
    plain = strided.map(lambda x: x.contiguous())
    (outputs, gradients), (wanted, wanted_gradients) = (run(variant, x, regions) for x in (strided, plain))
    for x, y in zip([*outputs, *gradients], [*wanted, *wanted_gradients]):
        if y is not None:
            rtol = {BF16: 1e-2, F32: 1e-4, F64: 1e-10}[x.dtype]
            torch.testing.assert_close(x, y, rtol=rtol, atol=0.01 * rtol * max(1, y.abs().max().item()))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradients_have_the_strides_of_dense_maps(layout, device):
    regions = make_regions(device)
    inputs = make_inputs(regions, device=device).layout(layout)
    for variant in VARIANTS:
        for x, gradient in zip(inputs.leaves(), run(variant, inputs, regions)[1]):
            assert gradient is None or gradient.stride() == x.stride()


def test_upstream_gradients_of_any_strides(device):
    """Expanded (as .sum() makes them), transposed, sliced; and of outputs that nothing was computed from."""
    regions = make_regions(device)
    inputs = make_inputs(regions, device=device).map(lambda x: x.requires_grad_())
    leaves = [*inputs.cls[0], inputs.anchors]
    g = torch.Generator().manual_seed(1)
    for name in ("anchor_pool", "anchor_cosine"):
        outputs = CALLS[name](inputs, regions)
        for change in (
            lambda x: torch.randn((), generator=g).to(x).expand_as(x),
            lambda x: torch.randn(x.shape[1:], generator=g).to(x).expand_as(x),
            lambda x: torch.randn(x.transpose(0, -1).shape, generator=g).to(x).transpose(0, -1),
            lambda x: torch.randn(*x.shape[:-1], 2 * x.shape[-1], generator=g).to(x)[..., 1::2],
        ):
            upstream = [change(x) for x in outputs]
            got, wanted = (
                torch.autograd.grad(outputs, leaves, u, retain_graph=True, allow_unused=True)
                for u in (upstream, [x.contiguous() for x in upstream])
            )
            assert equal(got, wanted)
    cosines = CALLS["anchor_cosine"](inputs, regions)
    got = torch.autograd.grad(cosines[0].sum(), leaves)
    assert got[0].any() and not got[1].any() and not got[2].any() and got[3][0].any() and not got[3][1:].any()
    scalar = torch.ones(3, device=device)[1:].sum() * 0 + 1
    loss = sum(CALLS["sea_loss"](inputs, regions))
    got, wanted = (
        torch.autograd.grad(loss, leaves[:3], x, retain_graph=True) for x in (scalar.expand(()), torch.ones_like(loss))
    )
    assert equal(got, wanted)


# ------------------------------------------------------------------------------------- 32-bit offsets, empty grids


def test_offsets_past_two_to_the_31(device):
    """Images and channels that lie more than 2^31 elements apart; the memory in between is never touched."""
    regions = make_regions(device, levels=1, shapes=[(5, 7)], strides=[32])
    shape, far = (2, 3, 5, 7), 2**31
    inputs = make_inputs(regions, 3, 3, dtype=F16, device=device)
    _, wanted = run("sea_loss", inputs, regions)
    for strides in ((far + 8, 35, 7, 1), (35, far // 2 + 8, 7, 1), (21, 7, far // 4 + 8, 1)):
        room = torch.empty(sum((n - 1) * s for n, s in zip(shape, strides)) + 1, dtype=F16, device=device)
        inputs.cls[0][0] = room.as_strided(shape, strides).copy_(inputs.cls[0][0])
        assert equal(run("sea_loss", inputs, regions)[1], wanted)
        del room


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_batch_without_an_image_has_losses_of_zero(variant, device):
    regions = make_regions(device, batch=0)
    outputs, gradients = run(variant, make_inputs(regions, device=device), regions)
    assert not any(x.any() for x in outputs)
    assert all(x is None or x.isfinite().all() for x in gradients)


@pytest.mark.parametrize("variant", VARIANTS)
def test_images_without_a_box(variant, device):
    regions = make_regions(device, number=0)
    inputs = make_inputs(regions, device=device)
    (outputs, gradients), (wanted, wanted_gradients) = (
        run(variant, inputs, regions, b) for b in ("native", "reference")
    )
    for x, y in zip([*outputs, *gradients], [*wanted, *wanted_gradients]):
        if y is not None:
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)


def test_maps_without_a_valid_pixel(device):
    """A crowd over everything: no anchor, so only the localization has a value."""
    crowd = torch.tensor([[-9.0, -9.0, 999.0, 999.0]] * 2, device=device)
    index = torch.tensor([0, 1], device=device)
    regions = make_regions(device, 0, ignore_boxes=crowd, ignore_batch_index=index)
    assert not regions.counted.any()
    outputs, gradients = run("sea_loss, everything", make_inputs(regions, device=device), regions)
    assert outputs[0].item() == 0 and outputs[1].item() == 0 and outputs[2].item() > 0
    assert not any(x.any() for x in gradients[:3]) and all(x.any() for x in gradients[3:6])


def test_a_batch_of_70000_images_of_one_pixel(device):
    """More blocks than a dimension of a CUDA grid may have; P = 3."""
    batch = 70_000
    boxes = torch.tensor([[0.0, 0.0, 8.0, 8.0]], device=device).expand(batch // 2, 4)
    regions = sk.Regions.from_boxes(
        boxes,
        torch.zeros(batch // 2, dtype=torch.int64, device=device),
        [(1, 1)],
        [8],
        num_classes=1,
        batch_index=torch.arange(0, batch, 2, device=device),
        batch_size=batch,
    )
    assert regions.area.tolist() == [[batch / 2, batch / 2, 0]]
    inputs = make_inputs(regions, 3, 3, device=device)
    for variant in VARIANTS:
        (outputs, gradients), (wanted, wanted_gradients) = (
            run(variant, inputs, regions, b) for b in ("native", "reference")
        )
        for x, y in zip([*outputs, *gradients], [*wanted, *wanted_gradients]):
            if y is not None:
                torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4 * max(1, y.abs().max().item()))


# ------------------------------------------------------------------------- zero without a gradient; inputs overwritten


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_value_does_not_depend_on_whether_a_gradient_is_needed(variant, device):
    """A validation loss of zero because nothing requires a gradient is somebody's real bug."""
    regions = make_regions(device)
    inputs = make_inputs(regions, device=device)
    call, options = VARIANTS[variant]
    with_grad = run(variant, inputs, regions)[0]
    plain = call(inputs, regions, **options)
    assert not any(x.requires_grad for x in plain)
    with torch.no_grad():
        no_grad = call(inputs.map(lambda x: x.detach().requires_grad_()), regions, **options)
    with torch.inference_mode():
        inference = call(inputs, regions, **options)
    assert equal(with_grad, plain) and equal(with_grad, no_grad) and equal(with_grad, inference)
    assert all(x.any() for x in plain)


@pytest.mark.parametrize("variant", VARIANTS)
def test_inputs_are_untouched(variant, device):
    regions = make_regions(device)
    inputs = make_inputs(regions, device=device)
    tensors = []
    for x in (inputs, inputs.layout("sliced")):
        x.map(tensors.append)
        before = [t.clone() for t in tensors] + [t.clone() for t in regions.tensors()]
        run(variant, x, regions)
        assert equal(tensors + regions.tensors(), before)


# ----------------------------------------------------------------------------------------------------- determinism


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_same_input_gives_the_same_bits(variant, layout, device):
    """Twice, and with 1, 2, 3 and 4 threads; few categories and many, so that both ways of backward are taken."""
    threads = torch.get_num_threads()
    for number, channels in ((3, 96), (40, 24)):
        regions = make_regions(device, number, levels=4, num_classes=30)
        inputs = make_inputs(regions, channels, 24, device=device).layout(layout)
        try:
            first = None
            for n in (1, 2, 3, 4, threads, threads):
                torch.set_num_threads(n)
                outputs, gradients = run(variant, inputs, make_regions(device, number, levels=4, num_classes=30))
                first = first or [*outputs, *gradients]
                assert equal(first, [*outputs, *gradients]), f"{n} threads"
        finally:
            torch.set_num_threads(threads)


def test_calls_of_many_threads_do_not_disturb_each_other(device):
    """Calls from several Python threads do not disturb each other, nor does a call from inside of torch's own pool."""
    from concurrent.futures import ThreadPoolExecutor

    regions = make_regions(device)
    inputs = [make_inputs(regions, seed=i, device=device) for i in range(8)]
    wanted = [run("sea_loss", x, regions) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda x: run("sea_loss", x, regions), inputs * 3))
    for (outputs, gradients), (more, more_gradients) in zip(wanted * 3, got):
        assert equal([*outputs, *gradients], [*more, *more_gradients])


# ------------------------------------------------------------------------------------------------ devices are mixed


@pytest.mark.parametrize("other", ["meta", pytest.param("cuda", marks=pytest.mark.skipif(not CUDA, reason=NO_CUDA))])
def test_tensors_on_different_devices_are_an_error(other):
    regions = make_regions()
    x = make_maps(regions.level_shapes)
    y = [m.to(other) for m in x]
    anchors = sk.anchor_pool(x, regions)
    for call in (
        lambda: sk.anchor_pool(y, regions),
        lambda: sk.anchor_pool([x[0], x[1], y[2]], regions),
        lambda: sk.anchor_cosine(x, anchors.to(other), regions),
        lambda: sk.anchor_cosine(y, anchors, regions),
        lambda: sk.anchor_loss(x, y, regions),
        lambda: sk.topological_distance_loss(y, x, regions),
        lambda: sk.topological_distance_loss(y, y, regions),
        lambda: sk.localization_alignment_loss(x, [x[0], x[1], y[2]]),
        lambda: sk.sea_loss(x, x, x, y, regions),
        lambda: sk.sea_loss(x, x, y, y, regions),
    ):
        with pytest.raises(ValueError, match=rf"is on (cpu|{other}).*; expected (cpu|{other})"):
            call()


def test_a_device_without_kernels_is_an_error_and_no_silent_fall_back():
    x = [m.to("meta") for m in make_maps([(3, 4)])]
    with pytest.raises(RuntimeError, match=r"cannot run sea_loss on meta.*backend\(\"reference\"\)"):
        sk.localization_alignment_loss(x, x)


# -------------------------------------------------------------------------------------------- whole blocks of anchors


@pytest.mark.parametrize("present", [30, 31, 63])
def test_the_last_block_of_anchors_may_be_partly_filled(present, device):
    """The matrix product reads anchors in blocks of 12 rows: 61 and 63 of them need more room than 64."""
    shapes = [(10, 14), (5, 7)]
    corner = torch.arange(present, dtype=F32, device=device).unsqueeze(1) * torch.tensor([3.0, 2.0], device=device)
    labels = torch.arange(present, device=device)
    regions = sk.Regions.from_boxes(
        torch.cat([corner, corner + 40], 1), labels, shapes, [16, 32], batch_index=labels % 2, batch_size=2
    )
    inputs = make_inputs(regions, 16, 16, device=device)
    (outputs, gradients), (wanted, wanted_gradients) = (
        run("sea_loss", inputs, regions, b) for b in ("native", "reference")
    )
    for x, y in zip([*outputs, *gradients], [*wanted, *wanted_gradients]):
        if y is not None:
            torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-6)


@pytest.mark.cpu_kernels
def test_a_rank_without_images_has_anchors_of_other_ranks():
    """Its areas are those of the group. Nothing is added to the anchors' gradient, and no memory is read."""
    classes, area, counted = torch.tensor([0]), torch.ones(1, 3), torch.zeros(1)
    regions = [classes, area, counted, *(torch.zeros(n, dtype=torch.int32) for n in ((1, 0, 2), (0,), (0,)))]
    maps, gradient = torch.empty(0, 40, 4, 5), torch.empty(0, 3, 4, 5)
    anchors = torch.randn(1, 3, 40)
    maps_gradient, anchor_gradient = torch.ops.sea_kernels.anchor_cosine_backward([gradient], [maps], anchors, regions)
    assert maps_gradient.shape == maps.shape and torch.equal(anchor_gradient, torch.zeros_like(anchors))
