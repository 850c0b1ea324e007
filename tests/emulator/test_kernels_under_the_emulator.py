"""The CUDA kernels, run on the CPU: what the tests of the operators do not reach. Those run on them by --emulate."""

import cases
import pytest
import tolerance
import torch
from cases import BF16, F16, F32, F64, make_boxes, make_inputs, make_regions, run
from emulator import build, operators

import sea_kernels as sk
from sea_kernels.native import saved as sizes_of_saved

pytestmark = pytest.mark.skipif(bool(build.missing()), reason=build.missing())


@pytest.fixture(scope="module")
def kernels(request):
    if request.config.getoption("--emulate") is not None:
        pytest.skip("the operators are emulated already")
    yield operators.install()
    operators.uninstall()


@pytest.fixture(autouse=True)
def defaults(kernels):
    kernels.settings()
    kernels.launches()


def check(variant, regions, dtype=F32, layout="contiguous", **sizes):
    inputs = make_inputs(regions, dtype=dtype, **sizes).layout(layout)
    native, plain = run(variant, inputs, regions), run(variant, inputs, regions, "reference")
    exact = run(variant, inputs.map(torch.Tensor.double), regions, "reference")
    for x in zip(native[0], plain[0], exact[0]):
        if x[0].dim() > 0:
            tolerance.assert_close(*x, tolerance.OUTPUT)
        else:
            torch.testing.assert_close(x[0].double(), x[2].double(), rtol=1e-5 if dtype == F32 else 2e-3, atol=1e-9)
    for x in zip(native[1], plain[1], exact[1]):
        tolerance.assert_close(*x, tolerance.GRADIENT)
        if x[0] is not None and dtype in (BF16, F16):
            tolerance.assert_relative(x[0], x[2], 0.01)


EVERYTHING = "sea_loss, everything"


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64], ids=str)
def test_any_order_of_threads_gives_the_same_bits(dtype, order, kernels):
    regions = make_regions(levels=2)
    inputs = make_inputs(regions, 40, 24, dtype=dtype)
    for variant in (EVERYTHING, "anchor_cosine"):
        kernels.settings()
        wanted = run(variant, inputs, regions)
        kernels.settings(seed=order)
        got = run(variant, inputs, regions)
        assert all(torch.equal(x, y) for x, y in zip(got[0], wanted[0]))
        assert all(x is y is None or torch.equal(x, y) for x, y in zip(got[1], wanted[1]))


@pytest.mark.parametrize("slices", [1, 2, 7, 1000])
def test_shares_of_any_size(slices, kernels):
    """Blocks with one tile each, blocks that see several pairs and images."""
    kernels.settings(slices=slices)
    for dtype in (F32, BF16):
        check(EVERYTHING, make_regions(levels=4, number=9), dtype, channels=33, box_channels=17, sets=2)
    check("anchor_cosine", make_regions(levels=3), channels=33)


@pytest.mark.parametrize("slices", [1, 2, 7, 1000])
@pytest.mark.parametrize("batch", [1, 3])
def test_images_of_several_strips(batch, slices, kernels):
    """Images take turns in the order of tiles: blocks that come back to an image, and last strips of any size."""
    kernels.settings(slices=slices)
    shapes = {"shapes": [(45, 50), (32, 32), (31, 33)], "strides": [4, 7, 7]}  # 2250, 1024 and 1023 pixels
    for dtype in (F32, BF16, F64):
        check(EVERYTHING, make_regions(number=9, batch=batch, **shapes), dtype, channels=9, box_channels=5)


@pytest.mark.parametrize("batch", [64, 128, 256])
def test_many_small_images(batch, kernels):
    """No product of tiles and images overflows 32 bits where each image is one strip."""
    kernels.settings(slices=1000)
    regions = make_regions(number=9, batch=batch, shapes=[(3, 3)], strides=[70])
    for dtype in (BF16, F64):
        check(EVERYTHING, regions, dtype, channels=3, box_channels=2)


@pytest.mark.parametrize("limit, num_classes, launched", [
    (227, 20, ["distance_few", "distance_backward_few"]),  # at most 41 anchors
    (227, 40, ["distance_few", "distance", "distance_backward_few", "distance_backward_some"]),  # 81
    (227, 80, ["distance_few", "distance", "distance_backward_few", "distance_backward_some", "distance_backward"]),
    (163, 20, ["distance", "distance_backward"]),
])  # fmt: skip
def test_which_kernels_compute_the_distances(limit, num_classes, launched, kernels):
    """Those for few anchors, where shared memory has room; also the others where there may be more anchors."""
    kernels.settings(shared_memory_limit=limit << 10)
    regions = make_regions(levels=1, number=80, num_classes=num_classes, shapes=[(5, 7)], strides=[32])
    run(EVERYTHING, make_inputs(regions, 200, 24, dtype=BF16), regions)
    launches = kernels.launches()
    assert {name: n for name, n in launches.items() if "distance" in name} == dict.fromkeys(launched, 1)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "odd offset"])
@pytest.mark.parametrize("number, num_classes", [(0, 5), (20, 7), (20, 16), (60, 40), (150, 120)])
def test_anchors_in_several_chunks(number, num_classes, layout, dtype):
    """1 to some 200 anchors: none of a category, a chunk full to the last row, several; more than 16 in a tile."""
    shapes = {"shapes": [(9, 11), (3, 4)], "strides": [17, 50]}
    regions = make_regions(number=number, levels=2, num_classes=num_classes, **shapes)
    check(EVERYTHING, regions, dtype, layout, channels=24, box_channels=8)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("categories", [31, 32, 40, 48, 63, 64])
def test_numbers_of_anchors_where_other_kernels_take_over(categories, layout):
    """63 | 65, 81, 97, 127 | 129 anchors."""
    shapes = {"shapes": [(9, 11), (3, 4)], "strides": [17, 50]}
    regions = make_regions(number=16 * categories, levels=2, num_classes=categories, **shapes)
    assert (regions.classes >= 0).sum() == categories
    for dtype in (BF16, F16):
        check("sea_loss", regions, dtype, layout, channels=256 if categories == 63 else 70, box_channels=8)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("channels", [256, 257, 520])
def test_channels_in_several_groups(channels, layout):
    regions = make_regions(number=40, levels=1, num_classes=40, shapes=[(5, 7)], strides=[32])
    for dtype in (F32, BF16):
        check(EVERYTHING, regions, dtype, layout, channels=channels, box_channels=130)
    check("anchor_cosine", regions, F32, layout, channels=channels)


@pytest.mark.parametrize("limit", [227, 99])
def test_two_thousand_anchors_and_channels(limit, kernels):
    kernels.settings(shared_memory_limit=limit << 10)
    regions = make_regions(number=1300, levels=1, num_classes=1203, shapes=[(6, 6)], strides=[30])
    assert (regions.area > 0).sum() > 500
    check("sea_loss", regions, BF16, channels=16, box_channels=8)
    check("distance", make_regions(levels=1, shapes=[(4, 4)], strides=[50]), BF16, channels=2048)


@pytest.mark.parametrize("limit", [227, 163, 99])
def test_gpus_with_less_shared_memory(limit, kernels):
    kernels.settings(shared_memory_limit=limit << 10)
    regions = make_regions(number=30, levels=2, num_classes=25)
    for dtype in (F32, BF16, F64):
        check(EVERYTHING, regions, dtype, channels=200, box_channels=24)


@pytest.mark.parametrize("classes", [800, 1250])
def test_more_than_1500_masks_in_float64_with_little_shared_memory(classes, kernels):
    kernels.settings(shared_memory_limit=99 << 10)
    regions = make_regions(number=classes, levels=2, num_classes=classes, shapes=[(6, 6), (3, 4)], strides=[30, 60])
    assert regions.area.shape[1] == 1 + 2 * classes
    check("anchor_pool", regions, F64, channels=9)
    check("sea_loss", regions, F64, channels=9, box_channels=8)


def test_more_maps_than_one_launch_takes(kernels):
    regions = make_regions(levels=5, number=3)
    check("sea_loss", regions, BF16, channels=8, box_channels=8, sets=6)  # 60 pairs
    assert kernels.launches()["pool"] == 2


def test_few_launches(kernels):
    """From boxes to gradients: nothing depends on the number of boxes, levels or maps."""
    launches = set()
    for number, levels, sets in ((3, 2, 1), (14, 5, 4), (14, 5, 2)):
        kernels.launches()
        regions = make_regions(levels=levels, number=number, num_classes=20)
        run("sea_loss", make_inputs(regions, 8, 8, sets, BF16), regions)
        launches.add(sum(kernels.launches().values()))
    assert len(launches) == 1 and launches.pop() <= 10


@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, BF16), (BF16, F32), (F16, F64)], ids=str)
@pytest.mark.parametrize("detach", [False, True])
def test_sizes_of_what_is_saved(dtypes, detach, kernels):
    """Python computes them, and the operators refuse any other size."""
    regions, losses = make_regions(levels=3), [3, 7, 5, 1]
    maps = [
        [x for c in (40, 24, 7, 8) for x in cases.make_maps(regions.level_shapes, channels=c, dtype=dtype)]
        for dtype in dtypes
    ]
    sizes = list(sizes_of_saved.elements(*maps, losses, regions.area.shape[1], detach))
    assert (sizes[1] == 0) == detach
    given = *maps, losses, regions.tensors(), 0.1, 1.0
    assert [x.numel() for x in torch.ops.sea_kernels.sea_loss(*given, *sizes)[3]] == sizes
    if not detach:
        with pytest.raises(RuntimeError, match=r"gradient_elements without saved_elements is \d+; expected 0"):
            torch.ops.sea_kernels.sea_loss(*given, 0, *sizes[1:])
    for i in range(3):
        for wrong in (sizes[i] - 1, sizes[i] + 1):
            with pytest.raises(RuntimeError, match=r"_elements is -?\d+; expected "):
                torch.ops.sea_kernels.sea_loss(*given, *sizes[:i], wrong, *sizes[i + 1 :])


def test_pooling_frees_its_memory_before_what_is_saved_is_allocated(kernels):
    regions, losses = make_regions(number=300, num_classes=300, levels=2), [7]
    maps = [cases.make_maps(regions.level_shapes, channels=64, seed=seed, dtype=BF16) for seed in (0, 1)]
    call = *maps, losses, regions.tensors()
    sizes = sizes_of_saved.elements(*maps, losses, regions.area.shape[1], False)
    tables = 2 * 2 * regions.area.shape[1] * 64  # of anchors
    torch.ops.sea_kernels.sea_loss_pool(*call, 1.0, tables, sizes[2])
    pool = kernels.peak_bytes()
    anchors = torch.zeros(tables)
    torch.ops.sea_kernels.sea_loss_compare(*call, anchors, 0.1, *sizes[:2])
    compare = kernels.peak_bytes() + anchors.nbytes
    torch.ops.sea_kernels.sea_loss(*call, 0.1, 1.0, *sizes)
    small = 4 * sizes[2] + 4096  # the channels' softmax, the losses and their terms
    assert max(pool, compare) <= kernels.peak_bytes() <= max(pool, compare) + small < pool + 4 * sizes[0]


# -------------------------------------------------------------------------------------------------------- mutations

MUTATIONS = {  # what is wrong: sources of cuda/ops that have it, the operator and the dtype that show it, and the edit
    "barrier: a tile is used before every thread's part of it has come": (
        ["losses", "pool"],
        EVERYTHING,
        F32,
        "cuda/mainloop.cuh",
        """maps[1], kM, block.k) : tile[0];
    __syncthreads();""",
        "maps[1], kM, block.k) : tile[0];",
    ),
    "barrier: cosines are used before every warp has written its own": (
        ["losses", "pool"],
        EVERYTHING,
        BF16,
        "cuda/distance_few.cuh",
        """    __syncthreads();
    const int u = loop.pixel();""",
        "    const int u = loop.pixel();",
    ),
    "barrier: the teacher's softmax is used before it is there": (
        ["losses", "pool"],
        EVERYTHING,
        BF16,
        "cuda/distance_backward_few.cuh",
        """    __syncthreads();
    float along[2] = {};""",
        "    float along[2] = {};",
    ),
    "index: a tile of the wrong image": (
        ["losses", "pool"],
        EVERYTHING,
        BF16,
        "cuda/pyramid.cuh",
        "image = static_cast<int>((at - row * in_row) / tiles);",
        "image = 0;",
    ),
    "mask: what is beyond the last pixel is written": (
        ["losses", "pool"],
        EVERYTHING,
        BF16,
        "cuda/tile.cuh",
        "const int valid = part_of((tile.pixel_rows ? channels : count) - share.column, kSize);",
        "const int valid = part_of((tile.pixel_rows ? channels : count + 1) - share.column, kSize);",
    ),
    "operator, stride: the anchors of a level lie over those of the level before": (
        ["pool"],
        "anchor_pool",
        BF16,
        "cuda/ops/pool.cu",
        "data<T>(anchors) + pair.level * masks.masks * pair.channels",
        "data<T>(anchors) + pair.level * pair.channels",
    ),
    "operator, size: the areas have one mask less than there are": (
        ["regions"],
        None,
        F32,
        "cuda/ops/regions.cu",
        "make({in.levels, in.masks()}, ScalarType::Float, boxes)",
        "make({in.levels, in.masks() - 1}, ScalarType::Float, boxes)",
    ),
    "operator, device: memory is allocated before the device is the current one": (
        ["cosine"],
        "anchor_cosine",
        BF16,
        "cuda/ops/cosine.cu",
        """const OnDevice on(anchors);
  std::vector<Tensor> cosines;""",
        "std::vector<Tensor> cosines;",
    ),
}


@pytest.mark.parametrize("mutation", MUTATIONS.values(), ids=MUTATIONS)
def test_the_emulator_sees_mistakes(mutation, kernels):
    sources, variant, dtype, *edit = mutation
    # All anchors fit into one chunk: else the barriers around the next chunk would stand in for a missing one.
    regions = make_regions(levels=2, shapes=[(20, 28), (5, 5)], strides=[8, 40])
    try:
        mutated = operators.install(sources=sources, edits=[edit], dtypes=[str(dtype).removeprefix("torch.")])
        failed = []
        for order in (0, 1):
            mutated.settings(seed=order)
            try:
                if variant is None:
                    make_regions(levels=2)
                else:
                    check(variant, regions, dtype, channels=40, box_channels=24)
            except (AssertionError, RuntimeError) as error:
                failed.append(error)
        assert failed and not any("built without this dtype" in str(error) for error in failed)
    finally:
        operators.install()


def test_boxes_over_several_launches(kernels):
    """Lists of more images than one launch takes."""
    images = 700
    boxes, labels, index = make_boxes(900, images, num_classes=9)
    order = index.argsort(stable=True)
    counts = index.bincount(minlength=images).tolist()
    lists = [x[order].split(counts) for x in (boxes, labels)]
    options = {
        "level_shapes": [(4, 5)],
        "strides": [40],
        "num_classes": 9,
        "image_sizes": [(160, 150 + b % 50) for b in range(images)],
    }
    got = sk.Regions.from_boxes(*lists, **options)
    assert sum(kernels.launches().values()) > 3
    with sk.backend("reference"):
        wanted = sk.Regions.from_boxes(*lists, **options)
    for x, y in zip(got.tensors(), wanted.tensors()):
        assert torch.equal(x, y)
