"""SEA distillation in the Trainer of Hugging Face's transformers. README.md in this folder shows it."""

import logging
import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForObjectDetection, PreTrainedModel, Trainer, TrainerCallback

from .boxes import corners, times
from .distill.distiller import SEADistiller
from .taps import Taps

_log = logging.getLogger("sea_kernels")
_FILE = "sea_kernels.pt"  # in each checkpoint, beside the optimizer's state
# Attributes that hold what projects the maps: of RT-DETR, RT-DETRv2 and D-FINE; of Deformable DETR; of DETR.
_PROJECTIONS = ("decoder_input_proj", "input_proj", "input_projection")
_SIZE = 1024  # of the input that shows the strides: a multiple of every stride


def trainer(teacher: nn.Module | str | os.PathLike, base: type[Trainer] = Trainer, **options: Any) -> type[Trainer]:
    """A Trainer class that trains its model with the model's own loss and those of SEA (arXiv 2203.00862).

    Student and teacher are detectors that project their maps to one number of channels: RT-DETR, RT-DETRv2 and D-FINE
    (the outputs of the hybrid encoder), DETR and Deformable DETR (those of the backbone), and models built like them.
    The three losses compare the projected maps. Labels are the model's own: one dict for each image, with `boxes`
    (center x, center y, width, height, relative) and `class_labels`. Boxes are relative to `size` (height, width) if
    the dict has it, as the image processors write it, else to `pixel_values`. `pixel_mask` gives the images' own sizes,
    and the teacher gets it too.

    Evaluation and prediction are the student's own. Each loss is logged beside `loss`: its mean since the last log and
    over all processes. A checkpoint holds the student alone, which `from_pretrained` loads without this package, and
    the file sea_kernels.pt with adapters and step, which `train(resume_from_checkpoint=...)` goes on from.

    Args:
        teacher: a detector, or what `AutoModelForObjectDetection.from_pretrained` takes.
        base: the Trainer to derive from.
        **options: those of :class:`sea_kernels.SEADistiller`, except for taps and channels.

    Returns:
        A subclass of `base` that is made as `base` is. Its attribute `distiller` is the SEADistiller. Adapters join the
        last parameter group of the optimizer.

    Raises:
        TypeError: a model projects no maps; an option is unknown.
        ValueError: several GPUs in one process (DataParallel); an option of SEADistiller is wrong.

    Example:
        >>> from sea_kernels.transformers import trainer
        >>> SEATrainer = trainer("PekingU/rtdetr_r101vd", weights=(2, 2, 20))  # doctest: +SKIP
        >>> SEATrainer(model, args, train_dataset=data, data_collator=collate).train()  # doctest: +SKIP
    """
    if not isinstance(teacher, nn.Module):
        teacher = AutoModelForObjectDetection.from_pretrained(teacher)

    class SEATrainer(base):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            if self.args.n_gpu > 1:
                raise ValueError(f"n_gpu is {self.args.n_gpu}; expected one GPU for each process, as by torchrun")
            self.distiller = None
            self._make_distiller()
            self.add_callback(_ZeroGrad(self))

        def _make_distiller(self) -> None:
            if self.distiller is not None:
                self.distiller.close()
            self._sea_sums, self._sea_count = {}, 0
            taps = [_taps(side, model) for side, model in (("student", self.model), ("teacher", teacher))]
            self.distiller = SEADistiller(self.model, teacher, taps[0], teacher_taps=taps[1], **options)
            self.distiller.to(self.args.device)
            # Adapters need the mean of the processes' gradients.
            self._sea = self.accelerator.prepare_model(self.distiller) if self.distiller.adapters else self.distiller

        def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
            if self.distiller.student is not self.accelerator.unwrap_model(self.model):  # model_init made another
                self._make_distiller()
            super().create_optimizer(*args, **kwargs)
            groups = self.optimizer.param_groups
            known = {id(p) for group in groups for p in group["params"]}
            # Not a group of their own: a scheduler that was passed to the Trainer knows how many there are.
            groups[-1]["params"] += [p for p in self.distiller.parameters() if id(p) not in known]
            return self.optimizer

        def compute_loss(
            self, model: nn.Module, inputs: dict, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            batch = dict(inputs)
            out = super().compute_loss(model, inputs, return_outputs, num_items_in_batch=num_items_in_batch)
            if not model.training:
                return out
            with self.accelerator.autocast():  # the Trainer's is around the model's forward alone
                losses = self._sea(**ground_truth(batch))
            for name, x in losses.items():
                self._sea_sums[name] = self._sea_sums.get(name, 0) + x.detach()
            self._sea_count += 1
            total = sum(losses.values())
            if self.compute_loss_func is not None or getattr(self, "loss_is_scaled_for_ga", None):
                total = total / self.current_gradient_accumulation_steps  # else the Trainer divides the sum
            return (out[0] + total, out[1]) if return_outputs else out + total

        def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            if "loss" in logs and self._sea_count:
                for name, x in self._sea_sums.items():
                    logs[name] = self.accelerator.gather(x / self._sea_count).mean().item()
                self._sea_sums, self._sea_count = {}, 0
            super().log(logs, *args, **kwargs)

        def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            student = self.distiller.student
            if isinstance(student, PreTrainedModel) and os.path.isfile(
                os.path.join(resume_from_checkpoint, "config.json")
            ):
                # Files have other names than modules in RT-DETR and others. The Trainer of transformers 5.24 does not
                # translate them, and leaves those weights as they were made, with a warning.
                saved = type(student).from_pretrained(resume_from_checkpoint)
                student.load_state_dict(saved.state_dict())

        def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
            super()._save_optimizer_and_scheduler(output_dir)
            if self.args.should_save:
                torch.save(self.distiller.state_dict(), os.path.join(output_dir, _FILE))

        def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
            path = None if checkpoint is None else os.path.join(checkpoint, _FILE)
            if path is not None and os.path.isfile(path):
                self.distiller.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
            elif path is not None:
                _log.warning("%s has no %s: distillation starts at step 0", checkpoint, _FILE)
            super()._load_optimizer_and_scheduler(checkpoint)

    SEATrainer.__name__ = SEATrainer.__qualname__ = f"SEA{base.__name__}"
    return SEATrainer


class _ZeroGrad(TrainerCallback):
    """After a step the Trainer clears the gradients of its model alone. The adapters' would add up."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.trainer.distiller.zero_grad()


def ground_truth(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of :meth:`sea_kernels.SEADistiller.losses` for a batch of a transformers detector.

    Args:
        batch: `pixel_values` [B, 3, H, W], `labels`, and if there is one `pixel_mask` [B, H, W], 1 inside of the image.

    Example:
        >>> import torch
        >>> from sea_kernels.transformers import ground_truth
        >>> label = {"boxes": torch.tensor([[0.5, 0.5, 0.5, 1.0]]), "class_labels": torch.tensor([3])}
        >>> ground_truth({"pixel_values": torch.zeros(1, 3, 64, 96), "labels": [label]})["boxes"]
        [tensor([[24.,  0., 72., 64.]])]
    """
    labels, mask = batch["labels"], batch.get("pixel_mask")
    full = batch["pixel_values"].shape[-2:]
    sizes = None
    if mask is not None:
        mask = mask.bool()
        sizes = torch.stack([mask.any(2).sum(1), mask.any(1).sum(1)], 1)
    boxes = [times(corners(x["boxes"], "cxcywh"), *x.get("size", full)) for x in labels]
    return {"boxes": boxes, "labels": [x["class_labels"] for x in labels], "image_sizes": sizes}


class _Done(Exception):
    """All maps are there: the rest of the forward is not computed."""


def _stop(*_: Any) -> None:
    raise _Done


def _run(model: nn.Module, images: Tensor, *mask: Tensor, owner: str, last: str) -> None:
    """The teacher's forward as far as its last map."""
    model = model.get_submodule(owner)
    own = next((p.dtype for p in model.parameters() if p.is_floating_point()), images.dtype)
    handle = model.get_submodule(last).register_forward_hook(_stop)
    try:
        model(images.to(own), *mask)
    except _Done:
        pass
    finally:
        handle.remove()


def _shapes(model: nn.Module, modules: Sequence[str]) -> list[torch.Size]:
    """The shapes of these modules' outputs for an image of _SIZE x _SIZE, without computing them."""
    shapes: list[torch.Size] = []
    hooks = [lambda _module, _args, out: shapes.append(out.shape)] * len(modules)
    pairs = [*zip(modules, hooks), (modules[-1], _stop)]
    handles = [model.get_submodule(name).register_forward_hook(hook) for name, hook in pairs]
    meta = {n: x.to("meta") for n, x in [*model.named_parameters(), *model.named_buffers()]}
    own = next(p.dtype for p in model.parameters() if p.is_floating_point())
    training = [x for x in model.modules() if x.training]
    model.eval()  # in training some look at their values
    try:
        with torch.no_grad():
            torch.func.functional_call(model, meta, torch.empty(1, 3, _SIZE, _SIZE, dtype=own, device="meta"))
    except _Done:
        pass
    finally:
        for handle in handles:
            handle.remove()
        for x in training:
            x.training = True
    return shapes


def _taps(side: str, model: nn.Module) -> Taps:
    """The taps of a detector's projected maps."""
    found = [
        (name, module, attribute)
        for name, module in model.named_modules()
        for attribute in _PROJECTIONS
        if all(isinstance(getattr(module, x, None), nn.Module) for x in (attribute, "backbone"))
    ]
    if not found:
        raise TypeError(
            f"the {side} is a {type(model).__name__}; expected a detector of transformers with a backbone and one of "
            f"{', '.join(_PROJECTIONS)}, as RT-DETR, RT-DETRv2, D-FINE, DETR and Deformable DETR have"
        )
    owner, module, attribute = found[0]
    projection = getattr(module, attribute)
    several = isinstance(projection, nn.ModuleList)
    levels = [f"{attribute}.{i}" for i in range(len(projection))] if several else [attribute]
    shapes = _shapes(module, levels)
    prefix = f"{owner}." if owner else ""
    names = tuple(prefix + level for level in levels)
    return Taps(
        (names,),
        (names,),
        [(_SIZE / height, _SIZE / width) for _, _, height, width in shapes],
        input=f"{prefix}backbone",
        run=partial(_run, owner=owner, last=levels[-1]),
        num_classes=model.config.num_labels,
        channels=shapes[0][1],
        anchor_on_box=False,  # the maps are the same
    )
