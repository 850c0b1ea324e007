"""Builds sea_kernels/_C.so, one library for every Python and every torch from 2.11 on (torch's stable C++ ABI).

Environment: CXX, CXXFLAGS, LDFLAGS, MAX_JOBS; SEA_KERNELS_CUDA=auto|1|0 (auto: where nvcc >= 12.4 is found), CUDA_HOME,
TORCH_CUDA_ARCH_LIST. Everything else about the package stands in pyproject.toml.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata, util
from pathlib import Path

import setuptools
from setuptools.command.build_ext import build_ext

if int(setuptools.__version__.split(".")[0]) < 77:
    raise SystemExit(f"sea_kernels needs setuptools >= 77 to build; {setuptools.__version__} is installed")

from setuptools.command.bdist_wheel import bdist_wheel

ISA_FLAGS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c", "-mprefer-vector-width=512"],
}
# Machine code runs on later minor versions of its major one. Any other later GPU compiles the PTX of the lowest.
DEFAULT_ARCHITECTURES = ["8.0", "9.0", "10.0", "12.0"]
OLDEST_CUDA = (12, 4)
LAUNCHERS = {"ccache", "sccache", "distcc", "icecc", "buildcache"}  # before the compiler in CXX
COMMA = r"\,"  # nvcc splits the options that it hands on at commas


def fail(reason):
    raise SystemExit(f"sea_kernels {reason}")


def words(name):
    return shlex.split(os.environ.get(name, ""))


def output(*command):
    """What a command prints, or None where it cannot be run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout + done.stderr


def jobs():
    return int(os.environ.get("MAX_JOBS") or len(os.sched_getaffinity(0)))


def find_compiler():
    """The compiler as a list of words, and the machine it compiles for (not always this one)."""
    for candidate in [words("CXX")] if os.environ.get("CXX") else [["g++"], ["c++"], ["clang++"]]:
        if target := output(*candidate, "-dumpmachine"):
            return candidate, target.strip()
    fail(f"needs a C++17 compiler: {os.environ.get('CXX') or 'g++'} cannot be run; install g++ or set CXX")


def for_nvcc(compiler):
    """The flags that make nvcc use that compiler: it takes a program alone, without launchers, and options apart."""
    program = next((i for i, word in enumerate(compiler) if Path(word).name not in LAUNCHERS), len(compiler) - 1)
    options = ["-fPIC", "-fvisibility=hidden", *compiler[program + 1 :]]
    quoted = (shlex.quote(option).replace(",", COMMA) for option in options)  # nvcc hands them to a shell as they are
    return ["-ccbin", compiler[program], *(f"-Xcompiler={option}" for option in quoted)]


def find_torch():
    """Torch's folder and its version; torch itself is not imported."""
    try:
        version = metadata.version("torch")
        folder = Path(util.find_spec("torch").origin).parent
    except (metadata.PackageNotFoundError, AttributeError):
        fail("needs torch >= 2.11 to build, and none is installed: pip install 'torch>=2.11'")
    if tuple(map(int, re.match(r"(\d+)\.(\d+)", version).groups())) < (2, 11):
        fail(f"needs torch >= 2.11, and torch {version} is installed: pip install -U 'torch>=2.11'")
    return folder, version


def find_nvcc(sources):
    """(nvcc, None), or (None, why CUDA is left out)."""
    wanted = os.environ.get("SEA_KERNELS_CUDA") or "auto"
    if wanted not in ("auto", "0", "1"):
        fail(f"reads SEA_KERNELS_CUDA as auto, 1 or 0; it is {wanted!r}")
    if wanted == "0":
        return None, "SEA_KERNELS_CUDA=0 when it was built"
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=os.path.join(home, "bin") if home else None)
    found = nvcc and output(nvcc, "--version")
    if not found:
        why = "nvcc was not found in CUDA_HOME/bin or on PATH"
    elif (release := tuple(map(int, re.search(r"release (\d+)\.(\d+)", found).groups()))) < OLDEST_CUDA:
        why = "nvcc was that of CUDA {}.{}, and {}.{} is needed".format(*release, *OLDEST_CUDA)
    else:
        return (nvcc, None) if sources else (None, "this version has no CUDA kernels")
    if wanted == "1":
        fail(f"was asked for CUDA (SEA_KERNELS_CUDA=1), but {why}")
    return None, f"{why} when it was built (set CUDA_HOME and install again)"


def architectures(nvcc):
    """TORCH_CUDA_ARCH_LIST, or our own list as far as this nvcc knows it, and the -gencode flags that this means."""
    names = re.split(r"[;,\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip())
    if names == [""]:
        known = output(nvcc, "--list-gpu-arch").split()
        names = [a for a in DEFAULT_ARCHITECTURES if f"compute_{a.replace('.', '')}" in known]
        names[0] += "+PTX"
    built, flags = [], []
    for name in names:
        if not (match := re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", name)):
            fail(f"reads TORCH_CUDA_ARCH_LIST as numbers such as '8.0+PTX;9.0a;12.0'; it has {name!r}")
        if int(match[1]) < 8:  # a list made for torch may begin earlier than the kernels can run
            continue
        built.append(name)
        number = match[1] + match[2]
        # PTX takes longer to make than machine code from it, and no kernel needs what came after 9.0.
        arch = "90" if "9.0" in names and int(match[1]) > 9 and not match[3] else number
        for code in ["sm", "compute"] if match[3] else ["sm"]:
            flags.append(f"-gencode=arch=compute_{arch},code={code}_{number}")
    if not built:
        fail(f"has CUDA kernels for compute capability 8.0 and later; TORCH_CUDA_ARCH_LIST is {' '.join(names)!r}")
    return built, flags


def cuda_runtime(nvcc):
    """What to link. The folder is asked of nvcc, which may be a wrapper that lies elsewhere."""
    top = Path(re.search(r"TOP=(.*)", output(nvcc, "--dryrun", "none.o", "-o", "none"))[1])
    libraries = [*top.glob("lib*/libcudart_static.a"), *top.glob("targets/*/lib/libcudart_static.a")]
    if not libraries:
        fail(f"finds no libcudart_static.a under {top}: install the CUDA runtime, or build with SEA_KERNELS_CUDA=0")
    return [f"-L{libraries[0].parent}", "-lcudart_static", "-lrt", "-lpthread", "-ldl"]


def steps(folder):
    """The build as a list of (output, inputs, command); the last one links."""
    compiler, target = find_compiler()
    torch, version = find_torch()
    cuda_sources = sorted(Path("csrc/cuda/ops").glob("*.cu"))
    nvcc, why_no_cuda = find_nvcc(cuda_sources)
    info = {"cuda": None, "architectures": [], "why_no_cuda": why_no_cuda}
    libraries = [f"-L{torch / 'lib'}", "-ltorch_cpu"]
    if nvcc:
        info["cuda"] = re.search(r"release ([\d.]+)", output(nvcc, "--version"))[1]
        info["architectures"], gencode = architectures(nvcc)
        libraries += cuda_runtime(nvcc)

    isas = list(ISA_FLAGS) if target.startswith("x86_64") else ["baseline"]
    base = ["-std=c++17", "-O3", "-Icsrc"]
    cxx = [*compiler, *base, "-fPIC", "-fvisibility=hidden", *["-DSEA_X86"] * (len(isas) > 1)]
    torch_flags = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-isystem", torch / "include"]
    info_flag = "-DSEA_BUILD_INFO=" + json.dumps(json.dumps(info)[1:-1])  # a C string: members of a JSON object
    compiled = []  # (name, source, command)
    for isa in isas:
        command = [*cxx, "-ffp-contract=fast", f"-DSEA_ISA={isa}", *ISA_FLAGS[isa], *words("CXXFLAGS")]
        compiled.append((f"isa_{isa}", Path("csrc/cpu/isa.cpp"), command))
    for source in sorted(Path("csrc/cpu/ops").glob("*.cpp")):
        command = [*cxx, "-ffp-contract=off", *torch_flags, info_flag, *words("CXXFLAGS")]
        compiled.append((f"cpu_{source.stem}", source, command))
    for source in cuda_sources if nvcc else []:
        # one thread for each architecture; compressed, the code takes a tenth of the space
        device = [*gencode, f"--threads={min(jobs(), len(gencode))}", "-Xfatbin=-compress-all"]
        compiled.append(
            (f"cuda_{source.stem}", source, [nvcc, *base, "-DUSE_CUDA", *torch_flags, *device, *for_nvcc(compiler)])
        )

    result = []
    for name, source, command in compiled:
        out = folder / f"{name}.o"
        result.append((out, [source], [*command, "-MD", "-MF", f"{out}.d", "-c", source, "-o", out]))
    objects = [out for out, _, _ in result]
    link = [*compiler, "-shared", *objects, *words("LDFLAGS"), *libraries, "-o", folder / "_C.so"]
    cuda = f"CUDA {info['cuda']} ({' '.join(info['architectures'])})" if nvcc else f"no CUDA: {why_no_cuda}"
    print(f"sea_kernels: CPU ({' '.join(isas)}), {cuda}; torch {version}, {target}", flush=True)
    return [*result, (folder / "_C.so", objects, link)]


def run_all(build, folder):
    """Runs the steps, in parallel; with ninja only those whose sources, headers or flags changed."""
    ninja = shutil.which("ninja", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    build = [(out, inputs, shlex.join(map(str, command))) for out, inputs, command in build]
    folder.mkdir(parents=True, exist_ok=True)
    if ninja and output(ninja, "--version"):
        lines = [f"builddir = {folder}", "rule run", " command = $command", " description = $out"]
        lines += [" depfile = $out.d", " deps = gcc", "rule link", " command = $command", " description = $out"]
        for out, inputs, command in build:
            rule = "link" if out.suffix == ".so" else "run"
            lines += [f"build {out}: {rule} {' '.join(map(str, inputs))}", " command = " + command.replace("$", "$$")]
        (folder / "build.ninja").write_bytes(os.fsencode("\n".join(lines) + "\n"))
        ok = subprocess.run([ninja, "-f", folder / "build.ninja", "-j", str(jobs())]).returncode == 0
    else:
        with ThreadPoolExecutor(jobs()) as pool:
            ok = all(list(pool.map(lambda step: subprocess.run(step[2], shell=True).returncode == 0, build[:-1])))
        ok = ok and subprocess.run(build[-1][2], shell=True).returncode == 0
    if not ok:
        fail("did not compile: the compiler's own words are above")


class BuildLibrary(build_ext):
    def get_ext_filename(self, fullname):  # not a Python module: no ABI tag in its name
        return fullname.replace(".", os.sep) + ".so"

    def build_extension(self, extension):
        folder = Path("build/objects")
        run_all(steps(folder), folder)
        out = Path(self.get_ext_fullpath(extension.name))
        out.parent.mkdir(parents=True, exist_ok=True)
        out.unlink(missing_ok=True)  # never write into a library that a process has mapped
        shutil.copy(folder / "_C.so", out)


class AnyPythonWheel(bdist_wheel):
    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


setuptools.setup(
    ext_modules=[setuptools.Extension("sea_kernels._C", [])],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": AnyPythonWheel},
)
