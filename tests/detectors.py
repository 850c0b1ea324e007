"""Real detectors, small, untrained: ResNet-18 students and ResNet-50 teachers of torchvision and MMDetection."""

import functools
import importlib
import json
import os
from pathlib import Path

import pytest
import torch

TORCHVISION = ("FCOS", "RetinaNet", "FasterRCNN", "MaskRCNN")
MMDET = {
    "FCOS": "fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py",
    "RetinaNet": "retinanet/retinanet_r50_fpn_1x_coco.py",
    "ATSS": "atss/atss_r50_fpn_1x_coco.py",
    "GFL": "gfl/gfl_r50_fpn_1x_coco.py",
    "FasterRCNN": "faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py",
    "CascadeRCNN": "cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py",
    "MaskRCNN": "mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py",
    "SOLOv2": "solov2/solov2_r50_fpn_1x_coco.py",
}
# Found by the structure of their heads. A pair: student, teacher.
MMDET_BY_STRUCTURE = {
    "RTMDet": ("rtmdet/rtmdet_tiny_8xb32-300e_coco.py", "rtmdet/rtmdet_s_8xb32-300e_coco.py"),
    "RTMDetIns": ("rtmdet/rtmdet-ins_tiny_8xb32-300e_coco.py", "rtmdet/rtmdet-ins_s_8xb32-300e_coco.py"),
    "YOLOX": ("yolox/yolox_tiny_8xb8-300e_coco.py", "yolox/yolox_s_8xb8-300e_coco.py"),
    "CondInst": "condinst/condinst_r50_fpn_ms-poly-90k_coco_instance.py",
    "FSAF": "fsaf/fsaf_r50_fpn_1x_coco.py",
    "AutoAssign": "autoassign/autoassign_r50-caffe_fpn_1x_coco.py",
    "VFNet": "vfnet/vfnet_r50_fpn_1x_coco.py",
    "PAA": "paa/paa_r50_fpn_1x_coco.py",
    "DDOD": "ddod/ddod_r50_fpn_1x_coco.py",
    "TOOD": "tood/tood_r50_fpn_1x_coco.py",
    "YOLOF": "yolof/yolof_r50-c5_8xb8-1x_coco.py",
    "FoveaBox": "foveabox/fovea_r50_fpn_4xb4-1x_coco.py",
    "SOLO": "solo/solo_r50_fpn_1x_coco.py",
    "SparseRCNN": "sparse_rcnn/sparse-rcnn_r50_fpn_1x_coco.py",
    "DETR": "detr/detr_r50_8xb2-150e_coco.py",
    "DeformableDETR": "deformable_detr/deformable-detr_r50_16xb2-50e_coco.py",
    "DINO": "dino/dino-4scale_r50_8xb2-12e_coco.py",
}
NUM_CLASSES = 80


def require(library):
    """Skips the test where a library is missing; torchvision may be there and not fit the installed torch."""
    try:
        importlib.import_module(library)
    except Exception:  # one for another torch fails in its own ways
        pytest.skip(f"{library} is not installed, or not for this torch")


@functools.cache
def coco_images(count=2, start=8):
    """[(uint8 image [3, H, W], boxes [G, 4], labels [G])] of COCO's validation images."""
    import matplotlib.image

    if "SEA_KERNELS_DATA" not in os.environ:
        pytest.skip("SEA_KERNELS_DATA is not set")
    folder = Path(os.environ["SEA_KERNELS_DATA"]) / "coco_mini"
    coco = json.loads((folder / "instances_val2017.json").read_text())
    out = []
    for image in coco["images"][start:]:
        rows = [a for a in coco["annotations"] if a["image_id"] == image["id"] and min(a["bbox"][2:]) >= 2]
        pixels = torch.from_numpy(matplotlib.image.imread(folder / "images" / image["file_name"]).copy())
        if not rows or pixels.dim() != 3:
            continue
        xywh = torch.tensor([a["bbox"] for a in rows])
        boxes = torch.cat([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], 1)
        out.append((pixels.permute(2, 0, 1), boxes, torch.tensor([a["category_id"] for a in rows])))
        if len(out) == count:
            return out
    raise AssertionError("the annotation file has too few images with boxes")


# ------------------------------------------------------------------------------------------------------- torchvision


def torchvision_detector(name, depth=18, channels=256, seed=0, size=192):
    require("torchvision")
    from torchvision.models import detection, resnet
    from torchvision.models.detection.backbone_utils import BackboneWithFPN
    from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign
    from torchvision.ops.feature_pyramid_network import LastLevelP6P7

    torch.manual_seed(seed)
    body = getattr(resnet, f"resnet{depth}")(weights=None, norm_layer=FrozenBatchNorm2d)
    for module in body.modules():  # as good as trained norms: without any the activations grow from block to block
        if isinstance(module, FrozenBatchNorm2d):
            module.weight.fill_(0.5)
    options = {"min_size": size, "max_size": size}
    if name in ("FCOS", "RetinaNet"):
        levels, extra = [2, 3, 4], LastLevelP6P7(channels, channels)
    else:
        levels, extra = [1, 2, 3, 4], None
    layers = {f"layer{k}": str(i) for i, k in enumerate(levels)}
    widths = [body.inplanes // 8 * 2 ** (k - 1) for k in levels]
    backbone = BackboneWithFPN(body, layers, widths, channels, extra_blocks=extra)
    if name == "MaskRCNN":
        pool = MultiScaleRoIAlign(["0", "1", "2", "3"], 14, 2)
        return detection.MaskRCNN(backbone, NUM_CLASSES + 1, mask_roi_pool=pool, **options)
    return getattr(detection, name)(backbone, NUM_CLASSES + ("RCNN" in name), **options)


def torchvision_batch(name, count=2):
    """(images, targets) as torchvision's detectors take them."""
    images, targets = [], []
    for pixels, boxes, labels in coco_images(count):
        images.append(pixels.float() / 255)
        target = {"boxes": boxes.clone(), "labels": labels + ("RCNN" in name)}
        if name == "MaskRCNN":
            target["masks"] = box_masks(boxes, pixels.shape[1:])
        targets.append(target)
    return images, targets


def box_masks(boxes, size):
    """uint8 [G, H, W]: each box's own pixels."""
    masks = torch.zeros(len(boxes), *size, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.round().long().tolist()):
        mask[y1 : max(y2, y1 + 1), x1 : max(x2, x1 + 1)] = 1
    return masks


# ------------------------------------------------------------------------------------------------------- MMDetection


def mmdet_config(name, depth=18):
    require("mmdet")
    import mmdet
    from mmengine.config import Config
    from mmengine.logging import MMLogger

    MMLogger.get_current_instance().setLevel("ERROR")  # it lists every weight that is initialized
    paths = (MMDET | MMDET_BY_STRUCTURE)[name]
    path = paths if isinstance(paths, str) else paths[depth != 18]
    model = Config.fromfile(Path(mmdet.__file__).parent / ".mim" / "configs" / path).model
    model.backbone.init_cfg = None
    if depth == 18 and model.backbone.type == "ResNet":
        model.backbone.depth = 18
        channels = model.neck.in_channels
        model.neck.in_channels = channels // 4 if isinstance(channels, int) else [c // 4 for c in channels]
    if name == "SOLOv2":
        model.mask_head.feat_channels = 128  # its grids are as large for small images: 512 channels take a minute
    if name == "SparseRCNN":
        model.roi_head.num_stages, model.roi_head.stage_loss_weights = 1, [1]
        model.roi_head.bbox_head = model.roi_head.bbox_head[:1]
        model.train_cfg.rcnn = model.train_cfg.rcnn[:1]
    if "encoder" in model:
        model.encoder.num_layers = model.decoder.num_layers = 1
        model.num_queries = 30  # a small image has few proposals
    if name.startswith(("RTMDet", "YOLOX")):  # their images have one size
        model.data_preprocessor.update(batch_augments=None, pad_size_divisor=32, pad_mask=name == "RTMDetIns")
    return model


def mmdet_detector(name, depth=18, seed=0):
    config = mmdet_config(name, depth)
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules

    register_all_modules(init_default_scope=True)
    torch.manual_seed(seed)
    model = MODELS.build(config)
    model.init_weights()
    return model


def patch_deformable_convolutions(monkeypatch):
    """mmcv-lite lacks them; torchvision has them."""
    require("mmdet")
    require("torchvision")
    import mmcv.ops.deform_conv
    import mmcv.ops.modulated_deform_conv
    import mmdet.models.dense_heads.tood_head
    from torchvision.ops import deform_conv2d

    def plain(x, offset, weight, stride=1, padding=0, dilation=1, *_):
        return deform_conv2d(x, offset, weight, None, stride, padding, dilation)

    def modulated(x, offset, mask, weight, bias, stride, padding, dilation, *_):
        return deform_conv2d(x, offset, weight, bias, stride, padding, dilation, mask)

    monkeypatch.setattr(mmcv.ops.deform_conv, "deform_conv2d", plain)
    monkeypatch.setattr(mmdet.models.dense_heads.tood_head, "deform_conv2d", plain)
    monkeypatch.setattr(mmcv.ops.modulated_deform_conv, "modulated_deform_conv2d", modulated)


def mmdet_batch(name, count=2, divisor=2):
    """What an MMDetection data loader gives: {"inputs": [...], "data_samples": [...]}; images at half their size."""
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks
    from mmengine.structures import InstanceData

    inputs, samples = [], []
    for pixels, boxes, labels in coco_images(count):
        pixels, boxes = pixels[:, ::divisor, ::divisor].contiguous(), boxes / divisor
        h, w = pixels.shape[1:]
        instances = InstanceData(bboxes=boxes, labels=labels)
        if name != "RTMDet":  # which assigns by masks if there are any
            instances.masks = BitmapMasks(box_masks(boxes, (h, w)).numpy(), h, w)
        ignored = InstanceData(bboxes=torch.tensor([[4.0, 4.0, 40.0, 30.0]]), labels=torch.tensor([0]))
        meta = {"img_shape": (h, w), "ori_shape": (h, w), "scale_factor": (1.0, 1.0), "img_id": len(samples)}
        samples.append(DetDataSample(metainfo=meta, gt_instances=instances, ignored_instances=ignored))
        inputs.append(pixels)
    return {"inputs": inputs, "data_samples": samples}
