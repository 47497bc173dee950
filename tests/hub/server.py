"""A server on this machine that speaks the Hub's protocol for model repositories, to unmodified clients (without Xet).

The large file storage has another host name, as on the Hub, and refuses requests that carry a token.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal
from urllib.parse import parse_qs, unquote, urlsplit

from .repositories import Fault, RefusalError, Repository, Request, card_metadata, card_problems

TOKENS = {"hf_user": ("user", "write"), "hf_reader": ("user", "read"), "hf_other": ("other", "write")}


class HubServer:
    """A Hub on a port of its own: `with HubServer() as server: ... server.endpoint ...`"""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}  # the large file storage, by SHA-256
        self.log: list[Request] = []
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        port = self._http.server_address[1]
        self.endpoint, self.storage = f"http://127.0.0.1:{port}", f"http://localhost:{port}/storage"

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def create(self, repo_id: str, *, private: bool = False, gated: bool = False) -> Repository:
        """A repository as somebody creates it in the browser."""
        self.repositories[repo_id] = Repository(repo_id, private, gated)
        return self.repositories[repo_id]

    def fail_next(
        self, pattern: str, *, status: int | Literal["drop", "lose"] = 503, after_bytes: int = 0, times: int = 1
    ) -> None:
        """Let the next requests fail whose "METHOD /path" matches the pattern.

        Args:
            pattern: regular expression, searched for.
            status: what to answer; "drop" cuts the connection in the request's body, before anything is done, or, where
                it has none, in the answer's; "lose" does what was asked and cuts the connection instead of answering.
            after_bytes: where "drop" cuts.
            times: how often; clients retry most requests.
        """
        self.faults.append(Fault(pattern, status, after_bytes, times))

    def requests(self, pattern: str = "") -> list[Request]:
        """The logged requests whose "METHOD /path" matches."""
        return [request for request in self.log if re.search(pattern, str(request))]

    def take_fault(self, request: Request) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times and re.search(fault.pattern, str(request)):
                    fault.times -= 1
                    return fault
        return None


@dataclass
class _Answer:
    body: Any = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


class _DroppedError(Exception):
    pass


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def _handle(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        self.user, self.role = TOKENS.get(self.token, (None, None))
        self.entry = Request(self.command, unquote(url.path), self.user)
        self.hub.log.append(self.entry)
        self.fault = self.hub.take_fault(self.entry)
        self.cut = self.fault.after_bytes if self.fault and self.fault.status == "drop" else None
        try:
            self.content = self._read()
            answer = self._answer(url.path)
            if self.cut == 0 or (self.fault and self.fault.status == "lose"):
                raise _DroppedError
            self._send(answer)
        except (_DroppedError, ConnectionError):
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _handle  # noqa: N815 (http.server's names)

    def _read(self) -> bytes:
        content, chunked = bytearray(), self.headers.get("Transfer-Encoding") == "chunked"
        left = 0 if chunked else int(self.headers.get("Content-Length") or 0)
        while chunked or left:
            size = int(self.rfile.readline(), 16) if chunked else min(left, 1024)
            content += self.rfile.read(size)
            self.entry.received = len(content)
            if self.cut is not None and len(content) >= self.cut:
                raise _DroppedError
            left -= 0 if chunked else size
            if chunked:
                self.rfile.readline()
                chunked = size > 0
        if self.cut is not None and content:
            raise _DroppedError
        return bytes(content)

    def _answer(self, path: str) -> _Answer:
        try:
            if self.fault and isinstance(self.fault.status, int):
                raise RefusalError(self.fault.status, "The server has a problem")
            if self.token and not self.user:
                raise RefusalError(401, "Invalid credentials in Authorization header")
            with self.hub.lock:
                for methods, pattern, act in _ROUTES:
                    match = re.fullmatch(pattern, path)
                    if match and self.command in methods.split():
                        return act(self, *(unquote(group) for group in match.groups("")))
            raise RefusalError(404, f"Sorry, we can't find the page {path}")
        except RefusalError as refusal:
            return _Answer(refusal.body, refusal.status, refusal.headers)

    def _send(self, answer: _Answer) -> None:
        body = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
        self.send_response(answer.status)
        for name, value in {"Content-Length": str(len(body)), **answer.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: self.cut])
            self.entry.sent = len(body[: self.cut])
        if self.cut is not None:
            raise _DroppedError
        self.entry.status = answer.status

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 (http.server's name)
        """Nothing on the terminal: `HubServer.log` has it."""

    def _repository(self, repo_id: str, write: bool = False) -> Repository:
        repository, owner = self.hub.repositories.get(repo_id), repo_id.split("/")[0]
        if repository is None or (repository.private and self.user != owner):
            raise RefusalError(404 if self.user else 401, "Repository not found", "RepoNotFound")
        if write:
            self._may_write(owner)
        return repository

    def _may_write(self, owner: str) -> None:
        if not self.user:
            raise RefusalError(401, "Invalid username or password.")
        if (self.user, self.role) != (owner, "write"):
            raise RefusalError(403, f'You don\'t have the rights to write under the namespace "{owner}"')

    def _whoami(self) -> _Answer:
        if not self.user:
            raise RefusalError(401, "Invalid username or password.")
        token = {"displayName": "tests", "role": self.role}
        return _Answer({"type": "user", "name": self.user, "orgs": [], "auth": {"accessToken": token}})

    def _create(self) -> _Answer:
        wanted = json.loads(self.content)
        repo_id = f"{wanted.get('organization') or self.user}/{wanted['name']}"
        self._may_write(repo_id.split("/")[0])
        url = f"{self.hub.endpoint}/{repo_id}"
        if repo_id in self.hub.repositories:
            return _Answer({"error": "You already created this model repo", "url": url}, 409)
        self.hub.create(repo_id, private=wanted.get("visibility") == "private")
        return _Answer({"url": url, "name": repo_id, "id": repo_id})

    def _validate(self) -> _Answer:
        text = json.loads(self.content)["content"]
        problems = [{"message": problem} for problem in card_problems(text)]
        empty = [] if problems or card_metadata(text) else [{"message": "empty or missing yaml metadata in repo card"}]
        return _Answer({"errors": problems, "warnings": empty}, 400 if problems else 200)

    def _info(self, repo_id: str, revision: str) -> _Answer:
        return _Answer(self._repository(repo_id).info(revision or "main"))

    def _tree(self, repo_id: str, revision: str, folder: str) -> _Answer:
        recursive = self.query.get("recursive", [""])[0].lower() in ("true", "1")
        return _Answer(self._repository(repo_id).listing(revision, folder, recursive))

    def _refs(self, repo_id: str) -> _Answer:
        return _Answer(self._repository(repo_id).refs())

    def _branch(self, repo_id: str, name: str) -> _Answer:
        start = json.loads(self.content or b"{}").get("startingPoint", "main")
        self._repository(repo_id, write=True).name("branches", name, start)
        return _Answer({})

    def _tag(self, repo_id: str, revision: str) -> _Answer:
        self._repository(repo_id, write=True).name("tags", json.loads(self.content)["tag"], revision)
        return _Answer({})

    def _preupload(self, repo_id: str, revision: str) -> _Answer:
        files = json.loads(self.content)["files"]
        return _Answer({"files": self._repository(repo_id, write=True).preupload(revision, files)})

    def _batch(self, repo_id: str) -> _Answer:
        self._repository(repo_id, write=True)
        objects = json.loads(self.content)["objects"]
        for wanted in objects:
            if wanted["oid"] not in self.hub.objects:
                upload = {"href": f"{self.hub.storage}/{wanted['oid']}"}
                verify = {"href": f"{self.hub.endpoint}/{repo_id}.git/info/lfs/objects/verify"}
                wanted["actions"] = {"upload": upload, "verify": verify}
        return _Answer({"transfer": "basic", "objects": objects})

    def _verify(self, repo_id: str) -> _Answer:
        self._repository(repo_id, write=True)
        wanted = json.loads(self.content)
        if len(self.hub.objects.get(wanted["oid"], b"")) != wanted["size"]:
            raise RefusalError(404, "The object was not uploaded")
        return _Answer({})

    def _store(self, sha256: str) -> _Answer:
        if self.token or not self.headers["Host"].startswith("localhost"):
            raise RefusalError(400, "Only one auth mechanism allowed")
        if self.command == "PUT":
            if hashlib.sha256(self.content).hexdigest() != sha256:
                raise RefusalError(400, "The content does not have this hash")
            self.hub.objects[sha256] = self.content
            return _Answer()
        if sha256 not in self.hub.objects:
            raise RefusalError(404, "No such object")
        return self._part(self.hub.objects[sha256], {"ETag": f'"{sha256}"'})

    def _part(self, content: bytes, headers: dict[str, str]) -> _Answer:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if not wanted:
            return _Answer(content, 200, {"Accept-Ranges": "bytes", **headers})
        first, last = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
        if first > last:
            raise RefusalError(416, "Range not satisfiable")
        return _Answer(
            content[first : last + 1], 206, {"Content-Range": f"bytes {first}-{last}/{len(content)}", **headers}
        )

    def _commit(self, repo_id: str, branch: str) -> _Answer:
        repository = self._repository(repo_id, write=True)
        commit = repository.commit(branch, [json.loads(line) for line in self.content.splitlines()], self.hub.objects)
        url = f"{self.hub.endpoint}/{repo_id}/commit/{commit.sha}"
        return _Answer({"success": True, "commitOid": commit.sha, "commitUrl": url})

    def _resolve(self, repo_id: str, revision: str, path: str) -> _Answer:
        repository = self._repository(repo_id)
        if repository.gated and self.user != repo_id.split("/")[0]:
            raise RefusalError(403 if self.user else 401, f"Access to model {repo_id} is restricted", "GatedRepo")
        commit = repository.at(revision)
        headers = {"X-Repo-Commit": commit.sha}
        if path not in commit.files:
            raise RefusalError(404, "Entry not found", "EntryNotFound", headers=headers)
        file = commit.files[path]
        if not file.large:
            return self._part(file.content, headers | {"ETag": f'"{file.oid}"'})
        self.hub.objects.setdefault(file.sha256, file.content)  # those of commits from the browser
        headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(len(file.content))}
        return _Answer(b"", 302, headers | {"Location": f"{self.hub.storage}/{file.sha256}"})


_MODEL = r"/api/models/([\w.-]+/[\w.-]+)"
_ROUTES: list[tuple[str, str, Callable[..., _Answer]]] = [
    ("GET", "/api/whoami-v2", _Handler._whoami),
    ("POST", "/api/repos/create", _Handler._create),
    ("POST", "/api/validate-yaml", _Handler._validate),
    ("GET", rf"{_MODEL}(?:/revision/([^/]+))?", _Handler._info),
    ("GET", rf"{_MODEL}/tree/([^/]+)(?:/(.+))?", _Handler._tree),
    ("GET", rf"{_MODEL}/refs", _Handler._refs),
    ("POST", rf"{_MODEL}/branch/([^/]+)", _Handler._branch),
    ("POST", rf"{_MODEL}/tag/([^/]+)", _Handler._tag),
    ("POST", rf"{_MODEL}/preupload/([^/]+)", _Handler._preupload),
    ("POST", rf"{_MODEL}/commit/([^/]+)", _Handler._commit),
    ("POST", r"/(.+)\.git/info/lfs/objects/batch", _Handler._batch),
    ("POST", r"/(.+)\.git/info/lfs/objects/verify", _Handler._verify),
    ("GET HEAD PUT", r"/storage/([0-9a-f]{64})", _Handler._store),
    ("GET HEAD", r"/([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)", _Handler._resolve),
]
