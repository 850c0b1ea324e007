"""How the weights of the losses change during training."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """A factor for all weights: it rises from 0 to 1 over `warmup` steps, and falls from 1 at `decay` to 0 at `stop`.

    With `stop` alone it is 1 until that step. Any function of the step (an int from 0) can be used instead.

    Example:
        >>> import sea_kernels as sk
        >>> schedule = sk.Schedule(warmup=4, decay=10, stop=20)
        >>> [schedule(step) for step in (0, 1, 5, 15, 20)]
        [0.25, 0.5, 1.0, 0.5, 0.0]
    """

    warmup: int = 0
    decay: int | None = None
    stop: int | None = None

    def __post_init__(self) -> None:
        for name in ("warmup", "decay", "stop"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name} is {value}; expected a number of steps, 0 or more")
        if self.decay is not None and (self.stop is None or self.stop <= self.decay):
            raise ValueError(f"decay is {self.decay} with stop={self.stop}; expected a later step to stop at")

    def __call__(self, step: int) -> float:
        factor = min(1.0, (step + 1) / self.warmup) if self.warmup > 0 else 1.0
        if self.stop is not None and step >= self.stop:
            return 0.0
        if self.decay is not None and step > self.decay:
            factor *= (self.stop - step) / (self.stop - self.decay)
        return factor
