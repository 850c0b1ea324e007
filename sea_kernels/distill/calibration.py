"""Weights that set themselves: how hard each loss pulls at the student's maps, beside the student's own loss.

The pull of a loss is the norm of its gradient with respect to the maps that it compares. In a step that is measured the
losses of SEA give no gradient, so what reaches the maps comes from the student's own loss alone. Nothing here waits for
the device.
"""

import logging
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import group as ranks
from ..losses import SEALoss

STEPS = 512  # in which the weights follow what is measured
_EVERY = 8  # steps, from one measurement to the next, but for the first few:
_EARLY = 1, 3  # a student that begins as a copy of its teacher has a pull of rounding errors in step 0
_CHECKED = 16  # the step after which mistakes are reported, and the only one that is measured with fixed weights
_NEWEST = 0.1  # share of the newest measurement in the average, at least
_DROP = math.log(4)  # a weight that turns out to be more than 4 times too large is not averaged but replaced

_log = logging.getLogger("sea_kernels")


class Calibration(nn.Module):
    """Measures how hard the losses pull, and averages. Its steps are those that have losses.

    Args:
        weights: the fixed weights, or None if they follow from the shares.
        shares: the pull of each loss over that of the student's own loss.
        branches: for each loss those of the branches "cls" and "box" whose maps it compares, none if there are no maps.
    """

    def __init__(
        self,
        weights: Sequence[float] | None,
        shares: Sequence[float],
        branches: Sequence[Sequence[str]],
        device: torch.device,
    ) -> None:
        super().__init__()
        self.fixed, self.shares, self._branches = weights, shares, branches
        kept = weights is None  # what fixed weights measure is not worth a place in a checkpoint
        # Logarithm of the weight with which a loss pulls as hard as the student's own: the average of `count` steps.
        self.register_buffer("log_equal", torch.zeros(3, device=device), kept)
        self.register_buffer("count", torch.zeros(3, dtype=torch.int64, device=device), kept)
        # Of the step that was measured last, squared: the pull of the student's own loss at cls and at box maps; those
        # of the three losses; the factors by which the trainer multiplied them, as for loss scaling.
        self.register_buffer("seen", torch.zeros(8, device=device), kept)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device=device), kept)
        # The next step, which the buffer has for checkpoints; whether the last was measured and is not settled.
        self.step, self.pending = 0, False
        self._own_seen = self._any_seen = False  # whether backward reached the maps, and the losses
        self.probe = torch.zeros(2, device=device, requires_grad=True)
        self._reading: list[tuple[int, Tensor, torch.cuda.Event | None]] = []

    def go_on(self, step: int) -> None:
        self.step = min(step, STEPS + 1)
        self._buffers["steps"] = torch.full_like(self.steps, self.step)  # a state_dict keeps the old one

    def begin(self, weights: Sequence[float] | None) -> None:
        """Measures from here on: with these fixed weights, or None."""
        self.fixed, self.pending = weights, False
        self.go_on(0)

    def measures(self, step: int) -> bool:
        if self.fixed is not None:
            return step == _CHECKED
        return 0 <= step < STEPS and (step % _EVERY == 0 or step in _EARLY)

    def next_probe(self) -> Tensor | None:
        """What the step's forward has to use, if it is compiled. Fixed weights are not worth another compilation."""
        return self.probe if self.fixed is None and self.measures(self.step) else None

    def weights(self) -> Sequence[float | Tensor]:
        """Of the anchor, the distance and the localization loss. 0 for one that was never measured."""
        if self.fixed is not None:
            return self.fixed
        equal = torch.where(self.count > 0, self.log_equal.exp(), 0)
        return [share * x for share, x in zip(self.shares, equal.unbind())]

    def watch(self, branch: str, x: Tensor, cloned: bool) -> None:
        """Looks at the gradient that will reach a map of the student, or what the map was cloned from."""
        slot = ("cls", "box").index(branch)
        if cloned and x.grad_fn.name() == "CloneBackward0":  # not so in a compiled student
            node, i = x.grad_fn.next_functions[0]
            node.register_prehook(lambda gradients: self._add(slot, gradients[i]))
        else:
            x.register_hook(partial(self._add, slot))

    def _add(self, slot: int, gradient: Tensor | None) -> None:
        if gradient is not None:
            self._own_seen |= slot < 2
            self._any_seen |= slot >= 2
            self.seen[slot] += _squared(gradient).to(self.seen.device)  # models may be split over devices

    def measure(self, losses: SEALoss, leaves: Sequence[Tensor], factor: float) -> list[Tensor]:
        """The losses, weighted and times `factor`, cut off from `leaves`, the maps that they were computed from."""
        self.seen = torch.zeros_like(self.seen)
        self.probe.grad, self._any_seen, self.pending = None, False, True
        out = []
        for i, (weight, loss) in enumerate(zip(self.weights(), losses)):
            if loss.requires_grad:
                with torch.autocast(loss.device.type, enabled=False):  # as backward runs
                    gradients = torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True)
                self.seen[2 + i] = sum(_squared(x) for x in gradients if x is not None)
            out.append((factor * weight * loss).detach().requires_grad_())
            out[i].register_hook(partial(self._add, 5 + i))
        return out

    def settle(self, group: ranks.Group | None) -> None:
        """Takes a step that was measured, whose backward has run, into the averages. The ranks add up theirs."""
        own = self.seen[:2]
        if self.probe.grad is not None:
            own, self._own_seen, self.probe.grad = own + self.probe.grad, True, None
        # Not after one measurement, whose batch may have had nothing to learn from.
        if self.fixed is None and self._any_seen and not self._own_seen and self.step > max(_EARLY):
            raise RuntimeError(
                "weights is 'auto', but no gradient of the student's own loss reached its maps, by which they are "
                "measured (in a compiled student it is hidden where an output is neither a tensor nor a list or dict "
                "of them); expected three numbers"
            )
        seen = torch.cat([own, self.seen[2:5] * self.seen[5:]])
        if group is not None:
            seen = ranks.all_reduce(seen, group)
        own = torch.stack([sum((seen[("cls", "box").index(x)] for x in b), seen.new_zeros(())) for b in self._branches])
        equal = (own / seen[2:]).log() / 2
        valid = equal.isfinite()  # not where a gradient was zero, or overflowed
        newest = torch.where(equal < self.log_equal - _DROP, 1, (1 / (self.count + 1)).clamp(min=_NEWEST))
        # Not in place: a state_dict keeps the old ones.
        self.log_equal = self.log_equal + torch.where(valid, newest * (equal - self.log_equal), 0)
        self.count = self.count + valid
        # It counts once, if the step that follows fails and is repeated.
        self.seen, self.pending = torch.zeros_like(self.seen), False

    def report(self) -> None:
        """Logs what was found, some steps later: the numbers are on their way to the host meanwhile."""
        step = self.step
        if step == _CHECKED + 1 or (step == STEPS and self.fixed is None):
            found, event = torch.stack([self.log_equal, self.count.float()]), None
            if found.is_cuda:
                host, event = torch.empty(found.shape, pin_memory=True), torch.cuda.Event()
                found = host.copy_(found, non_blocking=True)
                event.record()
            self._reading.append((step, found, event))
        while self._reading and (self._reading[0][2] is None or self._reading[0][2].query()):
            step, found, _ = self._reading.pop(0)
            equal, count = found[0].exp().tolist(), found[1].tolist()
            self._tell(step, [e if c else None for e, c in zip(equal, count)])

    def _tell(self, step: int, equal: Sequence[float | None]) -> None:
        """equal: the weight with which each loss pulls as hard as the student's own, None if that is not known."""
        if step == STEPS:
            weights = tuple(share * (e or 0.0) for share, e in zip(self.shares, equal))
            _log.warning(
                "weights='auto' has measured %d steps: weights=(%s) from now on",
                STEPS, ", ".join(f"{x:.3g}" for x in weights),
            )  # fmt: skip
            return
        for name, e, i in zip(SEALoss._fields, equal, range(3)):
            if self.fixed is None and e is None and self._branches[i]:
                _log.warning(
                    "the weight of the %s loss is still 0 after %d steps: a gradient, its own or that of the student's "
                    "loss, was always zero or not finite at the maps, or backward had not run before the next losses()",
                    name, step,
                )  # fmt: skip
            elif self.fixed is not None and e is not None and self.fixed[i] and not 1e-3 <= self.fixed[i] / e <= 1:
                _log.warning(
                    "the %s loss pulls %.3g times as hard at the student's maps as the student's own loss does, with "
                    "the weight %g; usual are 0.001 to 1 times (weights='auto' sets the weights by that)",
                    name, self.fixed[i] / e, self.fixed[i],
                )  # fmt: skip

    def _apply(self, fn: Callable, recurse: bool = True) -> "Calibration":
        """The buffers keep dtype and values, through `half()` and `to_empty()` too."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            device = self._buffers[name].device
            self._buffers[name] = torch.zeros_like(old, device=device) if old.is_meta else old.to(device)
        self.probe = torch.zeros(2, device=self.seen.device, requires_grad=True)
        self.go_on(self.step)  # the buffer may have had no value until now
        return self

    def _load_from_state_dict(self, state: dict, prefix: str, meta: Any, strict: bool, missing: list, *rest: Any):
        """What a checkpoint with other weights lacks keeps its value, and what only that has is dropped."""
        if self.fixed is not None:
            for name in self._buffers:
                state.pop(prefix + name, None)
        own: list[str] = []
        super()._load_from_state_dict(state, prefix, meta, strict, own, *rest)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_reading": []}  # events cannot be copied


class Probe(torch.autograd.Function):
    """A map, unchanged. The gradient of the probe is the sum of the squares of the map's gradient.

    Compiled code shows nobody the gradients inside of it, but it gives those of its inputs, such as the probe.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, probe: Tensor, branches: Sequence[int]) -> Tensor:
        ctx.branches, ctx.device = branches, probe.device
        return x.clone()  # an operation in place may follow

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        square = _squared(gradient)
        squares = torch.stack([square if i in ctx.branches else torch.zeros_like(square) for i in (0, 1)])
        return gradient, squares.to(ctx.device), None  # it moves only if the student has left its distiller behind


def _squared(x: Tensor) -> Tensor:
    """The sum of the squares of a tensor, float32 []."""
    return torch.linalg.vector_norm(x, dtype=torch.promote_types(x.dtype, torch.float32)).float().square()
