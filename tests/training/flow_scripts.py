"""What diffusers' training scripts compute for the pipelines of `tiny_flows`: as in `test_families`."""

import inspect

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


SCRIPTS = {script.__name__: script for script in (sana,)}
