"""Baked contexts as files of other tools: loaded by the stock pipeline, they give the adapter's own images."""

import json
from contextlib import ExitStack
from pathlib import Path

import diffusers
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file

from hf_causal_context import CausalContextConfig, intervene
from hf_causal_context._files import file_name
from hf_causal_context.adapter import saving
from hf_causal_context.bases.loading import as_base, load_base
from hf_causal_context.cli import main
from hf_causal_context.inference import export as module
from hf_causal_context.inference.adapted import StoredAdapter
from hf_causal_context.inference.export import export_contexts

from .training.conftest import pipeline_folder  # noqa: F401 (a fixture)
from .training.tiny_parts import _random
from .training.tiny_pipelines import NEWER, PIPELINES, side, stable_diffusion, stable_diffusion_xl, usually

CONTEXT = "slant=-0.5+thick=1.5"
INDEPENDENT = {"mechanism": "independent", "observational_rank": 0}
REDUCED = {"mechanism": "reduced"}
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
EVERYTHING = [
    *ATTENTION, "conv1", "conv2", "conv_shortcut", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2",
    "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj", "conv_in", "conv_out", "linear_1", "linear_2",
]  # fmt: skip
# The block structure of the real UNets, narrow.
SD15 = {
    "block_out_channels": (8, 8, 16, 16),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "cross_attention_dim": 16,
}
SDXL = {
    "block_out_channels": (8, 8, 16),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 3),
    "cross_attention_dim": 32,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 16,
}


def sd15():
    pipe = stable_diffusion()
    unet = diffusers.UNet2DConditionModel(sample_size=8, norm_num_groups=4, attention_head_dim=2, **SD15)
    pipe.register_modules(unet=_random(unet))
    return pipe


def sdxl():
    pipe = stable_diffusion_xl()
    unet = diffusers.UNet2DConditionModel(sample_size=8, norm_num_groups=4, attention_head_dim=2, **SDXL)
    pipe.register_modules(unet=_random(unet))
    return pipe


BUILDERS = {**PIPELINES, "sd15": sd15, "sdxl": sdxl}


def build(name):
    torch.manual_seed(0)
    pipe = BUILDERS[name]()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def attach(model, **settings):
    torch.manual_seed(1)
    settings = {"concepts": ("thick", "slant", "size"), "target_modules": ATTENTION, "alpha": 12.0, **settings}
    get_peft_model(model, CausalContextConfig(init_weights=False, **settings)).eval()


def image(pipe):
    base = as_base(pipe)
    output = pipe(
        **base.stock_call(prompt="a cat", resolution=side(base)),
        num_inference_steps=2,
        output_type="pt",
        generator=torch.Generator().manual_seed(5),
    )
    return output.images


def compare(name, file_format, folder, text_encoders=None, context=CONTEXT, alpha=12.0, **settings):
    """The exported file in the stock pipeline gives the adapter's image, which is far from the base's."""
    base = as_base(build(name))
    plain = image(base.pipe)
    targets = {base.denoiser_name: settings.pop("target_modules", ATTENTION), **(text_encoders or {})}
    for component, modules in targets.items():
        attach(getattr(base.pipe, component), target_modules=modules, alpha=alpha, **settings)
    (path,) = export_contexts(base, [context], folder, file_format=file_format)
    with ExitStack() as stack:
        for component in targets:
            stack.enter_context(intervene(getattr(base.pipe, component), context))
        own = image(base.pipe)
    stock = build(name)
    if file_format == "peft":
        for component in targets:
            where = path if component == base.denoiser_name else path / component
            PeftModel.from_pretrained(getattr(stock, component), where)
    else:
        stock.load_lora_weights(folder, weight_name=path.name)
    difference, effect = (image(stock) - own).abs().max(), (plain - own).abs().max()
    print(f"{name} {file_format}: {difference:.1e}, effect {effect:.2f}")
    assert difference < 1e-4
    assert effect > 0.05
    return path


@pytest.mark.parametrize("mechanism", [INDEPENDENT, REDUCED])
@pytest.mark.parametrize("file_format", ["peft", "diffusers"])
@pytest.mark.parametrize("name", ["stable_diffusion", "stable_diffusion_xl", "stable_diffusion_3", "flux"])
def test_the_stock_pipeline_gives_the_same_image(name, file_format, mechanism, tmp_path):
    # Full names with another rank, one of which is the end of another name.
    patterns = {"flux": {"^proj_out": 2, "to_k": 3}}.get(name, {"to_k": 3, "attn2.to_q": 6, "to_out.0": 1})
    targets = [*ATTENTION, "proj_out"] if name == "flux" else ATTENTION
    compare(name, file_format, tmp_path, rank_pattern=patterns, target_modules=targets, alpha=6.0, **mechanism)


@pytest.mark.parametrize("name", usually(NEWER))
def test_the_stock_pipeline_of_a_newer_family_gives_the_same_image(name, tmp_path):
    file_format = "diffusers" if hasattr(PIPELINES[name](), "load_lora_weights") else "peft"
    compare(name, file_format, tmp_path, target_modules="all-linear", alpha=3.0, **REDUCED)


@pytest.mark.parametrize("mechanism", [INDEPENDENT, REDUCED])
@pytest.mark.parametrize("file_format", ["diffusers", "kohya"])
@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_every_module_of_the_real_block_structures(name, file_format, mechanism, tmp_path):
    # Ranks that differ between and within attentions and convolutions.
    patterns = {"to_k": 3, "attn2.to_q": 6, "conv1": 2, "ff.net.2": 1, "conv_shortcut": 5}
    settings = {"target_modules": EVERYTHING, "exclude_modules": ".*add_embedding.*", "rank_pattern": patterns}
    path = compare(name, file_format, tmp_path, alpha=1.5, **settings, **mechanism)
    modules = [n for n, m in build(name).unet.named_modules() if n.endswith(tuple(EVERYTHING)) and "add_emb" not in n]
    keys = load_file(path).keys()
    if file_format == "kohya":
        names = [f"lora_unet_{n.replace('.', '_')}" for n in modules]
        assert set(keys) == {f"{n}.{part}" for n in names for part in ("lora_down.weight", "lora_up.weight", "alpha")}
    else:
        assert set(keys) == {f"unet.{n}.lora_{part}.weight" for n in modules for part in "AB"}


@pytest.mark.parametrize("targets", [["q_proj", "v_proj", "out_proj", "fc1"], ["fc2"], ["q_proj", "v_proj"]])
@pytest.mark.parametrize(
    ("name", "file_format"),
    [
        ("stable_diffusion", "diffusers"),
        ("stable_diffusion", "kohya"),
        ("stable_diffusion_xl", "peft"),
        ("stable_diffusion_xl", "diffusers"),
        ("stable_diffusion_xl", "kohya"),
        ("stable_diffusion_3", "diffusers"),
        ("flux", "diffusers"),
    ],
)
def test_adapters_of_text_encoders_come_along(name, targets, file_format, tmp_path):
    encoders = ["text_encoder"] if name in ("stable_diffusion", "flux") else ["text_encoder", "text_encoder_2"]
    patterns = {"v_proj": 3, "fc1": 2, "to_k": 2}
    path = compare(name, file_format, tmp_path, dict.fromkeys(encoders, targets), rank_pattern=patterns, alpha=8.0)
    if file_format == "kohya":
        prefixes = {"lora_te"} if name == "stable_diffusion" else {"lora_te1", "lora_te2"}
        found = {key.split("_text_model_encoder_layers_")[0] for key in load_file(path) if "lora_te" in key}
        assert found == prefixes


def test_what_the_files_say_about_themselves(tmp_path):
    base = as_base(build("sd15"))
    attach(base.denoiser, rank_pattern={"to_k": 3}, observational_rank=0)
    base.denoiser.register_to_config(cross_attention_dim=768)
    for file_format in ("kohya", "diffusers"):
        export_contexts(base, ["thick+slant"], tmp_path / file_format, file_format=file_format)
    with safe_open(tmp_path / "kohya" / "slant+thick.safetensors", "pt") as file:
        assert file.metadata() == {
            "format": "pt",
            "modelspec.title": "slant+thick",
            "ss_base_model_version": "sd_v1",
            "ss_network_alpha": "8",
            "ss_network_dim": "8",
            "ss_network_module": "networks.lora",
        }
    with safe_open(tmp_path / "diffusers" / "slant+thick.safetensors", "pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    assert {key.split(".")[0] for key in metadata} == {"unet"}
    assert metadata["unet.r"] == metadata["unet.lora_alpha"] == 8
    assert not {"unet.rank_pattern", "unet.alpha_pattern"} & metadata.keys()
    weights = load_file(tmp_path / "diffusers" / "slant+thick.safetensors")
    assert {weight.shape[0] for key, weight in weights.items() if ".lora_A." in key} == {8}  # those of rank 6, too


def adapted(name="stable_diffusion", **settings):
    base = as_base(build(name))
    attach(base.denoiser, **settings)
    return base


def test_words_stand_for_contexts_and_a_context_is_written_once(tmp_path):
    words = ["singles", "pairs", "thick", "thick=0.5", "slant=1"]
    paths = export_contexts(adapted(), words, tmp_path, file_format="diffusers")
    assert [path.stem for path in paths] == [
        "thick", "slant", "size", "slant+thick", "size+thick", "size+slant", "thick=0.5"
    ]  # fmt: skip
    assert sorted(tmp_path.iterdir()) == sorted(paths)
    base = adapted(concepts=("pairs", "b"))  # a concept's name wins
    assert [p.stem for p in export_contexts(base, ["pairs"], tmp_path, file_format="kohya")] == ["pairs"]


def test_the_empty_context_where_it_is_not_the_base(tmp_path):
    compare("stable_diffusion", "diffusers", tmp_path, context="", **REDUCED)
    assert (tmp_path / "obs.safetensors").exists()
    for settings in ({}, {**REDUCED, "anchored": True}):
        with pytest.raises(ValueError, match="empty context of this adapter is the base model itself.* Leave it out"):
            export_contexts(
                adapted(**settings, observational_rank=0), ["thick", "obs"], tmp_path / "new", file_format="diffusers"
            )
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("file_format", ["peft", "diffusers", "kohya"])
@pytest.mark.parametrize(
    ("settings", "contexts", "message"),
    [
        ({}, ["thick", "color"], "Unknown concept 'color'.*Known concepts: 'thick', 'slant', 'size'"),
        ({"concepts": ("thick",)}, ["pairs"], r"contexts=\['pairs'\] name nothing to export.*concepts 'thick'"),
        ({"concepts": ("a:b", "a/b")}, ["singles"], "'a:b' and 'a/b' would both be written to 'a_b.*folders of their"),
        ({"concepts": ("a", "A")}, ["singles"], "'a' and 'A' would both be written to 'A"),
        ({"expressive_depth": 1}, ["thick"], "cannot be baked or merged: its mechanism is not linear"),
    ],
)
def test_contexts_and_adapters_that_have_no_file(settings, contexts, message, file_format, tmp_path):
    with pytest.raises(ValueError, match=message):
        export_contexts(adapted(**settings), contexts, tmp_path / "out", file_format=file_format)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["ddpm", "ddim", "dit", "pixart_sigma", "hunyuan_image", "stable_diffusion_3", "flux"])
def test_pipelines_that_cannot_load_a_format(name, tmp_path):
    base = adapted(name)
    if name in ("stable_diffusion_3", "flux"):
        formats, message = ["kohya"], "'kohya' is for the UNets of Stable Diffusion and SDXL.*Use --format diffusers"
    else:
        formats, message = ["kohya", "diffusers"], "Pipeline has no load_lora_weights.*Use --format peft, and PeftModel"
    for file_format in formats:
        with pytest.raises(ValueError, match=message):
            export_contexts(base, ["thick"], tmp_path / "out", file_format=file_format)
    assert not (tmp_path / "out").exists()
    assert export_contexts(base, ["thick"], tmp_path / "out", file_format="peft")[0].is_dir()


@pytest.mark.parametrize("file_format", ["diffusers", "kohya"])
def test_adapters_that_do_not_fit_a_format(file_format, tmp_path):
    def refused(base, message):
        with pytest.raises(ValueError, match=message):
            export_contexts(base, ["thick"], tmp_path / "out", file_format=file_format)
        assert not (tmp_path / "out").exists()

    refused(adapted(modules_to_save=["conv_in"]), "'unet' holds whole modules .modules_to_save.*Use --format peft")
    base = adapted()
    attach(base.pipe.vae, target_modules=["conv_in"])
    refused(base, "adapter of 'vae' has no place.*loads LoRAs of 'unet', 'text_encoder' only. Use --format peft")
    refused(as_base(build("stable_diffusion")), "The model has no causal context adapter 'default'")


def test_modules_that_kohyas_names_lose(tmp_path):
    base = adapted("sdxl", target_modules=["to_q", "linear_1"])
    with pytest.raises(
        ValueError, match="cannot read the modules 'unet.add_embedding.linear_1'.*Use --format diffusers"
    ):
        export_contexts(base, ["thick"], tmp_path / "out", file_format="kohya")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("file_format", ["peft", "diffusers", "kohya"])
def test_a_file_is_complete_or_absent(file_format, tmp_path, monkeypatch):
    base = adapted()
    paths = export_contexts(base, ["thick", "slant"], tmp_path, file_format=file_format)
    before = {path: path.stat().st_mtime_ns for path in paths}
    with pytest.raises(FileExistsError, match=f"These exist: {paths[0]}, {paths[1]}. Choose another --output_dir"):
        export_contexts(base, ["size", "thick", "slant"], tmp_path, file_format=file_format)

    def full_disk(_, place, *args, **kwargs):
        Path(place).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_file", full_disk)
    monkeypatch.setattr(saving, "save_file", full_disk)
    monkeypatch.setattr("safetensors.torch.save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        export_contexts(base, ["size"], tmp_path, file_format=file_format)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_names_of_files():
    assert file_name("slant=-0.5+thick") == "slant=-0.5+thick"
    assert file_name("a/b: c") == "a_b__c"
    assert file_name("..") == "_."
    # Of names that file systems would not take, the beginning is left, and they stay different.
    long = ["語" * 100 + "+" + end * 100 for end in ("a", "b")]
    short = [file_name(name) for name in long]
    assert all(name.startswith("語" * 50) and len(name.encode()) <= 180 for name in short)
    assert len(set(short)) == 2
    assert file_name("x" * 180) == "x" * 180


@pytest.fixture
def adapter(pipeline_folder, tmp_path):  # noqa: F811
    folder = pipeline_folder("stable_diffusion")
    model = load_base(folder).denoiser
    settings = {"concepts": ("thick", "slant"), "target_modules": ATTENTION, "alpha": 12.0, "init_weights": False}
    adapter = get_peft_model(model, CausalContextConfig(**settings, observational_rank=0))
    adapter.peft_config["default"].base_model_name_or_path = folder
    adapter.save_pretrained(tmp_path / "adapter")
    return str(tmp_path / "adapter")


def test_the_command(adapter, pipeline_folder, tmp_path, capsys):  # noqa: F811
    made = tmp_path / "made"
    command = ["export", "--adapter", adapter, "--output_dir", str(made), "--context"]
    assert main([*command, "singles", "pairs", "slant=-1,thick=0.5", "--format", "diffusers"]) == 0
    names = ["thick", "slant", "slant+thick", "slant=-1.0+thick=0.5"]
    assert capsys.readouterr().out.split() == [str(made / f"{name}.safetensors") for name in names]
    pipe = load_base(pipeline_folder("stable_diffusion")).pipe
    pipe.set_progress_bar_config(disable=True)
    plain = image(pipe)
    pipe.load_lora_weights(made, weight_name="slant=-1.0+thick=0.5.safetensors")
    loaded = image(pipe)
    pipe.unload_lora_weights()
    model = PeftModel.from_pretrained(pipe.unet, adapter)
    with intervene(model, "slant=-1,thick=0.5"):
        own = image(pipe)
    assert (loaded - own).abs().max() < 1e-4
    assert (plain - own).abs().max() > 0.05
    # the adapter takes the dtype of the base
    assert (
        main([*command, "thick", "--format", "kohya", "--dtype", "bfloat16", "--output_dir", str(tmp_path / "b")]) == 0
    )
    up = next(w for key, w in load_file(tmp_path / "b" / "thick.safetensors").items() if key.endswith("up.weight"))
    assert up.dtype == torch.bfloat16
    capsys.readouterr()


def test_the_command_refuses_before_it_loads_the_base(adapter, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(StoredAdapter, "pipeline", None)
    (tmp_path / "thick.safetensors").touch()
    command = ["export", "--adapter", adapter, "--format", "diffusers", "--output_dir", str(tmp_path), "--context"]
    assert main([*command, "singles"]) == 1
    assert f"These exist: {tmp_path / 'thick.safetensors'}. Choose another --output_dir" in capsys.readouterr().err
    assert main([*command, "color"]) == 1
    assert "Unknown concept 'color'" in capsys.readouterr().err
    assert main([*command, "obs"]) == 1
    assert "is the base model itself" in capsys.readouterr().err
