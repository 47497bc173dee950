"""Two concepts on a frozen diffusers UNet: train on single interventions, run the combination nobody trained.

    python -m examples.first_adapter

The UNet has random weights and the concepts are simple changes of its output, so that the truth of every combination is
known and the example runs in seconds on a CPU.
"""

import tempfile

import torch
from diffusers import UNet2DModel
from peft import PeftModel, get_peft_model

from hf_causal_context import CausalContextConfig, causal_effects, intervene, save_baked

CONCEPTS = ("bright", "striped")
STRIPES = torch.sin(torch.arange(16) * torch.pi / 2).expand(1, 16, 16)


def build_base() -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=16,
        in_channels=1,
        out_channels=1,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).requires_grad_(False)


def truth(base: UNet2DModel, x: torch.Tensor, context: tuple[str, ...]) -> torch.Tensor:
    return base(x, 0).sample + 0.5 * ("bright" in context) + 0.5 * STRIPES * ("striped" in context)


def main() -> None:
    base = build_base()
    config = CausalContextConfig(concepts=CONCEPTS, target_modules=["conv1", "conv2", "conv_out", "to_q", "to_v"])
    model = get_peft_model(build_base(), config).train()
    model.print_trainable_parameters()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=5e-3)
    contexts = [(), ("bright",), ("striped",)] * 4  # every batch mixes the observational context and the single ones
    for step in range(151):
        x = torch.randn(len(contexts), 1, 16, 16)
        target = torch.cat([truth(base, row[None], context) for row, context in zip(x, contexts, strict=True)])
        with intervene(model, contexts):
            loss = (model(x, 0).sample - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step}: loss {loss.item():.4f}")

    model.eval()
    x = torch.randn(64, 1, 16, 16)
    with torch.no_grad():
        print("\nmean squared error         adapter    base")
        for context in [(), ("bright",), ("striped",), ("bright", "striped")]:
            target = truth(base, x, context)
            errors = [
                (output - target).square().mean() for output in (model(x, 0, context=context).sample, base(x, 0).sample)
            ]
            unseen = "  (never trained)" if len(context) == 2 else ""
            print(f"{'+'.join(context) or 'observational':24} {errors[0]:9.4f} {errors[1]:9.4f}{unseen}")
        print("\neffects under do(column):\n", causal_effects(model).mean()[1])

        with tempfile.TemporaryDirectory() as folder:
            expected = model(x, 0, context="bright+striped").sample
            model.save_pretrained(f"{folder}/adapter")
            loaded = PeftModel.from_pretrained(build_base(), f"{folder}/adapter")
            print("reloaded adapter identical:", torch.equal(loaded(x, 0, context="bright+striped").sample, expected))
            save_baked(model, "bright+striped", f"{folder}/lora")
            lora = PeftModel.from_pretrained(build_base(), f"{folder}/lora")
            print(f"baked as a plain LoRA: largest difference {(lora(x, 0).sample - expected).abs().max():.1e}")


if __name__ == "__main__":
    main()
