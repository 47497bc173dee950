"""The published shapes of bases, by the names that settings files have."""

from __future__ import annotations

from functools import partial

from .image_shapes import IMAGES
from .parts import LanguageShape, llama_3_8b, smollm2
from .video_shapes import VIDEOS

SHAPES = IMAGES | VIDEOS
LANGUAGE = {
    "smollm2-1.7b": LanguageShape("SmolLM2 1.7B", "HuggingFaceTB/SmolLM2-1.7B", smollm2),
    "llama31-8b": LanguageShape("Llama 3.1 8B", "meta-llama/Llama-3.1-8B", partial(llama_3_8b, causal=True)),
}
