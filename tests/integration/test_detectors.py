"""SEADistiller in the detectors that people train: a step each, on COCO images, native kernels and the reference."""

import dataclasses
import importlib

import pytest
import torch
from detectors import (
    MMDET,
    MMDET_BY_STRUCTURE,
    NUM_CLASSES,
    TORCHVISION,
    mmdet_batch,
    mmdet_detector,
    patch_deformable_convolutions,
    require,
    torchvision_batch,
    torchvision_detector,
)

import sea_kernels as sk
from sea_kernels.distill import mmdet

NAMES = ("loss_sea_anchor", "loss_sea_distance", "loss_sea_localization")


def distill(student, teacher, **options):
    """With fixed weights: those that set themselves are 0 in the first step."""
    return sk.SEADistiller(student, teacher, weights=(0.02, 0.02, 0.02), **options)


def step(student, distiller, own_losses, backend):
    """(the three losses, the student's gradients of their sum)"""
    student.zero_grad(set_to_none=True)
    with sk.backend(backend):
        own = own_losses()
        losses = distiller.losses()
    assert tuple(losses) == NAMES and not (isinstance(own, dict) and set(losses) & set(own))
    sum(losses.values()).backward()
    return losses, {n: p.grad for n, p in student.named_parameters() if p.grad is not None}


def check(student, teacher, own_losses, trained):
    """`trained`: parts of the student that SEA must reach."""
    student.train()
    before = {n: x.clone() for n, x in teacher.state_dict().items()}
    with distill(student, teacher) as distiller:
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


@pytest.mark.parametrize("name", MMDET_BY_STRUCTURE)
def test_losses_and_gradients_by_the_structure_of_the_head(name, monkeypatch):
    """Heads with a tower for each level, with one for both branches, or without any, where the neck's maps serve."""
    patch_deformable_convolutions(monkeypatch)
    pair = not isinstance(MMDET_BY_STRUCTURE[name], str)
    student, teacher = mmdet_detector(name), mmdet_detector(name, 50 if pair else 18, seed=1)
    if name == "TOOD":  # its loss asks the run for the epoch
        from mmengine.logging import MessageHub

        MessageHub.get_current_instance().update_info("epoch", 0)

    def own_losses():
        data = student.data_preprocessor(mmdet_batch(name), training=True)
        # PAA's own loss needs scikit-learn
        return student(data["inputs"], data["data_samples"], mode="tensor" if name == "PAA" else "loss")

    check(student, teacher, own_losses, ("backbone", "neck", *TRAINED_BY_STRUCTURE.get(name, TOWERS)))


TOWERS = "bbox_head.cls_convs", "bbox_head.reg_convs"
TRAINED_BY_STRUCTURE = {
    "YOLOX": ("bbox_head.multi_level_cls_convs.2.1", "bbox_head.multi_level_reg_convs.2.1"),
    "RTMDet": ("bbox_head.cls_convs.2.1", "bbox_head.reg_convs.2.1"),
    "TOOD": ("bbox_head.inter_convs", "bbox_head.cls_decomp", "bbox_head.reg_decomp"),
    "YOLOF": ("bbox_head.cls_subnet", "bbox_head.bbox_subnet"),
    **dict.fromkeys(("RTMDetIns", "SOLO", "SparseRCNN", "DETR", "DeformableDETR", "DINO"), ()),
}


@pytest.mark.parametrize("size", ((800, 1344), (427, 640), (33, 97)))
def test_strides_of_maps_without_anchors(size):
    """Where no head knows the strides, as for DETR's, they are those of convolutions that halve their input."""
    halve, x, shapes = torch.nn.Conv2d(1, 1, 3, 2, 1, device="meta"), torch.empty(1, 1, *size, device="meta"), []
    for _ in range(7):
        x = halve(x)
        shapes.append(tuple(x.shape[2:]))
    assert mmdet._strides(size, shapes) == [2, 4, 8, 16, 32, 64, 128]


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
    with distill(student, teacher, use_masks=use_masks) as distiller:
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
    shapes, (h, w) = captured.regions.level_shapes, batch.tensors.shape[2:]
    # Where the last level does not divide the input, torchvision's anchors are less than 64 pixels apart.
    strides = [4, 8, 16, 32, (h // shapes[4][0], w // shapes[4][1])]
    wanted = make(things, labels, shapes, strides, **options)
    assert_same_regions(captured.regions, wanted)
    in_image = (wanted.extent[0, :, 0] * wanted.extent[0, :, 1]).sum()
    assert (wanted.classes >= 0).sum() > 1 and 0 < wanted.counted[0] < in_image  # the crowd shows


@pytest.mark.parametrize("name", ["FCOS", "RetinaNet", "FasterRCNN", "ssdlite320_mobilenet_v3_large"])
def test_regions_of_what_the_teacher_detects(name):
    """They are those of the teacher's own detections from min_score on, in pixels of the resized images."""
    if name == "ssdlite320_mobilenet_v3_large":
        require("torchvision")
        make = getattr(importlib.import_module("torchvision.models.detection"), name)
        student, teacher = (make(weights=None, weights_backbone=None, num_classes=NUM_CLASSES + 1) for _ in range(2))
        student.train()
    else:
        student, teacher = torchvision_detector(name).train(), torchvision_detector(name, seed=1)
    getattr(teacher, "roi_heads", teacher).score_thresh = 0.0  # untrained models have only low scores
    images, targets = torchvision_batch(name)
    transform = teacher.transform
    with distill(student, teacher, boxes="teacher", min_score=0.0) as distiller:
        student(images, targets)
        captured = distiller.capture()
        assert teacher.transform is transform and "transform" in dict(teacher.named_children())
        batch = student.transform(images)[0]
        first = 0 if name in ("FCOS", "RetinaNet") else 1
        with torch.no_grad():
            found = teacher.eval()(images)
        scale = [(h / x.shape[1], w / x.shape[2]) for (h, w), x in zip(batch.image_sizes, images)]
        boxes = [x["boxes"] * x["boxes"].new_tensor([w, h, w, h]) for x, (h, w) in zip(found, scale)]
        assert all(len(x) > 0 for x in boxes)
        student(images, targets)
        wanted = distiller.capture(boxes, [x["labels"] - first for x in found], batch.image_sizes)
        assert torch.equal(captured.regions.classes, wanted.regions.classes)
        # Boxes that were scaled there and back are rounded, which may move an edge across the center of a pixel.
        moved = (captured.regions.area - wanted.regions.area).abs().sum()
        assert wanted.regions.area.sum() > 0
        assert moved <= 0.02 * wanted.regions.area.sum()
        for ours, theirs in ((captured.teacher_cls, wanted.teacher_cls), (captured.teacher_box, wanted.teacher_box)):
            for x, y in zip(ours, theirs):
                torch.testing.assert_close(x, y)
        student(images, targets)
        with pytest.raises(ValueError, match="boxes is None; expected them beside"):
            distiller.capture(normalized=True)
        student(images, targets)
        with pytest.raises(ValueError, match="labels is given without boxes"):
            distiller.capture(labels=[x["labels"] for x in found])
        distiller.min_score = 2.0
        student(images, targets)
        assert (distiller.capture().regions.classes < 0).all()


def test_the_teachers_boxes_need_a_teacher_that_detects():
    student, teacher = torchvision_detector("FCOS"), torchvision_detector("FCOS", seed=1)
    with pytest.raises(ValueError, match="boxes is 'ground truth'; expected 'labels' or 'teacher'"):
        distill(student, teacher, boxes="ground truth")
    with pytest.raises(ValueError, match="boxes is 'teacher' and use_masks is True"):
        distill(student, teacher, boxes="teacher", use_masks=True)
    taps = dataclasses.replace(sk.taps.find(teacher), detect=None)
    with pytest.raises(ValueError, match="boxes is 'teacher', and the teacher's taps have no `detect`"):
        distill(student, teacher, teacher_taps=taps, boxes="teacher")


@pytest.mark.parametrize("use_masks", [False, True])
def test_targets_that_mmdetection_shows_reach_the_regions(use_masks):
    student, teacher = mmdet_detector("MaskRCNN").train(), mmdet_detector("MaskRCNN", seed=1)
    with distill(student, teacher, use_masks=use_masks) as distiller:
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
    with distill(student, teacher) as distiller:
        student.rpn_head(student.extract_feat(data["inputs"]))  # targets of an earlier batch are not taken
        with pytest.raises(ValueError, match=r"boxes and labels not given.*'data_preprocessor' showed none"):
            distiller.losses()


def zoo(name):
    """Two models that torchvision builds, with its own backbones and pyramids, and a batch that fits them."""
    require("torchvision")
    from torchvision.models import detection, mobilenet_v2
    from torchvision.models.detection import anchor_utils, backbone_utils
    from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

    sizes = {"min_size": 160, "max_size": 192}

    def build():
        if name == "FCOS from stride 4":
            pyramid = {"returned_layers": [1, 2, 3, 4], "extra_blocks": LastLevelMaxPool()}
            backbone = backbone_utils.resnet_fpn_backbone(backbone_name="resnet18", weights=None, **pyramid)
            return detection.FCOS(backbone, NUM_CLASSES, **sizes)
        if name == "RetinaNet on two levels":
            pyramid = {"fpn": True, "extra_blocks": None, "returned_layers": [3]}
            backbone = backbone_utils.mobilenet_backbone(backbone_name="mobilenet_v3_small", weights=None, **pyramid)
            anchors = anchor_utils.AnchorGenerator(((32,), (64,)), ((1.0,),) * 2)
            return detection.RetinaNet(backbone, NUM_CLASSES, anchor_generator=anchors, **sizes)
        if name == "FasterRCNN without a pyramid":
            backbone = mobilenet_v2(weights=None).features
            backbone.out_channels = 1280
            anchors = anchor_utils.AnchorGenerator(((32, 64),), ((1.0,),))
            return detection.FasterRCNN(backbone, NUM_CLASSES + 1, rpn_anchor_generator=anchors, **sizes)
        options = {"num_classes": NUM_CLASSES + ("rcnn" in name)}
        if "keypoint" in name:
            options = {"num_classes": 2, "box_batch_size_per_image": 16}
        return getattr(detection, name)(weights=None, weights_backbone=None, **options, **sizes)

    torch.manual_seed(0)
    images, targets = torchvision_batch("FasterRCNN" if "rcnn" in name.lower() else "FCOS")
    if "keypoint" in name:
        for target in targets:
            target["labels"] = torch.ones_like(target["labels"])
            middle = (target["boxes"][:, :2] + target["boxes"][:, 2:]) / 2
            target["keypoints"] = torch.cat([middle, torch.ones(len(middle), 1)], 1)[:, None].repeat(1, 17, 1)
    return build().train(), build(), images, targets


@pytest.mark.parametrize(
    "name",
    (
        "FCOS from stride 4",
        "RetinaNet on two levels",
        "FasterRCNN without a pyramid",
        "fasterrcnn_mobilenet_v3_large_fpn",
        "fasterrcnn_mobilenet_v3_large_320_fpn",
        "keypointrcnn_resnet50_fpn",
        "retinanet_resnet50_fpn_v2",
    ),
)
def test_strides_are_those_of_torchvisions_anchor_generator(name, monkeypatch):
    """Any backbone and pyramid: no number of levels and no stride is assumed."""
    student, teacher, images, targets = zoo(name)
    generator = student.rpn.anchor_generator if "rcnn" in name.lower() else student.anchor_generator
    strides, place_anchors = [], generator.grid_anchors

    def spy(grids, steps):
        strides.append([tuple(int(n) for n in step) for step in steps])
        return place_anchors(grids, steps)

    monkeypatch.setattr(generator, "grid_anchors", spy)
    seen = []
    student.transform.register_forward_hook(lambda _module, _args, output: seen.append(output))
    with distill(student, teacher) as distiller:
        student(images, targets)
        captured = distiller.capture()
        student(images, targets)
        losses = distiller.losses()
    assert all(x.isfinite() for x in losses.values()) and losses["loss_sea_distance"] > 0
    sum(losses.values()).backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in student.backbone.parameters())
    batch, shown = seen[0]
    wanted = sk.Regions.from_boxes(
        [t["boxes"] for t in shown],
        [t["labels"] - int("rcnn" in name.lower()) for t in shown],
        captured.regions.level_shapes,
        strides[0],
        num_classes=1 if "keypoint" in name else NUM_CLASSES,
        image_sizes=batch.image_sizes,
    )
    assert_same_regions(captured.regions, wanted)


@pytest.mark.parametrize("name", ("ssd300_vgg16", "ssdlite320_mobilenet_v3_large"))
def test_strides_are_those_of_ssds_default_boxes(name):
    require("torchvision")
    from torchvision.models import detection

    def build():
        return getattr(detection, name)(weights=None, weights_backbone=None, num_classes=NUM_CLASSES + 1)

    student, teacher = build().train(), build()
    seen = []
    student.transform.register_forward_hook(lambda _module, _args, output: seen.append(output))
    with distill(student, teacher) as distiller:
        student(*torchvision_batch("FasterRCNN"))
        captured = distiller.capture()
        student(*torchvision_batch("FasterRCNN"))
        losses = distiller.losses()
    assert len({x.shape[1] for x in captured.student_cls[0]}) > 1 and all(x > 0 for x in losses.values())
    sum(losses.values()).backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in student.backbone.parameters())
    (batch, shown), shapes = seen[0], captured.regions.level_shapes
    assert len(shapes) == 6 and [len(sets) for sets in captured[:4]] == [1] * 4
    size, generator = batch.tensors.shape[2:], student.anchor_generator
    boxes, first, strides = generator._grid_default_boxes(shapes, size), 0, []
    for (h, w), count in zip(shapes, generator.num_anchors_per_location()):
        x, y = boxes[first, :2].tolist()  # the first box of a level has its center half a stride from the corner
        strides.append((2 * y * size[0], 2 * x * size[1]))
        first += h * w * count
    wanted = sk.Regions.from_boxes(
        [t["boxes"] for t in shown], [t["labels"] - 1 for t in shown], shapes, strides, image_sizes=batch.image_sizes
    )
    assert_same_regions(captured.regions, wanted)


def test_a_pyramid_from_stride_4_covers_the_pixels_of_its_boxes():
    """The stride of its first level is not that of a table: a quarter of the image is a quarter of each map."""
    student, teacher, *_ = zoo("FCOS from stride 4")
    image = torch.rand(3, 160, 160)
    box = {"boxes": torch.tensor([[80.0, 80.0, 160.0, 160.0]]), "labels": torch.tensor([3])}
    with distill(student, teacher) as distiller:
        student([image], [box])
        captured = distiller.capture()
    assert captured.regions.level_shapes[:4] == ((40, 40), (20, 20), (10, 10), (5, 5))
    for level, (first, part) in enumerate(((20, 1 / 4), (10, 1 / 4), (5, 1 / 4), (2, 9 / 25))):
        masks = captured.regions.masks(level)
        box = masks[1:].any(0)[0]
        assert box.float().mean().item() == pytest.approx(part) and box.any(0).nonzero()[0].item() == first


def test_solo_grids_divide_the_input():
    """Their strides are those of the padded input: neither whole nor the same both ways."""
    student = mmdet_detector("SOLOv2").train()
    with distill(student, mmdet_detector("SOLOv2", seed=1)) as distiller:
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
    with distill(student, teacher) as distiller:
        student(*torchvision_batch("FCOS"))
        sum(distiller.losses().values()).backward()
    assert len(distiller.adapters) == 8 and all(a.weight.shape == (256, 128, 1, 1) for a in distiller.adapters.values())
    assert all(p.grad.abs().max() > 0 for p in distiller.parameters() if p.dim() > 1)


def test_the_candidates_of_a_detector():
    """Those with a map for each level are the pyramid and the head; strides are those of the padded images."""
    model = torchvision_detector("FCOS").train()
    found = {x.name: x for x in sk.taps.candidates(model, [torch.ones(3, 150, 220), torch.ones(3, 192, 192)])}
    assert model.training and {n for x in sk.taps.find(model).cls for n in sk.taps.names(x)} <= found.keys()
    levels = [name for name, x in found.items() if len(x.shapes) == 5]
    assert levels[2] == "backbone" and all(name.startswith("head.") for name in levels[3:])
    for name in ("backbone", "head.classification_head.conv.2", "head.regression_head.conv"):
        strides, calls = found[name].strides, found[name].calls
        assert strides[:4] == ((8, 8), (16, 16), (32, 32), (64, 64)) and calls == (1 if name == "backbone" else 5)


def test_the_candidates_of_a_detector_of_two_stages_hold_no_maps_of_boxes():
    found = {x.name: x for x in sk.taps.candidates(torchvision_detector("MaskRCNN"), [torch.ones(3, 192, 192)])}
    assert {"backbone", "rpn.head.conv"} <= found.keys() and not any(n.startswith("roi_heads") for n in found)
