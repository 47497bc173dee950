"""Pipelines of sound count their copies under a name of their own."""

import diffusers
import pytest
import torch
from peft import inject_adapter_in_model

from hf_causal_context import intervene

from ..adapter.small import config
from ..training import tiny_pipelines


def stable_audio():
    transformer = diffusers.StableAudioDiTModel(
        sample_size=4,
        in_channels=4,
        num_layers=1,
        attention_head_dim=4,
        num_key_value_attention_heads=2,
        out_channels=4,
        cross_attention_dim=32,
        time_proj_dim=8,
        global_states_input_dim=64,
        cross_attention_input_dim=32,
    )
    vae = diffusers.AutoencoderOobleck(
        encoder_hidden_size=6,
        downsampling_ratios=[1, 2],
        decoder_channels=3,
        decoder_input_channels=4,
        audio_channels=2,
        channel_multiples=[2, 4],
        sampling_rate=4,
    )
    projection = diffusers.StableAudioProjectionModel(
        text_encoder_dim=32, conditioning_dim=32, min_value=0, max_value=32
    )
    text_encoder, tokenizer = tiny_pipelines._t5(), tiny_pipelines._t5_tokenizer()
    tokenizer.model_max_length = 8
    scheduler = diffusers.EDMDPMSolverMultistepScheduler(solver_order=2)
    pipe = diffusers.StableAudioPipeline(vae, text_encoder, projection, tokenizer, transformer.eval(), scheduler)
    inject_adapter_in_model(config(target_modules=["to_q", "to_k", "to_v"]), pipe.transformer)
    pipe.transformer.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, prompts, seeds):
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    options = {"num_inference_steps": 2, "num_waveforms_per_prompt": 2, "audio_end_in_s": 1.0, "output_type": "pt"}
    return pipe(prompts, generator=generators, **options).audios


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")  # diffusers' decoder
def test_each_waveform_has_the_context_of_its_prompt():
    pipe = stable_audio()
    contexts = ["thick=3", "slant=3"]
    with intervene(pipe, contexts):
        together = draw(pipe, ["a", "b"], range(4))
    for i, context in enumerate(contexts):
        with intervene(pipe, context):
            alone = draw(pipe, ["a", "b"], range(4))
        torch.testing.assert_close(together[2 * i : 2 * i + 2], alone[2 * i : 2 * i + 2])
        assert (together[2 - 2 * i : 4 - 2 * i] - alone[2 - 2 * i : 4 - 2 * i]).abs().max() > 1e-3
