"""Modules that a model never calls: an adapter on them would act in part only, so it is refused by name."""

import itertools

import diffusers
import pytest
import torch
import transformers
from diffusers.models.downsampling import FirDownsample2D
from diffusers.models.embeddings import HunyuanDiTAttentionPool
from peft import PeftModel, get_peft_model
from torch import nn

from hf_causal_context import CausalContextConfig, intervene, load_context_adapter, unload_context_adapter
from hf_causal_context.training.loop.processes import make_accelerator
from hf_causal_context.training.loop.trainer import fit
from hf_causal_context.training.loop.untrained import Untrained
from hf_causal_context.training.optimization_arguments import OptimizationArguments

from ..adapter.small import CONCEPTS, VARIANTS
from ..architectures import ARCHITECTURES, LLAMA
from ..training.tiny_pipelines import PIPELINES

PROJECTIONS = ["to_q", "to_k", "to_v", "to_out.0"]
MOE = {**LLAMA, "num_experts_per_tok": 2}
QWEN3_MOE = {**MOE, "num_experts": 4, "moe_intermediate_size": 16, "decoder_sparse_step": 1, "mlp_only_layers": [0]}
HYBRID = {**LLAMA, "num_hidden_layers": 1}
MAMBA = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}


def config(targets, **settings):
    settings = {"concepts": ("thick", "slant"), "init_weights": False, **settings}
    return CausalContextConfig(target_modules=targets, **settings)


def attach(model, targets, **settings):
    torch.manual_seed(1)
    return get_peft_model(model, config(targets, **settings)).eval()


def adapted_paths(model):
    return {name.removesuffix(".base_layer") for name, _ in model.named_modules() if name.endswith(".base_layer")}


class TestFusedProjections:
    @pytest.mark.parametrize("name", ["stable_diffusion", "stable_diffusion_3", "flux", "wan"])
    def test_fused_before_the_adapter(self, name):
        model = ARCHITECTURES[name].build() if name in ARCHITECTURES else _denoiser(PIPELINES[name]())
        model.fuse_qkv_projections()
        with pytest.raises(ValueError, match=r"'.*to_[kqv]', are fused with others.* unfuse_qkv_projections\(\) of"):
            attach(model, PROJECTIONS)
        assert not adapted_paths(model)

    @pytest.mark.parametrize("name", ["unet2d_condition", "sd3", "flux", "wan"])
    def test_fused_after_the_adapter(self, name):
        architecture = ARCHITECTURES[name]
        model, inputs = architecture.build(), architecture.inputs(2)
        attach(model, PROJECTIONS)
        with intervene(model, "thick"):
            before = architecture.output(model(**inputs))
        with pytest.raises(
            ValueError, match=r"of the projections carry an adapter, such as '.*to_q'.*Leave them apart"
        ):
            model.fuse_qkv_projections()
        with intervene(model, "thick"):
            assert torch.equal(architecture.output(model(**inputs)), before)

    def test_a_pipeline_refuses_as_well_until_the_adapter_is_off(self, tmp_path):
        attach(PIPELINES["stable_diffusion"]().unet, PROJECTIONS).save_pretrained(tmp_path)
        pipe = PIPELINES["stable_diffusion"]()
        load_context_adapter(pipe, tmp_path)
        with pytest.raises(ValueError, match="projections carry an adapter"):
            pipe.fuse_qkv_projections()
        unload_context_adapter(pipe)
        pipe.fuse_qkv_projections()
        with pytest.raises(ValueError, match="are fused with others"):
            load_context_adapter(pipe, tmp_path)
        pipe.unfuse_qkv_projections()
        load_context_adapter(pipe, tmp_path)

    def test_they_are_fused_where_the_adapter_was_deleted(self):
        architecture = ARCHITECTURES["unet2d_condition"]
        model, inputs = architecture.build(), architecture.inputs(2)
        base = architecture.output(model(**inputs))
        attach(model, PROJECTIONS)
        model._hf_peft_config_loaded = True  # as adapters of a pipeline are loaded
        model.delete_adapters("default")
        model.fuse_qkv_projections()
        torch.testing.assert_close(architecture.output(model(**inputs)), base, rtol=1e-4, atol=1e-5)

    def test_the_query_of_a_fused_cross_attention_is_still_called(self):
        architecture = ARCHITECTURES["unet2d_condition"]
        model, inputs = architecture.build(), architecture.inputs(2)
        model.fuse_qkv_projections()
        base = architecture.output(model(**inputs))
        attach(model, ["attn2.to_q"])
        with intervene(model, "thick"):
            assert (architecture.output(model(**inputs)) - base).abs().max() > 1e-3
        assert {path.rpartition(".")[2] for path in adapted_paths(model)} == {"to_q"}

    def test_a_context_that_is_merged_for_good_can_be_fused(self):
        architecture = ARCHITECTURES["unet2d_condition"]
        inputs, peft_model = architecture.inputs(2), attach(architecture.build(), PROJECTIONS)
        expected = architecture.output(peft_model(**inputs, context="thick"))
        with intervene(peft_model, "thick"):
            model = peft_model.merge_and_unload()
        model.fuse_qkv_projections()
        torch.testing.assert_close(architecture.output(model(**inputs)), expected, rtol=1e-4, atol=1e-5)


def _denoiser(pipe):
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


class TestWeightsThatAreOnlyRead:
    @pytest.mark.parametrize(
        ("build", "name"),
        [
            (lambda: transformers.MambaForCausalLM(transformers.MambaConfig(**MAMBA)), "conv1d"),
            (lambda: transformers.MambaForCausalLM(transformers.MambaConfig(**MAMBA)), "dt_proj"),
            (lambda: transformers.FalconMambaForCausalLM(transformers.FalconMambaConfig(**MAMBA)), "dt_proj"),
            (lambda: transformers.Mamba2ForCausalLM(_mamba2()), "conv1d"),
            (lambda: transformers.Lfm2ForCausalLM(transformers.Lfm2Config(**HYBRID, full_attn_idxs=[])), "conv.conv"),
        ],
    )
    def test_they_are_refused_by_name(self, build, name):
        model, leaf = build(), name.rpartition(".")[2]
        with pytest.raises(
            ValueError, match=rf"computes with the weight of '.*\.{name}' and does.* Leave out '{leaf}'"
        ):
            attach(model, ["in_proj", name])
        assert not adapted_paths(model)

    @pytest.mark.parametrize(
        ("build", "names"),
        [
            (lambda: transformers.WavLMModel(_wavlm()), ["q_proj", "v_proj"]),
            (lambda: HunyuanDiTAttentionPool(4, 8, 2), ["q_proj", "c_proj"]),
            (lambda: FirDownsample2D(4, use_conv=True), ["Conv2d_0"]),
        ],
    )
    def test_so_are_those_that_a_function_of_torch_gets(self, build, names):
        with pytest.raises(ValueError, match=rf"computes with the weight of '.*{names[0]}'"):
            attach(build(), names)

    def test_the_fast_path_of_torchs_encoder_is_to_be_switched_off(self):
        torch.manual_seed(0)
        layer, x = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval(), torch.randn(2, 5, 16)
        with pytest.raises(ValueError, match=r"of nn.TransformerEncoderLayer.*set_fastpath_enabled\(False\) first"):
            attach(torch.nn.TransformerEncoder(layer, 1), ["linear1"])
        enabled = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            model = attach(torch.nn.TransformerEncoder(layer, 1), ["linear1"])
            with torch.no_grad():
                assert not torch.equal(model(x, context="thick"), model(x))
        finally:
            torch.backends.mha.set_fastpath_enabled(enabled)

    @pytest.mark.parametrize("name", ["in_proj", "x_proj", "out_proj"])
    def test_what_mamba_calls_acts(self, name):
        torch.manual_seed(0)
        model = attach(transformers.MambaForCausalLM(transformers.MambaConfig(**MAMBA)), [name])
        tokens = torch.arange(3, 13).view(2, 5)
        assert (model(tokens, context="thick").logits - model(tokens).logits).abs().max() > 1e-4

    def test_all_linear_leaves_them_out(self):
        model = attach(transformers.MambaForCausalLM(transformers.MambaConfig(**MAMBA)), "all-linear")
        assert {path.rpartition(".")[2] for path in adapted_paths(model)} == {"in_proj", "x_proj", "out_proj"}

    def test_all_linear_leaves_out_the_output_of_torchs_attention(self):
        model = attach(nn.TransformerEncoderLayer(8, 2, 16), "all-linear")
        assert adapted_paths(model) == {"base_model.model.linear1", "base_model.model.linear2"}

    def test_an_adapter_that_was_stored_with_them_loads(self, tmp_path, monkeypatch):
        """It acts as it did in its training, in which they had no effect."""
        build = lambda: transformers.MambaForCausalLM(transformers.MambaConfig(**MAMBA))  # noqa: E731
        monkeypatch.setattr("hf_causal_context.adapter.model.check_targets", lambda *_: None)
        attach(build(), ["in_proj", "dt_proj", "gone"]).save_pretrained(tmp_path)
        monkeypatch.undo()
        model = PeftModel.from_pretrained(build(), tmp_path)
        assert {path.rpartition(".")[2] for path in adapted_paths(model)} == {"in_proj", "dt_proj"}


def _wavlm():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    convolutions = {"conv_dim": [8, 8], "conv_stride": [2, 2], "conv_kernel": [2, 2]}
    return transformers.WavLMConfig(**sizes, **convolutions, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2)


def _mamba2():
    return transformers.Mamba2Config(**MAMBA, num_heads=4, head_dim=16, n_groups=1, expand=2)


class TestTargetsThatMatchNothing:
    def test_names_of_experts_beside_names_that_match(self):
        model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**MOE, num_local_experts=4))
        with pytest.raises(
            ValueError,
            match=r"matches 'w1' of target_modules, 'w3' of target_modules\. MixtralForCausalLM holds its experts as "
            r"parameters.*Candidates: .*'q_proj'",
        ):
            attach(model, ["q_proj", "w1", "w3"])
        assert not adapted_paths(model)

    @pytest.mark.parametrize("targets", [["q_proj", "down_proj"], r".*\.(q_proj|down_proj)", ["gate_proj"]])
    def test_names_that_dense_layers_share_with_experts(self, targets):
        model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**QWEN3_MOE))
        with pytest.raises(
            ValueError, match=r"names experts.* such as 'model.layers.1.mlp.experts.\w+'.* exclude_modules=\['experts"
        ):
            attach(model, targets)
        assert not adapted_paths(model)

    def test_the_way_that_the_message_names(self):
        model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**QWEN3_MOE))
        attach(model, ["down_proj"], exclude_modules=["experts.down_proj"])
        assert adapted_paths(model) == {"model.layers.0.mlp.down_proj"}

    def test_names_and_layers(self):
        model = ARCHITECTURES["llama"].build()
        with pytest.raises(
            ValueError, match="matches 'v_pro' of target_modules. Correct it, or leave it out. Candidat"
        ):
            attach(model, ["q_proj", "v_pro"])
        with pytest.raises(ValueError, match="matches 7 of layers_to_transform. Correct it"):
            attach(model, ["q_proj"], layers_to_transform=[1, 7])
        attach(model, ["q_proj"], layers_to_transform=1)
        assert adapted_paths(model) == {"model.layers.1.self_attn.q_proj"}

    @pytest.mark.parametrize("name", ARCHITECTURES)
    def test_defaults_match_everywhere(self, name):
        assert adapted_paths(attach(ARCHITECTURES[name].build(), None))


class TestTraining:
    @pytest.fixture
    def run(self, tmp_path, monkeypatch):
        """A function: train an adapted model for some steps on batches that `draw` makes -> the printed lines."""
        monkeypatch.setattr("torch.accelerator.is_available", lambda: False)

        def call(model, draw, steps=2, accumulation=1):
            arguments = OptimizationArguments(
                output_dir=str(tmp_path / "out"), max_train_steps=steps, gradient_accumulation_steps=accumulation
            )
            batches = lambda first: (draw(number) for number in itertools.count(first))  # noqa: E731

            def objective(model, batch):
                output = model(**batch, context=["thick", ()])
                return output[0].flatten(1).float().square().mean(1)

            return fit(make_accelerator(arguments), model, objective, batches, arguments, steps)

        return call

    def test_modules_that_are_never_called_are_named_at_the_first_step(self, run):
        architecture = ARCHITECTURES["unet2d_condition"]
        model = architecture.build()
        peft_model = attach(model, PROJECTIONS)
        for attention in [m for m in model.modules() if isinstance(m, diffusers.models.attention_processor.Attention)]:
            attention.fuse_projections()
        model.set_attn_processor(diffusers.models.attention_processor.FusedAttnProcessor2_0())
        message = r"^Step 1: 20 adapted modules, such as 'down.*attn1.to_q', got no gradient, nor did any other.* Leave"
        with pytest.raises(ValueError, match=message):
            run(peft_model, lambda number: architecture.inputs(2))

    def test_a_vision_tower_without_images(self, run):
        tokens = ARCHITECTURES["llama"].inputs
        peft_model = attach(ARCHITECTURES["llava"].build(), ["q_proj"])
        with pytest.raises(
            ValueError, match=r"2 adapted modules, such as 'model.vision_tower.*layers.0.*q_proj', got no"
        ):
            run(peft_model, lambda number: tokens(2))

    def test_experts_without_tokens_are_no_fault_until_the_end(self, run, capsys):
        torch.manual_seed(0)
        peft_model = attach(_Experts(), ["gate", "up"])
        run(peft_model, lambda number: {"x": torch.randn(2, 4), "chosen": [number % 2, 2]}, steps=2)
        assert "1 adapted modules, such as 'experts.3.up', got no gradient in any of 2 steps" in capsys.readouterr().out

    def test_gradients_are_looked_at_when_all_of_a_step_are_there(self, run, capsys):
        peft_model = attach(_Experts(), ["gate", "experts.1.up", "experts.0.up"])
        run(peft_model, lambda number: {"x": torch.randn(2, 4), "chosen": [number % 2]}, steps=1, accumulation=2)
        assert "got no gradient" not in capsys.readouterr().out

    @pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
    @pytest.mark.parametrize("concepts", [("thick",), CONCEPTS])
    def test_every_tensor_of_a_module_that_is_called_has_a_gradient(self, run, capsys, settings, concepts):
        settings = {key: concepts if key == "concept_order" else value for key, value in settings.items()}
        peft_model = attach(_Experts(), ["gate"], concepts=concepts, **settings)
        run(peft_model, lambda number: {"x": torch.randn(2, 4), "chosen": [0]}, steps=1)
        assert "got no gradient" not in capsys.readouterr().out

    def test_among_several_processes_every_module_must_take_part_in_every_step(self):
        peft_model = attach(_Experts(), ["gate", "up"])
        untrained = Untrained(peft_model, num_processes=2)
        for chosen, message in (([0, 1, 2, 3], None), ([0, 1, 2], "Step 2: 1 adapted modules, such as 'experts.3.up'")):
            peft_model.zero_grad()
            peft_model(torch.randn(2, 4), chosen, context="thick")[0].sum().backward()
            if message is None:
                untrained.look(1)
            else:
                with pytest.raises(
                    ValueError, match=f"{message}, got no.* in this process. Among several processes all"
                ):
                    untrained.look(2)


class _Experts(nn.Module):
    """Experts that are modules, as of older models and of custom code: those that are not chosen are not called."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(4, 4)
        self.experts = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(4, 4)}) for _ in range(4))

    def forward(self, x, chosen):
        x = self.gate(x)
        return (sum(self.experts[number]["up"](x) for number in chosen),)


class _TwoPlaces(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(10, 10)
        self.second = self.first

    def forward(self, x):
        return self.second(self.first(x))


def test_a_module_in_two_places_is_refused():
    with pytest.raises(ValueError, match="one module in two places, 'first', 'second'"):
        attach(_TwoPlaces(), ["first"])


@torch.no_grad()
def test_a_layer_that_runs_several_times_is_adapted_in_all_of_them():
    layer = nn.Sequential(nn.Linear(10, 10))
    model = attach(nn.Sequential(layer, layer), ["0.0"])
    x = torch.randn(3, 10)
    with intervene(model, "thick"):
        assert torch.equal(model(x), layer(layer(x)))
        assert not torch.equal(layer(x), layer[0].base_layer(x))
