"""Fixtures and rules that hold for every test."""

import importlib.util
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest


# Before torch is imported anywhere, subprocesses of tests included: the workers of pytest-xdist share the cores instead
# of each starting one thread per core, which makes small operations many times slower. Workers inherit what the process that
# starts them has set, so it passes on whether a number was given from outside.
_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
_given = os.environ.setdefault("HF_EXT_TESTS_THREADS", os.environ.get("OMP_NUM_THREADS", ""))
for _variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_variable] = _given or str(max(1, (os.cpu_count() or 1) // _WORKERS))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# huggingface_hub reads it once, when it is imported. HF_HUB_OFFLINE stays unset: the tests talk to a Hub of their own.
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

if importlib.util.find_spec("hub_fixtures") is not None:
    pytest_plugins = ["hub_fixtures"]

REPOSITORY = Path(__file__).resolve().parent.parent

# Messages with "deprecated" in them that our code can't avoid, each with the reason. A part of the message is enough.
UNAVOIDABLE_DEPRECATIONS: tuple[str, ...] = ()


def _shared_data_folder() -> Path:
    return Path(os.environ.get("HF_EXT_SHARED_DATA", REPOSITORY.parent / "shared" / "data")).resolve()


def _missing_shared_data() -> str | None:
    folder = _shared_data_folder()
    if folder.is_dir():
        return None
    return f"the shared data is not at {folder} (set HF_EXT_SHARED_DATA to its folder)"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of recorded data and small models that is too big for the repository."""
    missing = _missing_shared_data()
    if missing is not None:
        pytest.skip(missing)
    return _shared_data_folder()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = _missing_shared_data()
    for item in items:
        # Whoever uses the fixture can be selected by the marker, and whoever has the marker is skipped like the fixture.
        if "shared_data" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.shared_data)
        elif missing is not None and item.get_closest_marker("shared_data"):
            item.add_marker(pytest.mark.skip(reason=missing))


class _DeprecationRecords(logging.Handler):
    """Collects what a library says about deprecation."""

    def __init__(self) -> None:
        super().__init__(level=logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if "deprecat" in message.lower() and not any(part in message for part in UNAVOIDABLE_DEPRECATIONS):
            self.messages.append(f"{record.pathname}:{record.lineno}: {message}")


@pytest.fixture(autouse=True)
def no_logged_deprecations() -> Iterator[None]:
    """
    Fails a test in which transformers, PEFT or TRL logs a deprecation: they use their loggers where others warn, so that
    pytest's `filterwarnings` does not see it.
    """
    transformers_logging = sys.modules.get("transformers.utils.logging")
    if transformers_logging is not None:
        # Else only the first test of a process that runs into a deprecation would hear of it.
        transformers_logging.warning_once.cache_clear()

    handler = _DeprecationRecords()
    loggers = [logging.getLogger(name) for name in ("transformers", "peft", "trl")]
    for logger in loggers:
        logger.addHandler(handler)
    yield
    for logger in loggers:
        logger.removeHandler(handler)
    if handler.messages:
        pytest.fail("logged as deprecated:\n" + "\n".join(handler.messages), pytrace=False)
