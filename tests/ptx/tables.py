"""Prints the tables of a report."""

import re
from collections import defaultdict

from .counted import DEVICES

CLASSES = ["int", "mov", "param", "branch", "fp32", "cvt", "mufu", "mma", "ldmatrix", "shared", "global", "cp.async"]
CLASSES += ["shuffle", "barrier", "fp64"]
BOUNDS = ["issue", "alu", "shared", "xu", "tensor", "l2", "hbm"]


def chain_text(chain):
    return " < ".join(f"{file}:{line}" for file, line in chain[:3])


def show(report, most_lines=10):
    """Prints the tables; gives the lower bounds' sum in ms, with the blocks as they are and were all alike, and the
    floor."""
    about, kernels = report["about"], report["kernels"]
    device = DEVICES[report["device"]]
    print(about["text"], "|", about["anchors"], "anchors |", report["device"])
    share = about["peak_bytes"] / about["student_bytes"]
    print(f"Memory: at most {about['peak_bytes'] / 1e6:.1f} MB in forward, {100 * share:.2f}% of the student's maps")
    show_instructions(kernels)
    show_memory(kernels)
    sums = show_bounds(kernels)
    show_tiles(kernels, about["shapes"], device["ghz"])
    show_hot_lines(kernels, most_lines)
    show_lines(*report["lines"], most_lines)
    return sums["largest"], sums["even"], about["floor_bytes"] / device["hbm"] / 1e9


def show_instructions(kernels):
    print("\nWarp instructions, in millions (PTX as executed; SASS by flow fit); % of the SASS by class")
    columns = "".join(f"{name:>9}" for name in CLASSES)
    print(f"{'kernel':28}{'PTX':>9}{'SASS':>9}{'ratio':>6}{'off':>5}{'lanes':>6} {columns}")
    for name, k in kernels.items():
        total = sum(k["sass classes"].values()) or 1
        row = f"{name:28}{k['ptx'] / 1e6:9.2f}{k['sass'] / 1e6:9.2f}{k['sass'] / k['ptx']:6.2f}"
        row += f"{100 * k.get('anchors off', 0):4.0f}%{k['lanes']:6.1f} "
        print(row + "".join(f"{100 * k['sass classes'].get(name, 0) / total:9.1f}" for name in CLASSES))


def show_memory(kernels):
    print("\nShared and global memory, balance")
    row = f"{'kernel':28}{'wavefr. M':>10}{'conflict':>9}{'L2 MB':>9}{'once MB':>9}{'used':>6}{'req M':>8}"
    row += f"{'sect/req':>9}{'blocks':>8}{'a SM':>5}{'waves':>7}{'max/mean':>9}{'at':>5}{'imbal.':>7}"
    print(row)
    for name, k in kernels.items():
        requests = sum(k[f"{what} requests"] for what in ("read", "written", "copied", "atomic"))
        row = f"{name:28}{k['wavefronts'] / 1e6:10.2f}{k['wavefronts'] / max(k['ideal wavefronts'], 1):9.2f}"
        row += f"{k['l2 bytes'] / 1e6:9.1f}{k['hbm bytes'] / 1e6:9.1f}{100 * k['used of moved']:5.0f}%"
        row += f"{requests / 1e6:8.2f}{k['l2 bytes'] / 32 / max(requests, 1):9.1f}{int(k['blocks']):8}"
        row += f"{k['blocks a multiprocessor']:5}{k['waves']:7.2f}{k['largest over mean']:9.2f}{k['largest at']:5}"
        print(row + f"{k['imbalance']:7.2f}")


def show_bounds(kernels):
    """Also gives the sums over the kernels."""
    print("\nLower bounds, ms; in brackets what bounds a multiprocessor times the imbalance")
    print(f"{'kernel':28}" + "".join(f"{b:>9}" for b in BOUNDS) + f"{'largest':>9}  bound by")
    sums = defaultdict(float)
    for name, k in kernels.items():
        largest, even = max(k["ms balanced"].values()), max(k["ms"].values())
        for key, ms in (("largest", largest), ("even", even), *k["ms"].items()):
            sums[key] += ms
        row = f"{name:28}" + "".join(f"{k['ms'][b]:9.3f}" for b in BOUNDS)
        print(row + f"{largest:9.3f}  {k['bound by']} ({even:.3f} were all blocks alike)")
    row = f"{'together':28}" + "".join(f"{sums[b]:9.3f}" for b in BOUNDS)
    print(row + f"{sums['largest']:9.3f}  ({sums['even']:.3f})")
    return sums


def show_tiles(kernels, shapes, ghz):
    print("\nA tile of each level, both sides and all channels: warp instructions (SASS; columns of blocks by least")
    print("squares); waits: if every plain load of global memory of the block with the most took 600 clocks and none")
    print("overlapped within a warp, ms (an upper end)")
    sizes = "".join(f"{f'{h}x{w}':>11}" for h, w in shapes)
    print(f"{'kernel':28}{'losses':>9}{'tiles':>8}{'mean':>9}{'off':>5}{sizes}{'waits':>7}")
    for name, k in kernels.items():
        ratio, costs = k["sass"] / k["ptx"], k["tile costs"]
        for i, losses in enumerate(sorted({kind[0] for kind, _, _ in costs})):
            at = {tuple(kind[1:]): x for kind, _, x in costs if kind[0] == losses}
            tiles = sum(n for kind, n, _ in costs if kind[0] == losses)
            words = "".join(letter for bit, letter in ((1, "A"), (2, "D"), (4, "L")) if losses & bit)
            row = f"{name if i == 0 else '':28}{words:>9}{tiles:8}"
            row += f"{k['sass'] / k['tiles']:9.0f}{100 * k['tiles off']:4.0f}%" if i == 0 else " " * 14
            row += "".join(f"{at.get(tuple(s), 0) * ratio:11.0f}" for s in shapes)
            print(row + (f"{k['waits of a warp'] * 600 / ghz / 1e6:7.2f}" if i == 0 else ""))


def show_hot_lines(kernels, most):
    """Of kernels whose machine code is known."""
    for name, k in kernels.items():
        if k["by line"]:
            print(f"\n{name}: the lines that execute the most, in millions of warp instructions, and % of the kernel")
            merged = defaultdict(float)
            for chain, n in k["by line"].items():
                merged[chain_text(chain)] += n
            for line, n in sorted(merged.items(), key=lambda x: -x[1])[:most]:
                print(f"{n / 1e6:12.3f} {100 * n / k['sass']:5.1f}%  {line}")


def show_lines(worst, plain, again, most):
    if plain:
        print("\nPlain loads of global memory, executions by each warp of the block with the most; lines with the most")
        for (name, column, chain), n in sorted(plain.items(), key=lambda x: -x[1])[:most]:
            print(f"{n:12.0f}  {name}  column {column}  {chain_text(chain)}")
    print("\nGlobal memory touched again by the same launch, MB (of all that the line moves), sectors a request, bytes")
    print("used; the lines with the most")
    for (name, what, chain), (requests, sectors, used, more) in sorted(again.items(), key=lambda x: -x[1][3])[:most]:
        row = f"{32e-6 * more:10.1f} ({32e-6 * sectors:.1f})  {sectors / max(requests, 1):5.1f}  "
        print(row + f"{100 * used / max(32 * sectors, 1):3.0f}%  {name}  {what}  {chain_text(chain)}")
    print(f"\nThe {most} lines with the most wavefronts beyond the ideal")
    merged = defaultdict(lambda: [0.0, 0.0, 0.0])
    for extra, wave, ideal, name, line, block, chain in worst:
        text = next((t for n, t in block if n == line), "")
        m = merged[name, chain_text(chain), re.sub(r"^@!?%\w+\s+", "", text).split()[0]]
        m[:] = m[0] + extra, m[1] + wave, m[2] + ideal
    for (name, chain, op), (extra, wave, ideal) in sorted(merged.items(), key=lambda x: -x[1][0])[:most]:
        if extra > 0:
            ratio = wave / max(ideal, 1)
            print(f"{extra / 1e6:9.3f} M beyond {ideal / 1e6:8.3f} M ({ratio:.1f}x)  {name}  {op}  {chain}")
