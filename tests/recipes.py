"""The recipes of `examples/` as modules."""

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import pytest

from conftest import REPOSITORY


@contextmanager
def imported_recipe(name: str) -> Iterator[ModuleType]:
    """A script of `examples/`, not run."""
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        # A checkpoint has the arguments in it, which pickle looks for where they were defined.
        patch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        yield module
