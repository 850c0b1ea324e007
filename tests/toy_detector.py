"""A detector of a few layers: three levels of strides 8, 16, 32, and towers whose ReLUs work in place."""

import torch
from torch import nn

from sea_kernels.taps import Taps

STRIDES = (8, 16, 32)
TAPS = Taps(
    cls=("head.cls_tower.1", "head.cls_tower.3"),
    box=("head.box_tower.1",),
    strides=STRIDES,
    num_classes=4,
)


class Head(nn.Module):
    def __init__(self, channels, width):
        super().__init__()
        layers = [nn.Conv2d(channels, width, 3, 1, 1), nn.ReLU(True), nn.Conv2d(width, width, 3, 1, 1), nn.ReLU(True)]
        self.cls_tower = nn.Sequential(*layers)
        self.box_tower = nn.Sequential(nn.Conv2d(channels, width, 3, 1, 1), nn.ReLU(True))
        self.predict = nn.Conv2d(width, 8, 1)

    def forward(self, features):
        return sum(self.predict(self.cls_tower(x) + self.box_tower(x)).square().mean() for x in features)


class Toy(nn.Module):
    def __init__(self, width=16, stride=8, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.backbone = nn.Sequential(nn.Conv2d(3, 8, stride, stride), nn.BatchNorm2d(8))
        self.head = Head(8, width)

    def features(self, images):
        x = self.backbone(images)
        return [x] + [nn.functional.avg_pool2d(x, 2**k, ceil_mode=True) for k in (1, 2)]

    def forward(self, images):
        return {"loss": self.head(self.features(images))}


def batch(seed=0):
    """(images, boxes, labels)"""
    g = torch.Generator().manual_seed(seed)
    boxes = [torch.tensor([[4.0, 6.0, 50.0, 60.0], [20.0, 8.0, 90.0, 40.0]]), torch.tensor([[10.0, 2.0, 30.0, 70.0]])]
    return torch.randn(2, 3, 64, 96, generator=g), boxes, [torch.tensor([1, 3]), torch.tensor([1])]
