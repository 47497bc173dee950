"""The folder of an adapter, of this machine or copied from the Hub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from types import MappingProxyType
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from ..._files import CONFIG, WEIGHTS, first_line
from ...messages.wording import nearest, short_repr

TOKENIZER_FILES = (
    *("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "chat_template.*", "tekken.json"),
    *("tokenizer.model", "spiece.model", "sentencepiece*.model", "vocab.json", "vocab.txt", "merges.txt"),
)


def download(
    repo_or_folder: str | PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    places: Sequence[str] = ("",),
    tokenizer: bool = False,
    subfolder: str | None = None,
    cache: Mapping[str, Any] = MappingProxyType({}),
) -> Path:
    """The folder of an adapter: a local one as it is (it wins over a repository of that name), or a copy of the Hub's.

    Args:
        repo_or_folder: a folder, or the id of a repository on the Hub.
        revision: of the repository: a branch, a tag or a commit.
        token: for private repositories, as in huggingface_hub.
        places: folders inside it that may hold adapters, such as "unet/"; "" is the top.
        tokenizer: fetch the files of a tokenizer, too.
        subfolder: the folder of the adapter inside the folder or repository.
        cache: further arguments of `snapshot_download`, such as `cache_dir`.

    Raises:
        FileNotFoundError: for a folder, repository or revision that does not exist.
        PermissionError: for a repository that asks for a token or for consent to its terms.
        ConnectionError: for a server that cannot be reached, or fails.
    """
    source = str(repo_or_folder)
    if (folder := local_folder(source)) is not None:
        return folder / (subfolder or "")
    patterns = [place + file for place in places for file in (CONFIG, WEIGHTS)]
    patterns += TOKENIZER_FILES if tokenizer else ()
    inside = f"{subfolder.strip('/')}/" if subfolder else ""
    patterns = [inside + pattern for pattern in patterns]
    try:
        snapshot = snapshot_download(source, revision=revision, token=token, allow_patterns=patterns, **cache)
        return Path(snapshot, inside)
    except GatedRepoError as error:
        raise PermissionError(f"{source} is gated: accept its terms on its page on the Hub, then {_LOG_IN}.") from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{source} is no folder here, and no repository on the Hub that may be read without a (better) token."
            f"{_nearest_folder(source)} Correct the name; if the repository is private, {_LOG_IN}."
        ) from error
    except LocalTokenNotFoundError as error:
        raise PermissionError(f"token=True was given, but there is no token here: {_LOG_IN}.") from error
    except RevisionNotFoundError as error:
        raise FileNotFoundError(
            f"{source} has no revision {short_repr(revision)}. Give one of its branches or tags, or a whole commit id."
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, HTTPError) as error:
        if _status(error) in (401, 403) or _status(error.__cause__) in (401, 403):
            raise PermissionError(f"The Hub refuses the token for {source} ({_cause(error)}): {_LOG_IN}.") from error
        raise ConnectionError(
            f"{source} is no folder here, the cache does not hold {'it' if revision is None else short_repr(revision)} "
            f"whole, and the Hub could not be read ({_cause(error)}).{_nearest_folder(source)} Try again when it "
            "can be reached (and HF_HUB_OFFLINE is not set), or give a folder."
        ) from error


def local_folder(source: str) -> Path | None:
    """The folder of this machine that is meant, or None where it can only be a repository of the Hub.

    Raises:
        FileNotFoundError: for what is neither.
    """
    if source and Path(source).is_dir():
        return Path(source)
    if Path(source).is_file():
        raise FileNotFoundError(f"{source} is a file. Give the folder with an {CONFIG} that it lies in.")
    try:
        validate_repo_id(source)
        if Path(source).is_absolute() or source.startswith("."):
            raise HFValidationError
    except HFValidationError:
        raise FileNotFoundError(
            f"{source} is no folder here, and no id of a repository.{_nearest_folder(source)} Give a folder, or an id "
            "such as user/name."
        ) from None
    return None


_LOG_IN = "log in with `hf auth login`, set HF_TOKEN, or pass token="


def _nearest_folder(source: str) -> str:
    """Ask whether a folder here of almost this name was meant."""
    try:
        folders = [path.name for path in Path(source).parent.iterdir() if path.is_dir()]
    except OSError:  # there are none to be seen
        return ""
    return nearest(Path(source).name, folders)


def _status(error: BaseException | None) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _cause(error: BaseException) -> str:
    if isinstance(error.__cause__, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    return first_line(error.__cause__ or error)
