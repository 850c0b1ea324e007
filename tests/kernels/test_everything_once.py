"""One computation of everything against the reference: what an installed wheel has to get right in any torch."""

import torch

import sea_kernels as sk


def losses(backend):
    generator = torch.Generator().manual_seed(0)
    shapes = [(12, 20), (6, 10), (3, 5)]

    def maps():
        return [torch.randn(2, 16, h, w, generator=generator).requires_grad_() for h, w in shapes]

    student_cls, teacher_cls, student_box, teacher_box = maps(), maps(), maps(), maps()
    boxes = [torch.tensor([[3.0, 5.0, 60.0, 70.0], [80.0, 8.0, 150.0, 90.0]]), torch.tensor([[20.0, 1.0, 90.0, 40.0]])]
    labels = [torch.tensor([3, 7]), torch.tensor([3])]
    with sk.backend(backend):
        regions = sk.Regions.from_boxes(boxes, labels, shapes, [8, 16, 32], image_sizes=[(96, 160), (90, 120)])
        parts = sk.sea_loss(student_cls, teacher_cls, student_box, teacher_box, regions)
        anchors = sk.anchor_pool(student_cls, regions)
        cosines = sk.anchor_cosine(student_cls, anchors, regions)
        total = parts.anchor + parts.distance + parts.localization + sum(c.square().mean() for c in cosines)
        gradients = torch.autograd.grad(total, student_cls + student_box)
    return [regions.classes, regions.area, *parts, anchors, *cosines, *gradients]


def test_native_equals_the_reference():
    for native, reference in zip(losses("native"), losses("reference")):
        torch.testing.assert_close(native, reference, rtol=1e-4, atol=1e-6)
