"""Two well-known feature losses in plain PyTorch, as context for the times of ours.

Both take the maps of one branch, `student[m][l]` and `teacher[m][l]` of [B, C, H_l, W_l], and give a scalar. They are
written for this benchmark after the papers, with the papers' coefficients for one-stage detectors, and are faster than
the published code: the foreground masks of FGD are built for all boxes at once, where its authors' loop over boxes
synchronizes with the device for every one.
"""

import torch
from torch.nn import functional as F


def cwd_loss(student, teacher, temperature=1.0):
    """Channel-wise distillation (arXiv 2011.13256): KL divergence of the softmax over the positions of each channel."""
    loss = 0.0
    for s, t in _pairs(student, teacher):
        log_p = (s.flatten(2) / temperature).log_softmax(-1)
        log_q = (t.flatten(2) / temperature).log_softmax(-1)
        kl = F.kl_div(log_p, log_q, reduction="sum", log_target=True)
        loss = loss + kl * temperature**2 / (s.shape[0] * s.shape[1])
    return loss


class FGDLoss(torch.nn.Module):
    """Focal and global distillation (arXiv 2111.11837).

    Focal: squared differences weighted by the teacher's attention over positions and over channels, separately for
    the foreground (each pixel by 1 / area of the smallest box that covers it) and the background. Global: squared
    difference of the maps after a context block (GCNet's), one for the student and one for the teacher.
    """

    def __init__(self, channels, strides, temperature=0.5, fg=1e-3, bg=5e-4, attention=1e-3, relation=5e-6):
        super().__init__()
        self.strides, self.temperature = strides, temperature
        self.fg, self.bg, self.attention, self.relation = fg, bg, attention, relation
        self.context_s, self.context_t = ContextBlock(channels), ContextBlock(channels)

    def forward(self, student, teacher, boxes, batch_index):
        loss = 0.0
        masks = [self._masks(t, s, boxes, batch_index) for t, s in zip(teacher[0], self.strides, strict=True)]
        for (s, t), (fg, bg) in zip(_pairs(student, teacher), masks * len(student), strict=True):
            batch = len(s)
            space_s, channel_s = self._attention(s)
            space_t, channel_t = self._attention(t)
            focal = (s - t).square() * space_t * channel_t
            loss = loss + (self.fg * (focal * fg).sum() + self.bg * (focal * bg).sum()) / batch
            differences = (space_s - space_t).abs().sum() + (channel_s - channel_t).abs().sum()
            loss = loss + self.attention * differences / batch
            loss = loss + self.relation * (self.context_s(s) - self.context_t(t)).square().sum() / batch
        return loss

    def _attention(self, x):
        b, c, h, w = x.shape
        space = x.abs().mean(1, keepdim=True).flatten(1).div(self.temperature).softmax(1).view(b, 1, h, w) * (h * w)
        channel = x.abs().mean((2, 3), keepdim=True).div(self.temperature).softmax(1) * c
        return space, channel

    @staticmethod
    def _masks(x, stride, boxes, batch_index):
        b, _, h, w = x.shape
        x1, y1 = (boxes[:, :2] / stride).floor().unbind(1)
        x2, y2 = (boxes[:, 2:] / stride).ceil().unbind(1)
        columns, rows = torch.arange(w, device=x.device), torch.arange(h, device=x.device)
        in_x = (columns >= x1[:, None]) & (columns <= x2[:, None])
        in_y = (rows >= y1[:, None]) & (rows <= y2[:, None])
        weight = ((x2 - x1 + 1) * (y2 - y1 + 1)).reciprocal()
        of_box = (in_y[:, :, None] & in_x[:, None, :]) * weight[:, None, None]  # [G, H, W]
        fg = x.new_zeros(b, h * w, dtype=of_box.dtype)
        fg = fg.scatter_reduce(0, batch_index[:, None].expand(-1, h * w), of_box.flatten(1), "amax").view(b, 1, h, w)
        bg = (fg == 0).float()
        return fg.to(x.dtype), (bg / bg.sum((2, 3), keepdim=True).clamp(min=1)).to(x.dtype)


class ContextBlock(torch.nn.Module):
    """x + a bottleneck of the attention-weighted mean of x over positions (GCNet, arXiv 1904.11492)."""

    def __init__(self, channels):
        super().__init__()
        self.attention = torch.nn.Conv2d(channels, 1, 1)
        self.transform = torch.nn.Sequential(
            torch.nn.Linear(channels, channels // 2),
            torch.nn.LayerNorm(channels // 2),
            torch.nn.ReLU(),
            torch.nn.Linear(channels // 2, channels),
        )

    def forward(self, x):
        weights = self.attention(x).flatten(2).softmax(-1)  # [B, 1, H*W]
        context = torch.bmm(weights, x.flatten(2).transpose(1, 2)).squeeze(1)
        return x + self.transform(context)[:, :, None, None]


def _pairs(student, teacher):
    return [(s, t) for ss, ts in zip(student, teacher, strict=True) for s, t in zip(ss, ts, strict=True)]
