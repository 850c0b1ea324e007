"""The operators: their schemas, and fakes for torch.compile.

Schemas are defined here and only implemented in C++ and CUDA, so names and fakes exist even if nothing was compiled.
They have no defaults: with `Tensor[]`, defaults break the registration of autograd in some versions of torch.
"""

import torch
from torch import Tensor

from ..boxes import RasterInput, check_boxes
from ..checks import compute_dtype

_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    int: "SymInt",
    list[int]: "SymInt[]",
    float: "float",
    list[float]: "float[]",
}
_BOXES = ", ".join(f"{_TYPES[kind]} {name}" for name, kind in RasterInput.__annotations__.items())
_REGIONS = "(Tensor classes, Tensor area, Tensor counted, Tensor extent, Tensor bits, Tensor runs)"
_SCHEMAS = {
    # Checks the values of the boxes, then rasterizes them.
    "regions": f"({_BOXES}, bool validate) -> {_REGIONS}",
    # present: bool [num_classes], the categories that get rows, boxes or not; K = num_classes then.
    "rasterize": f"({_BOXES}, Tensor? present) -> {_REGIONS}",
    # regions: the tensors of Regions.tensors().
    "anchor_pool": "(Tensor[] features, Tensor[] regions) -> Tensor",
    "anchor_pool_backward": "(Tensor gradient, Tensor[] features, Tensor[] regions) -> Tensor[]",
    "anchor_cosine": "(Tensor[] features, Tensor anchors, Tensor[] regions) -> Tensor[]",
    "anchor_cosine_backward": "(Tensor[] gradients, Tensor[] features, Tensor anchors, Tensor[] regions) -> Tensor[]",
    # The losses of sets of maps, one after the other; losses[s] are the loss flags of set s. The numbers of elements
    # are those of saved.py. saved: [saved, gradients, softmax], each empty if its number is 0. Backward then computes
    # again what `saved` would hold; without `gradients` no gradient passes through the anchors.
    "sea_loss": "(Tensor[] student, Tensor[] teacher, int[] losses, Tensor[] regions, float distance_temperature, "
    "float localization_temperature, SymInt saved_elements, SymInt gradient_elements, SymInt softmax_elements) -> "
    "(Tensor anchor, Tensor distance, Tensor localization, Tensor[] saved)",
    # The same in two steps, between which the anchors are summed over the ranks. anchors, for one set after the other:
    # [2 sides, L, P, C] if it has distances, else [L, P, C], the difference of the sides.
    "sea_loss_pool": "(Tensor[] student, Tensor[] teacher, int[] losses, Tensor[] regions, "
    "float localization_temperature, SymInt anchor_elements, SymInt softmax_elements) -> "
    "(Tensor anchors, Tensor localization, Tensor softmax)",
    "sea_loss_compare": "(Tensor[] student, Tensor[] teacher, int[] losses, Tensor[] regions, Tensor anchors, "
    "float distance_temperature, SymInt saved_elements, SymInt gradient_elements) -> "
    "(Tensor anchor, Tensor distance, Tensor saved, Tensor gradients)",
    # saved: that of sea_loss. The CPU takes the anchors too, where they were summed over ranks.
    "sea_loss_backward": "(Tensor? anchor, Tensor? distance, Tensor? localization, Tensor[] student, Tensor[] teacher, "
    "int[] losses, Tensor[] regions, Tensor[] saved, float distance_temperature, float localization_temperature) "
    "-> Tensor[]",
    "build_info": "() -> str",
}
OPERATORS = tuple(_SCHEMAS)
KERNELS = tuple(name for name in OPERATORS if name not in ("regions", "build_info"))  # those are Python, and a report

_library = torch.library.Library("sea_kernels", "DEF")
for _name, _schema in _SCHEMAS.items():
    _library.define(_name + _schema)


def _regions(*arguments):
    # An operator, because a check of values does not trace.
    given, validate = RasterInput(*arguments[:-1]), arguments[-1]
    if validate or given.boxes.device.type == "cpu":
        check_boxes(given)
    return torch.ops.sea_kernels.rasterize(*given, None)


_library.impl("regions", _regions, "CompositeExplicitAutograd")


# ------------------------------------------------------------------------------------------------------------- fakes


def _fake(name: str):
    return torch.library.register_fake(f"sea_kernels::{name}", lib=_library)


@_fake("rasterize")
def _fake_rasterize(*arguments):
    given, present = RasterInput(*arguments[:-1]), arguments[-1]
    classes = torch.sym_min(given.labels.shape[0], given.num_classes) if present is None else given.num_classes
    shapes, like = given.level_shapes, given.boxes
    masks, levels = 1 + 2 * classes, len(shapes) // 2
    pixels = [shapes[2 * i] * shapes[2 * i + 1] for i in range(levels)]
    return (
        like.new_empty(classes, dtype=torch.int64),
        like.new_empty(levels, masks, dtype=torch.float32),
        like.new_empty(levels, dtype=torch.float32),
        like.new_empty(levels, given.batch_size, 2, dtype=torch.int32),
        like.new_empty((masks + 31) // 32 * given.batch_size * sum(pixels), dtype=torch.int32),
        like.new_empty(3 * given.batch_size * sum((n + 31) // 32 for n in pixels), dtype=torch.int32),
    )


@_fake("regions")
def _(*arguments):
    return _fake_rasterize(*arguments[:-1], None)


def _gradient(x: Tensor) -> Tensor:
    """A gradient for a map: with its strides if it is dense, else contiguous."""
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(x.stride(), x.shape) if n != 1):
        if stride != expected:
            return x.new_empty(x.shape)
        expected = expected * size
    return torch.empty_like(x)


@_fake("anchor_pool")
def _(features, regions):
    return features[0].new_empty(
        len(features), regions[1].shape[1], features[0].shape[1], dtype=compute_dtype(features)
    )


@_fake("anchor_pool_backward")
def _(gradient, features, regions):
    return [_gradient(x) for x in features]


@_fake("anchor_cosine")
def _(features, anchors, regions):
    return [anchors.new_empty(x.shape[0], anchors.shape[1], *x.shape[2:]) for x in features]


@_fake("anchor_cosine_backward")
def _(gradients, features, anchors, regions):
    return [*(_gradient(x) for x in features), anchors.new_empty(anchors.shape)]


def _new(student, teacher, *shapes):
    dtype = compute_dtype(student, teacher)
    return [student[0].new_empty(shape, dtype=dtype) for shape in shapes]


@_fake("sea_loss")
def _(student, teacher, losses, regions, distance_temperature, localization_temperature, *elements):
    anchor, distance, localization, *saved = _new(student, teacher, (), (), (), *elements)
    return anchor, distance, localization, saved


@_fake("sea_loss_pool")
def _(student, teacher, losses, regions, localization_temperature, anchor_elements, softmax_elements):
    return tuple(_new(student, teacher, (anchor_elements,), (), (softmax_elements,)))


@_fake("sea_loss_compare")
def _(student, teacher, losses, regions, anchors, distance_temperature, saved_elements, gradient_elements):
    return tuple(_new(student, teacher, (), (), (saved_elements,), (gradient_elements,)))


@_fake("sea_loss_backward")
def _(anchor, distance, localization, student, *rest):
    return [_gradient(x) for x in student]
