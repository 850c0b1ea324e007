"""NaN and infinity come out where they went in, pixels of no mask are not read, and zero norms have no direction."""

import math

import pytest
import torch
from cases import BF16, F16, F32, F64, VARIANTS, make_inputs, make_maps, make_regions, run

import sea_kernels as sk

nan, inf = math.nan, math.inf
OF_REGIONS = ("anchor_pool", "anchor_loss", "distance", "distance, detached")


def payload(x, place):
    """A NaN with bits set below, as uninitialised memory may hold."""
    x.view(torch.int32)[place] = 0x7FC00001


def pixels(regions, level):
    """One pixel each: counted, of a crowd alone, beyond the image; and whether a localisation looks at it."""
    counted = regions.masks(level).any(0)
    b, h, w = counted.shape
    rows, columns = regions.extent[level].unbind(1)
    inside = (torch.arange(h, device=rows.device).view(1, h, 1) < rows.view(b, 1, 1)) & (
        torch.arange(w, device=rows.device).view(1, 1, w) < columns.view(b, 1, 1)
    )
    kinds = {"counted": counted, "crowd": inside & ~counted, "beyond": ~inside}
    return {k: tuple(m.nonzero()[len(m.nonzero()) // 2].tolist()) for k, m in kinds.items()}


def losses(inputs, regions):
    out = {name: run(name, inputs, regions) for name in VARIANTS if name != "anchor_cosine"}
    return out


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
@pytest.mark.parametrize("kind", ["counted", "crowd", "beyond"])
@pytest.mark.parametrize("who", ["student", "teacher"])
def test_nan_shows_where_it_counts_and_nowhere_else(who, kind, layout, device):
    """Loss and gradient, for every way through the code: kept and recomputed."""
    for number, channels in ((3, 96), (30, 24)):
        regions = make_regions(device, number, levels=2, num_classes=20)
        clean = make_inputs(regions, channels, 19, device=device).layout(layout)
        dirty = clean.map(torch.clone)
        for maps in (dirty.cls, dirty.box) if who == "student" else (dirty.cls_teacher, dirty.box_teacher):
            b, y, x = pixels(regions, 0)[kind]
            maps[0][0][b, 1, y, x] = nan
        wanted, got = losses(clean, regions), losses(dirty, regions)
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


def test_nan_at_a_pixel_shows_in_its_cosines_alone(device):
    """Cosines are given for every pixel, counted or not."""
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
        assert torch.equal(shows[b, :, y, x], regions.area[0] > 0)
        assert not any(c.isnan().any() for c in cosines[1:])


def test_nan_with_any_bits(device):
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
def test_non_finite_features_give_non_finite_losses(who, value, dtype, device):
    regions = make_regions(device, levels=2)
    b, y, x = pixels(regions, 1)["counted"]
    inputs = make_inputs(regions, dtype=dtype, device=device)
    for maps in (inputs.cls, inputs.box) if who == "student" else (inputs.cls_teacher, inputs.box_teacher):
        maps[0][1][b, 1, y, x] = value
    for name, (outputs, _) in losses(inputs, regions).items():
        if name != "anchor_pool" or who == "student":
            assert not any(x.isfinite().all() for x in outputs), name


def test_all_nan(device):
    regions = make_regions(device)
    inputs = make_inputs(regions, device=device).map(lambda x: torch.full_like(x, nan))
    for outputs, _ in losses(inputs, regions).values():
        assert all(x.isnan().any() for x in outputs)


def test_large_values_do_not_overflow(device):
    """Softmax of values whose exponentials overflow, on both sides of zero."""
    regions = make_regions(device)
    inputs = make_inputs(regions, device=device)
    for scale in (1e4, -1e4):
        scaled = inputs.map(lambda x: scale * x)  # noqa: B023
        for name in ("localization", "distance"):
            (outputs, gradients), (wanted, wanted_gradients) = (
                run(name, scaled, regions, backend) for backend in ("native", "reference")
            )
            for x, y in zip([*outputs, *gradients], [*wanted, *wanted_gradients]):
                if y is not None:
                    torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4 * y.abs().max().item())


# ------------------------------------------------------------------------------------------------------------ zero norm


@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=str)
def test_pixels_of_zero_norm_have_no_direction(dtype, device):
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


def test_anchors_of_zero_norm_have_no_direction(device):
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
            run(name, inputs, regions, backend) for backend in ("native", "reference")
        )
        for x, y in zip([*outputs, *gradients], [*wanted, *wanted_gradients]):
            if y is not None:
                assert x.isfinite().all()
                torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_a_norm_just_above_the_limit_counts(dtype, device):
    """The limit is 1e-12 itself: not on the square, which float32 could not hold... of 2e-12 it can."""
    regions = make_regions(device, 0, 1, batch=1, shapes=[(1, 1)], strides=[8], image_sizes=None, ignore_boxes=None,
                           ignore_batch_index=None)  # fmt: skip
    anchors = torch.tensor([[[3.0, 4.0]]], dtype=dtype, device=device)
    for norm, cosine in ((2e-12, 0.6), (0.5e-12, 0.0), (0.0, 0.0)):
        x = torch.tensor([norm, 0.0], dtype=dtype, device=device).view(1, 2, 1, 1)
        (got,) = sk.anchor_cosine([x], anchors, regions)
        assert got.item() == pytest.approx(cosine, rel=1e-5)
        (got,) = sk.anchor_cosine([anchors.view(1, 2, 1, 1)], x.view(1, 1, 2), regions)
        assert got.item() == pytest.approx(cosine, rel=1e-5)


def test_an_empty_anchor_has_cosine_zero_whatever_is_given_for_it(device):
    regions = make_regions(device, 3, num_classes=40)
    inputs = make_inputs(regions, device=device)
    assert (regions.area == 0).any()
    inputs.anchors[regions.area == 0] = nan
    cosines, gradients = run("anchor_cosine", inputs, regions)
    for c, area in zip(cosines, regions.area):
        assert c.isfinite().all() and not c[:, area == 0].any() and c[:, area > 0].any()
    assert all(g is None or g.isfinite().all() for g in gradients)
    assert not gradients[-1][regions.area == 0].any()
