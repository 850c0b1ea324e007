"""cuda_report.py LIBRARY [ARCHITECTURE...]: what each compiled CUDA kernel takes, read from the machine code itself.

A line for each kernel and architecture: registers; bytes of stack, of stores to and loads from local memory (spilled
registers and arrays), of shared memory (from sm_90 on 1,024 of them are the driver's) and of constants, parameters
included; how many instructions multiply matrices and how many copy 16 bytes from global to shared memory.

Fails, naming the kernel, where
- it has not exactly the ARCHITECTUREs (default: those of setup.py);
- it uses local memory, and does not compute in double;
- it has a trap, as machine code or as PTX: a branch that cannot be taken costs all the same;
- it copies from global to shared memory, but never 16 bytes at once;
- it is one of MATRIX_KERNELS and missing for a type, copies nothing, or multiplies otherwise than that type should.

Needs c++filt and, from PyPI, nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm.
"""

import os
import re
import subprocess
import sys
import sysconfig
from collections import Counter, defaultdict
from pathlib import Path

ARCHITECTURES = ["sm_80", "sm_90", "sm_100", "sm_120", "compute_80"]  # compute: PTX
_MULTIPLY = {  # by a kernel's first template argument: the products that it must have, then others that it may have
    "__nv_bfloat16": ["F32.BF16"],
    "__half": ["F32", "F32.BF16"],  # operands that are computed are bfloat16
    "float": ["F32.TF32"],
}
MATRIX_KERNELS = {
    "distance": _MULTIPLY,
    "distance_few": {kind: _MULTIPLY[kind] for kind in ("__nv_bfloat16", "__half")},
    "distance_backward": _MULTIPLY,
    "distance_backward_few": {"__nv_bfloat16": ["F32", "F32.BF16"], "__half": ["F32"]},
    "distance_backward_some": {"__nv_bfloat16": ["F32", "F32.BF16"], "__half": ["F32"]},
}
TRAPS = []  # kernels and architectures whose PTX has one
COLUMNS = ["registers", "stack", "stored", "loaded", "shared", "constants", "HMMA", "LDGSTS.128"]


def run(*command, text=None):
    try:
        done = subprocess.run(command, input=text, capture_output=True, text=True)
    except FileNotFoundError:
        sys.exit(f"{command[0]} is missing (nvidia-cuda-cuobjdump, nvidia-cuda-nvdisasm; binutils for c++filt)")
    if done.returncode:
        sys.exit(f"{' '.join(command)}: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def dump(library, kind, kernel):
    """Yields each kernel's name, architecture and part of what cuobjdump prints; `kernel` matches where one begins."""
    for image in re.split(r"^Fatbin (?=elf|ptx)", run("cuobjdump", f"--dump-{kind}", library), flags=re.M)[1:]:
        architecture = ("compute_" if image.startswith("ptx") else "sm_") + re.search(r"arch = sm_(\w+)", image)[1]
        parts = re.split(kernel, image, flags=re.M)
        for name, part in zip(parts[1::2], parts[2::2]):
            yield name, architecture, part


def instructions(sass):
    """How often each instruction occurs, by its full name."""
    return Counter(re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@\S+\s+)?([A-Z][\w.]*)", sass, re.M))


def total(count, pattern):
    return sum(number for name, number in count.items() if re.match(pattern, name))


def local_bytes(count, operation):
    """Bytes that instructions LDL or STL move."""
    widths = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
    moved = 0
    for name, number in count.items():
        first, *rest = name.split(".")
        moved += number * next((widths[r] for r in rest if r in widths), 4) if first == operation else 0
    return moved


def measure(library):
    """{kernel: {architecture: a number for each of COLUMNS, and the counted instructions; for PTX None}}."""
    usage = {}
    for name, architecture, part in dump(library, "resource-usage", r"^ Function (\S+):$"):
        usage[name, architecture] = {key: int(n) for key, n in re.findall(r"([A-Z]+(?:\[0\])?):(\d+)", part)}
    found = defaultdict(dict)
    for name, architecture, sass in dump(library, "sass", r"^\s*Function : (\S+)$"):
        used, count = usage[name, architecture], instructions(sass)
        row = [used["REG"], used["STACK"] + used["LOCAL"], local_bytes(count, "STL"), local_bytes(count, "LDL")]
        row += [used["SHARED"], used["CONSTANT[0]"], total(count, "HMMA"), total(count, r"LDGSTS.*\.128")]
        found[name][architecture] = dict(zip(COLUMNS, row)), count
    for name, architecture, ptx in dump(library, "ptx", r"\.entry (\w+)"):
        found[name][architecture] = None
        if re.search(r"\btrap;", ptx):
            TRAPS.append((name, architecture))
    return found


def complaints(name, architecture, row, count):
    _, kernel, kind = re.match(r"(.*::)?(\w+)(?:<([\w ]+))?", name).groups()
    local = [row[column] for column in ("stack", "stored", "loaded")]
    if "double" not in name and any(local):
        yield "{} bytes of stack, {} stored to local memory, {} loaded".format(*local)
    expected = MATRIX_KERNELS.get(kernel, {}).get(kind)
    if total(count, "BPT"):
        yield "has a trap"
    if not row["LDGSTS.128"] and (expected or total(count, "LDGSTS")):
        yield "never copies 16 bytes at once from global to shared memory (LDGSTS.128)"
    products = {found[1] for found in (re.fullmatch(r"HMMA\.\d+\.(.*)", instruction) for instruction in count) if found}
    if expected and not {expected[0]} <= products <= set(expected):
        yield f"matrices are multiplied as {sorted(products)}; expected {expected}"


def main(library, *expected):
    expected = set(expected or ARCHITECTURES)
    packaged = Path(sysconfig.get_path("purelib")).glob("nvidia/*/bin")
    os.environ["PATH"] = os.pathsep.join([*map(str, packaged), os.environ["PATH"]])
    found = measure(library)
    demangled = run("c++filt", text="\n".join(found)).splitlines()
    short = [re.sub(r"^void |sea::|\((?:[^()]|\([^()]*\))*\)$", "", name) for name in demangled]
    wrong = [] if found else [f"{library} holds no CUDA kernel"]
    for kernel, kinds in MATRIX_KERNELS.items():
        for kind in kinds:
            if not any(re.match(rf"(.*::)?{kernel}<{kind}\b", name) for name in short):
                wrong.append(f"{kernel}<{kind}> is missing")
    width = max(map(len, [*short, "bytes"]))
    print(f"{'':{width}}  {'':7}", *(f"{column:>10}" for column in COLUMNS))
    for name, compiled in sorted(zip(short, found.values()), key=lambda pair: pair[0]):
        if set(compiled) != expected:
            wrong.append(f"{name} is compiled for {' '.join(sorted(compiled))}; expected {' '.join(sorted(expected))}")
        for architecture, measured in compiled.items():
            if measured:
                print(f"{name:{width}}  {architecture:7}", *(f"{number:>10}" for number in measured[0].values()))
                wrong += [f"{name} on {architecture}: {what}" for what in complaints(name, architecture, *measured)]
    names = dict(zip(found, short))
    wrong += [f"{names[name]} on {architecture}: has a trap" for name, architecture in TRAPS]
    print(f"{len(found)} kernels, {Path(library).stat().st_size:,} bytes with the CPU's code")
    print("\n".join(wrong), end="\n" if wrong else "")
    return bool(wrong)


sys.exit(main(*sys.argv[1:]) if sys.argv[1:] else __doc__)
