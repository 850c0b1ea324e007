"""Clocks and meters: time, memory, kernel launches and synchronizations of one training step, and the machine's rates.

A *step* is `step(inputs, mark) -> (losses, gradients)`; it calls `mark()` once, between its forward and its backward.
"""

import ctypes
import gc
import math
import os
import re
import resource
import time
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler reports each of its starts and stops

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function


@dataclass
class Times:
    """Milliseconds of each repeat."""

    forward: list[float] = field(default_factory=list)
    step: list[float] = field(default_factory=list)  # forward and backward
    faults: list[int] = field(default_factory=list)  # on a CPU: new pages that the operating system cleared


def interleave(steps, inputs, device, repeats, progress=lambda k: None, deadline=math.inf):
    """`repeats` samples of each of the named `steps`, in turns, so that a slow minute of the machine hits them all.

    Past the `deadline` (of time.monotonic) no repeat begins, from the fourth on.

    Every run takes the next of `inputs`, so that no step finds its input in the cache. On a GPU a sample is the mean of
    as many runs as 20 ms hold, with no synchronization in between: that is how a training loop queues them.
    """
    times = {name: Times() for name in steps}
    runs = dict.fromkeys(steps, 1)
    if device.type == "cuda":
        for name, step in steps.items():
            _, once = sample_cuda(step, inputs, len(inputs))
            runs[name] = max(len(inputs), min(200, round(20 / once)))
    for k in range(repeats):
        if k >= 3 and time.monotonic() > deadline:
            break
        progress(k)
        for j, (name, step) in enumerate(steps.items()):
            if device.type == "cuda":
                forward, whole = sample_cuda(step, inputs, runs[name])
            else:
                before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
                forward, whole = sample_cpu(step, inputs[(j + k) % len(inputs)])
                times[name].faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
            times[name].step.append(whole)
            if forward is not None:
                times[name].forward.append(forward)
    return times


def sample_cpu(step, inputs):
    middle = []
    start = time.perf_counter()
    step(inputs, lambda: middle.append(time.perf_counter()))
    end = time.perf_counter()
    return ((middle[0] - start) * 1e3 if middle else None), (end - start) * 1e3


def sample_cuda(step, inputs, runs):
    """With CUDA events: mean milliseconds of forward (None if the step does not mark it) and of the whole."""
    forwards = []

    def event():
        e = torch.cuda.Event(enable_timing=True)
        e.record()
        return e

    torch.cuda.synchronize()
    start = event()
    for i in range(runs):
        first, middle = event(), []
        step(inputs[i % len(inputs)], lambda middle=middle: middle.append(event()))
        forwards += [(first, m) for m in middle]
    end = event()
    torch.cuda.synchronize()
    forward = sum(a.elapsed_time(b) for a, b in forwards) / len(forwards) if forwards else None
    return forward, start.elapsed_time(end) / runs


def memory(step, inputs, device):
    """(peak, saved) bytes of one run of the step.

    saved: what forward allocated and what is still alive when backward begins.
    peak: the most that was alive at one time, the returned gradients themselves left out from their allocation on.
    What was there before (the input maps of both sides) counts in neither.

    Both come from the profiler's log of torch's allocators, which sees inside operators and compiled code alike, on the
    CPU (where torch has no counter) and on the GPU. What C++ code takes by malloc is not seen.
    """
    gc.collect()
    gc.disable()  # a collection in the middle of the step would be a difference between two runs
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as log:
            _, gradients = step(inputs, _mark)
    finally:
        gc.enable()
    # In the order of the log, which decides where a fast machine gives two events one time.
    events, todo = [], list(log.profiler.kineto_results.experimental_event_tree())[::-1]
    while todo:
        event = todo.pop()
        todo += event.children[::-1]
        if event.name == _MARK:
            events.append((event.start_time_ns, None, 0))
        elif event.name == "[memory]" and event.extra_fields.device.type == device.type:
            events.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
    events.sort(key=lambda e: e[0])

    results = {g.untyped_storage().data_ptr() for g in gradients}
    last = {ptr: i for i, (_, ptr, size) in enumerate(events) if size > 0 and ptr in results}
    return _account(events, set(last.values()))


_MARK = "end of forward"


def _mark():
    with record_function(_MARK):
        pass


def _account(events, results):
    """(peak, saved) of a log in order of time.

    events: (time, pointer, bytes: negative when freed), or (time, None, 0) for the mark; results: those to leave out.
    """
    live: dict[int, int] = {}
    total = left_out = peak = saved = 0
    for i, (_, ptr, size) in enumerate(events):
        if ptr is None:
            saved = total
        elif size > 0:
            live[ptr] = size
            total += size
            left_out += size if i in results else 0
        else:
            total -= live.pop(ptr, 0)  # 0: it was allocated before the log began
        peak = max(peak, total - left_out)
    return peak, saved


def cuda_calls(step, inputs):
    """(launches, host synchronizations) of one run of the step, see `count_calls`."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as log:
        step(inputs, lambda: None)  # not counted: the profiler may miss the first records
        torch.cuda.synchronize()
        with record_function("the step"):
            step(inputs, lambda: None)
        torch.cuda.synchronize()
    events = [e for e in log.profiler.kineto_results.events() if e.device_type() == DeviceType.CPU]
    (begin, end), *_ = [(e.start_ns(), e.start_ns() + e.duration_ns()) for e in events if e.name() == "the step"]
    return count_calls([e.name() for e in events if begin <= e.start_ns() <= end])


def count_calls(names):
    """(launches, host synchronizations) among calls of CUDA's runtime and driver.

    Launches are kernels, copies and fills; a replayed CUDA graph is one. A plain cudaMemcpy is a synchronization too.
    """
    launches = sum(bool(re.match(r"cu(da)?(Launch\w*Kernel|GraphLaunch|Memcpy|Memset)", n)) for n in names)
    return launches, sum(bool(re.match(r"cu(da)?\w*Synchronize|cudaMemcpy$", n)) for n in names)


_keeps_pages = False


def keep_pages():
    """Makes glibc's malloc keep the memory that it has once got from the operating system, for the whole process.

    Otherwise large blocks are returned and fetched again in every step, and the operating system clears every new page.
    Whether a training loop pays for that depends on its allocator: tcmalloc and jemalloc keep pages. Plain PyTorch pays
    most. Call this before the first large allocation. Without glibc it does nothing.
    """
    global _keeps_pages
    mmap_max, trim_threshold, arena_max = -4, -1, -8
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return
    # No block by mmap; nothing is given back; one heap for all threads, because backward runs in a thread of its own.
    _keeps_pages = all([mallopt(mmap_max, 0), mallopt(trim_threshold, 2**31 - 1), mallopt(arena_max, 1)])


def keeps_pages():
    return _keeps_pages


def cache_bytes(device):
    """The last cache before memory."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [p.read_text().strip() for p in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(s[:-1]) * {"K": 2**10, "M": 2**20}[s[-1]] for s in sizes), default=32 * 2**20)


def copy_bandwidth(device, size):
    """Bytes a second, read and written, of copying `size` bytes (median of 7)."""
    source, target = torch.rand(size // 4, device=device), torch.zeros(size // 4, device=device)
    return 2 * size / _median_seconds(lambda: target.copy_(source), device)


def gemm_rate(device, dtype, n, precision="highest"):
    """Operations a second of an n x n x n matrix product (median of 7); precision "high" is TF32 for float32."""
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    torch.set_float32_matmul_precision(precision)
    try:
        return 2 * n**3 / _median_seconds(lambda: torch.mm(a, b, out=out), device)
    finally:
        torch.set_float32_matmul_precision("highest")


def rates(device, dtype, small=False):
    """What the machine does when it does nothing else, per second: bytes copied, operations of matrix products."""
    cuda = device.type == "cuda"
    size = 2**22 if small else 2**30 if cuda else min(max(2 * cache_bytes(device), 2**27), 2**29)
    n = 256 if small else 8192 if cuda else 2048
    out = {"copy": copy_bandwidth(device, size)}
    # On a CPU our kernels compute in float32, whatever the maps are.
    for d in {torch.float32, dtype} if cuda else {torch.float32}:
        out[f"gemm_{str(d).removeprefix('torch.')}"] = gemm_rate(device, d, n)
    if cuda and dtype == torch.float32:
        out["gemm_tf32"] = gemm_rate(device, dtype, n, "high")
    return out


def _median_seconds(call, device, repeats=7):
    def step(inputs, mark):
        call()

    step(None, None)
    return median(interleave({"": step}, [None], device, repeats)[""].step) / 1e3


def median(values):
    return float(torch.tensor(values, dtype=torch.float64).quantile(0.5))
