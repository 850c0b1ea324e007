"""The examples in both READMEs for users, each run as it stands there."""

import ast
import math
import os
import re
from pathlib import Path

import programs
import pytest
import torch
from cases import make_maps
from detectors import (
    mmdet_batch,
    mmdet_config,
    mmdet_detector,
    require,
    torchvision_batch,
    torchvision_detector,
)
from toy_detector import Toy, batch

import sea_kernels as sk

ROOT = Path(__file__).parents[2]


def example(name):
    text = (ROOT / "README.md").read_text() + (ROOT / "sea_kernels" / "README.md").read_text()
    return re.search(rf"<!-- test: {name} -->\n```python\n(.*?)```", text, re.S)[1]


def moved(model, before):
    return [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]


def snapshot(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def test_the_example_of_plain_pytorch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    student, teacher = Toy(), Toy(24, seed=1)
    before = snapshot(student)
    names = {"sk": sk, "torch": torch, "student": student, "teacher": teacher, "data_loader": [batch(0), batch(1)]}
    exec(example("plain"), names)
    assert len(names["losses"]) == 4 and all(x.isfinite() for x in names["losses"].values())
    towers = {f"head.{name}.weight" for name in ("cls_tower.0", "cls_tower.2", "box_tower.0", "predict")}
    assert towers | {"backbone.0.weight"} <= set(moved(student, before)) and names["distiller"].step == 2
    Toy().load_state_dict(torch.load("student.pth"))


def test_the_example_of_the_losses_alone():
    shapes = [(math.ceil(160 / s), math.ceil(224 / s)) for s in (8, 16, 32, 64, 128)]
    cls, box = make_maps(shapes), make_maps(shapes, channels=24, seed=1)
    names = {
        "sk": sk, "student_cls": [x.requires_grad_() for x in cls], "teacher_cls": make_maps(shapes, seed=2),
        "student_box": box, "teacher_box": make_maps(shapes, channels=24, seed=3), "image_sizes": [(160, 224)] * 2,
        "boxes": [torch.tensor([[8.0, 8.0, 90.0, 70.0]])] * 2, "labels": [torch.tensor([3]), torch.tensor([79])],
        "detection_loss": 1.0, "alpha": 0.02, "beta": 0.02, "gamma": 0.02,
    }  # fmt: skip
    exec(example("losses"), names)
    names["loss"].backward()
    assert all(x.grad.abs().sum() > 0 for x in cls)


@pytest.mark.processes
def test_the_example_of_several_processes(tmp_path):
    """Two processes by torchrun: the anchor loss is that of both, so the same on either; the others are their own."""
    require("torchvision")
    if "SEA_KERNELS_DATA" not in os.environ:
        pytest.skip("SEA_KERNELS_DATA is not set")
    script = example("distributed")
    assert len([line for line in script.splitlines() if line]) <= 30
    (tmp_path / "train.py").write_text(script)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"]
    data = str(Path(os.environ["SEA_KERNELS_DATA"]).resolve())
    environment = {"OMP_NUM_THREADS": "1", "SEA_KERNELS_DATA": data}
    done = programs.run(*torchrun, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    steps = {0: [], 1: []}
    for line in re.findall(r"\{'rank'.*?\}", done.stdout):
        losses = ast.literal_eval(line)
        steps[losses.pop("rank")].append(losses)
    assert len(steps[0]) == len(steps[1]) == 3
    names = ["loss_sea_anchor", "loss_sea_distance", "loss_sea_localization"]
    for first, second in zip(*steps.values()):
        assert list(first)[-3:] == list(second)[-3:] == names
        assert all(math.isfinite(x) for losses in (first, second) for x in losses.values())
    assert all(losses[n] > 0 for losses in (first, second) for n in names)
    assert [first[n] == second[n] for n in names] == [True, False, False]


def test_the_example_of_two_lines_in_a_trainer():
    student, teacher = torchvision_detector("FCOS").train(), torchvision_detector("FCOS", 50, seed=1)
    before = snapshot(student)
    names = {"torch": torch, "student": student, "teacher": teacher, "data_loader": [torchvision_batch("FCOS")]}
    exec(example("trainer"), names)
    assert moved(student, before) and names["distiller"].step == 1


def test_the_example_of_torchvision():
    model, teacher = torchvision_detector("FCOS").train(), torchvision_detector("FCOS", 50, seed=1)
    before, fixed = snapshot(model), snapshot(teacher)
    optimizer = torch.optim.SGD(model.parameters(), 1e-6)
    names = {"sk": sk, "torch": torch, "model": model, "teacher": teacher, "optimizer": optimizer, "scaler": None}
    exec(example("torchvision"), names | {"data_loader": [torchvision_batch("FCOS")]})
    assert moved(model, before) and not moved(teacher, fixed)


def test_the_example_without_labels(monkeypatch):
    student, teacher = torchvision_detector("FCOS").train(), torchvision_detector("FCOS", 50, seed=1)
    found = [{k: v.clone() for k, v in x.items()} for x in torchvision_batch("FCOS")[1]]
    images, forward, seen = torchvision_batch("FCOS")[0], teacher.forward, []
    for x in found:  # the teacher is not trained: what it would detect
        x["scores"] = torch.linspace(0, 1, len(x["labels"]))
    monkeypatch.setattr(teacher, "forward", lambda x: (forward(x), found)[1])
    student.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    optimizer, before = torch.optim.SGD(student.parameters(), 1e-6), snapshot(student)
    names = {"sk": sk, "torch": torch, "student": student, "teacher": teacher, "optimizer": optimizer}
    exec(example("without labels"), names | {"data_loader": [images]})
    assert [len(x["labels"]) for x in seen[0]] == [int((x["scores"] > 0.5).sum()) for x in found]
    assert moved(student, before)


def test_the_example_of_mmdetection(tmp_path, monkeypatch):
    require("mmdet")
    from mmengine.config import Config
    from mmengine.model import ExponentialMovingAverage
    from mmengine.optim import OptimWrapper

    teacher = mmdet_detector("FCOS", 50, seed=1)
    for name, depth in (("fcos_r18_fpn", 18), ("fcos_r50_fpn", 50)):
        rest = {"train_cfg": {"max_epochs": 12}}
        Config({"model": mmdet_config("FCOS", depth), **rest}).dump(tmp_path / f"{name}.py")
    torch.save(teacher.state_dict(), tmp_path / "fcos_r50_fpn.pth")
    (tmp_path / "sea.py").write_text(example("mmdet"))
    monkeypatch.chdir(tmp_path)

    config = Config.fromfile("sea.py")
    assert config.train_cfg.max_epochs == 12  # the rest of the student's config is there
    from mmdet.registry import MODELS

    model = MODELS.build(config.model)
    model.init_weights()
    for key, x in model.distiller.teacher.state_dict().items():
        assert torch.equal(x, teacher.state_dict()[key]), key
    before = snapshot(model)
    assert all(n.startswith("student.") for n in before)
    logged = model.train().train_step(mmdet_batch("FCOS"), OptimWrapper(torch.optim.SGD(model.parameters(), 1e-3)))
    assert {"loss_cls", "loss_bbox", "loss_centerness", "loss", "loss_sea_anchor"} <= set(logged)
    assert all(x.isfinite() for x in logged.values()) and moved(model, before)
    ema = ExponentialMovingAverage(model, update_buffers=True)
    ema.update_parameters(model)
    assert ema.module.distiller.teacher is model.distiller.teacher
    model.distiller.step = 7
    model.load_state_dict(model.state_dict())
    assert model.distiller.step == 7
    found = model.eval().val_step(mmdet_batch("FCOS"))
    assert len(found) == 2 and "pred_instances" in found[0]

    torch.save(model.state_dict(), "wrong.pth")  # of the wrapper, not of a teacher
    with pytest.raises(RuntimeError, match="do not match"):
        MODELS.build(config.model | {"teacher_checkpoint": "wrong.pth"})
    other = mmdet_config("FCOS", 50)
    other.data_preprocessor.std = [58.4, 57.1, 57.4]
    with pytest.raises(ValueError, match=r"teacher normalizes its input by .*58\.4.*; expected .*1\.0"):
        MODELS.build(config.model | {"teacher": other})
