# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""A Hub on the loopback interface: enough of its HTTP API for the real `huggingface_hub` client to load and push.

Nothing is mocked on the client's side, so that what passes here is what a reader of the Hub runs. Repositories live in
memory, every commit is kept, and a request that the server does not know is remembered in `unknown_requests`: a client
that starts to use another endpoint should fail a test instead of falling back in silence.

The client reads its settings when it is imported: start it in a subprocess with `HubServer.environment`.
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


def files(folder: Path) -> dict[str, bytes]:
    """Return the content of all files in a folder, by path."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


ID = r"(?P<id>[\w.-]+/[\w.-]+)"
ROUTES = [
    ("GET HEAD", rf"/{ID}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    ("GET", rf"/api/models/{ID}(/revision/(?P<revision>[^/]+))?", "info"),
    ("GET", rf"/api/models/{ID}/tree/(?P<revision>[^/]+)", "tree"),
    ("POST", r"/api/repos/create", "create"),
    ("POST", rf"/api/models/{ID}/branch/(?P<revision>[^/]+)", "branch"),
    ("POST", r"/api/validate-yaml", "validate"),
    ("POST", rf"/api/models/{ID}/preupload/(?P<revision>[^/]+)", "preupload"),
    ("POST", rf"/api/models/{ID}/commit/(?P<revision>[^/]+)", "commit"),
    ("POST", rf"/{ID}\.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", "lfs_put"),
    ("GET HEAD", r"/lfs/(?P<oid>[0-9a-f]{64})", "lfs_get"),
]
# What the Hub keeps as large files (LFS), whatever their size: uploaded and downloaded from another address than the rest.
LARGE_FILES = (".safetensors", ".png", ".bin", ".pt", ".pkl")


class HubError(Exception):
    """An answer that is an error: a status and the code by which the client tells errors apart."""

    def __init__(self, status: int, code: str):
        super().__init__(f"{status} {code}")
        self.status, self.code = status, code


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass  # The test's output is for the test.

    def do_request(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(urlsplit(self.path).path)
        for methods, pattern, action in ROUTES:
            match = re.fullmatch(pattern, path)
            if self.command in methods.split() and match:
                try:
                    self.fail_as_told(action, match.groupdict().get("id"))
                    getattr(self, action)(**match.groupdict())
                except HubError as error:
                    self.answer(b"", status=error.status, headers={"X-Error-Code": error.code})
                return
        self.server.hub.unknown_requests.append(f"{self.command} {path}")
        self.answer(b"", status=404)

    do_GET = do_HEAD = do_POST = do_PUT = do_request

    def answer(self, body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def answer_json(self, value: dict | list, status: int = 200) -> None:
        self.answer(json.dumps(value).encode(), status, {"Content-Type": "application/json"})

    def fail_as_told(self, action: str, id: str | None) -> None:
        statuses = self.server.hub.failures.get((action, id))
        if statuses:
            raise HubError(statuses.pop(0), "Unavailable")

    def require_write_access(self, id: str) -> None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in self.server.hub.users:
            raise HubError(401, "Unauthorized")
        if id.split("/")[0] != self.server.hub.users[token]:
            raise HubError(403, "Forbidden")

    def at(self, id: str, revision: str | None) -> tuple[str, dict[str, bytes]]:
        """The commit id and the files of a repository at a revision: a branch or a commit id."""
        commits = self.server.hub.repositories.get(id)
        if commits is None:
            raise HubError(404, "RepoNotFound")
        sha = self.server.hub.heads[id].get(revision or "main", revision)
        if sha not in commits:
            raise HubError(404, "RevisionNotFound")
        return sha, commits[sha]

    def resolve(self, id: str, revision: str, path: str) -> None:
        sha, files = self.at(id, revision)
        if path not in files:
            raise HubError(404, "EntryNotFound")
        if not path.endswith(LARGE_FILES):
            etag = f'"{hashlib.sha1(files[path]).hexdigest()}"'
            self.answer(files[path], headers={"X-Repo-Commit": sha, "ETag": etag})
            return
        oid = self.server.hub.keep_large_file(files[path])
        linked = {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(files[path]))}
        headers = {"X-Repo-Commit": sha, "Location": f"{self.server.hub.store_url}/lfs/{oid}", **linked}
        self.answer(b"", status=302, headers=headers)

    def lfs_batch(self, id: str) -> None:
        self.require_write_access(id)
        request = json.loads(self.body)
        if request["operation"] != "upload" or "basic" not in request["transfers"]:
            raise HubError(422, "BadRequest")
        objects = []
        for one in request["objects"]:
            answer = {"oid": one["oid"], "size": one["size"]}
            # No actions: it is there already.
            if one["oid"] not in self.server.hub.large_files:
                answer["actions"] = {"upload": {"href": f"{self.server.hub.store_url}/lfs/{one['oid']}"}}
            objects.append(answer)
        self.answer_json({"transfer": "basic", "objects": objects})

    def lfs_put(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise HubError(400, "BadRequest")
        self.server.hub.keep_large_file(self.body)
        self.answer(b"")

    def lfs_get(self, oid: str) -> None:
        if oid not in self.server.hub.large_files:
            raise HubError(404, "EntryNotFound")
        self.answer(self.server.hub.large_files[oid], headers={"ETag": f'"{oid}"'})

    def info(self, id: str, revision: str | None) -> None:
        sha, files = self.at(id, revision)
        self.answer_json({"id": id, "sha": sha, "siblings": [{"rfilename": path} for path in sorted(files)]})

    def tree(self, id: str, revision: str) -> None:
        _, files = self.at(id, revision)
        entries = []
        for path, content in sorted(files.items()):
            oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            entry = {"type": "file", "path": path, "size": len(content), "oid": oid}
            if path.endswith(LARGE_FILES):
                lfs = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
                entry["lfs"] = lfs
            entries.append(entry)
        self.answer_json(entries)

    def create(self) -> None:
        request = json.loads(self.body)
        id = f"{request.get('organization') or 'user'}/{request['name']}"
        self.require_write_access(id)
        status = 409 if id in self.server.hub.repositories else 200
        if status == 200:
            self.server.hub.commit(id, {})
            self.server.hub.private[id] = request.get("visibility") == "private"
        self.answer_json({"url": f"{self.server.hub.url}/{id}", "name": id, "id": id}, status)

    def branch(self, id: str, revision: str) -> None:
        self.require_write_access(id)
        sha, _ = self.at(id, json.loads(self.body or b"{}").get("startingPoint"))
        if revision in self.server.hub.heads[id]:
            raise HubError(409, "Conflict")
        self.server.hub.heads[id][revision] = sha
        self.answer_json({})

    def validate(self) -> None:
        self.answer_json({"errors": [], "warnings": []})

    def preupload(self, id: str, revision: str) -> None:
        self.require_write_access(id)
        self.at(id, revision)
        paths = [file["path"] for file in json.loads(self.body)["files"]]
        modes = {path: "lfs" if path.endswith(LARGE_FILES) else "regular" for path in paths}
        files = [{"path": p, "uploadMode": mode, "shouldIgnore": False, "oid": None} for p, mode in modes.items()]
        self.answer_json({"files": files})

    def commit(self, id: str, revision: str) -> None:
        self.require_write_access(id)
        files = dict(self.at(id, revision)[1])
        for line in self.body.splitlines():
            operation = json.loads(line)
            if operation["key"] == "file":
                files[operation["value"]["path"]] = base64.b64decode(operation["value"]["content"])
            elif operation["key"] == "lfsFile":
                oid = operation["value"]["oid"]
                if oid not in self.server.hub.large_files:
                    raise HubError(400, "BadRequest")  # it was never uploaded
                files[operation["value"]["path"]] = self.server.hub.large_files[oid]
            elif operation["key"] == "deletedFile":
                if files.pop(operation["value"]["path"], None) is None:
                    raise HubError(400, "BadRequest")
        sha = self.server.hub.commit(id, files, revision)
        self.answer_json({"commitOid": sha, "commitUrl": f"{self.server.hub.url}/{id}/commit/{sha}"})


class HubServer:
    """
    The server, from `__enter__` to `__exit__`; `repositories` maps an id to its commits, oldest first. A token belongs to
    one of `users`, who writes to repositories of that name. `failures` are the statuses that the next
    calls of an action on a repository (of no repository: `None`) get. `large_files` are those of all repositories, by their
    SHA-256.
    """

    def __init__(self):
        self.repositories: dict[str, dict[str, dict[str, bytes]]] = {}
        self.heads: dict[str, dict[str, str]] = {}
        self.private: dict[str, bool] = {}
        self.users = {"hf_token": "user"}
        self.failures: dict[tuple[str, str | None], list[int]] = {}
        self.large_files: dict[str, bytes] = {}
        self.unknown_requests: list[str] = []

    def __enter__(self) -> "HubServer":
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.hub = self
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        # Another host, as with the Hub: the client treats redirects to it in another way.
        self.store_url = f"http://localhost:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        self.server.shutdown()
        self.server.server_close()

    def keep_large_file(self, content: bytes) -> str:
        oid = hashlib.sha256(content).hexdigest()
        self.large_files[oid] = content
        return oid

    def commit(self, id: str, files: dict[str, bytes], branch: str = "main") -> str:
        """Make `files` the content of a repository's branch, neither of which need exist yet; returns the commit id."""
        commits = self.repositories.setdefault(id, {})
        sha = hashlib.sha1(f"{id} {len(commits)}".encode()).hexdigest()
        commits[sha] = files
        self.heads.setdefault(id, {})[branch] = sha
        return sha

    def add_folder(self, id: str, folder: Path) -> None:
        self.commit(id, files(folder))

    def files(self, id: str, branch: str = "main") -> dict[str, bytes]:
        return self.repositories[id][self.heads[id][branch]]

    def environment(self, home: Path) -> dict[str, str]:
        """The environment of a process whose Hub is this server, with its caches and dynamic modules under `home`."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGINGFACE_", "DIFFUSERS_"))}
        return {
            **kept,
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_TOKEN": "hf_token",
            # The client's chunked store is another service, on another host.
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "NO_PROXY": "127.0.0.1,localhost",
        }
