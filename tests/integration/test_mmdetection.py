"""SEADistilled in MMEngine's Runner: what it saves, resumes, and predicts without its teacher."""

import ast
import os
import pickle
import re
from collections import OrderedDict
from pathlib import Path

import programs
import pytest
import torch
from detectors import mmdet_batch, mmdet_config, require

WIDTHS = {"student": 32, "teacher": 64}


def small_fcos(width):
    model = mmdet_config("FCOS")
    model.neck.out_channels = model.bbox_head.in_channels = model.bbox_head.feat_channels = width
    model.bbox_head.num_classes = 3
    model.test_cfg.score_thr = 0.0
    return model


class Images(torch.utils.data.Dataset):
    """Two images, each with a box of its own category, as a pipeline of MMDetection gives them."""

    def __init__(self):
        self.metainfo = {"classes": ("a", "b", "c")}

    def __len__(self):
        return 2

    def __getitem__(self, index):
        from mmdet.structures import DetDataSample
        from mmengine.structures import InstanceData

        size = {"img_shape": (96, 160), "ori_shape": (96, 160), "scale_factor": (1.0, 1.0), "img_id": index}
        boxes = InstanceData(bboxes=torch.tensor([[5.0, 5.0, 60.0, 50.0]]), labels=torch.tensor([index]))
        sample = DetDataSample(metainfo=size, gt_instances=boxes)
        return {"inputs": torch.full((3, 96, 160), 20 + index, dtype=torch.uint8), "data_samples": sample}


def runner(model, folder, epochs=1, batch_size=2, **options):
    """A Runner with momentum, a schedule and an EMA: all that a checkpoint of it may hold."""
    from mmengine.runner import Runner

    loader = {
        "batch_size": batch_size,
        "num_workers": 0,
        "dataset": Images(),
        "sampler": {"type": "DefaultSampler", "shuffle": False},
        "collate_fn": {"type": "pseudo_collate"},
    }
    return Runner(
        model=model,
        work_dir=str(folder),
        train_dataloader=loader,
        train_cfg={"by_epoch": True, "max_epochs": epochs, "val_interval": 100},
        optim_wrapper={"optimizer": {"type": "SGD", "lr": 1e-3, "momentum": 0.9}},
        param_scheduler=[
            {"type": "LinearLR", "start_factor": 0.1, "by_epoch": False, "end": 5},
            {"type": "MultiStepLR", "milestones": [8, 11]},
        ],
        custom_hooks=[{"type": "EMAHook"}],
        default_hooks={"checkpoint": {"type": "CheckpointHook", "interval": 1}},
        default_scope="mmdet",
        log_level="ERROR",
        experiment_name=f"{folder.name}-{epochs}",
        randomness={"seed": 0},
        **options,
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder: student.py, teacher.py, teacher/epoch_1.pth and sea/epoch_1.pth, all written by MMEngine."""
    require("mmdet")
    from mmdet.utils import register_all_modules
    from mmengine.config import Config

    import sea_kernels.mmdet  # noqa: F401, it registers

    register_all_modules(init_default_scope=True)
    folder = tmp_path_factory.mktemp("mmdetection")
    test_data = {"dataset": {"type": "CocoDataset", "pipeline": []}}
    for name, width in WIDTHS.items():
        Config({"model": small_fcos(width), "test_dataloader": test_data}).dump(folder / f"{name}.py")
    runner(small_fcos(WIDTHS["teacher"]), folder / "teacher").train()
    runner(distilled(folder), folder / "sea").train()
    return folder


def distilled(folder, **options):
    return {
        "type": "SEADistilled",
        "student": folder / "student.py",
        "teacher": folder / "teacher.py",
        "teacher_checkpoint": folder / "teacher" / "epoch_1.pth",
        "schedule": {"warmup": 10},
        "group": "world",
        **options,
    }


def build(config):
    from mmdet.registry import MODELS

    return MODELS.build(config)


def load(path):
    return torch.load(path, weights_only=True)  # as MMEngine does, by its default


def test_a_teacher_is_what_a_runner_saved(trained):
    model = build(distilled(trained))
    saved = load(trained / "teacher" / "epoch_1.pth")
    assert {"message_hub", "optimizer", "param_schedulers", "ema_state_dict"} <= set(saved)
    for name, x in model.distiller.teacher.state_dict().items():
        assert torch.equal(x, saved["state_dict"][name]), name
    assert len(model.distiller.adapters) == 8 and model.distiller.schedule.warmup == 10


def test_a_distilled_student_teaches_the_next(trained):
    """The distiller's entries of a checkpoint are no error where a teacher is read."""
    chain = distilled(trained, teacher=trained / "student.py", teacher_checkpoint=trained / "sea" / "epoch_1.pth")
    model = build(chain)
    saved = load(trained / "sea" / "epoch_1.pth")["state_dict"]
    assert all(torch.equal(x, saved[name]) for name, x in model.distiller.teacher.state_dict().items())


def test_a_run_resumes_with_what_it_saved(trained):
    """Step, weights, adapters and their momentum."""
    run = runner(distilled(trained), trained / "sea", epochs=2, resume=True)
    saved = load(trained / "sea" / "epoch_1.pth")
    run.optim_wrapper = run.build_optim_wrapper(run.optim_wrapper)
    run.param_schedulers = run.build_param_scheduler(run.param_schedulers)
    run._train_loop = run.build_train_loop(run._train_loop)
    run.call_hook("before_run")
    run.load_or_resume()
    assert run.model.distiller.step == 1 and run.epoch == 1
    state = run.model.state_dict()
    assert state.keys() == saved["state_dict"].keys()
    names = [name for name, _ in run.model.named_parameters()]
    assert sum(name.startswith("distiller.adapters.") for name in names) == 16
    momentum, kept = run.optim_wrapper.state_dict()["state"], saved["optimizer"]["state"]
    assert momentum.keys() == kept.keys() and len(kept) >= 16
    for key, value in kept.items():
        assert torch.equal(momentum[key]["momentum_buffer"], value["momentum_buffer"])
    for name, x in state.items():  # where there is an EMA, the entry "state_dict" is the EMA's
        assert torch.equal(x, saved["ema_state_dict"][f"module.{name}"]), name


def test_a_resumed_run_goes_on(trained):
    run = runner(distilled(trained), trained / "sea", epochs=2, resume=True)
    run.train()
    assert run.model.distiller.step == 2
    saved = load(trained / "sea" / "epoch_2.pth")
    assert saved["ema_state_dict"]["module.distiller.step"] == 2


def test_checkpoints_have_the_students_names(trained):
    """So the student's own config loads them; those of earlier versions, with a prefix, load too."""
    from mmdet.apis import init_detector

    path = trained / "sea" / "epoch_1.pth"
    state = load(path)["state_dict"]
    own = {name: x for name, x in state.items() if not name.startswith("distiller.")}
    alone = build(small_fcos(WIDTHS["student"]))
    assert own.keys() == alone.state_dict().keys()
    found = init_detector(str(trained / "student.py"), str(path), device="cpu", palette="random")
    assert all(torch.equal(x, own[name]) for name, x in found.state_dict().items())
    assert found.dataset_meta["classes"] == ("a", "b", "c")

    model = build(distilled(trained))
    assert model.state_dict()._metadata["bbox_head"] == alone.state_dict()._metadata["bbox_head"]
    old = {name if name.startswith("distiller.") else f"student.{name}": x for name, x in state.items()}
    for version in (state, old):
        model.load_state_dict(version)
        assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())


def test_it_predicts_without_its_teacher(trained):
    absent = {"teacher": "nowhere/teacher.py", "teacher_checkpoint": "nowhere/teacher.pth"}
    state = load(trained / "sea" / "epoch_1.pth")["state_dict"]
    whole = build(distilled(trained)).eval()
    whole.load_state_dict(state)
    batch = [Images()[i] for i in range(2)]
    batch = {key: [sample[key] for sample in batch] for key in batch[0]}
    expected = whole.val_step(batch)
    for missing in absent:
        model = build(distilled(trained, **{missing: absent[missing]})).eval()
        model.load_state_dict(state)
        for x, y in zip(model.val_step(batch), expected):
            assert torch.equal(x.pred_instances.scores, y.pred_instances.scores) and len(x.pred_instances)
        for train in (model.init_weights, lambda model=model: model.loss(torch.zeros(1, 3, 64, 64), None)):
            with pytest.raises(OSError, match=f"can predict but not train: .*{absent[missing]}"):
                train()


def test_one_command_takes_the_student_out(trained):
    """What it writes loads strictly, by plain torch."""
    path, out = trained / "sea" / "epoch_1.pth", trained / "student.pth"
    done = programs.run("-m", "sea_kernels.mmdet", str(path), str(out))
    assert done.returncode == 0, done.stderr
    plain = f"import torch; print(len(torch.load({str(out)!r}, weights_only=True)['state_dict']))"
    state = torch.load(out, weights_only=True)
    assert programs.run("-c", plain).stdout.strip() == str(len(state["state_dict"]))
    build(small_fcos(WIDTHS["student"])).load_state_dict(state["state_dict"], strict=True)
    assert state["meta"]["dataset_meta"]["classes"] == ("a", "b", "c")
    distilled_state = load(path)["state_dict"]
    assert all(torch.equal(x, distilled_state[name]) for name, x in state["state_dict"].items())


def test_the_command_says_what_is_wrong(trained, tmp_path, capsys):
    from sea_kernels.mmdet import main

    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    (tmp_path / "empty.pth").touch()
    (tmp_path / "text.pth").write_text("no checkpoint")
    whole = trained / "sea" / "epoch_1.pth"
    for path, out, said in (
        (trained / "teacher" / "epoch_1.pth", tmp_path / "out.pth", "no entry 'distiller.step'"),
        (tmp_path / "absent.pth", tmp_path / "out.pth", "absent.pth can not be found"),
        (tmp_path / "list.pth", tmp_path / "out.pth", "list.pth holds a list; expected a state_dict"),
        (tmp_path / "empty.pth", tmp_path / "out.pth", ""),
        (tmp_path / "text.pth", tmp_path / "out.pth", ""),
        (whole, tmp_path / "nowhere" / "out.pth", "nowhere"),
    ):
        assert main([str(path), str(out)]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "out.pth").exists()


class Call:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("call", ((os.system, ("true",)), (getattr, (OrderedDict, "fromkeys"))))
def test_a_file_still_cannot_call_functions(trained, tmp_path, call):
    torch.save({"state_dict": {}, "more": Call(*call)}, tmp_path / "evil.pth")
    with pytest.raises(pickle.UnpicklingError, match=r"asks for 'fromkeys' of .*OrderedDict|posix.system"):
        build(distilled(trained, teacher_checkpoint=tmp_path / "evil.pth"))


def test_attributes_of_the_student_are_found(trained):
    """Hooks of MMDetection set or read parts of a detector: YOLOX's switches its head to another loss."""
    model = build(distilled(trained))
    assert model.bbox_head is model.student.bbox_head and model.with_neck
    with pytest.raises(AttributeError, match="no attribute 'bbox_heads'"):
        _ = model.bbox_heads


@pytest.mark.parametrize(
    ("name", "taps"),
    (
        ("FCOS", {"cls": "neck", "box": ["bbox_head.reg_convs.3"]}),
        ("FCOS", {"anchor_on_box": False}),
        ("FasterRCNN", {"cls": ["neck"], "box": ["neck"]}),
        ("YOLOX", {"cls": [[f"bbox_head.multi_level_cls_convs.{level}.1" for level in range(3)]]}),
        ("DINO", {"cls": "neck", "box": "neck"}),
    ),
)
def test_fields_of_the_taps_may_be_a_dict(name, taps):
    require("mmdet")
    from mmdet.utils import register_all_modules

    import sea_kernels.mmdet  # noqa: F401, it registers

    register_all_modules(init_default_scope=True)
    config = mmdet_config(name)
    options = {"taps": taps, "weights": (0.02, 0.02, 0.02)}
    model = build({"type": "SEADistilled", "student": config, "teacher": config, **options}).train()
    model.init_weights()  # DINO leaves parameters uninitialized until then
    losses = model(**model.data_preprocessor(mmdet_batch(name), training=True), mode="loss")
    assert all(losses[f"loss_sea_{kind}"].isfinite() for kind in ("anchor", "distance", "localization"))
    assert losses["loss_sea_anchor"] > 0
    with pytest.raises(TypeError, match="unexpected keyword argument 'clss'"):
        build({"type": "SEADistilled", "student": config, "teacher": config, "taps": {"clss": "neck"}})


def test_the_group_of_all_processes(trained, tmp_path):
    model = build(distilled(trained))
    assert model.distiller._group is None  # a run without a launcher
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        assert build(distilled(trained)).distiller._group.size == 1
    finally:
        torch.distributed.destroy_process_group()
    with pytest.raises(ValueError, match="group is 'all'; expected \"world\""):
        build(distilled(trained, group="all"))


RANK = """
import sys
sys.path[:0] = {paths!r}
import torch.distributed as dist
from test_mmdetection import *
import sea_kernels.mmdet
from pathlib import Path

folder = Path({folder!r})
dist.init_process_group("gloo")  # MMEngine would want GPUs
cpu = {{"model_wrapper_cfg": {{"type": "MMDistributedDataParallel", "device_ids": None}}}}
run = runner(distilled(folder, weights=(1, 1, 1)), folder / "ranks", launcher="pytorch", cfg=cpu, batch_size=1)
run.train()
logs = run.message_hub.log_scalars
weight = run.model.module.student.backbone.conv1.weight
print("rank", dist.get_rank(), [float(logs[f"train/loss_sea_{{kind}}"].current()) for kind in ("anchor", "distance")],
      weight.double().sum().item())
dist.destroy_process_group()
"""


@pytest.mark.processes
def test_two_processes_of_mmengine_share_their_anchors(trained):
    """`group="world"` in a config: each rank has an image of its own, and the anchor loss is that of both."""
    paths = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
    script = trained / "rank.py"
    script.write_text(RANK.format(paths=paths, folder=str(trained)))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = programs.run(*torchrun, cwd=trained, env={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    found = dict(re.findall(r"rank (\d) (.*)", done.stdout))
    (first, second), (w0, w1) = zip(*(re.match(r"(\[.*\]) (.*)", found[rank]).groups() for rank in "01"))
    first, second = ast.literal_eval(first), ast.literal_eval(second)
    assert first[0] == second[0] > 0 and first[1] != second[1] and w0 == w1
