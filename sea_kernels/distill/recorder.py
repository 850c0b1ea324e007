"""Hooks on a detector, which record what its modules returned in the last forward."""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..taps import Taps, names

_LAYERS = (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


def _submodule(side: str, model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise ValueError(f"the {side}'s taps name the module {name!r}, which {type(model).__name__} lacks") from error


def _may_be_overwritten(model: nn.Module, name: str, module: nn.Module) -> bool:
    """Whether a module is a layer with an in-place activation beside it, which is likely to overwrite its output."""
    parent = model.get_submodule(name.rpartition(".")[0])
    return isinstance(module, _LAYERS) and any(getattr(x, "inplace", False) for x in parent.children())


def output_channels(side: str, model: nn.Module, entry: str | tuple[str, ...]) -> int:
    """Channels of a module's output, read from the module, its last layer, or a layer before it in a Sequential."""
    name = names(entry)[0]
    module = _submodule(side, model, name)
    before: list[nn.Module] = []
    parent, _, last = name.rpartition(".")
    if isinstance(model.get_submodule(parent), nn.Sequential):
        before = list(model.get_submodule(parent))[: int(last) if last.isdigit() else 0]
    for layer in [module, *reversed([*before, *module.modules()])]:
        for key in ("out_channels", "num_channels", "num_features"):
            if isinstance(getattr(layer, key, None), int):
                return getattr(layer, key)
    raise ValueError(
        f"channels is None, and the {side}'s module {name!r} does not tell; expected ((int, int), (int, int))"
    )


class Recorder:
    """Records the last forward of one model by hooks."""

    def __init__(self, side: str, model: nn.Module, taps: Taps) -> None:
        self.side, self.model, self.taps = side, model, taps
        self.next_targets: Any = None
        self.forget()
        tapped = dict.fromkeys(name for entry in (*taps.cls, *taps.box) for name in names(entry))
        modules = {name: _submodule(side, model, name) for name in tapped}
        self.cloned = {name for name, module in modules.items() if _may_be_overwritten(model, name, module)}
        self.handles = [x.register_forward_hook(_Hook(_record, self, name)) for name, x in modules.items()]
        self.closed = False

    def listen(self) -> None:
        """Adds hooks that see where a forward of the student begins and ends, and its ground truth."""
        begins = _submodule(self.side, self.model, self.taps.input)
        self.handles.append(begins.register_forward_pre_hook(_Hook(_begin, self), prepend=True, with_kwargs=True))
        self.handles.append(self.model.register_forward_hook(_Hook(_end, self)))
        if self.taps.targets is not None:
            source = _submodule(self.side, self.model, self.taps.targets)
            self.handles.append(source.register_forward_hook(_Hook(_see_targets, self)))

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.closed = True
        self.forget()

    def __getstate__(self) -> dict[str, Any]:
        """For copies, whose hooks do nothing: without what was recorded, which may have a graph."""
        recorded = {"open": False, "images": None, "targets": None, "next_targets": None, "fired": {}, "versions": []}
        return self.__dict__ | recorded | {"handles": []}

    def forget(self) -> None:
        self.open, self.images, self.targets = False, None, None
        self.fired: dict[str, list[Any]] = {}
        self.versions: list[tuple[str, Tensor, int]] = []  # of every tensor that was recorded

    def run(self, images: Tensor, levels: int) -> dict[str, list[list[Tensor]]]:
        """The teacher's maps of these images."""
        like = next((p for p in self.model.parameters() if p.is_floating_point()), images)
        if like.device != images.device:
            raise ValueError(
                f"the teacher is on {like.device}; expected {images.device}, as its input (distiller.to moves it)"
            )
        if not torch.is_autocast_enabled(images.device.type):  # a student of another dtype has other images
            images = images.to(like.dtype)
        self.open = True
        try:
            with torch.no_grad():
                (self.taps.run or _call)(self.model, images)
            return self.sets(levels)
        finally:
            self.forget()

    def take(self) -> tuple[Tensor, Any, dict[str, list[list[Tensor]]]]:
        """(input, targets, maps) of the student's forward, which are then forgotten."""
        images, targets = self.images, self.targets
        if self.closed:
            raise RuntimeError("the distiller is closed: its hooks are gone")
        if images is None:
            self.forget()
            raise RuntimeError(
                f"the student has not run since the last losses(): its module {self.taps.input!r} was not called with "
                "gradients enabled (torch.compile: make the distiller before the first compiled call)"
            )
        for name, x, version in self.versions:
            if x._version != version:
                self.forget()
                raise RuntimeError(
                    f"the student's {name} was overwritten after it was recorded, as by an operation in place behind "
                    "it; expected a module whose output stays, such as the block around it"
                )
        try:
            sets = self.sets(len(self.taps.strides) if isinstance(self.taps.strides, Sequence) else None)
        finally:
            self.forget()
        for name, x in [(n, x) for b in sets for n, maps in zip(getattr(self.taps, b), sets[b]) for x in maps]:
            if not x.requires_grad:
                raise RuntimeError(
                    f"the student's map of {name!r} has no graph, so its loss would teach nothing: it is frozen, ran "
                    "without gradients, or lies in a reentrant checkpoint (use_reentrant=False works)"
                )
        return images, targets, sets

    def sets(self, levels: int | None) -> dict[str, list[list[Tensor]]]:
        """{"cls": [M][L] maps, "box": [M][L] maps}; every module must give `levels` maps, or as many as the first."""
        out: dict[str, list[list[Tensor]]] = {"cls": [], "box": []}
        for branch, sets in out.items():
            for name in getattr(self.taps, branch):
                maps = self.maps(name) if isinstance(name, str) else [self.maps(n, 1)[0] for n in name]
                levels = levels or len(maps)
                if len(maps) != levels:
                    raise self.miscounted(name, len(maps), levels)
                sets.append(maps)
        return out

    def maps(self, name: str, count: int | None = None) -> list[Tensor]:
        outputs = self.fired.get(name, [])
        if len(outputs) == 1 and not isinstance(outputs[0], Tensor):
            outputs = _values(outputs[0])
        if not outputs or (count is not None and len(outputs) != count):
            raise self.miscounted(name, len(outputs), count or "one per level")
        for x in outputs:
            if not isinstance(x, Tensor) or x.dim() != 4:
                what = f"a tensor of shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
                raise ValueError(f"the {self.side}'s module {name!r} gave {what}; expected maps [B, C, H, W]")
        return outputs

    def miscounted(self, name: str, count: int, expected: Any) -> ValueError:
        return ValueError(f"the {self.side}'s module {name!r} gave {count} maps in a forward; expected {expected}")


def _values(output: Any) -> list:
    """The levels in what a module returned."""
    if isinstance(output, dict):
        return list(output.values())
    return list(output) if isinstance(output, (list, tuple)) else [output]


def _call(model: nn.Module, images: Tensor) -> None:
    model(images)


class _Hook:
    """A hook with a weak reference to its recorder. A copy of it, as in a copied or pickled student, does nothing.

    So an EMA copy or a checkpoint does not contain the teacher, and what the copy computes is not recorded.
    """

    def __init__(self, call: Callable, recorder: Recorder, name: str = "") -> None:
        self.call, self.recorder, self.name = call, weakref.ref(recorder), name

    def __call__(self, module: nn.Module, *arguments: Any) -> None:
        recorder = self.recorder()
        if recorder is not None:
            self.call(recorder, self.name, module, *arguments)

    def __reduce__(self) -> tuple:
        return _Nothing, ()


class _Nothing:
    def __call__(self, *_: Any, **__: Any) -> None:
        pass


def _begin(recorder: Recorder, _name: str, _module: nn.Module, args: tuple, kwargs: dict) -> None:
    targets, recorder.next_targets = recorder.next_targets, None
    recorder.forget()
    # Without gradients this is an evaluation, of which nothing is recorded.
    if torch.is_grad_enabled():
        recorder.open, recorder.targets = True, targets
        recorder.images = args[0] if args else next(iter(kwargs.values()))
        _note_versions(recorder, f"input of {recorder.taps.input!r}", recorder.images)


def _record(recorder: Recorder, name: str, _module: nn.Module, _args: tuple, output: Any) -> None:
    if not recorder.open:  # recomputed in backward by a checkpoint, or a teacher that runs for others
        return
    if name in recorder.cloned:
        output = output.clone()
    recorder.fired.setdefault(name, []).append(output)
    _note_versions(recorder, f"map of {name!r}", output)


def _note_versions(recorder: Recorder, what: str, output: Any) -> None:
    if recorder.side == "student" and not torch.compiler.is_compiling():  # compiled code overwrites nothing
        recorder.versions += [(what, x, x._version) for x in _values(output) if isinstance(x, Tensor)]


def _end(recorder: Recorder, _name: str, _module: nn.Module, _args: tuple, _output: Any) -> None:
    recorder.open = False


def _see_targets(recorder: Recorder, _name: str, _module: nn.Module, _args: tuple, output: Any) -> None:
    recorder.next_targets = output
