"""Stored adapters, from a folder or the Hub: the one place that reads them.

An adapter may come from anyone, so what it holds is data and nothing else: a JSON file of bounded size whose fields are
checked, and tensors in safetensors (never pickle) whose names and shapes follow from the config. The worst that such a
folder can do is to be refused.

Of a folder exactly the files named here are read. They may be symbolic links: the cache of the Hub is made of them,
and people link weights. A repository cannot bring any (the Hub client writes what it downloads as plain files), so a
link is the work of somebody who may write here anyway; what it leads to must be a regular file and is parsed like any
other, and messages quote no contents but names and values of a config's fields.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple, cast

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
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import PeftType
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from ..contexts import shown
from .config import CausalContextConfig
from .registration import CAUSAL_CONTEXT, PREFIX
from .saving import PEFT_PREFIX

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
TOKENIZER_FILES = (
    *("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "chat_template.*", "tekken.json"),
    *("tokenizer.model", "spiece.model", "sentencepiece*.model", "vocab.json", "vocab.txt", "merges.txt"),
)
MAX_CONFIG_BYTES = 2**20
MAX_HEADER_BYTES = 2**24
MAX_NAME = 256
MAX_WEIGHT = 6e4  # what float16 holds; training stays far below, so that larger weights are those of a damaged file
MAX_MATCHING_SECONDS = 5.0
_FLOATING = ("F64", "F32", "F16", "BF16")
# PEFT stores an embedding beside an adapter of a language model whose vocabulary has grown.
_EMBEDDINGS = ("embed", "lm_head", "wte", "shared")


class AdapterError(ValueError):
    """A stored adapter that cannot be used: what is wrong with it, and the remedy."""


class StoredTensor(NamedTuple):
    """What the header of a file says about a tensor."""

    shape: tuple[int, ...]
    floating: bool


def download(
    repo_or_folder: str | PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    places: Sequence[str] = ("",),
    tokenizer: bool = False,
) -> Path:
    """The folder of an adapter: a local one as it is (it wins over a repository of that name), or a copy of the Hub's.

    Args:
        revision: of the repository: a branch, a tag or a commit.
        token: for private repositories, as in huggingface_hub.
        places: folders inside it that may hold adapters, such as "unet/"; "" is the top.
        tokenizer: fetch the files of a tokenizer, too.

    Raises:
        FileNotFoundError: for a folder, repository or revision that does not exist.
        PermissionError: for a repository that asks for a token or for consent to its terms.
        ConnectionError: for a server that cannot be reached, or fails.
    """
    source = str(repo_or_folder)
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
            f"{source} is no folder here, and no id of a repository. Give a folder, or an id such as user/name."
        ) from None
    patterns = [place + file for place in places for file in (CONFIG, WEIGHTS)]
    patterns += TOKENIZER_FILES if tokenizer else ()
    try:
        return Path(snapshot_download(source, revision=revision, token=token, allow_patterns=patterns))
    except GatedRepoError as error:
        raise PermissionError(f"{source} is gated: accept its terms on its page on the Hub, then {_LOG_IN}.") from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{source} is no folder here, and no repository on the Hub that may be read without a (better) token. "
            f"Correct the name; if the repository is private, {_LOG_IN}."
        ) from error
    except LocalTokenNotFoundError as error:
        raise PermissionError(f"token=True was given, but there is no token here: {_LOG_IN}.") from error
    except RevisionNotFoundError as error:
        raise FileNotFoundError(
            f"{source} has no revision {shown(revision)}. Give one of its branches or tags, or a whole commit id."
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, HTTPError) as error:
        if _status(error) in (401, 403) or _status(error.__cause__) in (401, 403):
            raise PermissionError(f"The Hub refuses the token for {source} ({_cause(error)}): {_LOG_IN}.") from error
        raise ConnectionError(
            f"{source} is no folder here, the cache does not hold {'it' if revision is None else shown(revision)} "
            f"whole, and the Hub could not be read ({_cause(error)}). Try again when it can be reached (and "
            "HF_HUB_OFFLINE is not set), or give a folder."
        ) from error


_LOG_IN = "log in with `hf auth login`, set HF_TOKEN, or pass token="


def _status(error: BaseException | None) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _cause(error: BaseException) -> str:
    if isinstance(error.__cause__, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    return first_line(error.__cause__ or error)


def first_line(error: BaseException) -> str:
    """What an error says, without what clients and devices append to it; its type if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def read_config(folder: Path, source: str) -> CausalContextConfig:
    """The config of the adapter in a folder.

    Args:
        source: what to call the adapter in messages.

    Raises:
        FileNotFoundError: without an adapter_config.json.
        AdapterError: for one that cannot be used.
    """
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{source} holds no adapter: there is no {CONFIG} in it.")
    fields = read_fields(folder / CONFIG, source)
    try:
        return CausalContextConfig(**fields)
    except (TypeError, ValueError) as error:
        raise AdapterError(f"The config of {source} cannot be used. {error}") from error


def read_fields(path: str | PathLike[str], source: str | None = None) -> dict[str, Any]:
    """The fields in an adapter_config.json, not yet checked.

    Raises:
        AdapterError: for what is no JSON object of at most 1 MiB, or another kind of adapter.
    """
    source = source or str(path)
    with open(path, "rb") as file:
        data = file.read(MAX_CONFIG_BYTES + 1)
    if len(data) > MAX_CONFIG_BYTES:
        raise AdapterError(f"The {CONFIG} of {source} has more than 1 MiB, so it is none of an adapter.")
    try:
        fields = json.loads(data.decode(), object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"The {CONFIG} of {source} is not valid JSON: {error}. Use another copy of it.") from error
    if not isinstance(fields, dict):
        raise AdapterError(f"The {CONFIG} of {source} holds no fields, but {shown(fields)}.")
    kind = fields.get("peft_type")
    if kind != CAUSAL_CONTEXT.value:
        if not isinstance(kind, str) or kind not in PeftType.__members__:
            raise AdapterError(f"{source} says peft_type={shown(kind)}, which is no kind of adapter known here.")
        raise AdapterError(
            f"{source} is a {kind} adapter; only causal context adapters have contexts. Load it with PEFT "
            "(PeftModel.from_pretrained), a LoRA of a pipeline with pipe.load_lora_weights."
        )
    return fields


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("it gives a field twice")
    return fields


def _no_constant(constant: str) -> None:
    raise ValueError(f"{constant} is not a number")


def read_header(folder: Path, config: CausalContextConfig, source: str) -> dict[str, StoredTensor]:
    """What weights the folder of an adapter holds, by their names in the base model: exactly those of its config.

    The tensors themselves are not read.

    Raises:
        AdapterError: for a file that is missing, damaged, or not what the config describes.
    """
    tensors = _header(folder / WEIGHTS, source)
    _check_declared(tensors, config, source, others=())
    return tensors


def read_weights(folder: Path, source: str) -> dict[str, Tensor]:
    """The weights whose header was read (and compared with a model), by their names in the base model.

    Raises:
        AdapterError: for values that are not finite, or so large that the file must be damaged.
    """
    try:
        weights = {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in load_file(folder / WEIGHTS).items()}
    except SafetensorError as error:
        raise _damaged(source, error) from error
    for name, tensor in weights.items():
        if not tensor.is_floating_point() or tensor.numel() == 0:
            continue
        largest = float(tensor.abs().max())
        if not largest <= MAX_WEIGHT:  # NaN compares as False
            found = f"values as large as {largest:.3g}" if math.isfinite(largest) else "NaN or infinite values"
            raise AdapterError(
                f"{source}: the tensor {name!r} holds {found}. The file is damaged, or the training "
                "diverged: use another copy or an earlier checkpoint."
            )
    return weights


def check_beside(place: str | PathLike[str], subfolder: str | None, config: CausalContextConfig) -> None:
    """Compare the weights beside a config that PEFT reads from a folder, if there are any, with that config.

    Raises:
        AdapterError: for a file that is damaged, or not what the config describes.
    """
    folder = Path(place, subfolder or "")
    if (folder / WEIGHTS).is_file():
        tensors = _header(folder / WEIGHTS, str(folder), prefix=PEFT_PREFIX)  # PEFT would leave others out
        _check_declared(tensors, config, str(folder), others=_EMBEDDINGS)
        _check_targets(tensors, config, str(folder))


def _header(path: Path, source: str, prefix: str = "") -> dict[str, StoredTensor]:
    if not path.is_file():
        if path.with_name(PICKLE).exists():
            raise AdapterError(
                f"{source} has its weights in {PICKLE}, a pickle file, which can run code when it is read. Adapters "
                f"are read from safetensors only: where it comes from, save it again as {WEIGHTS}."
            )
        raise AdapterError(f"{source} has no {WEIGHTS}. Adapters are read from safetensors only.")
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
    if not 2 <= header_bytes <= min(MAX_HEADER_BYTES, path.stat().st_size):
        raise _damaged(source, "its header has no possible length")
    tensors: dict[str, StoredTensor] = {}
    try:
        with safe_open(path, "pt") as weights:  # checks lengths and offsets
            for key in weights.keys():  # noqa: SIM118 (not a dict)
                described = weights.get_slice(key)
                name = key.removeprefix(PEFT_PREFIX)
                if name in tensors or len(name) > MAX_NAME:
                    problem = "there twice" if name in tensors else "too long"
                    raise _damaged(source, f"the name {shown(name)} of a tensor is {problem}")
                if not key.startswith(prefix):
                    raise _damaged(source, f"the name {shown(key)} of a tensor does not begin with {prefix}")
                tensors[name] = StoredTensor(tuple(described.get_shape()), described.get_dtype() in _FLOATING)
    except SafetensorError as error:
        raise _damaged(source, error) from error
    return tensors


def _damaged(source: str, error: object) -> AdapterError:
    return AdapterError(f"The {WEIGHTS} of {source} is damaged: {error}. Download it again, or use another copy.")


def _check_declared(
    tensors: Mapping[str, StoredTensor], config: CausalContextConfig, source: str, others: Sequence[str]
) -> None:
    """Refuse names and shapes that do not follow from a config, whatever the base (AdapterError)."""
    modules: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in tensors.items():
        module, separator, weight = name.rpartition(f".{PREFIX}")
        if separator:
            modules.setdefault(module, {})[weight] = tensor
    if not modules:
        raise AdapterError(f"{source}: its file holds no weights of a causal context adapter.")
    for name in tensors:
        if f".{PREFIX}" not in name:
            _check_whole_module(name, config, source, others)
    for module, stored in modules.items():
        _check_module(module, stored, config, source)


def _check_module(module: str, stored: Mapping[str, StoredTensor], config: CausalContextConfig, source: str) -> None:
    down, up = (stored[name].shape if name in stored else () for name in ("down.weight", "up.weight"))
    # Which of them it is, only the names of the base's modules tell: those in the file are not matched with patterns.
    widths = {config.concept_rank, *config.rank_pattern.values()}
    part = cast(int, config.observational_rank)
    width = next((W for W in widths if down[:1] == (part + len(config.concepts) * W,)), config.concept_rank)
    declared = adapter_shapes(config, width, down[1:], up[0] if up else 0)
    unasked = [f"{module}.{PREFIX}{weight}" for weight in stored if weight not in declared]
    missing = [f"{module}.{PREFIX}{weight}" for weight in declared if weight not in stored]
    if unasked:
        raise AdapterError(f"{source} has a tensor {shown(unasked[0])}, which its config does not ask for. {_MIXED_UP}")
    if missing:
        raise not_whole(source, missing)
    for weight, (shape, floating) in stored.items():
        name = shown(f"{module}.{PREFIX}{weight}")
        if not floating:
            raise AdapterError(f"{source}: the tensor {name} is not of a floating-point type. {_MIXED_UP}")
        if shape != declared[weight]:
            raise AdapterError(
                f"{source}: the tensor {name} has the shape {shape}; by its config {declared[weight]}. {_MIXED_UP}"
            )


def _check_targets(tensors: Mapping[str, StoredTensor], config: CausalContextConfig, source: str) -> None:
    """Refuse weights of modules that PEFT, by the config, would not adapt: it would leave them out (AdapterError)."""
    if config.target_modules is None or config.target_modules == "all-linear":
        return
    end = time.monotonic() + MAX_MATCHING_SECONDS  # names in a file can be made for patterns to take long
    for module in {name.rpartition(f".{PREFIX}")[0] for name in tensors if f".{PREFIX}" in name}:
        if not check_target_module_exists(config, module):
            raise AdapterError(
                f"{source} has weights for {shown(module)}, which its config does not ask for. {_MIXED_UP}"
            )
        if time.monotonic() > end:
            raise AdapterError(f"{source}: its target_modules or exclude_modules take too long to match. List names.")


_MIXED_UP = "Its files belong to different adapters, or are damaged."


def _check_whole_module(name: str, config: CausalContextConfig, source: str, others: Sequence[str]) -> None:
    module = name.rpartition(".")[0]
    inside = any(module.endswith(saved) or f"{saved}." in name for saved in config.modules_to_save or ())
    if not inside and (".base_layer" in name or not any(other in module for other in others)):
        raise AdapterError(
            f"{source} has a tensor {shown(name)}, which is no weight of the adapter: it could replace one of the "
            f"base model. {_MIXED_UP}"
        )


def adapter_shapes(
    config: CausalContextConfig, width: int, inputs: tuple[int, ...], outputs: int
) -> dict[str, tuple[int, ...]]:
    """The weights of an adapter on a module of the base, "down.weight" and so on, and their shapes.

    Args:
        width: W of each concept on this module.
        inputs: features that go into the module, and its kernel if it is a convolution.
        outputs: features that come out.
    """
    K, W, R = len(config.concepts), width, len(config.concepts) * width
    S = cast(int, config.observational_rank) + R
    shapes: dict[str, tuple[int, ...]] = {"down.weight": (S, *inputs), "up.weight": (outputs, S)}
    if config.expressive_depth:
        shapes["expressive.weight"] = (config.expressive_depth, K, W, W)
    if config.mechanism != "independent":
        shapes["causal.shift"] = (K, W, W)
        matrices = ("observational", "interventional") if config.mechanism == "reduced" else ("coefficients",)
        shapes |= {f"causal.{name}": (R, R) for name in matrices}
    return shapes


def not_whole(source: str, missing: Sequence[str]) -> AdapterError:
    """The error for weights that a config asks for and a file lacks."""
    return AdapterError(
        f"{source} is not whole: it lacks {len(missing):,} weights that its config asks for, such as "
        f"{', '.join(map(shown, missing[:3]))}. It was trained for another base, its files belong to different "
        "adapters, or it was saved in part."
    )
