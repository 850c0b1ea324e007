"""An endless, seeded set of drawn detection images: textured shapes on clutter, with exact boxes.

A category is a form (ellipse, rectangle, triangle, cross) with a texture (plain, stripes, checks); colors are random
and say nothing. Categories are as unbalanced as 1 / sqrt(rank). Every chunk of CHUNK images has a generator of its own,
so that an image depends on the seed and its number alone.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

FORMS, TEXTURES = ("ellipse", "rectangle", "triangle", "cross"), ("plain", "striped", "checked")
CATEGORIES = [f"{texture} {form}" for form in FORMS for texture in TEXTURES]
CHUNK = 64
MOST = 8  # objects per image
_DISTRACTORS, _OCCLUDERS = 5, 2  # soft blobs behind the objects, thin bars over them


@dataclass
class Scenes:
    images: Tensor  # uint8 [N, 3, size, size]
    boxes: Tensor  # float32 [N, MOST, 4]: x1 y1 x2 y2 of the whole object, what is occluded of it included
    labels: Tensor  # int64 [N, MOST], -1 where there is no object
    owners: Tensor | None = None  # int8 [N, size, size]: the object that is seen at a pixel, -1 none

    def __len__(self) -> int:
        return len(self.images)


def generate(count: int, size: int, seed: int, largest: float | None = None, device="cpu", owners=False) -> Scenes:
    """`count` images; mean sides of objects are log-uniform from 8 to `largest` pixels (default: 200/256 of `size`)."""
    largest = largest or size * 200 / 256
    parts = []
    for chunk in tqdm(range(math.ceil(count / CHUNK)), desc="images", disable=None, leave=False):
        parts.append(_chunk(size, largest, torch.Generator().manual_seed(seed * 1_000_003 + chunk), device, owners))
    fields = [[getattr(p, name) for p in parts] for name in ("images", "boxes", "labels")]
    owner = torch.cat([p.owners for p in parts])[:count] if owners else None
    return Scenes(*(torch.cat(x)[:count] for x in fields), owner)


def _chunk(size, largest, generator, device, owners):
    def draw(*shape, low=0.0, high=1.0):
        return low + (high - low) * torch.rand(CHUNK, *shape, generator=generator)

    # Twice as many candidates as objects; one stays if it covers no more than 0.3 (IoU) of those before it.
    n = 2 * MOST
    side = (draw(n) * math.log(largest / 8)).exp() * 8
    aspect = (draw(n, low=-1) * 0.6).exp()
    half = torch.stack([side * aspect.sqrt(), side / aspect.sqrt()], -1).clamp(max=size) / 2
    center = half + draw(n, 2) * (size - 2 * half)
    rough = torch.cat([center - half, center + half], -1)
    stays = torch.zeros(CHUNK, n, dtype=torch.bool)
    wanted = (draw() ** 1.5 * MOST).long() + 1
    overlap = iou(rough, rough)
    for k in range(n):
        crowded = ((overlap[:, k] > 0.3) & stays).any(1)
        stays[:, k] = ~crowded & (stays.sum(1) < wanted)
    weights = torch.arange(1, len(CATEGORIES) + 1.0).rsqrt()
    labels = torch.multinomial(weights, CHUNK * n, True, generator=generator).view(CHUNK, n)
    # The large ones first, so that nothing small is hidden; those that do not stay come last and are cut off.
    order = torch.where(stays, -side, torch.inf).argsort(1)[:, :MOST]

    def pick(x):
        return x.gather(1, order.view(CHUNK, MOST, *[1] * (x.dim() - 2)).expand(-1, -1, *x.shape[2:])).to(device)

    labels, stays, half, center = (pick(x) for x in (labels, stays, half, center))
    labels = torch.where(stays, labels, -1)
    angle, phase, contrast = (x.to(device) for x in (draw(MOST, low=-0.4, high=0.4), draw(MOST), draw(MOST)))
    colors = draw(MOST, 2, 3).to(device)
    # A second color that can be told from the first: pushed away from it in every channel.
    colors[:, :, 1] = (colors[:, :, 0] + 0.3 + 0.4 * contrast[..., None]) % 1

    ys, xs = torch.meshgrid(*[torch.arange(size, device=device) + 0.5] * 2, indexing="ij")
    image = F.interpolate(draw(3, 6, 6, low=0.2, high=0.8).to(device), (size, size), mode="bicubic")
    image = image + 0.1 * F.interpolate(draw(3, size // 4, size // 4, low=-1).to(device), (size, size))
    blobs, bars = draw(_DISTRACTORS, 7).to(device), draw(_OCCLUDERS, 7).to(device)
    for k in range(_DISTRACTORS):
        u, v = _turned(xs, ys, blobs[:, k, :2] * size, blobs[:, k, 2] * math.pi)
        radius = size * (0.03 + 0.2 * blobs[:, k, 3])[:, None, None]
        alpha = (-(u**2 + 3 * v**2) / radius**2).exp() * 0.8
        image = image + alpha[:, None] * (blobs[:, k, 4:, None, None] - image)

    boxes = torch.zeros(CHUNK, MOST, 4, device=device)
    owner = torch.full((CHUNK, size, size), -1, dtype=torch.int8, device=device)
    for k in range(MOST):
        here = (labels[:, k] >= 0).nonzero()[:, 0]
        label, color, (w, h) = labels[here, k], colors[here, k, :, :, None, None], half[here, k].unbind(1)
        u, v = _turned(xs, ys, center[here, k], angle[here, k])
        mask = _form(u / w[:, None, None], v / h[:, None, None], label)
        boxes[here, k] = _extent(mask)
        period = (torch.minimum(w, h) / 1.5).clamp(min=3)[:, None, None]
        second = _texture(u / period + phase[here, k, None, None], v / period, label)
        color = torch.where(second[:, None], color[:, 1], color[:, 0])
        image[here] = torch.where(mask[:, None], color, image[here])
        owner[here] = torch.where(mask, k, owner[here])
    for k in range(_OCCLUDERS):
        u, v = _turned(xs, ys, bars[:, k, :2] * size, bars[:, k, 2] * math.pi)
        bar = (u.abs() < size * 0.3 * bars[:, k, 3, None, None]) & (v.abs() < 1 + size / 100)
        image = torch.where(bar[:, None], bars[:, k, 4:, None, None], image)
        owner = torch.where(bar, -1, owner)
    image = image + 0.05 * draw(1, size, size, low=-1).to(device)
    images = (image.clamp(0, 1) * 255).round().to(torch.uint8)
    return Scenes(images, boxes, labels, owner if owners else None)


def iou(a: Tensor, b: Tensor) -> Tensor:
    """[..., A, 4] and [..., B, 4] -> [..., A, B]."""
    a, b = a[..., :, None, :], b[..., None, :, :]
    inner = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    return inner / ((a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - inner).clamp(min=1e-6)


def _turned(xs, ys, center, angle):
    """Pixel coordinates around `center` [B, 2], turned by `angle` [B]: two [B, H, W]."""
    x, y = xs - center[:, 0, None, None], ys - center[:, 1, None, None]
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    return x * cos + y * sin, y * cos - x * sin


def _form(u, v, labels):
    form = (labels // len(TEXTURES))[:, None, None]
    au, av = u.abs(), v.abs()
    square = (au < 1) & (av < 1)
    cross = square & ((au < 0.35) | (av < 0.35))
    return (
        ((form == 0) & (u * u + v * v < 1))
        | ((form == 1) & square)
        | ((form == 2) & square & (2 * au < v + 1))
        | ((form == 3) & cross)
    )


def _texture(u, v, labels):
    """Where the second color is."""
    texture = (labels % len(TEXTURES))[:, None, None]
    stripe = (u % 1) < 0.5
    return ((texture == 1) & stripe) | ((texture == 2) & (stripe ^ ((v % 1) < 0.5)))


def _extent(mask):
    """The boxes of masks [B, H, W] in pixels."""
    out = []
    for seen in (mask.any(1), mask.any(2)):  # columns, rows
        seen, size = seen.int(), mask.shape[-1]
        out.append((seen.argmax(1), size - seen.flip(1).argmax(1)))
    (x1, x2), (y1, y2) = out
    return torch.stack([x1, y1, x2, y2], 1).float()
