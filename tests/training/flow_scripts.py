"""What diffusers' training scripts compute for the pipelines of `tiny_flows`: as in `test_families`."""

import inspect

import torch

from .test_bases import CAPTIONS


def sana(pipe, pixels, noised, transformer):
    clean = pipe.vae.encode(pixels).latent * pipe.vae.config.scaling_factor
    noise, noisy, times = noised(clean)
    instruction = inspect.signature(pipe.__call__).parameters["complex_human_instruction"].default
    hidden, mask, _, _ = pipe.encode_prompt(CAPTIONS, complex_human_instruction=instruction)
    predicted = transformer(
        hidden_states=noisy,
        encoder_hidden_states=hidden,
        encoder_attention_mask=mask,
        timestep=times * pipe.transformer.config.timestep_scale,
        return_dict=False,
    )[0]
    return predicted - (noise - clean)


def lumina2(pipe, pixels, noised, transformer):
    config = pipe.vae.config
    clean = (pipe.vae.encode(pixels).latent_dist.mode() - config.shift_factor) * config.scaling_factor
    noise, noisy, times = noised(clean)
    hidden, mask, _, _ = pipe.encode_prompt(CAPTIONS)
    sigmas = 1 - times / 1000  # of the script, where 1 is data
    mixed = sigmas.view(-1, 1, 1, 1)
    torch.testing.assert_close(noisy, (1 - mixed) * noise + mixed * clean)
    predicted = transformer(
        hidden_states=noisy,
        encoder_hidden_states=hidden,
        encoder_attention_mask=mask,
        timestep=sigmas,
        return_dict=False,
    )[0]
    return predicted - (clean - noise)


def aura_flow(pipe, pixels, noised, transformer):
    clean = pipe.vae.encode(pixels).latent_dist.mode() * pipe.vae.config.scaling_factor
    noise, noisy, times = noised(clean)
    hidden, _, _, _ = pipe.encode_prompt(CAPTIONS)
    predicted = transformer(noisy, encoder_hidden_states=hidden, timestep=times / 1000, return_dict=False)[0]
    return predicted - (noise - clean)


def cogview4(pipe, pixels, noised, transformer):
    clean = pipe.vae.encode(pixels).latent_dist.mode() * pipe.vae.config.scaling_factor
    noise, noisy, times = noised(clean)
    config, tokens = pipe.scheduler.config, clean[0, 0].numel() // 4
    mu = (tokens / config.base_image_seq_len) ** 0.5 * config.max_shift + config.base_shift
    unshifted = 1 / (1 + mu * (1000 / times - 1))
    torch.testing.assert_close(mu / (mu + 1 / unshifted - 1), times / 1000)
    size = torch.tensor([pixels.shape[2:]] * 2)
    hidden, _ = pipe.encode_prompt(CAPTIONS, do_classifier_free_guidance=False)
    predicted = transformer(
        hidden_states=noisy,
        encoder_hidden_states=hidden,
        timestep=1000 * unshifted,
        original_size=size,
        target_size=size,
        crop_coords=torch.zeros(2, 2),
        return_dict=False,
    )[0]
    return predicted - (noise - clean)


def hunyuan_image(pipe, pixels, noised, transformer):
    """No script of diffusers: Qwen-Image's, called as the pipeline does."""
    clean = pipe.vae.encode(pixels).latent_dist.mode() * pipe.vae.config.scaling_factor
    noise, noisy, times = noised(clean)
    hidden, mask, hidden_2, mask_2 = pipe.encode_prompt(CAPTIONS, batch_size=2)
    predicted = transformer(noisy, times, hidden, mask, None, hidden_2, mask_2, return_dict=False)[0]
    return predicted - (noise - clean)


def hidream_image(pipe, pixels, noised, transformer):
    config = pipe.vae.config
    clean = (pipe.vae.encode(pixels).latent_dist.mode() - config.shift_factor) * config.scaling_factor
    noise, noisy, times = noised(clean)
    t5, _, llama, _, pooled, _ = pipe.encode_prompt(CAPTIONS)
    predicted = transformer(
        hidden_states=noisy,
        encoder_hidden_states_t5=t5,
        encoder_hidden_states_llama3=llama,
        pooled_embeds=pooled,
        timesteps=times,
        return_dict=False,
    )[0]
    return predicted * -1 - (noise - clean)


SCRIPTS = {script.__name__: script for script in (sana, lumina2, aura_flow, cogview4, hunyuan_image, hidream_image)}
