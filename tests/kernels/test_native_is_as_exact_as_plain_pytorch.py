"""Every public function against the reference: values and gradients, in every dtype, by the rule of tolerance.py."""

import cases
import pytest
import tolerance
import torch
from cases import BF16, CALLS, F16, F32, F64, SHAPES, STRIDES, VARIANTS, make_inputs, make_regions, run
from hypothesis import given
from hypothesis import strategies as st

import sea_kernels as sk

DTYPES = {  # student's, teacher's
    "float32": (F32, F32),
    "bfloat16, float32": (BF16, F32),
    "bfloat16": (BF16, BF16),
    "float16": (F16, F16),
    "float32, float16": (F32, F16),
    "float64": (F64, F64),
    "float32, float64": (F32, F64),
    "float64, bfloat16": (F64, BF16),
}
# Few categories and many channels: what backward needs is saved. Many and few: it is computed again.
SIZES = {"saved": {"number": 3, "channels": 96}, "recomputed": {"number": 12, "channels": 24}}


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_and_gradients_in_every_dtype(variant, dtypes, size, device, pytestconfig):
    first = 0 if pytestconfig.getoption("--emulate") is None else 1  # a quarter of the pixels, which the emulator wants
    levels = slice(first, first + 2)
    regions = make_regions(device, size["number"], shapes=SHAPES[levels], strides=STRIDES[levels], num_classes=20)
    scalars, seeds = [], 16
    # Scalars want sixteen, the rest has many values in one; to float64, which is exact, rounding is granted instead.
    if F64 in dtypes or (variant in ("anchor_pool", "anchor_cosine") and dtypes != (F32, F32)):
        seeds = 2
    for seed in range(seeds):
        inputs = make_inputs(regions, size["channels"], 24, 1, *dtypes, seed, device)
        native, plain = run(variant, inputs, regions), run(variant, inputs, regions, "reference")
        exact = run(variant, inputs.map(torch.Tensor.double), regions, "reference")
        scalars.append([x[0] for x in (native, plain, exact)])
        if native[0][0].dim() > 0:
            for i, outputs in enumerate(zip(native[0], plain[0], exact[0])):
                tolerance.assert_close(*outputs, tolerance.OUTPUT, f"output {i}")
        for i, gradients in enumerate(zip(native[1], plain[1], exact[1])):
            tolerance.assert_close(*gradients, tolerance.GRADIENT, f"gradient {i}")
            if gradients[0] is not None and gradients[0].dtype in (BF16, F16):
                tolerance.assert_relative(gradients[0], gradients[2], 0.01, f"gradient {i}")
    if native[0][0].dim() == 0:
        for i in range(len(native[0])):
            rows = [[outputs[i] for outputs in seed] for seed in scalars]
            tolerance.assert_scalars_close(*zip(*rows), f"output {i}")
            if BF16 in dtypes or F16 in dtypes:
                for actual, _, exact in rows:
                    tolerance.assert_relative(actual, exact, 0.002, f"output {i}")


@pytest.mark.parametrize("categories", [40, 63, 70])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_more_anchors_than_the_kernels_for_few_take(layout, dtype, categories, device):
    """81, 127 and 141 anchors."""
    shapes = {"shapes": [(10, 14), (5, 7)], "strides": [16, 32]}
    regions = make_regions(device, number=16 * categories, num_classes=categories, **shapes)
    assert (regions.classes >= 0).sum() == categories
    inputs = make_inputs(regions, 96, 8, dtype=DTYPES[dtype][0], device=device).layout(layout)
    native, plain = run("sea_loss", inputs, regions), run("sea_loss", inputs, regions, "reference")
    exact = run("sea_loss", inputs.map(torch.Tensor.double), regions, "reference")
    for i, outputs in enumerate(zip(native[0], exact[0])):
        tolerance.assert_relative(*outputs, 0.002, f"output {i}")
    for i, gradients in enumerate(zip(native[1], plain[1], exact[1])):
        tolerance.assert_close(*gradients, tolerance.GRADIENT, f"gradient {i}")
        if gradients[0] is not None:
            tolerance.assert_relative(gradients[0], gradients[2], 0.01, f"gradient {i}")


def check_sixteen_seeds(variant, regions, device, change=lambda x: x, **options):
    rows = []
    for seed in range(16):
        inputs = make_inputs(regions, device=device, seed=seed).map(change)
        native, plain = (run(variant, inputs, regions, b, **options) for b in ("native", "reference"))
        exact = run(variant, inputs.map(torch.Tensor.double), regions, "reference", **options)
        rows.append([x[0][0] for x in (native, plain, exact)])
        for i, gradients in enumerate(zip(native[1], plain[1], exact[1])):
            tolerance.assert_close(*gradients, tolerance.GRADIENT, f"gradient {i}")
    tolerance.assert_scalars_close(*zip(*rows))


@pytest.fixture(scope="module")
def one_level(device):
    return make_regions(device, levels=1, shapes=[(10, 14)], strides=[16])


@pytest.mark.parametrize("temperature", [0.01, 0.1, 1.0, 5.0])
@pytest.mark.parametrize("variant", ["distance", "localization"])
def test_extreme_temperatures(variant, temperature, one_level, device):
    check_sixteen_seeds(variant, one_level, device, temperature=temperature)


@pytest.mark.parametrize("mean", [30.0, 1000.0])
@pytest.mark.parametrize("variant", ["anchor_loss", "localization"])
def test_maps_far_from_zero(variant, mean, one_level, device):
    """A softmax and a difference of means do not care for an offset, but rounding might."""
    check_sixteen_seeds(variant, one_level, device, lambda x: x + mean)


@pytest.mark.cpu_kernels
@pytest.mark.parametrize("variant", ["sea_loss", "sea_loss, detached"])
def test_so_many_anchors_that_levels_are_computed_one_by_one(variant, tmp_path):
    """Without a group, and with one, where anchors come from elsewhere."""
    regions = make_regions(number=300, num_classes=400)
    inputs = make_inputs(regions, 160, 160)
    tables = regions.area.numel() * 160
    assert tables >= 2**18 and 16 * tables > sum(x.numel() for x in inputs.cls[0])  # as level_groups() in csrc/cpu/ops
    native, plain = run(variant, inputs, regions), run(variant, inputs, regions, "reference")
    exact = run(variant, inputs.map(torch.Tensor.double), regions, "reference")
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        alone = make_regions(number=300, num_classes=400, group=torch.distributed.group.WORLD)
        with_group = run(variant, inputs, alone)
    finally:
        torch.distributed.destroy_process_group()
    for result in (native, with_group):
        for i, outputs in enumerate(zip(result[0], plain[0], exact[0])):
            tolerance.assert_close(*outputs, tolerance.OUTPUT, f"output {i}", noise=1e-6 * outputs[2].item())
        for i, gradients in enumerate(zip(result[1], plain[1], exact[1])):
            tolerance.assert_close(*gradients, tolerance.GRADIENT, f"gradient {i}")


# ------------------------------------------------------------------------------------------------------------ any call


@st.composite
def scenarios(draw):
    """A call in short: shapes, numbers and seeds; the values come from the seeds."""
    levels = draw(st.integers(1, 5))
    side = st.integers(1, 12)
    return {
        "shapes": [(draw(side), draw(side)) for _ in range(levels)],
        "strides": [draw(st.sampled_from([8, 16, 13.3, (20, 9.5), 64])) for _ in range(levels)],
        "batch": draw(st.integers(0, 3)),
        "number": draw(st.sampled_from([0, 1, 2, 5, 13, 40])),
        "num_classes": draw(st.sampled_from([1, 3, 20])),
        "sets": draw(st.integers(1, 3)),
        "channels": draw(st.sampled_from([1, 2, 3, 8, 15, 16, 17, 33, 64, 70])),
        "box_channels": draw(st.sampled_from([1, 4, 16, 31])),
        "temperature": draw(st.sampled_from([0.01, 0.1, 1.0, 5.0]) | st.floats(0.01, 5)),
        "dtypes": draw(st.sampled_from(list(DTYPES.values()))),
        "layouts": draw(st.tuples(st.sampled_from(list(cases.LAYOUTS)), st.sampled_from(list(cases.LAYOUTS)))),
        "seed": draw(st.integers(0, 1000)),
        "detach_anchors": draw(st.booleans()),
        "distance_on_box": draw(st.booleans()),
        "anchor_on_box": draw(st.booleans()),
    }


def pooled(maps, regions):
    with sk.backend("reference"):
        return sk.anchor_pool([x.double() for x in maps], regions)


def anchor_noise(students, teachers, regions):
    """What rounding is multiplied by in the squared difference of two anchors; an anchor itself is granted 8 eps."""
    total = 0.0
    for sets in zip(students, teachers):
        student, teacher = (pooled(maps, regions) for maps in sets)
        for difference, *maps in zip((student - teacher).abs(), *sets):
            largest = max((x.abs().max().item() for x in maps if x.numel()), default=0.0)
            total += 16 * largest * difference.max().item()
    return total


def noise(inputs, regions, temperature):
    """What rounding is multiplied by in cosines and their softmax, where terms cancel (of one channel: all of them)."""
    norms = [inputs.anchors.double().norm(dim=2)]
    for maps in inputs.cls + inputs.box:
        anchors = pooled(maps, regions)
        for i, x in enumerate(maps):
            norms += [x.double().norm(dim=1)[regions.masks(i).any(0)], anchors[i].norm(dim=1)[regions.area[i] > 0]]
    norms = torch.cat([x.flatten() for x in norms])
    return max(1, 1 / temperature) * (1 + 1 / norms[norms > 1e-12].min().item())


def strides(x):
    """Of a dimension of size 1 they mean nothing."""
    return [s for s, n in zip(x.stride(), x.shape) if n > 1] if x.numel() else None


@pytest.mark.parametrize("variant", CALLS)
@given(scenario=scenarios())
def test_any_call_of_any_shape_dtype_and_layout(variant, scenario, device):
    keys = ("number", "batch", "num_classes", "seed", "shapes", "strides")
    regions = make_regions(device, **{k: scenario[k] for k in keys})
    keys = ("channels", "box_channels", "sets", "seed")
    dtype, teacher_dtype = scenario["dtypes"]
    inputs = make_inputs(
        regions, dtype=dtype, teacher_dtype=teacher_dtype, device=device, **{k: scenario[k] for k in keys}
    )
    inputs = inputs.layout(*scenario["layouts"])
    temperature, detach = scenario["temperature"], {"detach_anchors": scenario["detach_anchors"]}
    options = {
        "distance": {"temperature": temperature, **detach},
        "localization": {"temperature": temperature},
        "sea_loss": {
            "distance_temperature": temperature,
            "localization_temperature": temperature,
            "distance_on_box": scenario["distance_on_box"],
            "anchor_on_box": scenario["anchor_on_box"],
            **detach,
        },
    }.get(variant, {})
    native, plain = (run(variant, inputs, regions, backend, **options) for backend in ("native", "reference"))
    exact = run(variant, inputs.map(torch.Tensor.double), regions, "reference", **options)
    slack = 0.0
    if variant in ("distance", "sea_loss", "anchor_cosine"):
        slack += 32 * noise(inputs, regions, temperature)
    if variant in ("localization", "sea_loss"):
        slack += 64 * len(inputs.box) * len(scenario["shapes"]) * (1 + temperature**2)
    eps, of_anchors = torch.finfo(native[0][0].dtype).eps, 0.0
    slack *= eps
    if variant in ("anchor_loss", "sea_loss"):  # a scalar of one seed: plain PyTorch may be exact by chance
        on_box = variant == "sea_loss" and scenario["anchor_on_box"]
        students, teachers = inputs.cls + on_box * inputs.box, inputs.cls_teacher + on_box * inputs.box_teacher
        of_anchors = anchor_noise(students, teachers, regions) * eps
    for i, outputs in enumerate(zip(native[0], plain[0], exact[0])):  # the anchor loss is the first one
        tolerance.assert_close(*outputs, tolerance.OUTPUT, f"output {i}", slack + (of_anchors if i == 0 else 0))
    for i, gradients in enumerate(zip(native[1], plain[1], exact[1])):
        tolerance.assert_close(*gradients, tolerance.GRADIENT, f"gradient {i}", slack)
    for x, gradient in zip(inputs.leaves(), native[1]):
        if gradient is not None:
            assert gradient.dtype == x.dtype and strides(gradient) == strides(torch.empty_like(x))
