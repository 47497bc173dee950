"""The command `hf-causal-context`: a thin layer over the Python functions."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; errors of use are printed without a traceback."""
    commands: dict[str, tuple[str, Callable[[list[str]], None]]] = {
        "quickstart": ("train, compose and score an adapter on handwritten digits, in minutes on a CPU", _quickstart),
        "train": ("fine-tune an adapter on a diffusers pipeline", _train),
        "train-text": ("fine-tune an adapter on a language model of transformers", _train_text),
        "train-autoencoder": ("train the paper's autoencoder on pictures in contexts", _train_autoencoder),
        "generate": ("make pictures in chosen contexts", _generate),
        "generate-text": ("write texts in chosen contexts", _generate_text),
        "export": ("write contexts as plain LoRA files for other tools", _export),
        "push": ("put an adapter on the Hub, with samples and a card", _push),
        "demo": ("show an adapter on a web page", _demo),
        "evaluate": ("measure an adapter on its data: does it compose?", _evaluate),
        "check-data": ("count contexts and find what would spoil a training", _check_data),
    }
    parser = argparse.ArgumentParser(
        prog="hf-causal-context",
        description="LoRA for causal concepts.",
        epilog="\n".join(f"  {name:<17} {text}" for name, (text, _) in commands.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=commands, help="see below; each has a --help of its own")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    try:
        commands[chosen.command][1](chosen.arguments)
    except KeyboardInterrupt as error:
        print(f"\n{str(error) or 'Interrupted.'}", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, MemoryError, FloatingPointError, ImportError) as error:
        print(f"\nerror: {str(error) or type(error).__name__}", file=sys.stderr)
        return 1
    return 0


def _train(arguments: list[str]) -> None:
    from .training.arguments import TrainingArguments
    from .training.finetune import train

    _say_where("adapter", train(_parse(TrainingArguments, "train", arguments)))


def _train_text(arguments: list[str]) -> None:
    from .training.arguments import TextArguments
    from .training.language.fine_tune import train_text

    _say_where("adapter", train_text(_parse(TextArguments, "train-text", arguments)))


def _train_autoencoder(arguments: list[str]) -> None:
    from .training.arguments import AutoencoderArguments
    from .training.autoencoder.train import train_autoencoder

    _say_where("autoencoder", train_autoencoder(_parse(AutoencoderArguments, "train-autoencoder", arguments)))


def _say_where(what: str, folder: Path) -> None:
    """Where a training left its result; of several processes one says so."""
    if os.environ.get("RANK", "0") == "0":
        print(f"The {what} is in {folder}.")


def _evaluate(arguments: list[str]) -> None:
    from .commands.evaluate import EvaluationArguments, evaluate_adapter
    from .evaluation.markdown import markdown

    report, paths = evaluate_adapter(_parse(EvaluationArguments, "evaluate", arguments))
    print(f"\n{markdown(report)}")
    for path in paths:
        print(path)
    print("\n" + "\n".join(f"- {sentence}" for sentence in report.verdict.sentences))


def _check_data(arguments: list[str]) -> None:
    from .data import check_data
    from .data.arguments import AnyDataArguments
    from .data.from_arguments import load_any_data

    parsed: AnyDataArguments = _parse(AnyDataArguments, "check-data", arguments)
    data = load_any_data(parsed)
    report = check_data(data)
    print(report.table(), flush=True)
    report.raise_for_errors()
    if parsed.pretrained_model_name_or_path is not None:
        from .commands.check_data import gap_of

        print(gap_of(data, parsed).advice(None))


def _parse(settings: type, command: str, arguments: list[str]) -> Any:
    from transformers import HfArgumentParser

    usage = f"hf-causal-context {command} [--option value ...]"
    parser = HfArgumentParser(cast(Any, settings), usage=usage, allow_abbrev=False)
    parsed, unknown = parser.parse_args_into_dataclasses(arguments, return_remaining_strings=True)
    if unknown:
        raise ValueError(f"Unknown arguments: {' '.join(unknown)}. hf-causal-context {command} --help lists them.")
    return parsed


def _generate(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="hf-causal-context generate")
    _add_adapter_and_base(parser)
    parser.add_argument("--adapter_revision", help="branch, tag or commit of the adapter on the Hub")
    _add_variant(parser)
    parser.add_argument(
        "--contexts", nargs="+", required=True, help='such as obs thick thick+slant "thick=0.5,slant=-1"'
    )
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(8)), help="one picture per context and seed")
    parser.add_argument("--prompt", help="for bases that take text")
    parser.add_argument("--class_label", type=int, help="for class-conditional bases")
    parser.add_argument("--num_inference_steps", type=int, default=25)
    parser.add_argument("--guidance_scale", type=float)
    parser.add_argument("--resolution", type=int)
    parser.add_argument("--batch_size", type=int, default=8, help="pictures per call of the pipeline")
    parser.add_argument("--observational_name", default="obs", help="what the empty context is called")
    parser.add_argument("--grid", action="store_true", help="one grid.png instead of one file per picture")
    parsed = parser.parse_args(arguments)

    from .commands.generate import generate_files

    for path in generate_files(**vars(parsed)):
        print(path)


def _generate_text(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="hf-causal-context generate-text")
    _add_adapter_and_base(parser)
    parser.add_argument("--adapter_revision", help="branch, tag or commit of the adapter on the Hub")
    parser.add_argument(
        "--contexts", nargs="+", required=True, help='such as obs formal formal+brief "formal=0.5,brief=-1"'
    )
    parser.add_argument("--prompt", required=True, help='what the texts begin with; "" for nothing')
    parser.add_argument("--output_file", type=Path, required=True, help="such as texts.jsonl: a JSON line per text")
    parser.add_argument("--max_new_tokens", type=int, default=60)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one text per context and seed")
    parser.add_argument("--temperature", type=float, help="by default the model's own")
    parser.add_argument("--top_p", type=float, help="by default the model's own")
    parser.add_argument("--greedy", action="store_true", help="the likeliest tokens instead of draws")
    parser.add_argument("--chat", action="store_true", help="the prompt is a user's message to a chat model")
    parser.add_argument("--observational_name", default="obs", help="what the empty context is called")
    parsed = parser.parse_args(arguments)

    from .commands.generate_text import generate_text_file, json_line

    for row in generate_text_file(**vars(parsed)):
        print(json_line(row), end="")


def _export(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="hf-causal-context export")
    _add_adapter_and_base(parser)
    parser.add_argument("--adapter_revision", help="branch, tag or commit of the adapter on the Hub")
    _add_variant(parser)
    parser.add_argument(
        "--context",
        dest="contexts",
        nargs="+",
        required=True,
        help='such as thick+slant "thick=0.5,slant=-1"; singles and pairs are all of them, obs the empty one',
    )
    parser.add_argument(
        "--format",
        dest="file_format",
        choices=("peft", "diffusers", "kohya"),
        required=True,
        help="peft: folders for PeftModel.from_pretrained; diffusers: files for load_lora_weights; kohya: files for "
        "the tools around Stable Diffusion",
    )
    parser.add_argument("--output_dir", type=Path, required=True)
    parsed = parser.parse_args(arguments)

    from .commands.export import export_files

    for path in export_files(**vars(parsed)):
        print(path)


def _push(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="hf-causal-context push")
    _add_adapter_and_base(parser)
    _add_variant(parser)
    parser.add_argument("--repo_id", help="user/name; without it the folder is only made, to look at")
    parser.add_argument("--private", action="store_true", default=None, help="a repository that is made now is private")
    parser.add_argument("--branch", help="of the repository, by default main")
    parser.add_argument("--output_dir", type=Path, help="the folder to make and upload; by default <adapter>-hub")
    parser.add_argument("--evaluation", type=Path, help="folder that `hf-causal-context evaluate` wrote")
    parser.add_argument("--license", help="of the adapter, by the Hub's name: apache-2.0, openrail ...")
    parser.add_argument(
        "--descriptions",
        nargs="+",
        default=[],
        help="what concepts mean, for readers: 'thick: strokes are thicker' ...",
    )
    parser.add_argument(
        "--contexts", nargs="+", default=[], help="combinations to show; by default held-out ones, or some pairs"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the samples")
    parser.add_argument("--prompt", help="of the samples; by default --validation_prompt of the training")
    parser.add_argument("--class_label", type=int, help="for class-conditional bases")
    parser.add_argument("--num_inference_steps", type=int, help="of pictures, by default 25")
    parser.add_argument("--guidance_scale", type=float)
    parser.add_argument("--resolution", type=int)
    parser.add_argument("--chat", action="store_true", help="the prompt is a user's message to a chat model")
    parser.add_argument("--max_new_tokens", type=int, help="of texts, by default 40")
    parsed = vars(parser.parse_args(arguments))

    from .hub.repository import check_pushable, push, save
    from .inference.adapted import StoredAdapter

    repo_id, private, branch = (parsed.pop(name) for name in ("repo_id", "private", "branch"))
    adapter, output_dir = parsed.pop("adapter"), parsed.pop("output_dir")
    parsed["descriptions"] = dict(_description(text) for text in parsed["descriptions"])
    if repo_id is not None and Path(adapter).is_dir():  # before the samples are made
        base = StoredAdapter.open(adapter, parsed["pretrained_model_name_or_path"]).base[0]
        check_pushable(repo_id, base, license=parsed["license"])
    folder = save(adapter, output_dir or f"{adapter.rstrip('/')}-hub", **parsed)
    print(f"The folder for the Hub is {folder}. Its README.md is the card; where you edit it, it is kept.")
    if repo_id is not None:
        print(push(folder, repo_id, private=private, revision=branch))


def _description(text: str) -> tuple[str, str]:
    concept, separator, meaning = text.partition(":")
    if not separator or not meaning.strip():
        raise ValueError(f"--descriptions {text!r} has not the form 'concept: what it means'.")
    return concept.strip(), meaning.strip()


def _demo(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="hf-causal-context demo")
    parser.add_argument("--adapter", required=True, help="folder or Hub id of the adapter")
    parser.add_argument("--pretrained_model_name_or_path", help="its base; by default the one it names")
    parser.add_argument("--share", action="store_true", help="a public link, through a server of gradio's, for a week")
    parser.add_argument("--port", type=int, help="by default the first free one from 7860 on")
    parsed = parser.parse_args(arguments)

    from .demo.page import serve

    serve(**vars(parsed))


def _add_adapter_and_base(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--adapter", required=True, help="folder or Hub id of the adapter")
    parser.add_argument("--pretrained_model_name_or_path", help="its base; by default the one it names")
    parser.add_argument("--revision", help="of the base on the Hub")
    parser.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="of the base, and of files"
    )


def _add_variant(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--variant", help="of the base's files, such as fp16")


def _quickstart(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="hf-causal-context quickstart")
    parser.add_argument("--output_dir", type=Path, default=Path("digits-context"))
    parser.add_argument("--seed", type=int, default=0)
    parsed = parser.parse_args(arguments)

    from .quickstart import quickstart

    quickstart(parsed.output_dir, parsed.seed)


if __name__ == "__main__":
    sys.exit(main())
