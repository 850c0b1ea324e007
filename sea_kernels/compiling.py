"""torch.compile without torch._dynamo, which takes more than a second to import."""

from collections.abc import Callable
from typing import TypeVar

F = TypeVar("F", bound=Callable)


def assume_constant_result(function: F) -> F:
    """The same as torch.compiler.assume_constant_result: torch.compile runs the function once, while it traces."""
    function._dynamo_marked_constant = True
    return function
