"""`hf-causal-context export`: chosen contexts as LoRA files that other tools read."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..data.arguments import argument, refuse_useless
from ..errors import UserValueError
from .adapter_arguments import CALIBRATED, RevisionArguments


@dataclass(kw_only=True)
class Arguments(RevisionArguments):
    """Settings of the command."""

    contexts: list[str] = field(
        metadata={
            "help": 'Such as a+b "a=0.5,b=-1"; singles and pairs are all of them, obs the empty one.',
            "aliases": ["--context"],
        }
    )
    format: str = field(
        metadata={
            "help": "peft: folders for PeftModel.from_pretrained, vLLM and SGLang; diffusers: files for "
            "load_lora_weights; kohya: files for the tools around Stable Diffusion; comfyui: what ComfyUI reads for "
            "the base; gguf: files of language models for llama.cpp.",
            "choices": ["peft", "diffusers", "kohya", "comfyui", "gguf"],
        }
    )
    output_dir: Path = field(metadata={"help": "Folder for the files."})
    calibrated: bool = argument(False, CALIBRATED)
    variant: str | None = argument(None, "Of the base's files, such as fp16.")


def run(arguments: Arguments) -> None:
    """Write one LoRA per context, and print the paths.

    Raises:
        ValueError, OSError, ImportError: see `export_contexts` and `export_text_contexts`.
    """
    from ..inference.export import export_contexts, lora_paths
    from ..inference.language_export import check_text_format, export_text_contexts

    stored = arguments.open()
    if stored.is_of_language_model:
        refuse_useless(arguments, ["variant"], f"{arguments.adapter} is an adapter of a language model")
        file_format = check_text_format(arguments.format)
        files = lora_paths(stored.config, arguments.contexts, arguments.output_dir, file_format, arguments.calibrated)
        model, _ = stored.language_model(list(files.values()), **arguments.weights)
        export_text_contexts(model, files, file_format)
        print("\n".join(map(str, files)))
        return
    if arguments.format == "gguf":
        raise UserValueError("--format gguf is for language models. Use one of the others.")
    options: dict[str, Any] = {"file_format": arguments.format, "calibrated": arguments.calibrated}
    # Refuses before the base is loaded.
    contexts = list(lora_paths(stored.config, arguments.contexts, arguments.output_dir, **options).values())
    base = stored.pipeline(contexts, variant=arguments.variant, **arguments.weights)
    for path in export_contexts(base, arguments.contexts, arguments.output_dir, **options):
        print(path)
