"""The examples in the docstrings of the public modules, as they stand there."""

import doctest
import importlib
import pkgutil

import pytest

import sea_kernels as sk


def modules():
    """Every module of the package that can be imported: mmdet.py and its like need what they serve."""
    for module in pkgutil.walk_packages(sk.__path__, "sea_kernels."):
        if not module.name.endswith("__main__"):
            try:
                yield importlib.import_module(module.name)
            except ImportError:
                pass


def examples():
    finder = doctest.DocTestFinder(exclude_empty=True)
    found = [test for module in (sk, *modules()) for test in finder.find(module) if test.examples]
    return {test.name: test for test in found}


@pytest.mark.parametrize("test", examples().values(), ids=examples())
def test_the_example_of(test):
    """Of a function that is imported into the package's own namespace, its module has the example."""
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    said = []
    runner.run(test, out=said.append)
    assert not runner.failures, "".join(said)
