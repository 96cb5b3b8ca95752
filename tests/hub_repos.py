"""What the test Hub keeps: files, commits, references. Nothing here knows about HTTP but the errors it raises."""

import hashlib
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

import yaml

from hub_http import Refusal


# Some of the suffixes that the real Hub puts in LFS. `datasets` counts on ".parquet": it deletes its file in between.
LFS_SUFFIXES = (".arrow", ".bin", ".npz", ".onnx", ".parquet", ".pt", ".pth", ".safetensors", ".wav", ".zip")
LFS_SIZE = 1_000_000  # bytes; 10 MB on the real Hub, but tests should go through LFS with small files
GITATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()


class HubError(Refusal):
    """A refusal with the headers from which the client picks its exception class."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None):
        headers = {**(headers or {}), "X-Error-Message": message}
        super().__init__(status, message, {**headers, "X-Error-Code": code} if code else headers)


@dataclass(frozen=True)
class Blob:
    """The content of a file, identified as Git does: by the sha1 of the file, or of its pointer when it is in LFS."""

    content: bytes
    lfs: bool = False

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @cached_property
    def pointer(self) -> bytes:
        size = len(self.content)
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {size}\n".encode()

    @cached_property
    def oid(self) -> str:
        data = self.pointer if self.lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    def describe(self, path: str) -> dict[str, Any]:
        """The entry of this file in a tree listing."""
        entry: dict[str, Any] = {"type": "file", "path": path, "oid": self.oid, "size": len(self.content)}
        if self.lfs:
            entry["lfs"] = {"oid": self.sha256, "size": len(self.content), "pointerSize": len(self.pointer)}
        return entry


@dataclass(frozen=True)
class Commit:
    """A full snapshot of the repository."""

    oid: str
    parent: "Commit | None"
    title: str
    message: str
    author: str
    date: str
    files: dict[str, Blob]

    def entries(self, folder: str = "") -> list[dict[str, Any]]:
        """Files and folders at any depth below `folder`, sorted by path."""
        inside = {path: blob for path, blob in self.files.items() if path.startswith(f"{folder}/" if folder else "")}
        found = {path: blob.describe(path) for path, blob in inside.items()}
        for path in inside:
            while "/" in path and (path := path.rpartition("/")[0]) != folder:
                tree = "".join(name + blob.oid for name, blob in inside.items() if name.startswith(f"{path}/"))
                oid = hashlib.sha1(tree.encode()).hexdigest()
                found[path] = {"type": "directory", "path": path, "oid": oid, "size": 0}
        return [found[path] for path in sorted(found)]


class Repo:
    """Commits and named references (`refs/heads/…`, `refs/tags/…`) of one repository."""

    def __init__(self, kind: str, repo_id: str, private: bool):
        self.kind, self.repo_id, self.private = kind, repo_id, private
        self.owner = repo_id.split("/")[0]
        self.commits: dict[str, Commit] = {}
        self.refs: dict[str, str] = {}
        self.commit("refs/heads/main", None, {".gitattributes": Blob(GITATTRIBUTES)}, "initial commit", "", "system")

    def commit(
        self, ref: str, parent: Commit | None, files: dict[str, Blob], title: str, message: str, author: str
    ) -> Commit:
        date = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
        tree = sorted((path, blob.oid) for path, blob in files.items())
        # The count keeps two equal commits in the same second apart.
        identity = repr((self.kind, self.repo_id, parent and parent.oid, tree, title, author, date, len(self.commits)))
        oid = hashlib.sha1(identity.encode()).hexdigest()
        self.refs[ref] = oid
        self.commits[oid] = Commit(oid, parent, title, message, author, date, files)
        return self.commits[oid]

    def resolve(self, revision: str) -> Commit:
        """The commit that a branch, a tag, a full reference or an (abbreviated) commit id stands for."""
        for name in (revision, f"refs/heads/{revision}", f"refs/tags/{revision}"):
            if name in self.refs:
                return self.commits[self.refs[name]]
        if re.fullmatch("[0-9a-f]{7,40}", revision):
            for oid, commit in self.commits.items():
                if oid.startswith(revision):
                    return commit
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")


def front_matter(text: str) -> Any:
    """The YAML block at the top of a card, parsed; `None` if there is none."""
    block = re.match(r"\s*---\r?\n(.*?)\r?\n---\s*(\n|$)", text, flags=re.DOTALL)
    return yaml.safe_load(block[1]) if block else None
