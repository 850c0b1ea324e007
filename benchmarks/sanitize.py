"""Calls every operator, forward and backward, for every dtype and layout on maps of a few pixels.

    compute-sanitizer --tool memcheck python benchmarks/sanitize.py

For compute-sanitizer, which slows a kernel down many times. Results are compared elsewhere (tests/).
"""

import argparse
import itertools
import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import cases

import sea_kernels as sk
from sea_kernels.group import Group

DTYPES = (cases.F32, cases.BF16, cases.F16, cases.F64)
LAYOUTS = ("channels_last", "odd offset", "every second", "transposed", "expanded")


def calls(device):
    """(variant, inputs, regions) of every call."""
    regions = cases.make_regions(device)
    for dtype in DTYPES:
        inputs = cases.make_inputs(regions, 40, 19, dtype=dtype, device=device)
        yield from ((variant, inputs, regions) for variant in cases.VARIANTS)
        # With a group, the losses run in two steps.
        grouped = replace(regions, group=Group("", 1), images=torch.ones((), device=device))
        yield "sea_loss, everything", inputs, grouped
        for layout in LAYOUTS:
            yield "anchor_cosine", inputs.layout(layout), regions
            yield "sea_loss, everything", inputs.layout(layout), regions
        # Full tiles and vectors; from no anchor to more than a kernel may hold at a time.
        for number in (0, 1, 31, 100, 300):
            many = cases.make_regions(device, number, levels=2, num_classes=1203)
            wide = cases.make_inputs(many, 64, 64, sets=2, dtype=dtype, device=device)
            yield "anchor_cosine", wide, many
            yield "sea_loss, everything", wide, many
            yield "sea_loss, detached", wide.layout("channels_last"), many
    mixed = cases.make_inputs(regions, 16, 16, dtype=cases.BF16, teacher_dtype=cases.F32, device=device)
    yield "sea_loss", mixed, regions
    empty = cases.make_regions(device, batch=0)
    yield "sea_loss", cases.make_inputs(empty, device=device), empty


def listed_regions(device, images=300, boxes=40):
    """Lists on the host, longer than the parameters of one launch may be."""
    rows = [x[0].to(device) for x in (cases.make_boxes(boxes, seed=b) for b in range(images))]
    labels = [torch.arange(boxes, device=device) for _ in range(images)]
    sizes = [(150 + b % 10, 224 - b % 50) for b in range(images)]
    regions = sk.Regions.from_boxes(rows, labels, [(5, 7), (2, 3)], [32, 64], image_sizes=sizes, ignore_boxes=rows)
    assert regions.counted.tolist()[0] > 0


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--share", default="0/1", metavar="K/N", help="calls K, K + N, K + 2 N, ...")
    args = parser.parse_args()
    first, step = map(int, args.share.split("/"))
    if first == 0:
        listed_regions(args.device)
    count = 0
    for variant, inputs, regions in itertools.islice(calls(args.device), first, None, step):
        outputs, gradients = cases.run(variant, inputs, regions)
        finite = [x.isfinite().all() for x in [*outputs, *gradients] if x is not None]
        assert torch.stack(finite).all(), variant
        with torch.no_grad():
            call, options = cases.VARIANTS[variant]
            call(inputs, regions, **options)
        count += 1
        print(f"{count}: {variant}", flush=True)  # how far it came, if its time does not suffice
    print(f"{count} calls on {torch.cuda.get_device_name() if args.device == 'cuda' else args.device}")


if __name__ == "__main__":
    main()
