"""SEADistiller: records the maps of a student and a teacher, builds the regions, and gives the weighted losses."""

import copy
import itertools
import logging
import math
import numbers
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import group as ranks
from .. import taps as ready_taps
from ..boxes import Boxes
from ..losses import SEALoss, sea_loss
from ..regions import Regions
from ..taps import Taps, names, unwrap
from . import adapters
from .calibration import STEPS, Calibration
from .recorder import Recorder, leaf, output_channels
from .schedule import Schedule

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_log = logging.getLogger("sea_kernels")
_PATIENCE = 100  # calls of `losses` after which adapters that nobody moved are reported


class Capture(NamedTuple):
    """The maps and regions of one step, in the order in which :func:`sea_kernels.sea_loss` takes them."""

    student_cls: list[list[Tensor]]  # [M][L] of [B, C, H_l, W_l]
    teacher_cls: list[list[Tensor]]
    student_box: list[list[Tensor]]
    teacher_box: list[list[Tensor]]
    regions: Regions


class _Truth(NamedTuple):
    """The ground truth that a caller gives, as `SEADistiller.losses` takes it."""

    boxes: Boxes | None
    labels: Boxes | None
    image_sizes: Sequence[Sequence[int]] | Tensor | None
    ignore_boxes: Boxes | None
    masks: Sequence[Any] | None
    batch_index: Tensor | None
    ignore_batch_index: Tensor | None
    box_format: str
    normalized: bool


class _Models(NamedTuple):
    """A tuple, so that neither becomes a submodule of the distiller. A copy, as for an EMA, shares the teacher."""

    student: nn.Module
    teacher: nn.Module

    def __deepcopy__(self, memo: dict) -> "_Models":
        memo[id(self.teacher)] = self.teacher
        return _Models(copy.deepcopy(self.student, memo), self.teacher)


class SEADistiller(nn.Module):
    """SEA distillation (arXiv 2203.00862) of a teacher into a student, for any detector and training loop.

    Hooks on the student record its maps and the input of its backbone while it computes its own loss. `losses` then
    runs the teacher on that input and compares the maps of the two. The teacher is frozen (evaluation mode, no
    gradient) and is not a submodule: `parameters()` are those of the adapters. Pass them to the optimizer.

    Args:
        student, teacher: detectors, bare or wrapped by DDP or torch.compile. Make the distiller before the student's
            first compiled call: torch.compile does not see hooks that are added later.
        taps: where the student's maps are. Default: those of :func:`sea_kernels.taps.find`.
        teacher_taps: the same for the teacher. Default: `taps`, or what `find` gives for the teacher.
        weights: "auto", or three numbers: the weights of the anchor, the distance and the localization loss. "auto"
            measures in steps 0, 1, 3 and every 8th of the first 512 how hard each loss and the student's own loss pull
            at the student's maps, by the norms of their gradients there. It then sets each weight so that its loss
            pulls `share` times as hard as the student's own loss. Only steps in which the schedule is not 0 count,
            from the first one whatever its number. A step that is measured trains on the student's own loss alone. The
            weights are the same in all processes, so each has to call `losses` in these steps, with group="local" too.
            They are in the state_dict, and logged when they are final.
        share: for weights="auto": how hard each loss pulls, as a part of the student's own loss. A number, or three.
            The paper has none; in our study 0.3 had a higher mean AP than 1.
        schedule: a factor for the weights as a function of the step (see :class:`Schedule`). A step is one call of
            `losses`. Where the factor is 0 the teacher does not run.
        num_classes: number of categories. Default: the student's own, if the taps know it.
        channels: ((student's, teacher's channels of the classification maps), (the same of the box maps)), each a
            number, or one for each level. Default: those of the taps.
        center_ratio: see :meth:`sea_kernels.Regions.from_boxes`.
        distance_temperature, localization_temperature, detach_anchors, distance_on_box: see
            :func:`sea_kernels.sea_loss`.
        boxes: where the regions come from if `losses` is given neither boxes nor masks: "labels", the ground truth that
            the taps saw, or "teacher", what the teacher detects (torchvision's detectors, or a teacher whose taps have
            `detect`). The regions then need no labels, and nothing is ignored. The teacher's whole forward runs, which
            synchronizes with the device.
        min_score: the lowest score of a teacher's detection that becomes a region (boxes="teacher").
        use_masks: build the regions from the instances' masks (:meth:`sea_kernels.Regions.from_masks`) instead of their
            boxes.
        group: a `torch.distributed.ProcessGroup`, or "world": all processes, whose group need not be initialized
            before the first `losses`. The anchors are then those of the batch of all its ranks, and all ranks must
            call `losses` at every step, with the same options. Default: "local", each process is alone. None is an
            error where there are several processes, because `dist.group.WORLD` is None before `init_process_group`.

    Attributes:
        adapters: a 1x1 convolution for each set of maps in which student and teacher differ in channels, or one for
            each level if channels differ from level to level. It maps the student's channels to the teacher's.
            `to(device)` moves adapters and teacher.
        weights: three numbers, or tensors [] on the device with "auto": those of the next step, without the schedule.
            They may be set, also to "auto", which then measures again.
        unweighted: the losses of the last step before their weights, detached; None before the first step.
        step: number of calls of `losses`. It is part of the state_dict, and may be set.

    Raises:
        TypeError, ValueError: the detector is unknown, a module does not exist, or the taps do not pair up.

    Example:
        >>> import sea_kernels as sk, torch
        >>> class Detector(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.backbone = torch.nn.Conv2d(3, 8, 3, stride=8, padding=1)
        ...         self.cls, self.box = torch.nn.Conv2d(8, 8, 3, padding=1), torch.nn.Conv2d(8, 8, 3, padding=1)
        ...     def forward(self, images):
        ...         features = self.backbone(images)
        ...         return {"loss": self.cls(features).square().mean() + self.box(features).square().mean()}
        >>> student, teacher = Detector(), Detector()
        >>> taps = sk.taps.Taps(("cls",), ("box",), strides=(8,))
        >>> distiller = sk.SEADistiller(student, teacher, taps, num_classes=80)
        >>> losses = student(torch.randn(1, 3, 64, 64))
        >>> losses |= distiller.losses([torch.tensor([[8.0, 8.0, 40.0, 56.0]])], [torch.tensor([7])])
        >>> list(losses)
        ['loss', 'loss_sea_anchor', 'loss_sea_distance', 'loss_sea_localization']
        >>> sum(losses.values()).backward()
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        taps: Taps | None = None,
        *,
        teacher_taps: Taps | None = None,
        weights: Sequence[float] | str = "auto",
        share: float | Sequence[float] = 0.3,
        schedule: Callable[[int], float] | None = None,
        num_classes: int | None = None,
        channels: Sequence[Sequence[int | Sequence[int]]] | None = None,
        center_ratio: float = 0.5,
        distance_temperature: float = 0.1,
        localization_temperature: float = 1.0,
        detach_anchors: bool = False,
        distance_on_box: bool = False,
        boxes: str = "labels",
        min_score: float = 0.5,
        use_masks: bool = False,
        group: "ProcessGroup | str | None" = "local",
    ) -> None:
        super().__init__()
        weights = _weights(weights)
        shares = _three("share", [share] * 3 if isinstance(share, numbers.Real) else share, "a number, or ")
        if min(shares) < 0:
            raise ValueError(f"share is {share}; expected numbers that are not negative")
        if channels is not None and [len(pair) for pair in channels] != [2, 2]:
            raise ValueError(f"channels is {channels}; expected ((student, teacher) of cls, (student, teacher) of box)")
        for name, model in (("student", student), ("teacher", teacher)):
            if not isinstance(model, nn.Module):
                raise TypeError(f"{name} is a {type(model).__name__}; expected a torch.nn.Module")
        student, teacher = unwrap(student), unwrap(teacher)
        if student is teacher:
            raise ValueError("teacher is the student itself; expected another model")
        own = {id(p) for p in student.parameters()}
        shared = [name for name, p in teacher.named_parameters() if id(p) in own]
        if shared:
            raise ValueError(f"teacher shares {shared[0]!r} with the student, which would be frozen; expected a copy")
        self._models = _Models(student, teacher)
        teacher_taps = teacher_taps or taps or ready_taps.find(teacher)
        taps = taps or ready_taps.find(student)
        for branch in ("cls", "box"):
            ours, theirs = getattr(taps, branch), getattr(teacher_taps, branch)
            if len(ours) != len(theirs):
                raise ValueError(
                    f"the teacher's taps name {len(theirs)} modules for {branch}, {theirs}; expected {len(ours)}, "
                    f"as the student's, {ours}"
                )
        if not taps.cls and not taps.box:
            raise ValueError("the taps name no module, neither for cls nor for box; expected one at least")
        if boxes not in ("labels", "teacher"):
            raise ValueError(f"boxes is {boxes!r}; expected 'labels' or 'teacher'")
        if boxes == "teacher" and teacher_taps.detect is None:
            raise ValueError(
                "boxes is 'teacher', and the teacher's taps have no `detect`; expected one of torchvision's detectors, "
                "or taps that have it. Or pass the teacher's detections to losses(boxes, labels)"
            )
        if boxes == "teacher" and use_masks:
            raise ValueError("boxes is 'teacher' and use_masks is True; use only one: detections have no masks")
        self.boxes, self.min_score = boxes, min_score
        self._taps = taps, teacher_taps
        self._group = ranks.check(group)
        self.num_classes = taps.num_classes if num_classes is None else num_classes
        if self.num_classes is None:
            raise ValueError("num_classes is None; expected the number of categories, which these taps do not know")
        self.schedule, self.use_masks = schedule or Schedule(), use_masks
        self._region_options = {"num_classes": self.num_classes, "center_ratio": center_ratio}
        self._loss_options = {
            "distance_temperature": distance_temperature,
            "localization_temperature": localization_temperature,
            "detach_anchors": detach_anchors,
            "distance_on_box": distance_on_box,
            "anchor_on_box": taps.anchor_on_box,
        }
        self.unweighted, self._said = None, set()
        self._calls, self._versions = 0, []

        teacher.requires_grad_(False).eval()
        self._recorders = Recorder("student", student, taps), Recorder("teacher", teacher, teacher_taps)
        self.adapters = nn.ModuleDict()
        like = next((p for p in student.parameters() if p.is_floating_point()), torch.empty(0))
        for branch, fixed in zip(("cls", "box"), channels or (None, None), strict=True):
            for m, entries in enumerate(zip(getattr(taps, branch), getattr(teacher_taps, branch))):
                own, target = fixed or (
                    r.taps.channels or output_channels(r.side, r.model, n) for r, n in zip(self._recorders, entries)
                )
                if own != target:
                    self.adapters[f"{branch}_{m}"] = adapters.make(own, target, device=like.device, dtype=like.dtype)
        both, cls = ("cls", "box"), ("cls",)
        branches = both if taps.anchor_on_box else cls, both if distance_on_box else cls, ("box",)
        branches = [[x for x in compared if getattr(taps, x)] for compared in branches]
        self.calibration = Calibration(weights, shares, branches, like.device)
        self._buffers["step"] = torch.zeros((), dtype=torch.int64, device=like.device)
        self.step = 0
        self._recorders[0].listen()

    @property
    def step(self) -> int:
        return self._step

    @step.setter
    def step(self, value: int) -> None:
        self._step = int(value)  # what the host counts; the buffer is for checkpoints
        self._buffers["step"] = torch.full_like(self._buffers["step"], self._step)  # a state_dict keeps the old one
        self._recorders[0].probe = self.calibration.next_probe()

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "step":  # which nn.Module would take for the buffer
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    @property
    def weights(self) -> tuple[float | Tensor, ...]:
        return tuple(self.calibration.weights())

    @weights.setter
    def weights(self, value: Sequence[float] | str) -> None:
        self.calibration.begin(_weights(value))
        self._recorders[0].probe = self.calibration.next_probe()

    @property
    def student(self) -> nn.Module:
        return self._models.student

    @property
    def teacher(self) -> nn.Module:
        return self._models.teacher

    @torch.compiler.disable  # it counts its steps, which would recompile each time
    def losses(
        self,
        boxes: Boxes | None = None,
        labels: Boxes | None = None,
        image_sizes: Sequence[Sequence[int]] | Tensor | None = None,
        ignore_boxes: Boxes | None = None,
        masks: Sequence[Any] | None = None,
        teacher_input: Tensor | None = None,
        *,
        batch_index: Tensor | None = None,
        ignore_batch_index: Tensor | None = None,
        box_format: str = "xyxy",
        normalized: bool = False,
    ) -> dict[str, Tensor]:
        """The weighted losses of the student's last forward. Add them to its own.

        Nothing here synchronizes with the device, except that MMDetection's masks, which lie on the host, are copied to
        it. torch.compile leaves this function out of its graphs.

        Args:
            boxes: B tensors `[G_b, 4]`, or one packed tensor `[G, 4]` with `batch_index`: x1 y1 x2 y2 in pixels of the
                backbone's input. Default: what the taps saw.
            labels: B integer tensors `[G_b]`, or one packed `[G]`: categories from 0, or -1 for a box to skip. Required
                with boxes or masks. Default: as for boxes.
            image_sizes: (height, width) of each image before padding, in the same pixels. Default: what the taps saw;
                without it every image fills its maps.
            ignore_boxes: crowds, in either form of boxes. Default: none if boxes or masks are given, else what the taps
                saw.
            masks: the instances' masks, as :meth:`sea_kernels.Regions.from_masks` takes them, instead of boxes.
            teacher_input: the batch `[B, 3, H, W]` for the teacher, if it needs another normalization. Default: the
                input of the student's backbone.
            batch_index, ignore_batch_index, box_format: of the boxes given here, as in
                :meth:`sea_kernels.Regions.from_boxes`. The number of images is that of the input.
            normalized: the boxes given here are relative to `image_sizes`, or to the backbone's input if the sizes are
                neither given nor seen by the taps.

        Returns:
            `loss_sea_anchor`, `loss_sea_distance`, `loss_sea_localization`: scalars. Gradient flows to the student and
            the adapters.

        Raises:
            RuntimeError: the student has not run; a map has no graph, or was overwritten; weights="auto" sees no
                gradient of the student's own loss at its maps.
            ValueError: there are no boxes or labels; maps do not pair up (the message names the module and the counts).
        """
        self._follow_student()
        self._look_for_mistakes()
        factor = float(self.schedule(self.step))
        if self.calibration.pending:
            # Fixed weights are measured for a warning alone, for which no process waits for the others.
            everyone = ranks.everyone if self.calibration.fixed is None else ranks.resolve
            self.calibration.settle(everyone(self._group))
        if factor == 0:
            self._recorders[0].forget()
            losses = SEALoss(*[self._zero()] * 3)
            weighted = list(losses)
        else:
            truth = _Truth(
                boxes, labels, image_sizes, ignore_boxes, masks, batch_index, ignore_batch_index, box_format, normalized
            )
            measured = self.calibration.measures(self.calibration.step)
            if measured and torch._C._are_functorch_transforms_active():  # a transform of torch.func hides gradients
                if self.calibration.fixed is None:
                    raise RuntimeError("weights is 'auto', which measures nothing in torch.func; expected numbers")
                measured = False
            if measured:
                captured, leaves = self._capture(truth, teacher_input, measured=True)
                losses = sea_loss(*captured, **self._loss_options)
                zero = self._zero()
                weighted = [x + zero for x in self.calibration.measure(losses, leaves, factor)]
            else:
                losses = sea_loss(*self._capture(truth, teacher_input)[0], **self._loss_options)
                weighted = [factor * w * x for w, x in zip(self.calibration.weights(), losses)]
            self.calibration.report()
            if self.calibration.step <= STEPS:
                self.calibration.go_on(self.calibration.step + 1)
        self.step += 1
        self.unweighted = SEALoss(*(x.detach() for x in losses))
        return dict(zip(("loss_sea_anchor", "loss_sea_distance", "loss_sea_localization"), weighted))

    def _follow_student(self) -> None:
        """To its device, if it was moved without the distiller."""
        device = next(self.student.parameters()).device
        if self.calibration.count.device != device:
            self.calibration.to_empty(device=device)  # which keeps the values
            self._buffers["step"] = self._buffers["step"].new_empty((), device=device)
            self.step = self._step

    def _look_for_mistakes(self) -> None:
        if not self.student.training and "evaluation" not in self._said:
            self._said.add("evaluation")
            _log.warning(
                "losses() while the student is in evaluation mode: it is for steps that train (student.train())"
            )
        if self._calls == 0:
            self._versions = [p._version for p in self.parameters()]
        elif self._calls == _PATIENCE and self._versions == [p._version for p in self.parameters()] != []:
            _log.warning(
                "no optimizer has moved the adapters in %d steps: pass it distiller.parameters() too", _PATIENCE
            )
        self._calls += 1

    def _zero(self) -> Tensor:
        """A zero that depends on all adapters, as DDP waits for a gradient of every parameter."""
        like = next(self.student.parameters())
        return sum((p.sum() * 0 for p in self.parameters()), torch.zeros((), device=like.device))

    forward = losses  # so that DDP can wrap a distiller with adapters

    def capture(
        self,
        boxes: Boxes | None = None,
        labels: Boxes | None = None,
        image_sizes: Sequence[Sequence[int]] | Tensor | None = None,
        ignore_boxes: Boxes | None = None,
        masks: Sequence[Any] | None = None,
        teacher_input: Tensor | None = None,
        *,
        batch_index: Tensor | None = None,
        ignore_batch_index: Tensor | None = None,
        box_format: str = "xyxy",
        normalized: bool = False,
    ) -> Capture:
        """The maps (after the adapters) and the regions that `losses` would compare, given the same arguments.

        It uses up the recorded maps, as `losses` does.
        """
        truth = _Truth(
            boxes, labels, image_sizes, ignore_boxes, masks, batch_index, ignore_batch_index, box_format, normalized
        )
        return self._capture(truth, teacher_input)[0]

    def _capture(
        self, truth: _Truth, teacher_input: Tensor | None, measured: bool = False
    ) -> tuple[Capture, list[Tensor]]:
        """(the capture, leaves): if this step is measured, the leaves from which the student's maps are computed."""
        student, teacher = self._recorders
        cuts, leaves = [] if measured else None, []
        images, others, targets, ours = student.take(cuts)
        if measured:
            for branch, sets in ours.items():
                for m, maps in enumerate(sets):
                    pairs = _reached(maps, cuts)
                    if not pairs:
                        sets[m] = [leaf(x) for x in maps]
                        pairs = list(zip(maps, sets[m]))
                    for (x, cut), name in zip(pairs, itertools.cycle(names(getattr(self._taps[0], branch)[m]))):
                        if name not in student.probed:
                            self.calibration.watch(branch, x, name in student.cloned)
                        leaves.append(cut)
        first = next(maps for sets in ours.values() for maps in sets)
        detects = self.boxes == "teacher" and truth.boxes is None and truth.masks is None
        image_sizes = self._image_sizes(images, targets, truth) if detects else None
        if not detects:  # before the teacher runs, since this may raise
            regions = self._regions(first, images, targets, truth)
        self.teacher.eval()  # a trainer may have gone over all its modules
        theirs, found = teacher.run(images if teacher_input is None else teacher_input, others, len(first), image_sizes)
        if detects:
            # A label of -1 skips a box; selecting boxes by an index would synchronize with the device.
            labels = [torch.where(x["scores"] >= self.min_score, x["labels"], -1) for x in found]
            truth = truth._replace(boxes=[x["boxes"] for x in found], labels=labels, image_sizes=image_sizes)
            regions = self._regions(first, images, None, truth)
        for branch, sets in ours.items():
            for m, maps in enumerate(sets):
                if f"{branch}_{m}" in self.adapters:
                    maps = sets[m] = adapters.adapt(self.adapters[f"{branch}_{m}"], maps)
                name = names(getattr(self._taps[0], branch)[m])[0]
                theirs[branch][m] = self._pair(name, maps, theirs[branch][m])
        return Capture(ours["cls"], theirs["cls"], ours["box"], theirs["box"], regions), leaves

    def _pair(self, name: str, student: list[Tensor], teacher: list[Tensor]) -> list[Tensor]:
        """The teacher's maps, resampled to the student's sizes."""
        out = []
        for level, (s, t) in enumerate(zip(student, teacher)):
            if s.shape[:2] != t.shape[:2]:
                raise ValueError(
                    f"the teacher's map of level {level} for {name!r} has batch size and channels "
                    f"{tuple(t.shape[:2])}; expected {tuple(s.shape[:2])}, as the student's (channels= sets adapters)"
                )
            if s.shape[2:] != t.shape[2:]:
                if name not in self._said:
                    self._said.add(name)
                    _log.warning(
                        "the teacher's maps for %s are resampled to the student's: level %d has %s, the student's %s",
                        name, level, tuple(t.shape[2:]), tuple(s.shape[2:]),
                    )  # fmt: skip
                t = nn.functional.interpolate(t, size=s.shape[2:], mode="bilinear", align_corners=False)
            out.append(t)
        return out

    def _image_sizes(self, images: Tensor, seen: Any, truth: _Truth) -> list[tuple[int, int]]:
        """For the teacher to detect in."""
        _check_beside_boxes(truth)
        if truth.labels is not None:
            raise ValueError("labels is given without boxes, which the teacher detects; expected both or neither")
        targets = None if seen is None else self._taps[0].read_targets(seen, False)
        sizes = truth.image_sizes
        if sizes is None:
            sizes = [images.shape[2:]] * len(images) if targets is None else targets.image_sizes
        return [(int(height), int(width)) for height, width in sizes]

    def _regions(self, maps: list[Tensor], images: Tensor, seen: Any, truth: _Truth) -> Regions:
        taps = self._taps[0]
        boxes, labels, image_sizes, ignore, masks, index, ignore_index, box_format, normalized = truth
        _check_beside_boxes(truth)
        targets = None if seen is None else taps.read_targets(seen, self.use_masks)
        if targets is not None:
            image_sizes = targets.image_sizes if image_sizes is None else image_sizes
            if boxes is None and masks is None:  # labels and ignore boxes belong to the boxes that they were seen with
                boxes, masks = (None, targets.masks) if self.use_masks else (targets.boxes, None)
                labels = targets.labels if labels is None else labels
                ignore = targets.ignore_boxes if ignore is None else ignore
        if boxes is None and masks is None:
            what = "masks and labels" if self.use_masks else "boxes and labels"
            why = f"{taps.targets!r} showed none" if taps.targets else "the taps name no module to take them from"
            raise ValueError(f"{what} not given; expected them in losses(...), as {why}")
        if labels is None:
            raise ValueError("labels not given; expected one tensor for each image beside boxes or masks")
        shapes = [tuple(x.shape[2:]) for x in maps]
        group = ranks.resolve(self._group)
        if group is not None:
            group = group._replace(compares_strides=isinstance(taps.strides, Sequence))
        options = {"image_sizes": image_sizes, "ignore_boxes": ignore, "group": group} | self._region_options
        strides = taps.strides
        if strides is None:
            strides = [tuple(n / m for n, m in zip(images.shape[2:], shape)) for shape in shapes]
        elif callable(strides):
            strides = strides(tuple(images.shape[2:]), shapes)
        if masks is not None:
            return Regions.from_masks(masks, labels, shapes, strides, **options)
        if normalized and image_sizes is None:
            options["image_sizes"] = [tuple(images.shape[2:])] * len(images)
        return Regions.from_boxes(
            boxes, labels, shapes, strides, **options, batch_index=index, ignore_batch_index=ignore_index,
            batch_size=len(images), box_format=box_format, normalized=normalized,
        )  # fmt: skip

    def student_state_dict(self) -> dict[str, Tensor]:
        """The state_dict of the student alone, without the prefixes of DDP or torch.compile."""
        return self.student.state_dict()

    def _apply(self, fn: Callable, recurse: bool = True) -> "SEADistiller":
        # The teacher is not a submodule, but it moves along to another device. Only it is never emptied.
        if "to_empty" in getattr(fn, "__qualname__", ""):
            self.teacher.to(fn(self._buffers["step"]).device)
        else:
            self.teacher._apply(fn)
        super()._apply(fn, recurse)
        self.step = self._step  # the buffer may have no value now
        return self

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *arguments: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *arguments)
        step = state_dict.get(prefix + "step")
        if step is not None and not getattr(step, "is_meta", False):
            # where the weights were fixed until now, they are measured from here on
            self.calibration.go_on(int(state_dict.get(f"{prefix}calibration.steps", 0)))
            self.calibration.pending = self.calibration.measures(self.calibration.step - 1)
            self.step = int(step)

    def close(self) -> None:
        """Removes the hooks. After that the distiller cannot be used."""
        for recorder in self._recorders:
            recorder.close()

    def __enter__(self) -> "SEADistiller":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _check_beside_boxes(truth: _Truth) -> None:
    """What describes boxes is given with boxes alone."""
    index, ignore_index, box_format, normalized = truth[-4:]
    if truth.boxes is None and (index is not None or ignore_index is not None or box_format != "xyxy" or normalized):
        raise ValueError("boxes is None; expected them beside batch_index, box_format or normalized")


def _reached(maps: list[Tensor], cuts: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """Those of the pairs (tensor, leaf) from whose leaf the maps were computed."""
    if not cuts:
        return []
    ones = [torch.ones_like(x) for x in maps]
    found = torch.autograd.grad(maps, [x for _, x in cuts], ones, retain_graph=True, allow_unused=True)
    return [pair for pair, x in zip(cuts, found) if x is not None]


def _weights(value: Any) -> tuple[float, ...] | None:
    return None if isinstance(value, str) and value == "auto" else _three("weights", value, "'auto', or ")


def _three(name: str, values: Any, also: str) -> tuple[float, ...]:
    if isinstance(values, (list, tuple)):  # as `weights` has them
        values = [x.item() if isinstance(x, Tensor) and x.numel() == 1 else x for x in values]
    if isinstance(values, Sequence) and len(values) == 3 and all(isinstance(x, numbers.Real) for x in values):
        if all(map(math.isfinite, values)):
            return tuple(map(float, values))
    raise ValueError(f"{name} is {values!r}; expected {also}three numbers: anchor, distance, localization")
