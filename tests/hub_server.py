"""A hub on the loopback interface: the few routes that uploads and downloads use, with failures at random."""

import base64
import hashlib
import json
import random
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_a-secret-token-of-the-test"
OWNER = "alice"
REVISION = "0123456789abcdef0123456789abcdef01234567"
SMALL = 2000
"""Bytes up to which a file is part of the commit; larger ones are uploaded before it."""


class HubServer:
    """Repositories in memory: `files[repository][path]`. A context manager.

    A share `failing` of the requests that write fails, in one of several ways.
    """

    def __init__(self, failing: float = 0.0, seed: int = 0):
        self.files: dict[str, dict[str, bytes]] = {}
        self.objects: dict[str, bytes] = {}
        self.private: dict[str, bool] = {}
        self.requests: list[str] = []
        self.num_failures = 0
        self.failing = failing
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "HubServer":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def fails(self) -> str | None:
        """How the next request that writes fails, if it does."""
        with self._lock:
            if self._random.random() >= self.failing:
                return None
            self.num_failures += 1
            return self._random.choice(["500", "503", "429", "nonsense", "hang up"])

    def commit(self, repository: str, lines: list[bytes]) -> None:
        with self._lock:
            for line in lines:
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "file":
                    self.files[repository][value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "lfsFile":
                    self.files[repository][value["path"]] = self.objects[value["oid"]]


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_POST(self) -> None:
        self._answer(is_writing=True)

    def do_PUT(self) -> None:
        self._answer(is_writing=True)

    def do_GET(self) -> None:
        self._answer(is_writing=False)

    do_HEAD = do_GET

    def _answer(self, *, is_writing: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self._body()
        self.hub.requests.append(f"{self.command} {path}")
        failure = self.hub.fails() if is_writing else None
        if failure == "hang up":
            self.close_connection = True
            with suppress(OSError):
                self.connection.shutdown(2)
        elif failure == "nonsense":
            self._send(200, b"<html>not what was asked for</html>", "text/html")
        elif failure is not None:
            self._send(int(failure), b"{}")
        elif path.startswith("/objects/"):
            self._put_object(path.removeprefix("/objects/"), body)
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._send(401, b'{"error": "Invalid credentials"}')
        else:
            self._route(path, body)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _route(self, path: str, body: bytes) -> None:
        parts = path.strip("/").split("/")
        if path == "/api/repos/create":
            self._create(json.loads(body))
        elif parts[:2] == ["api", "models"]:
            self._of_repository("/".join(parts[2:4]), parts[4:], body)
        elif path.endswith(".git/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            actions = [
                {**each, "actions": {"upload": {"href": f"{self.hub.address}/objects/{each['oid']}?signature=secret"}}}
                for each in objects
            ]
            self._send_json({"objects": actions, "transfer": "basic"})
        elif len(parts) > 3 and parts[2] == "resolve":
            self._file("/".join(parts[:2]), "/".join(parts[4:]))
        else:
            self._send(404, b"{}")

    def _create(self, wanted: dict[str, Any]) -> None:
        repository = f"{wanted['organization']}/{wanted['name']}"
        if wanted["organization"] != OWNER:
            self._send(403, b'{"error": "You have no rights here"}')
        elif repository in self.hub.files:
            self._send(409, json.dumps({"error": "exists", "url": f"{self.hub.address}/{repository}"}).encode())
        else:
            self.hub.files[repository] = {}
            self.hub.private[repository] = wanted.get("visibility") == "private"
            self._send_json({"url": f"{self.hub.address}/{repository}"})

    def _of_repository(self, repository: str, what: list[str], body: bytes) -> None:
        files = self.hub.files.get(repository)
        if files is None:
            self._send(404, b"{}", more={"X-Error-Code": "RepoNotFound"})
        elif what[:1] == ["preupload"]:
            modes = [
                {
                    "path": each["path"],
                    "uploadMode": "regular" if each["size"] <= SMALL else "lfs",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for each in json.loads(body)["files"]
            ]
            self._send_json({"files": modes})
        elif what[:1] == ["commit"]:
            self.hub.commit(repository, body.splitlines())
            self._send_json(
                {"success": True, "commitOid": REVISION, "commitUrl": f"{self.hub.address}/{repository}/commit/x"}
            )
        elif what[:1] == ["tree"]:
            self._send_json(list(_tree(files, "/".join(what[2:]), is_recursive="recursive=true" in self.path.lower())))
        elif not what or what[0] in ("revision", "auth-check"):
            self._send_json({"id": repository, "sha": REVISION, "siblings": [{"rfilename": name} for name in files]})
        else:
            self._send(404, b"{}")

    def _put_object(self, oid: str, body: bytes) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            self._send(400, b"{}")
            return
        self.hub.objects[oid] = body
        self._send(200, b"")

    def _file(self, repository: str, path: str) -> None:
        content = self.hub.files.get(repository, {}).get(path)
        if content is None:
            self._send(404, b"", more={"X-Error-Code": "EntryNotFound"})
            return
        etag = hashlib.sha256(content).hexdigest()
        self._send(200, content, "application/octet-stream", {"ETag": f'"{etag}"', "X-Repo-Commit": REVISION})

    def _send_json(self, content: Any) -> None:
        self._send(200, json.dumps(content).encode())

    def _send(
        self, status: int, content: bytes, kind: str = "application/json", more: dict[str, str] | None = None
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **(more or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _tree(files: dict[str, bytes], folder: str, *, is_recursive: bool) -> list[dict[str, Any]]:
    start = f"{folder}/" if folder else ""
    entries: dict[str, dict[str, Any]] = {}
    for path, content in files.items():
        if not path.startswith(start):
            continue
        rest = path.removeprefix(start)
        if "/" in rest and not is_recursive:
            name = start + rest.partition("/")[0]
            entries[name] = {"type": "directory", "path": name, "oid": "0" * 40}
        else:
            oid = hashlib.sha1(content).hexdigest()
            entries[path] = {"type": "file", "path": path, "size": len(content), "oid": oid}
    return list(entries.values())
