"""Batches that are spread over the ranks of a torch.distributed group: sums, and the consistency check of the ranks.

The collectives are torch's functional ones, which torch.compile can trace and a CUDA graph can capture. Nothing here
waits for a GPU, except the one consistency check in which the ranks compare their arguments.
"""

import os
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .compiling import assume_constant_result


class Group(NamedTuple):
    """A group as the functional collectives take it. It holds no ProcessGroup, which cannot be copied or pickled."""

    name: str
    size: int
    compares_strides: bool = True  # False if the strides follow from the sizes of a rank's images


# The calls of each group whose arguments the ranks have compared.
_compared: "weakref.WeakKeyDictionary[Any, set[str]]" = weakref.WeakKeyDictionary()


def join(group: Any) -> Group:
    """The group, checked. A group that was already joined is returned as it is."""
    if isinstance(group, Group):
        return group
    if group == dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("group is one that this process does not belong to; expected a group of its own")
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"group is a {type(group).__name__}; expected a torch.distributed.ProcessGroup, such as dist.group.WORLD "
            "after init_process_group or the get_group() of a DeviceMesh"
        )
    return Group(group.group_name, _size(group))


def check(group: Any) -> Any:
    """A distiller's `group`, checked as far as it can be before there are processes: a Group, None, or a name."""
    if isinstance(group, str) and group not in ("local", "world"):
        raise ValueError(f"group is {group!r}; expected 'local', 'world' or a torch.distributed.ProcessGroup")
    return group if group is None or isinstance(group, str) else join(group)


def resolve(group: Any) -> Group | None:
    """The group of a step, of what `check` returned."""
    ready = dist.is_initialized()
    if group is None and ready and dist.get_world_size() > 1:
        raise ValueError(
            f"group is None with {dist.get_world_size()} processes, as dist.group.WORLD is before init_process_group; "
            "expected group='world', or group='local' for the anchors of each process alone"
        )
    if group == "world" and not ready and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError(
            f"group is 'world' and WORLD_SIZE is {os.environ['WORLD_SIZE']}; expected init_process_group before the "
            "first losses()"
        )
    if group == "world":
        return join(dist.group.WORLD) if ready else None
    return group if isinstance(group, Group) else None


def everyone(group: Any) -> Group | None:
    """The group of a step, of what `check` returned, or else all processes. None if there is one alone."""
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return resolve(group) or (join(dist.group.WORLD) if several else None)


@assume_constant_result
def _size(group: Any) -> int:
    if not dist.is_initialized() or group not in dist.distributed_c10d._world.pg_map:
        raise ValueError("group is not initialized, or was destroyed; expected one of the running init_process_group")
    return group.size()


def compare(
    group: Group, like: Tensor, call: str, integers: dict[str, int] | None = None, numbers: dict | None = None
) -> Tensor:
    """The consistency check: raises on every rank if the ranks make different calls or pass different arguments.

    It runs only the first time that a group makes a call, because the hosts exchange messages for it. Returns a zero,
    float64 [], on the device of `like`. The next all-reduce has to depend on this zero, or torch.compile would remove
    the check.
    """
    integers, numbers = integers or {}, numbers or {}
    if group.size == 1:  # sends nothing
        return torch.zeros((), dtype=torch.float64, device=like.device)
    names = " ".join([*integers, *numbers])
    return compare_ranks(like, group.name, call, names, list(integers.values()), list(numbers.values()))


# An operator, so that compiled code runs it too, even with symbolic arguments.
@torch.library.custom_op("sea_kernels::compare_ranks", mutates_args=())
def compare_ranks(
    like: Tensor, group: str, call: str, names: str, integers: Sequence[int], numbers: Sequence[float]
) -> Tensor:
    process_group = dist.distributed_c10d._resolve_process_group(group)
    done = _compared.setdefault(process_group, set())
    if call not in done:
        _exchange(process_group, call, like.device.type, [*zip(names.split(), [*integers, *numbers])])
        done.add(call)
    return like.new_zeros((), dtype=torch.float64)


@compare_ranks.register_fake
def _(like, group, call, names, integers, numbers):
    return like.new_empty((), dtype=torch.float64)


def _exchange(group: Any, call: str, device: str, arguments: list[tuple[str, float]]) -> None:
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"the first {call} of a group compares its ranks: run it before a CUDA graph is captured")
    ranks: list[Any] = [None] * group.size()
    dist.all_gather_object(ranks, (("the call", call), ("device", device), *arguments), group=group)
    for rank, theirs in enumerate(ranks):
        for (what, first), (_, other) in zip(ranks[0], theirs):
            if first != other:
                raise ValueError(
                    f"{what} is {other} on rank {rank} of the group and {first} on rank 0; "
                    "expected the same on every rank"
                )
    # After the exchange: one rank that raised before it would leave the others waiting.
    backends = dist.BackendConfig(dist.Backend(dist.get_backend_config(group))).get_device_backend_map()
    if device not in backends:
        has = ", ".join(f"{backend} for {kind}" for kind, backend in backends.items())
        raise ValueError(f"group has {has}; expected a backend for {device}, where the tensors are")


def all_reduce(x: Tensor, group: Group) -> Tensor:
    """The sum over all ranks, of a tensor without a graph."""
    if group.size == 1:
        return x
    return torch.ops._c10d_functional.wait_tensor(torch.ops._c10d_functional.all_reduce(x, "sum", group.name))


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return all_reduce(x, group)

    @staticmethod
    def backward(ctx, gradient):
        return _Sum.apply(gradient.contiguous(), ctx.group), None


def differentiable_sum(x: Tensor, group: Group | None) -> Tensor:
    """The sum over all ranks. Its gradient is the sum of all ranks' gradients, so every rank has to run backward."""
    return x if group is None or group.size == 1 else _Sum.apply(x, group)


def gradient_of_all(gradient: Tensor | None, group: Group | None) -> Tensor | None:
    """The gradient of the sum of all ranks' losses, each of which is the loss of the whole batch."""
    return gradient if group is None or gradient is None else gradient * group.size


def rasterize(
    rasterize_own: Callable[[Tensor | None], tuple], num_classes: int, batch_size: int, group: Group, token: Tensor
) -> tuple[tuple, Tensor]:
    """Regions of the batch of all ranks, as a rasterizer returns them, and the number of images []. One all-reduce.

    Rows are those of the categories present on any rank. Areas and numbers of valid pixels are sums over all ranks.
    Extent and masks stay each rank's own. `rasterize_own` is a rasterizer of :class:`sea_kernels.backends.Backend`,
    `token` what `compare` returned.
    """
    classes, area, counted, *_ = rasterize_own(None)
    levels, device = area.shape[0], area.device
    wide = {"dtype": torch.float64, "device": device}  # whole numbers, exact up to 2^53
    # Areas by category. The last two rows, and the last entry of `present`, are for masks without a category.
    table = torch.zeros(levels, 3 + 2 * num_classes, **wide)
    table = table.scatter(1, _rows(classes, num_classes).expand(levels, -1), area.to(torch.float64))
    present = torch.zeros(num_classes + 1, **wide).scatter(0, torch.where(classes < 0, num_classes, classes), 1.0)
    images = token + torch.full((1,), float(batch_size), **wide)
    table, present, counted, images = all_reduce(
        torch.cat([table.flatten(), present, counted.to(torch.float64), images]), group
    ).split([table.numel(), num_classes + 1, levels, 1])

    classes, _, _, *own = rasterize_own(present[:-1] > 0)
    area = table.view(levels, -1).gather(1, _rows(classes, num_classes).expand(levels, -1)).to(torch.float32)
    return (classes, area, counted.to(torch.float32), *own), images[0]


def _rows(classes: Tensor, num_classes: int) -> Tensor:
    """int64 [P]: the row of each mask in a table of all categories; -1 stands in the row of category num_classes"""
    first = 1 + 2 * torch.where(classes < 0, num_classes, classes)
    return torch.cat([first.new_zeros(1), torch.stack([first, first + 1], dim=1).flatten()])
