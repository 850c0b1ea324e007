"""Tables of what counted launches execute and move, and lower bounds of their time on a GPU."""

import os
import re
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from scipy.optimize import nnls

from . import sass as machine
from .build import short_name
from .translate import translate

# Multiprocessors, GHz under load, TB/s of a copy, MB of L2, TB/s of the L2, registers, bytes of shared memory, threads and blocks a
# multiprocessor; a clock and multiprocessor: matrix products (mma m16n8k16 of 16-bit types, mma.sync), special functions (of a warp).
# L2 rates and the share that mma.sync reaches of the peak on sm_90 (0.62) are others' measurements, not NVIDIA's word.
DEVICES = {
    "H100": dict(
        sms=132,
        ghz=1.755,
        hbm=3.0,
        l2_mb=50,
        l2=5.5,
        registers=65536,
        shared=228 << 10,
        threads=2048,
        blocks=32,
        mma=0.62,
        mufu=0.5,
    ),
    "H200": dict(
        sms=132,
        ghz=1.755,
        hbm=4.3,
        l2_mb=60,
        l2=5.5,
        registers=65536,
        shared=228 << 10,
        threads=2048,
        blocks=32,
        mma=0.62,
        mufu=0.5,
    ),
    "A100": dict(
        sms=108,
        ghz=1.41,
        hbm=1.5,
        l2_mb=40,
        l2=4.0,
        registers=65536,
        shared=164 << 10,
        threads=2048,
        blocks=32,
        mma=0.5,
        mufu=0.5,
    ),
}
CLASSES = [
    "int",
    "fp32",
    "fp64",
    "cvt",
    "mufu",
    "mma",
    "shared",
    "ldmatrix",
    "global",
    "cp.async",
    "branch",
    "barrier",
    "shuffle",
    "param",
    "mov",
]
PTX_CLASS = [
    (r"mma\.", "mma"), (r"ldmatrix", "ldmatrix"), (r"cp\.async", "cp.async"), (r"(ld|st|atom)\.shared", "shared"), (r"ld\.param", "param"),
    (r"(ld|st|atom|red)\b", "global"), (r"(ex2|lg2|sin|cos|tanh)\.|(rcp|rsqrt|sqrt)\.approx", "mufu"), (r"(sqrt|rcp|div)\.rn", "mufu"),
    (r"(bra|ret|exit|setp)", "branch"), (r"(bar\.(sync|red)|barrier|bar\.warp|membar|fence)", "barrier"), (r"(shfl|vote|redux)", "shuffle"),
    (r"cvta", "mov"), (r"cvt\.(?:\w+\.)*(?:u|s)\d+\.(?:u|s)\d+", "int"), (r"cvt", "cvt"), (r"mov", "mov"), (r"\w+\.(?:\w+\.)*f32", "fp32"),
    (r"\w+\.(?:\w+\.)*f64", "fp64"), (r".", "int"),
]  # fmt: skip
SASS_CLASS = [
    (r"[HI]MMA", "mma"), (r"LDSM", "ldmatrix"), (r"LDGSTS|LDGDEPBAR|DEPBAR", "cp.async"), (r"(LDS|STS|ATOMS)\b", "shared"), (r"(LDC|ULDC)\b", "param"),
    (r"(LDG|STG|LD|ST|ATOMG?|RED|LDL|STL)\b", "global"), (r"MUFU", "mufu"), (r"(BRA|EXIT|RET|CALL|BSSY|BSYNC|BRX|WARPSYNC|[IFD]SETP|UISETP|U?PLOP3|R2P|P2R|BREAK|NOP|VOTEU)\b", "branch"),
    (r"(BAR|MEMBAR|ERRBAR|CCTL|FENCE)\b", "barrier"), (r"(SHFL|VOTE|REDUX|MATCH)\b", "shuffle"), (r"(F2F|I2F\w*|F2I|F2FP|FRND|I2I|HADD2|HFMA2|HMUL2|PRMT)\b", "cvt"),
    (r"(MOV|IMAD\.MOV|UMOV|S2R|S2UR|CS2R|R2UR|B2R)", "mov"), (r"(FFMA|FADD|FMUL|FMNMX|FSEL|FSET|FCHK|FSWZADD)\b", "fp32"), (r"D(FMA|ADD|MUL|SETP|MNMX)", "fp64"), (r".", "int"),
]  # fmt: skip

# Pipes beneath the issue slots, as Nsight Compute's guide has them: ALU (half rate) and XU (special functions, conversions).
ALU = re.compile(
    r"(IADD3|VIADD|LOP3|SHF|LEA|ISETP|FSETP|SEL|FSEL|PRMT|FMNMX|V?I?MNMX|VIADDMNMX|VIMNMX|PLOP3|LOP|IABS|BMSK|SGXT|F2FP|P2R|R2P|MOV|VOTE|FSET|HMNMX2)\b"
)
XU = re.compile(r"(MUFU|I2F|F2I|F2F|FRND|POPC|FLO|BREV|I2I)")


def classify(text, table):
    return next(c for pattern, c in table if re.match(pattern, text))


def features_of(launch):
    """[columns of the grid, kinds]: tiles of each kind, as the launch's own table has them; and the losses of each kind.
    None where the kernel deals out no tiles. All columns have about as many, so what a block takes by itself cannot be
    told from them."""
    if not launch["kinds"]:
        return None
    return np.array([tiles for _, _, _, tiles in launch["kinds"]], float).T, [kind[0] for kind in launch["kinds"]]


def costs_of_tiles(features, losses, known, y):
    """Of each kind of tile, by least squares over the known columns. What they do not tell is taken to be as the mean of
    the tiles of the same losses."""
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
    queue, now, done_at = list(loads[::-1]), 0.0, 0.0
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
        blocks = translate(texts[mangled], True)[1]
        chains = machine.ptx_chains(texts[mangled])
        size = np.array([len(b) for b in blocks])
        where = {line: b for b, instructions in enumerate(blocks) for line, _ in instructions}
        k = defaultdict(float)
        executed, lane_total, warp_sampled = np.zeros(len(blocks)), 0.0, 0.0
        classes, sites = defaultdict(float), defaultdict(lambda: np.zeros(7))
        loads, warps, tile_costs = [], 0, []
        for l in (x for x in launches if x["kernel"] == mangled):
            everything, per_block, left_out, off = expand(l)
            pad = np.zeros((everything.shape[0], len(blocks)))
            pad[:, : everything.shape[1]] = everything[:, : len(blocks)]
            total = pad.sum(0)
            executed += total
            sampled = np.zeros(len(blocks))
            for _, c in per_block:
                sampled[: min(len(c), len(blocks))] += c[: len(blocks)]
            lanes = np.zeros(len(blocks))
            lanes[: min(len(l["lanes"]), len(blocks))] = l["lanes"][: len(blocks)]
            lane_total += float(lanes @ size)
            warp_sampled += float(sampled @ size)
            for line, kind, bytes_, *numbers in l["sites"]:
                b = where[line]
                factor = total[b] / sampled[b] if sampled[b] else 0
                sites[line, kind, bytes_] += np.array(numbers) * factor
            grid = l["grid"]
            k["launches"] += 1
            k["blocks"] += grid[0] * grid[1] * grid[2]
            k["columns left out"] += left_out
            k["fit of columns off"] = max(k["fit of columns off"], off)
            threads = l["block"][0] * l["block"][1] * l["block"][2]
            warps += grid[0] * grid[1] * grid[2] * -(-threads // 32)
            k["shared"], k["threads"], k["grid.x"] = l["shared"], threads, grid[0]
            k["divergent"] += l["divergent"] / max(l["folds"], 1)
            columns, rows = pad, grid[1] * grid[2]
            if (found := features_of(l)) is not None:
                features, losses = found
                known = sorted({int(n) % grid[0] for n in l["blocks"]})
                y = (pad @ size)[known]
                solution = costs_of_tiles(features, losses, known, y)
                tile_costs = [(k[:3], sum(k[3]), float(x)) for k, x in zip(l["kinds"], solution)]
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
                    by_line[chain[:1]] += c
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
        per_sm, limit = occupancy(device, k.get("registers", 0), k["shared"], k["threads"])
        k["blocks a multiprocessor"], k["waves"] = per_sm, k["blocks"] / k["launches"] / max(per_sm * device["sms"], 1)
        k["imbalance"] = (
            schedule(np.tile(block_loads, rows), device["sms"], max(per_sm, 1)) if k["blocks"] <= 20000 else 1.0
        )
        # Memory
        shared = [(key, v) for key, v in sites.items() if key[1] < 8 or key[1] >= 16]
        for (line, kind, bytes_), v in shared:
            k["shared requests"] += v[0]
            k["wavefronts"] += v[2]
            k["ideal wavefronts"] += v[3]
            worst_lines.append((v[2] - v[3], v[2], v[3], name, line, blocks[where[line]], chains[line]))
        for (line, kind, bytes_), v in sites.items():
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
            "issue": k["sass"] / 4 / clock, "alu": k["alu"] / 2 / clock, "shared": k["wavefronts"] / clock, "xu": k["mufu"] / device["mufu"] / clock,
            "tensor": k["mma"] / device["mma"] / clock, "l2": moved / device["l2"] / 1e9, "hbm": k["hbm bytes"] / device["hbm"] / 1e9,
        }  # fmt: skip
        balanced = {b: t * (k["imbalance"] if b not in ("l2", "hbm") else 1) for b, t in bounds.items()}
        k["bound by"] = max(balanced, key=balanced.get)
        report["kernels"][name] = defaultdict(float, k) | {
            "ms": bounds,
            "ms balanced": balanced,
            "ptx classes": dict(classes),
            "sass classes": k_classes,
            "tile costs": tile_costs,
        }
    report["lines"] = worst_lines, plain, again
    return report


def show(report, most_lines=10):
    """Prints the tables; gives the lower bounds' sum in ms, with the blocks as they are and were all alike, and the
    floor."""
    about, kernels = report["about"], report["kernels"]
    device, (worst_lines, plain, again) = DEVICES[report["device"]], report["lines"]
    print(about.get("text", ""), "|", about.get("anchors"), "anchors |", report["device"])
    print("\nWarp instructions, in millions (PTX as executed; SASS by flow fit); % of the SASS by class")
    head = [
        "int",
        "mov",
        "param",
        "branch",
        "fp32",
        "cvt",
        "mufu",
        "mma",
        "ldmatrix",
        "shared",
        "global",
        "cp.async",
        "shuffle",
        "barrier",
        "fp64",
    ]
    print(f"{'kernel':28}{'PTX':>9}{'SASS':>9}{'ratio':>6}{'off':>5}{'lanes':>6} " + "".join(f"{h:>9}" for h in head))
    for name, k in kernels.items():
        total = sum(k["sass classes"].values()) or 1
        print(
            f"{name:28}{k['ptx'] / 1e6:9.2f}{k['sass'] / 1e6:9.2f}{k['sass'] / k['ptx']:6.2f}{100 * k.get('anchors off', 0):4.0f}%{k['lanes']:6.1f} "
            + "".join(f"{100 * k['sass classes'].get(h, 0) / total:9.1f}" for h in head)
        )
    print("\nShared and global memory, balance")
    print(
        f"{'kernel':28}{'wavefr. M':>10}{'conflict':>9}{'L2 MB':>9}{'once MB':>9}{'used':>6}{'req M':>8}{'sect/req':>9}{'blocks':>8}{'a SM':>5}{'waves':>7}{'max/mean':>9}{'at':>5}{'imbal.':>7}"
    )
    for name, k in kernels.items():
        requests = k["read requests"] + k["written requests"] + k["copied requests"] + k["atomic requests"]
        print(
            f"{name:28}{k['wavefronts'] / 1e6:10.2f}{k['wavefronts'] / max(k['ideal wavefronts'], 1):9.2f}{k['l2 bytes'] / 1e6:9.1f}{k['hbm bytes'] / 1e6:9.1f}"
            f"{100 * k['used of moved']:5.0f}%{requests / 1e6:8.2f}{k['l2 bytes'] / 32 / max(requests, 1):9.1f}{int(k['blocks']):8}{k['blocks a multiprocessor']:5}{k['waves']:7.2f}"
            f"{k['largest over mean']:9.2f}{k['largest at']:5}{k['imbalance']:7.2f}"
        )
    print("\nLower bounds, ms; in brackets what bounds a multiprocessor times the imbalance")
    print(
        f"{'kernel':28}"
        + "".join(f"{b:>9}" for b in ("issue", "alu", "shared", "xu", "tensor", "l2", "hbm"))
        + f"{'largest':>9}  bound by"
    )
    sums = defaultdict(float)
    for name, k in kernels.items():
        largest = max(k["ms balanced"].values())
        even = max(k["ms"].values())
        sums["largest"] += largest
        sums["even"] += even
        for b, t in k["ms"].items():
            sums[b] += t
        print(
            f"{name:28}"
            + "".join(f"{k['ms'][b]:9.3f}" for b in ("issue", "alu", "shared", "xu", "tensor", "l2", "hbm"))
            + f"{largest:9.3f}  {k['bound by']} ({even:.3f} were all blocks alike)"
        )
    print(
        f"{'together':28}"
        + "".join(f"{sums[b]:9.3f}" for b in ("issue", "alu", "shared", "xu", "tensor", "l2", "hbm"))
        + f"{sums['largest']:9.3f}  ({sums['even']:.3f})"
    )
    print(
        "\nA tile of each level, both sides and all channels: warp instructions (SASS; columns of blocks by least squares); waits: if every"
    )
    print(
        "plain load of global memory of the block with the most took 600 clocks and none overlapped within a warp, ms (an upper end)"
    )
    shapes = about["shapes"]
    print(
        f"{'kernel':28}{'losses':>9}{'tiles':>8}{'mean':>9}{'off':>5}"
        + "".join(f"{f'{h}x{w}':>11}" for h, w in shapes)
        + f"{'waits':>7}"
    )
    for name, k in kernels.items():
        ratio, costs = k["sass"] / k["ptx"], k["tile costs"]
        for i, losses in enumerate(sorted({kind[0] for kind, _, _ in costs})):
            at = {tuple(kind[1:]): x for kind, _, x in costs if kind[0] == losses}
            tiles = sum(n for kind, n, _ in costs if kind[0] == losses)
            words = "".join(letter for bit, letter in ((1, "A"), (2, "D"), (4, "L")) if losses & bit)
            row = f"{name if i == 0 else '':28}{words:>9}{tiles:8}"
            row += f"{k['sass'] / sum(n for _, n, _ in costs):9.0f}{100 * k['tiles off']:4.0f}%" if i == 0 else " " * 14
            row += "".join(f"{at.get(tuple(s), 0) * ratio:11.0f}" for s in shapes)
            print(row + (f"{k['waits of a warp'] * 600 / device['ghz'] / 1e6:7.2f}" if i == 0 else ""))
    if plain:
        print(
            "\nPlain loads of global memory, executions by each warp of the block with the most; the lines with the most"
        )
        for (name, column, chain), n in sorted(plain.items(), key=lambda x: -x[1])[:most_lines]:
            print(f"{n:12.0f}  {name}  column {column}  " + " < ".join(f"{f}:{l}" for f, l in chain))
    print(
        "\nGlobal memory touched again by the same launch, MB (of all that the line moves), sectors a request, bytes used; the lines with the most"
    )
    for (name, what, chain), (requests, sectors, used, more) in sorted(again.items(), key=lambda x: -x[1][3])[
        :most_lines
    ]:
        print(
            f"{32e-6 * more:10.1f} ({32e-6 * sectors:.1f})  {sectors / max(requests, 1):5.1f}  {100 * used / max(32 * sectors, 1):3.0f}%  {name}  {what}  "
            + " < ".join(f"{f}:{l}" for f, l in chain)
        )
    print(f"\nThe {most_lines} lines with the most wavefronts beyond the ideal")
    merged = defaultdict(lambda: [0.0, 0.0, 0.0, ""])
    for extra, wave, ideal, name, line, block, chain in worst_lines:
        text = next((t for n, t in block if n == line), "")
        key = name, " < ".join(f"{f}:{n}" for f, n in chain[:3]), re.sub(r"^@!?%\w+\s+", "", text).split()[0]
        m = merged[key]
        m[0], m[1], m[2] = m[0] + extra, m[1] + wave, m[2] + ideal
    for key, m in sorted(merged.items(), key=lambda x: -x[1][0])[:most_lines]:
        if m[0] > 0:
            print(
                f"{m[0] / 1e6:9.3f} M beyond {m[2] / 1e6:8.3f} M ({m[1] / max(m[2], 1):.1f}x)  {key[0]}  {key[2]}  {key[1]}"
            )
    return sums["largest"], sums["even"], about["floor_bytes"] / device["hbm"] / 1e9
