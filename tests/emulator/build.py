"""Compiles kernels for the emulator with g++ and imports them as a Python module."""

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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
CSRC = HERE.parent.parent / "csrc"
CACHE = Path(os.environ.get("SEA_KERNELS_EMULATOR_CACHE", HERE.parent.parent / "build" / "emulator"))

SUFFIXES = (".h", ".cuh", ".cpp", ".cu")
TYPES = {"float32": "float", "float64": "double", "float16": "__half", "bfloat16": "__nv_bfloat16"}

FLAGS = [
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
    "-std=c++17",
    "-O1",
    "-g1",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-gnu-unique",
    "-ffp-contract=off",
]
FLAGS += ["-Wall", "-Wno-unknown-pragmas", "-Werror=return-type"]
# emulator.cpp is the runtime of these; vptr is for classes alone. A float beyond an int's range saturates on the GPU.
FLAGS += ["-fsanitize=undefined,float-cast-overflow", "-fno-sanitize=vptr"]

THREADS = ["-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0"]  # races.cpp is the runtime


class BuildError(RuntimeError):
    pass


def missing():
    """What has to be installed before anything can be built; empty where nothing has."""
    try:
        _pybind11()
        _require_compiler()
    except BuildError as error:
        return str(error)
    return ""


def sanitizer_environment():
    """Variables that a Python process needs in which a module built with sanitize=True can be loaded."""
    # libstdc++ beside libasan: without it, every C++ exception ends the process.
    libraries = [_run(["g++", f"-print-file-name={name}"]).strip() for name in ("libasan.so", "libstdc++.so.6")]
    return {"LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0"}


def load(name, sources, sanitize=False, defines=(), edits=None, races=False, plain=(), dtypes=None):
    """The Python module `name` (PYBIND11_MODULE(name, ...)), built from sources: names in tests/emulator, or paths.

    edits: [(file in csrc, old, new)], applied to a copy of csrc; each `old` has to occur in its file exactly once.
    sanitize: with AddressSanitizer; the process needs sanitizer_environment(). Undefined behavior is always checked.
    races: with the detector of races (slower); not together with sanitize.
    plain: more sources, without kernels, which nothing has to watch.
    dtypes: only kernels for maps of these, and for boxes of float32 (of float64 too if it is among them).
    """
    if sanitize and "libasan" not in os.environ.get("LD_PRELOAD", ""):
        raise BuildError("sanitize=True needs a process started with build.sanitizer_environment()")
    import torch  # and with it the library that modules are linked to

    installed = Path(torch.__file__).parent
    includes = [f"-I{sysconfig.get_paths()['include']}", f"-I{_pybind11()}", "-isystem", f"{installed}/include"]
    flags = FLAGS + [f"-D{define}" for define in defines]
    flags += ["-fsanitize=address", "-fno-omit-frame-pointer"] if sanitize else []
    flags += ["-DRACES"] if races else []
    sources = [HERE / source for source in sources]
    runtime = [HERE / f"{name}.cpp" for name in ["emulator", "memory", *(["races"] if races else [])]]
    content = [*map(str, sources + runtime), *plain, *flags, *includes, repr(edits), repr(dtypes), sys.version]
    for file in sorted(p for folder in (CSRC, HERE) for p in folder.rglob("*") if p.suffix in SUFFIXES):
        content += [str(file), file.read_text()]
    library = CACHE / f"{name}-{_hash(*content)}.so"
    if not library.exists():
        _require_compiler()
        CACHE.mkdir(parents=True, exist_ok=True)
        unchecked = ["-fno-sanitize=undefined,float-cast-overflow"]
        jobs = [(source, flags + (THREADS if races else [])) for source in sources]
        jobs += [(HERE / source, [*flags, *unchecked, "-O0"]) for source in plain]
        jobs += [(source, [*flags, *unchecked, "-O3"]) for source in runtime]
        link = ["-fsanitize=address"] if sanitize else []
        link += [
            "-lboost_context",
            "-Wl,--as-needed",
            f"-L{installed}/lib",
            "-ltorch_cpu",
            "-Wl,--no-undefined-version",
        ]
        with open(CACHE / "lock", "w") as lock:  # of several processes that want the same, one compiles it
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not library.exists():
                _build(library, jobs, includes, link, edits, dtypes)
    # pybind11 gives the same module again for the same name.
    spec = importlib.util.spec_from_file_location(f"{library.stem}.{name}", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def only_dtypes(dtypes):
    """Files in csrc, and their texts without the kernels for maps of other dtypes, and for boxes of float64."""
    for file in [CSRC / "tensors.h", *(CSRC / "cuda" / "ops").iterdir()]:
        text = file.read_text()
        if "float64" not in dtypes:
            text = text.replace("any_double ? f(double()) : f(float())", "f(float())")
        for dtype, held in TYPES.items():
            if dtype not in dtypes and CSRC / "cuda" in file.parents:
                text = text.replace(f"return f({held}())", 'throw std::runtime_error("built without this dtype")')
                text = re.sub(rf"^template .*<{held}>;\n", "", text, flags=re.M)
        yield file.relative_to(CSRC), text


def _build(library, jobs, includes, link, edits, dtypes):
    """jobs: (source, its flags)"""
    with tempfile.TemporaryDirectory(dir=CACHE) as work:
        csrc = _edited(Path(work), edits or [], dtypes) if edits or dtypes else CSRC
        includes = [*includes, f"-I{HERE}", f"-I{csrc}"]

        def compile_one(job):
            source, flags = job
            if CSRC in source.parents:
                source = csrc / source.relative_to(CSRC)
            return _object(source, flags + includes, csrc, Path(work))

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, jobs))
        made = Path(work) / "module.so"
        _run(["g++", "-shared", *map(str, objects), *link, "-o", str(made)])
        made.replace(library)


def _object(source, flags, csrc, work):
    """The object file, from the cache where the preprocessed text is the same: an edit compiles what it touches."""
    text = _run(["g++", *flags, "-x", "c++", "-E", str(source)]).replace(str(csrc), str(CSRC))
    kept = [flag for flag in flags if not flag.startswith("-I")]
    target = CACHE / f"{source.stem}-{_hash(text, *kept)}.o"
    if not target.exists():
        made = work / target.name
        _run(["g++", *flags, "-x", "c++", "-c", str(source), "-o", str(made)])
        made.replace(target)
    return target


def _edited(work, edits, dtypes):
    csrc = Path(shutil.copytree(CSRC, work / "csrc"))
    for file, text in only_dtypes(dtypes) if dtypes else []:
        (csrc / file).write_text(text)
    for file, old, new in edits:
        text = (csrc / file).read_text()
        if text.count(old) != 1:
            raise BuildError(f"{file} has {text.count(old)} times, not once: {old!r}")
        (csrc / file).write_text(text.replace(old, new))
    return csrc


def _pybind11():
    try:
        import pybind11
    except ImportError:
        raise BuildError("the emulator needs pybind11: pip install pybind11") from None
    return pybind11.get_include()


def _require_compiler():
    if shutil.which("g++") is None:
        raise BuildError("the emulator needs g++: apt-get install g++")
    if sys.platform != "linux" or os.uname().machine != "x86_64":
        raise BuildError(f"the emulator runs on x86-64 Linux, not on {sys.platform} {os.uname().machine}")
    header = "#include <boost/context/detail/fcontext.hpp>"
    if subprocess.run(
        ["g++", "-x", "c++", "-fsyntax-only", "-"], input=header, text=True, capture_output=True
    ).returncode:
        raise BuildError("the emulator needs Boost.Context: apt-get install libboost-context-dev")


def _run(command):
    done = subprocess.run(command, text=True, capture_output=True)
    if done.returncode:
        raise BuildError(f"{' '.join(command)}\n{done.stderr}")
    if done.stderr:
        sys.stderr.write(done.stderr)
    return done.stdout


def _hash(*parts):
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:20]
