"""Baked contexts, and the read-out of effects."""

import json
import re
import subprocess
import sys
import textwrap

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from hf_causal_context import bake, causal_effects, save_baked
from hf_causal_context.adapter import saving

from ..architectures import ARCHITECTURES
from .small import VARIANTS, Mlp, adapted, gpt2, inputs

CONTEXT = {"thick": 1.0, "size": -0.5}
LINEAR = [name for name in VARIANTS if "expressive" not in name]


@pytest.mark.parametrize("variant", LINEAR)
@pytest.mark.parametrize("context", [(), "slant", CONTEXT])
def test_a_baked_lora_gives_the_same_output(tmp_path, variant, context):
    x, model = inputs(), adapted(**VARIANTS[variant], alpha=3, rank_pattern={"first": 2})
    folder = save_baked(model, context, tmp_path / "lora")
    lora = PeftModel.from_pretrained(Mlp(), folder)
    assert isinstance(lora.peft_config["default"], LoraConfig)
    torch.testing.assert_close(lora(x), model(x, context=context), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lora.merge_and_unload()(x), model(x, context=context), rtol=1e-5, atol=1e-6)


def test_idle_concepts_take_no_room():
    model = adapted(observational_rank=0)
    config, weights = bake(model, "thick")
    assert config.r == 4
    assert weights["base_model.model.first.lora_A.weight"].shape == (4, 10)
    assert bake(model, "thick+slant")[0].r == 8
    assert bake(adapted(mechanism="reduced", observational_rank=0), "thick")[0].r == 12


def test_the_observational_part_comes_along_at_its_strength():
    model, x = adapted(observational_rank=3), inputs()
    assert [bake(model, context)[0].r for context in ("thick", "", "thick+observational=0.0")] == [7, 3, 4]
    for context in ("thick", "", "thick=0.5+observational=0.3", "observational=0"):
        config, weights = bake(model, context)
        lora = get_peft_model(Mlp(), config)
        lora.load_state_dict({k.replace(".weight", ".default.weight"): v for k, v in weights.items()}, strict=False)
        torch.testing.assert_close(lora.eval()(x), model(x, context=context), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="'observational=0.5' sets the strength.* the adapter has none"):
        bake(adapted(observational_rank=0), "observational=0.5")


def test_convolutions_and_gpt2(tmp_path):
    model = adapted(
        nn.Sequential(nn.Conv2d(2, 3, (3, 2), stride=2, padding=1), nn.Conv3d(1, 2, 2)), target_modules=["0"]
    )
    conv = model.get_base_model()[0]
    x = torch.randn(2, 2, 6, 6)
    config, weights = bake(model, CONTEXT)
    plain = get_peft_model(nn.Sequential(conv.base_layer, nn.Identity()), config)
    plain.load_state_dict({k.replace(".weight", ".default.weight"): v for k, v in weights.items()}, strict=False)
    from hf_causal_context import intervene

    with intervene(model, CONTEXT):
        torch.testing.assert_close(plain.eval()(x), conv(x), rtol=1e-5, atol=1e-6)
    model = adapted(gpt2(), mechanism="reduced", target_modules="all-linear", task_type="CAUSAL_LM")
    ids = torch.arange(6).view(2, 3)
    lora = PeftModel.from_pretrained(gpt2(), save_baked(model, CONTEXT, tmp_path / "gpt2"))
    torch.testing.assert_close(lora(ids).logits, model(ids, context=CONTEXT).logits, rtol=1e-5, atol=1e-5)


def test_modules_to_save_come_along(tmp_path):
    model = adapted(target_modules=["first"], modules_to_save=["second"])
    nn.init.normal_(model.get_base_model().second.modules_to_save["default"].weight)
    lora = PeftModel.from_pretrained(Mlp(), save_baked(model, CONTEXT, tmp_path / "lora"))
    torch.testing.assert_close(lora(inputs()), model(inputs(), context=CONTEXT), rtol=1e-5, atol=1e-6)


def test_plain_peft_loads_it_without_this_package(tmp_path):
    x, model = inputs(), adapted(mechanism="structural")
    save_baked(model, CONTEXT, tmp_path / "lora")
    save_file({"x": x, "expected": model(x, context=CONTEXT).detach()}, tmp_path / "data.safetensors")
    save_file(Mlp().state_dict(), tmp_path / "base.safetensors")
    script = """
        import sys, torch
        from peft import PeftModel
        from safetensors.torch import load_file
        class Mlp(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.second = torch.nn.Linear(10, 16), torch.nn.Linear(16, 4)
            def forward(self, x):
                return self.second(torch.tanh(self.first(x)))
        base = Mlp()
        base.load_state_dict(load_file("base.safetensors"))
        data = load_file("data.safetensors")
        torch.testing.assert_close(
            PeftModel.from_pretrained(base, "lora")(data["x"]), data["expected"], rtol=1e-5, atol=1e-6)
        assert "hf_causal_context" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], cwd=tmp_path, check=True)


def test_folders_of_a_language_model_serve_mixed_batches_as_plain_loras(tmp_path):
    """What vLLM and SGLang read: pairs of one rank at the paths of Linear layers, a factor of 1, and nothing else."""
    model = adapted(ARCHITECTURES["llama"].build(), target_modules="all-linear", alpha=3)
    contexts = {"thick": "thick", "mixed": "thick=0.5+slant=-2", "plain": ""}
    for name, context in contexts.items():
        folder = save_baked(model, context, tmp_path / name)
        assert {path.name for path in folder.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
        config = json.loads((folder / "adapter_config.json").read_text())
        weights = load_file(folder / "adapter_model.safetensors")
        assert config["peft_type"] == "LORA"
        assert config["r"] == config["lora_alpha"]
        assert config["bias"] == "none"
        for unsupported in ("modules_to_save", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern"):
            assert not config[unsupported]
        for key, weight in weights.items():
            path, kind = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", key).groups()
            assert isinstance(model.get_base_model().get_submodule(path).get_base_layer(), nn.Linear)
            assert weight.shape["AB".index(kind)] == config["r"]
        assert {key.removeprefix("base_model.model.").partition(".lora_")[0] for key in weights} == set(
            config["target_modules"]
        )
    plain = PeftModel.from_pretrained(ARCHITECTURES["llama"].build(), tmp_path / "thick", adapter_name="thick").eval()
    for name in ("mixed", "plain"):
        plain.load_adapter(tmp_path / name, name)
    ids = torch.randint(3, 60, (6, 5), generator=torch.Generator().manual_seed(0))
    names = ["plain", "thick", "mixed"] * 2
    torch.testing.assert_close(
        plain(input_ids=ids, adapter_names=names).logits,
        model(input_ids=ids, context=[contexts[name] for name in names]).logits,
        rtol=1e-4,
        atol=1e-5,
    )


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="cannot be baked or merged: its mechanism is not linear"):
        bake(adapted(expressive_depth=1), "thick")
    with pytest.raises(ValueError, match="has no causal context adapter 'other'. It has: \\['default'\\]"):
        bake(adapted(), "thick", adapter_name="other")
    with pytest.raises(ValueError, match="Unknown concept 'dark'"):
        bake(adapted(), "dark")
    for kwargs, message in (
        ({"dilation": 2}, "has dilation=\\(2, 2\\), which PEFT's LoRA ignores.*or merge the context"),
        ({"padding_mode": "reflect", "padding": 1}, "has padding_mode=reflect"),
        ({"groups": 2}, "has groups=2.*Keep the adapter\\.$"),
    ):
        model = adapted(nn.Sequential(nn.Conv2d(2, 4, 3, **kwargs)), target_modules=["0"])
        with pytest.raises(ValueError, match=message):
            bake(model, "thick")


def test_a_folder_is_complete_or_absent(tmp_path, monkeypatch):
    model = adapted()
    save_baked(model, "thick", tmp_path / "lora")
    with pytest.raises(FileExistsError, match="exists and is not empty"):
        save_baked(model, "thick", tmp_path / "lora")

    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_baked(model, "thick", tmp_path / "other")
    assert [p.name for p in tmp_path.iterdir()] == ["lora"]


def test_effects_are_the_sizes_of_paths_through_the_layer():
    for variant in LINEAR:
        model = adapted(**VARIANTS[variant], alpha=2, target_modules=["second"])
        effects = causal_effects(model)
        assert effects.layers == ("second",)
        assert effects.observational.shape == effects.interventional.shape == (1, 3, 3)
        layer = model.get_base_model().second
        down = layer.causal_context_down["default"].weight.detach()[4:].view(3, 4, 16)  # after the observational part
        up = layer.causal_context_up["default"].weight.detach()[:, 4:].view(4, 3, 4)
        for read, masks in ((effects.observational, torch.zeros(3, 3)), (effects.interventional, torch.eye(3))):
            for j in range(3):
                mixing = layer.matrix("default", masks[j : j + 1]).detach()[4:, 4:].view(3, 4, 3, 4)
                for i in range(3):
                    size = (0.5 * up[:, i] @ mixing[i, :, j] @ down[j]).norm()
                    torch.testing.assert_close(read[0, i, j], size, rtol=1e-4, atol=1e-6)


def test_effects_do_not_depend_on_the_gauge():
    model = adapted(mechanism="reduced", target_modules=["second"])
    before = causal_effects(model).observational
    layer = model.get_base_model().second
    with torch.no_grad():  # scale one concept's coordinates and undo it everywhere else
        layer.causal_context_down["default"].weight[4:8] *= 3  # after the observational part
        layer.causal_context_up["default"].weight[:, 4:8] /= 3
        for matrix in (layer.causal("default").observational, layer.causal("default").interventional):
            matrix[:4] *= 3
            matrix[:, :4] /= 3
    torch.testing.assert_close(causal_effects(model).observational, before)


def test_independent_concepts_have_no_effect_on_each_other(tmp_path):
    effects = causal_effects(adapted(gpt2()))
    assert effects.layers == ("transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_attn")
    assert (effects.observational == 0).all()
    off_diagonal = ~torch.eye(3, dtype=torch.bool)
    assert (effects.interventional[:, off_diagonal] == 0).all()
    assert (effects.interventional.diagonal(dim1=1, dim2=2) > 0).all()
    torch.testing.assert_close(effects.mean()[1], effects.interventional.mean(0))
    pytest.importorskip("matplotlib")
    effects.plot(tmp_path / "effects.png")
    assert (tmp_path / "effects.png").stat().st_size > 10_000


def test_effects_refuse_what_has_none():
    with pytest.raises(ValueError, match="is not linear"):
        causal_effects(adapted(expressive_depth=1))
    with pytest.raises(ValueError, match="no causal context adapter 'other'"):
        causal_effects(adapted(), adapter_name="other")
