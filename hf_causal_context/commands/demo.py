"""`hf-causal-context demo`: an adapter on a web page."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..data.arguments import argument
from .adapter_arguments import ADAPTER


@dataclass(kw_only=True)
class Arguments:
    """Settings of the command."""

    adapter: str = field(metadata={"help": ADAPTER})
    pretrained_model_name_or_path: str | None = argument(None, "Its base; by default the one it names.")
    share: bool = argument(False, "A public link, through a server of gradio's, for a week.")
    port: int | None = argument(None, "By default the first free one from 7860 on.")


def run(arguments: Arguments) -> None:
    """Serve the page until it is interrupted; see `serve` for what it raises."""
    from ..demo import serve

    serve(**vars(arguments))
