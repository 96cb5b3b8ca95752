"""The recipes of `examples/` as modules, and the benchmarks as commands."""

import importlib.util
import runpy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

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


def as_words(settings: dict[str, Any]) -> list[str]:
    """As they would be typed."""
    return [str(word) for name, value in settings.items() for word in (f"--{name}", value)]


def run_module(name: str, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    """`python -m` of a module of the repository, from its root."""
    monkeypatch.syspath_prepend(str(REPOSITORY))
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
    runpy.run_module(name, run_name="__main__")
