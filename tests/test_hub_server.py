"""The test Hub, seen by the client that all libraries of the ecosystem use: huggingface_hub."""

import hashlib
import textwrap
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from hub_fixtures import Hub


# `outcome` tells what a call raised: the class and its bases, the HTTP status, the message.
PRELUDE = """
import json, os, sys
from huggingface_hub import HfApi

api = HfApi()

def outcome(call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        return {"classes": [c.__name__ for c in type(error).__mro__], "status": status, "message": str(error)}
"""


def client(hub: Hub, code: str, *args: str, **options: Any) -> Any:
    return hub.run_json(PRELUDE + textwrap.dedent(code), *args, **options)


# -- pushing, listing, pulling with huggingface_hub --------------------------------------------------------------------


@pytest.fixture(scope="module")
def story(hub: Hub) -> Any:
    """A repository from its creation to two commits, a branch and a tag, and what the client was told on the way."""
    with pytest.MonkeyPatch.context() as patch, hub.record() as log:
        patch.setattr(hub.server, "page_size", 2)
        told = client(
            hub,
            """
            from huggingface_hub.utils.sha import git_hash
            repo = "tester/hub-story"
            os.makedirs("deep/er")
            content = {"config.json": b"{}", "weights.bin": b"w" * 99, "deep/er/big.txt": b"b" * 1_000_001, "deep/a b": b""}
            for path, data in content.items():
                with open(path, "wb") as file:
                    file.write(data)
            told = {"whoami": api.whoami()["name"], "url": api.create_repo(repo), "again": api.create_repo(repo, exist_ok=True)}
            told["first"] = api.upload_folder(repo_id=repo, folder_path=".").oid
            told["unchanged"] = api.upload_folder(repo_id=repo, folder_path=".").oid
            told["tree"] = {
                item.path: [item.blob_id, item.lfs.sha256 if item.lfs else None] if hasattr(item, "blob_id") else "folder"
                for item in api.list_repo_tree(repo, recursive=True)
            }
            told["git"] = {path: git_hash(data) for path, data in content.items()}
            told["top"] = [item.path for item in api.list_repo_tree(repo)]
            told["deep"] = [item.path for item in api.list_repo_tree(repo, "deep/er")]
            told["paths"] = [item.path for item in api.get_paths_info(repo, ["deep", "config.json", "absent"])]
            told["sizes"] = {s.rfilename: s.size for s in api.model_info(repo, files_metadata=True).siblings}
            api.create_tag(repo, tag="v1")
            api.create_branch(repo, branch="side/branch", revision="v1")
            api.upload_file(repo_id=repo, path_in_repo="config.json", path_or_fileobj=b'{"a": 1}', commit_message="Second")
            api.upload_file(repo_id=repo, path_in_repo="side.txt", path_or_fileobj=b"s", revision="side/branch")
            api.delete_file("weights.bin", repo)
            told["stale"] = outcome(
                api.upload_file, repo_id=repo, path_in_repo="x", path_or_fileobj=b"x", parent_commit=told["first"]
            )
            told["titles"] = [commit.title for commit in api.list_repo_commits(repo)]
            refs = api.list_repo_refs(repo)
            told["refs"] = [ref.name for ref in refs.branches + refs.tags]
            told["config"] = {
                revision: open(api.hf_hub_download(repo, "config.json", revision=revision)).read()
                for revision in ("main", "v1", "side/branch", told["first"])
            }
            folder = api.snapshot_download(repo, revision="v1")
            told["snapshot"] = {path: os.path.getsize(os.path.join(folder, path)) for path in content}
            print(json.dumps(told))
            """,
        )
    return {**told, "further_pages": [request.path for request in log if "cursor=" in request.path]}


def test_push_creates_the_repository_once(hub: Hub, story: Any) -> None:
    """`create_repo` gives the repository's URL, and with `exist_ok` gives it again."""
    assert story["whoami"] == hub.user
    assert story["url"] == story["again"] == f"{hub.endpoint}/tester/hub-story"


def test_content_arrives_unchanged(hub: Hub, story: Any) -> None:
    """What was pushed is on the server byte for byte, small files and LFS files alike."""
    files = hub.files("tester/hub-story", story["first"])
    assert files.pop(".gitattributes")
    assert files == {
        "config.json": b"{}",
        "weights.bin": b"w" * 99,
        "deep/er/big.txt": b"b" * 1_000_001,
        "deep/a b": b"",
    }


def test_lfs_takes_weights_and_large_files_only(hub: Hub, story: Any) -> None:
    """A file is in LFS by its suffix or size; its id is then the sha256, otherwise Git's own."""
    tree = story["tree"]
    for path in ("config.json", "deep/a b"):
        assert tree[path] == [story["git"][path], None]
    for path in ("weights.bin", "deep/er/big.txt"):
        content = hub.files("tester/hub-story", story["first"])[path]
        assert tree[path][1] == hashlib.sha256(content).hexdigest()
        assert tree[path][0] != story["git"][path]


def test_listings_agree(story: Any) -> None:
    """The tree, one folder of it, `get_paths_info` and `model_info` name the same files, over pages of two entries."""
    assert len(story["further_pages"]) >= 3
    assert set(story["tree"]) == {".gitattributes", "deep", "deep/er", *story["git"]}
    assert story["tree"]["deep"] == story["tree"]["deep/er"] == "folder"
    assert story["top"] == [".gitattributes", "config.json", "deep", "weights.bin"]
    assert story["deep"] == ["deep/er/big.txt"]
    assert story["paths"] == ["deep", "config.json"]
    assert set(story["sizes"]) == {".gitattributes", *story["git"]}
    assert story["sizes"]["deep/er/big.txt"] == 1_000_001


def test_unchanged_push_makes_no_commit(story: Any) -> None:
    """Pushing the same files again gives the commit that is there."""
    assert story["unchanged"] == story["first"]
    assert len(story["titles"]) == 4  # the initial one, the folder, one file, one deletion


def test_revisions_keep_their_content(hub: Hub, story: Any) -> None:
    """A tag, a branch and a commit id serve their own state after `main` has moved on."""
    first = story["first"]
    assert story["config"] == {"main": '{"a": 1}', "v1": "{}", "side/branch": "{}", first: "{}"}
    assert sorted(story["refs"]) == ["main", "side/branch", "v1"]
    assert "side.txt" in hub.files("tester/hub-story", "side/branch")
    assert "side.txt" not in hub.files("tester/hub-story")
    assert "weights.bin" not in hub.files("tester/hub-story")
    assert story["snapshot"] == {"config.json": 2, "weights.bin": 99, "deep/er/big.txt": 1_000_001, "deep/a b": 0}


def test_commit_on_a_stale_parent_is_refused(story: Any) -> None:
    """A commit that names an older parent does not overwrite what came in between."""
    assert story["stale"]["status"] == 412


def test_datasets_and_models_are_apart(hub: Hub) -> None:
    """A dataset may have the name of a model, and is deleted without it."""
    told = client(
        hub,
        """
        repo = "tester/hub-twins"
        for kind in ("model", "dataset"):
            api.create_repo(repo, repo_type=kind)
            data = (kind * 4).encode()
            api.upload_file(repo_id=repo, repo_type=kind, path_in_repo="data.bin", path_or_fileobj=data)
        told = {"sha": api.dataset_info(repo).sha}
        told["data"] = open(api.hf_hub_download(repo, "data.bin", repo_type="dataset")).read()
        api.delete_repo(repo, repo_type="dataset")
        told["deleted"] = outcome(api.dataset_info, repo)
        told["deleted_file"] = outcome(api.hf_hub_download, repo, "other", repo_type="dataset")
        print(json.dumps(told))
        """,
    )
    assert told["data"] == "dataset" * 4
    assert hub.files("tester/hub-twins")["data.bin"] == b"model" * 4
    assert "RepositoryNotFoundError" in told["deleted"]["classes"]
    assert "RepositoryNotFoundError" in told["deleted_file"]["classes"]


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def repos(hub: Hub) -> Any:
    """A public and a private repository, one file each; gives what their owner meets in them."""
    return client(
        hub,
        """
        for name in ("public", "private"):
            api.create_repo(f"tester/hub-{name}", private=name == "private")
            api.upload_file(repo_id=f"tester/hub-{name}", path_in_repo="file.bin", path_or_fileobj=name.encode())
        repo = "tester/hub-public"

        def push_card(metadata):
            card = f"---\\n{metadata}\\n---\\n".encode()
            return outcome(api.upload_file, repo_id=repo, path_in_repo="README.md", path_or_fileobj=card)

        print(json.dumps({
            "file": outcome(api.hf_hub_download, repo, "absent.json"),
            "revision": outcome(api.hf_hub_download, repo, "file.bin", revision="absent"),
            "snapshot": outcome(api.snapshot_download, repo, revision="absent"),
            "repo": outcome(api.hf_hub_download, "tester/hub-absent", "file.bin"),
            "folder": outcome(lambda: list(api.list_repo_tree(repo, "absent"))),
            "delete": outcome(api.delete_file, "absent.json", repo),
            "exists": [api.file_exists(repo, "file.bin"), api.file_exists(repo, "absent.json")],
            "exists_at": api.file_exists(repo, "file.bin", revision="absent"),
            "own": open(api.hf_hub_download("tester/hub-private", "file.bin")).read(),
            "yaml": push_card("tags: ["),
            "tags": push_card("tags: [1]"),
            "card": push_card("tags: [fine]"),
        }))
        """,
    )


@pytest.mark.parametrize(
    ("request_for", "error"),
    [
        ("file", "EntryNotFoundError"),
        ("folder", "EntryNotFoundError"),
        ("delete", "EntryNotFoundError"),
        ("revision", "RevisionNotFoundError"),
        ("snapshot", "RevisionNotFoundError"),
        ("repo", "RepositoryNotFoundError"),
    ],
)
def test_what_is_missing_raises_the_clients_own_error(repos: Any, request_for: str, error: str) -> None:
    """A missing file, folder, revision or repository is told apart by the class of the client's exception."""
    assert error in repos[request_for]["classes"]


def test_file_exists_answers_without_an_error(repos: Any) -> None:
    """`file_exists` is true for a file that is there, and false for a missing file or revision."""
    assert repos["exists"] == [True, False]
    assert repos["exists_at"] is False


def test_bad_card_is_refused_before_anything_is_stored(hub: Hub, repos: Any) -> None:
    """A model card whose metadata does not parse, or does not fit, is a `ValueError`; a sound one is stored."""
    assert "ValueError" in repos["yaml"]["classes"]
    assert "tags" in repos["tags"]["message"]
    assert repos["card"] is None
    assert hub.files("tester/hub-public")["README.md"] == b"---\ntags: [fine]\n---\n"


INTRUDE = """
def push(name):
    return outcome(api.upload_file, repo_id=f"tester/hub-{name}", path_in_repo="new.bin", path_or_fileobj=b"new")

print(json.dumps({
    "whoami": outcome(api.whoami),
    "create": outcome(api.create_repo, "tester/hub-intruder"),
    "delete": outcome(api.delete_repo, "tester/hub-public"),
    "push_public": push("public"),
    "push_private": push("private"),
    "pull_public": outcome(api.hf_hub_download, "tester/hub-public", "file.bin"),
    "pull_private": outcome(api.hf_hub_download, "tester/hub-private", "file.bin"),
    "snapshot_private": outcome(api.snapshot_download, "tester/hub-private"),
}))
"""


def test_wrong_token_is_refused(hub: Hub, repos: Any) -> None:
    """With a token that nobody owns the client raises its HTTP error, with the Hub's words, on push and on pull."""
    before = hub.files("tester/hub-public")
    told = client(hub, INTRUDE, token="hf_wrong")
    for name, error in told.items():
        assert "HfHubHTTPError" in error["classes"], name
        assert error["status"] == 401, name
    assert "Invalid credentials in Authorization header" in told["push_public"]["message"]
    assert "Invalid user token" in told["whoami"]["message"]
    assert hub.files("tester/hub-public") == before


def test_stranger_may_only_read_what_is_public(hub: Hub, repos: Any) -> None:
    """Another user's token gives no right to write (403) and does not show that a private repository exists (404)."""
    told = client(hub, INTRUDE, token=hub.stranger_token)
    assert told["whoami"] is told["pull_public"] is None
    assert [told[name]["status"] for name in ("create", "delete", "push_public")] == [403, 403, 403]
    for name in ("push_private", "pull_private", "snapshot_private"):
        assert "RepositoryNotFoundError" in told[name]["classes"]
        assert told[name]["status"] == 404
    assert "new.bin" not in hub.files("tester/hub-public")


def test_private_repository_is_invisible_without_a_token(hub: Hub, repos: Any) -> None:
    """An anonymous client reads public files and is told that a private repository does not exist."""
    told = client(hub, INTRUDE, token="")
    assert told["pull_public"] is None
    for name in ("pull_private", "snapshot_private"):
        assert "RepositoryNotFoundError" in told[name]["classes"]
    assert told["create"]["status"] == told["push_public"]["status"] == 401
    assert repos["own"] == "private"


# -- downloads ---------------------------------------------------------------------------------------------------------


def test_second_download_gets_no_body(hub: Hub, tmp_path: Path) -> None:
    """A file in the cache is checked by its ETag only; after a new commit, only the file that changed is fetched."""
    snapshot = """
    api.snapshot_download("tester/hub-cached")
    paths = [api.hf_hub_download("tester/hub-cached", name) for name in ("weights.bin", "config.json")]
    print(json.dumps([open(path).read() for path in paths]))
    """
    push = """
    api.create_repo("tester/hub-cached", exist_ok=True)
    for name, content in zip(("weights.bin", "config.json"), sys.argv[1:]):
        api.upload_file(repo_id="tester/hub-cached", path_in_repo=name, path_or_fileobj=content.encode())
    print("null")
    """
    client(hub, push, "weights", "old")
    with hub.record() as first:
        assert client(hub, snapshot, home=tmp_path) == ["weights", "old"]
    with hub.record() as second:
        assert client(hub, snapshot, home=tmp_path) == ["weights", "old"]
    client(hub, push, "weights", "new")
    with hub.record() as third:
        assert client(hub, snapshot, home=tmp_path) == ["weights", "new"]

    assert sum(request.is_download for request in first) == 3  # with .gitattributes
    assert not any(request.is_download for request in second)
    assert any(request.method == "HEAD" for request in second)
    assert [request.path.rpartition("/")[2] for request in third if request.is_download] == ["config.json"]


def test_interrupted_download_resumes_where_it_stopped(hub: Hub) -> None:
    """When the connection breaks, the client asks for the rest by a range, and the file is whole."""
    content = bytes(range(256)) * 48_000  # 12 MB: the client keeps what it has in blocks of 10 MB
    push = """
    api.create_repo("tester/hub-large")
    data = bytes(range(256)) * 48_000
    api.upload_file(repo_id="tester/hub-large", path_in_repo="large.bin", path_or_fileobj=data)
    print("null")
    """
    pull = """
    import hashlib
    path = api.hf_hub_download("tester/hub-large", "large.bin")
    print(json.dumps(hashlib.sha256(open(path, "rb").read()).hexdigest()))
    """
    client(hub, push)
    hub.server.cut_next_download = 11_000_000
    with hub.record() as log:
        digest = client(hub, pull)
    assert digest == hashlib.sha256(content).hexdigest()
    downloads = [request for request in log if request.is_download]
    assert [request.status for request in downloads] == [200, 206]
    assert downloads[1].range == "bytes=10485760-"


@pytest.mark.parametrize(
    ("wanted", "status", "content", "content_range"),
    [
        ("bytes=2-4", 206, b"blu", "bytes 2-4/6"),
        ("bytes=4-", 206, b"ue", "bytes 4-5/6"),
        ("bytes=-2", 206, b"ue", "bytes 4-5/6"),
        ("bytes=3-99", 206, b"lue", "bytes 3-5/6"),
        ("bytes=6-", 416, b"", "bytes */6"),
    ],
)
def test_ranges_of_a_file(hub: Hub, ranged: str, wanted: str, status: int, content: bytes, content_range: str) -> None:
    """A range request gives exactly the bytes asked for, and says which; one past the end is refused."""
    request = urllib.request.Request(ranged, headers={"Range": wanted, "Authorization": f"Bearer {hub.token}"})
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            answer = response.status, response.read(), response.headers["Content-Range"]
    except urllib.error.HTTPError as error:
        with error:
            answer = error.code, error.read(), error.headers["Content-Range"]
    assert answer == (status, content, content_range)


@pytest.fixture(scope="module")
def ranged(hub: Hub) -> str:
    """URL of a file of six bytes."""
    client(
        hub,
        """
        api.create_repo("tester/hub-ranged")
        api.upload_file(repo_id="tester/hub-ranged", path_in_repo="six.txt", path_or_fileobj=b"a blue")
        print("null")
        """,
    )
    return f"{hub.endpoint}/tester/hub-ranged/resolve/main/six.txt"


def test_large_files_travel_by_plain_lfs_and_without_the_token(hub: Hub) -> None:
    """Xet is off, LFS files go to the storage host by signed URLs, and the token stays with the Hub."""
    with hub.record() as log:
        xet_used = client(
            hub,
            """
            api.create_repo("tester/hub-lfs")
            api.upload_file(repo_id="tester/hub-lfs", path_in_repo="a.bin", path_or_fileobj=b"a")
            api.hf_hub_download("tester/hub-lfs", "a.bin")
            print(json.dumps("hf_xet" in sys.modules))
            """,
        )
    assert not xet_used
    storage = [request for request in log if request.path.startswith("/storage/")]
    assert [request.method for request in storage] == ["PUT", "GET"]
    assert not any(request.token_sent for request in storage)
    assert all(request.token_sent for request in log if request not in storage)
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(f"{hub.server.storage_endpoint}/storage/unsigned/{'0' * 64}", timeout=10)


# -- client processes --------------------------------------------------------------------------------------------------


def test_failing_client_code_shows_its_error(hub: Hub) -> None:
    """Client code that fails, deprecated calls included, raises here with its own traceback in the message."""
    with pytest.raises(RuntimeError, match=r"(?s)status 1.*said before.*DeprecationWarning: old"):
        hub.run_python("import warnings; print('said before'); warnings.warn('old', DeprecationWarning)")
    with pytest.raises(RuntimeError, match=r"(?s)took more than 0\.5 s.*said before"):
        hub.run_python("import time; print('said before', flush=True); time.sleep(60)", timeout=0.5)


def test_client_code_does_not_see_the_machines_settings(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline mode, a proxy or another cache set around the tests do not reach client code."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TRANSFORMERS_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", "/nowhere")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    assert client(hub, "print(json.dumps(api.whoami()['name']))") == hub.user
