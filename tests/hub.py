"""A stand-in for the Hugging Face hub: directories as repositories, over HTTP on this machine.

It answers what huggingface_hub and `datasets` ask when they load a repository, by the hub's API:

    GET   /api/models/OWNER/NAME[/revision/R]      the repository's state and its files
    GET   /api/models/OWNER/NAME/tree/R[/FOLDER]   files with sizes; POST …/paths-info/R: of some
    HEAD, GET   /OWNER/NAME/resolve/R/FILE         a file, with its ETag and the commit
    POST  /api/repos/create; …/preupload/R, …/commit/R        a repository, and files put into it

Data sets have `datasets` in place of `models`, and stand below /datasets/.
"""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "c0ffee" * 6 + "cafe"  # 40 digits, as of any commit
REVISIONS = ("main", COMMIT, "v1")


class Hub:
    """Repositories below a folder: `models/OWNER/NAME/` and `datasets/OWNER/NAME/`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.asked: list[str] = []
        self.address = ""

    def environment(self, cache: Path) -> dict[str, str]:
        """What a process needs that shall ask this hub, and store in `cache`."""
        return {
            "HF_ENDPOINT": self.address,
            "HF_HOME": str(cache),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "0",
        }

    @contextmanager
    def served(self) -> Iterator["Hub"]:
        """Inside, it answers at `address`."""
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:  # noqa: N802
        self._answer(b"")

    def do_GET(self) -> None:  # noqa: N802
        self._answer(b"")

    def do_POST(self) -> None:  # noqa: N802
        self._answer(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    def _answer(self, body: bytes) -> None:
        self.hub.asked.append(f"{self.command} {self.path}")
        steps = [unquote(step) for step in urlsplit(self.path).path.strip("/").split("/")]
        if steps == ["api", "repos", "create"]:
            self._create(json.loads(body))
            return
        if steps[0] == "api" and len(steps) >= 4 and steps[1] in ("models", "datasets"):
            self._about(steps[1], "/".join(steps[2:4]), steps[4:], body)
            return
        kind = "datasets" if steps[0] == "datasets" else "models"
        steps = steps[1:] if kind == "datasets" else steps
        if len(steps) >= 5 and steps[2] == "resolve":
            self._file(kind, "/".join(steps[:2]), steps[3], "/".join(steps[4:]))
            return
        self._fail("EntryNotFound")

    def _about(self, kind: str, name: str, steps: list[str], body: bytes) -> None:
        repository = self.hub.root / kind / name
        if not repository.is_dir():
            return self._fail("RepoNotFound", 401)  # as the hub says to those who are not known
        if len(steps) > 1 and steps[1] not in REVISIONS:
            return self._fail("RevisionNotFound")
        files = sorted(p for p in repository.rglob("*") if p.is_file())
        names = [file.relative_to(repository).as_posix() for file in files]
        if steps[:1] == ["tree"]:
            return self._json(_listed(repository, "/".join(steps[2:])))
        if steps[:1] == ["paths-info"]:
            asked = json.loads(body) if body.startswith(b"{") else parse_qs(body.decode())
            wanted = set(asked["paths"] if isinstance(asked["paths"], list) else [asked["paths"]])
            return self._json([e for e in _listed(repository, "", True) if e["path"] in wanted])
        if steps[:1] == ["preupload"]:
            paths = [file["path"] for file in json.loads(body)["files"]]
            files = [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in paths]
            return self._json({"files": files})
        if steps[:1] == ["commit"]:
            return self._commit(repository, name, [json.loads(line) for line in body.splitlines()])
        info = {"id": name, "sha": COMMIT, "private": False, "gated": False, "disabled": False}
        info |= {"tags": [], "downloads": 0, "likes": 0, "lastModified": "2026-01-01T00:00:00.000Z"}
        return self._json(info | {"siblings": [{"rfilename": file} for file in names]})

    def _create(self, asked: dict[str, Any]) -> None:
        name = "/".join(filter(None, (asked.get("organization", "tiny"), asked["name"])))
        (self.hub.root / "models" / name).mkdir(parents=True, exist_ok=True)
        return self._json({"url": f"{self.hub.address}/{name}", "id": name})

    def _commit(self, repository: Path, name: str, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            if line["key"] == "file":
                path = repository / line["value"]["path"]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(base64.b64decode(line["value"]["content"]))
        url = f"{self.hub.address}/{name}/commit/{COMMIT}"
        return self._json({"commitUrl": url, "commitOid": COMMIT, "pullRequestUrl": None})

    def _file(self, kind: str, name: str, revision: str, file: str) -> None:
        path = self.hub.root / kind / name / file
        if not (self.hub.root / kind / name).is_dir():
            return self._fail("RepoNotFound", 401)
        if revision not in REVISIONS:
            return self._fail("RevisionNotFound")
        if not path.is_file():
            return self._fail("EntryNotFound")
        content = path.read_bytes()
        etag = hashlib.sha1(content).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        start, status = 0, 200
        if asked := self.headers.get("Range"):
            start, status = int(asked.removeprefix("bytes=").split("-")[0]), 206
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        return self._send(status, content[start:], "application/octet-stream", headers)

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), "application/json", {})

    def _fail(self, code: str, status: int = 404) -> None:
        self._send(status, b"", "text/plain", {"X-Error-Code": code, "X-Error-Message": code})

    def _send(self, status: int, content: bytes, kind: str, headers: dict[str, str]) -> None:
        self.send_response(status)
        for header, value in (headers | {"Content-Type": kind}).items():
            self.send_header(header, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _listed(repository: Path, folder: str, recursive: bool = True) -> list[dict[str, Any]]:
    """Files and folders below a folder, as the hub describes them."""
    described = []
    for path in sorted((repository / folder).rglob("*") if recursive else ()):
        entry: dict[str, Any] = {"path": path.relative_to(repository).as_posix(), "oid": "0" * 40}
        if path.is_dir():
            described.append(entry | {"type": "directory"})
        else:
            oid = hashlib.sha1(path.read_bytes()).hexdigest()
            entry |= {"type": "file", "size": path.stat().st_size, "oid": oid}
            described.append(entry)
    return described
