"""torchvision's FCOS and Faster R-CNN on a small backbone, and the COCO average precision of their detections.

The transform, the heads, the losses and the post-processing are torchvision's. Made here: the backbone, group
normalization of 8 groups in FCOS's towers (with torchvision's 32, a group would have one or two channels), and scales
for small images.
"""

import contextlib
import io
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import detection
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.fcos import FCOSClassificationHead, FCOSHead, FCOSRegressionHead
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
STRIDES = (8, 16, 32)


@dataclass(frozen=True)
class Net:
    """Widths after the stem (stride 2) and of the stages (strides 4, 8, 16, 32), residual blocks of each stage."""

    stem: int
    widths: tuple[int, int, int, int]
    blocks: tuple[int, int, int, int]


def _conv(inputs, outputs, stride=1):
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


class _Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.first = _conv(width, width)
        self.second = nn.Sequential(nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width))

    def forward(self, x):
        return F.relu(x + self.second(self.first(x)))


class Backbone(nn.Module):
    """Residual stages and torchvision's FPN: `{"0": [B, channels, H / 8, W / 8], "1": .. / 16, "2": .. / 32}`."""

    def __init__(self, net: Net, channels: int):
        super().__init__()
        widths = (net.stem, *net.widths)
        self.stem = _conv(3, net.stem, 2)
        self.stages = nn.ModuleList(
            nn.Sequential(_conv(widths[i], widths[i + 1], 2), *[_Block(widths[i + 1]) for _ in range(net.blocks[i])])
            for i in range(4)
        )
        self.fpn = FeaturePyramidNetwork(net.widths[1:], channels)
        self.out_channels = channels

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x, levels = self.stem(x.contiguous(memory_format=torch.channels_last)), {}
        for i, stage in enumerate(self.stages):
            x = stage(x)
            if i:
                levels[str(i - 1)] = x
        return self.fpn(levels)


def _of_images(size: int) -> dict:
    """What both detectors are told about images `[3, size, size]` in 0..1."""
    return {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "min_size": size, "max_size": size, "_skip_resize": True}


def fcos(net: Net, channels: int, convolutions: int, classes: int, size: int, device="cpu") -> detection.FCOS:
    """From torch's random numbers. convolutions: of each tower."""
    norm = partial(nn.GroupNorm, 8)
    head = FCOSHead(channels, 1, classes, 0)  # both of its branches are replaced
    head.classification_head = FCOSClassificationHead(channels, 1, classes, convolutions, norm_layer=norm)
    head.regression_head = FCOSRegressionHead(channels, 1, convolutions, norm)
    model = detection.FCOS(
        Backbone(net, channels),
        classes,
        # FCOS gives a level the boxes whose farthest side is 4 to 8 anchors away: here up to 32, 64, and more pixels.
        anchor_generator=AnchorGenerator(tuple((s // 2,) for s in STRIDES), ((1.0,),) * len(STRIDES)),
        center_sampling_radius=3.0,  # in anchors: 1.5 strides
        head=head,
        score_thresh=0.05,
        topk_candidates=200,
        **_of_images(size),
    )
    return model.to(device, memory_format=torch.channels_last)


def faster_rcnn(net: Net, channels: int, _: int, classes: int, size: int, device="cpu") -> detection.FasterRCNN:
    """From torch's random numbers. Its labels begin at 1."""
    pool = MultiScaleRoIAlign([str(i) for i in range(len(STRIDES))], 5, 2, canonical_scale=64)
    model = detection.FasterRCNN(
        Backbone(net, channels),
        rpn_anchor_generator=AnchorGenerator(tuple((3 * s // 2, 3 * s) for s in STRIDES), ((0.5, 1.0, 2.0),) * 3),
        rpn_pre_nms_top_n_train=200,
        rpn_pre_nms_top_n_test=200,
        rpn_post_nms_top_n_train=100,
        rpn_post_nms_top_n_test=100,
        rpn_batch_size_per_image=64,
        box_roi_pool=pool,
        box_head=TwoMLPHead(channels * 5 * 5, 4 * channels),
        box_predictor=FastRCNNPredictor(4 * channels, classes + 1),
        box_batch_size_per_image=32,
        **_of_images(size),
    )
    return model.to(device, memory_format=torch.channels_last)


def first_label(model) -> int:
    return int(isinstance(model, detection.FasterRCNN))


def images(scenes, index) -> list[Tensor]:
    """As the detector takes them."""
    return list((scenes.images[index].float() / 255).unbind())


def targets(scenes, index, first_label: int = 0) -> list[dict[str, Tensor]]:
    return [
        {"boxes": boxes[labels >= 0], "labels": labels[labels >= 0] + first_label}
        for boxes, labels in zip(scenes.boxes[index], scenes.labels[index])
    ]


@torch.no_grad()
def detect(model, scenes, batch: int = 100) -> list[dict[str, Tensor]]:
    """`boxes`, `scores` and `labels` (from 0) of every image."""
    training = model.training
    model.eval()
    found = [x for part in torch.arange(len(scenes)).split(batch) for x in model(images(scenes, part))]
    model.train(training)
    return [one | {"labels": one["labels"] - first_label(model)} for one in found]


def coco_metrics(found: list[dict[str, Tensor]], boxes: Tensor, labels: Tensor, categories) -> dict:
    """COCOeval's averages in percent (-100: nothing of that size) of what `detect` gives, against the true boxes.

    "categories": the AP of each.
    """
    annotations = []
    for image, k in (labels >= 0).nonzero().tolist():
        x1, y1, x2, y2 = boxes[image, k].tolist()
        box = [x1, y1, x2 - x1, y2 - y1]
        one = {"id": len(annotations) + 1, "image_id": image, "category_id": int(labels[image, k]), "iscrowd": 0}
        annotations.append(one | {"bbox": box, "area": box[2] * box[3]})
    rows = []  # image, x, y, width, height, score, category
    for image, one in enumerate(found):
        b = one["boxes"].cpu()
        number = torch.full((len(b), 1), image)
        columns = number, b[:, :2], b[:, 2:] - b[:, :2], one["scores"].cpu()[:, None], one["labels"].cpu()[:, None]
        rows.append(np.concatenate([c.numpy().astype(np.float64) for c in columns], 1))
    rows = np.concatenate(rows)
    if not len(rows):
        return dict.fromkeys(METRICS, 0.0) | {"categories": dict.fromkeys(categories, 0.0)}
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {
            "images": [{"id": i} for i in range(len(labels))],
            "categories": [{"id": i, "name": name} for i, name in enumerate(categories)],
            "annotations": annotations,
        }
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(rows), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # thresholds, recalls, categories; -1: none of a category
    of_category = {name: 100 * float(precision[:, :, i].mean()) for i, name in enumerate(categories)}
    metrics = {name: 100 * float(x) for name, x in zip(METRICS, evaluation.stats[:6])}
    return metrics | {"categories": of_category}


def evaluate(model, scenes, categories) -> dict:
    return coco_metrics(detect(model, scenes), scenes.boxes.cpu(), scenes.labels.cpu(), categories)
