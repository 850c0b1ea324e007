"""Anchors over the batch of several ranks, which threads play here: nothing depends on how images lie on ranks."""

import cases
import pytest
import tolerance
import torch
from cases import BF16, F16, F32, F64
from hypothesis import given
from hypothesis import strategies as st
from ranks import CLASSES, RANKS, REDUCING, Threads, assert_equal_to_one_process, make_rank, share, whole

import sea_kernels as sk


def run_threads(variant, ranks, dtype=F64, **options):
    def work(group, k):
        inputs = ranks[k].inputs.map(lambda x: x.to(dtype))
        return cases.run(variant, inputs, ranks[k].regions(group), **options)

    return Threads(len(ranks)).run(work)


@pytest.mark.parametrize("variant", REDUCING)
def test_several_ranks_equal_one(variant, backend):
    assert_equal_to_one_process(variant, RANKS, run_threads(variant, RANKS))


@pytest.mark.parametrize("variant", [name for name in REDUCING if name != "anchor_pool"])
def test_several_ranks_equal_one_where_channels_differ_from_level_to_level(variant, backend):
    ranks = [
        make_rank(seed, batch, number, size, 3, [24, 9, 9], [8, 8, 16])
        for seed, (batch, number, size) in enumerate([(2, 5, (80, 112)), (1, 0, (64, 130)), (0, 0, (80, 112))])
    ]
    assert_equal_to_one_process(variant, ranks, run_threads(variant, ranks))


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("variant", REDUCING)
def test_several_ranks_are_as_exact_as_plain_pytorch_in_one_process(variant, dtype):
    """By the rule, where plain PyTorch has the whole batch in one process."""
    rows = [[], [], []]
    for seed in range(16 if variant != "anchor_pool" else 1):
        ranks = [make_rank(100 * seed + k, batch=1 + k, number=6, channels=48) for k in range(2)]
        results = run_threads(variant, ranks, dtype)
        one = whole(ranks)
        inputs, regions = one.inputs.map(lambda x: x.to(dtype)), one.regions()
        exact = cases.run(variant, inputs.map(torch.Tensor.double), regions, "reference")
        plain = cases.run(variant, inputs, regions, "reference")
        mean = [torch.stack(x).mean(0) for x in zip(*(outputs for outputs, _ in results))]
        for row, outputs in zip(rows, (mean, plain[0], exact[0])):
            row.append(outputs)
        for k, (_, gradients) in enumerate(results):
            for i, x in enumerate(zip(gradients[:-1], share(plain[1], ranks, k), share(exact[1], ranks, k))):
                tolerance.assert_close(*x, tolerance.GRADIENT, f"gradient {i} of rank {k}")
                if x[0] is not None and dtype != F32:
                    tolerance.assert_relative(x[0], x[2], 0.01, f"gradient {i} of rank {k}")
    for outputs in zip(*(zip(*row) for row in rows)):
        if outputs[0][0].dim() == 0:
            tolerance.assert_scalars_close(*outputs)
        else:
            tolerance.assert_close(*(x[0] for x in outputs), tolerance.OUTPUT)


@st.composite
def splits(draw):
    """Ranks, in short; the values come from the seeds."""
    levels, sets = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    channels, box_channels = draw(st.sampled_from([1, 3, 16, 33])), draw(st.sampled_from([1, 8]))
    each = st.tuples(st.integers(0, 3), st.integers(0, 9), st.tuples(st.integers(24, 90), st.integers(24, 90)))
    strides = draw(st.sampled_from([(8, 16, 40), (13.3, 20, 7.5)]))
    return [
        make_rank(seed, batch, number, size, levels, channels, box_channels, sets, strides)
        for seed, (batch, number, size) in enumerate(draw(st.lists(each, min_size=1, max_size=4)))
    ]


@pytest.mark.parametrize("variant", ["anchor_pool", "sea_loss, everything"])
@given(data=st.data())
def test_any_split_of_a_batch_changes_nothing(variant, data):
    ranks = data.draw(splits())
    options = {"detach_anchors": data.draw(st.booleans())} if variant != "anchor_pool" else {}
    assert_equal_to_one_process(variant, ranks, run_threads(variant, ranks, **options), **options)


def test_every_rank_has_the_same_rows(backend):
    one = whole(RANKS).regions()
    results = Threads(4).run(lambda group, k: RANKS[k].regions(group))
    for rank, regions in zip(RANKS, results):
        assert regions.group.size == 4 and regions.images == 6 and regions.batch_size == rank.batch
        for name in ("classes", "area", "counted"):
            assert torch.equal(getattr(regions, name), getattr(one, name)), name
        assert regions.classes.shape == (CLASSES,)
        own = rank.regions()
        assert torch.equal(regions.extent, own.extent)
        found = [regions.classes.tolist().index(c) for c in own.classes.tolist() if c >= 0]
        rows = [0] + [1 + 2 * k + edge for k in found for edge in (0, 1)]
        for level in range(2):
            masks, mine = regions.masks(level), own.masks(level)
            assert torch.equal(masks[rows], mine[: len(rows)]) and masks.sum() == mine.sum()


def test_masks_of_instances_have_the_regions_of_their_boxes(backend):
    """from_masks gives the group what from_boxes does for the boxes that they fill."""

    def work(group, k):
        boxes = [torch.tensor([[8.0, 4, 40, 50], [60, 20, 90, 44]])[: 2 - k], torch.tensor([[30.0, 8, 100, 60]])]
        labels = [torch.tensor([4, 1])[: 2 - k], torch.tensor([[0], [5]][k])]
        options = {"num_classes": CLASSES, "group": group, "image_sizes": [(80, 112), (60, 100)]}
        masks = [torch.zeros(len(x), 80, 112, dtype=torch.bool) for x in boxes]
        for image, rows in zip(masks, boxes):
            for mask, (x1, y1, x2, y2) in zip(image, rows.int().tolist()):
                mask[y1:y2, x1:x2] = True
        shapes = [(10, 14), (5, 7)]
        return (
            sk.Regions.from_masks(masks, labels, shapes, [8, 16], **options),
            sk.Regions.from_boxes(boxes, labels, shapes, [8, 16], **options),
        )

    for masks, boxes in Threads(2).run(work):
        for x, y in zip([*masks.tensors(), masks.images], [*boxes.tensors(), boxes.images]):
            assert torch.equal(x, y)
        assert masks.classes.tolist() == [0, 1, 4, 5, -1, -1] and masks.group == boxes.group


@pytest.mark.parametrize("name", ["anchor", "distance", "localization"])
def test_gradient_of_one_of_the_losses(name, backend):
    ranks = RANKS[:3]

    def gradients(rank, group):
        inputs = rank.inputs.map(lambda x: x.detach().requires_grad_())
        losses = sk.sea_loss(inputs.cls, inputs.cls_teacher, inputs.box, inputs.box_teacher, rank.regions(group))
        return torch.autograd.grad(getattr(losses, name), inputs.leaves(), allow_unused=True, materialize_grads=True)

    exact = gradients(whole(ranks), None)
    for k, found in enumerate(Threads(3).run(lambda group, k: gradients(ranks[k], group))):
        for a, b in zip(found, share(exact, ranks, k)):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_no_rank_has_an_image(backend):
    for outputs, _ in run_threads("sea_loss, everything", [RANKS[3]] * 2):
        assert [x.item() for x in outputs] == [0, 0, 0]


def test_regions_anchors_and_their_gradient_are_one_reduction_each():
    """One for the regions, one for the anchors of all maps and levels, one for their gradient; none in backward."""
    ranks = [make_rank(k, batch=1, number=4, sets=2) for k in range(2)]
    levels, rows, cls, box = 2, 1 + 2 * CLASSES, 24, 16
    threads, counts = Threads(2), {}

    def count(name, f):
        threads.reductions[threads.here.rank].clear()
        out = f()
        counts[name, threads.here.rank] = list(threads.reductions[threads.here.rank])
        return out

    def work(group, k):
        inputs = ranks[k].inputs.map(lambda x: x.detach().requires_grad_())
        regions = count("regions", lambda: ranks[k].regions(group))
        for detach in (False, True):
            loss = lambda d=detach: sum(cases.CALLS["sea_loss"](inputs, regions, detach_anchors=d))  # noqa: E731
            total = count(f"forward, detached {detach}", loss)
            count("backward", total.backward)
            with torch.no_grad():
                count("no gradient", loss)
        local = count("localization", lambda: cases.CALLS["localization"](inputs, regions)[0])
        count("localization backward", local.backward)
        pooled = count("anchor_pool", lambda: sk.anchor_pool(inputs.cls[0], regions))
        count("anchor_pool backward", pooled.sum().backward)

    threads.run(work)
    anchors = 2 * levels * rows * (2 * cls + box)  # 2 sets of each branch; of box maps the difference of the sides
    gradient = 2 * levels * rows * cls
    for k in range(2):
        assert counts["regions", k] == [levels * (rows + 2) + CLASSES + 1 + levels + 1]
        assert counts["forward, detached False", k] == [anchors, gradient]
        assert counts["forward, detached True", k] == counts["no gradient", k] == [anchors]
        assert counts["backward", k] == counts["localization", k] == counts["localization backward", k] == []
        assert counts["anchor_pool", k] == counts["anchor_pool backward", k] == [levels * rows * cls]


def test_upstream_gradients_of_anchor_pool_may_differ(backend):
    """Of anchor_pool's own backward they are summed up: it gives the gradient of the sum of whatever all ranks do."""
    ranks = RANKS[:2]

    def work(group, k):
        x = [m.detach().requires_grad_() for m in ranks[k].inputs.cls[0]]
        return torch.autograd.grad((sk.anchor_pool(x, ranks[k].regions(group)) * (k + 1)).square().sum(), x)

    one = whole(ranks)
    x = [m.requires_grad_() for m in one.inputs.cls[0]]
    anchors = sk.anchor_pool(x, one.regions())
    exact = torch.autograd.grad(anchors.square().sum() + (2 * anchors).square().sum(), x)
    first = 0
    for rank, found in zip(ranks, Threads(2).run(work)):
        for (h, w), a, b in zip(rank.shapes, found, exact):
            torch.testing.assert_close(a, b[first : first + rank.batch, :, :h, :w])
        first += rank.batch
