"""Programs that a test starts."""

import os
import subprocess
import sys
from pathlib import Path

import sea_kernels as sk


def run(*arguments, timeout=600, **options):
    """Python with these arguments, in a process that imports the package that this one has imported."""
    path = os.pathsep.join(filter(None, [str(Path(sk.__file__).parent.parent), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path} | options.pop("env", {})
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, **options)
