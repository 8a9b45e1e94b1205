"""A model hub on localhost: as much of the real one's interface as listing and fetching files takes.

Files are given as bytes; those of ``large`` names get a sha256 and an ``X-Linked-*`` header, as files in
large-file storage do.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

__all__ = ["FakeHub", "Repo", "folder_files", "serve"]

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = (".safetensors", ".bin")


@dataclass
class Repo:
    """``gated`` answers 403 to file requests without ``token``."""

    files: Mapping[str, bytes]
    commit: str = COMMIT
    gated: bool = False


@dataclass
class FakeHub:
    """What is served, what was asked for, and where the line is cut: ``cuts`` maps a file's name to how
    many requests for it end half-way."""

    repos: dict[str, Repo]
    url: str = ""
    token: str = "hf_right"
    cuts: dict[str, int] = field(default_factory=dict)
    status: int = 0  # answer everything with this instead
    corrupt: str = ""  # a file that arrives changed
    requests: list[tuple[str, str, str]] = field(default_factory=list)  # (method, path, Range)

    def asked(self, name: str, method: str = "GET") -> list[str]:
        """The Range headers of the requests for a file."""
        return [span for verb, path, span in self.requests if verb == method and path.endswith(f"/{name}")]

    def downloads(self) -> list[str]:
        """Names of all files whose content was asked for."""
        found = [path for verb, path, _ in self.requests if verb == "GET" and "/resolve/" in path]
        return [path.split("/resolve/")[1].partition("/")[2] for path in found]


def folder_files(folder: Path, prefix: str = "") -> dict[str, bytes]:
    """Every file of a folder, as `Repo` takes them."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {prefix + path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@contextmanager
def serve(repos: dict[str, Repo]) -> Iterator[FakeHub]:
    """Serve until the context ends."""
    hub = FakeHub(repos)

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or every answer waits 40 ms for its second packet

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path, self.headers.get("Range", "")))
        if self.hub.status:
            return self._refuse(self.hub.status, "")
        if path.startswith("/api/models/"):
            return self._list(path.removeprefix("/api/models/"))
        if "/resolve/" in path:
            return self._file(*path.lstrip("/").split("/resolve/"))
        return self._refuse(404, "")

    def _list(self, asked: str) -> None:
        name, _, revision = asked.partition("/revision/")
        repo = self.hub.repos.get(name)
        if repo is None:
            return self._refuse(401, "RepoNotFound")
        if revision not in ("", "main", repo.commit):
            return self._refuse(404, "RevisionNotFound")
        siblings = []
        for key, data in repo.files.items():
            entry: dict[str, object] = {"rfilename": key, "size": len(data), "blobId": _git(data)}
            if key.endswith(LARGE):
                entry["lfs"] = {"size": len(data), "sha256": _sha(data), "pointerSize": 130}
            siblings.append(entry)
        info = {
            "id": name,
            "modelId": name,
            "sha": repo.commit,
            "siblings": siblings,
            "tags": [],
            "private": False,
        }
        return self._send(200, json.dumps(info).encode(), {"Content-Type": "application/json"})

    def _file(self, name: str, rest: str) -> None:
        repo, (_, _, key) = self.hub.repos.get(name), rest.partition("/")
        if repo is None:
            return self._refuse(401, "RepoNotFound")
        if repo.gated and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return self._refuse(403, "GatedRepo")
        if key not in repo.files:
            return self._refuse(404, "EntryNotFound")
        data = repo.files[key]
        headers = {"X-Repo-Commit": repo.commit, "Accept-Ranges": "bytes", "ETag": f'"{_git(data)}"'}
        if key.endswith(LARGE):
            headers |= {"X-Linked-Etag": f'"{_sha(data)}"', "X-Linked-Size": str(len(data))}
        if key == self.hub.corrupt and self.command == "GET":
            data = bytes(len(data))
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        cut = self.command == "GET" and self.hub.cuts.get(key, 0) > 0
        if cut:
            self.hub.cuts[key] -= 1
        return self._send(206 if start else 200, data[start:], headers, cut=cut)

    def _send(self, status: int, data: bytes, headers: Mapping[str, str], *, cut: bool = False) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            self.close_connection = True

    def _refuse(self, status: int, code: str) -> None:
        self._send(status, b"", {"X-Error-Code": code} if code else {})


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _git(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
