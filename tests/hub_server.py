"""
A Hugging Face Hub small enough to read, served over real HTTP on 127.0.0.1.

It answers the calls that `huggingface_hub` 2.x makes to push, list and pull models and datasets, and keeps everything
in memory. Like the real Hub it has two origins: the Hub itself, which checks tokens, and a storage host for large
files, which sees signed URLs and never a token.

Left out: Xet (no Xet header is ever sent, so a client falls back to plain Git-LFS), multi-part uploads, Spaces, pull
requests, gated repositories, moving a repository, `.gitignore` filtering at pre-upload, and `expand=True` details.
"""

import base64
import hashlib
import json
import secrets
from collections.abc import Sequence
from typing import Any, cast
from urllib.parse import parse_qs, urlsplit

import yaml

from hub_http import Handler, Reply, Site, route
from hub_repos import LFS_SIZE, LFS_SUFFIXES, Blob, Commit, HubError, Repo, front_matter


API = r"/api/(?P<kind>models|datasets)/(?P<repo_id>[^/]+/[^/]+)"
WEB = r"/(?:(?P<kind>datasets)/)?(?P<repo_id>[^/]+/[^/]+)"
REV = r"(?P<revision>[^/]+)"
STORAGE = r"/storage/(?P<signature>[^/]+)/(?P<oid>[0-9a-f]{64})"


class HubHandler(Handler):
    """The endpoints, in the order in which a client meets them: account, repositories, push, pull."""

    @property
    def hub(self) -> "HubServer":
        return cast(HubServer, self.site)

    # -- account ------------------------------------------------------------------------------------------------------

    def authenticate(self) -> str | None:
        """A token that nobody owns is refused everywhere, public files included."""
        header = self.headers.get("Authorization")
        if header is None:
            return None
        user = self.hub.users.get(header.removeprefix("Bearer "))
        if user is None:
            raise HubError(401, "Invalid credentials in Authorization header")
        return user

    @route("GET", "/api/whoami-v2")
    def whoami(self) -> Reply:
        if self.user is None:
            raise HubError(401, "Invalid username or password.")
        access = {"type": "access_token", "accessToken": {"displayName": "tests", "role": "write"}}
        return Reply({"type": "user", "id": self.user, "name": self.user, "orgs": [], "auth": access})

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self) -> Reply:
        errors, warnings = [], []
        try:
            data = front_matter(self.json["content"])
        except yaml.YAMLError as error:
            errors.append(f"YAML does not parse: {error}")
        else:
            if not data:
                warnings.append("empty or missing yaml metadata in repo card")
            elif not isinstance(data, dict):
                errors.append("metadata must be a mapping")
            elif not all(isinstance(tag, str) for tag in data.get("tags") or []):
                errors.append('"tags" must be an array of strings')
        answer = {"errors": [{"message": m} for m in errors], "warnings": [{"message": m} for m in warnings]}
        return Reply(answer, 400 if errors else 200)

    # -- repositories -------------------------------------------------------------------------------------------------

    def repo(self, kind: str | None, repo_id: str, write: bool = False) -> Repo:
        """Look a repository up, and check that the caller may see it or (with `write`) change it."""
        repo = self.hub.repos.get((kind or "models", repo_id))
        hidden = repo is None or (repo.private and self.user != repo.owner)
        if self.user is None and (hidden or write):
            # The client reads a bare 401 as "repository not found" on https:// only; here it needs the code.
            raise HubError(401, "Invalid username or password.", "RepoNotFound")
        if repo is None or hidden:
            raise HubError(404, "Repository not found", "RepoNotFound")
        if write and self.user != repo.owner:
            raise HubError(403, f"Forbidden: you don't have write access to {repo_id}")
        return repo

    def named_repo(self) -> tuple[str, str]:
        """Kind and id of the repository that a create or delete call names in its body."""
        kind = f"{self.json.get('type') or 'model'}s"
        if kind not in ("models", "datasets"):
            raise HubError(400, f"This server has models and datasets, no {kind}")
        return kind, f"{self.json.get('organization') or self.user}/{self.json['name']}"

    @route("POST", "/api/repos/create")
    def create_repo(self) -> Reply:
        kind, repo_id = self.named_repo()
        if self.user is None:
            raise HubError(401, "Invalid username or password.")
        if repo_id.split("/")[0] != self.user:
            raise HubError(403, f"You don't have the rights to create a {kind[:-1]} under the namespace of {repo_id}")
        answer = {"url": self.hub.url(kind, repo_id), "name": repo_id, "id": repo_id}
        if (kind, repo_id) in self.hub.repos:
            return Reply({**answer, "error": f"You already created this {kind[:-1]} repo"}, 409)
        private = self.json.get("visibility") == "private" or bool(self.json.get("private"))  # 2.x, 1.x
        self.hub.repos[kind, repo_id] = Repo(kind, repo_id, private)
        return Reply(answer)

    @route("DELETE", "/api/repos/delete")
    def delete_repo(self) -> Reply:
        repo = self.repo(*self.named_repo(), write=True)
        del self.hub.repos[repo.kind, repo.repo_id]
        return Reply({})

    @route("GET", f"{API}(?:/revision/{REV})?")
    def repo_info(self, kind: str, repo_id: str, revision: str | None) -> Reply:
        repo = self.repo(kind, repo_id)
        commit = repo.resolve(revision or "main")
        siblings: list[dict[str, Any]] = [{"rfilename": path} for path in sorted(commit.files)]
        for sibling in siblings if self.flag("blobs") else []:
            blob = commit.files[sibling["rfilename"]]
            sibling |= {"size": len(blob.content), "blobId": blob.oid}
            if blob.lfs:
                sibling["lfs"] = {**blob.describe("")["lfs"], "sha256": blob.sha256}
        card = front_matter(commit.files.get("README.md", Blob(b"")).content.decode()) or {}
        answer = {"id": repo_id, "author": repo.owner, "sha": commit.oid, "private": repo.private, "gated": False}
        answer |= {"disabled": False, "downloads": 0, "likes": 0, "lastModified": commit.date, "siblings": siblings}
        answer |= {"cardData": card, "tags": card.get("tags") or []}
        return Reply(answer | {key: card[key] for key in ("library_name", "pipeline_tag") if key in card})

    @route("GET", f"{API}/commits/{REV}")
    def commits(self, kind: str, repo_id: str, revision: str) -> Reply:
        commit: Commit | None = self.repo(kind, repo_id).resolve(revision)
        history = []
        while commit is not None:
            entry = {"id": commit.oid, "title": commit.title, "message": commit.message, "date": commit.date}
            history.append({**entry, "authors": [{"user": commit.author}]})
            commit = commit.parent
        return Reply(history)

    @route("GET", f"{API}/refs")
    def refs(self, kind: str, repo_id: str) -> Reply:
        answer: dict[str, list[dict[str, str]]] = {"branches": [], "tags": [], "converts": [], "pullRequests": []}
        for ref, oid in self.repo(kind, repo_id).refs.items():
            _, group, name = ref.split("/", 2)
            answer["tags" if group == "tags" else "branches"].append({"name": name, "ref": ref, "targetCommit": oid})
        return Reply(answer)

    @route("POST", f"{API}/branch/(?P<branch>[^/]+)")
    def create_branch(self, kind: str, repo_id: str, branch: str) -> Reply:
        return self.add_ref(kind, repo_id, f"refs/heads/{branch}", self.json.get("startingPoint", "main"))

    @route("POST", f"{API}/tag/{REV}")
    def create_tag(self, kind: str, repo_id: str, revision: str) -> Reply:
        return self.add_ref(kind, repo_id, f"refs/tags/{self.json['tag']}", revision)

    def add_ref(self, kind: str, repo_id: str, ref: str, revision: str) -> Reply:
        repo = self.repo(kind, repo_id, write=True)
        if ref in repo.refs:
            raise HubError(409, f"Reference already exists: {ref}")
        repo.refs[ref] = repo.resolve(revision).oid
        return Reply({})

    # -- push ---------------------------------------------------------------------------------------------------------

    @route("POST", f"{API}/preupload/{REV}")
    def preupload(self, kind: str, repo_id: str, revision: str) -> Reply:
        files = self.repo(kind, repo_id, write=True).resolve(revision).files
        answer = []
        for file in self.json["files"]:
            path, known = file["path"], files.get(file["path"])
            mode = "lfs" if path.endswith(LFS_SUFFIXES) or file["size"] > LFS_SIZE else "regular"
            # With the id of what is already there, the client leaves unchanged files out of its commit.
            oid = known and (known.sha256 if known.lfs else known.oid)
            answer.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return Reply({"files": answer})

    @route("POST", rf"{WEB}\.git/info/lfs/objects/batch")
    def lfs_batch(self, kind: str | None, repo_id: str) -> Reply:
        self.repo(kind, repo_id, write=True)
        verify = {"href": f"{self.hub.url(kind, repo_id)}.git/info/lfs/verify"}
        objects = self.json["objects"]
        for item in objects:
            if item["oid"] not in self.hub.storage:  # an object without actions needs no upload
                item["actions"] = {"upload": {"href": self.hub.storage_url(item["oid"])}, "verify": verify}
        return Reply({"transfer": "basic", "objects": objects})

    @route("PUT", STORAGE)
    def upload(self, signature: str, oid: str) -> Reply:
        self.check_signature(signature)
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise HubError(400, "The content does not have the announced sha256")
        self.hub.storage[oid] = Blob(self.body, lfs=True)
        return Reply(b"", headers={"ETag": f'"{oid}"'})

    @route("POST", rf"{WEB}\.git/info/lfs/verify")
    def lfs_verify(self, kind: str | None, repo_id: str) -> Reply:
        self.repo(kind, repo_id, write=True)
        blob = self.hub.storage.get(self.json["oid"])
        if blob is None or len(blob.content) != self.json["size"]:
            raise HubError(404, f"No uploaded object {self.json['oid']} of {self.json['size']} bytes")
        return Reply({})

    @route("POST", f"{API}/commit/{REV}")
    def commit(self, kind: str, repo_id: str, revision: str) -> Reply:
        repo = self.repo(kind, repo_id, write=True)
        header, *operations = [json.loads(line) for line in self.body.split(b"\n") if line]
        header, parent, ref = header["value"], repo.resolve(revision), f"refs/heads/{revision}"
        if ref not in repo.refs or self.flag("create_pr"):
            raise HubError(400, "Commits go to a branch; this server has no pull requests")
        if header.get("parentCommit", parent.oid) != parent.oid:
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        files = dict(parent.files)
        for operation in operations:
            self.apply(operation["key"], operation["value"], files)
        commit = repo.commit(ref, parent, files, header["summary"], header["description"], cast(str, self.user))
        url = f"{self.hub.url(kind, repo_id)}/commit/{commit.oid}"
        return Reply({"success": True, "commitOid": commit.oid, "commitUrl": url})

    def apply(self, key: str, value: dict[str, str], files: dict[str, Blob]) -> None:
        """Apply one operation of a commit to the files of its parent."""
        path = value["path"]
        if key == "file":
            files[path] = Blob(base64.b64decode(value["content"]))
        elif key == "lfsFile":
            if value["oid"] not in self.hub.storage:
                raise HubError(400, f"LFS pointer of {path} names a file that was never uploaded")
            files[path] = self.hub.storage[value["oid"]]
        else:
            folder = f"{path.rstrip('/')}/" if key == "deletedFolder" else None
            gone = [name for name in files if (name.startswith(folder) if folder else name == path)]
            if not gone:
                raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            for name in gone:
                del files[name]

    # -- pull ---------------------------------------------------------------------------------------------------------

    @route("GET", f"{API}/tree/{REV}(?:/(?P<folder>.+))?")
    def tree(self, kind: str, repo_id: str, revision: str, folder: str | None) -> Reply:
        entries = self.repo(kind, repo_id).resolve(revision).entries(folder or "")
        if folder and not entries:
            raise HubError(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        if not self.flag("recursive"):
            depth = folder.count("/") + 1 if folder else 0
            entries = [entry for entry in entries if entry["path"].count("/") == depth]
        start = int(self.query.get("cursor", 0))
        end = start + self.hub.page_size
        recursive = str(self.flag("recursive")).lower()
        url = f"{self.hub.endpoint}{urlsplit(self.path).path}?recursive={recursive}&cursor={end}"
        return Reply(entries[start:end], headers={"Link": f'<{url}>; rel="next"'} if end < len(entries) else {})

    @route("POST", f"{API}/paths-info/{REV}")
    def paths_info(self, kind: str, repo_id: str, revision: str) -> Reply:
        entries = {entry["path"]: entry for entry in self.repo(kind, repo_id).resolve(revision).entries()}
        asked = parse_qs(self.body.decode()).get("paths", [])
        return Reply([entries[path] for path in asked if path in entries])

    @route("GET", f"{WEB}/resolve/{REV}/(?P<path>.+)")
    def resolve(self, kind: str | None, repo_id: str, revision: str, path: str) -> Reply:
        commit = self.repo(kind, repo_id).resolve(revision)
        headers = {"X-Repo-Commit": commit.oid}
        blob = commit.files.get(path)
        if blob is None:
            # The client remembers a missing file by the commit named here, and does not ask again.
            raise HubError(404, "Entry not found", "EntryNotFound", headers)
        if not blob.lfs:
            return Reply(blob.content, headers={**headers, "ETag": f'"{blob.oid}"'})
        headers |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(len(blob.content))}
        return Reply(b"", 302, {**headers, "Location": self.hub.storage_url(blob.sha256)})

    @route("GET", STORAGE)
    def download(self, signature: str, oid: str) -> Reply:
        self.check_signature(signature)
        if oid not in self.hub.storage:
            raise HubError(404, "The specified key does not exist.")
        return Reply(self.hub.storage[oid].content, headers={"ETag": f'"{oid}"'})

    def check_signature(self, signature: str) -> None:
        if signature != self.hub.signature:
            raise HubError(403, "Request has expired or is not signed")


class HubServer(Site):
    """
    The Hub and its content; serves while used as a context manager.

    Args:
        users (`Sequence[str]`, *optional*, defaults to `("tester", "stranger")`):
            Names of the accounts. Each gets a random token and may write in its own namespace only.

    Attributes:
        tokens (`dict[str, str]`): Token of each user.
        repos (`dict[tuple[str, str], Repo]`): Repositories by kind (`"models"`, `"datasets"`) and id.
        page_size (`int`): Entries in one page of a tree listing.
    """

    handler = HubHandler

    def __init__(self, users: Sequence[str] = ("tester", "stranger")):
        super().__init__()
        self.tokens = {user: f"hf_{secrets.token_hex(16)}" for user in users}
        self.users = {token: user for user, token in self.tokens.items()}
        self.signature = secrets.token_hex(16)
        self.repos: dict[tuple[str, str], Repo] = {}
        self.storage: dict[str, Blob] = {}
        self.page_size = 1000

    def url(self, kind: str | None, repo_id: str) -> str:
        return f"{self.endpoint}/{'datasets/' if kind == 'datasets' else ''}{repo_id}"

    def storage_url(self, oid: str) -> str:
        """A signed URL: whoever holds it may read or write that object, without a token."""
        return f"{self.storage_endpoint}/storage/{self.signature}/{oid}"
