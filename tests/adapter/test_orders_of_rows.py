"""Models whose layers see the rows of a batch in another order than sample by sample, or piece by piece."""

import diffusers
import pytest
import torch
from torch import nn

from hf_causal_context import intervene

from ..architectures import ARCHITECTURES
from ..training.tiny_parts import _clip, _clip_tokenizer, _t5, _t5_tokenizer, _vae
from ..training.tiny_pipelines import TEXT_UNET
from .small import adapted

CONTEXTS = ["thick", "slant"]
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
PIECES = "runs pieces of the batch one by one"


def randomized(model):
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("mechanism", ["independent", "reduced"])
def test_times_of_the_edited_images_follow_all_others(mechanism):
    """Qwen-Image-Edit of 2511: its layers for times see every sample twice, all of them before all again."""
    sizes = {"patch_size": 2, "in_channels": 16, "out_channels": 4, "num_layers": 1, "attention_head_dim": 16}
    sizes |= {"num_attention_heads": 2, "joint_attention_dim": 16, "axes_dims_rope": (8, 4, 4)}
    transformer = randomized(diffusers.QwenImageTransformer2DModel(**sizes, zero_cond_t=True))
    model = adapted(transformer, target_modules="all-linear", mechanism=mechanism, alpha=1.0)
    values = {"hidden_states": torch.randn(2, 8, 16), "encoder_hidden_states": torch.randn(2, 5, 16)}
    values |= {"timestep": torch.tensor([0.3, 0.7]), "encoder_hidden_states_mask": torch.ones(2, 5).long()}

    def run(context, rows=slice(0, 2)):
        shapes = [[(1, 2, 2), (1, 2, 2)]] * len(values["timestep"][rows])
        return model(**{name: value[rows] for name, value in values.items()}, img_shapes=shapes, context=context).sample

    apart = torch.cat([run(context, slice(row, row + 1)) for row, context in enumerate(CONTEXTS)])
    torch.testing.assert_close(run(CONTEXTS), apart, **CLOSE)
    assert (apart - run("thick")).abs().max() > 1e-2


@torch.no_grad()
def test_chunks_of_the_batch_need_one_context():
    architecture = ARCHITECTURES["sd3"]
    model, values = adapted(architecture.build(), target_modules="all-linear"), architecture.inputs(2)
    expected = model(**values, context=CONTEXTS).sample
    transformer = model.get_base_model()
    transformer.enable_forward_chunking(1, dim=1)
    torch.testing.assert_close(model(**values, context=CONTEXTS).sample, expected, **CLOSE)
    transformer.enable_forward_chunking(1, dim=0)
    with pytest.raises(ValueError, match=f"SD3Transformer2DModel {PIECES} .*dim=1"):
        model(**values, context=CONTEXTS)
    model(**values, context="thick")
    transformer.disable_forward_chunking()
    torch.testing.assert_close(model(**values, context=CONTEXTS).sample, expected, **CLOSE)


def animatediff():
    sizes = {"block_out_channels": (16, 16), "motion_layers_per_block": 1, "motion_norm_num_groups": 2}
    pipe = diffusers.AnimateDiffPipeline(
        _vae(),
        _clip(),
        _clip_tokenizer(),
        diffusers.UNet2DConditionModel(**TEXT_UNET, cross_attention_dim=16),
        diffusers.MotionAdapter(**sizes, motion_num_attention_heads=4),
        diffusers.DDIMScheduler(beta_schedule="linear", clip_sample=False),
    )
    adapted(randomized(pipe.unet), target_modules="all-linear")
    return pipe


def latte():
    sizes = {"sample_size": 8, "num_layers": 1, "patch_size": 2, "attention_head_dim": 8, "num_attention_heads": 2}
    sizes |= {"in_channels": 4, "out_channels": 8, "caption_channels": 32, "cross_attention_dim": 16}
    kind = {"norm_type": "ada_norm_single", "norm_elementwise_affine": False, "num_embeds_ada_norm": 1000}
    transformer = diffusers.LatteTransformer3DModel(**sizes, **kind, video_length=4)
    adapted(randomized(transformer), target_modules=["to_q", "to_v"])
    return diffusers.LattePipeline(_t5_tokenizer(), _t5(), _vae(), transformer, diffusers.DDIMScheduler())


def clips(pipe, context, rows=slice(0, 2), **options):
    """Latents of some of two clips of four frames, each with noise of its own."""
    pipe.set_progress_bar_config(disable=True)
    latents = torch.randn(2, 4, 4, 8, 8, generator=torch.Generator().manual_seed(1))[rows]
    frames = {"video_length" if isinstance(pipe, diffusers.LattePipeline) else "num_frames": 4}
    options = {"num_inference_steps": 1, "output_type": "latent"} | frames | options
    with torch.no_grad(), intervene(pipe, context):
        return pipe(["a cat", "two dogs"][rows], latents=latents, **options).frames


class TestParts:
    """Frames are folded into the batch, so a part of it may have a row for each sample."""

    @pytest.mark.parametrize("split", ["chunks", "free noise"])
    def test_pieces_need_one_context(self, split):
        pipe = animatediff()
        apart = torch.cat([clips(pipe, context, slice(row, row + 1)) for row, context in enumerate(CONTEXTS)])
        torch.testing.assert_close(clips(pipe, CONTEXTS), apart, **CLOSE)
        if split == "chunks":
            pipe.unet.enable_forward_chunking(4)
        else:
            pipe.enable_free_noise_split_inference(spatial_split_size=64, temporal_split_size=4)
        with pytest.raises(ValueError, match=f"UNetMotionModel {PIECES}"):
            clips(pipe, CONTEXTS)
        clips(pipe, "thick")

    def test_perturbed_attention_needs_one_context(self):
        pipe = diffusers.AnimateDiffPAGPipeline(**animatediff().components, pag_applied_layers=["down_blocks.0"])
        clips(pipe, CONTEXTS, pag_scale=0.0)
        with pytest.raises(ValueError, match="UNetMotionModel has attention that runs parts of the batch one by one"):
            clips(pipe, CONTEXTS, guidance_scale=1.0, pag_scale=2.0)
        clips(pipe, "thick", guidance_scale=1.0, pag_scale=2.0)

    @pytest.mark.filterwarnings("ignore:torch.meshgrid")
    def test_rows_that_faster_cache_leaves_out_need_one_context(self):
        pipe = latte()
        options = {"num_inference_steps": 4, "height": 64, "width": 64, "clean_caption": False, "mask_feature": False}
        apart = [clips(pipe, context, slice(row, row + 1), **options) for row, context in enumerate(CONTEXTS)]
        torch.testing.assert_close(clips(pipe, CONTEXTS, **options), torch.cat(apart), **CLOSE)
        pipe.transformer.enable_cache(
            diffusers.FasterCacheConfig(
                unconditional_batch_skip_range=2,
                unconditional_batch_timestep_skip_range=(-1, 901),
                attention_weight_callback=lambda _: 0.5,
                tensor_format="BCFHW",
                current_timestep_callback=lambda: pipe._current_timestep,
            )
        )
        with pytest.raises(ValueError, match=r"LatteTransformer3DModel leaves the rows without a prompt out.*FasterC"):
            clips(pipe, CONTEXTS, **options)
        clips(pipe, "thick", **options)
