"""The folder of an adapter that others see: what `save` makes and `push` uploads.

It holds the adapter (safetensors, adapter_config.json), its training's settings and contexts, samples, plain LoRAs, the
evaluation if there is one, and the card. Nothing in it names a folder of the machine it was made on.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .._files import (
    ARGUMENTS,
    BASE_GAP,
    CARD,
    CARD_CONTENTS,
    CONFIG,
    DATA_RECORD,
    RESULTS,
    RESULTS_IMAGE,
    WEIGHTS,
    complete_or_absent,
    read_json,
)
from ..bases.names import is_folder, portable_base_name
from ..contexts import ConceptSet, Context
from ..errors import UserValueError
from ..inference.adapted import StoredAdapter
from ..inference.shown_contexts import shown_contexts
from ..messages.wording import quoted, short_repr
from .card import is_edited, render_card
from .contents import CHAT_PROMPT, CardContents
from .samples import show_images, show_texts

_OF_REPORTS = {"concepts", "contexts", "notes", "settings"}  # of all versions
_EVALUATION = ("report.json", "report.md", "report.png", "samples.png")
# Settings that are folders of a machine, where they are no ids of the Hub.
_PATHS = (
    *("train_data_dir", "dataset_name", "class_data_dir", "gguf_file"),
    *("output_dir", "logging_dir", "resume_from_checkpoint"),
)


def save(
    adapter: str | Path,
    output_dir: str | Path,
    *,
    contexts: Sequence[str] = (),
    evaluation: str | Path | None = None,
    license: str | None = None,  # noqa: A002 (the Hub's word)
    descriptions: Mapping[str, str] | None = None,
    pretrained_model_name_or_path: str | None = None,
    revision: str | None = None,
    variant: str | None = None,
    dtype: str = "float32",
    quantization: str | None = None,
    gguf_file: str | None = None,
    seed: int = 0,
    prompt: str | None = None,
    class_label: int | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    resolution: int | None = None,
    num_frames: int | None = None,
    chat: bool = False,
    max_new_tokens: int | None = None,
) -> Path:
    """Make the folder that `push` uploads, and return it: complete, over an earlier one, or not at all.

    A card in an earlier one that was edited is kept.

    Args:
        adapter: folder of a trained adapter.
        output_dir: the folder to make.
        contexts: combinations to show and to bake into LoRAs; by default the held-out ones, or the first pairs.
        evaluation: folder that `hf-causal-context evaluate` wrote.
        license: the Hub's name of the license of the adapter, such as "apache-2.0".
        descriptions: concept -> what it means, for readers of the card.
        pretrained_model_name_or_path: the base, where the adapter does not name it or names a folder.
        revision: of the base.
        variant: of its files, such as "fp16".
        dtype: of the base: "float32", "float16" or "bfloat16".
        quantization: of the base's weights while samples are made: "int8", "fp8", "nf4" or "llm_int8".
        gguf_file: with the base's weights while samples are made, instead of its own.
        seed: of the samples.
        prompt: of the samples, for bases that take text; by default that of the training's own samples.
        class_label: for class-conditional bases, by default 0.
        num_inference_steps: by default 25.
        guidance_scale: by default the pipeline's.
        resolution: height and width, by default the base's.
        num_frames: of clips, by default the training's.
        chat: the prompt is what a user says to a chat model.
        max_new_tokens: of sample texts, by default 40.

    Raises:
        ValueError: for another kind of adapter, unknown concepts, options of the other kind of base, an evaluation of
            another adapter, or what sampling refuses.
        FileExistsError: for a folder that holds other things.
        OSError: for an adapter or base that cannot be read, or files that cannot be written.
    """
    adapter, output_dir = Path(adapter), Path(output_dir)
    if not adapter.is_dir():
        raise FileNotFoundError(f"There is no folder {adapter}. Give the folder of a trained adapter.")
    stored = StoredAdapter.open(adapter, pretrained_model_name_or_path, revision=revision)
    config, language = stored.config, stored.is_of_language_model
    images_only = {"class_label": class_label, "num_inference_steps": num_inference_steps, "variant": variant}
    images_only |= {"guidance_scale": guidance_scale, "resolution": resolution, "num_frames": num_frames}
    texts_only = {"chat": chat or None, "max_new_tokens": max_new_tokens}
    _refuse_useless(adapter, images_only if language else texts_only, language)
    ConceptSet(config.concepts).mask([Context(name) for name in descriptions or ()])  # refuses unknown names
    _check_output(adapter, output_dir)
    report = _read_evaluation(evaluation, config.concepts) if evaluation is not None else {}
    arguments, data, card = (_read(adapter / name) for name in (ARGUMENTS, DATA_RECORD, CARD_CONTENTS))
    shown = shown_contexts(ConceptSet(config.concepts), contexts or data.get("held_out", ()))
    base_name, revision = stored.base
    # One that was named for this command may be given as a folder; the card and the config then say so, too.
    public = portable_base_name(base_name)
    default_prompt, chat = str(arguments.get("validation_prompt", "")), chat or data.get("chat", False)
    with complete_or_absent(output_dir) as folder:
        folder.mkdir(exist_ok=True)  # of "." the place is there already
        weights: dict[str, Any] = {"dtype": dtype, "quantization": quantization, "gguf_file": gguf_file}
        if language:
            model, tokenizer = stored.language_model(**weights)
            tokenizer.save_pretrained(folder)
            begin = (default_prompt if prompt is None else prompt) or (CHAT_PROMPT if chat else "")
            length = max_new_tokens or 40
            made = show_texts(
                model, tokenizer, folder, shown, seed=seed, prompt=begin, chat=chat, max_new_tokens=length
            )
        else:
            base = stored.pipeline(variant=variant, **weights)
            call: dict[str, Any] = {"prompt": default_prompt if prompt is None and base.takes_captions else prompt}
            call |= {"num_inference_steps": num_inference_steps or 25}
            call |= {"guidance_scale": guidance_scale, "resolution": resolution}
            call |= {"num_frames": num_frames or card.get("call", {}).get("num_frames")}
            label = class_label if class_label is not None else 0 if base.takes_classes else None
            made = show_images(base, folder, shown, seed=seed, class_label=label, call=call)
        _copy_record(adapter, folder, arguments, public)
        _copy_adapter(stored, folder, {"base_model_name_or_path": public, "revision": revision})
        _name_base_of_loras(folder / "loras", public)
        if report:
            _copy_evaluation(Path(str(evaluation)), report, folder / "evaluation")
        made = dataclasses.replace(
            made,
            name=adapter.resolve().name,
            base=public,
            revision=revision,
            variant=variant,
            dtype=dtype,
            license=license,
            descriptions=dict(descriptions or {}),
        )
        made.save(folder)
        _write_card(folder, output_dir / CARD)
    return output_dir


def check_complete(folder: Path) -> CardContents:
    """Refuse a folder that `save` did not make, or that has lost files.

    Raises:
        FileNotFoundError: naming what is missing.
    """
    needed = [CONFIG, WEIGHTS, CARD, CARD_CONTENTS]
    contents = None
    if (folder / CARD_CONTENTS).exists():
        contents = CardContents.load(folder)
        images = contents.samples.values() if contents.library == "diffusers" else ()
        needed += [name for name in (*images, contents.grid, contents.strengths, contents.influence) if name]
        needed += contents.loras.values()
    missing = [name for name in needed if not (folder / name).exists()]
    if missing or contents is None or not contents.samples:
        raise FileNotFoundError(
            f"{folder} is not a complete folder for the Hub; it lacks {quoted(missing) or 'samples'}. Make one of a "
            "trained adapter with hf_causal_context.hub.save, or `hf-causal-context push --adapter ...`."
        )
    return contents


def _check_output(adapter: Path, output_dir: Path) -> None:
    if output_dir.resolve() == adapter.resolve() or adapter.resolve().is_relative_to(output_dir.resolve()):
        raise FileExistsError(f"--output_dir {output_dir} holds the adapter itself. Choose another folder.")
    if output_dir.exists() and (
        not output_dir.is_dir() or (any(output_dir.iterdir()) and not (output_dir / CARD_CONTENTS).exists())
    ):
        raise FileExistsError(f"{output_dir} exists and holds other things. Choose another --output_dir.")


def _refuse_useless(adapter: Path, options: Mapping[str, object], language: bool) -> None:
    """Refuse options that are for the other kind of base (ValueError), unless they are None."""
    if useless := [name for name, value in options.items() if value is not None]:
        raise UserValueError(
            f"{adapter} is an adapter of a {'language model' if language else 'diffusers pipeline'}, so "
            f"{', '.join(f'--{name}' for name in useless)} would have no effect. Leave it out."
        )


def _copy_record(adapter: Path, folder: Path, arguments: Mapping[str, Any], base: str) -> None:
    """Copy what is known of the training and of results."""
    for name in (RESULTS, RESULTS_IMAGE, DATA_RECORD, BASE_GAP):
        if (adapter / name).exists():
            shutil.copyfile(adapter / name, folder / name)
    if arguments:
        _write_json(folder / ARGUMENTS, _public_arguments(arguments, base))


def _write_card(folder: Path, earlier: Path) -> None:
    """Write the card, unless there was one that was edited, which is kept."""
    if earlier.exists() and is_edited(earlier.read_text(encoding="utf-8")):
        shutil.copyfile(earlier, folder / CARD)
        print(f"{earlier} was edited and is kept. Remove it to get a new one.", flush=True)
    else:
        (folder / CARD).write_text(render_card(folder), encoding="utf-8", newline="\n")


def _copy_adapter(stored: StoredAdapter, folder: Path, changes: dict[str, Any]) -> None:
    """Weights and configs: at the top, and those of further components (text encoders) in sub-folders."""
    for source, *_ in stored.parts().values():
        target = folder / source.relative_to(stored.folder)
        target.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / WEIGHTS, target / WEIGHTS)
        _write_json(target / CONFIG, _read(source / CONFIG) | changes)


def _name_base_of_loras(loras: Path, base: str) -> None:
    for path in loras.rglob(CONFIG):
        config = _read(path)
        # PEFT writes a set: in another order each time, so that every push would have something new.
        targets = sorted(config["target_modules"])
        _write_json(path, config | {"base_model_name_or_path": base, "target_modules": targets})


def _public_arguments(arguments: Mapping[str, Any], base: str) -> dict[str, Any]:
    # A relative one could be taken for an id, as which cards would link a dataset.
    folders = {k for k in _PATHS if (v := arguments.get(k)) and (is_folder(v) or Path(v).exists())}
    shown = {k: Path(v).name if k in folders else v for k, v in arguments.items()}
    return shown | {"pretrained_model_name_or_path": base}


def _read_evaluation(folder: str | Path, concepts: Sequence[str]) -> dict[str, Any]:
    path = Path(folder, "report.json")
    if not path.exists():
        raise FileNotFoundError(
            f"There is no {path}. Give the folder that `hf-causal-context evaluate --output_dir` wrote."
        )
    report = _read(path)
    if lacking := sorted(_OF_REPORTS - report.keys()):
        raise UserValueError(
            f"{path} is no report of `hf-causal-context evaluate`: it has no {quoted(lacking)}. Give the folder that "
            "--output_dir named there."
        )
    if report["concepts"] != list(concepts):
        raise UserValueError(
            f"{path} is about the concepts {report['concepts']}, and the adapter has {list(concepts)}. Evaluate "
            "this adapter."
        )
    return report


def _copy_evaluation(source: Path, report: dict[str, Any], target: Path) -> None:
    """The report without the folders of this machine."""
    target.mkdir()
    settings = report["settings"]
    folders = {v: Path(v).name for v in settings.values() if isinstance(v, str) and Path(v).is_absolute()}
    for name in _EVALUATION:
        if (path := source / name).exists():
            if path.suffix == ".png":
                shutil.copyfile(path, target / name)
            else:
                text = path.read_text(encoding="utf-8")
                for folder, short in folders.items():
                    text = text.replace(folder, short)
                    text = text.replace(json.dumps(folder)[1:-1], json.dumps(short)[1:-1])  # as it stands in JSON
                (target / name).write_text(text, encoding="utf-8")


def _read(path: Path) -> dict[str, Any]:
    """Return what a file of JSON holds; nothing where it is not there.

    Raises:
        ValueError: for something else.
    """
    try:
        found = read_json(path)
    except ValueError as error:
        raise UserValueError(
            f"{path} cannot be read as JSON ({error}). Remove it, or put back what was there."
        ) from error
    if not isinstance(found, dict):
        raise UserValueError(
            f"{path} holds {short_repr(found)}, where names and their values are expected. Remove it, or put back what "
            "was there."
        )
    return found


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
