"""Which weights of a ComfyUI model are those of the modules of diffusers that an adapter adapts; needs no ComfyUI."""

import math
import re
from typing import NamedTuple

from hf_causal_context.errors import UserValueError

# ComfyUI has no table for Wan, whose modules it calls otherwise: diffusers' names -> ComfyUI's.
_WAN = {
    r"\battn1\b": "self_attn",
    r"\battn2\b": "cross_attn",
    r"\bto_([qkv])$": r"\1",
    r"\bto_out\.0$": "o",
    r"\badd_([kv])_proj$": r"\1_img",
    r"\bffn\.net\.0\.proj$": "ffn.0",
    r"\bffn\.net\.2$": "ffn.2",
    r"^condition_embedder\.time_embedder\.linear_1$": "time_embedding.0",
    r"^condition_embedder\.time_embedder\.linear_2$": "time_embedding.2",
    r"^condition_embedder\.time_proj$": "time_projection.1",
    r"^condition_embedder\.text_embedder\.linear_1$": "text_embedding.0",
    r"^condition_embedder\.text_embedder\.linear_2$": "text_embedding.2",
    r"^condition_embedder\.image_embedder\.ff\.net\.0\.proj$": "img_emb.proj.1",
    r"^condition_embedder\.image_embedder\.ff\.net\.2$": "img_emb.proj.3",
    r"^proj_out$": "head.head",
}
_SHOWN = 3


class Target(NamedTuple):
    """A weight, or some rows of one: fused weights hold those of several modules of diffusers.

    Attributes:
        weight: its name in the model.
        shape: of the weight, or of those rows.
        offset: (0, first row, number of rows), None for the whole weight.
        function: what ComfyUI does to the change of the weight, such as to exchange its halves; None for nothing.
    """

    weight: str
    shape: tuple
    offset: tuple | None = None
    function: object = None


def known_targets(keys, weights):
    """Return what the keys of a LoRA stand for in a model, without those that it lacks.

    Args:
        keys: of `comfy.lora.model_lora_keys_unet` or `model_lora_keys_clip`: key -> a weight's name, or (name, offset)
            or (name, offset, function).
        weights: the model's.
    """
    targets = {}
    for key, place in keys.items():
        name, *rest = place if isinstance(place, tuple) else (place,)
        if name in weights:
            target = Target(name, tuple(weights[name].shape), *rest)
            if target.offset is not None:
                target = target._replace(shape=(target.offset[2], *target.shape[1:]))
            targets[key] = target
    return targets


def find_keys(loras, known, source, model):
    """Return the key of each module that an adapter adapts, (component, path) -> key.

    Args:
        loras: as of `loras_without_base`.
        known: as of `known_targets`.
        source: what to call the adapter in messages.
        model: what to call the model.

    Raises:
        ValueError: if the model lacks one, or has it in another size: it is of another family than the adapter's base.
    """
    keys, lacking = {}, []
    for component, part in loras.items():
        for path, (a, b) in part.items():
            key = keys[component, path] = find_key(component, path, known)
            if key is None or (len(b), a[0].numel()) != (known[key].shape[0], math.prod(known[key].shape[1:])):
                lacking.append(f"{component}.{path}".lstrip("."))
    if lacking:
        more = f" and {len(lacking) - _SHOWN:,} more" if len(lacking) > _SHOWN else ""
        raise UserValueError(
            f"{source} does not fit {model}, which lacks {len(lacking):,} of the {len(keys):,} modules that it adapts, "
            f"or has them in another size: {', '.join(lacking[:_SHOWN])}{more}. Connect the model that it was trained "
            "for."
        )
    return keys


def find_key(component, path, known):
    """Return the key of a module, None if the model lacks it; `component` is "" for the denoiser."""
    if not component:
        wan = path
        for name, own in _WAN.items():
            wan = re.sub(name, own, wan)
        names = [f"transformer.{path}", f"lora_unet_{path.replace('.', '_')}", f"diffusion_model.{wan}"]
    else:
        # The names of CLIP in files are those of older versions of transformers, which nest the encoder once more.
        names = [f"{component}.{path}", f"{component}.text_model.{path}"]
        ends = re.compile(rf"text_encoders\.(?!clip_)\w+\.transformer\.{re.escape(path)}")
        others = [key for key in known if ends.fullmatch(key)]
        names += others if len(others) == 1 else []
    return next((name for name in names if name in known), None)
