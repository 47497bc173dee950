"""Attach, save, load, merge, disable, scale: every verb known from LoRA."""

import copy

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import CogVideoXSafeConv3d
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d
from peft import (
    AutoPeftModelForCausalLM,
    PeftModel,
    get_peft_model,
    inject_adapter_in_model,
    load_peft_weights,
    set_peft_model_state_dict,
)
from peft.utils.error import NoMatchingPeftModuleError
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, GitConfig, GitForCausalLM, GPT2LMHeadModel
from transformers.models.parakeet.modeling_parakeet import ParakeetEncoderCTCHead

from hf_causal_context import intervene
from hf_causal_context.adapter.layer import CausalContextLayer

from .small import CONCEPTS, MIXED, VARIANTS, Mlp, adapted, config, gpt2, inputs


class Convolutions(nn.Module):
    """Every kind of convolution, with odd settings."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one = nn.Conv1d(2, 4, 3, padding="same")
        self.two = nn.Conv2d(4, 6, (3, 2), stride=2, padding=1, dilation=(2, 1), padding_mode="reflect")
        self.three = nn.Conv3d(6, 6, 2, padding=1, bias=False)
        self.grouped = nn.Conv2d(6, 6, 3, groups=3)

    def forward(self, x):
        x = self.one(x)
        x = self.two(x.unflatten(-1, (8, 8)))
        x = self.three(x[..., None])[..., 0]
        return self.grouped(x)


CONVOLUTIONS = ["one", "two", "three"]
X_CONV = torch.randn(4, 2, 64, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("variant", VARIANTS)
def test_fresh_and_disabled_adapters_are_the_base_bit_for_bit(variant):
    x = inputs()
    base = Mlp()(x)
    model = adapted(**VARIANTS[variant], init_weights=True)
    assert torch.equal(model(x, context=MIXED), base)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter)) if parameter.requires_grad else None
    assert not torch.equal(model(x, context=MIXED), base)
    with model.disable_adapter():
        assert torch.equal(model(x, context=MIXED), base)
        assert torch.equal(model(x), base)


@pytest.mark.parametrize("variant", VARIANTS)
def test_exactly_the_adapter_trains(variant):
    model = adapted(**VARIANTS[variant]).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    # Strength 0.5: half-way between observational and intervened, so that every parameter has an influence.
    model(inputs(), context={"thick": 0.5, "slant": 0.5, "size": 0.5}).square().sum().backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert ("causal_context_" in name) == parameter.requires_grad, name
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name


@pytest.mark.parametrize("context", [(), "thick", "thick+slant+size"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_gets_a_gradient_in_every_context(variant, context):
    # DistributedDataParallel refuses parameters without one.
    model = adapted(**VARIANTS[variant]).train()
    model(inputs(), context=context).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("variant", VARIANTS)
def test_save_and_load(variant, tmp_path):
    x, model = inputs(), adapted(**VARIANTS[variant])
    expected = model(x, context=MIXED)
    model.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    loaded = PeftModel.from_pretrained(Mlp(), tmp_path)
    assert torch.equal(loaded(x, context=MIXED), expected)
    assert not any(p.requires_grad for p in loaded.parameters())
    assert torch.equal(PeftModel.from_pretrained(Mlp(), tmp_path, low_cpu_mem_usage=True)(x, context=MIXED), expected)
    other_name = PeftModel.from_pretrained(Mlp(), tmp_path, adapter_name="other")
    assert torch.equal(other_name(x, context=MIXED), expected)
    injected = inject_adapter_in_model(loaded.peft_config["default"], Mlp()).eval()
    result = set_peft_model_state_dict(injected, load_peft_weights(tmp_path))
    assert not result.unexpected_keys
    assert torch.equal(injected(x, context=MIXED), expected)
    with intervene(injected, MIXED):
        assert torch.equal(injected(x), expected)


def test_load_through_transformers(tmp_path):
    ids = torch.arange(12).view(4, 3)
    gpt2().save_pretrained(tmp_path / "base")
    base = GPT2LMHeadModel.from_pretrained(tmp_path / "base")
    model = adapted(base, task_type="CAUSAL_LM", mechanism="reduced")
    expected = model(ids, context=MIXED).logits
    model.save_pretrained(tmp_path / "adapter")
    auto = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(auto(ids, context=MIXED).logits, expected)
    plain = gpt2()
    plain.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(plain(ids, context=MIXED).logits, expected)
    with intervene(plain, MIXED):
        assert torch.equal(plain(ids).logits, expected)


@pytest.mark.parametrize("safe_merge", [True, False])
@pytest.mark.parametrize("variant", [name for name in VARIANTS if "expressive" not in name])
def test_merge_and_unmerge(variant, safe_merge):
    x, model = inputs(), adapted(**VARIANTS[variant], alpha=3)
    expected, base = model(x, context="thick+slant"), Mlp()(x)
    with intervene(model, "thick+slant"):
        model.merge_adapter(safe_merge=safe_merge)
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="merged for the context 'slant\\+thick'; another one would change nothing"):
        model(x, context="thick")
    model.unmerge_adapter()
    with intervene(model, "thick"):
        with intervene(model, "slant"):
            model.merge_adapter()
        with pytest.raises(ValueError, match="merged for the context 'slant'"):
            model(x)
    model.unmerge_adapter()
    torch.testing.assert_close(model(x, context="thick+slant"), expected, rtol=1e-5, atol=1e-5)
    with intervene(model, "thick+slant"):
        merged = model.merge_and_unload(safe_merge=safe_merge)
    torch.testing.assert_close(merged(x), expected, rtol=1e-5, atol=1e-5)
    assert not torch.equal(merged(x), base)
    assert not any(isinstance(m, CausalContextLayer) for m in merged.modules())
    assert not merged._forward_pre_hooks
    assert not merged._forward_hooks


class TestMergedBesideAnAdapterThatIsNot:
    @staticmethod
    def both(first, second):
        """Adapters "default" and "other", on these modules, both active."""
        model = adapted(target_modules=[first])
        model.add_adapter("other", config(("bright", "round"), target_modules=[second]))
        model.base_model.set_adapter(["default", "other"])
        return model.eval()

    def test_a_context_for_it_is_refused_on_the_same_module(self):
        model, x = self.both("first", "first"), inputs()
        with intervene(model, {"thick": 1, "bright": 2}):
            expected = model(x)
            model.merge_adapter(["default"])
            with pytest.raises(ValueError, match="'other', which does not act beside .*: 'default'"):
                model(x)
            with (
                intervene(model, "bright=2", adapter_name="other"),
                pytest.warns(UserWarning, match="additionally merging other"),
            ):
                model.merge_adapter(["other"])
            torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
        model.unmerge_adapter()
        with intervene(model, "thick"):
            expected = model(x)
            model.merge_adapter(["default"])
            torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("merged", ["default", "other"])
    def test_on_another_module_it_acts_and_the_merged_one_keeps_its_context(self, merged):
        model, x = self.both("first", "second"), inputs()
        context = {"thick": 1, "bright": 2}
        with intervene(model, context):
            expected = model(x)
            model.merge_adapter([merged])
            torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
        with pytest.raises(ValueError, match=f"'{merged}' is merged for the context .*; another"):
            model(x, context={"slant": 1, "round": 1})
        model.unmerge_adapter()
        torch.testing.assert_close(model(x, context=context), expected, rtol=1e-5, atol=1e-5)
        model(x, context={"slant": 1, "round": 1})


class TestAMergedContextAndAdaptersSwitchedOff:
    @pytest.fixture
    def merged(self):
        model = adapted()
        with intervene(model, "thick+slant"):
            model.merge_adapter()
        return model

    def test_it_is_back_when_they_are_on_again(self, merged):
        x, expected = inputs(), adapted()(inputs(), context="thick+slant")
        for _ in range(2):
            with merged.disable_adapter():
                torch.testing.assert_close(merged(x), Mlp()(x))
            torch.testing.assert_close(merged(x), expected)
        with pytest.raises(ValueError, match="merged for the context 'slant\\+thick'"):
            merged(x, context="thick")
        merged.unmerge_adapter()
        torch.testing.assert_close(merged(x), Mlp()(x))

    def test_it_is_not_if_it_was_unmerged_or_deleted_meanwhile(self, merged):
        x, base = inputs(), Mlp()(inputs())
        with merged.disable_adapter():
            merged(x)
            with pytest.warns(UserWarning, match="Already unmerged"):
                merged.unmerge_adapter()
        torch.testing.assert_close(merged(x), base)
        merged.add_adapter("other", config(target_modules=["first"]))
        with intervene(merged, "thick"):
            merged.merge_adapter()
        with merged.disable_adapter():
            merged(x)
            with pytest.warns(UserWarning, match="default was active which is now deleted"):
                merged.delete_adapter("default")
        torch.testing.assert_close(merged(x), base)


@pytest.mark.parametrize("mechanism", ["independent", "reduced", "structural"])
def test_convolutions(mechanism):
    base = Convolutions()
    expected_base = base(X_CONV)
    model = adapted(base, mechanism=mechanism, target_modules=CONVOLUTIONS)
    together = model(X_CONV, context=MIXED)
    apart = torch.cat([model(X_CONV[i : i + 1], context=c) for i, c in enumerate(MIXED)])
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-5)
    assert (together - expected_base).abs().max() > 1e-2
    expected = model(X_CONV, context={"thick": 1, "size": -0.5})
    torch.testing.assert_close(
        model(X_CONV[0:1], context={"thick": 1, "size": -0.5}), expected[:1], rtol=1e-5, atol=1e-5
    )
    with intervene(model, {"thick": 1, "size": -0.5}):
        merged = model.merge_and_unload()
    torch.testing.assert_close(merged(X_CONV), expected, rtol=1e-4, atol=1e-5)


def test_unbatched_inputs():
    model = adapted(nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(-3), nn.Linear(12, 5)), target_modules=["0", "2"])
    x = torch.randn(2, 4, 4)
    torch.testing.assert_close(model(x, context="thick"), model(x[None], context="thick")[0])


def test_grouped_convolutions_work_but_cannot_be_merged():
    model = adapted(Convolutions(), target_modules=["grouped"])
    together = model(X_CONV, context=MIXED)
    torch.testing.assert_close(together[3:], model(X_CONV[3:], context="thick+slant"))
    assert not torch.equal(together[3], model(X_CONV)[3])
    with (
        pytest.raises(ValueError, match="cannot be merged into a Conv2d|cannot be baked or merged: .* 3 groups"),
        intervene(model, "thick"),
    ):
        model.merge_adapter()


def test_merging_refuses_what_it_cannot_do():
    model, x = adapted(expressive_depth=1), inputs()
    with intervene(model, "thick"), pytest.raises(ValueError, match="not linear \\(expressive_depth > 0\\)"):
        model.merge_adapter()
    model = adapted()
    observational = model(x, context=())
    with intervene(model, MIXED), pytest.raises(ValueError, match="Only one context can be merged.* 4 different"):
        model.merge_adapter()
    with pytest.warns(UserWarning, match="Merging without a context merges the observational one"):
        model.merge_adapter()
    torch.testing.assert_close(model(x), observational)
    model.unmerge_adapter()
    with pytest.raises(ValueError, match="No context is set for merging"):
        model.train().merge_adapter()
    model.eval()
    model.get_base_model().first.causal_context_up["default"].weight.data[0, 0] = float("nan")
    with intervene(model, "thick"), pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)


def test_several_adapters_add_set_delete_and_unload():
    x, model = inputs(), adapted()
    expected = model(x, context="thick")
    model.add_adapter("other", config(concepts=("dark",), concept_rank=2, target_modules=["first"]))
    assert torch.equal(model(x, context="thick"), expected)
    model.set_adapter("other")
    other = model(x, context="dark")
    assert not torch.equal(other, expected)
    model.delete_adapter("default")
    assert torch.equal(model(x, context="dark"), other)
    assert not any("default" in name for name in model.state_dict())
    assert torch.equal(model.unload()(x), Mlp()(x))


def test_scaling_as_diffusers_does_it():
    x, model = inputs(), adapted(alpha=2.0, target_modules=["second"])
    base, full = Mlp()(x), model(x, context="thick")
    layer = model.get_base_model().second
    layer.scale_layer(0.5)
    torch.testing.assert_close(model(x, context="thick") - base, (full - base) / 2)
    layer.unscale_layer(0.5)
    assert torch.equal(model(x, context="thick"), full)
    layer.set_scale("default", 2)
    torch.testing.assert_close(model(x, context="thick") - base, (full - base) * 2)
    layer.unscale_layer()
    assert torch.equal(model(x, context="thick"), full)


def test_what_was_merged_comes_out_whole_whatever_the_scale_is_by_then():
    x, model = inputs(), adapted(alpha=2.0)
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    with intervene(model, "thick"):
        model.merge_adapter()
    for layer in (model.get_base_model().first, model.get_base_model().second):
        layer.set_scale("default", 0.25)
    model.unmerge_adapter()
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weight, weights[name])
    with intervene(model, "thick"):
        expected = model(x)
        model.merge_adapter()
        torch.testing.assert_close(model(x), expected)


def test_effects_are_linear_in_the_strength():
    model, x = adapted(target_modules=["second"]), inputs()
    base = model(x, context=())
    one = model(x, context="thick") - base
    for strength in (-1.0, 0.25, 1.5):
        torch.testing.assert_close(model(x, context={"thick": strength}) - base, strength * one, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(model(x, context="thick+size") - base, one + model(x, context="size") - base)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_low_precision(variant, dtype):
    x, model = inputs(), adapted(**VARIANTS[variant])
    expected = model(x, context=MIXED)
    tolerance = {"rtol": 0.05, "atol": 0.1}
    with torch.autocast("cpu", dtype):
        output = model(x, context=MIXED)
    assert output.dtype == dtype
    torch.testing.assert_close(output.float(), expected, **tolerance)
    # a base in low precision keeps the adapter in float32, unless all is moved
    low = get_peft_model(Mlp().to(dtype), copy.deepcopy(model.peft_config["default"])).eval()
    low.load_state_dict({k: v for k, v in model.state_dict().items() if "causal_context" in k}, strict=False)
    assert low.get_base_model().first.causal_context_up["default"].weight.dtype == torch.float32
    for moved in (low, copy.deepcopy(low).to(dtype)):
        output = moved(x.to(dtype), context=MIXED)
        assert output.dtype == dtype
        torch.testing.assert_close(output.float(), expected, **tolerance)
    assert model.double()(x.double(), context=MIXED).dtype == torch.float64


@pytest.mark.parametrize("num_concepts", [1, 2, 6, 64])
@pytest.mark.parametrize("mechanism", ["independent", "reduced", "structural"])
def test_numbers_of_concepts(num_concepts, mechanism):
    names = tuple(f"c{k}" for k in range(num_concepts))
    model, x = adapted(concepts=names, mechanism=mechanism, concept_rank=2, init_weights=True), inputs()
    for layer in (model.get_base_model().first, model.get_base_model().second):
        nn.init.normal_(layer.causal_context_up["default"].weight, std=0.1)
    contexts = [(), names[:1], names[-1:], names]
    together = model(x, context=contexts)
    apart = torch.cat([model(x[i : i + 1], context=c) for i, c in enumerate(contexts)])
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-5)


def test_quantized_base(tmp_path):
    torchao = pytest.importorskip("torchao.quantization")
    base = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32))
    torchao.quantize_(base, torchao.Int8WeightOnlyConfig())
    x = torch.randn(4, 32)
    quantized = base(x)
    model = get_peft_model(base, config(target_modules=["0", "2"], init_weights=True))
    assert torch.equal(model.eval()(x, context=MIXED), quantized)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = model.train()(x, context=MIXED).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    with torch.no_grad():
        assert torch.isfinite(model.eval()(x, context="thick+slant")).all()
    with model.disable_adapter():
        assert torch.equal(model(x), quantized)
    with intervene(model, "thick"), pytest.raises(ValueError, match="its base weight is quantized or sharded"):
        model.merge_adapter()
    model.save_pretrained(tmp_path)
    assert all("causal_context" in key for key in load_file(tmp_path / "adapter_model.safetensors"))


class TestTargets:
    def test_names_patterns_and_layers(self):
        def targeted(**kwargs):
            return adapted(gpt2(), **kwargs).targeted_module_names

        attention = ["transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_attn"]
        assert targeted() == attention  # PEFT's defaults for LoRA
        assert targeted(target_modules=["attn.c_attn"]) == attention
        assert targeted(target_modules=r".*\.1\.attn\.c_attn") == attention[1:]
        assert targeted(target_modules=["c_attn"], layers_to_transform=0) == attention[:1]
        assert targeted(target_modules=["c_attn"], layers_to_transform=[1], layers_pattern="h") == attention[1:]
        assert len(targeted(target_modules="all-linear")) == 8
        assert len(targeted(target_modules="all-linear", exclude_modules=["c_proj"])) == 4

    def test_rank_pattern_and_modules_to_save(self, tmp_path):
        model = adapted(target_modules=["first", "second"], rank_pattern={"first": 2}, alpha=8)
        first, second = model.get_base_model().first, model.get_base_model().second
        assert (first.r["default"], second.r["default"]) == (4 + 2 * len(CONCEPTS), 4 + 4 * len(CONCEPTS))
        assert (first.scaling["default"], second.scaling["default"]) == (4.0, 2.0)
        model = adapted(target_modules=["first"], modules_to_save=["second"])
        nn.init.normal_(model.get_base_model().second.modules_to_save["default"].weight)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(Mlp(), tmp_path)
        assert torch.equal(loaded(inputs(), context=MIXED), model(inputs(), context=MIXED))

    def test_no_match_lists_candidates(self):
        with pytest.raises(
            NoMatchingPeftModuleError, match=r"\{'to_q'\} not found .* Candidates: 'first' \(1\), 'second'"
        ):
            adapted(target_modules=["to_q"])

    def test_no_defaults_for_an_unknown_architecture(self):
        with pytest.raises(ValueError, match="Please specify `target_modules`.* for Mlp. Candidates: 'first'"):
            get_peft_model(Mlp(), config())

    def test_no_defaults_that_leave_out_the_part_that_writes(self):
        sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        vision = sizes | {"image_size": 8, "patch_size": 4}
        writer = GitForCausalLM(GitConfig(**sizes, vocab_size=20, vision_config=vision))
        with pytest.raises(ValueError, match="no defaults for GitForCausalLM. Candidates: .*'q_proj' .*'query'"):
            get_peft_model(writer, config())
        adapted = get_peft_model(CLIPVisionModel(CLIPVisionConfig(**vision)), config())
        assert sum(isinstance(module, CausalContextLayer) for module in adapted.modules()) == 2

    def test_unsupported_modules_are_refused_before_anything_is_wrapped(self):
        model = nn.ModuleDict({"linear": nn.Linear(4, 4), "embedding": nn.Embedding(4, 4)})
        with pytest.raises(ValueError, match="Target module 'embedding' of type Embedding is not supported"):
            get_peft_model(model, config(target_modules=["linear", "embedding"]))
        assert not any(isinstance(m, CausalContextLayer) for m in model.modules())
        attention = nn.Sequential(nn.MultiheadAttention(4, 1))
        with pytest.raises(ValueError, match="not inside nn.MultiheadAttention"):
            get_peft_model(attention, config(target_modules=["out_proj"]))

    @pytest.mark.parametrize(
        "kind", [WanCausalConv3d(4, 4, 3, padding=1), ParakeetEncoderCTCHead(4, 4, 1)], ids=["pad", "turn"]
    )
    def test_convolutions_that_pad_or_turn_their_input_are_refused(self, kind):
        model = nn.Sequential(nn.Sequential(kind))
        message = rf"'0.0' of Sequential is a {type(kind).__name__}, which pads or turns .* Leave out '0'\."
        with pytest.raises(ValueError, match=message):
            get_peft_model(model, config(target_modules=["0.0"]))
        assert not any(isinstance(m, CausalContextLayer) for m in model.modules())

    @pytest.mark.parametrize("cls", [CogVideoXSafeConv3d, nn.Conv3d])
    def test_those_that_do_as_torchs_are_adapted(self, cls):
        model = get_peft_model(nn.Sequential(cls(4, 4, 3, padding=1, dilation=2)), config(target_modules=["0"])).eval()
        x = torch.randn(1, 4, 5, 6, 7)
        assert model(x, context="thick").shape == model(x).shape
