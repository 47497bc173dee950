"""Tells the hooks with how many prompts `generate` of transformers was called.

It repeats every prompt in place (beams, returned sequences), and nothing in the model's inputs tells how often. That of
Whisper leaves out those that are done with a window of sound, and nothing tells which.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from ..errors import UserValueError
from .conditioning.hooks import Conditioning
from .conditioning.in_force import during_call, innermost_request
from .conditioning.media import has_ragged_media
from .conditioning.rows import Call, check_inputs
from .lookup import known_conditionings
from .wrapped_methods import WrappedMethod


class AnnouncedGenerate(WrappedMethod):
    """`generate` of a model with adapters, or of one that holds such a model."""

    name = "generate"

    @classmethod
    def put_on(cls, model: nn.Module) -> None:
        """Replace `generate` of a model of transformers; others may mean something else by that name."""
        if hasattr(model, "main_input_name"):
            super().put_on(model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        prompts = _prompts(self.model, args, kwargs)
        inputs = {"input_ids": next(iter(args), kwargs.get("inputs")), **kwargs}
        ragged = has_ragged_media(self.model, inputs, prompts)
        call = Call(prompts, None, _repeats(self.model, args, kwargs), ragged)
        owners = known_conditionings(self.model)
        with during_call(owners, call):
            if _is_mixed(owners):
                check_inputs(prompts)
            return self.original(*args, **kwargs)


class WholeBatches(WrappedMethod):
    """What writes down one window of each sound of a batch with Whisper, again where it turned out badly."""

    name = "generate_with_fallback"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(self.original).bind(*args, **kwargs).arguments
        whole = given["is_shortform"] and len(given["temperatures"]) == 1
        if not whole and _is_mixed(known_conditionings(self.model)):
            raise UserValueError(
                "Whisper goes on with some of the sounds of a batch alone, where they are longer than its window or "
                "several temperatures are tried, and does not tell with which. So they cannot have different contexts. "
                "Pass one context, and call generate() once for each; or pass sounds of one window and one temperature."
            )
        return self.original(*args, **kwargs)


def _is_mixed(owners: list[Conditioning]) -> bool:
    return any(request.is_mixed for owner in owners if (request := innermost_request(owner)) is not None)


def _prompts(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """How many rows `generate` begins with, from the argument that transformers takes them from."""
    names = ("inputs", model.main_input_name, "input_ids", "inputs_embeds")
    given = [*args[:1], *(kwargs.get(name) for name in names), *(kwargs.get("encoder_outputs") or ())[:1]]
    rows = next((value for value in (*given, *kwargs.values()) if isinstance(value, Tensor) and value.ndim), None)
    return 1 if rows is None else rows.shape[0]


def _repeats(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """How often `generate` repeats every prompt, by its arguments, else the first configuration that says it."""
    configs = (*args[1:2], kwargs.get("generation_config"), getattr(model, "generation_config", None))

    def setting(name: str) -> int:
        return kwargs.get(name) or next((n for config in configs if (n := getattr(config, name, None))), 1)

    return max(setting("num_beams"), setting("num_return_sequences"))
