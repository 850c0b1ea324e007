"""NaN and infinity come out where they went in, pixels of no mask are not read, and zero norms have no direction."""

import functools
import math

import oracle
import pytest
import torch
from cases import BF16, F16, F32, F64, VARIANTS, make_inputs, make_maps, make_regions, run
from scenes import CASES, arrays, assert_near, expected_regions, regions_of
from scenes import make_maps as maps_of

import sea_kernels as sk

nan, inf = math.nan, math.inf


def payload(x, place):
    """A NaN with bits set below, as uninitialized memory may hold."""
    x.view(torch.int32)[place] = 0x7FC00001


def pixels(regions, level):
    """One pixel each: counted, of a crowd alone, beyond the image; and whether a localization loss reads it."""
    counted = regions.masks(level).any(0)
    b, h, w = counted.shape
    rows, columns = regions.extent[level].unbind(1)
    inside = (torch.arange(h, device=rows.device).view(1, h, 1) < rows.view(b, 1, 1)) & (
        torch.arange(w, device=rows.device).view(1, 1, w) < columns.view(b, 1, 1)
    )
    kinds = {"counted": counted, "crowd": inside & ~counted, "beyond": ~inside}
    return {k: tuple(m.nonzero()[len(m.nonzero()) // 2].tolist()) for k, m in kinds.items()}


def losses(inputs, regions):
    return {name: run(name, inputs, regions) for name in VARIANTS if name != "anchor_cosine"}


@functools.cache
def finite(device, backend, number, channels, layout):
    """(regions, inputs, their losses), the same for every test that puts something into the inputs."""
    regions = make_regions(device, number, levels=2, num_classes=20)
    inputs = make_inputs(regions, channels, 19, device=device).layout(layout)
    return regions, inputs, losses(inputs, regions)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
@pytest.mark.parametrize("kind", ["counted", "crowd", "beyond"])
@pytest.mark.parametrize("who", ["student", "teacher"])
def test_nan_shows_where_it_counts_and_nowhere_else(who, kind, layout, backend, device):
    """Loss and gradient, for every way through the code: what backward needs is saved, or computed again."""
    for number, channels, level in ((3, 96, 0), (3, 96, 1), (30, 24, 0)):
        regions, clean, wanted = finite(device, backend, number, channels, layout)
        dirty = clean.map(torch.clone)
        for maps in (dirty.cls, dirty.box) if who == "student" else (dirty.cls_teacher, dirty.box_teacher):
            b, y, x = pixels(regions, level)[kind]
            maps[0][level][b, 1, y, x] = nan
        got = losses(dirty, regions)
        for name in got:
            (outputs, gradients), (clean_outputs, clean_gradients) = got[name], wanted[name]
            parts = list(zip(outputs, clean_outputs))
            if name.startswith("sea_loss"):
                shown = [kind == "counted"] * 2 + [kind != "beyond"]
            elif name == "localization, no regions":
                shown = [True]
            elif name == "localization":
                shown = [kind != "beyond"]
            elif name == "anchor_pool":
                shown = [kind == "counted" and who == "student"]
            else:
                shown = [kind == "counted"]
            for (x, y), show in zip(parts, shown):
                assert x.isnan().any() if show else torch.equal(x, y), name
            if not any(shown):
                assert all((g is None and w is None) or torch.equal(g, w) for g, w in zip(gradients, clean_gradients))
            elif name != "anchor_pool":  # its gradient does not depend on the features
                assert any(g is not None and g.isnan().any() for g in gradients), name


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("kind", ["counted", "crowd", "beyond"])
def test_nan_shows_in_the_anchors_of_its_own_masks_alone(kind, dtype, backend, device):
    """The sum of other masks of the same pixels or channels may be made in another way, and be rounded otherwise."""
    regions = make_regions(device, 3, levels=2, num_classes=20)
    for layout in ("contiguous", "channels_last"):
        clean = make_inputs(regions, 40, dtype=dtype, device=device).layout(layout).cls[0]
        for level in range(2):
            b, y, x = pixels(regions, level)[kind]
            dirty = [m.clone() for m in clean]
            dirty[level][b, 1, y, x] = nan
            got, wanted = sk.anchor_pool(dirty, regions), sk.anchor_pool(clean, regions)
            shown = torch.zeros_like(got, dtype=torch.bool)
            shown[level, regions.masks(level)[:, b, y, x], 1] = True
            assert shown.any() == (kind == "counted")
            if backend == "reference":  # it multiplies by zeros, which leaves NaN in the other masks of that channel
                assert got[shown].isnan().all()
                shown[level, :, 1] |= kind == "counted"
            else:
                assert torch.equal(got.isnan(), shown)
            torch.testing.assert_close(got[~shown], wanted[~shown], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("who", ["student", "teacher"])
def test_nan_shows_in_gradients_of_its_own_masks_alone(who, dtype, backend, device):
    regions = make_regions(device, 3, levels=2, num_classes=20)
    b, y, x = pixels(regions, 0)["counted"]
    own = regions.masks(0)[:, b, y, x].nonzero().flatten()
    hit = regions.masks(0)[own].any(0)  # pixels that share a mask with it
    if backend == "reference":  # it multiplies by zeros, which leaves NaN in the other masks of that channel
        hit = torch.ones_like(hit)
    gradients = []
    for value in (1.0, nan):
        student, teacher = (
            [m.to(dtype) for m in make_maps(regions.level_shapes, seed=i, device=device)] for i in (0, 1)
        )
        {"student": student, "teacher": teacher}[who][0][b, 1, y, x] = value
        student = [m.requires_grad_() for m in student]
        gradients.append(torch.autograd.grad(sk.anchor_loss(student, teacher, regions), student))
    (wanted, rest), (got, rest_again) = gradients
    assert got[:, 1][hit & regions.masks(0)[own].any(0)].isnan().all()
    got[:, 1][hit] = wanted[:, 1][hit]
    torch.testing.assert_close((got, rest_again), (wanted, rest), rtol=1e-2, atol=1e-7)


def test_nan_at_a_pixel_shows_in_its_cosines_alone(backend, device):
    """Cosines are given for every pixel, valid or not."""
    regions = make_regions(device)
    features = make_maps(regions.level_shapes, device=device)
    anchors = sk.anchor_pool(features, regions)
    for place in pixels(regions, 0).values():
        b, y, x = place
        dirty = [m.clone() for m in features]
        dirty[0][b, 3, y, x] = nan
        cosines = sk.anchor_cosine(dirty, anchors, regions)
        shows = cosines[0].isnan()
        assert torch.equal(shows.any(1).nonzero(), torch.tensor([[b, y, x]], device=device))
        present = regions.area[0] > 0
        assert shows[b, present, y, x].all()
        if backend == "native":  # the reference multiplies by the zeros of an empty anchor, which leaves NaN
            assert not shows[b, ~present, y, x].any()
        assert not any(c.isnan().any() for c in cosines[1:])


def test_nan_of_any_bits_shows_in_loss_and_gradient(backend, device):
    """Also in the gradient: a GradScaler looks there."""
    regions = make_regions(device, levels=1)
    b, y, x = pixels(regions, 0)["counted"]
    for who in ("student", "teacher"):
        inputs = make_inputs(regions, device=device)
        for maps in (inputs.cls, inputs.box) if who == "student" else (inputs.cls_teacher, inputs.box_teacher):
            payload(maps[0][0], (b, 1, y, x))
        for name, (outputs, gradients) in losses(inputs, regions).items():
            if name != "anchor_pool":
                assert all(x.isnan() for x in outputs), name
                assert any(g is not None and g.isnan().any() for g in gradients), name


@pytest.mark.parametrize("dtype", [F32, F16, BF16, F64], ids=str)
@pytest.mark.parametrize("value", [inf, -inf, nan])
@pytest.mark.parametrize("who", ["student", "teacher"])
def test_non_finite_features_give_non_finite_losses(who, value, dtype, backend, device):
    regions = make_regions(device, levels=2)
    b, y, x = pixels(regions, 1)["counted"]
    inputs = make_inputs(regions, dtype=dtype, device=device)
    for maps in (inputs.cls, inputs.box) if who == "student" else (inputs.cls_teacher, inputs.box_teacher):
        maps[0][1][b, 1, y, x] = value
    for name, (outputs, _) in losses(inputs, regions).items():
        if name != "anchor_pool" or who == "student":
            assert not any(x.isfinite().all() for x in outputs), name


def test_maps_of_nan_alone_have_losses_of_nan(backend, device):
    regions = make_regions(device)
    inputs = make_inputs(regions, device=device).map(lambda x: torch.full_like(x, nan))
    for outputs, _ in losses(inputs, regions).values():
        assert all(x.isnan().any() for x in outputs)


def test_large_values_do_not_overflow_in_a_softmax(backend, device):
    """Softmax of values whose exponentials overflow, on both sides of zero."""
    regions = make_regions(device)
    inputs = make_inputs(regions, device=device)
    for scale in (1e4, -1e4):
        scaled = inputs.map(lambda x: scale * x)  # noqa: B023
        for name in ("localization", "distance"):
            (outputs, gradients), (wanted, wanted_gradients) = (
                run(name, scaled, regions, by) for by in (None, "reference")
            )
            for x, y in zip([*outputs, *gradients], [*wanted, *wanted_gradients]):
                if y is not None:
                    torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4 * y.abs().max().item())


# ------------------------------------------------------------------------------------------------------------ zero norm


@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=str)
def test_pixels_of_zero_norm_have_no_direction(dtype, backend, device):
    """After a ReLU; exactly zero, and at most 1e-12: cosine 0, no gradient but through the anchors."""
    regions = make_regions(device, levels=2)
    inputs = make_inputs(regions, dtype=dtype, device=device)
    for maps in (inputs.cls, inputs.cls_teacher):
        maps[0][0][0, :, 2:5] = 0
        maps[0][0][1, :, 2, 2] = 0
        maps[0][0][1, 0, 2, 2] = 0.5e-12
    cosines, gradients = run("anchor_cosine", inputs, regions)
    assert not cosines[0][0, :, 2:5].any() and not cosines[0][1, :, 2, 2].any() and cosines[0][1, :, 2, 3].any()
    assert not gradients[0][0, :, 2:5].any() and not gradients[0][1, :, 2, 2].any()
    (loss,), gradients = run("distance, detached", inputs, regions)
    assert loss.isfinite() and all(g is None or g.isfinite().all() for g in gradients)
    assert not gradients[0][0, :, 2:5].any() and gradients[0][0, :, 6].any()
    (loss,), gradients = run("distance", inputs, regions)
    (wanted,), wanted_gradients = run("distance", inputs, regions, "reference")
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-7)
    rtol = 2e-2 if dtype == BF16 else 1e-4
    torch.testing.assert_close(gradients[0], wanted_gradients[0], rtol=rtol, atol=1e-2 * rtol)
    assert gradients[0][0, :, 2:5].any()


def test_anchors_of_zero_norm_have_no_direction(backend, device):
    """A category whose features are all zero on one side; its row of cosines is zero, gradients are finite."""
    regions = make_regions(device, levels=2)
    inputs = make_inputs(regions, device=device)
    row = int((regions.area[0] > 0).nonzero()[-1])
    for i in range(2):
        inputs.cls[0][i].masked_fill_(regions.masks(i)[row].unsqueeze(1), 0)
    anchors = sk.anchor_pool(inputs.cls[0], regions)
    assert not anchors[:, row].any()
    assert not sk.anchor_cosine(inputs.cls[0], anchors, regions)[0][:, row].any()
    for name in ("distance", "distance, detached", "sea_loss"):
        (outputs, gradients), (wanted, wanted_gradients) = (
            run(name, inputs, regions, by) for by in (None, "reference")
        )
        for x, y in zip([*outputs, *gradients], [*wanted, *wanted_gradients]):
            if y is not None:
                assert x.isfinite().all()
                torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_an_empty_anchor_has_cosine_zero_whatever_is_given_for_it(backend, device):
    regions = make_regions(device, 3, num_classes=40)
    inputs = make_inputs(regions, device=device)
    assert (regions.area == 0).any()
    inputs.anchors[regions.area == 0] = nan
    cosines, gradients = run("anchor_cosine", inputs, regions)
    for c, area in zip(cosines, regions.area):
        assert c.isfinite().all() and not c[:, area == 0].any() and c[:, area > 0].any()
    assert all(g is None or g.isfinite().all() for g in gradients)
    assert not gradients[-1][regions.area == 0].any()


@pytest.mark.parametrize("dtype", [F64, F32, F16], ids=str)
def test_distances_with_pixels_of_zero_norm_are_the_oracles(dtype, backend, device):
    """Cosine 0 with everything, no gradient through the direction; the anchor path still moves them."""
    case = CASES["plain"]
    regions, (_, masks, _) = regions_of(case, device=device), expected_regions(case)
    student, teacher = maps_of(case, 3, 1, dtype, device=device), maps_of(case, 3, 2, dtype, device=device)
    tiny = 0.5e-12 if dtype != F16 else 0.0
    for x in (student[0], teacher[0]):
        x[0, :, 1:3] = 0
        x[1, 0, 2, 2], x[1, 1:, 2, 2] = tiny, 0
    student = [x.requires_grad_() for x in student]
    cosines = sk.anchor_cosine(student, sk.anchor_pool(teacher, regions), regions)[0]
    assert not cosines[0, :, 1:3].any() and not cosines[1, :, 2, 2].any()
    grads = torch.autograd.grad(cosines.sum(), student[0])[0]
    assert grads.isfinite().all() and not grads[0, :, 1:3].any() and not grads[1, :, 2, 2].any()

    s, t = arrays(student), arrays(teacher)
    rtol = 1e-9 if dtype == F64 else 1e-4
    detached = sk.topological_distance_loss(student, teacher, regions, detach_anchors=True)
    assert_near(detached, oracle.distance_loss(s, t, masks, 0.1), rtol)
    grads = torch.autograd.grad(detached, student)
    assert all(g.isfinite().all() for g in grads)
    assert not grads[0][0, :, 1:3].any() and grads[0][1, :, 0, 0].any()
    through = torch.autograd.grad(sk.topological_distance_loss(student, teacher, regions), student)
    assert all(g.isfinite().all() for g in through) and through[0][0, :, 1:3].any()


def test_distances_with_an_anchor_of_zero_norm_are_the_oracles(backend, device):
    """A category whose features are all zero in the student: the loss is finite, so is its gradient."""
    case = CASES["one pixel"]
    regions, (_, masks, _) = regions_of(case, device=device), expected_regions(case)
    student, teacher = maps_of(case, 3, 1, device=device), maps_of(case, 3, 2, device=device)
    student[0][0] = 0
    student = [x.requires_grad_() for x in student]
    loss = sk.topological_distance_loss(student, teacher, regions)
    assert_near(loss, oracle.distance_loss(arrays(student), arrays(teacher), masks, 0.1))
    (grad,) = torch.autograd.grad(loss, student)
    assert grad.isfinite().all() and not grad[0].any()
