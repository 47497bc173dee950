"""The settings of `hf-causal-context evaluate`."""

from __future__ import annotations

from dataclasses import dataclass, fields

from ..training.arguments import _argument
from ..training.load_data import AnyDataArguments

_DTYPES = ["float32", "float16", "bfloat16"]


@dataclass
class EvaluationArguments(AnyDataArguments):
    """Settings of one evaluation; those of the data are the training's.

    Raises:
        ValueError: for a number out of range, or without an adapter or output folder.
    """

    adapter: str = _argument("", "Required. Folder or Hub id of the adapter.")
    output_dir: str = _argument("", "Required. Folder for the report.")
    pretrained_model_name_or_path: str | None = _argument(None, "Its base; by default the one it names.")
    revision: str | None = _argument(None, "Revision of the base on the Hub.")
    variant: str | None = _argument(None, "Variant of the base's files, such as fp16.")
    dtype: str = _argument("float32", "Of the base: float32, float16 or bfloat16.", choices=_DTYPES)

    contexts: list[str] | None = _argument(
        None, "Combinations to evaluate; by default all that the data holds. obs and single concepts always are."
    )
    num_samples: int | None = _argument(None, "Samples per context and seed group: 256 pictures, or 64 texts.")
    num_seeds: int = _argument(3, "Seed groups; two or more give confidence intervals.")
    num_inference_steps: int = _argument(25, "Denoising steps.")
    prompt: str | None = _argument(None, "For bases that take text; texts follow those of their rows by default.")
    max_new_tokens: int | None = _argument(None, "Length of sample texts; by default that of the real ones.")
    class_label: int | None = _argument(None, "For class-conditional bases.")
    guidance_scale: float | None = _argument(None, "By default the pipeline's.")
    resolution: int | None = _argument(None, "Side of the pictures in pixels; by default the base's.")
    batch_size: int | None = _argument(None, "Samples at once: 8 pictures, or 32 texts.")
    feature_extractor: str | None = _argument(
        None, "For FID and KID: a transformers vision model, such as facebook/dinov2-small."
    )
    seed: int = _argument(0, "Of the classifiers and of the splits of the real rows.")

    def __post_init__(self) -> None:
        if missing := ", ".join(f"--{name}" for name in ("adapter", "output_dir") if not getattr(self, name)):
            raise ValueError(f"Missing: {missing}. Give the adapter and the folder for the report.")
        for name, minimum in _MINIMA.items():
            value = getattr(self, name)
            if value is not None and not value >= minimum:
                raise ValueError(f"--{name}={value} must be at least {minimum}.")

    def refuse_useless(self, language: bool) -> None:
        """Refuse settings that an adapter of this kind does not have.

        Raises:
            ValueError: naming them.
        """
        default = {field.name: field.default for field in fields(self)}
        names = _PICTURES_ONLY if language else _TEXTS_ONLY
        if useless := [f"--{name}" for name in names if getattr(self, name) != default[name]]:
            raise ValueError(
                f"{self.adapter} is an adapter of a {'language model' if language else 'diffusers pipeline'}, so "
                f"{', '.join(useless)} would have no effect. Leave it out."
            )


_MINIMA = {
    "num_samples": 2,
    "num_seeds": 1,
    "num_inference_steps": 1,
    "max_new_tokens": 1,
    "batch_size": 1,
    "resolution": 1,
    "seed": 0,
}
_PICTURES_ONLY = (
    *("image_column", "caption_column", "class_column", "variant", "num_inference_steps", "class_label"),
    *("guidance_scale", "resolution", "feature_extractor"),
)
_TEXTS_ONLY = ("text_column", "max_new_tokens")
