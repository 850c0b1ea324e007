"""What counted launches execute and move, and lower bounds of their time on a GPU."""

import os
import re
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from scipy.optimize import nnls

from . import sass as machine
from .build import short_name
from .translate import translate

# Multiprocessors, GHz under load, TB/s of a copy, MB of L2, TB/s of the L2; registers, bytes of shared memory, threads
# and blocks of a multiprocessor; what it does in a clock: matrix products (mma m16n8k16 of 16-bit types, mma.sync),
# special functions (of a warp).
# L2 rates and the share that mma.sync reaches of the peak on sm_90 (0.62) are others' measurements, not NVIDIA's word.
SM = {"registers": 65536, "threads": 2048, "blocks": 32, "mufu": 0.5}
HOPPER = SM | {"sms": 132, "ghz": 1.755, "l2": 5.5, "shared": 228 << 10, "mma": 0.62}
DEVICES = {
    "H100": HOPPER | {"hbm": 3.0, "l2_mb": 50},
    "H200": HOPPER | {"hbm": 4.3, "l2_mb": 60},
    "A100": SM | {"sms": 108, "ghz": 1.41, "hbm": 1.5, "l2_mb": 40, "l2": 4.0, "shared": 164 << 10, "mma": 0.5},
}
PTX_CLASS = [
    (r"mma\.", "mma"), (r"ldmatrix", "ldmatrix"), (r"cp\.async", "cp.async"), (r"(ld|st|atom)\.shared", "shared"),
    (r"ld\.param", "param"), (r"(ld|st|atom|red)\b", "global"), (r"(sqrt|rcp|div)\.rn", "mufu"),
    (r"(ex2|lg2|sin|cos|tanh)\.|(rcp|rsqrt|sqrt)\.approx", "mufu"), (r"(bra|ret|exit|setp)", "branch"),
    (r"(bar\.(sync|red)|barrier|bar\.warp|membar|fence)", "barrier"), (r"(shfl|vote|redux)", "shuffle"),
    (r"cvta", "mov"), (r"cvt\.(?:\w+\.)*(?:u|s)\d+\.(?:u|s)\d+", "int"), (r"cvt", "cvt"), (r"mov", "mov"),
    (r"\w+\.(?:\w+\.)*f32", "fp32"), (r"\w+\.(?:\w+\.)*f64", "fp64"), (r".", "int"),
]  # fmt: skip
SASS_CLASS = [
    (r"[HI]MMA", "mma"), (r"LDSM", "ldmatrix"), (r"LDGSTS|LDGDEPBAR|DEPBAR", "cp.async"),
    (r"(LDS|STS|ATOMS)\b", "shared"), (r"(LDC|ULDC)\b", "param"), (r"(LDG|STG|LD|ST|ATOMG?|RED|LDL|STL)\b", "global"),
    (r"MUFU", "mufu"), (r"(BRA|EXIT|RET|CALL|BSSY|BSYNC|BRX|WARPSYNC|[IFD]SETP|UISETP|U?PLOP3)\b", "branch"),
    (r"(R2P|P2R|BREAK|NOP|VOTEU)\b", "branch"), (r"(BAR|MEMBAR|ERRBAR|CCTL|FENCE)\b", "barrier"),
    (r"(SHFL|VOTE|REDUX|MATCH)\b", "shuffle"),
    (r"(F2F|I2F\w*|F2I|F2FP|FRND|I2I|HADD2|HFMA2|HMUL2|PRMT)\b", "cvt"),
    (r"(MOV|IMAD\.MOV|UMOV|S2R|S2UR|CS2R|R2UR|B2R)", "mov"),
    (r"(FFMA|FADD|FMUL|FMNMX|FSEL|FSET|FCHK|FSWZADD)\b", "fp32"), (r"D(FMA|ADD|MUL|SETP|MNMX)", "fp64"), (r".", "int"),
]  # fmt: skip

# Pipes beneath the issue slots, as Nsight Compute's guide has them: ALU (half rate) and XU (special functions,
# conversions).
ALU = re.compile(
    r"(IADD3|VIADD|LOP3|SHF|LEA|ISETP|FSETP|SEL|FSEL|PRMT|FMNMX|V?I?MNMX|VIADDMNMX|VIMNMX|PLOP3|LOP|IABS|BMSK|SGXT|"
    r"F2FP|P2R|R2P|MOV|VOTE|FSET|HMNMX2)\b"
)
XU = re.compile(r"(MUFU|I2F|F2I|F2F|FRND|POPC|FLO|BREV|I2I)")


def classify(text, table):
    return next(c for pattern, c in table if re.match(pattern, text))


def features_of(launch):
    """[columns of the grid, kinds]: tiles of each kind, as the launch's own table has them; and the losses of each
    kind. None where the kernel deals out no tiles. All columns have about as many, so what a block takes by itself
    cannot be told from them."""
    if not launch["kinds"]:
        return None
    return np.array([tiles for _, _, _, tiles in launch["kinds"]], float).T, [kind[0] for kind in launch["kinds"]]


def costs_of_tiles(features, losses, known, y):
    """Of each kind of tile, by least squares over the known columns. What they do not tell is taken to be as the mean
    of the tiles of the same losses."""
    weight = 1 / np.sqrt(y + 0.05 * y.mean() + 1)
    a = features[known]
    groups = sorted(set(losses))
    of_group = np.stack([a[:, [x == g for x in losses]].sum(1) for g in groups], 1)
    means, _ = nnls(of_group * weight[:, None], y * weight)
    if not of_group.any(0).all():
        means = np.full(len(groups), y.sum() / max(a.sum(), 1))
    means = means[[groups.index(x) for x in losses]]
    pull = 0.03 * a.sum(1).mean() / np.sqrt(y.mean() + 1)
    system = np.concatenate([a * weight[:, None], pull * np.eye(a.shape[1])])
    return nnls(system, np.concatenate([y * weight, pull * means]))[0]


def expand(launch):
    """Executions of each basic block of the PTX by warps: [columns, blocks], those of columns left out worked out."""
    grid, width = launch["grid"], len(launch["lanes"])
    columns = defaultdict(lambda: np.zeros(width))
    per_block = []
    for number, counts in launch["blocks"].items():
        c = np.zeros(width)
        c[: len(counts)] = counts
        columns[int(number) % grid[0]] += c
        per_block.append((int(number), c))
    everything = np.zeros((grid[0], width))
    for x, c in columns.items():
        everything[x] = c
    left_out, off = grid[0] - len(columns), 0.0
    if left_out:
        features, losses = features_of(launch)
        known = sorted(columns)
        a = features[known]
        rest = [x for x in range(grid[0]) if x not in columns]
        for b in range(width):
            if everything[known, b].any():
                y = everything[known, b]
                solution = costs_of_tiles(features, losses, known, y)
                everything[rest, b] = features[rest] @ solution
                off += abs(a @ solution - y).sum()
        off /= max(everything[known].sum(), 1)
    return everything, per_block, left_out, off


def occupancy(device, registers, shared, threads):
    warps = -(-threads // 32)
    by = {"threads": device["threads"] // (32 * warps), "blocks": device["blocks"]}
    if registers:
        by["registers"] = device["registers"] // (-(-registers * 32 // 256) * 256 * warps)
    by["shared"] = device["shared"] // (-(-(shared + 1024) // 128) * 128)
    limit = min(by, key=by.get)
    return by[limit], limit


def schedule(loads, sms, places):
    """Blocks are handed to multiprocessors in order, a new one where a place becomes free; those of one share its rate.
    Time of the last, over the mean of all."""
    loads = np.asarray(loads, float)
    if loads.sum() == 0:
        return 1.0
    residents = [[] for _ in range(sms)]
    queue, now = list(loads[::-1]), 0.0
    for _ in range(places):
        for r in residents:
            if queue:
                r.append(queue.pop())
    left = sum(len(r) for r in residents)
    while left:
        step = min(min(r) * len(r) for r in residents if r)
        now += step
        for r in residents:
            if r:
                share = step / len(r)
                r[:] = [x - share for x in r]
                finished = [x for x in r if x <= 1e-9 * loads.max()]
                if finished:
                    r[:] = [x for x in r if x > 1e-9 * loads.max()]
                    left -= len(finished)
                    for _ in finished:
                        if queue:
                            r.append(queue.pop())
                            left += 1
    return now / (loads.sum() / sms)


def make(about, launches, texts, device_name, architecture=None, folder=None):
    """The report of counted launches. texts: {mangled name: the kernel's PTX}; folder: of the machine code, or None."""
    device = DEVICES[device_name]
    kernels = list(dict.fromkeys(launch["kernel"] for launch in launches))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        codes = (
            dict(zip(kernels, pool.map(lambda k: machine.disassemble(texts[k], architecture, folder), kernels)))
            if folder
            else {}
        )
    report = {"about": about, "device": device_name, "kernels": {}}
    worst_lines, plain, again = [], defaultdict(float), defaultdict(lambda: np.zeros(4))
    for mangled in kernels:
        name = short_name(mangled)
        if name in report["kernels"]:
            raise SystemExit(f"a step has launched two kinds of {name}, and the report has room for one")
        blocks = translate(texts[mangled], True)[1]
        chains = machine.ptx_chains(texts[mangled])
        size = np.array([len(b) for b in blocks])
        where = {line: b for b, instructions in enumerate(blocks) for line, _ in instructions}
        k = defaultdict(float)
        executed, lane_total, warp_sampled = np.zeros(len(blocks)), 0.0, 0.0
        classes, sites = defaultdict(float), defaultdict(lambda: np.zeros(7))
        loads, warps, tile_costs = [], 0, []
        for launch in (x for x in launches if x["kernel"] == mangled):
            everything, per_block, left_out, off = expand(launch)
            pad = np.zeros((everything.shape[0], len(blocks)))
            pad[:, : everything.shape[1]] = everything[:, : len(blocks)]
            total = pad.sum(0)
            executed += total
            sampled = np.zeros(len(blocks))
            for _, c in per_block:
                sampled[: min(len(c), len(blocks))] += c[: len(blocks)]
            lanes = np.zeros(len(blocks))
            lanes[: min(len(launch["lanes"]), len(blocks))] = launch["lanes"][: len(blocks)]
            lane_total += float(lanes @ size)
            warp_sampled += float(sampled @ size)
            for line, kind, bytes_, *numbers in launch["sites"]:
                b = where[line]
                factor = total[b] / sampled[b] if sampled[b] else 0
                sites[line, kind, bytes_] += np.array(numbers) * factor
            grid = launch["grid"]
            k["launches"] += 1
            k["blocks"] += grid[0] * grid[1] * grid[2]
            k["columns left out"] += left_out
            k["fit of columns off"] = max(k["fit of columns off"], off)
            threads = launch["block"][0] * launch["block"][1] * launch["block"][2]
            warps += grid[0] * grid[1] * grid[2] * -(-threads // 32)
            k["shared"], k["threads"], k["grid.x"] = launch["shared"], threads, grid[0]
            k["divergent"] += launch["divergent"] / max(launch["folds"], 1)
            columns, rows = pad, grid[1] * grid[2]
            if (found := features_of(launch)) is not None:
                features, losses = found
                known = sorted({int(n) % grid[0] for n in launch["blocks"]})
                y = (pad @ size)[known]
                solution = costs_of_tiles(features, losses, known, y)
                tile_costs = [(k[:3], sum(k[3]), float(x)) for k, x in zip(launch["kinds"], solution)]
                met = features[known] @ solution
                k["tiles off"] = float(abs(met - y).sum() / max(y.sum(), 1))
                # The plain loads of global memory of the block with the most, one after another in each warp.
                waits = np.zeros(grid[0])
                for b, instructions in enumerate(blocks):
                    n = sum(1 for _, t in instructions if re.search(r"\bld\.global", t))
                    waits += n * pad[:, b]
                most, of_warp = int(np.argmax(waits)), rows * -(-threads // 32)
                k["waits of a warp"] = float(waits.max() / of_warp)
                for b, instructions in enumerate(blocks):
                    for line, text in instructions:
                        if re.search(r"\bld\.global", text) and pad[most, b]:
                            plain[name, most, chains[line][:3]] += float(pad[most, b] / of_warp)
            loads = [(columns[x], rows) for x in range(grid[0])] if not loads or grid[0] > len(loads) else loads
        for b, instructions in enumerate(blocks):
            for _, text in instructions:
                classes[classify(re.sub(r"^@!?%\w+\s+", "", text), PTX_CLASS)] += executed[b]
        k["ptx"] = float(executed @ size)
        k["lanes"] = lane_total / max(warp_sampled, 1)
        k["mma"] = sum(executed[b] for b, i in enumerate(blocks) for _, t in i if t.startswith("mma") or " mma." in t)
        weight = size.astype(float)
        if mangled in codes:
            lines, k["registers"], k["spills"] = codes[mangled]
            code = machine.Code(lines)
            counts, quality = machine.fit(code, blocks, executed, chains, warps)
            k["sass"] = float(sum(c * len(i) for c, i in zip(counts, code.blocks)))
            k["sass static"], k["ptx static"] = sum(len(i) for i in code.blocks), int(size.sum())
            k["anchors off"], k["anchors unmatched"] = quality["off"], quality["unmatched"]
            sass_classes = defaultdict(float)
            by_line = defaultdict(float)
            for c, instructions in zip(counts, code.blocks):
                for op, _, chain in instructions:
                    sass_classes[classify(op, SASS_CLASS)] += c
                    by_line[chain] += c
            k["mufu"] = sum(c for c, i in zip(counts, code.blocks) for op, _, _ in i if XU.match(op))
            k["alu"] = sum(c for c, i in zip(counts, code.blocks) for op, _, _ in i if ALU.match(op))
            k_classes = dict(sass_classes)
        else:
            k["sass"], k_classes, by_line = k["ptx"], dict(classes), {}
            k["mufu"] = classes["mufu"]
        # Balance
        block_loads = [float(c @ weight) / rows for c, rows in loads]
        rows = loads[0][1]
        k["largest over mean"] = max(block_loads) / max(np.mean(block_loads), 1e-9)
        k["largest at"] = int(np.argmax(block_loads))
        per_sm, _ = occupancy(device, k.get("registers", 0), k["shared"], k["threads"])
        k["blocks a multiprocessor"], k["waves"] = per_sm, k["blocks"] / k["launches"] / max(per_sm * device["sms"], 1)
        k["imbalance"] = (
            schedule(np.tile(block_loads, rows), device["sms"], max(per_sm, 1)) if k["blocks"] <= 20000 else 1.0
        )
        # Memory
        shared = [(key, v) for key, v in sites.items() if key[1] < 8 or key[1] >= 16]
        for (line, _, _), v in shared:
            k["shared requests"] += v[0]
            k["wavefronts"] += v[2]
            k["ideal wavefronts"] += v[3]
            worst_lines.append((v[2] - v[3], v[2], v[3], name, line, blocks[where[line]], chains[line]))
        for (line, kind, _), v in sites.items():
            if 8 <= kind < 16:
                what = {8: "read", 9: "written", 10: "atomic", 11: "copied"}[kind]
                k[what + " requests"] += v[0]
                k[what + " sectors"] += v[4]
                k[what + " bytes"] += v[5]
                k["once sectors"] += v[4] - v[6]
                again[name, what, chains[line][:3]] += v[[0, 4, 5, 6]]
        moved = 32 * (k["read sectors"] + k["copied sectors"] + k["written sectors"] + k["atomic sectors"])
        k["l2 bytes"] = moved
        k["hbm bytes"] = 32 * k["once sectors"]
        useful = k["read bytes"] + k["copied bytes"] + k["written bytes"]
        k["used of moved"] = useful / moved if moved else 1
        # Bounds, ms; those of a multiprocessor with the imbalance.
        clock = device["sms"] * device["ghz"] * 1e6
        bounds = {
            "issue": k["sass"] / 4 / clock,
            "alu": k["alu"] / 2 / clock,
            "shared": k["wavefronts"] / clock,
            "xu": k["mufu"] / device["mufu"] / clock,
            "tensor": k["mma"] / device["mma"] / clock,
            "l2": moved / device["l2"] / 1e9,
            "hbm": k["hbm bytes"] / device["hbm"] / 1e9,
        }
        balanced = {b: t * (k["imbalance"] if b not in ("l2", "hbm") else 1) for b, t in bounds.items()}
        k["tiles"] = sum(n for _, n, _ in tile_costs)
        k["bound by"] = max(balanced, key=balanced.get)
        report["kernels"][name] = defaultdict(float, k) | {
            "ms": bounds,
            "ms balanced": balanced,
            "ptx classes": dict(classes),
            "sass classes": k_classes,
            "tile costs": tile_costs,
            "by line": dict(by_line),
        }
    report["lines"] = worst_lines, plain, again
    return report
