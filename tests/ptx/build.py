"""Builds the CUDA operators of csrc/cuda/ops with the PTX that nvcc makes of their kernels, translated to C++."""

import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from emulator.build import CSRC, BuildError, _pybind11, only_dtypes

from . import translate

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CACHE = Path(os.environ.get("SEA_KERNELS_PTX_CACHE", ROOT / "build" / "ptx"))

HOST = ["-fPIC", "-fvisibility=hidden", "-fno-gnu-unique"]
TRANSLATED = ["-std=c++17", *HOST, "-fwrapv", "-fno-strict-aliasing", "-ffp-contract=off", "-mavx2", "-mfma"]


def load(architecture=90, sources=None, count=False, dtypes=None, kernels=None, contract=False, tell=None):
    """The module `operators`, as tests/emulator/operators.py installs it; module.kernels: {mangled name: its PTX}.

    sources: names of some of the files in csrc/cuda/ops (default: all)
    count: what the kernels execute is counted; others run faster
    dtypes: only kernels for maps of these, and for boxes of float32
    kernels: {a file in csrc/cuda/ops: names of those of its kernels that are wanted, such as "pool"}; a launch of
        another one is an error, or does nothing (ptxrun_count)
    contract: additions and multiplications are fused wherever ptxas may
    tell: called with a line of text when a step begins or ends
    """
    if shutil.which("nvcc") is None:
        raise BuildError("the kernels' PTX is made by nvcc, which is not on PATH")
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        build = Build(architecture, count, contract, tell or (lambda text: None))
        library, texts = build.run(sources, dtypes, kernels)
    # pybind11 gives the same module again for the same name.
    spec = importlib.util.spec_from_file_location(f"{library.stem}.operators", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.kernels, module.library = texts, library
    return module


class Build:
    def __init__(self, architecture, count, contract, tell):
        self.architecture, self.count, self.contract, self.tell = architecture, count, contract, tell

    def run(self, sources, dtypes, kernels):
        """The library, and the PTX of its kernels."""
        import torch

        installed = Path(torch.__file__).parent
        defines = [f"-DPTX_ARCHITECTURE={self.architecture}"]
        torch_flags = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-isystem", f"{installed}/include"]
        csrc = [f"-I{folder}" for folder in ([self.overlay(dtypes)] if dtypes else []) + [CSRC]]
        units = sorted(Path(csrc[0][2:]).glob("cuda/ops/*.cu"))
        units = [unit for unit in units if sources is None or unit.stem in sources]
        nvcc = ["nvcc", "-std=c++17", "-O3", "-lineinfo", *defines, f"-I{HERE}", *csrc, *torch_flags]
        nvcc += [
            f"-arch=compute_{self.architecture}",
            f"-code=compute_{self.architecture}",
            "-Xcompiler",
            ",".join(HOST),
        ]
        version = output(["nvcc", "--version"])
        python = [f"-I{sysconfig.get_paths()['include']}", f"-I{_pybind11()}"]
        counting = ["-DPTXRUN_COUNT"] if self.count else []
        plain = ["g++", *TRANSLATED, *defines, *counting, f"-I{HERE}"]
        host = ["nvcc", "-std=c++17", *defines, *counting, "-Xcompiler", ",".join([*HOST, "-O0"]), f"-I{HERE}"]
        host += [f"-I{CSRC}", *torch_flags, *python]
        runtime = [
            HERE / "ptxrun.cpp",
            HERE.parent / "emulator" / "memory.cpp",
            *([HERE / "ptxcount.cpp"] * self.count),
        ]

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            compiled = [pool.submit(self.unit, unit, nvcc, version) for unit in units]
            objects = [pool.submit(self.object, source, [*plain, "-O2", "-Wall"]) for source in runtime]
            bind = HERE.parent / "emulator" / "operators.cpp"
            objects.append(pool.submit(self.object, bind, host))
            texts = {}
            known = set()
            for unit, future in zip(units, compiled):
                wanted = kernels and kernels.get(unit.stem)
                for name, text in translate.split(future.result()[1].read_text()).items():
                    known.add(short_name(name))
                    if wanted is None or short_name(name) in wanted:
                        texts[name] = text
            if unknown := set().union(*(kernels or {}).values()) - known:
                raise BuildError(f"there is no kernel {', '.join(unknown)}: {', '.join(sorted(known))}")
            objects += [pool.submit(self.kernel, name, text, plain) for name, text in texts.items()]
            objects = [str(future.result()) for future in objects] + [str(future.result()[0]) for future in compiled]
        library = CACHE / f"operators-{digest(*objects)}.so"
        if not library.exists():
            link = ["-Wl,--as-needed", f"-L{installed}/lib", "-ltorch_cpu"]
            link += ["-Wl,-Bsymbolic", "-Wl,--no-undefined-version"]
            made = library.with_suffix(".new")
            output(["g++", "-shared", *objects, *link, "-o", str(made)])
            missing = [x for x in output(["nm", "-u", str(made)]).split() if re.match("_*cuda", x)]
            if missing:
                raise BuildError(f"the CUDA runtime in ptxrun.cpp lacks {' '.join(missing)}")
            made.replace(library)
        return library, texts

    def overlay(self, dtypes):
        """A folder with those files of csrc that choose dtypes, without the dtypes that are not wanted."""
        folder = CACHE / f"csrc-{'-'.join(sorted(dtypes))}"
        for file, text in only_dtypes(dtypes):
            target = folder / file
            if not target.exists() or target.read_text() != text:
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text(text)
        return folder

    def cached(self, name, suffixes, key, make, depends=None):
        """Paths of what make() made of the same key and, where it writes them down, of the same files."""
        list_of = CACHE / f"{name}-{digest(*key)}.d"
        depends = depends or (list_of.read_text().split("\n") if list_of.exists() else [])
        content = [Path(file).read_text() for file in depends if Path(file).exists()]
        paths = [CACHE / f"{name}-{digest(*key, *content)}{suffix}" for suffix in suffixes]
        if content and all(path.exists() for path in paths):
            return paths
        start = time.monotonic()
        with tempfile.TemporaryDirectory(dir=CACHE) as work:
            made = make(Path(work))
            if (Path(work) / "depends").exists():
                words = (Path(work) / "depends").read_text().replace("\\\n", " ").split()
                files = {Path(word).resolve() for word in words if "/" in word}
                own = sorted(str(f) for f in files if ROOT in f.parents and Path(work) not in f.parents and f.is_file())
                list_of.write_text("\n".join(own))
                content = [Path(file).read_text() for file in own]
            paths = [CACHE / f"{name}-{digest(*key, *content)}{suffix}" for suffix in suffixes]
            for file, path in zip(made, paths):
                file.replace(path)
        self.tell(f"{name}: {time.monotonic() - start:.0f} s")
        return paths

    def unit(self, source, nvcc, version):
        """The host's code of a file of operators, and the PTX of its kernels."""

        def make(work):
            files = ["-MD", "-MF", work / "depends", "--keep", "--keep-dir", work]
            output([*nvcc, *files, "-c", source, "-o", work / "unit.o"])
            return work / "unit.o", work / f"{source.stem}.ptx"

        return self.cached(source.stem, (".o", ".ptx"), [*map(str, nvcc), str(source), version], make)

    def object(self, source, command):
        def make(work):
            output([*command, "-MD", "-MF", work / "depends", "-c", source, "-o", work / "made.o"])
            return [work / "made.o"]

        return self.cached(source.stem, (".o",), [*map(str, command), str(source)], make)[0]

    def kernel(self, name, text, command):
        """The object file of a kernel, translated."""
        code, _ = translate.translate(text, self.count, self.contract)

        def make(work):
            (work / "kernel.cpp").write_text(code)
            # Tests run little of kernels that take long to compile.
            output([*command, "-O1" if self.count else "-O0", "-w", "-c", work / "kernel.cpp", "-o", work / "made.o"])
            return [work / "made.o"]

        headers = [HERE / "ptxrun.h", HERE / "ptxcount.h", HERE / "runtime.h"]
        return self.cached(short_name(name), (".o",), [*map(str, command), self.count, code], make, headers)[0]


def short_name(mangled):
    """pool of _ZN3sea4poolI13__nv_bfloat16EEv..."""
    name, rest = mangled, mangled[3:] if mangled.startswith("_ZN") else mangled[2:]
    while found := re.match(r"(\d+)", rest):
        begin, count = len(found[1]), int(found[1])
        name, rest = rest[begin : begin + count], rest[begin + count :]
    return name


def output(command):
    done = subprocess.run([str(word) for word in command], text=True, capture_output=True)
    if done.returncode:
        raise BuildError(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    if done.stderr:
        sys.stderr.write(done.stderr)
    return done.stdout


def digest(*parts):
    out = hashlib.sha256()
    for part in parts:
        out.update(str(part).encode() + b"\0")
    return out.hexdigest()[:20]
