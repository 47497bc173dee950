"""What a Hub keeps: repositories with files, commits, branches and tags; rules for model cards; a log, and faults."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml
from huggingface_hub import ModelCardData

LARGE = 1_000_000  # bytes from which any file goes to the large file storage
_ATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_RELATIONS = ("adapter", "finetune", "merge", "quantized")
_LICENSES = ("apache-2.0", "mit", "cc-by-4.0", "cc-by-sa-4.0", "cc0-1.0", "openrail", "creativeml-openrail-m", "other")
_TASKS = """any-to-any feature-extraction fill-mask image-classification image-feature-extraction image-text-to-text
    image-to-image image-to-text image-to-video summarization text-classification text-generation text-to-audio
    text-to-image text-to-speech text-to-video text2text-generation translation unconditional-image-generation"""


class RefusalError(Exception):
    """An answer other than success: its status, message and, in headers, what kind of error it is."""

    def __init__(
        self, status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.body = status, {"error": message}
        self.headers = {"X-Error-Message": " ".join(message.split()), **(headers or {})}
        if code:
            self.headers["X-Error-Code"] = code


@dataclass(frozen=True)
class File:
    """A file of a commit; `large` ones lie in the large file storage (LFS)."""

    content: bytes
    large: bool = False

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def blob(self) -> bytes:
        """What git holds: the content, or a pointer to it."""
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.content)}\n"
        return pointer.encode() if self.large else self.content

    @property
    def oid(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.blob) + self.blob).hexdigest()


@dataclass(frozen=True)
class Commit:
    """A state of all files."""

    sha: str
    parent: str | None
    title: str
    files: Mapping[str, File]


@dataclass
class Repository:
    """A model repository. A new one has a first commit with .gitattributes."""

    id: str
    private: bool = False
    gated: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.add("main", "initial commit", {".gitattributes": File(_ATTRIBUTES)})

    def at(self, revision: str = "main") -> Commit:
        """The commit of a branch, a tag or a sha."""
        sha = self.branches.get(revision) or self.tags.get(revision) or revision
        if sha not in self.commits:
            raise RefusalError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[sha]

    def add(self, branch: str, title: str, files: Mapping[str, File]) -> Commit:
        """Commit a state to a branch."""
        parent = self.branches.get(branch)
        state = [self.id, str(len(self.commits)), str(parent), title, *(f"{path} {files[path].oid}" for path in files)]
        commit = Commit(hashlib.sha1("\n".join(state).encode()).hexdigest(), parent, title, dict(files))
        self.commits[commit.sha] = commit
        self.branches[branch] = commit.sha
        return commit

    def edit(self, files: Mapping[str, str | bytes | None], branch: str = "main") -> Commit:
        """Write files, or delete them (None), as somebody does in the browser."""
        state = dict(self.at(branch).files)
        for path, content in files.items():
            if content is None:
                del state[path]
            else:
                data = content.encode() if isinstance(content, str) else content
                state[path] = File(data, is_large(path, len(data), data[:512]))
        return self.add(branch, "edited in the browser", state)

    def commit(self, branch: str, lines: Sequence[dict[str, Any]], objects: Mapping[str, bytes]) -> Commit:
        """What a client sends as a commit: a header, then files. It happens as a whole or not at all.

        Args:
            branch: one that exists.
            lines: the parsed lines of its body.
            objects: the large file storage.
        """
        if branch not in self.branches:
            raise RefusalError(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        header, head = lines[0]["value"], self.at(branch)
        if header.get("parentCommit") not in (None, head.sha):
            raise RefusalError(412, "A commit has happened since. Please refresh and try again.")
        state = dict(head.files)
        for line in lines[1:]:
            kind, value = line["key"], line["value"]
            path = value["path"]
            if kind == "file":
                state[path] = File(base64.b64decode(value["content"]))
            elif kind == "lfsFile":
                if value["oid"] not in objects:
                    raise RefusalError(400, f"LFS pointer of {path} points to a file that does not exist")
                state[path] = File(objects[value["oid"]], large=True)
            elif kind in ("deletedFile", "deletedFolder"):
                gone = [name for name in state if name == path or (kind == "deletedFolder" and name.startswith(path))]
                if not gone:
                    raise RefusalError(404, f"{path} does not exist on {branch}", "EntryNotFound")
                for name in gone:
                    del state[name]
            else:
                raise RefusalError(400, f"Unknown kind of line {kind!r}")
        if "README.md" in state and (problems := card_problems(state["README.md"].content.decode())):
            raise RefusalError(400, "Invalid metadata in README.md: " + "; ".join(problems))
        return self.add(branch, header["summary"], state)

    def name(self, kind: Literal["branches", "tags"], name: str, revision: str) -> None:
        """Make a branch or a tag."""
        names: dict[str, str] = getattr(self, kind)
        if name in names:
            raise RefusalError(409, f"Reference {name} already exists")
        names[name] = self.at(revision).sha

    def history(self, revision: str = "main") -> list[Commit]:
        """The commits that lead to a revision, the newest first."""
        commits, sha = [], self.at(revision).sha
        while sha is not None:
            commits.append(self.commits[sha])
            sha = commits[-1].parent
        return commits

    def info(self, revision: str) -> dict[str, Any]:
        """The answer to `model_info`."""
        commit = self.at(revision)
        card = card_metadata(commit.files["README.md"].content.decode()) if "README.md" in commit.files else {}
        named = {key: card[key] for key in ("library_name", "pipeline_tag") if key in card}
        named |= {"id": self.id, "author": self.id.split("/")[0], "sha": commit.sha, "cardData": card}
        named |= {"private": self.private, "gated": "auto" if self.gated else False, "tags": card.get("tags", [])}
        return {**named, "siblings": [{"rfilename": path} for path in commit.files]}

    def listing(self, revision: str, folder: str, recursive: bool) -> list[dict[str, Any]]:
        """The answer to `list_repo_tree`: files and folders of a folder."""
        start = f"{folder}/" if folder else ""
        inside = {path: file for path, file in self.at(revision).files.items() if path.startswith(start)}
        if folder and not inside:
            raise RefusalError(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        rows: dict[str, dict[str, Any]] = {}
        for path, file in inside.items():
            parts = path.removeprefix(start).split("/")
            for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
                name = start + "/".join(parts[:depth])
                rows[name] = {"type": "directory", "path": name, "oid": "0" * 40, "size": 0}
            if recursive or len(parts) == 1:
                rows[path] = {"type": "file", "path": path, "oid": file.oid, "size": len(file.content)}
                if file.large:
                    rows[path]["lfs"] = {"oid": file.sha256, "size": len(file.content), "pointerSize": len(file.blob)}
        return list(rows.values())

    def refs(self) -> dict[str, Any]:
        """The answer to `list_repo_refs`."""
        named = {"branches": self.branches, "tags": self.tags}
        rows = {k: [{"name": n, "ref": n, "targetCommit": sha} for n, sha in refs.items()] for k, refs in named.items()}
        return {"converts": [], **rows}

    def preupload(self, revision: str, files: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """How each file is to be sent, and the hash of the one that is there."""
        present, rows = self.at(revision).files, []
        for file in files:
            large = is_large(file["path"], file["size"], base64.b64decode(file["sample"]))
            row = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            known = present.get(file["path"])
            rows.append(row | ({"oid": known.sha256 if known.large else known.oid} if known else {}))
        return rows

    def contents(self, revision: str = "main") -> dict[str, bytes]:
        return {path: file.content for path, file in self.at(revision).files.items()}


def is_large(path: str, size: int, sample: bytes) -> bool:
    """Whether a file goes to the large file storage: weights, binary files and big ones."""
    return path.endswith(".safetensors") or size >= LARGE or b"\0" in sample


def card_metadata(text: str) -> dict[str, Any]:
    """The YAML between the lines --- at the start of a card.

    Raises:
        ValueError: where it is none.
    """
    front = re.match(r"\s*---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", text, re.DOTALL | re.MULTILINE)
    try:
        metadata = yaml.safe_load(front[1]) if front else {}
    except yaml.YAMLError as error:
        raise ValueError(f"Invalid YAML: {error}") from error
    if not isinstance(metadata, dict):
        raise ValueError(f"Metadata is a {type(metadata).__name__}, it must be an object")
    return metadata


def card_problems(text: str) -> list[str]:
    """What the Hub refuses in a card's metadata."""
    try:
        metadata = card_metadata(text)
    except ValueError as error:
        return [str(error)]
    problems = []
    for key, allowed in {
        "pipeline_tag": _TASKS.split(),
        "license": _LICENSES,
        "base_model_relation": _RELATIONS,
    }.items():
        if key in metadata and metadata[key] not in allowed:
            problems.append(f'"{key}" must be one of {", ".join(allowed)}, it is {metadata[key]!r}')
    for key in ("base_model", "datasets"):
        named = metadata.get(key, [])
        for name in named if isinstance(named, list) else [named]:
            if not isinstance(name, str) or not _ID.fullmatch(name):
                problems.append(f'"{key}" with value {name!r} is not valid. Use an id from https://hf.co')
    for key in ("tags", "widget"):
        if not isinstance(metadata.get(key, []), list):
            problems.append(f'"{key}" must be an array')
    if not all(isinstance(tag, str) and tag for tag in metadata.get("tags", [])):
        problems.append('"tags" must be strings that are not empty')
    try:
        ModelCardData(**metadata)
    except (KeyError, TypeError, ValueError) as error:
        problems.append(f'"model-index" is not valid: {error}')
    return problems


@dataclass
class Request:
    """A line of the log; `received` and `sent` count bytes of bodies, and a dropped one has no status."""

    method: str
    path: str
    user: str | None
    received: int = 0
    sent: int = 0
    status: int | None = None

    def __str__(self) -> str:
        return f"{self.method} {self.path}"


@dataclass
class Fault:
    """Requests that fail; see `HubServer.fail_next`."""

    pattern: str
    status: int | Literal["drop", "lose"]
    after_bytes: int
    times: int
