"""The nodes: an adapter's contexts on a MODEL, and on a CLIP where the adapter has a part for text encoders."""

from pathlib import Path

import comfy.lora  # pyright: ignore[reportMissingImports]
import folder_paths  # pyright: ignore[reportMissingImports]
from comfy.patcher_extension import WrappersMP  # pyright: ignore[reportMissingImports]
from comfy_api.latest import ComfyExtension, io  # pyright: ignore[reportMissingImports]

from hf_causal_context import Context
from hf_causal_context.contexts import OBSERVATIONAL
from hf_causal_context.errors import UserValueError
from hf_causal_context.inference.adapted import StoredAdapter
from hf_causal_context.inference.without_base import loras_without_base

from .adapters import adapters_at_hand, sliders
from .rows import LoraPerImage
from .targets import find_keys, known_targets

FOLDER = "causal_context"  # in ComfyUI's models
folder_paths.add_model_folder_path(FOLDER, str(Path(folder_paths.models_dir, FOLDER)))


def apply_contexts(model, clip, source, contexts):
    """Return a MODEL and a CLIP (or None) in one context, or a MODEL with one context for each image of a batch."""
    adapter = StoredAdapter.open(source)
    loras = loras_without_base(adapter, contexts)
    texts = [component for component in loras[0] if component.startswith("text_encoder")]
    if others := sorted(set(loras[0]) - {"", *texts}):
        raise UserValueError(
            f"{source} adapts {', '.join(others)}, too, which are no part of a MODEL or a CLIP. Move their folders "
            "out of it; that of a second denoiser is an adapter of its own, for the MODEL of that denoiser."
        )
    if texts and clip is None:
        raise UserValueError(f"{source} adapts text encoders, too. Connect CLIP.")
    if texts and len(contexts) > 1:
        raise UserValueError(
            f"{source} adapts text encoders, too, which read a prompt once for all images of a batch. Give one context."
        )
    places = comfy.lora.model_lora_keys_unet(model.model, {})
    known = known_targets(places, model.model.state_dict())
    if texts:
        encoders = clip.cond_stage_model
        text_places = comfy.lora.model_lora_keys_clip(encoders, {})
        known |= known_targets(text_places, encoders.state_dict())
        places |= text_places
    keys = find_keys(loras[0], known, source, f"this MODEL ({type(model.model.model_config).__name__})")
    model = model.clone()
    if len(contexts) > 1:
        modules = [(known[key], [parts[component][path] for parts in loras]) for (component, path), key in keys.items()]
        model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, FOLDER, LoraPerImage(modules))
        return model, clip
    state = {}
    for (component, path), key in keys.items():
        state[f"{key}.lora_A.weight"], state[f"{key}.lora_B.weight"] = loras[0][component][path]
    patches = comfy.lora.load_lora(state, {key: places[key] for key in keys.values()})
    model.add_patches(patches)
    if texts:
        clip = clip.clone()
        clip.add_patches(patches)
    return model, clip


class CausalContextSliders(io.ComfyNode):
    """An adapter that is at hand, with one slider for each of its concepts."""

    @classmethod
    def define_schema(cls):
        found = _found() or {f"(none in models/{FOLDER} or the cache of the Hub)": None}
        options = [io.DynamicCombo.Option(name, _widgets(folder) if folder else []) for name, folder in found.items()]
        return io.Schema(
            node_id="CausalContextSliders",
            display_name="Causal Context (sliders)",
            category="model/loaders",
            description="Concepts of a causal context adapter, each with a strength.",
            inputs=[*_models(), io.DynamicCombo.Input(FOLDER, options, display_name="adapter")],
            outputs=_outputs(),
        )

    @classmethod
    def fingerprint_inputs(cls, causal_context, **_):
        name = causal_context[FOLDER]
        return _written(_found().get(name, name))

    @classmethod
    def execute(cls, model, causal_context, clip=None):
        name = causal_context[FOLDER]
        folder = _found().get(name, name)
        context = Context({concept: causal_context[slider] for slider, concept in sliders(folder).items()})
        return io.NodeOutput(*apply_contexts(model, clip, folder, [context]))


class CausalContextText(io.ComfyNode):
    """Any adapter, and contexts as text: one, or a line for each image of the batch."""

    @classmethod
    def define_schema(cls):
        adapter = "A folder, or the id of a repository on the Hub, such as user/name."
        contexts = "Such as thick=0.5+slant. Several lines: one for each image of the batch."
        return io.Schema(
            node_id="CausalContextText",
            display_name="Causal Context (text)",
            category="model/loaders",
            description="A causal context adapter from a folder or the Hub, and the contexts to use it in.",
            inputs=[
                *_models(),
                io.String.Input("adapter", tooltip=adapter),
                io.String.Input("contexts", multiline=True, tooltip=contexts),
            ],
            outputs=_outputs(),
        )

    @classmethod
    def fingerprint_inputs(cls, adapter, **_):
        return _written(adapter)

    @classmethod
    def execute(cls, model, adapter, contexts, clip=None):
        lines = contexts.rstrip("\n").split("\n")
        return io.NodeOutput(*apply_contexts(model, clip, adapter, [Context.parse(line) for line in lines]))


class CausalContextExtension(ComfyExtension):
    """What ComfyUI asks for."""

    async def get_node_list(self):
        return [CausalContextSliders, CausalContextText]


def _models():
    return [io.Model.Input("model"), io.Clip.Input("clip", optional=True)]


def _outputs():
    return [io.Model.Output(), io.Clip.Output()]


def _widgets(folder):
    return [
        io.Float.Input(
            slider,
            display_name=concept,
            default=float(concept == OBSERVATIONAL),
            min=-2,
            max=2,
            step=0.05,
            display_mode=io.NumberDisplay.slider,
        )
        for slider, concept in sliders(folder).items()
    ]


def _found():
    return adapters_at_hand(folder_paths.get_folder_paths(FOLDER))


def _written(folder):
    """When a folder's adapter was written: ComfyUI runs a node again when this changes."""
    weights = Path(folder, "adapter_model.safetensors")
    return weights.stat().st_mtime_ns if weights.is_file() else None
