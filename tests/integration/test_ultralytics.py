"""sea_kernels.ultralytics: YOLO models that Ultralytics' own trainers train, on COCO images."""

import csv
import importlib
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
    importlib.import_module("sea_kernels.ultralytics")
    return importlib.import_module("ultralytics")


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
            for annotation in [a for a in coco["annotations"] if a["image_id"] == image["id"]]:
                label, size = annotation["category_id"], (image["width"], image["height"])
                x, y, w, h = (value / size[i % 2] for i, value in enumerate(annotation["bbox"]))
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
    return checkpoint(ultralytics, folder / "yolo11s.pt", "yolo11s.yaml")


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
    model.train(trainer=sk.ultralytics.trainer(teacher), data=str(folder / "detect/data.yaml"), epochs=2, **options)
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
    model.train(trainer=sk.ultralytics.trainer(teacher), resume=True, plots=False)
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
    ("yolo11n", "yolo11s", "detect", {"amp": True}),
    ("yolo11n", "yolo11s", "detect", {"optimizer": "MuSGD"}),
    ("yolo11n", "yolo11s", "detect", {"maps": "neck"}),
    ("yolo26n-seg", "yolo11s", "segment", {"maps": "neck", "optimizer": "AdamW"}),
]


@pytest.mark.parametrize("student, teacher, task, options", VERSIONS)
def test_one_epoch(ultralytics, folder, tmp_path, monkeypatch, student, teacher, task, options):
    path = folder / f"{teacher}.pt"
    if not path.exists():
        checkpoint(ultralytics, path, f"{teacher}.yaml")
    model, own = ultralytics.YOLO(f"{student}.yaml"), []
    monkeypatch.setattr("ultralytics.engine.trainer.check_amp", lambda model: True)  # it would download a model

    def begin(trainer):
        criterion = trainer.model.criterion._own
        trainer.model.criterion._own = lambda *args: own.append(criterion(*args)) or own[-1]

    def look(trainer):
        sea = sum(trainer.loss_items[name] for name in COLUMNS)
        # as Ultralytics does: what is logged is for one image, what is differentiated for the batch
        torch.testing.assert_close(trainer.loss.detach(), own[-1][0].sum().detach() + 4 * sea, rtol=1e-5, atol=0.0)
        assert all(trainer.loss_items[name] > 0 for name in COLUMNS)

    model.add_callback("on_train_start", begin)
    model.add_callback("on_train_batch_end", look)
    options = FAST | {"data": str(folder / task / "data.yaml"), "project": str(tmp_path), "val": False} | options
    trainer = sk.ultralytics.trainer(path, maps=options.pop("maps", "towers"), weights=(1, 1, 1))
    model.train(trainer=trainer, epochs=1, **options)
    assert len(own) == 2
    assert model.trainer.amp == bool(options["amp"]) and model.trainer.args.task == task


def test_boxes_of_a_batch_are_those_of_its_images(ultralytics):
    """Packed, centers and sizes relative to the image, images without boxes; in pixels, as a list they are the same."""
    xywh = torch.tensor([[0.5, 0.5, 0.5, 0.25], [0.25, 0.75, 0.1, 0.2], [0.3, 0.3, 0.2, 0.2]])
    batch = {"img": torch.zeros(3, 3, 64, 96), "bboxes": xywh, "cls": torch.tensor([[3.0], [1.0], [3.0]])}
    found = sk.ultralytics._targets(batch | {"batch_idx": torch.tensor([0.0, 2.0, 2.0])})
    boxes = torch.tensor([[24.0, 24, 72, 40], [19.2, 41.6, 28.8, 54.4], [19.2, 12.8, 38.4, 25.6]])
    wanted = {"boxes": [boxes[:1], boxes[:0], boxes[1:]], "labels": [torch.tensor(x) for x in ([3], [], [1, 3])]}
    wanted["labels"][1] = wanted["labels"][1].long()
    options = {"level_shapes": [(8, 12), (4, 6)], "strides": (8, 16), "num_classes": 4}
    found = sk.Regions.from_boxes(**found, **options, batch_size=3, image_sizes=[(64, 96)] * 3)
    wanted = sk.Regions.from_boxes(**wanted, **options)
    for level in range(2):
        for k, label in enumerate(wanted.classes[:2].tolist()):
            assert found.classes[k] == label
            assert torch.equal(found.masks(level)[: 3 + 2 * k], wanted.masks(level)[: 3 + 2 * k])


def test_a_copy_of_the_criterion_is_the_students_own(ultralytics):
    import copy
    import pickle

    own = {"a": 1}
    criterion = sk.ultralytics._Criterion(own, None, torch.nn.Identity())
    assert copy.deepcopy(criterion) == own and pickle.loads(pickle.dumps(criterion)) == own


def train(ultralytics, folder, tmp_path, trainer, student="yolo11n.yaml", task="detect", **options):
    options = FAST | {"data": str(folder / task / "data.yaml"), "project": str(tmp_path), "epochs": 1} | options
    ultralytics.YOLO(student).train(trainer=trainer, **options)


def test_bad_input_is_named(ultralytics, folder, tmp_path, teacher):
    with pytest.raises(ValueError, match=r"teacher is 'yolo11s.yaml', which has no weights; expected a checkpoint"):
        sk.ultralytics.trainer("yolo11s.yaml")
    with pytest.raises(TypeError, match="teacher is a int; expected a checkpoint"):
        sk.ultralytics.trainer(3)
    with pytest.raises(TypeError, match="the teacher's last layer is a RTDETRDecoder; expected a Detect head"):
        sk.ultralytics.trainer(ultralytics.RTDETR("rtdetr-l.yaml").model)
    with pytest.raises(TypeError, match="'weight' is no option; expected maps, base, boxes, center_ratio"):
        sk.ultralytics.trainer(teacher, weight=1)
    with pytest.raises(ValueError, match="maps is 'head'; expected \"towers\""):
        sk.ultralytics.trainer(teacher, maps="head")
    trainer = sk.ultralytics.trainer(teacher)
    with pytest.raises(ValueError, match="the student's task is 'obb'; expected detect, segment, pose"):
        train(ultralytics, folder, tmp_path, trainer, "yolo11n-obb.yaml")
    with pytest.raises(ValueError, match=r"the teacher's head has strides \(8.0, 16.0, 32.0\); expected \(4.0, 8.0"):
        train(ultralytics, folder, tmp_path, trainer, "yolov8n-p2.yaml")
    with pytest.raises(ValueError, match=r"distill_model is 'yolo11s\.pt'; expected None"):
        train(ultralytics, folder, tmp_path, trainer, distill_model="yolo11s.pt")


def test_a_checkpoint_of_another_trainer_is_refused(ultralytics, folder, tmp_path, trained, teacher):
    _, first, _ = trained
    saved = torch.load(first, weights_only=False)
    del saved["optimizer"]["sea_kernels"]
    torch.save(saved, tmp_path / "last.pt")
    with pytest.raises(ValueError, match="the checkpoint has no state of a distiller; expected one that this trainer"):
        ultralytics.YOLO(tmp_path / "last.pt").train(trainer=sk.ultralytics.trainer(teacher), resume=True)


def test_the_recipe(ultralytics, folder, tmp_path, teacher):
    recipe = Path(__file__).parents[2] / "recipes" / "ultralytics_yolo.py"
    data, options = (
        folder / "detect" / "data.yaml",
        ("epochs=1", "imgsz=64", "batch=4", "device=cpu", f"project={tmp_path}"),
    )
    done = programs.run(str(recipe), "yolo11n.yaml", str(teacher), str(data), *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (results,) = tmp_path.rglob("results.csv")
    assert "train/sea_anchor,train/sea_dist,train/sea_loc" in results.read_text()


def test_the_example_of_ultralytics(ultralytics, folder, tmp_path, teacher, monkeypatch):
    from test_readme_examples import example

    monkeypatch.chdir(tmp_path)
    shutil.copy(teacher, "yolo11s.pt")
    shutil.copy(folder / "detect" / "data.yaml", "coco.yaml")
    code = example("ultralytics").replace(
        "epochs=100", ", ".join(f"{k}={v!r}" for k, v in {**FAST, "epochs": 1}.items())
    )
    exec(code, names := {})
    assert names["student"].trainer.distiller.step == 2


def test_the_maps_of_the_neck_are_the_inputs_of_the_head(ultralytics):
    """For each level those of student and teacher, which runs once, through an adapter of the level's own channels."""
    torch.manual_seed(0)
    student, teacher = ultralytics.YOLO("yolo11n.yaml").model.train(), ultralytics.YOLO("yolo11s.yaml")
    make = sk.ultralytics.trainer(teacher, maps="neck")
    copy = dict(zip(make.__code__.co_freevars, make.__closure__))["teacher"].cell_contents
    taps = [sk.ultralytics._neck_taps(model) for model in (student, copy)]
    distiller = sk.SEADistiller(student, copy, taps[0], teacher_taps=taps[1])
    seen, runs, images = {}, [], torch.rand(2, 3, 64, 64)
    for name, model in (("student", student), ("teacher", copy)):
        model.model[-1].register_forward_pre_hook(lambda _, args, name=name: seen.update({name: list(args[0])}))
    copy.model[0].register_forward_hook(lambda *_: runs.append(1))
    student(images)
    boxes, labels = [torch.tensor([[8.0, 8, 40, 50]])] * 2, [torch.tensor([3])] * 2
    captured = distiller.capture(boxes, labels)
    assert len(runs) == 1
    for level, adapter in enumerate(distiller.adapters["cls_0"]):
        own = adapter(seen["student"][level])
        assert torch.equal(captured.student_cls[0][level], own) and own.shape[1] == (128, 256, 512)[level]
        assert torch.equal(captured.teacher_cls[0][level], seen["teacher"][level])
    found = []
    teacher.model.eval().model[-1].register_forward_pre_hook(lambda _, args: found.extend(args[0]))
    teacher.model(images)
    assert all(torch.equal(x, y) for x, y in zip(found, seen["teacher"]))
