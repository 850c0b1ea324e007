"""One rule for the weights of all methods: each loss pulls `share` as hard as the detection loss."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

EVERY, UNTIL = 8, 512  # steps: a measurement every so many, until the weights are frozen
RULES = {
    "gradients": "the norm of its gradient over that of the detection loss, at the student's maps that it compares",
    "values": "its value over that of the detection loss",
}


class Balance:
    """Weights of named losses: `share` times the ratio detection / loss, measured while training starts.

    A step that measures trains on the detection loss alone. The logarithm of the ratio is averaged exponentially, the
    newest of n + 1 measurements with max(1 / (n + 1), 0.1).
    """

    def __init__(self, names, rule: str, share: float):
        self.rule, self.share = rule, share
        self.logs: dict[str, float | None] = dict.fromkeys(names)
        self.counts = dict.fromkeys(names, 0)
        self.measured: list[dict] = []  # of each measurement: step, and for each rule the ratios

    def measures(self, step: int) -> bool:
        return step % EVERY == 0 and step < UNTIL

    def measure(self, step: int, pairs: dict[str, dict[str, tuple[float, float]]]) -> None:
        """pairs: for each rule and loss (detection, loss). After UNTIL they are recorded and change nothing."""
        ratios = {rule: {k: d / x for k, (d, x) in of.items() if x > 0 and d > 0} for rule, of in pairs.items()}
        self.measured.append({"step": step} | ratios)
        for k, ratio in ratios[self.rule].items():
            if step < UNTIL and math.isfinite(ratio):
                new = max(1 / (self.counts[k] + 1), 0.1)
                self.logs[k] = (1 - new) * (self.logs[k] or 0.0) + new * math.log(ratio)
                self.counts[k] += 1

    @property
    def weights(self) -> dict[str, float]:
        """0 for a loss that was never measured."""
        return {k: 0.0 if log is None else self.share * math.exp(log) for k, log in self.logs.items()}


def pulls(detection: Tensor, maps: list[Tensor], losses: dict[str, Tensor], leaves: list[Tensor]) -> dict:
    """For each loss (norm of the detection loss's gradient at the maps that the loss compares, norm of its own).

    maps: the student's, in the graph of `detection`. leaves: the same values, from which the losses were computed.
    """
    of_detection = torch.autograd.grad(detection, maps, retain_graph=True)
    out = {}
    for name, loss in losses.items():
        own = torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True)
        compared = [(d, g) for d, g in zip(of_detection, own) if g is not None and g.any()]
        out[name] = _norm(d for d, _ in compared), _norm(g for _, g in compared)
    return out


def _norm(gradients: Iterable[Tensor]) -> float:
    return sum(float(x.double().square().sum()) for x in gradients) ** 0.5
