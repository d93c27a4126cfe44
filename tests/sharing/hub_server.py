"""A stand-in for the Hub on this machine: what uploading a folder and downloading it again takes."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

SHA = "0123456789" * 4  # of the one commit that there is
TOKEN = "hf_a_users_own"


class Hub(ThreadingHTTPServer):
    """Repositories by name: their files, and whether they are private."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    """A request."""

    server: Hub

    def log_message(self, *_: Any) -> None:
        """Nothing."""

    def answer(self, status: int, body: Any = None, **headers: str) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            return self.answer(401, {"error": "Invalid username or password."})
        if self.path == "/api/repos/create":
            asked = json.loads(data)
            name = f"{asked['organization']}/{asked['name']}"
            self.server.repos.setdefault(name, {})
            self.server.private[name] = asked.get("private", asked.get("visibility") == "private")
            return self.answer(200, {"url": f"{self.server.url}/{name}"})
        name, _, rest = self.path.removeprefix("/api/models/").rpartition("/main")[0].rpartition("/")
        if rest == "preupload":
            return self.answer(
                200,
                {
                    "files": [
                        {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                        for f in json.loads(data)["files"]
                    ]
                },
            )
        for line in map(json.loads, data.splitlines()):
            if line["key"] == "file":
                value = line["value"]
                self.server.repos[name][value["path"]] = base64.b64decode(value["content"])
        url = f"{self.server.url}/{name}/commit/{SHA}"
        return self.answer(200, {"success": True, "commitOid": SHA, "commitUrl": url, "hookOutput": ""})

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].strip("/")
        if path.startswith("api/models/"):
            name = "/".join(path.split("/")[2:4])
            files = self.server.repos.get(name)
            if files is None:
                return self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            if "/tree/" in path:
                return self.answer(
                    200, [{"type": "file", "path": f, "size": len(c), "oid": SHA} for f, c in files.items()]
                )
            siblings = [{"rfilename": file} for file in files]
            return self.answer(
                200, {"id": name, "sha": SHA, "private": self.server.private[name], "siblings": siblings}
            )
        name, _, rest = path.partition("/resolve/")
        content = self.server.repos.get(name, {}).get(rest.partition("/")[2])
        if content is None:
            return self.answer(404, {"error": "Entry not found"})
        tag = hashlib.sha256(content).hexdigest()
        return self.answer(200, content, ETag=f'"{tag}"', X_Repo_Commit=SHA)

    do_HEAD = do_GET


@contextmanager
def running() -> Iterator[Hub]:
    """A server while the context lasts."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
