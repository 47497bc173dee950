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
from os import PathLike
from pathlib import Path
from typing import Any

from peft.utils import PeftType
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from ..._files import CONFIG, PICKLE, WEIGHTS
from ...errors import UserValueError
from ...messages.wording import short_repr
from ..peft_type import CAUSAL_CONTEXT, PEFT_PREFIX
from .layout import AdapterError, Layout, StoredTensor

MAX_CONFIG_BYTES = 2**20
MAX_HEADER_BYTES = 2**24
MAX_NAME = 256
MAX_WEIGHT = 6e4  # what float16 holds; training stays far below, so that larger weights are those of a damaged file
_FLOATING = ("F64", "F32", "F16", "BF16")
# PEFT stores an embedding beside an adapter of a language model whose vocabulary has grown.
_EMBEDDINGS = ("embed", "lm_head", "wte", "shared")


def read_fields(path: str | PathLike[str], source: str | None = None) -> dict[str, Any]:
    """Return the fields in an adapter_config.json, not yet checked.

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
        raise AdapterError(f"The {CONFIG} of {source} holds no fields, but {short_repr(fields)}.")
    kind = fields.get("peft_type")
    if kind != CAUSAL_CONTEXT.value:
        if not isinstance(kind, str) or kind not in PeftType.__members__:
            raise AdapterError(f"{source} says peft_type={short_repr(kind)}, which is no kind of adapter known here.")
        raise AdapterError(
            f"{source} is a {kind} adapter; only causal context adapters have contexts. Load it with PEFT "
            "(PeftModel.from_pretrained), a LoRA of a pipeline with pipe.load_lora_weights."
        )
    return fields


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise UserValueError("it gives a field twice")
    return fields


def _no_constant(constant: str) -> None:
    raise UserValueError(f"{constant} is not a number")


def read_header(folder: Path, layout: Layout, source: str) -> dict[str, StoredTensor]:
    """What weights the folder of an adapter holds, by their names in the base model: exactly those of its layout.

    The tensors themselves are not read.

    Raises:
        AdapterError: for a file that is missing, damaged, or not what the config describes.
    """
    tensors = _header(folder / WEIGHTS, source)
    layout.check(tensors, source)
    return tensors


def read_weights(folder: Path, source: str) -> dict[str, Tensor]:
    """Return the weights whose header was read (and compared with a model), by their names in the base model.

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


def check_beside(place: str | PathLike[str], subfolder: str | None, layout: Layout) -> None:
    """Compare the weights beside a config that PEFT reads from a folder, if there are any, with its layout.

    Raises:
        AdapterError: for a file that is damaged, or not what the config describes.
    """
    folder = Path(place, subfolder or "")
    if (folder / WEIGHTS).is_file():
        tensors = _header(folder / WEIGHTS, str(folder), prefix=PEFT_PREFIX)  # PEFT would leave others out
        layout.check(tensors, str(folder), others=_EMBEDDINGS)
        layout.check_targets(tensors, str(folder))


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
                    raise _damaged(source, f"the name {short_repr(name)} of a tensor is {problem}")
                if not key.startswith(prefix):
                    raise _damaged(source, f"the name {short_repr(key)} of a tensor does not begin with {prefix}")
                tensors[name] = StoredTensor(tuple(described.get_shape()), described.get_dtype() in _FLOATING)
    except SafetensorError as error:
        raise _damaged(source, error) from error
    return tensors


def _damaged(source: str, error: object) -> AdapterError:
    return AdapterError(f"The {WEIGHTS} of {source} is damaged: {error}. Download it again, or use another copy.")
