"""Boxes, maps and regions that the tests share, and every public function in one form of call."""

from dataclasses import dataclass, replace

import torch

import sea_kernels as sk
from sea_kernels import backends
from sea_kernels.native import library

CUDA = torch.cuda.is_available() and library.has_kernel("sea_loss", "CUDA")
NO_CUDA = "no CUDA device, or no CUDA kernels in this build"

SHAPES = [
    (20, 28),
    (10, 14),
    (5, 7),
    (3, 4),
    (1, 2),
]  # of an input of 160 x 224 pixels; 17 tiles of 64 pixels and a half
STRIDES = [8, 16, 32, 64, 128]

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


def make_boxes(number, batch=2, num_classes=5, size=(160, 224), seed=0, dtype=F32):
    """Packed boxes [G, 4], labels [G] and batch index [G]; they overlap, and some reach out of the image."""
    g = torch.Generator().manual_seed(seed)
    extent = torch.tensor([size[1], size[0]], dtype=F64)
    corner = (1.2 * torch.rand(number, 2, generator=g, dtype=F64) - 0.1) * extent
    side = torch.rand(number, 2, generator=g, dtype=F64).square() * extent
    boxes = torch.cat([corner, corner + side], 1).to(dtype)
    labels = torch.randint(0, num_classes, (number,), generator=g)
    return boxes, labels, torch.arange(number) % max(batch, 1)


def make_regions(
    device="cpu", number=6, levels=3, batch=2, num_classes=5, seed=0, shapes=None, strides=None, **options
):
    """Packed boxes, images of different sizes, one ignore box: every kind of pixel that there is."""
    shapes, strides = shapes or SHAPES[:levels], strides or STRIDES[:levels]
    boxes, labels, index = make_boxes(number if batch > 0 else 0, batch, num_classes, seed=seed)
    if batch > 0:
        sizes = torch.tensor([(160, 224), (150, 180)]).repeat(batch, 1)[:batch].to(device)
        ignore = torch.tensor([[100.0, 20.0, 210.0, 150.0]], device=device)
        ignore_index = torch.tensor([batch - 1], device=device)
        defaults = {"image_sizes": sizes, "ignore_boxes": ignore, "ignore_batch_index": ignore_index}
        options = defaults | options
    return sk.Regions.from_boxes(
        boxes.to(device),
        labels.to(device),
        shapes,
        strides,
        num_classes=num_classes,
        batch_index=index.to(device),
        batch_size=batch,
        **options,
    )


def make_maps(shapes, batch=2, channels=40, seed=0, dtype=F32, device="cpu"):
    """`channels`: of all levels, or a list with those of each."""
    g = torch.Generator().manual_seed(seed)
    channels = [channels] * len(shapes) if isinstance(channels, int) else channels
    sizes = [(batch, c, h, w) for c, (h, w) in zip(channels, shapes, strict=True)]
    return [torch.randn(*size, generator=g, dtype=F64).to(dtype).to(device) for size in sizes]


def _embed(x, pad, start, step):
    """x as a view into a larger tensor of NaN: whoever reads beside the view shows it."""
    big = x.new_full([start + step * n + pad for n in x.shape], float("nan"))
    view = big[tuple(slice(start, start + step * n, step) for n in x.shape)]
    return view.copy_(x)


def _offset(x):
    flat = x.new_full((x.numel() + 1,), float("nan"))
    return flat[1:].view(x.shape).copy_(x)


# The same values in other strides; `expanded` alone changes them (all channels are the first).
LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "odd offset": _offset,
    "sliced": lambda x: _embed(x, 2, 1, 1),
    "every second": lambda x: _embed(x, 0, 1, 2),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "batch last": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "expanded": lambda x: x[:, :1].expand_as(x),
    "expanded batch": lambda x: x[:1].expand_as(x),
    "one value": lambda x: x[:1, :1, :1, :1].expand_as(x),
}


@dataclass
class Inputs:
    """What the calls below take: sets of student and teacher maps of both branches, and anchors [L, P, C]."""

    cls: list  # M sets of L maps
    cls_teacher: list
    box: list
    box_teacher: list
    anchors: torch.Tensor

    def map(self, f):
        """f on every tensor."""
        sets = [[[f(x) for x in maps] for maps in s] for s in (self.cls, self.cls_teacher, self.box, self.box_teacher)]
        return Inputs(*sets, f(self.anchors))

    def layout(self, name, teacher_name=None):
        student, teacher = LAYOUTS[name], LAYOUTS[teacher_name or name]
        change = lambda sets, f: [[f(x) for x in maps] for maps in sets]  # noqa: E731
        return replace(
            self,
            cls=change(self.cls, student),
            cls_teacher=change(self.cls_teacher, teacher),
            box=change(self.box, student),
            box_teacher=change(self.box_teacher, teacher),
        )

    def leaves(self):
        return [x for maps in self.cls + self.box for x in maps] + [self.anchors]


def make_inputs(
    regions, channels=40, box_channels=24, sets=1, dtype=F32, teacher_dtype=None, seed=0, device="cpu", scale=1.0
):
    """Student and teacher maps that are alike, as they are in distillation."""
    shapes, batch, teacher_dtype = regions.level_shapes, regions.batch_size, teacher_dtype or dtype
    out = []
    for k, c in enumerate([channels, box_channels]):
        student, teacher = [], []
        for m in range(sets):
            a = make_maps(shapes, batch, c, 1000 * seed + 100 * k + m, F64)
            b = make_maps(shapes, batch, c, 1000 * seed + 100 * k + m + 50, F64)
            teacher.append([(scale * y).to(teacher_dtype).to(device) for y in a])
            student.append([(scale * (0.7 * y + 0.5 * x)).to(dtype).to(device) for x, y in zip(b, a)])
        out += [student, teacher]
    g = torch.Generator().manual_seed(seed)
    anchors = torch.randn(len(shapes), regions.area.shape[1], out[0][0][0].shape[1], generator=g, dtype=F64)
    return Inputs(*out, anchors.to(F64 if dtype == F64 else F32).to(device))


# Every public function that has a gradient: call(inputs, regions, **options) -> list of tensors.
CALLS = {
    "anchor_pool": lambda i, r: [sk.anchor_pool(i.cls[0], r)],
    "anchor_cosine": lambda i, r: sk.anchor_cosine(i.cls[0], i.anchors, r),
    "anchor_loss": lambda i, r: [sk.anchor_loss(i.cls, i.cls_teacher, r)],
    "distance": lambda i, r, **o: [sk.topological_distance_loss(i.cls, i.cls_teacher, r, **o)],
    "localization": lambda i, r, **o: [sk.localization_alignment_loss(i.box, i.box_teacher, r, **o)],
    "sea_loss": lambda i, r, **o: list(sk.sea_loss(i.cls, i.cls_teacher, i.box, i.box_teacher, r, **o)),
}
VARIANTS = {
    **{name: (call, {}) for name, call in CALLS.items()},
    "distance, detached": (CALLS["distance"], {"detach_anchors": True}),
    "localization, no regions": (
        lambda i, r: [sk.localization_alignment_loss(i.box, i.box_teacher)],
        {},
    ),
    "sea_loss, everything": (
        CALLS["sea_loss"],
        {"distance_on_box": True, "distance_temperature": 0.3, "localization_temperature": 2.0},
    ),
    "sea_loss, detached": (CALLS["sea_loss"], {"detach_anchors": True}),
    "sea_loss, box maps for localization alone": (CALLS["sea_loss"], {"anchor_on_box": False}),
}


def upstream(outputs):
    """Gradients for the outputs, the same for the same shapes."""
    g = torch.Generator().manual_seed(7)
    return [torch.randn(x.shape, generator=g).to(x) for x in outputs]


def run(variant, inputs, regions, backend=None, **options):
    """(outputs, gradients of the leaves, None where there is none), by the backend in use or another"""
    call, defaults = VARIANTS[variant]
    inputs = inputs.map(lambda x: x.detach().requires_grad_())
    with sk.backend(backend or backends.current_backend()):
        outputs = call(inputs, regions, **(defaults | options))
        gradients = torch.autograd.grad(outputs, inputs.leaves(), upstream(outputs), allow_unused=True)
    return [x.detach() for x in outputs], gradients
