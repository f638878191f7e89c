# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""A Hub on the loopback interface: enough of its HTTP API for the real `huggingface_hub` client to load and push.

Nothing is mocked on the client's side. Repositories live in memory, every commit is kept, and a request that the server does not
know is remembered in `unknown_requests`: a client that starts to use another endpoint should fail a test.
"""

import base64
import hashlib
import json
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

from huggingface_hub import close_session, constants, hf_api


def files(folder: Path) -> dict[str, bytes]:
    """Return the content of all files in a folder, by path."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


ID, REVISION = r"(?P<id>[\w.-]+/[\w.-]+)", r"(?P<revision>[^/]+)"
ROUTES = [
    ("GET HEAD", rf"/{ID}/resolve/{REVISION}/(?P<path>.+)", "resolve"),
    ("GET", rf"/api/models/{ID}(/revision/{REVISION})?", "info"),
    ("GET", rf"/api/models/{ID}/tree/{REVISION}", "tree"),
    ("POST", r"/api/repos/create", "create"),
    ("POST", rf"/api/models/{ID}/branch/{REVISION}", "branch"),
    ("POST", r"/api/validate-yaml", "validate"),
    ("POST", rf"/api/models/{ID}/preupload/{REVISION}", "preupload"),
    ("POST", rf"/api/models/{ID}/commit/{REVISION}", "commit"),
]


class HubError(Exception):
    """An answer that is an error: a status and the code by which the client tells errors apart."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass  # The test's output is for the test.

    def do_request(self) -> None:
        self.hub, self.body = self.server, self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(urlsplit(self.path).path)
        for methods, pattern, action in ROUTES:
            match = re.fullmatch(pattern, path)
            if self.command in methods.split() and match:
                try:
                    if statuses := self.hub.failures.get((action, match.groupdict().get("id"))):
                        raise HubError(statuses.pop(0), "Unavailable")
                    if (answer := getattr(self, action)(**match.groupdict())) is not None:
                        self.answer(json.dumps(answer).encode(), headers={"Content-Type": "application/json"})
                except HubError as error:
                    status, code = error.args
                    self.answer(b"", status, {"X-Error-Code": code})
                return
        self.hub.unknown_requests.append(f"{self.command} {path}")
        self.answer(b"", status=404)

    do_GET = do_HEAD = do_POST = do_PUT = do_request

    def answer(self, body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def require_write_access(self, id: str) -> None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token != "hf_token":
            raise HubError(401, "Unauthorized")
        if not id.startswith("user/"):
            raise HubError(403, "Forbidden")

    def at(self, id: str, revision: str | None) -> tuple[str, dict[str, bytes]]:
        """The commit id and the files of a repository at a revision: a branch or a commit id."""
        if id not in self.hub.repositories:
            raise HubError(404, "RepoNotFound")
        sha = self.hub.heads[id].get(revision or "main", revision)
        if sha not in self.hub.repositories[id]:
            raise HubError(404, "RevisionNotFound")
        return sha, self.hub.repositories[id][sha]

    def resolve(self, id: str, revision: str, path: str) -> None:
        sha, found = self.at(id, revision)
        if path not in found:
            raise HubError(404, "EntryNotFound")
        etag = f'"{hashlib.sha1(found[path]).hexdigest()}"'
        self.answer(found[path], headers={"X-Repo-Commit": sha, "ETag": etag})

    def info(self, id: str, revision: str | None) -> dict:
        sha, found = self.at(id, revision)
        return {"id": id, "sha": sha, "siblings": [{"rfilename": path} for path in sorted(found)]}

    def tree(self, id: str, revision: str) -> list:
        entries = []
        for path, content in sorted(self.at(id, revision)[1].items()):
            entry = {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            # The Hub keeps weights as large files, by their SHA-256.
            lfs = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
            entries.append(entry | ({"lfs": lfs} if path.endswith(".safetensors") else {}))
        return entries

    def create(self) -> None:
        request = json.loads(self.body)
        id = f"{request.get('organization') or 'user'}/{request['name']}"
        self.require_write_access(id)
        is_new = id not in self.hub.repositories
        if is_new:
            self.hub.commit(id, {})
            self.hub.private[id] = request.get("visibility") == "private"
        content = {"url": f"{self.hub.url}/{id}", "name": id, "id": id}
        self.answer(json.dumps(content).encode(), 200 if is_new else 409)

    def branch(self, id: str, revision: str) -> dict:
        self.require_write_access(id)
        if revision in self.hub.heads[id]:
            raise HubError(409, "Conflict")
        self.hub.heads[id][revision], _ = self.at(id, json.loads(self.body or b"{}").get("startingPoint"))
        return {}

    def validate(self) -> dict:
        return {}

    def preupload(self, id: str, revision: str) -> dict:
        self.require_write_access(id)
        self.at(id, revision)
        paths = [file["path"] for file in json.loads(self.body)["files"]]
        # All files come with the commit; that large ones go elsewhere is the client's business.
        return {"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False, "oid": None} for p in paths]}

    def commit(self, id: str, revision: str) -> dict:
        self.require_write_access(id)
        changed = dict(self.at(id, revision)[1])
        for operation in map(json.loads, self.body.splitlines()):
            value = operation["value"]
            if operation["key"] == "file":
                changed[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "deletedFile":
                del changed[value["path"]]
        sha = self.hub.commit(id, changed, revision)
        return {"commitOid": sha, "commitUrl": f"{self.hub.url}/{id}/commit/{sha}"}


class HubServer(ThreadingHTTPServer):
    """
    A server that runs until `__exit__`; `repositories` maps an id to its commits, oldest first. The token "hf_token" is that of
    "user". `failures` are the statuses that the next calls of an action on a repository get.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, dict[str, dict[str, bytes]]] = {}
        self.heads: dict[str, dict[str, str]] = {}
        self.private: dict[str, bool] = {}
        self.failures: dict[tuple[str, str | None], list[int]] = {}
        self.unknown_requests: list[str] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def __exit__(self, *exception) -> None:
        self.shutdown()
        self.server_close()

    def commit(self, id: str, content: dict[str, bytes], branch: str = "main") -> str:
        """Make `content` that of a repository's branch, neither of which need exist yet; returns the commit id."""
        commits = self.repositories.setdefault(id, {})
        sha = hashlib.sha1(f"{id} {len(commits)}".encode()).hexdigest()
        commits[sha] = content
        self.heads.setdefault(id, {})[branch] = sha
        return sha

    def files(self, id: str, branch: str = "main") -> dict[str, bytes]:
        return self.repositories[id][self.heads[id][branch]]

    def environment(self, home: Path) -> dict[str, str]:
        """The environment of a process whose Hub is this server, with its caches and dynamic modules under `home`."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGINGFACE_", "DIFFUSERS_"))}
        # XET, the client's chunked store, is another service, on another host.
        off = dict.fromkeys(("HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_UPDATE_CHECK"), "1")
        own = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_TOKEN": "hf_token", "NO_PROXY": "127.0.0.1"}
        return kept | off | own

    def use(self, monkeypatch, home: Path) -> "HubServer":
        """Make this server the Hub of this process, whose client has read its environment already."""
        template = self.url + "/{repo_id}/resolve/{revision}/{filename}"
        for name, value in {
            "ENDPOINT": self.url, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_CACHE": str(home), "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True, "HF_HUB_DISABLE_TELEMETRY": True,
        }.items():  # fmt: skip
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(hf_api.api, "endpoint", self.url)  # of the client's functions, such as `model_info`
        monkeypatch.setenv("HF_TOKEN", "hf_token")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        close_session()
        return self
