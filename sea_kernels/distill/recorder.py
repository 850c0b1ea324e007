"""Hooks on a detector, which record what its modules returned in the last forward."""

import difflib
import inspect
import sys
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..taps import Entry, Select, Taps, names, tensors, values
from .calibration import Probe

_LAYERS = (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


def _submodule(side: str, model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        near = difflib.get_close_matches(name, [known for known, _ in model.named_modules()])
        hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise ValueError(
            f"the {side}'s taps name the module {name!r}, which {type(model).__name__} lacks{hint}"
        ) from error


def _may_be_overwritten(model: nn.Module, name: str, module: nn.Module) -> bool:
    """Whether a module is a layer with an in-place activation beside it, which is likely to overwrite its output."""
    parent = model.get_submodule(name.rpartition(".")[0])
    return isinstance(module, _LAYERS) and any(getattr(x, "inplace", False) for x in parent.children())


def output_channels(side: str, model: nn.Module, entry: Entry) -> int | tuple[int, ...]:
    """Channels of the maps of an entry: a number, or one for each level if they differ."""
    channels = tuple(_channels(side, model, name) for name in names(entry))
    return channels[0] if len(set(channels)) == 1 else channels


def _channels(side: str, model: nn.Module, name: str) -> int:
    """Channels of a module's output, read from the module, its last layer, or a layer before it in a Sequential."""
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
        self.computes = taps.run or _call
        self.takes_more = _takes_more(self.computes)
        self.next_targets: Any = None
        self.probe: Tensor | None = None  # see Calibration
        self.probed: set[str] = set()  # modules of the last forward whose maps have a probe
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
        recorded = {"open": False, "images": None, "others": None, "targets": None, "next_targets": None, "probe": None}
        return self.__dict__ | recorded | {"fired": {}, "versions": [], "handles": []}

    def forget(self) -> None:
        self.open, self.images, self.others, self.targets = False, None, None, None
        self.fired: dict[str, list[Any]] = {}
        self.versions: list[tuple[str, Tensor, int]] = []  # of every tensor that was recorded

    def run(
        self,
        images: Tensor,
        others: tuple[tuple, dict],
        levels: int,
        image_sizes: list[tuple[int, int]] | None = None,
    ) -> tuple[dict[str, list[list[Tensor]]], Any]:
        """The teacher's maps of these images, and its detections if image sizes are given (else None).

        `others`: the other arguments of the module that got the images.
        """
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
                if image_sizes is None:
                    self._compute(self.computes, images, *(others if self.takes_more else ((), {})))
                    found = None
                else:
                    found = self._compute(self.taps.detect, images, (image_sizes,), {})
            return self.sets(levels, images), found
        finally:
            self.forget()

    def _compute(self, compute: Callable, images: Tensor, args: tuple, kwargs: dict[str, Any]) -> Any:
        model, call = self.model, partial(compute, self.model)
        fsdp = sys.modules.get("torch.distributed.fsdp")
        if compute is _call or fsdp is None or not isinstance(model, fsdp.FSDPModule):
            return call(images, *args, **kwargs)
        # The weights of a sharded model are gathered in a call of the model itself, so `compute` becomes its forward.

        def forward(*args: Any, **kwargs: Any) -> Any:
            del model.forward  # which `compute` may call
            return call(*args, **kwargs)

        model.forward = forward
        try:
            return model(images, *args, **kwargs)
        finally:
            model.__dict__.pop("forward", None)

    def take(self, cuts: list[tuple[Tensor, Tensor]] | None = None) -> tuple[Tensor, tuple[tuple, dict], Any, dict]:
        """(input, other arguments, targets, maps) of the student's forward, which are then forgotten.

        If there is a list `cuts`, a Select gets leaves in place of the tensors in an output, as the student's own loss
        does not see what it makes of them. The list gets each tensor and its leaf.
        """
        images, others, targets = self.images, self.others, self.targets
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
            sets = self.sets(len(self.taps.strides) if isinstance(self.taps.strides, Sequence) else None, images, cuts)
        finally:
            self.forget()
        for name, x in [(n, x) for b in sets for n, maps in zip(getattr(self.taps, b), sets[b]) for x in maps]:
            if not x.requires_grad:
                raise RuntimeError(
                    f"the student's map of {name!r} has no graph, so its loss would teach nothing: it is frozen, ran "
                    "without gradients, or lies in a reentrant checkpoint (use_reentrant=False works)"
                )
        return images, others, targets, sets

    def sets(
        self, levels: int | None, images: Tensor, cuts: list[tuple[Tensor, Tensor]] | None = None
    ) -> dict[str, list[list[Tensor]]]:
        """{"cls": [M][L] maps, "box": [M][L] maps}; every module must give `levels` maps, or as many as the first."""
        out: dict[str, list[list[Tensor]]] = {"cls": [], "box": []}
        for branch, sets in out.items():
            for entry in getattr(self.taps, branch):
                per_level = isinstance(entry, tuple)
                maps = [self.maps(n, images, 1)[0] for n in entry] if per_level else self.maps(entry, images, cuts=cuts)
                levels = levels or len(maps)
                if len(maps) != levels:
                    raise self.miscounted(names(entry), len(maps), levels)
                sets.append(maps)
        return out

    def maps(
        self, entry: str | Select, images: Tensor, count: int | None = None, cuts: list | None = None
    ) -> list[Tensor]:
        (name,) = names(entry)
        outputs = self.fired.get(name, [])
        if isinstance(entry, Select):
            if cuts is not None:
                outputs = [tree_map_only(Tensor, partial(_cut, cuts), x) for x in outputs]
            chosen = [entry.select(x, tuple(images.shape[2:])) for x in outputs]
            outputs = [x for c in chosen for x in ([c] if isinstance(c, Tensor) else c)]
        elif len(outputs) == 1 and not isinstance(outputs[0], Tensor):
            outputs = values(outputs[0])
        if not outputs or (count is not None and len(outputs) != count):
            raise self.miscounted((name,), len(outputs), count or "one per level")
        for x in outputs:
            if not isinstance(x, Tensor) or x.dim() != 4:
                what = f"a tensor of shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
                raise ValueError(
                    f"the {self.side}'s module {name!r} gave {what}; expected maps [B, C, H, W], or an entry "
                    "sea_kernels.taps.Select that takes them out of the output"
                )
        return outputs

    def miscounted(self, modules: Sequence[str], count: int, expected: Any) -> ValueError:
        entries = next((x for x in (self.taps.cls, self.taps.box) if modules[0] in x), ())
        hint = ""
        if count == 1 and len(entries) == expected:
            hint = f" (one set of maps, with a module for each level: ({entries},))"
        what = f"module {modules[0]!r}" if len(modules) == 1 else f"modules {modules}"
        return ValueError(f"the {self.side}'s {what} gave {count} maps in a forward; expected {expected}{hint}")


def _call(model: nn.Module, *args: Any, **kwargs: Any) -> None:
    model(*args, **kwargs)


def leaf(x: Tensor) -> Tensor:
    # Without the loss scaling that backward has, a gradient may be too small for float16.
    return x.detach().to(torch.float32 if x.dtype == torch.float16 else x.dtype).requires_grad_()


def _cut(cuts: list[tuple[Tensor, Tensor]], x: Tensor) -> Tensor:
    if not x.requires_grad:
        return x
    cuts.append((x, leaf(x)))
    return cuts[-1][1]


def _takes_more(run: Callable) -> bool:
    """Whether a function takes more than a model and images. Defaults may hold something else."""
    parameters = [p for p in inspect.signature(run).parameters.values() if p.default is p.empty]
    return len(parameters) > 2 or any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters)


class _Hook:
    """A hook with a weak reference to its recorder. A copy of it, as in a copied or pickled student, does nothing.

    So an EMA copy or a checkpoint does not contain the teacher, and what the copy computes is not recorded.
    """

    def __init__(self, call: Callable, recorder: Recorder, name: str = "") -> None:
        self.call, self.recorder, self.name = call, weakref.ref(recorder), name

    def __call__(self, module: nn.Module, *arguments: Any) -> Any:
        recorder = self.recorder()
        return None if recorder is None else self.call(recorder, self.name, module, *arguments)

    def __reduce__(self) -> tuple:
        return _Nothing, ()


class _Nothing:
    def __call__(self, *_: Any, **__: Any) -> None:
        pass


def _begin(recorder: Recorder, _name: str, _module: nn.Module, args: tuple, kwargs: dict) -> None:
    targets, recorder.next_targets = recorder.next_targets, None
    recorder.forget()
    recorder.probed = set()
    # Without gradients this is an evaluation, of which nothing is recorded.
    if torch.is_grad_enabled():
        recorder.open, recorder.targets = True, targets
        name = "" if args else next(iter(kwargs))
        recorder.images = args[0] if args else kwargs[name]
        recorder.others = args[1:], {k: x for k, x in kwargs.items() if k != name}
        _note_versions(recorder, f"input of {recorder.taps.input!r}", recorder.images)


def _record(recorder: Recorder, name: str, _module: nn.Module, _args: tuple, output: Any) -> Any:
    if not recorder.open:  # recomputed in backward by a checkpoint, or a teacher that runs for others
        return
    if recorder.probe is not None and torch.compiler.is_compiling() and isinstance(output, (Tensor, list, tuple, dict)):
        both = recorder.taps.cls, recorder.taps.box
        branches = [i for i, entries in enumerate(both) if _names_module(entries, name, output)]
        if branches:
            recorder.fired.setdefault(name, []).append(output)
            recorder.probed.add(name)
            return tree_map_only(Tensor, lambda x: Probe.apply(x, recorder.probe, branches), output)
    if name in recorder.cloned:
        output = output.clone()
    recorder.fired.setdefault(name, []).append(output)
    _note_versions(recorder, f"map of {name!r}", output)


def _names_module(entries: Sequence[Entry], name: str, output: Any) -> bool:
    """Whether the maps of these entries are all that a module returns, or are computed from its only tensor."""
    one = isinstance(output, Tensor)
    return any(name in names(entry) for entry in entries if one or not isinstance(entry, Select))


def _note_versions(recorder: Recorder, what: str, output: Any) -> None:
    if recorder.side == "student" and not torch.compiler.is_compiling():  # compiled code overwrites nothing
        # what was made under inference mode has no version
        recorder.versions += [(what, x, x._version) for x in tensors(output) if not x.is_inference()]


def _end(recorder: Recorder, _name: str, _module: nn.Module, _args: tuple, _output: Any) -> None:
    recorder.open = False


def _see_targets(recorder: Recorder, _name: str, _module: nn.Module, _args: tuple, output: Any) -> None:
    recorder.next_targets = output
