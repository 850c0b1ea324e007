"""A small FCOS in plain PyTorch (residual backbone, FPN, two towers): losses, decoding and COCO evaluation."""

import contextlib
import io
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from shapes import iou
from torch import Tensor, nn
from torch.nn import functional as F

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
_SPAN = 3  # a level of stride s answers for boxes whose farthest side is at most 3 s away (the last one: all above)
_RADIUS = 1.5  # positives lie at most so many strides from the center of their box


@dataclass(frozen=True)
class Net:
    """Widths after the stem (stride 2) and of the stages (strides 4, 8, 16, 32), residual blocks of each stage."""

    stem: int
    widths: tuple[int, int, int, int]
    blocks: tuple[int, int, int, int]


class Output(NamedTuple):
    cls: list[Tensor]  # logits [B, classes, H, W] of each level
    box: list[Tensor]  # distances to the four sides in strides
    center: list[Tensor]  # logits
    cls_maps: list[list[Tensor]]  # [m][l]: after every convolution of a tower
    box_maps: list[list[Tensor]]


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


class FCOS(nn.Module):
    def __init__(self, net: Net, channels: int, convolutions: int, classes: int, strides: tuple[int, ...]):
        super().__init__()
        self.strides, self.classes = strides, classes
        self.stem = _conv(3, net.stem, 2)
        widths = (net.stem, *net.widths)
        self.stages = nn.ModuleList(
            nn.Sequential(_conv(widths[i], widths[i + 1], 2), *[_Block(widths[i + 1]) for _ in range(net.blocks[i])])
            for i in range(4)
        )
        self.lateral = nn.ModuleList(nn.Conv2d(w, channels, 1) for w in net.widths[1:])
        self.smooth = nn.ModuleList(nn.Conv2d(channels, channels, 3, 1, 1) for _ in range(3))
        self.extra = nn.ModuleList(nn.Conv2d(channels, channels, 3, 2, 1) for _ in strides[3:])

        def tower():
            return nn.ModuleList(
                nn.Sequential(nn.Conv2d(channels, channels, 3, 1, 1), nn.GroupNorm(8, channels), nn.ReLU())
                for _ in range(convolutions)
            )

        self.cls_tower, self.box_tower = tower(), tower()
        self.to_cls = nn.Conv2d(channels, classes, 3, 1, 1)
        self.to_box = nn.Conv2d(channels, 5, 3, 1, 1)  # four sides and the centerness
        nn.init.normal_(self.to_cls.weight, std=0.01)
        nn.init.constant_(self.to_cls.bias, -math.log(99))
        nn.init.normal_(self.to_box.weight, std=0.01)
        nn.init.constant_(self.to_box.bias, 0.5)

    def forward(self, images: Tensor) -> Output:
        """images: uint8 or float of 0..255."""
        x = (images.float() / 255 - 0.5) / 0.25
        x = self.stem(x.contiguous(memory_format=torch.channels_last))
        levels = []
        for stage in self.stages:
            x = stage(x)
            levels.append(x)
        levels = [lateral(x) for lateral, x in zip(self.lateral, levels[1:])]
        for i in (1, 0):
            levels[i] = levels[i] + F.interpolate(levels[i + 1], levels[i].shape[-2:])
        levels = [smooth(x) for smooth, x in zip(self.smooth, levels)]
        for extra in self.extra:
            levels.append(extra(F.relu(levels[-1])))

        def through(tower):
            maps, x = [], levels
            for convolution in tower:
                x = [convolution(y) for y in x]
                maps.append(x)
            return maps

        cls_maps, box_maps = through(self.cls_tower), through(self.box_tower)
        out = [self.to_box(x) for x in box_maps[-1]]
        sides = [F.softplus(x[:, :4]) for x in out]
        return Output([self.to_cls(x) for x in cls_maps[-1]], sides, [x[:, 4:] for x in out], cls_maps, box_maps)


def locations(shapes: list[tuple[int, int]], strides: tuple[int, ...], device) -> tuple[Tensor, Tensor]:
    """Centers [P, 2] and strides [P] of the pixels of all levels."""
    points = []
    for (h, w), s in zip(shapes, strides):
        y, x = torch.meshgrid(torch.arange(h, device=device), torch.arange(w, device=device), indexing="ij")
        points.append(torch.stack([x, y], -1).view(-1, 2).float().add(0.5).mul(s))
    sizes = [float(s) for (h, w), s in zip(shapes, strides) for _ in range(h * w)]
    return torch.cat(points), torch.tensor(sizes, device=device)


def targets(points: Tensor, strides: Tensor, boxes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What every pixel should answer: label [B, P] (-1: nothing), sides in strides [B, P, 4], centerness [B, P].

    Among the boxes that claim a pixel the smallest gets it.
    """
    x, y = points[:, 0, None], points[:, 1, None]
    x1, y1, x2, y2 = (boxes[:, None, :, i] for i in range(4))
    sides = torch.stack([x - x1, y - y1, x2 - x, y2 - y], -1)  # [B, P, K, 4]
    reach = _RADIUS * strides[:, None]
    near = ((x - (x1 + x2) / 2).abs() <= reach) & ((y - (y1 + y2) / 2).abs() <= reach)
    farthest = sides.amax(-1)
    lower = torch.where(strides > strides.min(), _SPAN * strides / 2, 0)[:, None]
    upper = torch.where(strides < strides.max(), _SPAN * strides, torch.inf)[:, None]
    claims = near & (sides.amin(-1) > 0) & (farthest > lower) & (farthest <= upper) & (labels >= 0)[:, None]
    area = torch.where(claims, ((x2 - x1) * (y2 - y1)).expand_as(claims), torch.inf)
    smallest, owner = area.min(-1)
    taken = smallest < torch.inf
    label = torch.where(taken, labels.gather(1, owner), -1)
    sides = sides.gather(2, owner[..., None, None].expand(-1, -1, 1, 4)).squeeze(2).clamp(min=0)
    across, down = sides[..., [0, 2]], sides[..., [1, 3]]
    ratio = across.amin(-1) / across.amax(-1).clamp(min=1e-6) * down.amin(-1) / down.amax(-1).clamp(min=1e-6)
    return label, sides / strides[:, None], ratio.sqrt()


def _flat(maps):
    return torch.cat([x.flatten(2) for x in maps], 2).transpose(1, 2)  # [B, P, channels]


def detection_loss(out: Output, strides: tuple[int, ...], boxes: Tensor, labels: Tensor) -> Tensor:
    """Focal loss + GIoU loss weighted by centerness + centerness."""
    points, sizes = locations([tuple(x.shape[-2:]) for x in out.cls], strides, boxes.device)
    label, sides, centerness = targets(points, sizes, boxes, labels)
    logits, predicted, center = _flat(out.cls), _flat(out.box), _flat(out.center)[..., 0]
    positive = label >= 0
    count = positive.sum().clamp(min=1)
    wanted = (label[..., None] == torch.arange(logits.shape[-1], device=label.device)).to(logits.dtype)
    cross = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    p = logits.sigmoid()
    hit = p * wanted + (1 - p) * (1 - wanted)
    focal = ((0.25 * wanted + 0.75 * (1 - wanted)) * (1 - hit).square() * cross).sum() / count
    weight = centerness * positive
    giou = (weight * (1 - _giou(predicted, sides))).sum() / weight.sum().clamp(min=1e-6)
    cross = F.binary_cross_entropy_with_logits(center, centerness, reduction="none")
    return focal + giou + (cross * positive).sum() / count


def _giou(a, b):
    """Of boxes given as distances from one point."""
    inner = torch.minimum(a, b)
    outer = torch.maximum(a, b)

    def area(x):
        return (x[..., 0] + x[..., 2]) * (x[..., 1] + x[..., 3])

    union = area(a) + area(b) - area(inner)
    hull = area(outer).clamp(min=1e-6)
    return area(inner) / union.clamp(min=1e-6) - (hull - union) / hull


@torch.no_grad()
def decode(out: Output, strides, size: int, most: int = 100, threshold: float = 0.02, overlap: float = 0.6):
    """Boxes [B, most, 4], scores (0: none) and labels [B, most] after non-maximum suppression within a category."""
    points, sizes = locations([tuple(x.shape[-2:]) for x in out.cls], strides, out.cls[0].device)
    logits, sides = _flat(out.cls).float(), _flat(out.box).float() * sizes[:, None]
    scores = (logits.sigmoid() * _flat(out.center).float().sigmoid()).sqrt()
    scores = torch.where(logits.sigmoid() > threshold, scores, 0)
    best, index = scores.flatten(1).topk(min(2 * most, scores[0].numel()))
    pixel, labels = index // logits.shape[-1], index % logits.shape[-1]
    x, y = points[pixel].unbind(-1)
    left, top, right, bottom = sides.gather(1, pixel[..., None].expand(-1, -1, 4)).unbind(-1)
    boxes = torch.stack([x - left, y - top, x + right, y + bottom], -1).clamp(0, size)
    rivals = (iou(boxes, boxes) > overlap) & (labels[:, :, None] == labels[:, None])
    keep = best > 0
    for k in range(keep.shape[1] - 1):
        keep[:, k + 1 :] &= ~(keep[:, k, None] & rivals[:, k, k + 1 :])
    best, order = (best * keep).topk(min(most, keep.shape[1]))
    return boxes.gather(1, order[..., None].expand(-1, -1, 4)), best, labels.gather(1, order)


def coco_metrics(found: tuple[Tensor, Tensor, Tensor], boxes: Tensor, labels: Tensor, categories) -> dict[str, float]:
    """COCOeval's averages in percent (-100: nothing of that size) of what `decode` gives, against the true boxes."""
    annotations = []
    for image, k in (labels >= 0).nonzero().tolist():
        x1, y1, x2, y2 = boxes[image, k].tolist()
        box = [x1, y1, x2 - x1, y2 - y1]
        one = {"id": len(annotations) + 1, "image_id": image, "category_id": int(labels[image, k]), "iscrowd": 0}
        annotations.append(one | {"bbox": box, "area": box[2] * box[3]})
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {
            "images": [{"id": i} for i in range(len(labels))],
            "categories": [{"id": i, "name": name} for i, name in enumerate(categories)],
            "annotations": annotations,
        }
        truth.createIndex()
        found_boxes, scores, found_labels = (x.cpu() for x in found)
        image, k = (scores > 0).nonzero(as_tuple=True)
        if not len(image):
            return dict.fromkeys(METRICS, 0.0)
        b = found_boxes[image, k]
        columns = image[:, None], b[:, :2], b[:, 2:] - b[:, :2], scores[image, k, None], found_labels[image, k, None]
        results = truth.loadRes(np.concatenate([c.numpy().astype(np.float64) for c in columns], 1))
        evaluation = COCOeval(truth, results, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {name: 100 * float(x) for name, x in zip(METRICS, evaluation.stats[:6])}


@torch.no_grad()
def evaluate(model: FCOS, scenes, categories, batch: int = 100) -> dict[str, float]:
    model.eval()
    parts = [
        decode(model(scenes.images[i : i + batch]), model.strides, scenes.images.shape[-1])
        for i in range(0, len(scenes), batch)
    ]
    found = tuple(torch.cat(x) for x in zip(*parts))
    return coco_metrics(found, scenes.boxes.cpu(), scenes.labels.cpu(), categories)
