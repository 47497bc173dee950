"""`hf-causal-context push`: an adapter on the Hub, with samples and a card."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from .._files import sibling
from ..data.arguments import argument, refuse_useless
from ..errors import UserValueError
from ..messages.progress import say
from .adapter_arguments import AdapterSource


@dataclass(kw_only=True)
class Arguments(AdapterSource):
    """Settings of the command."""

    adapter: str = field(metadata={"help": "Folder of the adapter; may stand first, without --adapter."})
    variant: str | None = argument(None, "Of the base's files, such as fp16.")
    repo_id: str | None = argument(None, "user/name; without it the folder is only made, to look at.")
    private: bool = argument(False, "A repository that is made now is private.")
    branch: str | None = argument(None, "Of the repository, by default main.")
    output_dir: Path | None = argument(None, "The folder to make and upload; by default <adapter>-hub.")
    evaluation: Path | None = argument(None, "Folder that `hf-causal-context evaluate` wrote.")
    license: str | None = argument(None, "Of the adapter, by the Hub's name: apache-2.0, openrail ...")
    descriptions: list[str] = argument(
        [], "What concepts mean, for readers: 'thick: strokes are thicker' 'slant: it leans' ..."
    )
    contexts: list[str] = argument(
        [], "Combinations to show; by default held-out ones, or some pairs.", aliases=["--context"]
    )
    seed: int = argument(0, "Of the samples.")
    prompt: str | None = argument(None, "Of the samples; by default --validation_prompt of the training.")
    class_label: int | None = argument(None, "For class-conditional bases.")
    num_inference_steps: int | None = argument(None, "Of images, by default 25.")
    guidance_scale: float | None = argument(None, "By default the pipeline's.")
    resolution: int | None = argument(None, "Side of the images in pixels; by default the base's.")
    num_frames: int | None = argument(None, "Of clips; by default --num_frames of the training.")
    chat: bool = argument(False, "The prompt is a user's message to a chat model.")
    max_new_tokens: int | None = argument(None, "Of texts, by default 40.")


def run(arguments: Arguments) -> None:
    """Make the folder, and upload it if a repository is given.

    Raises:
        ValueError, OSError: see `save` and `push`.
    """
    from ..hub import push, save
    from ..hub.contents import CardContents
    from ..hub.repository import base_of_nobody_else, check_pushable

    if arguments.repo_id is None:
        refuse_useless(arguments, ["private", "branch"], "No repository is given (--repo_id)")
    settings = vars(arguments).copy()
    repo_id, private, branch = (settings.pop(name) for name in ("repo_id", "private", "branch"))
    adapter, output_dir = settings.pop("adapter"), settings.pop("output_dir")
    descriptions = [_description(text) for text in arguments.descriptions]
    settings["descriptions"] = dict(descriptions)
    if len(settings["descriptions"]) < len(descriptions):
        raise UserValueError("--descriptions has a concept twice. Say what it means in one of them.")
    if repo_id is not None and Path(adapter).is_dir():  # before the samples are made
        check_pushable(repo_id, arguments.open().base[0], license=arguments.license)
    target = output_dir or sibling(Path(adapter), "-hub")
    there = target.exists()
    folder = save(adapter, target, **settings)
    if there:
        say(f"Replaced {folder}.")
    print(f"The folder for the Hub is {folder}. Its README.md is the card; where you edit it, it is kept.")
    if repo_id is None and (doubt := base_of_nobody_else(CardContents.load(folder).base)):
        print(f"Warning: {doubt}")
    if repo_id is not None:
        print(push(folder, repo_id, private=private or None, revision=branch))


def _description(text: str) -> tuple[str, str]:
    concept, separator, meaning = text.partition(":")
    if not separator or not meaning.strip():
        raise UserValueError(f"--descriptions {text!r} has not the form 'concept: what it means'.")
    return concept.strip(), meaning.strip()
