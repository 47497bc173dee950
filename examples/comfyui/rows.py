"""A context for each image of a batch: all share the weights, so each LoRA is added to its rows; needs no ComfyUI."""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from hf_causal_context.errors import UserValueError


@dataclass
class LoraPerImage:
    """Wraps the call of a denoiser (`WrappersMP.APPLY_MODEL`).

    Attributes:
        loras: of each adapted module, where it lies in the model, and (lora_A, lora_B) of each image.
    """

    loras: list

    def __call__(self, executor, x, t, c_concat, c_crossattn, control, transformer_options, **kwargs):
        # With prompt and without it, copies of the batch lie behind each other.
        copies = len(transformer_options["cond_or_uncond"])
        asked = len(self.loras[0][1])
        if len(x) != copies * asked:
            raise UserValueError(
                f"{asked} contexts were given for a batch of {len(x) // copies} images. Write one context for all, or "
                "one line for each."
            )
        self.loras = [(target, [(a.to(x.device), b.to(x.device)) for a, b in images]) for target, images in self.loras]
        handles = []
        try:
            for target, images in self.loras:
                module = executor.class_obj.get_submodule(target.weight.removesuffix(".weight"))
                handles.append(module.register_forward_hook(_adding(target, images, copies)))
            return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)
        finally:
            for handle in handles:
                handle.remove()


def _adding(target, images, copies):
    if target.function is not None:
        images = [(a, target.function(b)) for a, b in images]

    def hook(module, args, output):
        x = args[0]
        if len(x) % (copies * len(images)):
            raise UserValueError(
                f"{target.weight} sees {len(x)} rows for {len(images)} images, which cannot be told apart. Give one "
                "context for all."
            )
        output = output.clone()
        channels = -1 if len(target.shape) == 2 else 1
        part = output if target.offset is None else output.narrow(channels, *target.offset[1:])
        rows = torch.arange(len(x), device=x.device).view(copies, len(images), -1)
        for image, (a, b) in enumerate(images):
            own = rows[:, image].flatten()
            change = _change(module, x[own].to(a.dtype), a.view(len(a), *target.shape[1:]), b)
            part[own] += change.to(output.dtype)
        return output

    return hook


def _change(module, x, a, b):
    if a.ndim == 2:
        return F.linear(F.linear(x, a), b)
    convolve = getattr(F, f"conv{a.ndim - 2}d")
    down = convolve(x, a, None, module.stride, module.padding, module.dilation)
    return convolve(down, b.view(*b.shape, *[1] * (a.ndim - 2)))
