"""A stored adapter and its base: opened once, then attached to a pipeline or a language model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft import PeftModel
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from .._files import CONFIG, checkpoint_steps
from ..adapter.baking import context_strengths
from ..adapter.compatibility import check_fits
from ..adapter.config import CausalContextConfig
from ..adapter.storage.download import download
from ..adapter.storage.files import read_header, read_weights
from ..adapter.storage.layout import AdapterError
from ..bases.language import load_language_model, load_tokenizer
from ..bases.names import is_packaged
from ..bases.tokens import prepare_tokenizer
from ..contexts import Context
from ..errors import UserValueError
from ..messages.wording import short_repr
from .pipelines import adapter_places, attach, unfinished

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from ..bases.diffusion_base import DiffusionBase

_GIVE_BASE = (
    "Give --pretrained_model_name_or_path. In Python, load the base yourself and put the adapter on it: "
    "load_context_adapter(pipe, adapter), or PeftModel.from_pretrained(model, adapter)."
)
_LANGUAGE_TASKS = ("CAUSAL_LM", "SEQ_2_SEQ_LM")


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter in a folder or on the Hub, downloaded once, and its config read once; made by `open`.

    Attributes:
        source: the folder or id that was given, for messages.
        folder: where its files are on this machine.
        config: its config.
        given_base: a base that was named instead of the one that the config names.
        given_revision: of the base.
        adapter_revision: of the adapter's repository.
        token: for private repositories, the adapter's and the base's.
        place: the folder or repository, and the sub-folder in it.
    """

    source: str
    folder: Path
    config: CausalContextConfig
    given_base: str | None
    given_revision: str | None
    adapter_revision: str | None
    token: str | bool | None
    place: tuple[str, str | None] = ("", None)

    @classmethod
    def open(
        cls,
        adapter: str | Path,
        base: str | None = None,
        *,
        revision: str | None = None,
        adapter_revision: str | None = None,
        token: str | bool | None = None,
        subfolder: str | None = None,
        cache: Mapping[str, Any] = MappingProxyType({}),
    ) -> StoredAdapter:
        """Find an adapter, download it if it is on the Hub, and read its config.

        Args:
            adapter: a folder, or the id of a repository on the Hub.
            base: a folder or id to use in place of the base that the adapter names.
            revision: of the base.
            adapter_revision: of the adapter's repository.
            token: for private repositories, the adapter's and the base's, as in huggingface_hub.
            subfolder: where in the folder or repository the adapter is.
            cache: further arguments of huggingface_hub's `snapshot_download`, such as `cache_dir`.

        Raises:
            AdapterError: for another kind of adapter, or a config that cannot be used.
            OSError: for something that holds no adapter, or cannot be reached.
        """
        folder = download(
            adapter,
            revision=adapter_revision,
            token=token,
            places=adapter_places(),
            tokenizer=True,
            subfolder=subfolder,
            cache=cache,
        )
        source = f"{adapter}/{subfolder}" if subfolder else str(adapter)
        if not (folder / CONFIG).exists():
            raise FileNotFoundError(f"{source} holds no adapter: there is no {CONFIG} in it. {_what_instead(folder)}")
        config = CausalContextConfig.read(folder, source)
        place = (str(adapter), subfolder)
        return cls(source, folder, config, base, revision, adapter_revision, token, place)

    @property
    def is_of_language_model(self) -> bool:
        """Whether it is an adapter of a model that writes texts, as the training of this package records it."""
        return self.config.task_type in _LANGUAGE_TASKS

    @cached_property
    def base(self) -> tuple[str, str | None]:
        """Folder or Hub id of the base and its revision: what was given, by default what the adapter names.

        Raises:
            ValueError: if neither is known.
            AdapterError: for an adapter from the Hub that names a folder.
            FileNotFoundError: for a folder that is not on this machine.
        """
        if self.given_base:
            return self.given_base, self.given_revision
        name = self.config.base_model_name_or_path
        if not name:
            raise UserValueError(f"{self.source} does not name its base. {_GIVE_BASE}")
        if not Path(self.source).is_dir() and not is_packaged(name):
            self._check_repository(name)
        if Path(name).is_absolute() and not Path(name).exists():
            raise FileNotFoundError(f"{self.source} was trained on the base {name}, which is not here. {_GIVE_BASE}")
        return name, self.given_revision or self.config.revision

    def beside(self, name: str) -> dict[str, Any]:
        """Return what a file of JSON beside the adapter holds; nothing if there is none, or it holds something else."""
        path = self.folder / name
        try:
            if not path.exists() and not Path(self.source).is_dir():
                repository, subfolder = self.place
                found_at = {"revision": self.adapter_revision, "token": self.token}
                path = Path(hf_hub_download(repository, name, subfolder=subfolder, **found_at))
            found = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, EntryNotFoundError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def parts(self) -> dict[str, tuple[Path, CausalContextConfig, str]]:
        """Return the folder, the config and the name in messages of each adapter here, by component; "" is at the top.

        Raises:
            AdapterError: for a config that cannot be used.
        """
        parts = {}
        for place in adapter_places():
            folder = self.folder / place
            if (folder / CONFIG).is_file():
                source = f"{self.source} ({place})" if place else self.source
                parts[place.partition("/")[0]] = folder, CausalContextConfig.read(folder, source), source
        return parts

    def meant(self, contexts: Sequence[Context], calibrated: bool) -> list[Context]:
        """Return the contexts that are meant, whose strengths may be those of dials.

        Raises:
            ValueError: for calibrated strengths of concepts without a calibration.
        """
        return [self.config.calibrated(each) for each in contexts] if calibrated else list(contexts)

    def _check_repository(self, base: str) -> None:
        """Refuse folders of this machine (AdapterError): what an adapter from elsewhere names is on the Hub, too."""
        try:
            validate_repo_id(base)
        except HFValidationError:
            raise AdapterError(
                f"{self.source} comes from the Hub, and the base that it names, {short_repr(base)}, is no repository "
                f"there: it was trained on a folder of another machine. {_GIVE_BASE}"
            ) from None

    def pipeline(
        self,
        contexts: Sequence[Context] = (),
        *,
        variant: str | None = None,
        dtype: str = "float32",
        quantization: str | None = None,
        gguf_file: str | None = None,
    ) -> DiffusionBase:
        """Load the base, a diffusers pipeline, with the adapter attached, onto the GPU if there is one.

        Args:
            contexts: what it will be used in, to be checked before anything is loaded.
            variant: of the base's files, such as "fp16".
            dtype: of the base: "float32", "float16" or "bfloat16".
            quantization: of the base's weights: "int8", "fp8", "nf4" or "llm_int8".
            gguf_file: with the base's weights, instead of its own; see `find_gguf`.

        Raises:
            ValueError: for another kind of adapter or base, or contexts with concepts that the adapter lacks.
            OSError: for a base that cannot be read.
        """
        from ..bases.loading import load_base

        self._check_makes_images()
        name, revision = self.base
        context_strengths(self.config, contexts)
        weights: dict[str, Any] = {"dtype": getattr(torch, dtype), "quantization": quantization, "gguf_file": gguf_file}
        base = load_base(name, revision=revision, variant=variant, token=self.token, **weights)
        base.pipe.to(device())
        attach(base.pipe, self.folder, self.source)
        if self.config.component is not None:
            base.use_denoiser(self.config.component)
        return base

    def stock_pipeline(self, **options: Any) -> DiffusionPipeline:
        """Load any base as diffusers does, with options of its `from_pretrained`, and attach the adapter.

        Raises:
            ValueError: for another kind of adapter, or options that do not fit the base.
            OSError: for a base that cannot be read.
        """
        from ..bases.loading import load_pipeline

        self._check_makes_images()
        name, revision = self.base
        pipe = load_pipeline(name, revision=revision, token=self.token, **options)
        return attach(pipe, self.folder, self.source)

    def _check_makes_images(self) -> None:
        if self.is_of_language_model:
            raise UserValueError(
                f"{self.source} is an adapter of a language model, not of a diffusers pipeline. `hf-causal-context "
                "generate-text` writes texts with it; in Python, AutoCausalContextModel.from_pretrained loads it, and "
                "save_baked(model, context, folder) exports it."
            )

    def language_model(
        self,
        contexts: Sequence[Context] = (),
        *,
        dtype: str = "float32",
        quantization: str | None = None,
        gguf_file: str | None = None,
    ) -> tuple[PeftModel, PreTrainedTokenizerBase]:
        """Load the base, a language model, with the adapter attached, onto the GPU if there is one.

        The tokenizer is the adapter's, if it comes with one, else the base's.

        Args:
            contexts: what it will be used in, to be checked before anything is loaded.
            dtype: of the base: "float32", "float16" or "bfloat16".
            quantization: of the base's weights: "int8", "fp8", "nf4" or "llm_int8".
            gguf_file: with the base's weights, instead of its own; see `find_gguf`.

        Raises:
            ValueError: for another kind of adapter or base, or contexts with concepts that the adapter lacks.
            OSError: for a base that cannot be read.
        """
        self._check_writes_texts()
        context_strengths(self.config, contexts)
        weights: dict[str, Any] = {"quantization": quantization, "gguf_file": gguf_file}
        model = self.stock_language_model(dtype=getattr(torch, dtype), **weights)
        tokenizer = self._tokenizer(*self.base)
        prepare_tokenizer(tokenizer, model, None)  # one that came with the adapter may have more tokens
        return model.to(device()).eval(), tokenizer

    def stock_language_model(
        self,
        *,
        dtype: torch.dtype | str | None = None,
        adapter_name: str = "default",
        is_trainable: bool = False,
        **options: Any,
    ) -> PeftModel:
        """Load the base as transformers does, with options of its `from_pretrained`, and attach the adapter.

        Args:
            dtype: of the base; None for transformers' own choice.
            adapter_name: what to call the adapter.
            is_trainable: whether to go on training it.
            options: further ones of `load_language_model`.

        Raises:
            ValueError: for another kind of adapter, or options that do not fit the base.
            OSError: for a base that cannot be read.
        """
        self._check_writes_texts()
        name, revision = self.base
        tensors = read_header(self.folder, self.config.layout(), self.source)
        model = load_language_model(name, revision, dtype, token=self.token, **options)
        check_fits(model, self.config, tensors, self.source)
        read_weights(self.folder, self.source)  # refuses values that PEFT would load
        return PeftModel.from_pretrained(model, str(self.folder), adapter_name, is_trainable, config=self.config)

    def _check_writes_texts(self) -> None:
        library = (self.config.auto_mapping or {}).get("parent_library") or ""
        if library.startswith("diffusers"):
            raise UserValueError(
                f"{self.source} is an adapter of a diffusion model. `hf-causal-context generate` makes images with it; "
                "in Python, CausalContextPipeline.from_pretrained loads it."
            )
        if self.config.task_type is not None and not self.is_of_language_model:
            raise UserValueError(f"{self.source} is an adapter for {self.config.task_type}, which writes no texts.")

    def _tokenizer(self, base: str, revision: str | None) -> PreTrainedTokenizerBase:
        if not (self.folder / "tokenizer_config.json").is_file():
            return load_tokenizer(base, revision, self.token)
        load: Any = AutoTokenizer.from_pretrained
        try:
            tokenizer = cast(PreTrainedTokenizerBase, load(str(self.folder), trust_remote_code=False))
        except Exception as error:  # its files may hold anything, and transformers raises anything
            raise AdapterError(
                f"The tokenizer of {self.source} cannot be read ({type(error).__name__}: {error}). Take "
                "tokenizer*.json out of its folder to use the tokenizer of its base."
            ) from error
        try:
            of_base = load_tokenizer(base, revision, self.token)
        except (OSError, UserValueError):  # it has none
            return tokenizer
        self._check_tokenizer(tokenizer, of_base, base)
        return tokenizer

    def _check_tokenizer(self, own: PreTrainedTokenizerBase, of_base: PreTrainedTokenizerBase, base: str) -> None:
        """Refuse an adapter's tokenizer that means other tokens by the ids of its base; it may have more of them."""
        ids, ids_of_base = own.get_vocab(), of_base.get_vocab()
        if moved := [token for token, number in ids_of_base.items() if ids.get(token) != number]:
            token = min(moved, key=ids_of_base.__getitem__)
            raise AdapterError(
                f"The tokenizer of {self.source} is not that of its base {base}: {len(moved):,} of the base's "
                f"{len(ids_of_base):,} tokens have another id or none, such as {token!r} ({ids_of_base[token]} in the "
                f"base, {ids.get(token)} here). Give the base that the adapter was trained on "
                "(--pretrained_model_name_or_path)."
            )


def _what_instead(folder: Path) -> str:
    """Say what to do about a folder without an adapter, as far as what is there in its place tells."""
    for place in (folder, *reversed(checkpoint_steps(folder).values())):
        if _is_autoencoder(place):
            return (
                f"{place} is an autoencoder, as train-autoencoder makes them: in Python, hf_causal_context.models."
                f'ContextAutoencoder.from_pretrained("{place}") loads it, and sample(context) draws from it.'
            )
    return unfinished(folder) or "Give the folder that a training wrote, or the id of a repository."


def _is_autoencoder(folder: Path) -> bool:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("_class_name") == "ContextAutoencoder"


def device() -> str:
    """Return the name of the GPU if there is one, else of the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"
