"""A server on this machine that answers as the Hugging Face hub does, for one model repository.

The answers have the form that the hub documents for its HTTP API and that huggingface_hub reads; what is
sent is kept, so that it can be asked for again. No test reaches the hub itself.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlparse

COMMIT = "c" * 40
TOKEN = "hf_" + "t" * 30
LARGE = ".safetensors"


class Hub(ThreadingHTTPServer):
    """What the repository holds, and what was asked."""

    def __init__(self, name: str):
        super().__init__(("127.0.0.1", 0), Answers)
        self.name, self.files, self.parts = name, {}, {}
        self.asked: list[str] = []
        self.made: dict | None = None

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answers(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def _json(self, value: object, code: int = 200) -> None:
        self._bytes(json.dumps(value).encode(), code, {"Content-Type": "application/json"})

    def _bytes(self, content: bytes, code: int = 200, headers: dict | None = None) -> None:
        self.send_response(code)
        for key, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _refused(self) -> bool:
        """Writing needs an account's token."""
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return False
        self._body()
        self._bytes(b"", 401, {"X-Error-Message": "Invalid username or password."})
        return True

    def do_POST(self) -> None:
        hub, path = self.server, urlparse(self.path).path
        hub.asked.append(f"POST {path}")
        if self._refused():
            return
        body = self._body()
        if path == "/api/repos/create":
            hub.made = json.loads(body)
            self._json({"url": f"{hub.address}/{hub.name}"})
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif path == f"/api/models/{hub.name}/preupload/main":
            kind = {True: "lfs", False: "regular"}
            files = [
                {"path": f["path"], "uploadMode": kind[f["path"].endswith(LARGE)], "shouldIgnore": False}
                for f in json.loads(body)["files"]
            ]
            self._json({"files": files, "commitOid": COMMIT})
        elif path == f"/{hub.name}.git/info/lfs/objects/batch":
            objects = [
                o | {"actions": {"upload": {"href": f"{hub.address}/store/{o['oid']}"}}}
                for o in json.loads(body)["objects"]
            ]
            self._json({"transfer": "basic", "objects": objects})
        elif path == f"/api/models/{hub.name}/commit/main":
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    hub.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    hub.files[value["path"]] = hub.parts[value["oid"]]
            url = f"{hub.address}/{hub.name}/commit/{COMMIT}"
            self._json({"success": True, "commitOid": COMMIT, "commitUrl": url, "hookOutput": ""})
        else:
            self._json({"error": "Not Found"}, 404)

    def do_PUT(self) -> None:
        oid, content = self.path.rpartition("/")[2], self._body()
        if hashlib.sha256(content).hexdigest() != oid:
            return self._bytes(b"", 400)
        self.server.parts[oid] = content
        return self._bytes(b"")

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub, path = self.server, urlparse(self.path).path
        hub.asked.append(f"{self.command} {path}")
        where = f"/{hub.name}/resolve/{COMMIT}/"
        if path in (f"/api/models/{hub.name}", f"/api/models/{hub.name}/revision/main"):
            siblings = [{"rfilename": name} for name in hub.files]
            self._json({"id": hub.name, "modelId": hub.name, "sha": COMMIT, "siblings": siblings})
        elif path.startswith(f"/api/models/{hub.name}/tree/"):
            self._json(
                [{"type": "file", "path": n, "size": len(c), "oid": _oid(c)} for n, c in hub.files.items()]
            )
        elif path.startswith(where) and path.removeprefix(where) in hub.files:
            content = hub.files[path.removeprefix(where)]
            self._bytes(content, 200, {"ETag": f'"{_oid(content)}"', "X-Repo-Commit": COMMIT})
        else:
            self._bytes(
                b"", 404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}
            )


def _oid(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@contextmanager
def serve(name: str):
    """Answer for one repository as long as the block takes."""
    hub = Hub(name)
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
