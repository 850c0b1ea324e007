"""What is shipped, what is said where something is missing, and what `python -m sea_kernels` reports."""

import ast
import os
import shutil
import subprocess
import sys
import tarfile
from importlib import metadata
from pathlib import Path

import pytest

import sea_kernels
from sea_kernels.native import library
from sea_kernels.native.schemas import KERNELS

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(sea_kernels.__file__).parent


def run(*arguments, path=None, cwd=None, **environment):
    """Runs Python with PYTHONPATH `path`, in folder `cwd`, else in `path`: there the source tree is not found."""
    environment = {**os.environ, **environment}
    if path is not None:
        environment["PYTHONPATH"], cwd = str(path), cwd or path
    return subprocess.run([sys.executable, *arguments], env=environment, cwd=cwd, capture_output=True, text=True)


def one_line(done):
    """The reason a command failed: one line, after whatever it said of its progress, and no traceback."""
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line and "warn" not in line.lower()]
    return line


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the source tree that may be written into."""
    copy = tmp_path_factory.mktemp("source") / "sea_kernels"
    ignore = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "*.so", "__pycache__")
    shutil.copytree(ROOT, copy, ignore=ignore)
    shutil.copy(ROOT / ".clang-format", copy)
    return copy


@pytest.fixture
def old_torch(tmp_path):
    """A folder for PYTHONPATH in which torch 2.10 seems to be installed."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("__version__ = '2.10.0'\n")
    (tmp_path / "torch-2.10.0.dist-info").mkdir()
    (tmp_path / "torch-2.10.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: torch\nVersion: 2.10.0\n"
    )
    return tmp_path


@pytest.fixture
def without_library(tmp_path):
    """A folder for PYTHONPATH in which the package lies without its compiled library."""
    shutil.copytree(PACKAGE, tmp_path / "sea_kernels", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return tmp_path


def test_sdist_holds_what_builds_and_tests_it(source, tmp_path):
    done = run(
        "-c", "import build_backend as b, sys; b.build_sdist(sys.argv[1])", str(tmp_path), cwd=source, path=source
    )
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    for folder, kinds in {
        "csrc": ("h", "cpp", "cu", "cuh"),
        "sea_kernels": ("py", "typed"),
        "tests": ("py",),
        "benchmarks": ("py", "sh", "cu"),
        "recipes": ("py", "md"),
    }.items():
        wanted = {str(p.relative_to(source)) for kind in kinds for p in (source / folder).rglob(f"*.{kind}")}
        assert wanted <= names
    assert {"setup.py", "pyproject.toml", "build_backend.py", "LICENSE", "README.md", "Makefile"} <= names
    assert not [name for name in names if name.endswith((".so", ".o", ".pyc"))]


def test_wheel_holds_the_package_and_nothing_else():
    try:
        distribution = metadata.distribution("sea_kernels")
    except metadata.PackageNotFoundError:
        pytest.skip("sea_kernels is not installed")
    files = {str(file) for file in distribution.files if file.suffix != ".pyc"}
    if "sea_kernels/__init__.py" not in files:
        pytest.skip("sea_kernels is installed in place")
    code = {str(path.relative_to(ROOT)) for path in (ROOT / "sea_kernels").rglob("*.py")}
    info = {file for file in files if ".dist-info/" in file}
    assert files - info == code | {"sea_kernels/py.typed", "sea_kernels/_C.so"}
    assert any(file.endswith("/LICENSE") for file in info)
    wheel = distribution.read_text("WHEEL")
    assert "Tag: py3-none-linux_" in wheel and "Root-Is-Purelib: false" in wheel
    assert "torch>=2.11" in distribution.requires


def test_no_compiler_is_one_line(source):
    done = run("setup.py", "build_ext", cwd=source, CXX="no-such-compiler")
    assert one_line(done).startswith("sea_kernels needs a C++17 compiler: no-such-compiler cannot be run")


def test_no_nvcc_where_cuda_is_demanded_is_one_line(source):
    done = run("setup.py", "build_ext", cwd=source, SEA_KERNELS_CUDA="1", CUDA_HOME="/nonexistent")
    assert "SEA_KERNELS_CUDA=1" in (line := one_line(done)) and "nvcc" in line


def ask_setup(source, question, **environment):
    """What a function of setup.py returns."""
    code = f"import sys; sys.argv = ['setup.py', '--name']; import setup; print(setup.{question})"
    done = run("-c", code, cwd=source, **environment)
    return done if done.returncode else done.stdout.splitlines()[-1]


@pytest.fixture
def fake_nvcc(tmp_path):
    """Writes an nvcc that says it is of a release and knows some architectures."""

    def write(release, known=""):
        (tmp_path / "bin").mkdir()
        nvcc = tmp_path / "bin" / "nvcc"
        known = " ".join(f"compute_{number}" for number in known.split())
        nvcc.write_text(
            f'#!/bin/sh\n[ "$1" = --version ] && echo "release {release}, V{release}.1" || echo "{known}"\n'
        )
        nvcc.chmod(0o755)
        return nvcc

    return write


def test_old_nvcc_is_one_line(source, fake_nvcc):
    home = str(fake_nvcc("12.3").parents[1])
    line = one_line(run("setup.py", "build_ext", cwd=source, SEA_KERNELS_CUDA="1", CUDA_HOME=home))
    assert "SEA_KERNELS_CUDA=1" in line and "12.3" in line and "12.4" in line
    nothing, why = ast.literal_eval(ask_setup(source, "find_nvcc(['a.cu'])", SEA_KERNELS_CUDA="auto", CUDA_HOME=home))
    assert nothing is None and "12.3" in why and "12.4" in why


def test_an_nvcc_that_is_new_enough_is_taken(source, fake_nvcc):
    nvcc = fake_nvcc("12.4")
    found = ask_setup(source, "find_nvcc(['a.cu'])", SEA_KERNELS_CUDA="auto", CUDA_HOME=str(nvcc.parents[1]))
    assert ast.literal_eval(found) == (str(nvcc), None)


@pytest.mark.parametrize(
    ("cxx", "program", "options"),
    [
        ("g++", "g++", []),
        ("g++ -m64 -pthread", "g++", ["-m64", "-pthread"]),
        ("ccache g++", "g++", []),
        ("/opt/bin/sccache distcc 'a b/clang++' -Wl,-x", "a b/clang++", [r"-Wl\,-x"]),
        ("g++ -isystem 'a b'", "g++", ["-isystem", "'a b'"]),
        ("ccache", "ccache", []),  # a link of that name to the compiler's launcher
    ],
)
def test_nvcc_gets_the_compiler_without_launchers_and_its_options_apart(source, cxx, program, options):
    ccbin, found, *rest = ast.literal_eval(ask_setup(source, "for_nvcc(setup.words('CXX'))", CXX=cxx))
    assert (ccbin, found) == ("-ccbin", program)
    assert rest == [f"-Xcompiler={x}" for x in ["-fPIC", "-fvisibility=hidden", *options]]


def test_a_build_in_a_folder_with_blanks_and_other_letters(tmp_path, source):
    """With ninja, which runs again what changed, and without; in a locale that knows no such letters too."""
    folder = tmp_path / "Quelle ü $1" / "a b"
    folder.mkdir(parents=True)
    shutil.copy(source / "setup.py", folder)
    (folder / "x.h").write_text("#define X 1")
    (folder / "x.c").write_text("#include <x.h>\nint main(void) { return TEXT[0] - 'b' + X - 1; }")
    code = """
import sys; sys.argv = ["setup.py", "--name"]
import setup; from pathlib import Path
here, out = Path.cwd(), Path("build/objects")
flags = ["-isystem", here, f'-DTEXT="{here.name[2:]}"', "-MD", "-MF", "build/objects/x.o.d"]
compile = ["g++", *flags, "-c", "x.c", "-o", "build/objects/x.o"]
link = ["g++", "build/objects/x.o", "-o", "build/objects/x.so"]
setup.run_all([(out / "x.o", [Path("x.c")], compile), (out / "x.so", [out / "x.o"], link)], out)
"""
    for locale in ("C.UTF-8", "POSIX"):
        done = run("-c", code, cwd=folder, LC_ALL=locale, PYTHONCOERCECLOCALE="0", PYTHONUTF8="0")
        assert done.returncode == 0, done.stderr
        assert subprocess.run([folder / "build" / "objects" / "x.so"]).returncode == 0
    (folder / "x.h").write_text("#define X 3")
    if "ninja" in done.stdout:
        assert "no work to do" in done.stdout
        run("-c", code, cwd=folder)
        assert subprocess.run([folder / "build" / "objects" / "x.so"]).returncode == 2


@pytest.mark.parametrize(
    ("wish", "known", "names"),
    [
        ("", "75 80 86 87 89 90 100 103 110 120 121", "8.0+PTX 9.0 10.0 12.0"),
        ("", "50 80 90", "8.0+PTX 9.0"),
        ("", "90 100 120 130", "9.0+PTX 10.0 12.0"),
        ("8.6;9.0a", "80", "8.6 9.0a"),
        ("7.0 7.5 8.0 9.0+PTX", "80", "8.0 9.0+PTX"),  # the kernels need 8.0
    ],
)
def test_gpu_architectures_that_are_built(source, fake_nvcc, wish, known, names):
    nvcc = str(fake_nvcc("13.0", known))
    built, flags = ast.literal_eval(ask_setup(source, f"architectures({nvcc!r})", TORCH_CUDA_ARCH_LIST=wish))
    assert built == names.split()
    codes = [f"sm_{name.partition('+')[0].replace('.', '')}" for name in built]
    codes += [f"compute_{name.partition('+')[0].replace('.', '')}" for name in built if name.endswith("+PTX")]
    assert sorted(flag.rpartition("=")[2] for flag in flags) == sorted(codes)


@pytest.mark.parametrize("wish", ["7.5", "Ampere"])
def test_wrong_architectures_are_one_line(source, fake_nvcc, wish):
    nvcc = str(fake_nvcc("13.0"))
    line = one_line(ask_setup(source, f"architectures({nvcc!r})", TORCH_CUDA_ARCH_LIST=wish))
    assert "TORCH_CUDA_ARCH_LIST" in line and repr(wish) in line


def test_wrong_cuda_switch_is_one_line(source):
    assert "'yes'" in one_line(run("setup.py", "build_ext", cwd=source, SEA_KERNELS_CUDA="yes"))


def test_compile_error_is_named(source, tmp_path):
    broken = shutil.copytree(source, tmp_path / "broken")
    for file in (broken / "csrc" / "cpu").rglob("*.cpp"):
        file.write_text("this is not C++\n")
    done = run("setup.py", "build_ext", cwd=broken, SEA_KERNELS_CUDA="0")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("sea_kernels did not compile")


def test_old_torch_at_build_is_one_line(source, old_torch):
    line = one_line(run("setup.py", "build_ext", cwd=source, path=old_torch))
    assert "torch >= 2.11" in line and "2.10.0" in line


def test_backend_asks_only_for_what_is_missing(source, old_torch):
    ask = "import build_backend as b; print(b.get_requires_for_build_wheel(), b.get_requires_for_build_sdist())"
    assert run("-c", ask, cwd=source, path=source).stdout == "[] []\n"
    assert run("-c", ask, cwd=source, path=f"{source}{os.pathsep}{old_torch}").stdout == "['torch>=2.11'] []\n"


def test_old_torch_at_import_is_said():
    done = run("-c", "import torch; torch.__version__ = '2.10.0'; import sea_kernels", path=PACKAGE.parent)
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ImportError") and "torch >= 2.11" in last and "2.10.0" in last


def test_missing_library_says_why_and_the_reference_works(without_library):
    code = """
import torch, sea_kernels as sk
assert "_C.so" in sk.native.library.LIBRARY_ERROR, sk.native.library.LIBRARY_ERROR
boxes, labels = [torch.tensor([[0.0, 0.0, 32.0, 32.0]])], [torch.tensor([1])]
maps = [torch.randn(1, 4, 8, 8)]
try:
    sk.Regions.from_boxes(boxes, labels, [(8, 8)], [8])
except RuntimeError as error:
    assert "_C.so" in str(error) and 'backend("reference")' in str(error), error
else:
    raise AssertionError("no error")
with sk.backend("reference"):
    regions = sk.Regions.from_boxes(boxes, labels, [(8, 8)], [8])
    assert sk.anchor_loss(maps, [2 * maps[0]], regions).isfinite()
"""
    done = run("-c", code, path=without_library)
    assert done.returncode == 0, done.stderr


def test_report_without_a_library(without_library):
    done = run("-m", "sea_kernels", path=without_library)
    assert done.returncode == 0 and "not loaded" in done.stdout, done.stderr


def test_the_report_names_every_operator():
    done = run("-m", "sea_kernels", path=PACKAGE.parent)
    assert done.returncode == 0, done.stderr
    for word in (*KERNELS, "torch", "loaded", "CUDA", library.build_info()["cpu_in_use"]):
        assert word in done.stdout
    # Everything is there for the CPU.
    for operator in KERNELS:
        assert library.has_kernel(operator, "CPU"), operator
