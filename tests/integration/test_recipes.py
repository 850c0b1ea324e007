"""Each recipe is built as it stands and trained for two steps on small images of COCO, without trained weights."""

import json
import os
from pathlib import Path

import pytest
import torch
from detectors import require

RECIPES = Path(__file__).parents[2] / "recipes"
NAMES = sorted(path.stem for path in RECIPES.glob("*_1x.py"))
LONGEST = 128


def read(name):
    require("mmdet")
    from mmengine.config import Config

    return Config.fromfile(RECIPES / f"{name}.py")


def plain(config):
    """Without the name of the library that MMEngine writes into what it takes from another library."""
    if isinstance(config, dict):
        return {k: plain(v) for k, v in config.items() if k != "_scope_"}
    return [plain(x) for x in config] if isinstance(config, list) else config


@pytest.fixture(scope="module")
def annotations(tmp_path_factory):
    """COCO's small copy, whose boxes are also given as polygons, for the detectors that learn masks."""
    if "SEA_KERNELS_DATA" not in os.environ:
        pytest.skip("SEA_KERNELS_DATA is not set")
    folder = Path(os.environ["SEA_KERNELS_DATA"]).resolve() / "coco_mini"
    coco = json.loads((folder / "instances_train2017.json").read_text())
    for annotation in coco["annotations"]:
        x, y, w, h = annotation["bbox"]
        annotation["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    path = tmp_path_factory.mktemp("coco") / "train.json"
    path.write_text(json.dumps(coco))
    return {"ann_file": str(path), "data_root": "", "data_prefix": {"img": str(folder / "images")}}


def small(config, annotations, folder):
    """The same run on small images, for two steps, by one process and without downloads."""
    config.model.teacher_checkpoint = None
    for side in ("student", "teacher"):
        if "solov2" in config.model[side]:  # its grids are as large for small images: 512 channels take a minute
            from mmengine.hub import get_config

            config.model[side] = get_config(config.model[side]).model
            config.model[side].mask_head.feat_channels = 64
    loader = config.train_dataloader
    loader.update(batch_size=1, num_workers=0, persistent_workers=False)
    loader.dataset.update(annotations)
    for step in loader.dataset.pipeline:
        if step.type == "Resize":
            step.scale = (LONGEST, LONGEST)
    config.update(val_dataloader=None, val_cfg=None, val_evaluator=None)
    config.update(test_dataloader=None, test_cfg=None, test_evaluator=None)
    config.train_cfg = {"type": "IterBasedTrainLoop", "max_iters": 2}
    config.default_hooks.checkpoint = {"type": "CheckpointHook", "interval": -1, "save_last": False}
    config.default_hooks.logger = {"type": "LoggerHook", "interval": 1}
    config.update(work_dir=str(folder), log_level="ERROR", randomness={"seed": 0}, experiment_name=folder.name)
    return config


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_trains(name, annotations, tmp_path, monkeypatch):
    config = read(name)
    from mmdet.utils import register_all_modules
    from mmengine.logging import MMLogger
    from mmengine.model.weight_init import PretrainedInit
    from mmengine.runner import Runner

    register_all_modules()
    monkeypatch.setattr(PretrainedInit, "__call__", lambda *_: None)
    config = small(config, annotations, tmp_path)
    MMLogger.get_current_instance().setLevel("ERROR")
    torch.manual_seed(0)
    run = Runner.from_cfg(config)
    before = {n: p.detach().clone() for n, p in run.model.named_parameters() if p.requires_grad}
    teacher = {n: x.clone() for n, x in run.model.distiller.teacher.state_dict().items()}
    run.train()
    distiller = run.model.distiller
    assert distiller.step == 2 and all(x.isfinite() for x in distiller.unweighted)
    assert run.model.student.backbone.depth == 50 and distiller.teacher.backbone.depth == 101
    logged = run.message_hub.log_scalars
    for loss in ("loss", "loss_sea_anchor", "loss_sea_distance", "loss_sea_localization"):
        values = logged[f"train/{loss}"].data[0]
        assert len(values) == 2 and all(x >= 0 for x in values), loss
    assert len(run.build_param_scheduler(read(name.replace("_1x", "_2x")).param_scheduler)) == 2
    now = dict(run.model.named_parameters())
    assert sum(not torch.equal(x, now[n]) for n, x in before.items()) > len(before) / 2
    assert all(torch.equal(x, teacher[n]) for n, x in distiller.teacher.state_dict().items())


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_mmdetections_config_with_another_model(name):
    """Ten lines; the data and the schedule are MMDetection's own, and the weights are those that it publishes."""
    config = read(name)
    from mmengine.hub import get_config

    student = get_config(config.model.student)
    for key in ("train_dataloader", "optim_wrapper", "param_scheduler", "train_cfg", "val_evaluator"):
        assert plain(config[key]) == plain(student[key]), key
    assert len((RECIPES / f"{name}.py").read_text().splitlines()) <= 10
    published = name != "solov2_r50_from_r101_1x"
    teacher = get_config(config.model.teacher, pretrained=published)
    if published:
        assert config.model.teacher_checkpoint == teacher.model_path

    double = read(name.replace("_1x", "_2x"))
    assert len((RECIPES / f"{name}.py".replace("_1x", "_2x")).read_text().splitlines()) <= 10
    assert double.model == config.model and double.train_cfg.max_epochs == 24
    (warmup, once), (_, twice) = student.param_scheduler, double.param_scheduler
    assert plain(double.param_scheduler[0]) == plain(warmup)
    assert twice.milestones == [16, 22] and twice.end == 24 == 2 * once.end
    for key in config.keys() - {"train_cfg", "param_scheduler"}:
        assert double[key] == config[key], key
