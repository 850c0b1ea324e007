"""sea_kernels.transformers in the Trainer of Hugging Face: small untrained detectors, real images."""

import os
import re
from pathlib import Path

import programs
import pytest
import torch
from detectors import coco_images, require

import sea_kernels as sk

ROOT = Path(__file__).parents[2]
KINDS = ("RTDetr", "RTDetrV2", "DFine", "Detr", "DeformableDetr")
NAMES = ["loss_sea_anchor", "loss_sea_distance", "loss_sea_localization"]
STRIDES = {"Detr": (32,), "DeformableDetr": (8, 16, 32, 64)}  # of the others 8, 16, 32


def detector(kind, width=32, seed=0):
    """A detector whose projected maps have `width` channels; its backbone is a small random one."""
    require("transformers")
    import transformers

    torch.manual_seed(seed)
    stages = [16, 16, 32, 32]
    encoder = {"encoder_layers": 1, "encoder_ffn_dim": 32, "encoder_attention_heads": 2}
    decoder = {"decoder_layers": 2, "decoder_ffn_dim": 32, "decoder_attention_heads": 2}
    options = encoder | decoder | {"d_model": width, "num_queries": 30, "num_labels": 80}
    resnet = {"embedding_size": 16, "hidden_sizes": stages, "depths": [1] * 4, "layer_type": "basic"}
    if kind in ("Detr", "DeformableDetr"):
        backbone = transformers.ResNetConfig(**resnet, out_features=["stage2", "stage3", "stage4"])
        options |= {"backbone_config": backbone, "use_timm_backbone": False, "use_pretrained_backbone": False}
    else:
        if kind == "DFine":
            backbone = transformers.HGNetV2Config(
                stem_channels=[3, 8, 8], stage_in_channels=[8, 16, 16, 32], stage_mid_channels=[8] * 4,
                stage_out_channels=stages, stage_num_blocks=[1] * 4, stage_numb_of_layers=[1] * 4, embedding_size=8,
                hidden_sizes=stages, depths=[1] * 4, out_indices=[2, 3, 4],
            )  # fmt: skip
            options["feat_strides"] = [8, 16, 32]
        else:
            backbone = transformers.RTDetrResNetConfig(**resnet, out_features=["stage2", "stage3", "stage4"])
        options |= {"backbone_config": backbone, "encoder_hidden_dim": width, "num_denoising": 10}
        options |= {"encoder_in_channels": stages[1:], "decoder_in_channels": [width] * 3}
    config = getattr(transformers, f"{kind}Config")(**options)
    return getattr(transformers, f"{kind}ForObjectDetection")(config)


def samples():
    """Two real images of different sizes, as an image processor gives them: normalized, boxes relative to each."""
    out = []
    for image, boxes, labels in coco_images():
        height, width = image.shape[-2:]
        x1, y1, x2, y2 = (boxes / torch.tensor([width, height] * 2)).unbind(1)
        boxes = torch.stack([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1], 1)
        out.append({"image": image / 255 - 0.5, "boxes": boxes, "class_labels": labels})
    return out


def collate(rows):
    # RT-DETR takes multiples of its largest stride.
    height, width = (-(-max(row["image"].shape[i] for row in rows) // 32) * 32 for i in (1, 2))
    batch = {
        "pixel_values": torch.zeros(len(rows), 3, height, width),
        "pixel_mask": torch.zeros(len(rows), height, width, dtype=torch.long),
        "labels": [],
    }
    for b, row in enumerate(rows):
        h, w = row["image"].shape[1:]
        batch["pixel_values"][b, :, :h, :w], batch["pixel_mask"][b, :h, :w] = row["image"], 1
        batch["labels"].append(
            {"boxes": row["boxes"], "class_labels": row["class_labels"], "size": torch.tensor([h, w])}
        )
    return batch


def make(student, teacher, folder, options=None, **arguments):
    """A Trainer for two steps (one batch each) with a checkpoint after every second."""
    from transformers import TrainingArguments

    from sea_kernels.transformers import trainer

    arguments = {"max_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 1, "save_steps": 2} | arguments
    args = TrainingArguments(
        str(folder), report_to=[], remove_unused_columns=False, use_cpu=True, disable_tqdm=True, learning_rate=1e-3,
        **arguments,
    )  # fmt: skip
    made = {"model" if isinstance(student, torch.nn.Module) else "model_init": student}
    data = {"train_dataset": samples(), "eval_dataset": samples(), "data_collator": collate}
    return trainer(teacher, **(options or {}))(**made, args=args, **data)


def equal(a, b):
    assert a.keys() == b.keys()
    return all(torch.equal(x, b[name]) for name, x in a.items())


def logged(trainer):
    return [[row[n] for n in NAMES] for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize("kind", KINDS)
def test_two_steps_of_training(kind, tmp_path):
    student, teacher = detector(kind), detector(kind, seed=1)
    before, fixed = ({n: x.clone() for n, x in m.state_dict().items()} for m in (student, teacher))
    trainer = make(student, teacher, tmp_path, {"weights": (1, 1, 1)}, save_strategy="no")
    strides = STRIDES.get(kind, (8, 16, 32))
    assert tuple(trainer.distiller._taps[0].strides) == tuple((s, s) for s in strides)
    assert trainer.distiller.num_classes == 80 and not trainer.distiller.adapters
    masks = []
    teacher.model.backbone.register_forward_pre_hook(lambda _module, args: masks.append(args[1]))
    trainer.train()
    valid = collate(samples())["pixel_mask"].sum()
    assert [x.sum() for x in masks] == [valid, valid]
    assert len(logged(trainer)) == 2 and trainer.distiller.step == 2
    assert all(0 < x < float("inf") for row in logged(trainer) for x in row)
    assert equal(teacher.state_dict(), fixed) and not equal(student.state_dict(), before)
    assert "eval_loss" in trainer.evaluate() and trainer.distiller.step == 2


def test_the_example_in_the_readme(tmp_path):
    trainer = make(detector("Detr"), detector("Detr", seed=1), tmp_path, save_strategy="no")
    text = (ROOT / "sea_kernels" / "README.md").read_text()
    code = re.search(r"<!-- test: transformers -->\n```python\n(.*?)```", text, re.S)[1]
    student, teacher = detector("Detr"), detector("Detr", seed=1)
    before = {n: x.clone() for n, x in student.state_dict().items()}
    data = {"model": student, "args": trainer.args, "data": samples(), "collate": collate}
    exec(code, data | {"teacher": teacher})
    assert not equal(student.state_dict(), before)


@pytest.mark.parametrize("kind", KINDS)
def test_the_maps_and_the_regions_are_those_of_the_models(kind, tmp_path):
    """The teacher's maps are those of its whole forward with the mask; boxes and sizes are the images' own."""
    student, teacher = detector(kind).train(), detector(kind, seed=1).eval()
    from sea_kernels.transformers import ground_truth

    distiller = make(student, teacher, tmp_path, options={"num_classes": 80}).distiller
    batch = collate(samples())
    student(**batch)
    names = distiller._taps[1].cls[0]
    seen = {}
    for name in names:
        teacher.get_submodule(name).register_forward_hook(lambda _m, _a, out, name=name: seen.update({name: out}))
    with torch.no_grad():
        teacher(batch["pixel_values"], batch["pixel_mask"])
    expected = [seen[name].clone() for name in names]
    captured = distiller.capture(**ground_truth(batch))
    assert all(torch.equal(x, y) for x, y in zip(captured.teacher_cls[0], expected, strict=True))
    images, boxes, labels = zip(*coco_images())
    shapes = [tuple(x.shape[2:]) for x in expected]
    sizes = [tuple(x.shape[1:]) for x in images]
    assert len(set(sizes)) == 2  # one of them is padded
    strides = STRIDES.get(kind, (8, 16, 32))
    regions = sk.Regions.from_boxes(boxes, labels, shapes, strides, num_classes=80, image_sizes=sizes)
    for level in range(len(strides)):
        differ = (captured.regions.masks(level) != regions.masks(level)).float().mean()
        assert differ < 1e-3  # a box on the edge of a pixel may round to the other side of it


def test_boxes_relative_to_the_padded_batch():
    """Without `size` boxes are relative to pixel_values, without pixel_mask every image fills them."""
    require("transformers")
    from sea_kernels.transformers import ground_truth

    labels = [
        {"boxes": torch.tensor([[0.5, 0.5, 0.5, 1.0]]), "class_labels": torch.tensor([3])},
        {"boxes": torch.zeros(0, 4), "class_labels": torch.zeros(0, dtype=torch.long)},
    ]
    found = ground_truth({"pixel_values": torch.zeros(2, 3, 64, 96), "labels": labels})
    assert found["boxes"][0].tolist() == [[24, 0, 72, 64]] and found["boxes"][1].shape == (0, 4)
    assert found["image_sizes"] is None
    mask = torch.zeros(2, 64, 96, dtype=torch.long)
    mask[0, :50, :96] = mask[1, :64, :33] = 1
    found = ground_truth({"pixel_values": torch.zeros(2, 3, 64, 96), "pixel_mask": mask, "labels": labels})
    assert found["image_sizes"].tolist() == [[50, 96], [64, 33]]


@pytest.mark.parametrize("kind", ["RTDetr", "DeformableDetr"])
def test_a_run_that_is_resumed_is_the_run_that_was_not_interrupted(kind, tmp_path):
    """With adapters, whose optimizer state is saved too, and a schedule that depends on the step."""
    options = {"schedule": sk.Schedule(warmup=8), "weights": (1, 1, 1)}

    def run(folder, seed, **arguments):
        trainer = make(detector(kind, seed=seed), detector(kind, 64, seed=1), folder, options, max_steps=4)
        assert set(trainer.distiller.adapters) == {"cls_0", "box_0"}
        trainer.train(**arguments)
        return trainer

    whole = run(tmp_path, 0)
    resumed = run(tmp_path / "resumed", 2, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.distiller.step == whole.distiller.step == 4
    assert equal(resumed.distiller.state_dict(), whole.distiller.state_dict())
    assert equal(resumed.model.state_dict(), whole.model.state_dict())
    assert logged(resumed) == logged(whole)
    last = [t.optimizer.state_dict() for t in (resumed, whole)]
    indices = last[0]["param_groups"][-1]["params"][-4:]  # of the adapters
    for i in indices:
        assert equal(last[0]["state"][i], last[1]["state"][i]) and last[0]["state"][i]["exp_avg"].abs().sum() > 0


def test_a_checkpoint_loads_where_sea_kernels_is_not_installed(tmp_path):
    trainer = make(detector("RTDetr"), detector("RTDetr", 48, seed=1), tmp_path)
    trainer.train()
    batch = collate(samples())
    torch.save(batch["pixel_values"], tmp_path / "images.pt")
    program = """
import sys
sys.modules["sea_kernels"] = None  # importing it is an error
import torch, transformers
model, info = transformers.AutoModelForObjectDetection.from_pretrained("checkpoint-2", output_loading_info=True)
assert not any(info.values()), info
with torch.no_grad():
    torch.save(model.eval()(torch.load("images.pt")).logits, "logits.pt")
"""
    done = programs.run("-c", program, cwd=tmp_path, timeout=240)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = trainer.model.eval()(batch["pixel_values"]).logits
    assert torch.equal(torch.load(tmp_path / "logits.pt"), expected)


@pytest.mark.parametrize("width", [32, 48])
def test_autocast_accumulation_and_a_model_that_is_made_in_train(width, tmp_path):
    """bfloat16 by accelerate, with adapters or without; two batches a step; hooks follow the model of model_init."""
    teacher = detector("RTDetr", width, seed=1)
    options = {"bf16": True, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "save_strategy": "no"}
    trainer = make(lambda: detector("RTDetr"), teacher, tmp_path, **options)
    first, dtypes, projection = trainer.distiller, [], teacher.model.decoder_input_proj[0][0]
    projection.register_forward_hook(lambda _module, _args, out: dtypes.append(out.dtype) if not out.is_meta else None)
    trainer.train()
    assert trainer.distiller is not first and trainer.distiller.student is trainer.model
    assert trainer.distiller.step == 4 and len(logged(trainer)) == 2 and dtypes == [torch.bfloat16] * 4


def test_the_losses_are_divided_as_the_own_loss_is(tmp_path):
    """Four batches a step: the Trainer divides all losses, or none if it takes the own loss as divided."""
    trainer = make(detector("Detr"), detector("Detr", seed=1), tmp_path, {"weights": (0, 0, 1)}, save_strategy="no")
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 4
    for divided in (False, True):
        trainer.loss_is_scaled_for_ga, trainer._sea_sums = divided, {}
        loss, outputs = trainer.compute_loss(trainer.model, collate(samples()), return_outputs=True)
        sea = trainer._sea_sums["loss_sea_localization"] / (4 if divided else 1)
        assert sea > 0 and torch.equal(loss, outputs.loss + sea)


def test_what_is_no_detector_or_cannot_be_trained(tmp_path, monkeypatch):
    require("transformers")
    import transformers

    with pytest.raises(TypeError, match="the teacher is a Linear; expected a detector of transformers with a backbone"):
        make(detector("Detr"), torch.nn.Linear(1, 1), tmp_path)
    with pytest.raises(TypeError, match="unexpected keyword argument 'wieghts'"):
        make(detector("Detr"), detector("Detr", seed=1), tmp_path, {"wieghts": 1})
    monkeypatch.setattr(transformers.TrainingArguments, "n_gpu", 2)
    with pytest.raises(ValueError, match="n_gpu is 2; expected one GPU for each process"):
        make(detector("Detr"), detector("Detr", seed=1), tmp_path)


def test_the_recipe(tmp_path):
    """Two steps of recipes/huggingface_rtdetr.py, of small detectors in the place of the downloaded ones."""
    if "SEA_KERNELS_DATA" not in os.environ:
        pytest.skip("SEA_KERNELS_DATA is not set")
    models = {"student": detector("RTDetr"), "teacher": detector("RTDetr", seed=1)}
    from transformers import RTDetrImageProcessor

    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        RTDetrImageProcessor(size={"height": 160, "width": 160}).save_pretrained(tmp_path / name)
    folder = Path(os.environ["SEA_KERNELS_DATA"]).resolve() / "coco_mini"
    arguments = ["student", "teacher", folder / "images", folder / "instances_train2017.json", "--max_steps=2"]
    done = programs.run(str(ROOT / "recipes" / "huggingface_rtdetr.py"), *map(str, arguments), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "loss_sea_distance" in done.stdout
