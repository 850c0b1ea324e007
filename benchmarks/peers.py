"""Feature losses that SEA is compared with, written from their published descriptions.

All take the maps of one branch, `student[m][l]` and `teacher[m][l]` of `[B, C, H_l, W_l]`, and give a scalar, summed
over maps and levels as SEA's losses are.
"""

from context_losses import cwd_loss
from torch import Tensor, nn

__all__ = ["Projectors", "cwd_loss", "pixel_loss", "score_weighted_loss"]

Maps = list[list[Tensor]]


def pixel_loss(student: Maps, teacher: Maps) -> Tensor:
    """Plain pixel matching: squared difference, mean over batch, pixels and channels."""
    return sum((s - t).square().mean() for ss, tt in zip(student, teacher) for s, t in zip(ss, tt))


def score_weighted_loss(student: Maps, teacher: Maps, logits: list[Tensor]) -> Tensor:
    """As Ultralytics distills (since 2026), on the maps of the neck: squared difference, mean over channels, and over
    pixels weighted by the teacher's highest class score there. logits: the teacher's, `[B, classes, H_l, W_l]`.

    Its factor of 6 is left out: the benchmark weighs all losses by the same rule.
    """
    scores = [x.sigmoid().amax(1) for x in logits]
    return sum(
        (w * (s - t).square().mean(1)).sum() / w.sum()
        for ss, tt in zip(student, teacher)
        for s, t, w in zip(ss, tt, scores)
    )


class Projectors(nn.ModuleList):
    """Ultralytics' projectors: for each level two 1x1 convolutions with a ReLU between, over the student's maps."""

    def __init__(self, levels: int, channels: int):
        super().__init__(
            nn.Sequential(nn.Conv2d(channels, channels, 1), nn.ReLU(), nn.Conv2d(channels, channels, 1))
            for _ in range(levels)
        )

    def forward(self, maps: Maps) -> Maps:
        return [[project(x) for project, x in zip(self, levels)] for levels in maps]
