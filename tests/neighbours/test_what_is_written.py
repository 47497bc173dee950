"""What is written is read back; what another tool would read as something else is refused, with the way that works."""

import warnings

import diffusers
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from hf_causal_context import bake, intervene, save_baked
from hf_causal_context.adapter import read_back

from ..adapter.small import Mlp, adapted, inputs
from ..architectures import ARCHITECTURES, LLAMA
from ..training.tiny_pipelines import PIPELINES
from .test_modules_never_called import PROJECTIONS, QWEN3_MOE, attach

TOKENS = torch.arange(3, 13).view(2, 5)
DENSE = {"targets": ["q_proj", "down_proj"], "exclude_modules": ["experts.down_proj"]}


def moe():
    torch.manual_seed(0)
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**QWEN3_MOE)).eval()


def llama(**settings):
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA, **settings)).eval()


def logits(model, tokens=TOKENS, **context):
    return model(tokens, **context).logits


class TestMixturesOfExperts:
    def test_a_dense_layer_beside_experts_is_refused_and_leaves_no_folder(self, tmp_path):
        model = attach(moe(), **DENSE)
        with pytest.raises(
            ValueError,
            match="what 1 modules got is lost, such as that of 'model.layers.0.mlp.down_proj'. Merge it",
        ):
            save_baked(model, "thick", tmp_path / "lora")
        assert not list(tmp_path.iterdir())

    def test_half_of_what_peft_fuses_is_refused(self, tmp_path):
        model = attach(moe(), ["gate_proj"], exclude_modules=["experts.gate_proj"])
        with pytest.raises(ValueError, match="onto a Qwen3MoeForCausalLM.*without also targeting up_proj.* Merge"):
            save_baked(model, "thick", tmp_path / "lora")

    def test_the_way_that_the_message_names(self, tmp_path):
        model = attach(moe(), **DENSE)
        expected = logits(model, context="thick")
        with intervene(model, "thick"):
            merged = model.merge_and_unload()
        merged.save_pretrained(tmp_path)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        torch.testing.assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-5)

    def test_attention_beside_experts_comes_through(self, tmp_path):
        model = attach(moe(), ["q_proj"])
        lora = PeftModel.from_pretrained(moe(), save_baked(model, "thick", tmp_path / "lora"))
        torch.testing.assert_close(logits(lora), logits(model, context="thick"), rtol=1e-4, atol=1e-5)


class TestEmbeddings:
    @pytest.mark.parametrize("tied", [False, True])
    def test_those_that_were_resized_come_along(self, tmp_path, tied):
        llama(tie_word_embeddings=tied).save_pretrained(tmp_path / "base")

        def resized(seed):
            torch.manual_seed(seed)
            model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
            model.resize_token_embeddings(70, mean_resizing=False)
            return model

        model, tokens = attach(resized(1), ["q_proj"]), torch.tensor([[3, 68, 69, 5]])
        expected = logits(model, tokens, context="thick")
        base = resized(2)
        assert (logits(base, tokens) - expected).abs().max() > 0.01  # its new rows are others
        lora = PeftModel.from_pretrained(base, save_baked(model, "thick", tmp_path / "lora"))
        torch.testing.assert_close(logits(lora, tokens), expected, rtol=1e-4, atol=1e-5)

    def test_others_stay_where_they_are(self, tmp_path):
        llama().save_pretrained(tmp_path)
        model = attach(transformers.AutoModelForCausalLM.from_pretrained(tmp_path), ["q_proj"])
        assert all(".lora_" in key for key in bake(model, "thick")[1])

    @pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings=True`")
    @pytest.mark.parametrize("call", ["merge_adapter", "merge_and_unload"])
    def test_an_output_layer_that_is_tied_to_them_is_not_merged(self, call):
        model = attach(llama(tie_word_embeddings=True), ["lm_head", "q_proj"])
        embeddings = model.get_input_embeddings().weight.clone()
        expected = logits(model, context="thick")
        with intervene(model, "thick"):
            with pytest.raises(
                ValueError, match="weight of 'lm_head' is tied: it is 'model.embed_tokens.weight' as well.*or untie"
            ):
                getattr(model, call)()
            assert torch.equal(model.get_input_embeddings().weight, embeddings)
            assert torch.equal(logits(model), expected)

    @pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings=True`")
    def test_the_ways_that_the_message_names(self, tmp_path):
        model = attach(llama(tie_word_embeddings=True), ["lm_head"])
        expected = logits(model, context="thick")
        folder = save_baked(model, "thick", tmp_path / "lora")
        lora = PeftModel.from_pretrained(llama(tie_word_embeddings=True), folder)
        torch.testing.assert_close(logits(lora), expected, rtol=1e-4, atol=1e-5)
        base = llama(tie_word_embeddings=True)
        base.lm_head.weight = nn.Parameter(base.lm_head.weight.detach().clone())
        base.config.tie_word_embeddings = False
        model = attach(base, ["lm_head"])
        with intervene(model, "thick"):
            torch.testing.assert_close(logits(model.merge_and_unload()), expected, rtol=1e-4, atol=1e-5)


class TestPipelines:
    @pytest.mark.parametrize("name", ["stable_diffusion", "stable_diffusion_xl", "stable_diffusion_3", "flux"])
    def test_load_lora_weights_reads_the_folder(self, name, tmp_path):
        def build():
            torch.manual_seed(0)
            return PIPELINES[name]()

        pipe = build()
        component = "unet" if hasattr(pipe, "unet") else "transformer"
        model = attach(getattr(pipe, component), PROJECTIONS, rank_pattern={"to_k": 2})
        folder = save_baked(model, "thick", tmp_path / "lora")
        stock = build()
        base = {key: weight.clone() for key, weight in getattr(stock, component).state_dict().items()}
        stock.load_lora_weights(folder)
        stock.fuse_lora()
        stock.unload_lora_weights()
        with intervene(model, "thick"):
            expected = model.merge_and_unload().state_dict()
        found = getattr(stock, component).state_dict()
        assert found.keys() == expected.keys()
        for key, weight in expected.items():
            torch.testing.assert_close(found[key], weight, rtol=1e-4, atol=1e-6)
        assert any((expected[key] - weight).abs().max() > 1e-3 for key, weight in base.items())

    @pytest.mark.parametrize("name", ["llama", "clip_text", "autoencoder_kl", "unet2d", "dit"])
    def test_other_models_have_no_such_file(self, name, tmp_path):
        folder = save_baked(attach(ARCHITECTURES[name].build(), None), "thick", tmp_path / "lora")
        assert {path.name for path in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}


class TestBakedLoras:
    def test_ranks_are_equal_whatever_the_adapters_are(self, tmp_path):
        """Tools that divide one alpha by the rank of a tensor then scale all modules alike."""
        model = adapted(rank_pattern={"first": 2}, mechanism="reduced")
        config, weights = bake(model, "thick")
        assert (config.rank_pattern, config.alpha_pattern) == ({}, {})
        assert {w.shape[0] for key, w in weights.items() if ".lora_A." in key} == {config.r} == {config.lora_alpha}
        x = inputs()
        for path in ("first", "second"):
            a, b = (weights[f"base_model.model.{path}.lora_{part}.weight"] for part in "AB")
            layer = model.get_submodule(f"base_model.model.{path}")
            with intervene(model, "thick"):
                torch.testing.assert_close(b @ a, layer.get_delta_weight("default"), rtol=1e-5, atol=1e-6)
        lora = PeftModel.from_pretrained(Mlp(), save_baked(model, "thick", tmp_path / "lora"))
        torch.testing.assert_close(lora(x), model(x, context="thick"), rtol=1e-5, atol=1e-6)

    def test_a_name_that_ends_others_stays_one_module(self, tmp_path):
        model = attach(ARCHITECTURES["flux"].build(), "proj_out")
        folder = save_baked(model, "thick", tmp_path / "lora")
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # PEFT warns of modules without weights
            lora = PeftModel.from_pretrained(ARCHITECTURES["flux"].build(), folder)
        assert [name for name, _ in lora.get_base_model().named_modules() if name.endswith("lora_A")] == [
            "proj_out.lora_A"
        ]

    def test_it_is_read_back_onto_a_base_that_stays_as_it_was(self, tmp_path):
        model = adapted(target_modules=["first"], modules_to_save=["second"])
        before = {name: (id(p), p.requires_grad, p.clone()) for name, p in model.named_parameters()}
        torch.manual_seed(3)
        state = torch.get_rng_state()
        save_baked(model, "thick", tmp_path / "lora")
        assert torch.equal(torch.get_rng_state(), state)
        for name, parameter in model.named_parameters():
            number, requires_grad, value = before[name]
            assert (id(parameter), parameter.requires_grad) == (number, requires_grad)
            assert torch.equal(parameter, value)

    @pytest.mark.parametrize("key", ["first.lora_B.weight", "second.weight"])
    def test_what_is_not_loaded_as_it_was_baked_is_refused(self, tmp_path, monkeypatch, key):
        model = adapted(target_modules=["first"], modules_to_save=["second"])
        original = read_back.write_adapter

        def damaged(folder, config, weights):
            original(folder, config, {name: w + (name == f"base_model.model.{key}") for name, w in weights.items()})

        monkeypatch.setattr(read_back, "write_adapter", damaged)
        with pytest.raises(ValueError, match=f"what 1 modules got is lost, such as that of '{key.partition('.')[0]}'"):
            save_baked(model, "thick", tmp_path / "lora")
        assert not list(tmp_path.iterdir())

    def test_beside_a_stock_lora_on_the_same_modules(self, tmp_path):
        """In either order, the names are those of the base."""
        expected = None
        for ours_first in (True, False):
            base = Mlp()
            style = LoraConfig(target_modules=["first", "second"], init_lora_weights=False)
            steps = [lambda: adapted(base), lambda: get_peft_model(base, style, adapter_name="style")]  # noqa: B023
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                models = [step() for step in (steps if ours_first else steps[::-1])]
            model = models[0 if ours_first else 1]
            weights = bake(model, "thick")[1]
            expected = expected or set(weights)
            assert set(weights) == expected
        assert "base_model.model.first.lora_A.weight" in expected

    def test_files_for_pipelines_hold_equal_ranks(self, tmp_path):
        torch.manual_seed(0)
        model = attach(PIPELINES["stable_diffusion"]().unet, PROJECTIONS, rank_pattern={"to_k": 2})
        assert isinstance(model.get_base_model(), diffusers.UNet2DConditionModel)
        weights = load_file(save_baked(model, "thick", tmp_path / "lora") / "pytorch_lora_weights.safetensors")
        assert {key.split(".")[0] for key in weights} == {"unet"}
        assert len({w.shape[0] for key, w in weights.items() if ".lora_A." in key}) == 1
