"""A step of the trainer allocates no more than one of diffusers' LoRA script, with the same options."""

import diffusers
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig

from examples.configs.memory import Allocations
from hf_causal_context.bases.loading import as_base
from hf_causal_context.contexts import ConceptSet
from hf_causal_context.data import InterventionalData
from hf_causal_context.training.arguments import TrainingArguments
from hf_causal_context.training.denoiser.objectives import Batch, denoising_objective
from hf_causal_context.training.loop.processes import make_accelerator
from hf_causal_context.training.loop.trainer import Run
from hf_causal_context.training.noise import Draws
from hf_causal_context.training.recipe import DTYPES, attach_adapter

from .tiny_pipelines import PIPELINES

pytestmark = pytest.mark.usefixtures("on_cpu")
CONCEPTS = ("first", "second", "third", "fourth")
ROWS, TOKENS = 16, 77
RANK = (
    len(CONCEPTS) + 4
) * 4  # what attach_adapter gives by default: a width of 4, and four times that in every context


def _arguments(**options):
    options = {"pretrained_model_name_or_path": "x", "output_dir": "unused", "train_batch_size": ROWS, **options}
    return TrainingArguments(**options)


def _values(pipe, dtype):
    """Latents, embeddings of captions, and further conditions, as both have them cached."""
    conditions = {"encoder_hidden_states": torch.randn(ROWS, TOKENS, pipe.unet.config.cross_attention_dim, dtype=dtype)}
    if isinstance(pipe, diffusers.StableDiffusionXLPipeline):
        conditions["text_embeds"] = torch.randn(ROWS, 16, dtype=dtype)
    return torch.randn(ROWS, 4, 8, 8), conditions


def _peak(step, model, optimizer, *values):
    """Bytes at the peak of a step after the first, which makes the optimizer's state."""
    step()
    state = [value for each in optimizer.state.values() for value in each.values() if isinstance(value, torch.Tensor)]
    with Allocations([*model.parameters(), *model.buffers(), *state, *values]) as allocations:
        step()
    return allocations.bytes.peak, sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def ours(pipe, arguments):
    base, dtype = as_base(pipe), DTYPES[arguments.mixed_precision]
    base.denoiser.to(dtype)
    counts = {"": 1, **dict.fromkeys(CONCEPTS, 1)}
    data = InterventionalData([{}] * 5, ConceptSet(CONCEPTS), tuple(counts), {}, counts)
    model = attach_adapter(base.denoiser, data, arguments)
    if arguments.gradient_checkpointing:
        base.enable_gradient_checkpointing()
    run = Run(make_accelerator(arguments), model, denoising_objective(base), arguments, num_steps=2)
    latents, conditions = _values(pipe, dtype)
    mask = torch.eye(len(CONCEPTS)).repeat(ROWS // len(CONCEPTS), 1)
    run.stream = iter(lambda: Batch(latents, mask, conditions, Draws(0, range(ROWS))), None)
    run.wrapped.train()
    return _peak(run.train_step, model, run.optimizer, latents, *conditions.values())


def theirs(pipe, arguments):
    """The step of train_text_to_image_lora.py and of train_text_to_image_lora_sdxl.py, after both have encoded."""
    unet, dtype = pipe.unet.requires_grad_(False), DTYPES[arguments.mixed_precision]
    unet.to(dtype)
    targets = ["to_k", "to_q", "to_v", "to_out.0"]
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=targets))
    diffusers.training_utils.cast_training_params(unet, dtype=torch.float32)
    if arguments.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    accelerator = make_accelerator(arguments)
    unet, optimizer = accelerator.prepare(unet, torch.optim.AdamW(trained, lr=arguments.learning_rate))
    scheduler = diffusers.DDPMScheduler(prediction_type=pipe.scheduler.config.prediction_type)
    latents, conditions = _values(pipe, dtype)
    latents = latents.to(dtype)
    if "text_embeds" in conditions:
        conditions["time_ids"] = torch.tensor([[64.0, 64, 0, 0, 64, 64]]).repeat(ROWS, 1)
    unet.train()

    def step():
        with accelerator.accumulate(unet):
            noise = torch.randn_like(latents)
            timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (ROWS,)).long()
            noisy = scheduler.add_noise(latents, noise, timesteps)
            target = noise
            if scheduler.config.prediction_type == "v_prediction":
                target = scheduler.get_velocity(latents, noise, timesteps)
            added = {name: values for name, values in conditions.items() if name != "encoder_hidden_states"}
            prediction = unet(
                noisy, timesteps, conditions["encoder_hidden_states"], added_cond_kwargs=added, return_dict=False
            )[0]
            loss = F.mse_loss(prediction.float(), target.float(), reduction="mean")
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(trained, arguments.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()

    return _peak(step, unet, optimizer, latents, *conditions.values())


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
@pytest.mark.parametrize("name", ["stable_diffusion", "stable_diffusion_xl"])
def test_a_step_allocates_at_its_peak_what_one_of_the_lora_script_does(name, gradient_checkpointing):
    arguments = _arguments(mixed_precision="bf16", gradient_checkpointing=gradient_checkpointing)
    (peak, size), (reference, their_size) = (step(PIPELINES[name](), arguments) for step in (ours, theirs))
    assert size == their_size
    assert peak <= 1.05 * reference
