"""Uploads the folder of an adapter that `save` made."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, hf_hub_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import HFValidationError, validate_repo_id

from .._files import CARD, first_line
from ..bases.names import is_folder, resolve_base_name
from ..errors import UserValueError
from ..inference.pipelines import part_files
from .card import is_edited, render_card
from .card_code import python_literal
from .contents import CardContents
from .folder import check_complete

# Folders that a push owns: what it no longer writes there is removed from the repository, as are an adapter's parts.
_OWN_FOLDERS = ("pictures/", "loras/", "evaluation/")


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    commit_message: str = "Upload a causal context adapter",
) -> str:
    """Upload a folder that `save` made, in one commit, and return the commit's address.

    Only files that changed travel. A card that was edited on the Hub is kept. After an interruption the repository is
    as it was, and the same call sends what has not arrived yet.

    Args:
        folder: from `save`.
        repo_id: user/name; made if it does not exist.
        private: whether a repository that is made now is.
        revision: the branch, made if it does not exist; by default main.
        token: as in huggingface_hub.
        commit_message: its first line.

    Raises:
        ValueError: for an incomplete folder, a base that others cannot load, or no repository's name.
        OSError: without a token, without the right to write, or when the Hub cannot be reached.
    """
    folder = Path(folder)
    contents = check_complete(folder)
    check_pushable(repo_id, contents.base, token)
    with hub_errors(repo_id):
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        there = api.model_info(repo_id, revision=revision)
        files = [sibling.rfilename for sibling in there.siblings or ()]
        card = _card_to_push(folder, contents, repo_id, revision, there.sha if CARD in files else None, token)
        paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
        paths = {
            name: path for name, path in paths.items() if not any(part.startswith(".") for part in Path(name).parts)
        }
        additions = [CommitOperationAdd(name, path) for name, path in paths.items() if name != CARD]
        if card is not None:
            additions.append(CommitOperationAdd(CARD, card.encode()))
        parts = set(part_files())
        gone = [name for name in files if (name.startswith(_OWN_FOLDERS) or name in parts) and name not in paths]
        commit = api.create_commit(
            repo_id,
            [*additions, *(CommitOperationDelete(name) for name in gone)],
            commit_message=commit_message,
            revision=revision,
            parent_commit=there.sha,  # what others push meanwhile is not overwritten
        )
    return commit.commit_url


def check_pushable(
    repo_id: str,
    base: str,
    token: str | bool | None = None,
    license: str | None = None,  # noqa: A002 (the Hub's word)
) -> None:
    """Refuse what `push` would refuse, before anything that takes long.

    Args:
        repo_id: user/name, or the name of a repository of one's own.
        base: what the adapter calls its base.
        token: as in huggingface_hub.
        license: what the card will say.

    Raises:
        ValueError: for what is no repository's name, a base that nobody else can load, or a license unknown to the Hub.
        OSError: without a valid token, in a namespace of others, or when the Hub cannot be reached.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserValueError(f"{repo_id!r} is no name of a repository: {error} Give user/name.") from error
    if refusal := base_of_nobody_else(base):
        raise UserValueError(refusal)
    with hub_errors(repo_id):
        account = HfApi(token=token).whoami()
        namespaces = [account["name"], *(organization["name"] for organization in account.get("orgs", ()))]
        if repo_id.count("/") and repo_id.partition("/")[0] not in namespaces:
            raise PermissionError(
                f"{repo_id} is not yours: you are {account['name']!r}, and may write under {', '.join(namespaces)}. "
                "Correct --repo_id, or log in as somebody else."
            )
        if license is not None:
            try:
                ModelCard(f"---\nlicense: {json.dumps(license)}\n---\n").validate()
            except ValueError as error:
                raise UserValueError(f"The Hub refuses the license {license!r}: {error}") from error


def base_of_nobody_else(base: str) -> str:
    """Say what to do about a base that only this machine has; empty for others."""
    if not is_folder(resolve_base_name(base)):
        return ""
    return (
        f"The base {base!r} is a folder of this machine, which nobody who downloads the adapter has. Push the base "
        "first (push_to_hub of the pipeline, or of the model and its tokenizer), then give its id: "
        "--pretrained_model_name_or_path user/base."
    )


@contextmanager
def hub_errors(repo_id: str) -> Iterator[None]:
    """Within the body, what the Hub refuses becomes an error that says what to do."""
    try:
        yield
    # An upload that broke off is a RuntimeError of huggingface_hub.
    except (LocalTokenNotFoundError, LocalEntryNotFoundError, HfHubHTTPError, HTTPError, RuntimeError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(error, LocalTokenNotFoundError | RepositoryNotFoundError) or status in (401, 403):
            raise PermissionError(
                f"The Hub does not let you write to {repo_id} ({first_line(error)}). Log in with `hf auth login`, or "
                "set HF_TOKEN to a token with the right to write, and check the name."
            ) from error
        if status == 412:
            raise ConnectionError(
                f"Somebody else pushed to {repo_id} meanwhile, and nothing was overwritten. Run the same command again."
            ) from error
        raise ConnectionError(
            f"The upload to {repo_id} did not finish ({first_line(error)}). The repository is as it was; run the same "
            "command again to go on."
        ) from error


def _card_to_push(
    folder: Path,
    contents: CardContents,
    repo_id: str,
    branch: str | None,
    commit: str | None,
    token: str | bool | None,
) -> str | None:
    """Return the card to upload; None where the one on the Hub, of this commit, was edited."""
    own = (folder / CARD).read_text(encoding="utf-8")
    if is_edited(own):
        own = own.replace(
            python_literal(contents.name), python_literal(repo_id)
        )  # code that others copy loads what they have
    else:
        own = render_card(folder, repo_id, branch)
    if commit is None:
        return own
    there = Path(hf_hub_download(repo_id, CARD, revision=commit, token=token)).read_text(encoding="utf-8")
    if is_edited(there) and there != own:
        place = repo_id if branch is None else f"{repo_id}, branch {branch},"
        print(
            f"The card of {place} was edited on the Hub, and is kept as it is: what is new (samples, license, prompt, "
            "results) does not show on it. Delete it there to get a new one.",
            flush=True,
        )
        return None
    return own
