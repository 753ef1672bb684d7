"""A stand-in for the Hugging Face hub: a local HTTP server that the real client talks to, with repositories in memory.

As much of the hub's interface as making a repository, committing files and fetching a snapshot take. Cards are refused
as the hub refuses them: metadata that is not YAML, or a ``model-index`` that its own parser cannot read.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlparse

from huggingface_hub import ModelCard


class Hub:
    """The repositories of one user, ``someone``.

    Attributes:
        commits: by full name of a repository and revision (a commit, or the name of a branch), the files by path.
        private: by full name.
        messages: of all commits, in order.
    """

    def __init__(self) -> None:
        self.commits: dict[str, dict[str, dict[str, bytes]]] = {}
        self.heads: dict[str, dict[str, str]] = {}
        self.private: dict[str, bool] = {}
        self.messages: list[str] = []

    def create(self, name: str, private: bool) -> bool:
        """Makes a repository with an empty first commit; False where there is one."""
        if name in self.commits:
            return False
        self.private[name] = private
        self.commits[name], self.heads[name] = {}, {}
        self._store(name, "main", {})
        return True

    def commit(self, name: str, branch: str, files: dict[str, bytes], message: str) -> str:
        """Adds files to a branch; returns the commit."""
        self.messages.append(message)
        return self._store(name, branch, self.commits[name][self.heads[name][branch]] | files)

    def resolve(self, name: str, revision: str) -> str | None:
        """The commit that a revision means."""
        commit = self.heads.get(name, {}).get(revision, revision)
        return commit if commit in self.commits.get(name, {}) else None

    def _store(self, name: str, branch: str, files: dict[str, bytes]) -> str:
        text = f"{name} {branch} {len(self.commits[name])}".encode() + b"".join(files.values())
        commit = hashlib.sha1(text).hexdigest()
        self.commits[name][commit], self.heads[name][branch] = files, commit
        return commit


@contextmanager
def serve() -> Iterator[tuple[str, Hub]]:
    """(address, hub) of a running stand-in."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Nothing: a test prints what matters."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = [unquote(part) for part in urlparse(self.path).path.strip("/").split("/")]
        if "Authorization" not in self.headers:
            return self._answer(401, {"error": "Invalid credentials"})

        if parts == ["api", "repos", "create"]:
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'someone'}/{asked['name']}"
            made = self.hub.create(name, asked.get("visibility") == "private")
            url = f"http://{self.headers['Host']}/{name}"
            return self._answer(200 if made else 409, {"url": url} | ({} if made else {"error": "there is one"}))
        if parts == ["api", "validate-yaml"]:
            return self._validate(json.loads(body)["content"])

        name, action, revision = "/".join(parts[2:4]), parts[4], parts[5]
        if name not in self.hub.commits:
            return self._missing("RepoNotFound")
        if action == "branch":
            heads = self.hub.heads[name]
            status = 409 if revision in heads else 200
            heads.setdefault(revision, heads["main"])
            return self._answer(status, {})
        if action == "preupload":
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self._answer(200, {"files": files})
        if action == "commit" and revision in self.hub.heads[name]:
            return self._commit(name, revision, [json.loads(line) for line in body.splitlines()])
        return self._missing("RevisionNotFound")

    def do_GET(self) -> None:
        parts = [unquote(part) for part in urlparse(self.path).path.strip("/").split("/")]
        if parts[:2] == ["api", "models"]:
            name, what = "/".join(parts[2:4]), parts[4] if len(parts) > 4 else "revision"
            revision = parts[5] if len(parts) > 5 else "main"
        else:
            name, what, revision = "/".join(parts[:2]), parts[2], parts[3]
        if name not in self.hub.commits:
            return self._missing("RepoNotFound")
        commit = self.hub.resolve(name, revision)
        if commit is None:
            return self._missing("RevisionNotFound")

        files = self.hub.commits[name][commit]
        if what == "resolve":
            path = "/".join(parts[4:])
            return self._send(files[path], commit) if path in files else self._missing("EntryNotFound")
        listed = [{"type": "file", "path": p, "size": len(c), "oid": _hash(c)} for p, c in files.items()]
        if what == "tree":
            return self._answer(200, listed)
        return self._answer(
            200, {"id": name, "modelId": name, "sha": commit, "private": self.hub.private[name], "tags": [],
                  "downloads": 0, "likes": 0, "siblings": [{"rfilename": path} for path in files]}
        )  # fmt: skip

    do_HEAD = do_GET

    def _validate(self, content: str) -> None:
        try:
            ModelCard(content)
        except Exception as error:
            return self._answer(400, {"errors": [{"message": repr(error)}], "warnings": []})
        return self._answer(200, {"errors": [], "warnings": []})

    def _commit(self, name: str, branch: str, lines: list[dict[str, Any]]) -> None:
        header = next(line["value"] for line in lines if line["key"] == "header")
        files = {
            line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines if line["key"] == "file"
        }
        commit = self.hub.commit(name, branch, files, header["summary"])
        url = f"http://{self.headers['Host']}/{name}/commit/{commit}"
        self._answer(200, {"commitUrl": url, "commitOid": commit, "success": True})

    def _missing(self, code: str) -> None:
        self._answer(404, {"error": code}, {"X-Error-Code": code})

    def _answer(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        self._write(status, json.dumps(content).encode(), {"Content-Type": "application/json"} | (headers or {}))

    def _send(self, content: bytes, commit: str) -> None:
        self._write(200, content, {"ETag": f'"{_hash(content)}"', "X-Repo-Commit": commit})

    def _write(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _hash(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
