"""Checks of arguments that need to know tensors and numbers only.

They look at types, shapes, dtypes and devices, never at the values of a tensor, so they trace under torch.compile.
"""

import math
import numbers
from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def shape_of(x: Tensor) -> str:
    return f"[{', '.join(str(n) for n in x.shape)}]"


def _type(x: object) -> str:
    return type(x).__name__


# ---------------------------------------------------------------------------------------------------------- numbers


def is_number(x: object) -> bool:
    """Of Python or of numpy, whose types are registered as Real."""
    return isinstance(x, (int, float, numbers.Real)) and not isinstance(x, bool)


def integer(name: str, value: object, least: int, most: int | None = None) -> int:
    if not isinstance(value, (int, torch.SymInt, numbers.Integral)) or isinstance(value, bool):
        raise TypeError(f"{name} is a {_type(value)}; expected an integer")
    value = value if isinstance(value, (int, torch.SymInt)) else int(value)  # before it meets what its type cannot hold
    if value < least or (most is not None and value > most):
        bounds = f">= {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} is {value}; expected an integer {bounds}")
    return value


def center_ratio(value: object) -> float:
    if not is_number(value):
        raise TypeError(f"center_ratio is a {_type(value)}; expected a number from 0 to 1")
    if not 0 <= float(value) <= 1:
        raise ValueError(f"center_ratio is {value}; expected a number from 0 to 1")
    return float(value)


def temperature(name: str, value: object) -> float:
    """A Python number from 1e-6 to 1e6."""
    if not is_number(value):
        raise TypeError(f"{name} is a {_type(value)}; expected a number")
    if not 1e-6 <= float(value) <= 1e6:  # beyond, scaled features leave the range of float32
        raise ValueError(f"{name} is {value}; expected a number from 1e-6 to 1e6")
    return float(value)


def _height_and_width(name: str, pair: object, least: int) -> tuple[int, int]:
    if not isinstance(pair, (list, tuple)):
        raise TypeError(f"{name} is a {_type(pair)}; expected (height, width)")
    if len(pair) != 2:
        raise ValueError(f"{name} has {len(pair)} entries; expected (height, width)")
    return integer(f"{name}[0]", pair[0], least), integer(f"{name}[1]", pair[1], least)


def level_shapes(shapes: object) -> tuple[tuple[int, int], ...]:
    if not isinstance(shapes, (list, tuple)):
        raise TypeError(f"level_shapes is a {_type(shapes)}; expected a list of (height, width)")
    if len(shapes) == 0:
        raise ValueError("level_shapes is empty; expected (height, width) of every level")
    return tuple(_height_and_width(f"level_shapes[{i}]", shape, 1) for i, shape in enumerate(shapes))


def strides(strides: object, levels: int) -> list[float]:
    """The strides as y0 x0 y1 x1 ..."""
    if not isinstance(strides, (list, tuple)):
        raise TypeError(f"strides is a {_type(strides)}; expected a list of numbers or (y, x) pairs")
    if len(strides) != levels:
        raise ValueError(f"strides has {len(strides)} entries; expected {levels}, as level_shapes")
    out = []
    for i, stride in enumerate(strides):
        pair = stride if isinstance(stride, (list, tuple)) else (stride, stride)
        if len(pair) != 2:
            raise ValueError(f"strides[{i}] has {len(pair)} entries; expected a number or a (y, x) pair")
        for s in pair:
            if not is_number(s):
                raise TypeError(f"strides[{i}] is {stride!r}; expected a number or a (y, x) pair")
            if not 0 < float(s) < math.inf:
                raise ValueError(f"strides[{i}] is {stride}; expected finite numbers above 0")
            out.append(float(s))
    return out


# ------------------------------------------------------------------------------------------ boxes, labels, masks, sizes


def integers(name: str, x: object, shape: tuple[int, ...], device: torch.device | None, like: str = "boxes") -> None:
    """A tensor of whole numbers of that shape, on that device where one is given."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is a {_type(x)}; expected an integer tensor")
    if x.dtype not in _INTEGERS:
        raise TypeError(f"{name} has dtype {x.dtype}; expected an integer dtype")
    if x.dim() != len(shape) or any(x.shape[d] != n for d, n in enumerate(shape)):
        raise ValueError(f"{name} has shape {shape_of(x)}; expected [{', '.join(str(n) for n in shape)}]")
    if device is not None and x.device != device:
        raise ValueError(f"{name} is on {x.device}; expected {device}, as {like}")


def boxes(name: str, x: object) -> None:
    """A tensor [G, 4]."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is a {_type(x)}; expected a tensor [G, 4]")
    if x.dtype not in FLOATS:
        raise TypeError(f"{name} has dtype {x.dtype}; expected float32, float64, float16 or bfloat16")
    if x.dim() != 2 or x.shape[1] != 4:
        raise ValueError(f"{name} has shape {shape_of(x)}; expected [G, 4]: x1 y1 x2 y2")


def box_format(value: object, formats: Sequence[str]) -> str:
    if value not in formats:
        raise ValueError(f"box_format is {value!r}; expected {', '.join(map(repr, formats))}")
    return value


def instance_masks(name: str, x: object) -> None:
    """The masks of one image: a tensor [G, H, W], or a list, of which nothing is looked at."""
    if not isinstance(x, (Tensor, list, tuple)):
        raise TypeError(f"{name} is a {_type(x)}; expected a tensor [G, H, W] or a list of COCO segmentations")
    if isinstance(x, Tensor):
        if x.dtype not in (torch.bool, torch.uint8):
            raise TypeError(f"{name} has dtype {x.dtype}; expected bool or uint8")
        if x.dim() != 3:
            raise ValueError(f"{name} has shape {shape_of(x)}; expected [G, H, W]")


def image_sizes(sizes: object, batch_size: int, device: torch.device, like: str) -> tuple[Tensor | None, Sequence[int]]:
    """The image sizes as a tensor [B, 2] if they are one, and else as h0 w0 h1 w1 ..."""
    if sizes is None:
        return None, []
    if isinstance(sizes, Tensor):
        integers("image_sizes", sizes, (batch_size, 2), device, like)
        return sizes.to(torch.int64), []
    if not isinstance(sizes, (list, tuple)):
        raise TypeError(
            f"image_sizes is a {_type(sizes)}; expected a list of (height, width) or an integer tensor [B, 2]"
        )
    if len(sizes) != batch_size:
        raise ValueError(f"image_sizes has {len(sizes)} entries; expected {batch_size}, one for each image")
    return None, [n for b, size in enumerate(sizes) for n in _height_and_width(f"image_sizes[{b}]", size, 0)]


# ------------------------------------------------------------------------------------------------------------- maps


def maps(name: str, maps: object, one_channels: bool = True) -> list[Tensor]:
    """One set of maps: a list or tuple of L tensors [B, C, H_l, W_l] of one dtype, device and B, and C if asked."""
    if not isinstance(maps, (list, tuple)):
        raise TypeError(f"{name} is a {_type(maps)}; expected a list of maps [B, C, H, W], one for each level")
    if len(maps) == 0:
        raise ValueError(f"{name} is empty; expected a list of maps [B, C, H, W], one for each level")
    first: Tensor | None = None
    for i, x in enumerate(maps):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}[{i}] is a {_type(x)}; expected a tensor [B, C, H, W]")
        if x.layout != torch.strided:
            raise TypeError(f"{name}[{i}] has layout {x.layout}; expected a dense tensor (torch.strided)")
        if x.dtype not in FLOATS:
            raise TypeError(f"{name}[{i}] has dtype {x.dtype}; expected float32, float64, float16 or bfloat16")
        if x.dim() != 4:
            raise ValueError(f"{name}[{i}] has shape {shape_of(x)}; expected 4 dimensions [B, C, H, W]")
        batch, channels, height, width = x.shape
        if first is not None and x.dtype != first.dtype:
            raise TypeError(f"{name}[{i}] has dtype {x.dtype}; expected {first.dtype}, as {name}[0]")
        if first is not None and x.device != first.device:
            raise ValueError(f"{name}[{i}] is on {x.device}; expected {first.device}, as {name}[0]")
        if channels < 1 or height < 1 or width < 1:
            raise ValueError(f"{name}[{i}] has shape {shape_of(x)}; expected at least one channel, row and column")
        if first is None:
            first, batch_size, number = x, batch, channels
        elif batch != batch_size:
            raise ValueError(f"{name}[{i}] has shape {shape_of(x)}; expected batch size {batch_size}, as {name}[0]")
        elif one_channels and channels != number:
            raise ValueError(f"{name}[{i}] has shape {shape_of(x)}; expected {number} channels, as {name}[0]")
    return list(maps)


def pyramid(name: str, sets: object) -> list[list[Tensor]]:
    """A list of L maps, or a list of M such lists, as a list of M lists. One dtype and device; C may differ."""
    if not (isinstance(sets, (list, tuple)) and len(sets) > 0 and isinstance(sets[0], (list, tuple))):
        return [maps(name, sets, False)]
    out = [maps(f"{name}[{m}]", s, False) for m, s in enumerate(sets)]
    first = out[0][0]
    for m, s in enumerate(out):
        if s[0].dtype != first.dtype:
            raise TypeError(f"{name}[{m}][0] has dtype {s[0].dtype}; expected {first.dtype}, as {name}[0][0]")
        if s[0].device != first.device:
            raise ValueError(f"{name}[{m}][0] is on {s[0].device}; expected {first.device}, as {name}[0][0]")
    return out


def at(name: str, sets: list[list[Tensor]], m: int, i: int) -> str:
    return f"{name}[{i}]" if len(sets) == 1 else f"{name}[{m}][{i}]"


def match(student_name: str, student: list[list[Tensor]], teacher_name: str, teacher: list[list[Tensor]]) -> None:
    """The teacher's sets have the number, the shapes and the device of the student's; the dtype may differ."""
    if len(student) != len(teacher):
        raise ValueError(f"{teacher_name} has {len(teacher)} sets of maps; expected {len(student)}, as {student_name}")
    for m, (s, t) in enumerate(zip(student, teacher)):
        if len(s) != len(t):
            where = "" if len(student) == 1 else f"[{m}]"
            raise ValueError(f"{teacher_name}{where} has {len(t)} levels; expected {len(s)}, as {student_name}{where}")
        if len(s) != len(student[0]):
            raise ValueError(
                f"{student_name}[{m}] has {len(s)} levels; expected {len(student[0])}, as {student_name}[0]"
            )
        for i, (x, y) in enumerate(zip(s, t)):
            if x.device != y.device:
                raise ValueError(
                    f"{at(teacher_name, teacher, m, i)} is on {y.device}; expected {x.device}, "
                    f"as {at(student_name, student, m, i)}"
                )
            # dimension by dimension: a comparison of whole shapes does not trace with dynamic shapes everywhere
            (b, c, h, w), (b2, c2, h2, w2) = x.shape, y.shape
            if b != b2 or c != c2 or h != h2 or w != w2:
                raise ValueError(
                    f"{at(teacher_name, teacher, m, i)} has shape {shape_of(y)}; expected {shape_of(x)}, "
                    f"as {at(student_name, student, m, i)}"
                )


def pairs(
    student_name: str, student: object, teacher_name: str, teacher: object, optional: bool = False
) -> tuple[list, list]:
    """The sets of maps of student and teacher, which match. If they are optional, both may be empty."""
    if optional and all(isinstance(x, (list, tuple)) and len(x) == 0 for x in (student, teacher)):
        return [], []
    student, teacher = pyramid(student_name, student), pyramid(teacher_name, teacher)
    match(student_name, student, teacher_name, teacher)
    return student, teacher


def compute_dtype(*sets: Sequence[Tensor]) -> torch.dtype:
    """What a call computes in and returns: float64 if any map is float64, else float32."""
    return torch.float64 if any(x.dtype == torch.float64 for s in sets for x in s) else torch.float32
