"""What a training step takes on well-known bases: memory by part, and arithmetic, computed from shapes alone.

    python -m examples.benchmarks.costs [--bases "Stable Diffusion 1.5" ...]

Bases are built on PyTorch's meta device, which holds shapes and no numbers, so nothing is downloaded and no GPU is
needed. Base and activations are in bfloat16, the adapter (default layers, four concepts of rank 4, an observational
part of rank 4), its gradients and AdamW's two moments in float32, batches of one. Attention keeps what FlashAttention
keeps.
Of a denoiser, text encoders and autoencoder are left out: their outputs are computed ahead. A real step also needs what
is not kept for the backward pass (a few layers' outputs), and the libraries' own memory. "Checkpointed" is with
--gradient_checkpointing, which adds half of the arithmetic.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers.models import FluxTransformer2DModel, QwenImageTransformer2DModel, UNet2DConditionModel
from peft import get_peft_model
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from hf_causal_context import CausalContextConfig
from hf_causal_context.training.dry_run import readable, total_bytes

CONCEPTS = ("a", "b", "c", "d")
TOKENS = 1024  # of a text
META = torch.device("meta")


@dataclass(frozen=True)
class Base:
    """A base, and what it is called with at a batch of one."""

    build: Callable[[], Any]
    inputs: Callable[[], dict[str, Any]]
    size: str


def full(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, device=META, dtype=dtype)


def unet(side: int, **inputs: Callable[[], Any]) -> Callable[[], dict[str, Any]]:
    return lambda: {
        "sample": full(1, 4, side, side),
        "timestep": full(1),
        **{name: make() for name, make in inputs.items()},
    }


def llama(**settings: Any) -> Base:
    config = LlamaConfig(use_cache=False, **settings)

    def inputs() -> dict[str, Any]:
        # A mask of all pairs is taken as it is; else the model would read numbers to make one.
        return {"input_ids": full(1, TOKENS, dtype=torch.long), "attention_mask": full(1, 1, TOKENS, TOKENS)}

    return Base(lambda: LlamaForCausalLM(config), inputs, f"{TOKENS} tokens")


# Settings of the published models.
BASES = {
    "Stable Diffusion 1.5": Base(
        lambda: UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8),
        unet(64, encoder_hidden_states=lambda: full(1, 77, 768)),
        "512 pixels",
    ),
    "Stable Diffusion XL": Base(
        lambda: UNet2DConditionModel(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),  # type: ignore[arg-type]
            attention_head_dim=(5, 10, 20),  # type: ignore[arg-type]
            cross_attention_dim=2048,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
            use_linear_projection=True,
        ),
        unet(
            128,
            encoder_hidden_states=lambda: full(1, 77, 2048),
            added_cond_kwargs=lambda: {"text_embeds": full(1, 1280), "time_ids": full(1, 6)},
        ),
        "1024 pixels",
    ),
    "Flux.1 dev": Base(
        lambda: FluxTransformer2DModel(guidance_embeds=True),
        lambda: {
            "hidden_states": full(1, 4096, 64),
            "encoder_hidden_states": full(1, 512, 4096),
            "pooled_projections": full(1, 768),
            "timestep": full(1),
            "guidance": full(1),
            "img_ids": full(4096, 3),
            "txt_ids": full(512, 3),
        },
        "1024 pixels, 512 text tokens",
    ),
    "Qwen-Image": Base(
        lambda: QwenImageTransformer2DModel(),
        lambda: {
            "hidden_states": full(1, 4096, 64),
            "encoder_hidden_states": full(1, 256, 3584),
            "timestep": full(1),
            "img_shapes": [[(1, 64, 64)]],
        },
        "1024 pixels, 256 text tokens",
    ),
    "SmolLM2 1.7B": llama(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=24,
        num_attention_heads=32,
        num_key_value_heads=32,
        vocab_size=49152,
        tie_word_embeddings=True,
    ),
    "Llama 3.1 8B": llama(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
    ),
}


class Attention(torch.autograd.Function):
    """Attention as FlashAttention does it: keeps its inputs, its output and one number per query."""

    flops = 0

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float))
        ctx.flops = 4 * query.numel() * key.shape[-2]  # two products
        Attention.flops += ctx.flops
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        Attention.flops += int(2.5 * ctx.flops)  # five products, one of them again
        return tuple(map(torch.empty_like, ctx.saved_tensors[:3]))


@contextmanager
def flash_attention() -> Iterator[None]:
    """Within the body, attention is `Attention`."""
    stock = F.scaled_dot_product_attention

    def attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return cast(Tensor, Attention.apply(query, key, value))

    F.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = stock


class Kept:
    """The storages that autograd keeps in a forward pass: all, and by the innermost repeated block that made them."""

    def __init__(self, model: nn.Module, blocks: list[nn.Module]) -> None:
        self._own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        self._sizes: dict[int, tuple[int, int]] = {}  # address -> block, bytes
        self._storages: list[Any] = []  # so that no address comes twice
        self._inputs: dict[int, int] = {}
        self._block = -1
        for number, block in enumerate(blocks):
            block.register_forward_pre_hook(self._enter(number), with_kwargs=True)
            block.register_forward_hook(self._leave)

    def _enter(self, number: int) -> Callable[..., None]:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            self._block = number
            for tensor in (*args, *kwargs.values()):
                if isinstance(tensor, Tensor) and tensor.requires_grad:
                    storage = tensor.untyped_storage()
                    self._storages.append(storage)
                    self._inputs[storage._cdata] = storage.nbytes()

        return enter

    def _leave(self, *unused: Any) -> None:
        self._block = -1

    def note(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._own and storage._cdata not in self._sizes:
            self._storages.append(storage)
            self._sizes[storage._cdata] = self._block, storage.nbytes()
        return tensor

    @property
    def all(self) -> int:
        """Bytes that a step keeps."""
        return sum(size for _, size in self._sizes.values())

    @property
    def checkpointed(self) -> int:
        """Bytes that a step keeps if every block is computed again: their inputs, and what the largest one keeps."""
        by_block: dict[int, int] = {}
        for block, size in self._sizes.values():
            by_block[block] = by_block.get(block, 0) + size
        outside = by_block.pop(-1, 0)
        return outside + sum(self._inputs.values()) + max(by_block.values(), default=0)


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The innermost modules that their library keeps in one piece."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    blocks = [module for module in model.modules() if type(module).__name__ in names]
    return [block for block in blocks if not any(type(m).__name__ in names for m in list(block.modules())[1:])]


def costs(base: Base) -> dict[str, str]:
    """One row of the table."""
    with META:
        stock = base.build().to(torch.bfloat16)
    blocks = repeated_blocks(stock)
    frozen = total_bytes([*stock.parameters(), *stock.buffers()])
    config = CausalContextConfig(concepts=CONCEPTS, concept_rank=4, observational_rank=4)
    model = get_peft_model(stock, config).to(torch.bfloat16).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    number = sum(parameter.numel() for parameter in trained)
    kept = Kept(model, blocks)
    counter = FlopCounterMode(display=False)
    Attention.flops = 0
    with flash_attention(), counter:
        with torch.autograd.graph.saved_tensors_hooks(kept.note, lambda tensor: tensor):
            output = model(**base.inputs(), context=[("a",)])
        output[0].float().square().mean().backward()
    adapter = 4 * 4 * number  # weights, gradients and two moments
    return {
        "base": readable(frozen),
        "adapter": f"{number / 1e6:.1f} M",
        "it, its gradients and AdamW": readable(adapter),
        "kept": readable(kept.all),
        "step": readable(frozen + adapter + kept.all),
        "kept, checkpointed": readable(kept.checkpointed),
        "step, checkpointed": readable(frozen + adapter + kept.checkpointed),
        "TFLOP": f"{(counter.get_total_flops() + Attention.flops) / 1e12:.3g}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bases", nargs="+", choices=BASES, default=list(BASES))
    for number, name in enumerate(parser.parse_args().bases):
        row = {"base model": name, "one sample": BASES[name].size, **costs(BASES[name])}
        if not number:
            print("| " + " | ".join(row) + " |\n" + "|---" * len(row) + "|")
        print("| " + " | ".join(row.values()) + " |", flush=True)


if __name__ == "__main__":
    main()
