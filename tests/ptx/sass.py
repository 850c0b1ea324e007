"""How often the blocks of a kernel's machine code run, from how often those of its PTX do.

Both know of every instruction the source line and the lines it was inlined at. Instructions that ptxas neither adds nor
drops (loads, stores, copies, matrix products, shuffles, barriers, exponentials) are anchors: over all places of the
machine code that have the same lines and the same kind, executions add up to those of the PTX. Between the blocks of
the machine code, what flows in flows out. Where both cannot be (ptxas merges loads), the sum of absolute differences is
least; blocks without anchors hang on their neighbours and, weakly, on the executions of the PTX at their lines. ptxas's
own unrolling, if-conversion, expanded divisions and address arithmetic are so counted as they are.
"""

import hashlib
import re
import shutil
import subprocess
import sysconfig
from collections import defaultdict
from pathlib import Path

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import bmat, identity, lil_matrix

# Kind of an anchor by opcode of the machine code, and by that of the PTX.
SASS_ANCHORS = [
    (r"LDGSTS", "cp"), (r"LDGDEPBAR", "commit"), (r"LDG\b", "ldg"), (r"STG\b", "stg"), (r"LDSM", "ldmatrix"),
    (r"LDS\b", "lds"), (r"STS\b", "sts"), (r"HMMA", "mma"), (r"SHFL", "shfl"), (r"BAR\.", "bar"),
    (r"MUFU\.(EX2|LG2)", "ex2"), (r"ATOMS", "atoms"), (r"ATOMG|ATOM\b|RED\b", "atomg"), (r"REDUX", "redux"),
    (r"LD\b", "ld"), (r"ST\b", "st"),
]  # fmt: skip
PTX_ANCHORS = [
    (r"cp\.async\.c[ag]", "cp"), (r"cp\.async\.commit", "commit"), (r"ld\.global", "ldg"), (r"st\.global", "stg"),
    (r"ldmatrix", "ldmatrix"), (r"ld\.shared", "lds"), (r"st\.shared", "sts"), (r"mma\.", "mma"), (r"shfl", "shfl"),
    (r"bar\.(sync|red)|barrier", "bar"), (r"(ex2|lg2)\.", "ex2"), (r"atom\.shared", "atoms"),
    (r"atom\.global", "atomg"), (r"redux", "redux"), (r"ld\.(?!param|global|shared)", "ld"),
    (r"st\.(?!param|global|shared)", "st"),
]  # fmt: skip


def kind_of(text, table):
    for pattern, kind in table:
        if re.match(pattern, text):
            return kind
    return None


def ptx_chains(text):
    """PTX line -> chain of (file, line), the innermost first."""
    files = {int(n): Path(p).name for n, p in re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]+)"', text, re.M)}
    chains, now, seen = {}, (), {}
    pattern = re.compile(r"\s*\.loc\s+(\d+)\s+(\d+)\s+(\d+)(?:.*inlined_at\s+(\d+)\s+(\d+)\s+(\d+))?")
    for number, line in enumerate(text.split("\n"), 1):
        if ".loc" in line and (found := pattern.match(line)):
            f, row, c, pf, pl, pc = (int(x) if x else None for x in found.groups())
            chain = ((files.get(f, f), row),)
            if pf is not None:
                chain += seen.get((pf, pl, pc), ((files.get(pf, pf), pl),))
            seen[f, row, c] = chain
            now = chain
        elif ".entry" in line:
            now, seen = (), {}
        chains[number] = now
    return chains


class Code:
    """The machine code of one kernel: blocks of (opcode text, predicated, chain), and edges."""

    def __init__(self, lines):
        self.blocks, self.labels, self.ends = [[]], {}, []
        chain, building, inlined = (), [], False
        targets = []
        for line in lines:
            if found := re.match(r'\s*//## File "([^"]+)", line (\d+)( inlined at)?', line):
                if not inlined:
                    building = []
                building.append((Path(found[1]).name, int(found[2])))
                inlined, chain = found[3] is not None, tuple(building)
            elif found := re.match(r"(\.L_x_\d+|\$__internal_\d+[\w$]*):", line):
                if self.blocks[-1]:
                    self.blocks.append([])
                self.labels[found[1]] = len(self.blocks) - 1
            elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?);", line):
                predicate, op, rest = found.groups()
                self.blocks[-1].append((op, predicate is not None and "PT" not in predicate, chain))
                target = re.search(r"`\(([^)]+)\)", rest)
                if re.match(r"(BRA|EXIT|RET|CALL|BRX|JMP)\b", op):
                    conditional = predicate is not None or re.match(r"BRA\.(DIV|CONV)", op) is not None
                    targets.append((len(self.blocks) - 1, op, conditional, target[1] if target else None))
                    self.blocks.append([])
        if not self.blocks[-1]:
            self.blocks.pop()
        self.edges, self.calls, self.exits = [], [], []
        special = {}
        for block, op, predicated, target in targets:
            special[block] = (op, predicated, target)
        n = len(self.blocks)
        for b in range(n):
            op, predicated, target = special.get(b, (None, False, None))
            # On sm_80 a call of a place within the kernel is a jump.
            if op and (op.startswith("BRA") or (op.startswith("CALL") and str(target).startswith(".L_x"))):
                if target in self.labels:
                    self.edges.append((b, self.labels[target]))
                if predicated and b + 1 < n:
                    self.edges.append((b, b + 1))
            elif op and (op.startswith("EXIT") or op.startswith("RET")):
                self.exits.append(b)
                if predicated and b + 1 < n:
                    self.edges.append((b, b + 1))
            elif op and op.startswith("CALL"):
                if target in self.labels:
                    self.calls.append((b, self.labels[target]))
                if b + 1 < n:
                    self.edges.append((b, b + 1))
            elif b + 1 < n:
                self.edges.append((b, b + 1))
            else:
                self.exits.append(b)


def find_nvdisasm():
    """That on PATH, or that of the package nvidia-cuda-nvdisasm."""
    packages = Path(sysconfig.get_paths()["purelib"]) / "nvidia"
    found = [shutil.which("nvdisasm"), *packages.glob("*/bin/nvdisasm"), *packages.glob("cuda_nvdisasm/bin/nvdisasm")]
    for path in filter(None, found):
        return path
    raise SystemExit("nvdisasm was not found: pip install nvidia-cuda-nvdisasm, or --no-sass")


def disassemble(text, architecture, folder):
    """The machine code of a module of one kernel: lines for Code(), registers, spilled bytes. Kept in the folder."""
    key = hashlib.sha256(f"{architecture} {text}".encode()).hexdigest()[:20]
    cubin, listing, log = (folder / f"sass-{key}{suffix}" for suffix in (".cubin", ".sass", ".log"))
    if not listing.exists():
        ptx = folder / f"sass-{key}.ptx"
        ptx.write_text(text)
        command = ["ptxas", f"-arch=sm_{architecture}", "-lineinfo", "-v", ptx, "-o", cubin]
        said = run(command)[1]
        if warned := re.search(r".*C751\d.*", said):  # that it makes matrix products wait for each other
            raise SystemExit(f"ptxas: {warned[0].strip()}")
        log.write_text(said)
        made = run([find_nvdisasm(), "-gi", "-c", cubin])[0]
        listing.with_suffix(".new").write_text(made)
        listing.with_suffix(".new").replace(listing)
    used = log.read_text()
    spills = sum(int(x) for x in re.findall(r"(\d+) bytes spill", used))
    lines, inside = [], False
    for line in listing.read_text().split("\n"):
        if re.match(r"\s*\.section\s", line):
            inside = ".text." in line
        elif inside:
            lines.append(line)
    return lines, int(re.search(r"Used (\d+) registers", used)[1]), spills


def run(command):
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stderr}")
    return done.stdout, done.stderr


def fit(code, ptx_blocks, executed, chains, warps, tell=False):
    """Executions of each block of the machine code by a warp, the share of anchors' executions that is met."""
    wanted, chain_sum, chain_count = defaultdict(float), defaultdict(float), defaultdict(float)
    for b, instructions in enumerate(ptx_blocks):
        for line, text in instructions:
            chain = chains[line]
            chain_sum[chain] += executed[b]
            chain_count[chain] += 1
            kind = kind_of(re.sub(r"^@!?%\w+\s+", "", text), PTX_ANCHORS)
            if kind:
                wanted[chain, kind] += executed[b]
    have, predicated = defaultdict(lambda: defaultdict(float)), defaultdict(bool)
    n = len(code.blocks)
    guess = np.zeros(n)
    for b, instructions in enumerate(code.blocks):
        means = []
        for op, guarded, chain in instructions:
            if chain in chain_count:
                means.append(chain_sum[chain] / chain_count[chain])
            kind = kind_of(op, SASS_ANCHORS)
            if kind and not (kind == "bar" and "SYNC" not in op and "RED" not in op):
                have[chain, kind][b] += 1
                predicated[chain, kind] |= guarded
        guess[b] = np.median(means) if means else 0
    for ours, theirs in ((1, 0), (0, 1), (1, 1), (2, 2)):  # innermost lines that either side drops
        alone = defaultdict(list)
        for key in [key for key in have if key not in wanted]:
            alone[key[0][theirs:], key[1]].append(key)
        for chain, kind in [key for key in wanted if key not in have]:
            for key in alone[chain[ours:], kind]:
                for block, count in have.pop(key, {}).items():
                    have[chain, kind][block] += count
                predicated[chain, kind] |= predicated[key]
    scale = max(warps, 1)
    guess = guess / scale
    columns = len(code.edges) + len(code.exits)
    into, out = defaultdict(list), defaultdict(list)
    for i, (a, b) in enumerate(code.edges):
        out[a].append(i)
        into[b].append(i)
    for i, b in enumerate(code.exits):
        out[b].append(len(code.edges) + i)
    # What flows in flows out, exactly; a warp enters once.
    equal, right = lil_matrix((n, columns)), np.zeros(n)
    right[0] = -1.0
    for b in range(n):
        for i in into[b]:
            equal[b, i] += 1
        for a, callee in code.calls:
            if callee == b:
                for i in out[a]:
                    equal[b, i] += 1
        for i in out[b]:
            equal[b, i] -= 1
    # Absolute differences, weighted: those of anchors, and a little those of the guess. If ptxas turned a branch into
    # predication, the instruction runs even where the PTX skipped it: a count above the PTX's is not penalized.
    terms = []
    for key, places in have.items():
        if key in wanted:
            target = wanted[key] / scale
            weight = 1 / np.sqrt(target + 0.1 + 0.001 * guess.max())
            terms.append((places, target, weight, 0 if predicated[key] else weight))
    weights = 0.01 / np.sqrt(guess + 0.1 + 0.05 * guess.max())
    terms += [({b: 1.0}, guess[b], weights[b], weights[b]) for b in range(n)]
    m = len(terms)
    equal_terms = lil_matrix((m, columns))
    for r, (places, *_) in enumerate(terms):
        for b, count in places.items():
            for i in out[b]:
                equal_terms[r, i] += count
    _, targets, below, above = zip(*terms)
    system = bmat([[equal.tocsr(), None, None], [equal_terms.tocsr(), identity(m), -identity(m)]], format="csr")
    cost = np.concatenate([np.zeros(columns), below, above])
    flows = np.concatenate([right, targets])
    done = linprog(cost, A_eq=system, b_eq=flows, bounds=(0, None), method="highs")
    if done.x is None:
        raise SystemExit(f"no flow: {done.message}")
    if tell:
        print(done.status, done.message, done.fun)
    solution = done.x[:columns]
    counts = np.array([sum(solution[i] for i in out[b]) for b in range(n)]) * scale
    met = total = 0.0
    for key, places in have.items():
        if key in wanted and not predicated[key]:
            found = sum(counts[b] * c for b, c in places.items())
            met += abs(found - wanted[key])
            total += wanted[key]
            if tell:
                print(f"{found:14.0f} {wanted[key]:14.0f} {key[1]} {key[0]} {dict(places)}")
    missing = sum(v for k, v in wanted.items() if k not in have)
    return counts, {"off": met / max(total, 1), "unmatched": missing / max(sum(wanted.values()), 1)}
