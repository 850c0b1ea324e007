"""Processes with gloo: what several compute, train and compile, and what they get where one differs or fails."""

import copy
import dataclasses
import os
import pickle
import signal
import time

import cases
import pytest
import torch
import torch._dynamo.testing
import torch.distributed as dist
from ranks import CLASSES, RANKS, REDUCING, Meeting, assert_equal_to_one_process, make_rank, pad
from torch import nn
from toy_detector import STRIDES, TAPS, Toy, batch

import sea_kernels as sk
from sea_kernels import group as groups


def _every_call(rank, group, meeting):
    """(outputs, gradients) of every variant; with four ranks also in the two halves of them, each a group."""
    halves = [dist.new_group([0, 1]), dist.new_group([2, 3])] if meeting.count == 4 else []
    whole = _calls_of(rank, group, meeting, REDUCING)
    half = _calls_of(rank, halves[rank // 2], meeting, ["anchor_pool", "sea_loss"]) if halves else {}
    return whole | {f"{variant} of a half": result for variant, result in half.items()}


def _calls_of(rank, group, meeting, variants):
    own, out = RANKS[rank], {}
    regions = own.regions(group, meeting.device)
    inputs = own.inputs.map(lambda x: x.to(meeting.device).requires_grad_())
    for variant in variants:
        out[variant] = cases.run(variant, inputs, regions)
    anchors = sk.anchor_pool(inputs.cls[0], regions)  # a gradient of one number, expanded, is not contiguous
    expanded = torch.autograd.grad(anchors.sum(), inputs.cls[0], retain_graph=True)
    for a, b in zip(expanded, torch.autograd.grad(anchors, inputs.cls[0], torch.ones_like(anchors))):
        assert torch.equal(a, b)
    return out


def _twice(rank, group, meeting):
    """What every call gives, and in a group of its own once more; and losses of which only one rank runs backward."""
    own, losses = make_rank(rank, 1, 3), []
    results = [_every_call(rank, g, meeting) for g in (group, dist.new_group(list(range(meeting.count))))]
    for step in range(2):
        inputs = own.inputs.map(lambda x: x.detach().to(meeting.device).requires_grad_())
        loss = sum(cases.CALLS["sea_loss"](inputs, own.regions(group, meeting.device)))
        if rank == step:
            loss.backward()
        losses.append(loss.detach())
    return results, losses


@pytest.mark.processes
@pytest.mark.parametrize("count", [1, 2, 4])
def test_several_processes_equal_one_and_give_the_same_bits_again(count, tmp_path, request, device):
    """A rank may skip backward: nobody waits for it, and all have the same losses."""
    emulate = request.config.getoption("--emulate")
    found = Meeting(tmp_path, count, emulate, device=device).spawn(_twice)
    runs = [[results[k] for results, _ in found] for k in range(2)]
    for variant in REDUCING:
        results = [rank[variant] for rank in runs[0]]
        assert_equal_to_one_process(variant, RANKS[:count], results)
        if f"{variant} of a half" in runs[0][0]:
            for half in (slice(0, 2), slice(2, 4)):
                assert_equal_to_one_process(
                    variant, RANKS[half], [rank[f"{variant} of a half"] for rank in runs[0][half]]
                )
        if variant == "anchor_loss":
            assert len({outputs[0].item() for outputs, _ in results}) == 1
        for (outputs, gradients), (again, gradients_again) in zip(*([rank[variant] for rank in run] for run in runs)):
            for x, y in zip([*outputs, *gradients], [*again, *gradients_again]):
                assert x is y is None or torch.equal(x, y), variant
    assert all(torch.equal(*losses) for _, losses in found)


WEIGHTS = 0.02, 0.02, 0.02


def _batch(rank):
    """Two images, or a smaller one."""
    images, boxes, labels = batch(rank)
    return (images, boxes, labels) if rank == 0 else (images[:1, :, :, :80], boxes[:1], labels[:1])


def _train(rank, group, meeting, wrap):
    """The gradients of a student in two processes, of the losses alone."""
    student, teacher = Toy().eval(), Toy(seed=1)  # batch statistics would be of each rank's images
    if wrap == "fsdp":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (meeting.count,))
        for part in (student.backbone, student.head, student):
            fully_shard(part, mesh=mesh)
        model, group = student, mesh.get_group()
    else:
        model = nn.parallel.DistributedDataParallel(student)
    distiller = sk.SEADistiller(model, teacher, TAPS, group=group, weights=WEIGHTS)
    if wrap == "ddp":  # FSDP refuses it
        again = copy.deepcopy(distiller)
        assert again.student is not student and again._group == groups.join(group)
    images, boxes, labels = _batch(rank)
    detection = model(images)["loss"]
    losses = distiller.losses(boxes, labels)
    (sum(losses.values()) + 0 * detection).backward()
    gradients = {n: p.grad for n, p in student.named_parameters() if p.grad is not None}
    gradients = {n: g.full_tensor() if wrap == "fsdp" else g for n, g in gradients.items()}
    return {k: x.detach() for k, x in losses.items()}, gradients


@pytest.mark.processes
@pytest.mark.parametrize("wrap", ["ddp", "fsdp"])
def test_training_in_two_processes_equals_one(wrap, tmp_path):
    """Averaged by DDP or FSDP2 a student's gradients are those of one process with the images of both."""
    first, second = Meeting(tmp_path, 2).spawn(_train, wrap)
    student, teacher = Toy().eval(), Toy(seed=1)
    distiller = sk.SEADistiller(student, teacher, TAPS)
    images, boxes, labels = zip(_batch(0), _batch(1))
    # Each batch by itself, then joined: zeros beside the smaller one would reach over its edge through the towers.
    captured = []
    for k in range(2):
        student(images[k])
        captured.append(distiller.capture(boxes[k], labels[k]))
    sets = [
        [[torch.cat([x, pad(y, x.shape[2:])]) for x, y in zip(*maps)] for maps in zip(*branch)]
        for branch in zip(*(c[:4] for c in captured))
    ]
    regions = sk.Regions.from_boxes(
        boxes[0] + boxes[1], labels[0] + labels[1], captured[0].regions.level_shapes, STRIDES, num_classes=4,
        image_sizes=[(64, 96), (64, 96), (64, 80)],
    )  # fmt: skip
    losses = sk.sea_loss(*sets, regions)
    (0.02 * sum(losses)).backward()
    for name, x in losses._asdict().items():
        mean = (first[0][f"loss_sea_{name}"] + second[0][f"loss_sea_{name}"]) / 2
        torch.testing.assert_close(mean, 0.02 * x.detach(), rtol=1e-5, atol=1e-8)
    expected = {n: p.grad for n, p in student.named_parameters() if p.grad is not None}
    assert {n for n in expected if expected[n].abs().sum() > 0} == {n for n, g in first[1].items() if g.abs().sum() > 0}
    for _, found in (first, second):
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-7)


def _group_before_init(rank, meeting):
    """The losses of distillers that were made before the process group, by what they were given as group."""
    images, boxes, labels = _batch(rank)
    distillers = {}
    for given in ("world", "local", dist.group.WORLD):  # the last is None
        student = Toy().eval()
        distillers[given] = student, sk.SEADistiller(student, Toy(seed=1), TAPS, group=given, weights=WEIGHTS)
    os.environ["WORLD_SIZE"] = "2"  # as torchrun sets it
    student, distiller = distillers["world"]
    student(images)
    with pytest.raises(ValueError, match=r"group is 'world' and WORLD_SIZE is 2; expected init_process_group before"):
        distiller.losses(boxes, labels)
    distillers["joined"] = (
        student,
        sk.SEADistiller(student, Toy(seed=1), TAPS, group=meeting.join(rank), weights=WEIGHTS),
    )
    out = {}
    for given, (student, distiller) in distillers.items():
        student(images)
        if given is None:
            with pytest.raises(ValueError, match=r"group is None with 2 processes, as dist.group.WORLD is before init"):
                distiller.losses(boxes, labels)
        else:
            out[given] = {k: x.detach() for k, x in distiller.losses(boxes, labels).items()}
    meeting.leave(rank, out)


@pytest.mark.processes
def test_a_group_given_before_the_process_group_is_not_dropped(tmp_path):
    """ "world" is all processes once they have met; None, as which dist.group.WORLD was read, is an error then."""
    meeting = Meeting(tmp_path, 2)
    torch.multiprocessing.spawn(_group_before_init, (meeting,), nprocs=2)
    first, second = meeting.results()
    anchor = "loss_sea_anchor"
    assert first["world"] == first["joined"] and second["world"] == second["joined"]
    assert first["world"][anchor] == second["world"][anchor] != first["local"][anchor] != second["local"][anchor]


def _sharded_teacher(rank, _group, _meeting):
    """The losses with a whole teacher and with one whose weights are spread over the ranks; with and without `run`."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    images, boxes, labels = _batch(rank)
    student, teacher, out = Toy().eval(), Toy(24, seed=1), []
    for run in (None, lambda model, x: model.head(model.features(x)), lambda model, x: model(x)):
        distillers = []
        for side in (teacher, copy.deepcopy(teacher)):
            if side is not teacher:
                fully_shard(side, mesh=init_device_mesh("cpu", (2,)))
            torch.manual_seed(0)  # of the adapters
            teacher_taps = dataclasses.replace(TAPS, run=run)
            distillers.append(sk.SEADistiller(student, side, TAPS, teacher_taps=teacher_taps, weights=WEIGHTS))
        for distiller in distillers:
            student(images)
            out.append([x.item() for x in distiller.losses(boxes, labels).values()])
            distiller.close()
    return out


@pytest.mark.processes
def test_a_teacher_may_be_sharded(tmp_path):
    for out in Meeting(tmp_path, 2).spawn(_sharded_teacher):
        assert all(x == out[0] for x in out) and min(out[0]) > 0


def _resume(rank, _group, _meeting):
    """As PyTorch does it for FSDP2: rank 0 alone has read the checkpoint."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

    make = lambda: sk.SEADistiller(Toy(), Toy(24), TAPS, schedule=sk.Schedule(warmup=1000))  # noqa: E731
    torch.manual_seed(rank)
    saved, distiller = make(), make()
    saved.step, saved.calibration.log_equal[0] = 500, 3.0
    state = get_model_state_dict(saved) if rank == 0 else {}
    saved.step = 0
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(distiller, state, options=options)
    return distiller.step, distiller.state_dict()


@pytest.mark.processes
def test_a_checkpoint_that_is_broadcast_brings_the_step(tmp_path):
    first, second = Meeting(tmp_path, 2).spawn(_resume)
    assert first[0] == second[0] == 500 and first[1]["calibration.log_equal"][0] == 3
    assert first[1].keys() == second[1].keys() and all(torch.equal(x, second[1][name]) for name, x in first[1].items())


def _compile(rank, group, _meeting):
    def step(boxes, labels, index, cls, cls_teacher, box, box_teacher):
        regions = sk.Regions.from_boxes(
            boxes, labels, own.shapes, own.strides, num_classes=CLASSES, batch_index=index, batch_size=2, group=group
        )
        return *sk.sea_loss([cls], [cls_teacher], [box], [box_teacher], regions), sk.anchor_pool(cls, regions)

    torch.set_num_threads(2)
    counter, same = torch._dynamo.testing.CompileCounterWithBackend("aot_eager"), []
    numbers = ((5, 0, 7), (6, 4, 0))[rank]
    # inductor, which takes long, for one number of boxes: it orders what is sent, and leaves out what nobody uses
    for backend, number in (*((counter, n) for n in numbers), ("inductor", numbers[0])):
        if number == numbers[0]:
            compiled = torch.compile(step, backend=backend, fullgraph=True)
        own = make_rank(rank, 2, number)
        inputs = own.inputs.map(lambda x: x.float().requires_grad_())
        results = []
        for f in (compiled, step):
            sets = (x[0] for x in (inputs.cls, inputs.cls_teacher, inputs.box, inputs.box_teacher))
            outputs = f(own.boxes, own.labels, own.index, *sets)
            results.append([*outputs, *torch.autograd.grad(sum(x.sum() for x in outputs), inputs.leaves()[:-1])])
        same.append(all(torch.equal(a, b) for a, b in zip(*results)))
    # channels and a temperature that are symbolic, compared though they are when the group is first used with them
    regions = own.regions(group)
    distance = torch.compile(sk.topological_distance_loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for channels, temperature in ((24, 0.1), (12, 0.2)):
        maps = [[x[:, :channels].float() for x in sets[0]] for sets in (own.inputs.cls, own.inputs.cls_teacher)]
        same.append(
            torch.equal(
                distance(*maps, regions, temperature), sk.topological_distance_loss(*maps, regions, temperature)
            )
        )
    return same, counter.frame_count


@pytest.mark.compile
@pytest.mark.processes
def test_a_compiled_step_is_one_graph_with_its_collectives(tmp_path):
    """The comparison of the ranks included."""
    for same, graphs in Meeting(tmp_path, 2, seconds=300).spawn(_compile):
        assert same == [True] * 6 and graphs <= 3


# ------------------------------------------------------------------------------------------------------ what goes wrong


def _with_backend(name, call):
    with sk.backend(name):
        return call()


def _differ(rank, _group, _meeting):
    """The error of every mismatch, each in a group of its own."""
    own, errors = make_rank(rank, 1, 3), {}
    odd = rank == 1
    from_boxes = lambda group, levels=2, strides=own.strides, **options: sk.Regions.from_boxes(  # noqa: E731
        own.boxes, own.labels, own.shapes[:levels], strides[:levels], batch_index=own.index, batch_size=1, group=group,
        **({"num_classes": CLASSES} | options),
    )  # fmt: skip
    cls, cls_teacher = own.inputs.cls[0], own.inputs.cls_teacher[0]
    narrow, narrow_teacher = ([x[:, :8] for x in maps] for maps in (cls, cls_teacher))
    calls = {
        "num_classes": lambda group: from_boxes(group, num_classes=CLASSES + odd),
        "levels": lambda group: from_boxes(group, levels=1 + odd),
        "strides": lambda group: from_boxes(group, strides=[8, 16 + 2 * odd]),
        "center_ratio": lambda group: from_boxes(group, center_ratio=0.5 + 0.25 * odd),
        "device": lambda group: groups._exchange(group, "a call", "cuda" if odd else "cpu", []),
        "backend": lambda group: _with_backend(["native", "reference"][rank], lambda: from_boxes(group)),
        "channels of the reference": lambda group: _with_backend(
            "reference", lambda: sk.anchor_pool(narrow if odd else cls, from_boxes(group))
        ),
        "channels of the compiled reference": lambda group: _with_backend(
            "reference",
            lambda: torch.compile(sk.anchor_pool, fullgraph=True, backend="aot_eager")(
                narrow if odd else cls, from_boxes(group)
            ),
        ),
        "channels of anchor_pool": lambda group: sk.anchor_pool(narrow if odd else cls, from_boxes(group)),
        "channels": lambda group: sk.anchor_loss(
            *((narrow, narrow_teacher) if odd else (cls, cls_teacher)), from_boxes(group)
        ),
        "dtype": lambda group: sk.anchor_pool([x.float() for x in cls] if odd else cls, from_boxes(group)),
        "call": lambda group: (sk.anchor_loss if odd else sk.topological_distance_loss)(
            cls, cls_teacher, from_boxes(group)
        ),
        "temperature": lambda group: sk.topological_distance_loss(
            cls, cls_teacher, from_boxes(group), temperature=0.1 + odd
        ),
    }
    for name, call in calls.items():
        try:
            call(dist.new_group([0, 1]))
        except ValueError as error:
            errors[name] = str(error)
    # strides that follow from the sizes of the images may differ
    student, taps = Toy(), dataclasses.replace(TAPS, strides=None)
    distiller = sk.SEADistiller(student, Toy(seed=1), taps, group=dist.new_group([0, 1]))
    student(torch.randn(1, 3, 64, 90 - 10 * rank))
    errors["distiller"] = all(x.isfinite() for x in distiller.losses([own.boxes], [own.labels % 4]).values())
    return errors


@pytest.mark.processes
def test_ranks_that_differ_get_the_same_error(tmp_path):
    first, second = Meeting(tmp_path, 2).spawn(_differ)
    assert first == second and first.pop("distiller")
    expected = {  # what it is on rank 1, and on rank 0
        "num_classes": ("num_classes", "7", "6"),
        "levels": ("levels", "2", "1"),
        "strides": ("strides[1][0]", "18.0", "16.0"),
        "center_ratio": ("center_ratio", "0.75", "0.5"),
        "device": ("device", "cuda", "cpu"),
        "channels of anchor_pool": ("channels", "8", "24"),
        "backend": ("the call", "Regions of the reference backend", "Regions of the native backend"),
        "channels of the reference": ("channels", "8", "24"),
        "channels of the compiled reference": ("channels", "8", "24"),
        "channels": ("channels[0][0]", "8", "24"),
        "dtype": (
            "the call",
            "anchor_pool of the native backend in torch.float32",
            "anchor_pool of the native backend in torch.float64",
        ),
        "call": (
            "the call",
            *(f"sea_loss of the native backend with the loss flags [{part}] in torch.float64" for part in (1, 2)),
        ),
        "temperature": ("distance_temperature", "1.1", "0.1"),
    }
    for name, (what, one, zero) in expected.items():
        message = f"{what} is {one} on rank 1 of the group and {zero} on rank 0; expected the same on every rank"
        assert first.pop(name) == message
    assert not first


def _fail(rank, meeting, how):
    """Rank 1 fails in its third step; the others write down what they got."""
    group, own = meeting.join(rank), make_rank(rank, 1, 3)
    for step in range(3):
        if rank == 1 and step == 2:
            if how == "raises":
                sk.Regions.from_boxes(own.boxes, own.labels, own.shapes, own.strides, group=group)  # no batch_index
            elif how == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(3600)
        try:
            inputs = own.inputs.map(lambda x: x.detach().requires_grad_())
            sum(cases.CALLS["sea_loss"](inputs, own.regions(group))).backward()
        except RuntimeError as error:
            torch.save((step, str(error)), f"{meeting.folder}/{rank}")
            os._exit(0)  # the group cannot be torn down any more


@pytest.mark.processes
@pytest.mark.parametrize("how", ["raises", "dies", "hangs"])
def test_a_rank_that_fails_leaves_nobody_waiting(how, tmp_path):
    """The others get an error, at the latest after the timeout of the group."""
    meeting, context = Meeting(tmp_path, 3, seconds=5), torch.multiprocessing.get_context("spawn")
    processes = [context.Process(target=_fail, args=(rank, meeting, how), daemon=True) for rank in range(3)]
    for process in processes:
        process.start()
    for rank in (0, 2):
        processes[rank].join(120)
        assert processes[rank].exitcode == 0, f"rank {rank} is still waiting"
    processes[1].kill()
    for step, error in meeting.results([0, 2]):
        assert step == 2 and error


@pytest.fixture
def alone():
    """A group of this process alone."""
    dist.init_process_group("cpu:gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.cpu_kernels
def test_bad_groups_are_refused(alone, monkeypatch):
    rank = RANKS[0]
    for group, error, message in (
        ("world", TypeError, r"group is a str; expected a torch.distributed.ProcessGroup, such as"),
        ([0], TypeError, r"group is a list; expected a torch.distributed.ProcessGroup"),
        (dist.GroupMember.NON_GROUP_MEMBER, ValueError, r"group is one that this process does not belong to"),
    ):
        with pytest.raises(error, match=message):
            rank.regions(group)
    own = groups.join(alone)
    assert own.size == 1
    with pytest.raises(ValueError, match=r"group has gloo for cpu; expected a backend for cuda, where the tensors are"):
        groups._exchange(alone, "a call", "cuda", [])  # of one rank nothing is sent, and so not asked
    for name in ("is_available", "is_current_stream_capturing"):
        monkeypatch.setattr(torch.cuda, name, lambda: True)
    with pytest.raises(RuntimeError, match="the first call of a group compares its ranks: run it before a CUDA graph"):
        groups._exchange(alone, "call", "cpu", [])
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"group is 'word'; expected 'local', 'world' or a torch.distributed.Process"):
        sk.SEADistiller(Toy(), Toy(seed=1), TAPS, group="word")
    assert pickle.loads(pickle.dumps(sk.SEADistiller(Toy(), Toy(seed=1), TAPS, group=alone)))._group == own
    dist.destroy_process_group()
    with pytest.raises(ValueError, match=r"group is not initialized, or was destroyed; expected one of the running"):
        rank.regions(alone)
    dist.init_process_group("cpu:gloo", store=dist.HashStore(), rank=0, world_size=1)  # has the old one's name
    with pytest.raises(ValueError, match=r"group is not initialized, or was destroyed"):
        rank.regions(alone)
