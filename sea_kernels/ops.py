"""The operators: schemas, fakes, the library that implements them, and which backend runs.

Schemas are defined here and only implemented in C++, so names and fakes exist where nothing was compiled. They have no
defaults: with `Tensor[]` those break autograd's registration in some versions of torch.
"""

import functools
import json
import os
import re
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

if tuple(int(n) for n in re.match(r"(\d+)\.(\d+)", torch.__version__).groups()) < (2, 11):
    raise ImportError(f"sea_kernels needs torch >= 2.11, and torch {torch.__version__} is installed")

_BOXES = (
    "Tensor boxes, Tensor labels, Tensor? batch_index, SymInt[] counts, Tensor? ignore_boxes, "
    "Tensor? ignore_batch_index, SymInt[] ignore_counts, Tensor? image_sizes, SymInt[] image_size_list, "
    "SymInt batch_size, SymInt[] level_shapes, float[] strides, SymInt num_classes, float center_ratio"
)
_REGIONS = "(Tensor classes, Tensor area, Tensor counted, Tensor extent, Tensor bits)"
_SCHEMAS = {
    "regions": f"({_BOXES}, bool validate) -> {_REGIONS}",
    # present: bool [num_classes], the categories that get rows, boxes or not; K = num_classes then.
    "rasterize": f"({_BOXES}, Tensor? present) -> {_REGIONS}",
    "anchor_pool": "(Tensor[] features, Tensor[] regions) -> Tensor",
    "anchor_pool_backward": "(Tensor gradient, Tensor[] features, Tensor[] regions) -> Tensor[]",
    "anchor_cosine": "(Tensor[] features, Tensor anchors, Tensor[] regions) -> Tensor[]",
    "anchor_cosine_backward": "(Tensor[] gradients, Tensor[] features, Tensor anchors, Tensor[] regions) -> Tensor[]",
    # Sets of maps, one after the other: losses[s] says which losses set s takes part in. The numbers of elements are
    # those of saved_elements() and anchor_elements(). saved: [saved, gradients, softmax], each empty where its number
    # is 0: backward then computes again what `saved` holds, and lets no gradient pass the anchors without `gradients`.
    "sea_loss": "(Tensor[] student, Tensor[] teacher, int[] losses, Tensor[] regions, float distance_temperature, "
    "float localization_temperature, SymInt saved_elements, SymInt gradient_elements, SymInt softmax_elements) -> "
    "(Tensor anchor, Tensor distance, Tensor localization, Tensor[] saved)",
    # The same in two steps, between which the anchors of several processes are summed up. anchors, one set after the
    # other: [2 sides, L, P, C] where there are distances, else [L, P, C], the difference of the sides.
    "sea_loss_pool": "(Tensor[] student, Tensor[] teacher, int[] losses, Tensor[] regions, "
    "float localization_temperature, SymInt anchor_elements, SymInt softmax_elements) -> "
    "(Tensor anchors, Tensor localization, Tensor softmax)",
    "sea_loss_compare": "(Tensor[] student, Tensor[] teacher, int[] losses, Tensor[] regions, Tensor anchors, "
    "float distance_temperature, SymInt saved_elements, SymInt gradient_elements) -> "
    "(Tensor anchor, Tensor distance, Tensor saved, Tensor gradients)",
    # saved: as of sea_loss; and the anchors where they come from several processes
    "sea_loss_backward": "(Tensor? anchor, Tensor? distance, Tensor? localization, Tensor[] student, Tensor[] teacher, "
    "int[] losses, Tensor[] regions, Tensor[] saved, float distance_temperature, float localization_temperature) "
    "-> Tensor[]",
    "build_info": "() -> str",
}
OPERATORS = tuple(_SCHEMAS)
KERNELS = tuple(name for name in OPERATORS if name not in ("regions", "build_info"))  # those are Python, and a report
ANCHOR, DISTANCE, LOCALIZATION = 1, 2, 4  # loss flags

_TILE = 64  # pixels of a tile of the CPU kernels; coefficients are saved in whole tiles
# On the CPU coefficients and anchors are saved while they take at most this share of the student's maps, which with
# the rest that is saved stays under 15%; else backward computes them again.
SAVED_SHARE = (2, 15)

_library = torch.library.Library("sea_kernels", "DEF")
for _name, _schema in _SCHEMAS.items():
    _library.define(_name + _schema)


# ------------------------------------------------------------------------------------------------------------ library


def library_path() -> Path | None:
    """Where the compiled library lies; None where there is none."""
    path = Path(__file__).with_name("_C.so")
    return path if path.exists() else None


def build_info() -> dict:
    """What was built: instruction sets (`cpu`, `cpu_available`, `cpu_in_use`), `cuda`, `architectures`."""
    if LIBRARY_ERROR:
        raise RuntimeError(LIBRARY_ERROR)
    return json.loads(torch.ops.sea_kernels.build_info())


@torch.compiler.assume_constant_result
def has_kernel(name: str, key: str) -> bool:
    """Whether an operator is there for "CPU" or "CUDA"."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return has(f"sea_kernels::{name}", key) or has(f"sea_kernels::{name}", "CompositeExplicitAutograd")


def _load() -> str | None:
    """Loads the library; the reason where that fails."""
    path = library_path()
    if path is None:
        return (
            "its library was not built (no sea_kernels/_C.so): run `pip install .` with a C++ compiler installed "
            "and start Python outside the source tree, or run `pip install -e .`"
        )
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"its library does not load ({error}): run `pip install --force-reinstall .` with this torch"
    info, wish = json.loads(torch.ops.sea_kernels.build_info()), os.environ.get("SEA_KERNELS_CPU")
    if wish and wish not in info["cpu_available"]:
        return f"SEA_KERNELS_CPU is {wish!r}; expected one of {', '.join(info['cpu_available'])}"
    return None


LIBRARY_ERROR = _load()


def _runs_on(architecture: str, capability: tuple[int, int]) -> bool:
    """Whether a GPU runs what was built for an architecture: machine code of its generation, or earlier PTX."""
    major, minor, kind, ptx = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", architecture).groups()
    built = int(major), int(minor)
    if kind == "a":
        return built == capability
    return built <= capability and (built[0] == capability[0] or (ptx is not None and not kind))


@functools.cache
def _lacks_code(index: int | None) -> str | None:
    if not torch.cuda.is_available():  # a fake tensor's device
        return None
    capability, built = torch.cuda.get_device_capability(index), build_info()["architectures"]
    if any(_runs_on(architecture, capability) for architecture in built):
        return None
    return (
        f"{torch.cuda.get_device_name(index)} has compute capability {capability[0]}.{capability[1]}, and this build "
        f"is for {' '.join(built)} (8.0 is the earliest; build with TORCH_CUDA_ARCH_LIST for a later one)"
    )


@torch.compiler.assume_constant_result
def lacks_code(index: int | None) -> str | None:
    """Why this build's kernels cannot run on a GPU; None where they can."""
    return None if LIBRARY_ERROR else _lacks_code(index)  # the cache is not to be seen by torch.compile


def require(name: str, device: torch.device) -> None:
    """Raises where an operator has no kernel for a device: there is no silent fall back."""
    reason = LIBRARY_ERROR
    if reason is None and device.type in ("cpu", "cuda") and has_kernel(name, device.type.upper()):
        reason = lacks_code(device.index) if device.type == "cuda" else None
        if reason is None:
            return
    reason = reason or f"this build has no {device.type} kernels (see `python -m sea_kernels`)"
    raise RuntimeError(
        f"sea_kernels cannot run {name} on {device}: {reason}. The same in plain PyTorch: "
        'with sea_kernels.backend("reference"), or SEA_KERNELS_BACKEND=reference'
    )


# ------------------------------------------------------------------------------------------------------------ backend

_BACKENDS = ("native", "reference")


def _check_backend(name: str, source: str) -> str:
    if name not in _BACKENDS:
        raise ValueError(f"{source} is {name!r}; expected one of {', '.join(_BACKENDS)}")
    return name


# One value for the process, a plain global: torch.compile guards on it and compiles once more when it changes.
_backend = _check_backend(os.environ.get("SEA_KERNELS_BACKEND", "native"), "SEA_KERNELS_BACKEND")


def current_backend() -> str:
    return _backend


@contextmanager
def backend(name: str):
    """Within this context, for the whole process: "native" runs the compiled kernels, "reference" plain PyTorch.

    The value is read in forward. SEA_KERNELS_BACKEND sets it from outside.
    """
    global _backend
    before, _backend = _backend, _check_backend(name, "backend")
    try:
        yield
    finally:
        _backend = before


# ------------------------------------------------------------------------------------------------------- regions, fakes


def _regions(*arguments):
    from .regions import check_values

    *rasterize, validate = arguments
    if validate or arguments[0].device.type == "cpu":
        check_values(*rasterize[:8], batch_size=rasterize[9], num_classes=rasterize[12])
    return torch.ops.sea_kernels.rasterize(*rasterize, None)


_library.impl("regions", _regions, "CompositeExplicitAutograd")


def _fake(name):
    return torch.library.register_fake(f"sea_kernels::{name}", lib=_library)


def _fake_regions(
    boxes, labels, batch_index, counts, ignore_boxes, ignore_batch_index, ignore_counts, image_sizes, image_size_list,
    batch_size, level_shapes, strides, num_classes, center_ratio, present,
):  # fmt: skip
    classes = torch.sym_min(labels.shape[0], num_classes) if present is None else num_classes
    masks, levels = 1 + 2 * classes, len(level_shapes) // 2
    pixels = batch_size * sum(level_shapes[2 * i] * level_shapes[2 * i + 1] for i in range(levels))
    return (
        boxes.new_empty(classes, dtype=torch.int64),
        boxes.new_empty(levels, masks, dtype=torch.float32),
        boxes.new_empty(levels, dtype=torch.float32),
        boxes.new_empty(levels, batch_size, 2, dtype=torch.int32),
        boxes.new_empty((masks + 31) // 32 * pixels, dtype=torch.int32),
    )


_fake("regions")(lambda *arguments: _fake_regions(*arguments[:-1], None))
_fake("rasterize")(_fake_regions)


def _compute_dtype(tensors: list[Tensor]) -> torch.dtype:
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def _gradient(x: Tensor) -> Tensor:
    """A gradient for a map: its strides where it is dense, else contiguous."""
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(x.stride(), x.shape) if n != 1):
        if stride != expected:
            return x.new_empty(x.shape)
        expected = expected * size
    return torch.empty_like(x)


@_fake("anchor_pool")
def _(features, regions):
    return features[0].new_empty(
        len(features), regions[1].shape[1], features[0].shape[1], dtype=_compute_dtype(features)
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


def saved_elements(
    student: list[Tensor],
    teacher: list[Tensor],
    losses: list[int],
    masks: int,
    detach_anchors: bool,
    share: tuple[int, int] = SAVED_SHARE,
) -> tuple[int, int, int]:
    """Elements of the tensors that are saved for backward: `saved`, `gradients`, `softmax`; 0 where one is not.

    What lies in them is up to the device's kernels. There is no branch on a size, which would compile a graph for
    either outcome.
    """
    levels = len(student) // len(losses)
    gradients = softmax = 0
    for i, x in enumerate(student):
        flags, channels = losses[i // levels], x.shape[1]
        row = (channels + 7) // 8 * 8 if x.is_cuda else channels
        gradients = gradients + (masks * row if flags & DISTANCE and not detach_anchors else 0)
        softmax = softmax + (4 * x.shape[0] * channels if flags & LOCALIZATION else 0)
    if student[0].is_cuda:
        return _saved_cuda(student, teacher, losses, masks), gradients, softmax
    return _saved_cpu(student, teacher, losses, masks, share), gradients, softmax


def _saved_cuda(student, teacher, losses, masks):
    """Of each level with distances unit anchors of both sides and two or four numbers a pixel, with anchors a table."""
    levels, saved, dtype = len(student) // len(losses), 0, student[0].dtype
    half = dtype in (torch.float16, torch.bfloat16) and all(x.dtype == dtype for x in (*student, *teacher))
    for i, x in enumerate(student):
        flags, row = losses[i // levels], (x.shape[1] + 7) // 8 * 8
        if flags & DISTANCE:
            saved = saved + 2 * masks * row + (2 if half else 4) * x.shape[0] * x.shape[2] * x.shape[3]
        saved = saved + (masks * row if flags & ANCHOR else 0)
    return saved


def _saved_cpu(student, teacher, losses, masks, share):
    """Of each level with distances the coefficients of every pixel, and the anchors of both sides: masks + 1 rows."""
    levels, row = len(student) // len(losses), 0  # elements for each of the rows
    for i, x in enumerate(student):
        flags = losses[i // levels]
        if flags & DISTANCE:
            row = row + (x.shape[0] * x.shape[2] * x.shape[3] + _TILE - 1) // _TILE * _TILE
        row = row + (2 * x.shape[1] if flags & (ANCHOR | DISTANCE) else 0)
    size = 8 if any(x.dtype == torch.float64 for x in (*student, *teacher)) else 4
    most = sum(x.numel() * x.element_size() for x in student) * share[0] // share[1] // (size * torch.sym_max(row, 1))
    # masks + 1 rows where those are at most `most`, else none
    return torch.sym_max(0, torch.sym_min(masks + 1, (masks + 1) * (most - masks))) * row


def anchor_elements(student: list[Tensor], losses: list[int], masks: int) -> int:
    """Elements of the anchors that sea_loss_pool hands over."""
    levels = len(student) // len(losses)
    sides = [2 if flags & DISTANCE else 1 if flags & ANCHOR else 0 for flags in losses]
    return sum(n * levels * masks * student[s * levels].shape[1] for s, n in enumerate(sides))


@_fake("sea_loss")
def _(student, teacher, losses, regions, _distance, _localization, *saved):
    dtype = _compute_dtype(student + teacher)
    anchor, distance, localization = (student[0].new_empty((), dtype=dtype) for _ in range(3))
    return anchor, distance, localization, [student[0].new_empty(n, dtype=dtype) for n in saved]


@_fake("sea_loss_pool")
def _(student, teacher, losses, regions, _localization, anchor_elements, softmax_elements):
    dtype = _compute_dtype(student + teacher)
    return tuple(student[0].new_empty(n, dtype=dtype) for n in ((anchor_elements,), (), (softmax_elements,)))


@_fake("sea_loss_compare")
def _(student, teacher, losses, regions, anchors, _distance, saved_elements, gradient_elements):
    dtype = _compute_dtype(student + teacher)
    return tuple(student[0].new_empty(n, dtype=dtype) for n in ((), (), (saved_elements,), (gradient_elements,)))


@_fake("sea_loss_backward")
def _(anchor, distance, localization, student, *rest):
    return [_gradient(x) for x in student]
