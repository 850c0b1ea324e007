"""Batches that lie on several ranks, the same on one; and ranks: threads that sum up as a group does, and processes."""

import datetime
import faulthandler
import math
import threading
from dataclasses import dataclass
from types import SimpleNamespace
from unittest import mock

import cases
import tolerance
import torch
import torch.distributed as dist
from cases import F64, VARIANTS, Inputs, make_boxes, make_inputs

import sea_kernels as sk
from sea_kernels import group as groups

CLASSES = 6


@dataclass
class Rank:
    """What one rank holds; `inputs` in float64."""

    boxes: torch.Tensor
    labels: torch.Tensor
    index: torch.Tensor
    batch: int
    shapes: list
    strides: list
    sizes: torch.Tensor  # [B, 2]
    inputs: Inputs

    def regions(self, group=None, device="cpu"):
        boxes, labels, index, sizes = (x.to(device) for x in (self.boxes, self.labels, self.index, self.sizes))
        return sk.Regions.from_boxes(
            boxes, labels, self.shapes, self.strides, num_classes=CLASSES, batch_index=index,
            batch_size=self.batch, image_sizes=sizes, group=group,
        )  # fmt: skip


def make_rank(seed, batch, number, size=(80, 112), levels=2, channels=24, box_channels=16, sets=1, strides=(8, 16, 40)):
    """`number` boxes on `batch` images, the first of which fills the maps of an input of `size` (height, width)."""
    height, width = size
    shapes = [(math.ceil(height / s), math.ceil(width / s)) for s in strides[:levels]]
    boxes, labels, index = make_boxes(number if batch else 0, batch, CLASSES, size, seed, F64)
    sizes = torch.tensor([(height, width), (height - 20, width - 9)]).repeat(batch, 1)[:batch]
    like = SimpleNamespace(level_shapes=shapes, batch_size=batch, area=torch.empty(levels, 1 + 2 * CLASSES))
    inputs = make_inputs(like, channels, box_channels, sets, F64, seed=seed)
    return Rank(boxes, labels, index, batch, shapes, list(strides[:levels]), sizes, inputs)


def pad(x, shape):
    """A map in a larger one, which has what nobody may read beside it."""
    return torch.nn.functional.pad(x, (0, shape[1] - x.shape[3], 0, shape[0] - x.shape[2]), value=3.0)


def whole(ranks):
    """One rank that holds the images of all, their maps padded to the largest."""
    shapes = [tuple(max(n) for n in zip(*level)) for level in zip(*(r.shapes for r in ranks))]

    def join(name):
        sets = zip(*(getattr(r.inputs, name) for r in ranks))
        return [[torch.cat([pad(x, s) for x in maps]) for s, maps in zip(shapes, zip(*each))] for each in sets]

    inputs = Inputs(*map(join, ("cls", "cls_teacher", "box", "box_teacher")), ranks[0].inputs.anchors)
    firsts = [sum(r.batch for r in ranks[:k]) for k in range(len(ranks))]
    # rows that are skipped bring K to the number of categories, as it is with a group
    rows = CLASSES
    return Rank(
        torch.cat([r.boxes for r in ranks] + [torch.zeros(rows, 4, dtype=F64)]),
        torch.cat([r.labels for r in ranks] + [torch.full((rows,), -1)]),
        torch.cat([r.index + first for r, first in zip(ranks, firsts)] + [torch.zeros(rows, dtype=torch.int64)]),
        sum(r.batch for r in ranks), shapes, ranks[0].strides, torch.cat([r.sizes for r in ranks]), inputs,
    )  # fmt: skip


def share(gradients, ranks, k):
    """What of the gradients of the whole batch's maps is rank k's, times their number: of the sum of all losses."""
    first, rank = sum(r.batch for r in ranks[:k]), ranks[k]
    levels = len(rank.shapes)
    out = []
    for i, x in enumerate(gradients[:-1]):
        height, width = rank.shapes[i % levels]
        out.append(None if x is None else len(ranks) * x[first : first + rank.batch, :, :height, :width])
    return out


# Images, boxes, size of the input: one rank has no boxes, one no images, and their maps differ.
RANKS = [
    make_rank(0, batch=2, number=5),
    make_rank(1, batch=1, number=0, size=(64, 130)),
    make_rank(2, batch=3, number=4, size=(100, 50)),
    make_rank(3, batch=0, number=0),
]
REDUCING = [name for name in VARIANTS if name not in ("anchor_cosine", "localization, no regions")]


def assert_equal_to_one_process(variant, ranks, results, **options):
    """What the ranks gave in float64, (outputs, gradients) of each, against one process with the whole batch."""
    one = whole(ranks)
    outputs, gradients = cases.run(variant, one.inputs, one.regions(), "reference", **options)
    noise = 1e-11  # where values cancel; a sum in float32 would be off by 1e-8
    for i, exact in enumerate(outputs):
        found = [outputs[i].cpu() for outputs, _ in results]
        for k, x in enumerate([torch.stack(found).mean(0)] if exact.dim() == 0 else found):
            tolerance.assert_close(x, exact, exact, tolerance.OUTPUT, f"output {i} of rank {k}", noise)
    for k, (_, found) in enumerate(results):
        for i, (x, exact) in enumerate(zip(found[:-1], share(gradients, ranks, k))):
            x = None if x is None else x.cpu()
            tolerance.assert_close(x, exact, exact, tolerance.GRADIENT, f"gradient {i} of rank {k}", noise)


class Threads:
    """As many ranks as threads, of which `run` calls work(group, rank) in each and returns what it gave."""

    def __init__(self, count):
        self.count, self.barrier = count, threading.Barrier(count, timeout=60)
        self.here, self.slots, self.reductions = threading.local(), [None] * count, [[] for _ in range(count)]

    def all_reduce(self, x, _group):
        self.reductions[self.here.rank].append(x.numel())
        self.slots[self.here.rank] = x
        self.barrier.wait()
        assert len({x.shape for x in self.slots}) == 1 and len({x.dtype for x in self.slots}) == 1
        total = torch.stack(self.slots).sum(0)
        self.barrier.wait()
        return total

    def run(self, work):
        results, errors = [None] * self.count, []

        def call(rank):
            self.here.rank = rank
            try:
                results[rank] = work("a group", rank)
            except threading.BrokenBarrierError:
                pass
            except BaseException as error:  # of the test, raised below
                errors.append(error)
                self.barrier.abort()

        group = groups.Group("threads", self.count)
        stubs = {
            "all_reduce": self.all_reduce,
            "join": lambda _: group,
            "compare": lambda *_: torch.zeros((), dtype=F64),
        }
        with mock.patch.multiple(groups, **stubs):
            threads = [threading.Thread(target=call, args=(rank,)) for rank in range(self.count)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        if errors:
            raise errors[0]
        return results


class Meeting:
    """How processes find each other, and where they leave what they found."""

    def __init__(self, folder, count, emulate=None, seconds=60, device="cpu"):
        self.folder, self.count, self.emulate, self.seconds, self.device = str(folder), count, emulate, seconds, device

    def join(self, rank):
        faulthandler.dump_traceback_later(300, exit=True)  # one that hangs says where, and ends
        torch.set_num_threads(1)
        if self.emulate is not None:
            from emulator import operators

            operators.install().settings(seed=self.emulate)
        timeout = datetime.timedelta(seconds=self.seconds)
        meet = f"file://{self.folder}/meet"
        dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=self.count, timeout=timeout)
        return dist.group.WORLD

    def leave(self, rank, result):
        torch.save(result, f"{self.folder}/{rank}")
        dist.barrier()
        dist.destroy_process_group()

    def results(self, ranks=None):
        return [torch.load(f"{self.folder}/{k}", weights_only=False) for k in ranks or range(self.count)]

    def spawn(self, work, *arguments):
        """What work(rank, group, meeting, *arguments) gave in each process.

        DistributedDataParallel has to be gone when its group is destroyed. Else it holds the group last, and frees it
        with Python's lock in hand: it waits for gloo's threads, and those, now and then, for the lock (torch 2.13).
        """
        torch.multiprocessing.spawn(_run, (work, self, arguments), nprocs=self.count)
        return self.results()


def _run(rank, work, meeting, arguments):
    group = meeting.join(rank)
    meeting.leave(rank, work(rank, group, meeting, *arguments))
