"""sea_kernels.ultralytics: YOLO models that Ultralytics' own trainers train, on COCO images."""

import csv
import json
import os
import shutil
import tempfile
from pathlib import Path

import programs
import pytest
import torch
from detectors import require

import sea_kernels as sk

# Read when Ultralytics is imported: its settings stay out of the home folder, and nothing is downloaded.
os.environ.setdefault("YOLO_CONFIG_DIR", tempfile.mkdtemp())
os.environ.update(YOLO_OFFLINE="true", YOLO_AUTOINSTALL="false", YOLO_VERBOSE="false")
COLUMNS = ["sea_anchor", "sea_dist", "sea_loc"]
FAST = {"imgsz": 64, "batch": 4, "workers": 0, "device": "cpu", "amp": False, "plots": False, "optimizer": "SGD"}


@pytest.fixture(scope="module")
def ultralytics():
    require("ultralytics")
    import ultralytics

    import sea_kernels.ultralytics

    return ultralytics


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """COCO images in Ultralytics' layout: 8 to train and 4 to validate; boxes, polygons and keypoints."""
    if "SEA_KERNELS_DATA" not in os.environ:
        pytest.skip("SEA_KERNELS_DATA is not set")
    source, out = Path(os.environ["SEA_KERNELS_DATA"]) / "coco_mini", tmp_path_factory.mktemp("yolo")
    coco = json.loads((source / "instances_val2017.json").read_text())
    for i, image in enumerate(coco["images"][:12]):
        for task in ("detect", "segment", "pose"):
            images, labels = (out / task / kind / ("train" if i < 8 else "val") for kind in ("images", "labels"))
            images.mkdir(parents=True, exist_ok=True)
            labels.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / "images" / image["file_name"], images)
            rows = []
            for x, y, w, h, label in [(*a["bbox"], a["category_id"]) for a in coco["annotations"] if a["image_id"] == image["id"]]:
                x, y, w, h = x / image["width"], y / image["height"], w / image["width"], h / image["height"]
                box, corners = (x + w / 2, y + h / 2, w, h), (x, y, x + w, y, x + w, y + h, x, y + h)
                values = {"detect": box, "segment": corners, "pose": (*box, *corners)}[task]
                rows.append(" ".join(map(str, (label, *(min(max(v, 0), 1) for v in values)))))
            (labels / image["file_name"]).with_suffix(".txt").write_text("\n".join(rows))
    for task in ("detect", "segment", "pose"):
        names = {c["id"]: c["name"] for c in coco["categories"]}
        data = {"path": str(out / task), "train": "images/train", "val": "images/val", "names": names}
        (out / task / "data.yaml").write_text(json.dumps(data | ({"kpt_shape": [4, 2]} if task == "pose" else {})))
    return out


def checkpoint(ultralytics, path, model, seed=1):
    """An untrained model as the file that Ultralytics would load."""
    torch.manual_seed(seed)
    ultralytics.YOLO(model).save(path)
    return path


@pytest.fixture(scope="module")
def teacher(ultralytics, folder):
    return checkpoint(ultralytics, folder / "teacher.pt", "yolo11s.yaml")


def rows(trainer):
    with open(trainer.csv) as file:
        return [{k.strip(): v for k, v in row.items()} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def trained(ultralytics, folder, teacher):
    """(trainer, last.pt as it was after the first of two epochs, the distiller's state then)"""
    model, kept = ultralytics.YOLO("yolo11n.yaml"), {}

    def keep(trainer):
        if trainer.epoch == 0:
            shutil.copy(trainer.last, folder / "first.pt")
            kept.update({k: v.clone() for k, v in trainer.distiller.state_dict().items()})

    model.add_callback("on_model_save", keep)
    # 8 images in batches of 4, a step of the optimizer every second batch, sizes of 32 to 96 pixels
    options = FAST | {"plots": True, "multi_scale": 0.5, "nbs": 8, "warmup_epochs": 0, "project": str(folder / "runs")}
    model.train(
        trainer=sk.ultralytics.trainer(teacher), data=str(folder / "detect/data.yaml"), epochs=2, **options
    )
    return model.trainer, folder / "first.pt", kept


def test_the_losses_are_logged_and_validation_is_left_alone(trained):
    trainer, _, _ = trained
    assert trainer.loss_names == ("box_loss", "cls_loss", "dfl_loss", *COLUMNS)
    assert all(len(name) <= 10 for name in COLUMNS) and len(rows(trainer)) == 2
    for row in rows(trainer):
        assert all(float(row[f"train/{name}"]) > 0 for name in COLUMNS)
        assert [k for k in row if k.startswith("val/")] == ["val/box_loss", "val/cls_loss", "val/dfl_loss"]
    assert trainer.distiller.step == 4 and trainer.ema.updates == 2


def test_the_teacher_rests_and_the_adapters_learn(ultralytics, trained, teacher):
    trainer, _, first = trained
    before, after = ultralytics.YOLO(teacher).model.float().state_dict(), trainer.distiller.teacher.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(x, after[k]) for k, x in before.items())
    names = [k for k in first if "weight" in k]
    assert names == ["adapters.cls_0.weight", "adapters.cls_1.weight"]
    assert not any(torch.equal(first[k], trainer.distiller.state_dict()[k]) for k in names)


def test_resume_goes_on_with_the_state_that_was_saved(ultralytics, folder, trained, teacher):
    _, path, saved = trained
    seen = {}

    def look(trainer):
        seen.update({k: v.clone() for k, v in trainer.distiller.state_dict().items()})
        momentum = [trainer.optimizer.state[p]["momentum_buffer"].clone() for p in trainer.distiller.parameters()]
        seen["momentum"] = momentum

    model = ultralytics.YOLO(path)
    model.add_callback("on_train_start", look)
    model.train(trainer=sk.ultralytics.trainer(teacher), resume=True)
    momentum = seen.pop("momentum")
    assert saved["step"] == 2 and seen.keys() == saved.keys()
    assert all(torch.equal(x, seen[k]) for k, x in saved.items())
    optimizer = torch.load(path, weights_only=False)["optimizer"]
    states = [optimizer["state"][i]["momentum_buffer"].float() for i in optimizer["param_groups"][-1]["params"]]
    assert len(states) == 4 and all(torch.equal(x, y) and x.any() for x, y in zip(states, momentum))
    assert model.trainer.start_epoch == 1 and model.trainer.distiller.step == 4


def test_checkpoints_load_and_export_without_sea_kernels(ultralytics, folder, trained):
    trainer, first, _ = trained
    script = """
import sys
sys.modules["sea_kernels"] = None  # an import of it is an error from here on
import numpy, torch
from ultralytics import YOLO
for path in sys.argv[1:]:
    model = YOLO(path)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.model.modules())
    model.predict(numpy.zeros((64, 64, 3), numpy.uint8), imgsz=64, verbose=False)
exported = torch.jit.load(model.export(format="torchscript", imgsz=64))
assert exported(torch.zeros(1, 3, 64, 64)).shape == (1, 84, 84)
try:
    import onnx
except ImportError:
    pass
else:
    onnx.checker.check_model(model.export(format="onnx", imgsz=64, simplify=False))
"""
    done = programs.run("-c", script, *map(str, (first, trainer.last, trainer.best)), cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr


VERSIONS = [
    ("yolov8n", "yolov8s", "detect", {}),
    ("yolo26n", "yolo26s", "detect", {}),
    ("yolov10n", "yolo11s", "detect", {}),
    ("yolo11n-seg", "yolo11s-seg", "segment", {}),
    ("yolo11n-pose", "yolo11s", "pose", {}),
    ("yolo11n", "yolo11s", "detect", {"amp": "bf16"}),
    ("yolo11n", "yolo11s", "detect", {"optimizer": "MuSGD"}),
]


@pytest.mark.parametrize("student, teacher, task, options", VERSIONS)
def test_an_epoch(ultralytics, folder, tmp_path, student, teacher, task, options):
    path = checkpoint(ultralytics, tmp_path / "teacher.pt", f"{teacher}.yaml")
    model, gradients = ultralytics.YOLO(f"{student}.yaml"), {}

    def look(trainer):
        own = {n: x for n, x in trainer.loss_items.items() if n not in COLUMNS}
        sea = sum(trainer.loss_items[n] for n in COLUMNS)
        # as Ultralytics: what is logged is for an image, what is differentiated for the batch
        torch.testing.assert_close(trainer.loss.detach(), 4 * (sum(own.values()) + sea), rtol=1e-5, atol=0.0)
        gradients.update(trainer.loss_items)

    model.add_callback("on_train_batch_end", look)
    options = FAST | {"data": str(folder / task / "data.yaml"), "project": str(tmp_path), "val": False} | options
    model.train(trainer=sk.ultralytics.trainer(path, weights=(1, 1, 1)), epochs=1, **options)
    assert type(model.trainer).__name__ == f"SEA{ {'detect': 'Detection', 'segment': 'Segmentation', 'pose': 'Pose'}[task] }Trainer"
    assert all(gradients[name] > 0 for name in COLUMNS) and model.trainer.distiller.step == 2
