"""`--push_to_hub`: what is checked before a training starts, and done when it has ended."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from accelerate import Accelerator

from .._files import sibling
from ..bases.names import resolve_base_name
from ..hub.folder import save
from ..hub.repository import check_pushable, push
from .arguments import AdapterArguments

_DTYPES = {"fp16": "float16", "bf16": "bfloat16"}


def train_and_publish(accelerator: Accelerator, arguments: AdapterArguments, fine_tune: Callable[[], Path]) -> Path:
    """Train, push the result if the arguments say so, and return its folder.

    Raises:
        ValueError, OSError: what `check_pushable` raises, before the training; an OSError when the result cannot be
            pushed.
    """
    pushing = arguments.push_to_hub and not arguments.dry_run and accelerator.is_main_process
    repo_id = arguments.hub_model_id or Path(arguments.output_dir).resolve().name
    if pushing:
        check_pushable(repo_id, resolve_base_name(arguments.pretrained_model_name_or_path))
    folder = fine_tune()
    if pushing:
        accelerator.free_memory()  # the base is loaded once more
        _publish(arguments, folder, repo_id)
    return folder


def _publish(arguments: AdapterArguments, folder: Path, repo_id: str) -> None:
    image_options = {name: getattr(arguments, name) for name in ("variant", "resolution") if hasattr(arguments, name)}
    try:
        made = save(
            folder,
            sibling(folder, "-hub"),
            pretrained_model_name_or_path=arguments.pretrained_model_name_or_path,
            revision=arguments.revision,
            dtype=_DTYPES.get(arguments.mixed_precision or "", "float32"),
            quantization=arguments.quantization,
            gguf_file=arguments.gguf_file,
            **image_options,
        )
        print(f"Pushed: {push(made, repo_id)}", flush=True)
    except Exception as error:  # clients and loaders raise whatever a Hub that is gone makes them raise
        raise OSError(
            f"The adapter is trained and in {folder}, but not on the Hub: {error} Push it with `hf-causal-context push "
            f"--adapter {folder} --repo_id {repo_id}`."
        ) from error
