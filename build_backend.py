"""PEP 517 backend: setuptools, run against the torch that is already installed.

With build isolation pip hides the target environment's packages, so torch (gigabytes) would be fetched again, or not be
found at all offline. This backend puts them back at the end of the path and asks only for what is missing or too old.
"""

import re
import site
import sys
from importlib import metadata

for folder in [*site.getsitepackages(), *[site.getusersitepackages()] * (sys.prefix == sys.base_prefix)]:
    site.addsitedir(folder)

NEEDED = {"setuptools": (77, 0), "torch": (2, 11)}


def _missing():
    for name, oldest in NEEDED.items():
        try:
            version = tuple(map(int, re.match(r"(\d+)\.(\d+)", metadata.version(name)).groups()))
        except metadata.PackageNotFoundError:
            version = (0, 0)
        if version < oldest:
            yield f"{name}>={oldest[0]}.{oldest[1]}"


def get_requires_for_build_wheel(config_settings=None):
    return list(_missing())


def get_requires_for_build_sdist(config_settings=None):
    return [requirement for requirement in _missing() if requirement.startswith("setuptools")]


def _hand_on(name):
    def hook(*arguments):
        from setuptools import build_meta  # imported late: by now it is installed if it was missing

        return getattr(build_meta, name)(*arguments)

    return hook


get_requires_for_build_editable = get_requires_for_build_wheel
build_sdist = _hand_on("build_sdist")
build_wheel = _hand_on("build_wheel")
build_editable = _hand_on("build_editable")
prepare_metadata_for_build_wheel = _hand_on("prepare_metadata_for_build_wheel")
prepare_metadata_for_build_editable = _hand_on("prepare_metadata_for_build_editable")
