"""The parts of a model that is trained: the adapted networks of a pipeline, or one."""

from __future__ import annotations

from peft import PeftModel
from torch import nn


def adapted_models(model: nn.Module) -> dict[str, PeftModel]:
    """Return the adapted networks in a model by where their adapters are stored in its folder; none of a whole model.

    At the top, "", is the model itself, or what it calls its denoiser.
    """
    if isinstance(model, PeftModel):
        return {"": model}
    children = {name: child for name, child in model.named_children() if isinstance(child, PeftModel)}
    return {"" if name == "denoiser" else name: child for name, child in children.items()}
