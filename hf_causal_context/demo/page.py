"""A web page for an adapter: sliders for its concepts, combinations, sweeps, counterfactuals, the read-out.

What visitors press runs in `DemoBackend`, which knows nothing of pages but its errors; `build_demo` lays the page out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from threading import Lock
from typing import Any

from PIL import Image

from ..errors import MissingPackageError, UserError, UserValueError
from ..messages.installation import installation

try:
    import gradio as gr
except ImportError as error:
    raise MissingPackageError(f"The demo needs gradio: {installation('demo')}") from error

from ..adapter.calibration import calibrated_context
from ..adapter.effects import causal_effects
from ..adapter.lookup import conditionings
from ..bases.diffusion_base import DiffusionBase
from ..bases.images import to_image
from ..contexts import OBSERVATIONAL, Context
from ..inference.adapted import StoredAdapter
from ..inference.sampling import generate
from ..messages.wording import quoted
from .views import (
    CSS,
    decoded,
    figure_html,
    further_controls,
    grid_html,
    header_html,
    hint,
    legible,
    note,
    strength_sliders,
    warned,
)

CALIBRATED = "Calibrated: equal steps are equal changes"
MOST_STRENGTHS, MOST_COMBINED = 12, 4


@dataclass(frozen=True)
class Settings:
    """The left column: what is drawn in every tab."""

    context: Context
    condition: dict[str, Any]
    seeds: range
    steps: int
    calibrated: bool

    @property
    def nothing(self) -> Context:
        """No intervention, with the observational part as it is set."""
        return Context(observational=self.context.observational)


class DemoBackend:
    """What the page does with a base and its adapter. Grids are HTML and grow row by row.

    `values` are those of the left column: strengths of the concepts and of the observational part where there is one,
    whether they are calibrated where all concepts are, the prompt or class where the base takes one, the number of
    images, the first seed, steps.

    Raises:
        ValueError: for a base without an adapter.
    """

    def __init__(self, base: DiffusionBase) -> None:
        owners = conditionings(base.pipe)
        if not owners:
            raise UserValueError(
                "The base has no adapter to show. Attach one: load_context_adapter(base.pipe, folder)."
            )
        self.base = base
        self.adapter_name, known = next(iter(owners[0].active_adapters().items()))
        self.concepts = known.names
        self.has_part = owners[0].observational_ranks[self.adapter_name] > 0
        self.knots = owners[0].calibrations[self.adapter_name]
        self.has_calibration = all(self.knots.values())
        # Pipelines keep the state of a run in their scheduler; a second page, or the API, may call at the same time.
        self._lock = Lock()

    def intervene(self, *values: Any) -> Iterator[str]:
        """The chosen context below no intervention, in the same seeds."""
        settings = self._settings(values)
        yield from self._grid(dict.fromkeys([settings.nothing, settings.context]), settings)

    def combinations(self, chosen: Sequence[str], *values: Any) -> Iterator[str]:
        """No intervention, the chosen concepts at strength 1, and their pairs."""
        if not 1 <= len(chosen) <= MOST_COMBINED:
            raise UserValueError(f"{len(chosen)} concepts are chosen. Choose 1 to {MOST_COMBINED}.")
        settings = self._settings(values)
        singles = [Context(name) | settings.nothing for name in chosen]
        pairs = [a | b for a, b in combinations(singles, 2)]
        yield from self._grid([settings.nothing, *singles, *pairs], settings)

    def sweep(self, concept: str, strengths: str, on_top: bool, *values: Any) -> Iterator[str]:
        """One concept at several strengths, alone or with the others as the sliders say."""
        settings = self._settings(values)
        others = settings.context.strengths if on_top else {}
        contexts = [Context({**others, concept: strength}) | settings.nothing for strength in _numbers(strengths)]
        labels = [f"{concept} = {strength:g}" for strength in _numbers(strengths)]
        yield from self._grid(contexts, settings, labels)

    def sample(self, made_in: str, *values: Any) -> Image.Image:
        """One image of the base in a context, to ask about."""
        settings = self._settings(values)
        with self._lock:
            ((image,),) = generate(
                self.base,
                [self._meant(Context.parse(made_in), settings)],
                seeds=settings.seeds[:1],
                num_inference_steps=settings.steps,
                **settings.condition,
            )
        return to_image(image)

    def counterfactual(self, image: Image.Image | None, made_in: str, strengths: str, *values: Any) -> str:
        """Return what the image would have been in the sliders' context, and how well the base knows the image."""
        from ..inference.counterfactuals import counterfactual, doubt

        settings, numbers = self._settings(values), _numbers(strengths)
        source = Context.parse(made_in)
        if image is None:
            raise UserValueError("There is no image yet. Upload one, or press “Draw one”.")
        if settings.context == source:
            raise UserValueError("The sliders say what the image was made in already. Move one of them.")
        with self._lock:
            found = counterfactual(
                self.base,
                image,
                settings.context,
                source,
                strengths=numbers,
                calibrated=settings.calibrated,
                num_inference_steps=settings.steps,
                **settings.condition,
            )
        error = float(found.reconstruction_error[0])
        text = (
            f"Reconstruction error {error:.4f} (root mean square; images go from 0 to 1). "
            f"Way to go: 0 is {legible(source)}, 1 is {legible(settings.context)}."
        )
        if doubted := doubt(error):
            text = f"{doubted} {text}"
        labels = ["reconstruction", *(f"{number:g} of the way" for number in numbers)]
        rows = [found.reconstruction, *found.images]
        return note(text, warning=bool(doubted)) + grid_html(labels, rows, range(1), flow=True)

    def read_out(self) -> str:
        """Return the heat maps of learned influence, or why there are none."""
        try:
            figure = causal_effects(self.base.denoiser, self.adapter_name).plot()
            return figure_html(figure, "Learned influence of each concept on each concept")
        except UserError as error:
            return note(f"No read-out: {error}")

    def _settings(self, values: Sequence[Any]) -> Settings:
        dials = (*self.concepts, OBSERVATIONAL) if self.has_part else self.concepts
        strengths, rest = values[: len(dials)], list(values[len(dials) :])
        calibrated = self.has_calibration and rest.pop(0)
        *given, count, first, steps = rest
        if count is None or first is None:
            raise UserValueError("The number of images or the first seed is missing. Give whole numbers.")
        condition = dict.fromkeys(["prompt" if self.base.takes_captions else "class_label"][: len(given)], *given)
        context = Context(dict(zip(dials, strengths, strict=True)))
        return Settings(context, condition, range(int(first), int(first) + int(count)), int(steps), calibrated)

    def _meant(self, context: Context, settings: Settings) -> Context:
        return calibrated_context(context, self.knots) if settings.calibrated else context

    def _grid(
        self, contexts: Iterable[Context], settings: Settings, labels: Sequence[str] | None = None
    ) -> Iterator[str]:
        contexts, rows = list(contexts), []
        labels = labels or [legible(context) for context in contexts]
        yield grid_html(labels, rows, settings.seeds)
        for context in contexts:
            # A row at a time, entered and left in one step: steps of a generator may run in different threads.
            with self._lock:
                rows += generate(
                    self.base,
                    [self._meant(context, settings)],
                    seeds=settings.seeds,
                    num_inference_steps=settings.steps,
                    **settings.condition,
                )
            yield grid_html(labels, rows, settings.seeds)


def build_demo(base: DiffusionBase, title: str = "hf_causal_context") -> gr.Blocks:
    """Return the page for a base with an adapter; `launch` gives it its looks.

    Raises:
        ValueError: for a base without an adapter.
    """
    base.require_images("The demo")
    backend = DemoBackend(base)
    concepts = backend.concepts
    base_name = Path(str(base.pipe.config.get("_name_or_path") or type(base.pipe).__name__))
    with _page(title) as demo:
        # Of a folder the last part only: pages are public.
        gr.HTML(header_html(title, concepts, base_name.name if base_name.exists() else str(base_name)))
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=280):
                sliders = strength_sliders(concepts, backend.has_part)
                dials = [gr.Checkbox(True, label=CALIBRATED)] if backend.has_calibration else []
                values = [*sliders, *dials, *further_controls(base)]
            with gr.Column(scale=5, min_width=320), gr.Tabs():
                with gr.Tab("Intervene"):
                    _intervene_tab(backend, sliders, values)
                with gr.Tab("Combinations"):
                    _combinations_tab(backend, values)
                with gr.Tab("Strength sweep"):
                    _sweep_tab(backend, values)
                with gr.Tab("Counterfactual"):
                    _counterfactual_tab(backend, values)
                with gr.Tab("Read-out") as tab:
                    gr.HTML(hint("How strongly each concept acts on each concept: learned influence, no causal graph."))
                    heat_maps = gr.HTML(note("…"))
                    tab.select(warned(backend.read_out), None, heat_maps, **_QUEUE)
    return demo


def demo_or_reason(adapter: str, pretrained_model_name_or_path: str | None = None) -> gr.Blocks:
    """Return the page for an adapter, or one that says why there is none: a Space has no other place to say it."""
    try:
        return build_demo(StoredAdapter.open(adapter, pretrained_model_name_or_path).pipeline(), Path(adapter).name)
    except (ValueError, OSError) as error:
        with _page("hf_causal_context") as demo:
            remedy = "Give the Hub id of an adapter, or a folder with its adapter_config.json and weights."
            gr.HTML(header_html("No adapter to show", (), None) + note(str(error), warning=True) + hint(remedy))
        return demo


def launch(demo: gr.Blocks, *, share: bool = False, port: int | None = None, wait: bool = True) -> str:
    """Serve a page and return its address; by default until it is interrupted.

    Raises:
        OSError: for a port that is taken.
    """
    theme = gr.themes.Default(
        primary_hue="indigo",
        font=("system-ui", "sans-serif"),
        font_mono=("ui-monospace", "monospace"),
        radius_size="sm",
        spacing_size="sm",
    )
    _, address, public = demo.launch(
        share=share,
        server_port=port,
        prevent_thread_lock=not wait,
        theme=theme,
        css=CSS,
        footer_links=[],
        run_history=False,
        max_file_size="20mb",
        ssr_mode=False,
    )
    return public or address


def serve(adapter: str, pretrained_model_name_or_path: str | None = None, *, share: bool, port: int | None) -> None:
    """Load an adapter and serve its page until it is interrupted.

    Raises:
        ValueError: for another kind of adapter, or an unknown base.
        OSError: for an adapter or base that cannot be read, or a port that is taken.
    """
    base = StoredAdapter.open(adapter, pretrained_model_name_or_path).pipeline()
    launch(build_demo(base, Path(adapter).resolve().name), share=share, port=port)


# One at a time for all that calls the model, whatever the button.
_QUEUE: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}


def _page(title: str) -> gr.Blocks:
    # Uploads are deleted after an hour.
    return gr.Blocks(title=title, analytics_enabled=False, delete_cache=(3600, 3600), fill_width=True)


def _intervene_tab(backend: DemoBackend, sliders: list[gr.Slider], values: list[Any]) -> None:
    gr.HTML(hint("The same seeds without an intervention and in the context that the sliders say."))
    first = backend.concepts[:2]
    examples = [Context(), *map(Context, first), *([Context(*first), Context({first[0]: -1.0})] if first[1:] else [])]
    with gr.Row(elem_classes="cc-examples"):
        run = gr.Button("Draw", variant="primary", size="sm", min_width=110)
        buttons = [gr.Button(legible(context), size="sm", min_width=60) for context in examples]
    images = gr.HTML(note("Move a slider and press “Draw”."))
    run.click(warned(backend.intervene), values, images, **_QUEUE)
    for button, context in zip(buttons, examples, strict=True):
        strengths = [context.strengths.get(name, 0.0) for name in backend.concepts]
        of_concepts = sliders[: len(strengths)]
        chosen = button.click(partial(_constant, strengths), None, of_concepts, queue=False, api_visibility="private")
        chosen.then(warned(backend.intervene), values, images, **_QUEUE, api_visibility="private")


def _combinations_tab(backend: DemoBackend, values: list[Any]) -> None:
    gr.HTML(
        hint(f"Up to {MOST_COMBINED} concepts: each alone, and all pairs, at strength 1, whatever the sliders say.")
    )
    chosen = gr.CheckboxGroup(
        list(backend.concepts), value=list(backend.concepts[:3]), label="Concepts", show_label=False, container=False
    )
    run = gr.Button("Draw combinations", variant="primary", size="sm", elem_classes="cc-run")
    images = gr.HTML()
    run.click(warned(backend.combinations), [chosen, *values], images, **_QUEUE)


def _sweep_tab(backend: DemoBackend, values: list[Any]) -> None:
    gr.HTML(hint("One concept from weak to strong, in the same seeds. Those that were not trained follow from others."))
    with gr.Row():
        concept = gr.Dropdown(list(backend.concepts), value=backend.concepts[0], label="Concept", min_width=140)
        strengths = gr.Textbox("-1, -0.5, 0, 0.5, 1, 1.5, 2", label="Strengths", min_width=200)
    on_top = gr.Checkbox(False, label="Keep the other concepts as the sliders say", container=False)
    run = gr.Button("Draw sweep", variant="primary", size="sm", elem_classes="cc-run")
    images = gr.HTML()
    run.click(warned(backend.sweep), [concept, strengths, on_top, *values], images, **_QUEUE)


def _counterfactual_tab(backend: DemoBackend, values: list[Any]) -> None:
    gr.HTML(
        hint("What would this very image have been, had the concepts been as the sliders say, all else being equal?")
    )
    with gr.Row(equal_height=False):
        with gr.Column(min_width=200):
            image = gr.Image(
                type="pil", image_mode=None, sources=["upload", "clipboard"], label="Image", height=220, buttons=[],
                elem_classes="cc-image" if backend.base.is_latent else "cc-image cc-tiny",
            )  # fmt: skip
            # Its own decoding would end in a traceback for a file that holds no image.
            image.preprocess = decoded
            draw = gr.Button("Draw one", size="sm")
        with gr.Column(min_width=200):
            made_in = gr.Textbox(
                label="The image was made in",
                placeholder="no intervention",
                info=f"Leave empty, or write for example {quoted(backend.concepts[:1])[1:-1]}=0.5",
            )
            strengths = gr.Textbox("0.5, 1, 1.5", label="How far to go: 0 nowhere, 1 to the sliders")
            run = gr.Button("Ask what if", variant="primary", size="sm")
    answer = gr.HTML()
    draw.click(warned(backend.sample), [made_in, *values], image, **_QUEUE)
    run.click(warned(backend.counterfactual), [image, made_in, strengths, *values], answer, **_QUEUE)


def _constant(values: list[float]) -> list[float] | float:
    return values if len(values) > 1 else values[0]


def _numbers(text: str) -> list[float]:
    """``"0, 0.5 1"`` -> [0.0, 0.5, 1.0]."""
    try:
        numbers = [float(number) for number in text.replace(",", " ").split()]
    except ValueError:
        numbers = []
    if not 1 <= len(numbers) <= MOST_STRENGTHS or not all(abs(number) <= 10 for number in numbers):
        raise UserValueError(f"Strengths {text!r}: write 1 to {MOST_STRENGTHS} numbers, such as 0, 0.5, 1.")
    return numbers
