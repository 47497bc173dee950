"""Files for ComfyUI: those of other formats where it reads them, and Lumina 2 under its first names."""

import pytest
import torch
from safetensors.torch import load_file

from hf_causal_context._files import WEIGHTS
from hf_causal_context.adapter.baking import bake
from hf_causal_context.inference.comfyui import lumina_state
from hf_causal_context.inference.export import export_contexts

from .test_export_formats import ATTENTION, CONTEXT, adapted


@pytest.mark.parametrize(
    ("name", "same"), [("sd15", "kohya"), ("flux", "diffusers"), ("qwen_image", "diffusers"), ("krea2", "diffusers")]
)
def test_comfyui_reads_other_formats_of_most_bases(name, same, tmp_path):
    base = adapted(name)
    paths = [export_contexts(base, [CONTEXT], tmp_path / kind, file_format=kind)[0] for kind in ("comfyui", same)]
    asked, other = map(load_file, paths)
    assert asked.keys() == other.keys()
    assert all(torch.equal(asked[key], other[key]) for key in asked)


@pytest.mark.parametrize("attention", [ATTENTION, ["to_q", "to_v"]])
def test_comfyuis_lumina_2_has_query_key_and_value_in_one_layer(attention, tmp_path):
    targets = [*attention, *(f"feed_forward.linear_{number}" for number in (1, 2, 3))]
    base = adapted("lumina2", target_modules=targets, rank_pattern={"to_k": 2, "to_q": 1})
    (path,) = export_contexts(base, [CONTEXT], tmp_path, file_format="comfyui")
    (folder,) = export_contexts(base, [CONTEXT], tmp_path, file_format="peft")

    def changes(file, prefix):
        weights = {key.removeprefix(prefix): weight for key, weight in load_file(file).items()}
        names = {key.split(".lora_")[0] for key in weights}
        return {name: weights[f"{name}.lora_B.weight"] @ weights[f"{name}.lora_A.weight"] for name in names}

    found, expected = changes(path, "diffusion_model."), changes(folder / WEIGHTS, "base_model.model.")
    linear = dict(base.denoiser.named_modules())
    count = 0
    for block in ("layers.0", "noise_refiner.0", "context_refiner.0"):
        parts = {part: linear[f"{block}.attn.{part}"].out_features for part in ("to_q", "to_k", "to_v")}
        joint = found[f"{block}.attention.qkv"].split(list(parts.values()))
        for part, change in zip(parts, joint, strict=True):
            of_part = expected.get(f"{block}.attn.{part}", torch.zeros_like(change))
            torch.testing.assert_close(change, of_part, rtol=1e-5, atol=1e-6)
            count += f"{block}.attn.{part}" in expected
        names = {f"feed_forward.linear_{number}": f"feed_forward.w{number}" for number in (1, 2, 3)}
        names["attn.to_out.0"] = "attention.out"
        for ours, theirs in names.items():
            if f"{block}.{ours}" in expected:
                assert torch.equal(found[f"{block}.{theirs}"], expected[f"{block}.{ours}"])
                count += 1
    assert count == len(expected)


def test_a_file_for_a_part_of_attention_is_of_one_dtype_and_made_where_the_weights_are():
    denoiser = adapted("lumina2", target_modules=["to_q", "to_v"]).denoiser
    weights = {key.removeprefix("base_model.model."): weight for key, weight in bake(denoiser, CONTEXT)[1].items()}
    state = lumina_state(denoiser, {key: weight.to("meta", torch.bfloat16) for key, weight in weights.items()})
    assert {(weight.device.type, weight.dtype) for weight in state.values()} == {("meta", torch.bfloat16)}


def test_what_comfyui_does_not_read(tmp_path):
    for base, message in (
        (adapted("sana"), "ComfyUI is not known to read LoRA files for SanaPipeline.*'ZImagePipeline'. Use --format"),
        (adapted("ddpm"), "ComfyUI is not known to read LoRA files for DDPMPipeline"),
        (adapted("lumina2", target_modules=["to_q", "norm1.linear"]), "'.*norm1.linear' has no place.*Lumina 2"),
    ):
        with pytest.raises(ValueError, match=message):
            export_contexts(base, ["thick"], tmp_path / "out", file_format="comfyui")
        assert not (tmp_path / "out").exists()
