"""The quickstart's peer: one PEFT LoRA per concept on the same frozen base and data, stacked for the pairs.

    python -m examples.benchmarks.digit_peers --output hf_causal_context/models/digit_peers.json

Each LoRA has the rank of one concept of the adapter, and is trained on its own interventional set, with half as many
updates again as the adapter, and three times as many images of its context.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from diffusers.optimization import get_scheduler
from peft import LoraConfig, get_peft_model
from tqdm import tqdm

from hf_causal_context.bases.loading import load_base
from hf_causal_context.data.worlds.digits import CONCEPTS
from hf_causal_context.quickstart import BASE, CONTEXTS, NUM_SAMPLES, digit_data, score
from hf_causal_context.quickstart import training_arguments as quickstart_arguments

# Of the benchmarks; the quickstart has less, and draws its samples by another method.
NUM_INFERENCE_STEPS = 15
BENCHMARK: dict[str, Any] = {"max_train_steps": 300, "train_batch_size": 40, "context_weights": []}


def train_lora(model, scheduler, images, settings, name, batch_size):
    """Train the LoRA of that name on images (N, 1, 32, 32) in [-1, 1]."""
    device = next(model.parameters()).device
    parameters = [p for n, p in model.named_parameters() if f".{name}." in n]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.adam_weight_decay)
    steps = settings.max_train_steps
    schedule = get_scheduler(
        settings.lr_scheduler, optimizer, num_warmup_steps=settings.lr_warmup_steps, num_training_steps=steps
    )
    for _ in tqdm(range(steps), desc=name):
        clean = images[torch.randint(len(images), (batch_size,))].to(device)
        noise = torch.randn(clean.shape).to(device)  # drawn on the CPU: the same on every device
        t = torch.randint(scheduler.config.num_train_timesteps, (batch_size,)).to(device)
        target = scheduler.get_velocity(clean, noise, t)
        loss = (model(scheduler.add_noise(clean, noise, t), t).sample - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
        optimizer.step()
        schedule.step()


def stacked_loras(base, seed):
    """A base with one trained LoRA per concept, under the concepts' names, as a PeftModel in eval mode."""
    torch.manual_seed(seed)
    settings = replace(quickstart_arguments(Path("unused"), seed), **BENCHMARK)
    rows = digit_data(seed=seed).rows.with_format("numpy")
    lora = LoraConfig(r=settings.concept_rank, lora_alpha=settings.concept_rank, target_modules=settings.target_modules)
    model: Any = get_peft_model(cast(Any, base.denoiser), lora, adapter_name=CONCEPTS[0])
    for name in CONCEPTS[1:]:
        model.add_adapter(name, lora)
    for name in CONCEPTS:
        model.set_adapter(name)
        own = rows.filter(lambda context, name=name: context == name, input_columns="context")
        images = torch.from_numpy(cast(Any, own)["image"][:])[:, None].float() / 127.5 - 1
        batch_size = settings.train_batch_size // (len(CONCEPTS) + 1)
        train_lora(model.train(), base.noise_scheduler(), images, settings, name, batch_size)
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    base = load_base(str(BASE))
    pipe: Any = base.pipe
    model = stacked_loras(base, arguments.seed)
    pipe.set_progress_bar_config(disable=True)
    samples = {}
    for context in CONTEXTS[1:]:
        model.base_model.set_adapter(list(context.targets))
        generators = [torch.Generator().manual_seed(seed) for seed in range(NUM_SAMPLES)]
        options = {"num_inference_steps": NUM_INFERENCE_STEPS, "output_type": "pt"}
        batches = [generators[i : i + 64] for i in range(0, NUM_SAMPLES, 64)]
        samples[context] = torch.cat([pipe(len(g), generator=g, **options).images for g in batches])
    scores = score(samples)
    command = "python -m examples.benchmarks.digit_peers --output hf_causal_context/models/digit_peers.json"
    distances = {str(context): round(distance, 5) for context, distance in scores.items()}
    arguments.output.write_text(json.dumps({"command": command, "stacked_loras": distances}, indent=2) + "\n")
    print(arguments.output.read_text())


if __name__ == "__main__":
    main()
