"""What the demo shows: its controls, and as HTML the rest. What others wrote (names, messages) is escaped here."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from html import escape
from inspect import isgeneratorfunction
from io import BytesIO
from typing import TYPE_CHECKING, Any

import gradio as gr
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..bases.diffusion_base import DiffusionBase
from ..bases.images import to_image
from ..contexts import OBSERVATIONAL, Context
from ..errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PAPER = "https://arxiv.org/abs/2507.04754"
WEAKEST, STRONGEST = -1.0, 2.0
MOST_IMAGES, MOST_STEPS = 12, 100
_TINY, _LARGEST = 128, 512  # pixels: below the one shown as squares, above the other made smaller

SCALE = """<div class="cc-scale"><b>Strength of each concept</b><div aria-hidden="true">
<span style="--at:0">-1</span><span style="--at:.3333">0<small>not intervened</small></span>
<span style="--at:.6667">1<small>as trained</small></span><span style="--at:1">2</span></div></div>"""

# Classes begin with cc-, since gradio's own rules and these share the page. 8 px are half a slider's thumb.
CSS = """
.gradio-container {width: 100%; max-width: 1240px !important; margin: 0 auto !important;
  --body-text-color-subdued: #64748b}
.dark .gradio-container, .gradio-container.dark {--body-text-color-subdued: #94a3b8}
.cc-head h1 {font-size: 1.4rem; margin: 0 0 .2rem; overflow-wrap: anywhere}
.cc-head p, .cc-hint {color: var(--body-text-color-subdued); margin: 0; overflow-wrap: anywhere}
.cc-head b {font-weight: 600; color: var(--body-text-color)}
.cc-head a {padding: 0 !important; text-decoration: underline}
.cc-note {padding: .7rem .9rem; margin-bottom: .6rem; border-radius: 6px; overflow-wrap: anywhere;
  background: var(--background-fill-secondary)}
.cc-warning {background: #fef3c7; color: #78350f; border-left: 4px solid #f59e0b}
.cc-scale div {position: relative; height: 2.4rem; margin: .5rem 0 0}
.cc-scale span {position: absolute; top: 0; left: calc(8px + var(--at) * (100% - 16px)); transform: translateX(-50%);
  text-align: center; line-height: 1.15; font-weight: 600; font-size: .85rem}
.cc-scale small {display: block; font-weight: 400; color: var(--body-text-color-subdued); white-space: nowrap}
.cc-strengths {max-height: 27rem; overflow-y: auto; flex-wrap: nowrap !important}
.cc-strengths > .form, .cc-strength {flex: none}
.cc-strength label {overflow-wrap: anywhere; min-width: 0}
.cc-strength .min_value, .cc-strength .max_value {display: none}
.cc-strength .slider_input_container {padding: 3px 0; background-repeat: no-repeat; background-size: 2px 100%;
  background-image: linear-gradient(#94a3b8, #94a3b8), linear-gradient(#94a3b8, #94a3b8);
  background-position: calc(8px + .3333 * (100% - 16px)) 0, calc(8px + .6667 * (100% - 16px)) 0}
.cc-examples {gap: .4rem !important; align-items: center}
.cc-examples button {flex: 0 1 auto !important; overflow-wrap: anywhere; white-space: normal; padding: .3rem .7rem}
.cc-run {align-self: flex-start; width: auto !important; flex: none; padding: .35rem 1.1rem}
.cc-rows {display: flex; flex-direction: column; gap: .35rem}
.cc-row {display: grid; grid-template-columns: 8.5rem 1fr; gap: .6rem; align-items: center}
.cc-row > span {text-align: right; overflow-wrap: anywhere; line-height: 1.2; font-size: .9rem}
.cc-tiles {display: grid; gap: 4px; grid-template-columns: repeat(var(--columns), minmax(0, var(--side)))}
.cc-tiles img, .cc-tiles i {display: block; width: 100%; aspect-ratio: 1; border-radius: 3px;
  background: var(--background-fill-secondary)}
.cc-tiny img {image-rendering: pixelated}
.cc-image img {width: 100%; height: 100%; object-fit: contain}
.cc-flow {display: grid; gap: .6rem; grid-template-columns: repeat(auto-fill, minmax(7.5rem, 1fr))}
.cc-flow .cc-row {display: flex; flex-direction: column-reverse; gap: .2rem; align-items: stretch}
.cc-flow .cc-row > span {text-align: center}
.cc-foot {color: var(--body-text-color-subdued); font-size: .8rem; margin: .2rem 0 0}
.cc-figure {overflow-x: auto}
.cc-figure img {width: 100%; min-width: 36rem; border-radius: 6px}
@media (max-width: 640px) {
  .cc-row {grid-template-columns: 1fr; gap: .1rem}
  .cc-row > span {text-align: left}
  .cc-strengths {max-height: 22rem}
}
"""


def legible(context: Context) -> str:
    """Return a context in plain words, for people."""
    parts = [name if strength == 1 else f"{name}={strength:g}" for name, strength in context.strengths.items()]
    text = " + ".join(parts) or "no intervention"
    return text if context.observational == 1 else f"{text} ({OBSERVATIONAL}={context.observational:g})"


def header_html(title: str, concepts: Sequence[str], base: str | None) -> str:
    """Return the top of a page: what the adapter is."""
    listed = ", ".join(f"<b>{escape(concept)}</b>" for concept in concepts)
    what = f"One adapter, {len(concepts)} concepts: {listed}. Base: <b>{escape(base)}</b>. " if base else ""
    made = f'Made with <b>hf_causal_context</b>, LoRA for causal concepts (<a href="{_PAPER}">the method</a>).'
    return f'<div class="cc-head"><h1>{escape(title)}</h1><p>{what}{made}</p></div>'


def hint(text: str) -> str:
    """Return a quiet sentence above a tab's controls."""
    return f'<p class="cc-hint">{escape(text)}</p>'


def note(text: str, warning: bool = False) -> str:
    """Return a boxed message."""
    return f'<div class="cc-note{" cc-warning" if warning else ""}">{escape(text)}</div>'


def grid_html(labels: Sequence[str], rows: Sequence[Tensor], seeds: range, flow: bool = False) -> str:
    """A line for each label: images (S, C, H, W) in [0, 1], one for each seed, and empty places for rows to come.

    Args:
        labels: of the lines.
        rows: images (S, C, H, W) of the first lines.
        seeds: of the S images.
        flow: lines beside each other, with their labels below.
    """
    side = rows[0].shape[-1] if rows else 0
    lines = []
    for i, label in enumerate(labels):
        if i < len(rows):
            alts = [label if flow else f"{label}, seed {seed}" for seed in seeds]
            tiles = [_img(to_image(image), alt) for image, alt in zip(rows[i], alts, strict=True)]
        else:
            tiles = ["<i></i>"] * len(seeds)
        lines.append(
            f'<div class="cc-row"><span>{escape(label)}</span><div class="cc-tiles">{"".join(tiles)}</div></div>'
        )
    style = f"--columns:{len(seeds)};--side:{'100%' if flow else '7rem' if side <= _TINY else '20rem'}"
    classes = f"{'cc-flow' if flow else 'cc-rows'}{' cc-tiny' if 0 < side <= _TINY else ''}"
    shown = f"seeds {seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else f"seed {seeds[0]}"
    foot = "" if flow else f'<p class="cc-foot">Columns: {shown}.</p>'
    return f'<div class="{classes}" style="{style}">{"".join(lines)}</div>{foot}'


def figure_html(figure: Figure, alt: str) -> str:
    """Return a figure as an image."""
    buffer = BytesIO()
    figure.savefig(buffer, dpi=130)
    data = b64encode(buffer.getvalue()).decode()
    return f'<div class="cc-figure"><img alt="{escape(alt)}" src="data:image/png;base64,{data}"></div>'


def strength_sliders(concepts: Sequence[str], observational_part: bool) -> list[gr.Slider]:
    """A slider for the strength of each concept, the first at 1 to show something, and of the observational part."""
    gr.HTML(SCALE)
    starts = [(name, float(i == 0)) for i, name in enumerate(concepts)]
    starts += [("observational part (0: the base's own look, 1: the data's)", 1.0)] if observational_part else []
    with gr.Column(elem_classes="cc-strengths"):
        return [
            gr.Slider(WEAKEST, STRONGEST, start, step=0.05, label=label, buttons=[], elem_classes="cc-strength")
            for label, start in starts
        ]


def further_controls(base: DiffusionBase) -> list[Any]:
    """Return the prompt or class where the base takes one, number of images, first seed, steps."""
    controls: list[Any] = []
    if base.takes_captions:
        controls.append(gr.Textbox(label="Prompt", lines=2, placeholder="what the image shows"))
    if base.num_classes is not None:
        last = base.num_classes - 1
        controls.append(gr.Number(0, minimum=0, maximum=last, precision=0, label=f"Class, 0 to {last}"))
    with gr.Row():
        count = 2 if base.is_latent else 6
        controls.append(gr.Number(count, minimum=1, maximum=MOST_IMAGES, precision=0, label="Images", min_width=90))
        controls.append(gr.Number(0, minimum=0, maximum=2**32, precision=0, label="First seed", min_width=90))
    controls.append(gr.Slider(1, MOST_STEPS, 25, step=1, label="Steps of the sampler", buttons=[]))
    return controls


def decoded(payload: Any) -> Image.Image | None:
    """Return the image in an uploaded file, upright.

    Raises:
        gr.Error: for a file that holds none.
    """
    if payload is None:
        return None
    try:
        with Image.open(payload.path) as image:
            return ImageOps.exif_transpose(image).copy()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise gr.Error(
            "This file holds no image that can be read. Use a PNG, JPEG or WebP.", print_exception=False
        ) from None


def warned(handler: Callable[..., Any]) -> Callable[..., Any]:
    """Return a handler that shows visitors what went wrong; a bug keeps its traceback, where the page is served."""

    @wraps(handler)
    def at_once(*values: Any) -> Any:
        with _shown_as_warnings():
            return handler(*values)

    @wraps(handler)
    def in_steps(*values: Any) -> Iterator[Any]:
        with _shown_as_warnings():
            yield from handler(*values)

    return in_steps if isgeneratorfunction(handler) else at_once


@contextmanager
def _shown_as_warnings() -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError, torch.OutOfMemoryError) as error:
        bug = not isinstance(error, UserError | OSError | torch.OutOfMemoryError)
        # Messages are shown as HTML, and may hold what a visitor or an adapter wrote.
        raise gr.Error(escape(str(error), quote=False), print_exception=bug) from error


def _img(image: Image.Image, alt: str) -> str:
    tiny = max(image.size) <= _TINY
    image.thumbnail((_LARGEST, _LARGEST))
    buffer = BytesIO()
    image.save(buffer, "PNG" if tiny else "JPEG", quality=90)
    data = b64encode(buffer.getvalue()).decode()
    return f'<img alt="{escape(alt)}" src="data:image/{"png" if tiny else "jpeg"};base64,{data}">'
