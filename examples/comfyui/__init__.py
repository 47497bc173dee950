"""Nodes for ComfyUI: concepts of a causal context adapter as sliders. Copy or link this folder into custom_nodes."""


async def comfy_entrypoint():
    from .nodes import CausalContextExtension  # needs ComfyUI

    return CausalContextExtension()
