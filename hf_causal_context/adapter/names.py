"""Which names adapters may have: they become parts of the names of weights, and names of folders."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from ..errors import UserValueError
from ..messages.wording import short_repr
from .peft_type import PREFIX

_NO_PART_OF_THE_BASE = (PREFIX, ".modules_to_save.")


def check_adapter_name(name: str, model: nn.Module | None = None) -> None:
    """Refuse a name under which weights could not be stored, or not be told from those of the model.

    Raises:
        ValueError: for such a name.
    """
    if reason := _reason(name, model):
        raise UserValueError(
            f"An adapter cannot be called {short_repr(name)}: {reason}. Give another adapter_name, such as "
            "'my_adapter'."
        )


def _reason(name: str, model: nn.Module | None) -> str | None:
    if not name or "." in name or Path(name).name != name:
        return "it becomes a part of the names of weights, which dots divide, and the name of a folder"
    if hasattr(nn.ModuleDict(), name):
        return "torch's modules have an attribute of that name"
    if name in PREFIX:
        return f"PEFT could not tell it from {PREFIX!r}, with which the names of the adapter's weights begin"
    weights = model.named_parameters() if model is not None else ()
    own = (key for key, _ in weights if not any(part in key for part in _NO_PART_OF_THE_BASE))
    if taken := next((key for key in own if name in key.split(".")), None):
        return f"PEFT could not tell it from a module of the base, which has the weight {taken!r}"
    return None
