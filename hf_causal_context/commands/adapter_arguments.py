"""The options that commands on a trained adapter share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..bases.quantization import QUANTIZATIONS
from ..contexts import Context
from ..data.arguments import argument

if TYPE_CHECKING:
    from ..inference.adapted import StoredAdapter
    from ..inference.sampling import SamplingOptions

ADAPTER = "Folder or Hub id of the adapter; may stand first, without --adapter."
CALIBRATED = "Strengths are positions of the dials that evaluate --calibrate made: equal steps are equal changes."
DTYPES = ["float32", "float16", "bfloat16"]


@dataclass(kw_only=True)
class BaseWeights:
    """How the base's weights are held."""

    dtype: str = argument("float32", "Of the base, and of files: " + ", ".join(DTYPES) + ".", choices=DTYPES)
    quantization: str | None = argument(
        None, "Of the base's weights: " + ", ".join(QUANTIZATIONS) + ".", choices=[*QUANTIZATIONS]
    )
    gguf_file: str | None = argument(
        None, "File with the base's weights instead of its own: a path, or user/repository/file.gguf on the Hub."
    )

    @property
    def weights(self) -> dict[str, Any]:
        """The same as arguments of `StoredAdapter`'s methods."""
        return {"dtype": self.dtype, "quantization": self.quantization, "gguf_file": self.gguf_file}


@dataclass(kw_only=True)
class AdapterSource(BaseWeights):
    """Which adapter, on which base."""

    adapter: str = field(metadata={"help": ADAPTER})
    pretrained_model_name_or_path: str | None = argument(None, "Its base; by default the one it names.")
    revision: str | None = argument(None, "Revision of the base on the Hub.")

    def open(self) -> StoredAdapter:
        """Return the adapter with its config; see `StoredAdapter.open` for what it raises."""
        from ..inference.adapted import StoredAdapter

        return StoredAdapter.open(self.adapter, self.pretrained_model_name_or_path, revision=self.revision)


@dataclass(kw_only=True)
class RevisionArguments(AdapterSource):
    """An adapter of a certain revision."""

    adapter_revision: str | None = argument(None, "Branch, tag or commit of the adapter on the Hub.")

    def open(self) -> StoredAdapter:
        """Return the adapter with its config; see `StoredAdapter.open` for what it raises."""
        from ..inference.adapted import StoredAdapter

        name, revision = self.pretrained_model_name_or_path, self.revision
        return StoredAdapter.open(self.adapter, name, revision=revision, adapter_revision=self.adapter_revision)


@dataclass(kw_only=True)
class ContextArguments:
    """In which contexts."""

    contexts: list[str] = field(
        metadata={"help": 'Such as obs a a+b "a=0.5,b=-1".', "aliases": ["--context"]},
    )
    observational_name: str = argument("obs", "What the empty context is called.")
    calibrated: bool = argument(False, CALIBRATED)

    def parsed(self) -> list[Context]:
        """Return the contexts."""
        return parse_contexts(self.contexts, self.observational_name)


@dataclass(kw_only=True)
class ImageArguments:
    """How images are sampled."""

    prompt: str | None = argument(None, "For bases that take text.")
    class_label: int | None = argument(None, "For class-conditional bases.")
    num_inference_steps: int = argument(25, "Denoising steps.")
    guidance_scale: float | None = argument(None, "By default the pipeline's.")
    resolution: int | None = argument(None, "Side of the images in pixels; by default the base's.")
    num_frames: int | None = argument(None, "Frames of a clip, for bases of videos; by default the base's.")
    batch_size: int = argument(8, "Images per call of the pipeline.")

    def options(self) -> SamplingOptions:
        """These settings, as `generate` takes them."""
        from ..inference.sampling import SamplingOptions

        return {name: getattr(self, name) for name in SamplingOptions.__annotations__}  # type: ignore[return-value]


def parse_contexts(names: Sequence[str], observational_name: str) -> list[Context]:
    """Contexts by their names."""
    return [Context() if name == observational_name else Context.parse(name) for name in names]
