"""Argument checks shared by the native functions and the reference.

They look at types, shapes, dtypes and devices only, never at the values of a tensor, so they trace under torch.compile.
"""

import torch
from torch import Tensor

from .regions import Regions

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def _shape(x: Tensor) -> str:
    return f"[{', '.join(str(n) for n in x.shape)}]"


def _type(x: object) -> str:
    return type(x).__name__


def maps(name: str, maps: object) -> list[Tensor]:
    """One set of maps: a list or tuple of L tensors [B, C, H_l, W_l] of one dtype, device, B and C."""
    if not isinstance(maps, (list, tuple)):
        raise TypeError(f"{name} is a {_type(maps)}; expected a list of maps [B, C, H, W], one for each level")
    if len(maps) == 0:
        raise ValueError(f"{name} is empty; expected a list of maps [B, C, H, W], one for each level")
    for i, x in enumerate(maps):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}[{i}] is a {_type(x)}; expected a tensor [B, C, H, W]")
        if x.layout != torch.strided:
            raise TypeError(f"{name}[{i}] has layout {x.layout}; expected a dense tensor (torch.strided)")
        if x.dtype not in DTYPES:
            raise TypeError(f"{name}[{i}] has dtype {x.dtype}; expected float32, float64, float16 or bfloat16")
        if x.dim() != 4:
            raise ValueError(f"{name}[{i}] has shape {_shape(x)}; expected 4 dimensions [B, C, H, W]")
        first = maps[0]
        if x.dtype != first.dtype:
            raise TypeError(f"{name}[{i}] has dtype {x.dtype}; expected {first.dtype}, as {name}[0]")
        if x.device != first.device:
            raise ValueError(f"{name}[{i}] is on {x.device}; expected {first.device}, as {name}[0]")
        if x.shape[1] < 1 or x.shape[2] < 1 or x.shape[3] < 1:
            raise ValueError(f"{name}[{i}] has shape {_shape(x)}; expected at least one channel, row and column")
        if x.shape[0] != first.shape[0] or x.shape[1] != first.shape[1]:
            raise ValueError(
                f"{name}[{i}] has shape {_shape(x)}; expected batch size {first.shape[0]} and "
                f"{first.shape[1]} channels, as {name}[0]"
            )
    return list(maps)


def pyramid(name: str, sets: object) -> list[list[Tensor]]:
    """A list of L maps, or a list of M such lists, as a list of M lists. One dtype and device; C may differ by set."""
    if not (isinstance(sets, (list, tuple)) and len(sets) > 0 and isinstance(sets[0], (list, tuple))):
        return [maps(name, sets)]
    out = [maps(f"{name}[{m}]", s) for m, s in enumerate(sets)]
    first = out[0][0]
    for m, s in enumerate(out):
        if s[0].dtype != first.dtype:
            raise TypeError(f"{name}[{m}][0] has dtype {s[0].dtype}; expected {first.dtype}, as {name}[0][0]")
        if s[0].device != first.device:
            raise ValueError(f"{name}[{m}][0] is on {s[0].device}; expected {first.device}, as {name}[0][0]")
    return out


def _at(name: str, sets: list[list[Tensor]], m: int, i: int) -> str:
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
                    f"{_at(teacher_name, teacher, m, i)} is on {y.device}; expected {x.device}, "
                    f"as {_at(student_name, student, m, i)}"
                )
            # dimension by dimension: a comparison of whole shapes does not trace with dynamic shapes everywhere
            if any(x.shape[d] != y.shape[d] for d in range(4)):
                raise ValueError(
                    f"{_at(teacher_name, teacher, m, i)} has shape {_shape(y)}; expected {_shape(x)}, "
                    f"as {_at(student_name, student, m, i)}"
                )


def regions(name: str, regions: object, maps_name: str, sets: list[list[Tensor]]) -> None:
    """`regions` is a Regions with the levels, batch size and device of every set of maps."""
    if not isinstance(regions, Regions):
        raise TypeError(f"{name} is a {_type(regions)}; expected sea_kernels.Regions")
    shapes = regions.level_shapes
    for m, s in enumerate(sets):
        if len(shapes) != len(s):
            raise ValueError(f"{name} has {len(shapes)} levels; expected {len(s)}, as {maps_name}")
        for i, x in enumerate(s):
            if regions.classes.device != x.device:
                raise ValueError(
                    f"{name} is on {regions.classes.device}; expected {x.device}, as {_at(maps_name, sets, m, i)}"
                )
            if regions.batch_size != x.shape[0]:
                raise ValueError(
                    f"{name} has batch size {regions.batch_size}; expected {x.shape[0]}, "
                    f"as {_at(maps_name, sets, m, i)}"
                )
            if shapes[i][0] != x.shape[2] or shapes[i][1] != x.shape[3]:
                raise ValueError(
                    f"{name} has level_shapes[{i}] = ({shapes[i][0]}, {shapes[i][1]}); "
                    f"expected ({x.shape[2]}, {x.shape[3]}), as {_at(maps_name, sets, m, i)}"
                )


def anchors(name: str, anchors: object, regions: Regions, maps: list[Tensor]) -> None:
    """`anchors` is a tensor [L, P, C] that fits the regions and the maps; any floating dtype of `DTYPES`."""
    if not isinstance(anchors, Tensor):
        raise TypeError(f"{name} is a {_type(anchors)}; expected a tensor [L, P, C]")
    if anchors.layout != torch.strided:
        raise TypeError(f"{name} has layout {anchors.layout}; expected a dense tensor (torch.strided)")
    if anchors.dtype not in DTYPES:
        raise TypeError(f"{name} has dtype {anchors.dtype}; expected float32, float64, float16 or bfloat16")
    if anchors.device != maps[0].device:
        raise ValueError(f"{name} is on {anchors.device}; expected {maps[0].device}, as the maps")
    expected = (len(maps), regions.area.shape[1], maps[0].shape[1])
    if anchors.dim() != 3 or any(anchors.shape[d] != expected[d] for d in range(3)):
        raise ValueError(
            f"{name} has shape {_shape(anchors)}; expected [L, P, C] = [{expected[0]}, {expected[1]}, {expected[2]}]"
        )


def temperature(name: str, value: object) -> float:
    """A Python number from 1e-6 to 1e6."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} is a {_type(value)}; expected a number")
    if not 1e-6 <= value <= 1e6:  # beyond, scaled features leave the range of float32
        raise ValueError(f"{name} is {value}; expected a number from 1e-6 to 1e6")
    return float(value)


def compute_dtype(*sets: list[Tensor]) -> torch.dtype:
    """What a call computes in and returns: float64 if any map is float64, else float32."""
    return torch.float64 if any(x.dtype == torch.float64 for s in sets for x in s) else torch.float32
