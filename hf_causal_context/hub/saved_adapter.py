"""A pipeline that was loaded as an adapter is saved and pushed as one, without its base."""

from __future__ import annotations

import inspect
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, cast

from huggingface_hub import HfApi, ModelCard, ModelCardData

from .._files import CARD, complete_files
from ..adapter.followed_pipeline import Followed
from ..adapter.saving import write_adapter_of
from ..bases.names import is_packaged
from ..errors import UserTypeError, UserValueError
from ..inference.pipelines import component_at_top, context_adapters, part_files, remove_other_parts
from ..messages.wording import quoted
from .card_code import python_literal
from .repository import check_pushable, hub_errors

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_CARD = """
A causal context adapter with the concepts {concepts}:

```python
from hf_causal_context import CausalContextPipeline, intervene

pipe = CausalContextPipeline.from_pretrained({repo})
with intervene(pipe, {concept}):
    ...
```
"""


class SavedAsAdapter(Followed):
    """What a pipeline of `CausalContextPipeline.from_pretrained` has in front of its own class."""

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        *,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **options: Any,
    ) -> None:
        """Write the adapter, and not the base: what `CausalContextPipeline.from_pretrained` reads.

        `DiffusionPipeline.save_pretrained(pipe, folder)` writes the base, and the adapter beside it.

        Args:
            save_directory: the folder, which may hold other files.
            safe_serialization: as of diffusers; adapters are written as safetensors, so it is True.
            push_to_hub: upload it as well.
            repo_id: where to; by default the folder's name.
            options: of `push_to_hub`.

        Raises:
            TypeError: for an option that `push_to_hub` does not have, such as those of a whole pipeline's files.
            ValueError: with several adapters or none, for other files than safetensors, or a folder that holds a whole
                pipeline; what `push_to_hub` raises.
        """
        if unknown := sorted(options.keys() - inspect.signature(self.push_to_hub).parameters.keys()):
            raise UserTypeError(
                f"The adapter is saved, and not the base, so {', '.join(unknown)} would have no effect. Leave it out, "
                "or save the base: DiffusionPipeline.save_pretrained(pipe, folder, ...)."
            )
        if not safe_serialization:
            raise UserValueError("safe_serialization=False: adapters are written as safetensors only. Leave it out.")
        name, owners = self._adapter()
        folder = Path(save_directory)
        if (folder / "model_index.json").exists():
            raise UserValueError(
                f"{folder} holds a whole pipeline, and an adapter would overwrite parts of it. Choose another folder."
            )
        top = component_at_top(owners)
        with complete_files(folder) as unfinished:
            for component, model in owners.items():
                inside = unfinished if component == top else unfinished / component
                write_adapter_of(model, name, inside)
        remove_other_parts(folder, owners.keys() - {top})
        if push_to_hub:
            self.push_to_hub(repo_id or folder.resolve().name, **options)

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str = "Upload a causal context adapter",
        private: bool | None = None,
        token: str | bool | None = None,
        create_pr: bool = False,
    ) -> str:
        """Upload the adapter, and not the base, and return the commit's address.

        A repository without a card gets a short one; `hf_causal_context.hub.push` makes a card with samples.

        Args:
            repo_id: user/name; made if it does not exist.
            commit_message: its first line.
            private: whether a repository that is made now is.
            token: as in huggingface_hub.
            create_pr: whether to open a pull request instead of writing to the branch.

        Raises:
            ValueError: with several adapters or none, for a base that others cannot load, or no repository's name.
            OSError: without the right to write, or when the Hub cannot be reached.
        """
        name, owners = self._adapter()
        config: Any = cast(Any, next(iter(owners.values()))).peft_config[name]
        base = config.base_model_name_or_path
        check_pushable(repo_id, base, token)
        with TemporaryDirectory() as folder, hub_errors(repo_id):
            self.save_pretrained(folder)
            api = HfApi(token=token)
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if not api.file_exists(repo_id, CARD):
                data = ModelCardData(
                    library_name="peft",
                    base_model=None if is_packaged(base) else base,
                    tags=["causal-context", "hf_causal_context", "diffusers"],
                )
                text = _CARD.format(
                    concepts=", ".join(config.concepts),
                    repo=python_literal(repo_id),
                    concept=python_literal(config.concepts[0]),
                )
                ModelCard(f"---\n{data.to_yaml()}\n---\n{text}").save(Path(folder, CARD))
            return api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=commit_message,
                create_pr=create_pr,
                delete_patterns=part_files(),  # those that are not in the folder
            ).commit_url

    def _adapter(self) -> tuple[str, dict[str, Any]]:
        """Name of the one adapter, and the components that have it."""
        adapters = context_adapters(cast("DiffusionPipeline", self))
        if not adapters:  # diffusers' delete_adapters and unload_lora_weights leave the pipeline's class as it is
            raise UserValueError(
                "The pipeline has no causal context adapter any more, so there is none to save. Load one with "
                "load_context_adapter(pipe, folder_or_repository), or save the base: "
                "DiffusionPipeline.save_pretrained(pipe, folder)."
            )
        if len(adapters) > 1:
            raise UserValueError(
                f"The pipeline has several adapters ({quoted(adapters)}), and a folder holds one. Unload the others "
                "with unload_context_adapter(pipe, name), or save the base and all of them: "
                "DiffusionPipeline.save_pretrained(pipe, folder)."
            )
        return next(iter(adapters.items()))
