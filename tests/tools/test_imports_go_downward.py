"""Each module of the package imports only modules that stand below it."""

import ast
from pathlib import Path

import sea_kernels

PACKAGE = Path(sea_kernels.__file__).parent
# From the bottom to the top. A module may import those of lines above its own, and of its own line what stands to its
# left. The backends stand above the losses: they register themselves in `backends`, where the losses find them.
ORDER = """
    checks backends compiling group
    boxes segmentations coco regions
    losses
    reference.raster reference.losses reference
    native.schemas native.library native.saved native.autograd native
    taps
    distill.schedule distill.adapters distill.calibration distill.recorder distill.torchvision distill.mmdet
    distill.distiller distill
    plot page pictures ground_truth mmdet ultralytics transformers
    __init__ __main__
""".split()


def name_of(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


def imports_of(path):
    """The modules of the package that a file imports, anywhere in it."""
    parts = list(path.relative_to(PACKAGE).with_suffix("").parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom) or node.level == 0:
            continue
        base = parts[: len(parts) - node.level + 1] + (node.module.split(".") if node.module else [])
        for alias in node.names:
            whole = ".".join([*base, alias.name])
            yield whole if whole in ORDER else ".".join(base) or "__init__"


def test_imports_go_downward():
    files = {name_of(path): path for path in PACKAGE.rglob("*.py")}
    assert sorted(files) == sorted(ORDER)
    for name, path in files.items():
        for imported in imports_of(path):
            assert ORDER.index(imported) < ORDER.index(name), f"{name} imports {imported}"
            # importing a module runs its package first: that must not lead back to the importing module
            package = imported.partition(".")[0]
            if package in ORDER and package != name.partition(".")[0]:
                assert ORDER.index(package) < ORDER.index(name), f"{name} imports {imported}, and with it {package}"
