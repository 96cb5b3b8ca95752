"""The `hub` fixture: a Hugging Face Hub on 127.0.0.1, and fresh Python processes that talk to it."""

import json
import os
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from hub_http import Request
from hub_server import HubServer


# Whatever the machine is set up for (another cache, a saved token, offline mode, a proxy), client code must not see it.
FOREIGN_SETTINGS = ("HF_", "HUGGING", "TRANSFORMERS_", "PYTHONWARNINGS")
# Deprecated calls are errors, but for one that huggingface_hub makes itself each time it uploads a file to plain LFS.
WARNINGS = ("-W", "error::DeprecationWarning", "-W", "ignore:Use 'content=<...>' to upload raw:DeprecationWarning")


class Hub:
    """
    The view that tests have of a [`HubServer`].

    `huggingface_hub` reads `HF_ENDPOINT` once, when it is imported, so client code cannot run in the process of the
    tests: [`~Hub.run_python`] runs it in one of its own.

    Attributes:
        endpoint (`str`): URL of the Hub.
        user (`str`): Owner of the repositories that tests push; client code is logged in as this user.
        token (`str`): Token of `user`.
        stranger_token (`str`): Token of another user, who may not write to `user`'s repositories.
        server (`HubServer`): The server itself.

    Example:
        ```python
        >>> hub.run_python("from huggingface_hub import create_repo; create_repo('tester/empty')")
        >>> hub.files("tester/empty").keys()
        dict_keys(['.gitattributes'])
        ```
    """

    def __init__(self, server: HubServer):
        self.server = server
        self.endpoint = server.endpoint
        (self.user, self.token), (_, self.stranger_token) = server.tokens.items()

    def environment(self, home: str | os.PathLike[str], token: str | None = None) -> dict[str, str]:
        """
        Environment variables for a process that has this Hub for its only one.

        Args:
            home (`str` or `os.PathLike`): Value of `HF_HOME`, where downloads are cached.
            token (`str`, *optional*): Token to log in with, by default the one of `user`; `""` for an anonymous client.
        """
        env = {name: value for name, value in os.environ.items() if not name.upper().startswith(FOREIGN_SETTINGS)}
        env = {name: value for name, value in env.items() if not name.upper().endswith("_PROXY")}
        # The checkout comes first, so that client code imports the package under test even where it is not installed.
        paths = [str(Path(__file__).resolve().parents[1]), env.get("PYTHONPATH", "")]
        return {
            **env,
            "HF_ENDPOINT": self.endpoint,
            "HF_TOKEN": self.token if token is None else token,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        }

    def run_python(
        self,
        code: str,
        *args: str,
        token: str | None = None,
        home: str | os.PathLike[str] | None = None,
        timeout: float = 120.0,
    ) -> subprocess.CompletedProcess[str]:
        """
        Run client code in a fresh Python process, where a `DeprecationWarning` is an error.

        The process works in a folder of its own, which is gone afterwards.

        Args:
            code (`str`): Python source; may be indented as a whole.
            args (`str`): Become `sys.argv[1:]`.
            token (`str`, *optional*): Token to log in with, by default the one of `user`; `""` for an anonymous client.
            home (`str` or `os.PathLike`, *optional*): Value of `HF_HOME`; by default an empty cache for this call only.
            timeout (`float`, *optional*, defaults to 120.0): Seconds to wait.

        Returns:
            `subprocess.CompletedProcess`: With `stdout` and `stderr` as text.

        Raises:
            `RuntimeError`: If the process fails or takes too long; the message has all that it printed.
        """
        with tempfile.TemporaryDirectory() as folder:
            home = home or Path(folder, "home")
            work = Path(folder, "work")
            work.mkdir()
            command = [sys.executable, *WARNINGS, "-c", textwrap.dedent(code), *args]
            process = subprocess.Popen(
                command,
                cwd=work,
                env=self.environment(home, token),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            try:
                stdout, stderr = process.communicate(timeout=timeout)
                outcome = f"ended with status {process.returncode}"
            except subprocess.TimeoutExpired:
                process.kill()
                stdout, stderr = process.communicate()
                outcome = f"took more than {timeout} s"
        if process.returncode != 0:
            raise RuntimeError(f"Client code {outcome}.\n--- stdout ---\n{stdout}\n--- stderr ---\n{stderr}")
        return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)

    def run_json(self, code: str, *args: str, **options: Any) -> Any:
        """The last line that client code prints, read as JSON; see [`~Hub.run_python`] for the arguments."""
        return json.loads(self.run_python(code, *args, **options).stdout.splitlines()[-1])

    def files(self, repo_id: str, revision: str = "main", repo_type: str = "model") -> dict[str, bytes]:
        """Content by path of a repository, as it stands on the server."""
        commit = self.server.repos[f"{repo_type}s", repo_id].resolve(revision)
        return {path: blob.content for path, blob in commit.files.items()}

    @contextmanager
    def record(self) -> Iterator[list[Request]]:
        """Give a list that holds, once the block is over, the requests that were answered during it."""
        log: list[Request] = []
        start = len(self.server.requests)
        yield log
        log.extend(self.server.requests[start:])


@pytest.fixture(scope="session")
def hub() -> Iterator[Hub]:
    """A Hub for the whole session. It keeps what is pushed, so tests use repository names of their own."""
    with HubServer() as server:
        yield Hub(server)
    assert not server.errors, "\n".join(server.errors)
