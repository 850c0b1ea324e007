"""SEADistiller in Lightning's Trainer and with plain accelerate: the README's examples, saved, stopped and resumed."""

import copy
import re
from dataclasses import replace
from pathlib import Path

import torch
from detectors import coco_images, require
from toy_detector import TAPS, Toy

import sea_kernels as sk

README = Path(__file__).parents[2] / "sea_kernels" / "README.md"
TAPS80 = replace(TAPS, num_classes=80)


def example(name):
    return re.search(rf"<!-- test: {name} -->\n```python\n(.*?)```", README.read_text(), re.S)[1]


class Batches(torch.utils.data.Dataset):
    """Four batches of one real image each, the upper left 160 x 160 pixels of it."""

    def __len__(self):
        return 4

    def __getitem__(self, k):
        image, boxes, labels = coco_images(4)[k]
        inside = (boxes[:, :2] < 150).all(1)
        return image[None, :, :160, :160] / 255, [boxes[inside].clamp(max=160)], [labels[inside]]


def loader():
    return torch.utils.data.DataLoader(Batches(), batch_size=None)


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(x, b[name]) for name, x in a.items())
    return len(a) == len(b) and all(map(equal, a, b)) if isinstance(a, (list, tuple)) else a == b


def test_lightning(tmp_path):
    """Stopped after an epoch and resumed it is the run that was not stopped: student, adapters, step, optimizer."""
    require("lightning")
    import lightning

    names = {"sk": sk, "torch": torch, "lightning": lightning, "taps": TAPS80}
    exec(example("lightning"), names)

    def run(epochs, name, **options):
        torch.manual_seed(epochs)
        module = names["Distilled"](Toy(), Toy(24, seed=1))
        trainer = lightning.Trainer(
            accelerator="cpu", max_epochs=epochs, logger=False, default_root_dir=tmp_path,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(module, loader(), **options)
        trainer.save_checkpoint(tmp_path / name)
        return module, torch.load(tmp_path / name, weights_only=True), trainer.logged_metrics

    torch.manual_seed(0)
    adapters = sk.SEADistiller(Toy(), Toy(24, seed=1), TAPS80).adapters.state_dict()
    first, saved, logged = run(1, "first")
    assert first.distiller.step == 4 and not equal(first.distiller.adapters.state_dict(), adapters)
    assert all(logged[f"loss_sea_{name}"] > 0 for name in ("anchor", "distance", "localization"))
    assert not any("teacher" in name for name in saved["state_dict"])
    resumed, after, _ = run(2, "resumed", ckpt_path=tmp_path / "first")
    assert resumed.distiller.step == 8

    # The same two epochs by hand, from the state that was saved.
    module = names["Distilled"](Toy(), Toy(24, seed=1)).train()
    module.load_state_dict(saved["state_dict"])
    assert module.distiller.step == 4
    optimizer = module.configure_optimizers()
    optimizer.load_state_dict(saved["optimizer_states"][0])
    module.log_dict = lambda losses: None
    for batch in loader():
        optimizer.zero_grad()
        module.training_step(batch).backward()
        optimizer.step()
    assert equal(module.state_dict(), dict(after["state_dict"]))
    assert equal(optimizer.state_dict()["state"], after["optimizer_states"][0]["state"])

    student = {n.removeprefix("student."): x for n, x in after["state_dict"].items() if n.startswith("student.")}
    Toy().load_state_dict(student)


def test_accelerate(tmp_path, monkeypatch):
    """What save_state wrote, load_state reads into objects that were made anew: adapters and step too."""
    require("accelerate")
    from accelerate import Accelerator

    monkeypatch.chdir(tmp_path)
    names = {"sk": sk, "torch": torch, "taps": TAPS80, "accelerator": Accelerator(cpu=True)}
    names |= {"student": Toy(), "teacher": Toy(24, seed=1), "data_loader": loader()}
    exec(example("accelerate"), names)
    assert names["distiller"].step == 4 and all(x > 0 for x in names["losses"].values())
    saved = copy.deepcopy([names[n].state_dict() for n in ("student", "distiller", "optimizer")])

    accelerator = Accelerator(cpu=True)
    student = Toy(seed=2)
    distiller = sk.SEADistiller(student, Toy(24, seed=1), TAPS80, group="world")
    optimizer = torch.optim.AdamW([*student.parameters(), *distiller.parameters()], lr=1e-3)
    student, distiller, optimizer = accelerator.prepare(student, distiller, optimizer)
    assert not equal(distiller.state_dict(), saved[1])
    accelerator.load_state("checkpoint")
    assert equal([x.state_dict() for x in (student, distiller, optimizer)], saved) and distiller.step == 4
