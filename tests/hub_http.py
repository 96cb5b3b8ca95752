"""The HTTP below the test Hub: routing, bodies, ranges, a request log. Nothing here knows what a Hub is."""

import json
import re
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar, Self, cast
from urllib.parse import parse_qs, unquote, urlsplit


@dataclass
class Reply:
    """What an endpoint answers: bytes are sent as they are (and honour `Range`), anything else as JSON."""

    content: Any
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


class Refusal(Exception):
    """Raised by an endpoint that answers with an error status."""

    def __init__(self, status: int, message: str, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.reply = Reply({"error": message}, status, headers or {})


@dataclass(frozen=True)
class Request:
    """
    One line of the request log.

    Attributes:
        method (`str`): HTTP method.
        path (`str`): Path and query, percent-encoded, as received.
        status (`int`): Status of the answer.
        user (`str`, *optional*): Who asked; `None` if the caller was not recognised.
        token_sent (`bool`): Whether an `Authorization` header came along.
        range (`str`, *optional*): The `Range` header.
        is_download (`bool`): Whether the bytes of a file, or a range of them, were sent back.
    """

    method: str
    path: str
    status: int
    user: str | None
    token_sent: bool
    range: str | None
    is_download: bool


Endpoint = Callable[..., Reply]
ROUTES: list[tuple[str, re.Pattern[str], Endpoint]] = []


def route(method: str, pattern: str) -> Callable[[Endpoint], Endpoint]:
    """Register a method of a [`Handler`] as an endpoint; its arguments are the named groups of `pattern`."""

    def register(endpoint: Endpoint) -> Endpoint:
        ROUTES.append((method, re.compile(pattern), endpoint))
        return endpoint

    return register


class Handler(BaseHTTPRequestHandler):
    """Finds the endpoint for a request, calls it and sends its reply; `HEAD` is a `GET` without the body."""

    protocol_version = "HTTP/1.1"  # keep-alive, as the client pools connections
    disable_nagle_algorithm = True  # small replies on loopback would otherwise wait for a delayed ACK
    body: bytes
    query: dict[str, str]
    user: str | None

    @property
    def site(self) -> "Site":
        return cast(_Listener, self.server).site

    @property
    def json(self) -> Any:
        """The body of the request, parsed; an empty one counts as an empty object."""
        return json.loads(self.body or b"{}")

    def flag(self, name: str) -> bool:
        return self.query.get(name, "").lower() in ("1", "true")

    def authenticate(self) -> str | None:
        """Name of the caller, `None` for an anonymous one; raises [`Refusal`] for a token that nobody owns."""
        return None

    def dispatch(self) -> None:
        # Read first, whatever comes of it: on a kept-alive connection a body left over would be the next request.
        self.body, self.user, url = self.read_body(), None, urlsplit(self.path)
        self.query = {key: values[-1] for key, values in parse_qs(url.query).items()}
        with self.site.lock:
            try:
                self.user = self.authenticate()
                reply = self.call_endpoint(url.path)
            except Refusal as refusal:
                reply = refusal.reply
            except Exception:  # whatever the bug, the client gets an answer and the tests can see it
                self.site.errors.append(traceback.format_exc())
                reply = Reply({"error": traceback.format_exc()}, 500)
        self.send(reply)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = dispatch

    def call_endpoint(self, path: str) -> Reply:
        wanted = "GET" if self.command == "HEAD" else self.command
        for method, pattern, endpoint in ROUTES:
            # Matched while still percent-encoded: a quoted revision or folder may contain "/".
            if method == wanted and (match := pattern.fullmatch(path)):
                arguments = {name: value and unquote(value) for name, value in match.groupdict().items()}
                return endpoint(self, **arguments)
        self.site.unserved.append(f"{self.command} {self.path}")
        raise Refusal(404, "Sorry, we can't find the page you are looking for.")

    def read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def send(self, reply: Reply) -> None:
        is_file = isinstance(reply.content, bytes)
        body = reply.content if is_file else json.dumps(reply.content).encode()
        status, headers = reply.status, dict(reply.headers)
        headers["Content-Type"] = "application/octet-stream" if is_file else "application/json; charset=utf-8"
        wanted = self.headers.get("Range")
        if is_file and status == 200 and self.command in ("GET", "HEAD"):
            headers["Accept-Ranges"] = "bytes"
            if wanted is not None:
                status, body, headers["Content-Range"] = cut_range(body, wanted)
        is_download = is_file and status in (200, 206) and self.command == "GET"
        # Logged before it is sent: once a client has its answer, the log has the request.
        token_sent = "Authorization" in self.headers
        self.site.requests.append(Request(self.command, self.path, status, self.user, token_sent, wanted, is_download))
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, " ".join(value.split()))
        self.end_headers()
        if self.command == "HEAD":
            return
        if is_download and self.site.cut_next_download is not None:
            body, self.site.cut_next_download = body[: self.site.cut_next_download], None
            self.close_connection = True
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Stay silent: [`Site.requests`] is the log."""


def cut_range(body: bytes, wanted: str) -> tuple[int, bytes, str]:
    """Status, bytes and `Content-Range` for a `Range` header with one range (`bytes=a-b`, `bytes=a-`, `bytes=-n`)."""
    size = len(body)
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", wanted.replace(" ", ""))
    if match is None or match[0] == "bytes=-":
        return 416, b"", f"bytes */{size}"
    start = int(match[1]) if match[1] else max(size - int(match[2]), 0)
    end = min(int(match[2]), size - 1) if match[1] and match[2] else size - 1
    if start > end:
        return 416, b"", f"bytes */{size}"
    return 206, body[start : end + 1], f"bytes {start}-{end}/{size}"


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False  # a client may leave a kept-alive connection open
    site: "Site"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is none of our business; anything else is a bug of this server."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            self.site.errors.append(traceback.format_exc())


class Site:
    """
    Two origins on 127.0.0.1 (two free ports) that share their state; serves while used as a context manager.

    Attributes:
        endpoint (`str`): URL of the first origin.
        storage_endpoint (`str`): URL of the second origin.
        requests (`list[Request]`): Every request answered so far.
        unserved (`list[str]`): Requests for which there is no endpoint.
        errors (`list[str]`): Tracebacks of the server's own bugs.
        cut_next_download (`int`, *optional*): Hang up after that many bytes of the next file served.
    """

    handler: ClassVar[type[Handler]] = Handler

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.unserved: list[str] = []
        self.errors: list[str] = []
        self.cut_next_download: int | None = None
        self.lock = threading.Lock()  # one request at a time: endpoints are short, and then never race
        self._listeners = [_Listener(("127.0.0.1", 0), self.handler) for _ in range(2)]
        for listener in self._listeners:
            listener.site = self
        first, second = (listener.server_address[1] for listener in self._listeners)
        self.endpoint = f"http://127.0.0.1:{first}"
        # Same address, another name: huggingface_hub 1.x tells hosts apart by their names, 2.x by name and port.
        self.storage_endpoint = f"http://localhost:{second}"

    def __enter__(self) -> Self:
        for listener in self._listeners:
            threading.Thread(target=listener.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        for listener in self._listeners:
            listener.shutdown()
            listener.server_close()
