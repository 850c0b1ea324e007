"""SEADistiller in the detectors that people train: a step each, on COCO images, native kernels and the reference."""

import pytest
import torch
from detectors import MMDET, TORCHVISION, mmdet_batch, mmdet_detector, torchvision_batch, torchvision_detector

import sea_kernels as sk

NAMES = ("loss_sea_anchor", "loss_sea_distance", "loss_sea_localization")


def step(student, distiller, own_losses, backend):
    """(the three losses, the student's gradients of their sum)"""
    student.zero_grad(set_to_none=True)
    with sk.backend(backend):
        own = own_losses()
        losses = distiller.losses()
    assert tuple(losses) == NAMES and not set(losses) & set(own)
    sum(losses.values()).backward()
    return losses, {n: p.grad for n, p in student.named_parameters() if p.grad is not None}


def check(student, teacher, own_losses, trained):
    """`trained`: parts of the student that SEA must reach."""
    student.train()
    before = {n: x.clone() for n, x in teacher.state_dict().items()}
    with sk.SEADistiller(student, teacher) as distiller:
        native, gradients = step(student, distiller, own_losses, "native")
        plain, expected = step(student, distiller, own_losses, "reference")
    for name, weight in zip(NAMES, distiller.weights):
        assert native[name].isfinite() and native[name] > 0, name
        # A loss of models that are nearly alike is a small difference of terms of order 1, which are rounded.
        rounding = 4 * torch.finfo(torch.float32).eps * weight
        torch.testing.assert_close(native[name], plain[name], rtol=1e-4, atol=rounding)
    assert gradients.keys() == expected.keys()
    # The localization loss does not see a common offset: the exact gradient of a bias behind it is 0, rounding shows.
    rounding = 1e-6 * max(x.abs().max().item() for x in expected.values())
    for name, x in gradients.items():
        assert x.isfinite().all(), name
        bound = 2e-3 * expected[name].abs().max().item() + rounding
        assert (x - expected[name]).abs().max().item() <= bound, name
    for part in trained:
        assert any(name.startswith(part) and x.abs().max() > 0 for name, x in gradients.items()), part
    assert not teacher.training and not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    for name, x in teacher.state_dict().items():
        assert torch.equal(x, before[name]), f"the teacher's {name} changed"


@pytest.mark.parametrize("name", TORCHVISION)
def test_losses_and_gradients_in_torchvision(name):
    student, teacher = torchvision_detector(name), torchvision_detector(name, 50, seed=1)
    towers = ("rpn.head.conv",) if "RCNN" in name else ("head.classification_head.conv", "head.regression_head.conv")
    check(student, teacher, lambda: student(*torchvision_batch(name)), ("backbone.body", *towers))


@pytest.mark.parametrize("name", MMDET)
def test_losses_and_gradients_in_mmdetection(name):
    student, teacher = mmdet_detector(name), mmdet_detector(name, 50, seed=1)
    towers = {"SOLOv2": ("mask_head.cls_convs", "mask_head.kernel_convs")}.get(
        name, ("rpn_head.rpn_conv",) if "RCNN" in name else ("bbox_head.cls_convs", "bbox_head.reg_convs")
    )

    def own_losses():
        data = student.data_preprocessor(mmdet_batch(name), training=True)
        return student.loss(data["inputs"], data["data_samples"])

    check(student, teacher, own_losses, ("backbone", "neck", *towers))


# ------------------------------------------------------------------------------- ground truth, as the taps see it


def assert_same_regions(found, wanted):
    for name, x, y in zip(("classes", "area", "counted", "extent", "bits", "runs"), found.tensors(), wanted.tensors()):
        assert torch.equal(x, y), name


@pytest.mark.parametrize("use_masks", [False, True])
def test_targets_that_torchvision_shows_reach_the_regions(use_masks):
    """Boxes as they are after the resize, labels from 0, crowds in no region, sizes before padding."""
    student, teacher = torchvision_detector("MaskRCNN").train(), torchvision_detector("MaskRCNN", seed=1)
    images, targets = torchvision_batch("MaskRCNN")
    for target in targets[:1]:  # the other has no such key
        target["iscrowd"] = (torch.arange(len(target["labels"])) == 0).long()
    with sk.SEADistiller(student, teacher, use_masks=use_masks) as distiller:
        student.backbone(student.transform(images, targets)[0].tensors)
        student.rpn.head(list(student.backbone(student.transform(images, targets)[0].tensors).values()))
        captured = distiller.capture()
    batch, seen = student.transform(images, targets)
    crowd = [t.get("iscrowd", torch.zeros(len(t["labels"]))) > 0 for t in seen]
    options = {
        "num_classes": 80,
        "image_sizes": batch.image_sizes,
        "ignore_boxes": [t["boxes"][c] for t, c in zip(seen, crowd)],
    }
    things = [t["masks"] if use_masks else t["boxes"] for t in seen]
    labels = [(t["labels"] - 1).masked_fill(c, -1) for t, c in zip(seen, crowd)]
    make = sk.Regions.from_masks if use_masks else sk.Regions.from_boxes
    wanted = make(things, labels, captured.regions.level_shapes, [4, 8, 16, 32, 64], **options)
    assert_same_regions(captured.regions, wanted)
    in_image = (wanted.extent[0, :, 0] * wanted.extent[0, :, 1]).sum()
    assert (wanted.classes >= 0).sum() > 1 and 0 < wanted.counted[0] < in_image  # the crowd shows


@pytest.mark.parametrize("use_masks", [False, True])
def test_targets_that_mmdetection_shows_reach_the_regions(use_masks):
    student, teacher = mmdet_detector("MaskRCNN").train(), mmdet_detector("MaskRCNN", seed=1)
    with sk.SEADistiller(student, teacher, use_masks=use_masks) as distiller:
        data = student.data_preprocessor(mmdet_batch("MaskRCNN"), training=True)
        student.rpn_head(student.extract_feat(data["inputs"]))
        captured = distiller.capture()
    samples = data["data_samples"]
    options = {
        "num_classes": 80,
        "image_sizes": [s.img_shape for s in samples],
        "ignore_boxes": [s.ignored_instances.bboxes for s in samples],
    }
    labels = [s.gt_instances.labels for s in samples]
    make, things = sk.Regions.from_boxes, [s.gt_instances.bboxes for s in samples]
    if use_masks:
        make, things = sk.Regions.from_masks, [torch.from_numpy(s.gt_instances.masks.masks) for s in samples]
    wanted = make(things, labels, captured.regions.level_shapes, [4, 8, 16, 32, 64], **options)
    assert_same_regions(captured.regions, wanted)
    assert (wanted.classes >= 0).sum() > 1 and wanted.counted[0] < 2 * data["inputs"][0, 0].numel() / 16
    with sk.SEADistiller(student, teacher) as distiller:
        student.rpn_head(student.extract_feat(data["inputs"]))  # targets of an earlier batch are not taken
        with pytest.raises(ValueError, match=r"boxes and labels not given.*'data_preprocessor' showed none"):
            distiller.losses()


def test_solo_grids_divide_the_input():
    """Their strides are those of the padded input: neither whole nor the same both ways."""
    student = mmdet_detector("SOLOv2").train()
    with sk.SEADistiller(student, mmdet_detector("SOLOv2", seed=1)) as distiller:
        data = student.data_preprocessor(mmdet_batch("SOLOv2"), training=True)
        student.mask_head(student.extract_feat(data["inputs"]))
        captured = distiller.capture()
    samples, (h, w) = data["data_samples"], data["inputs"].shape[2:]
    strides = [(h / n, w / n) for n in (40, 36, 24, 16, 12)]
    assert captured.regions.level_shapes == tuple((n, n) for n in (40, 36, 24, 16, 12)) and h != w
    wanted = sk.Regions.from_boxes(
        [s.gt_instances.bboxes for s in samples],
        [s.gt_instances.labels for s in samples],
        captured.regions.level_shapes,
        strides,
        image_sizes=[s.img_shape for s in samples],
        ignore_boxes=[s.ignored_instances.bboxes for s in samples],
    )
    assert_same_regions(captured.regions, wanted)


def test_a_narrower_student_gets_adapters():
    """Half the channels of the teacher in FPN and towers; GroupNorm and ReLU at the end of every block."""
    student, teacher = torchvision_detector("FCOS", channels=128).train(), torchvision_detector("FCOS", seed=1)
    with sk.SEADistiller(student, teacher) as distiller:
        student(*torchvision_batch("FCOS"))
        sum(distiller.losses().values()).backward()
    assert len(distiller.adapters) == 8 and all(a.weight.shape == (256, 128, 1, 1) for a in distiller.adapters.values())
    assert all(p.grad.abs().max() > 0 for p in distiller.parameters() if p.dim() > 1)
