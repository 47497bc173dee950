"""A stock LoRA and a causal context adapter on one pipeline, in both orders: each does what it does alone."""

import copy
import gc

import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

from hf_causal_context import (
    CausalContextConfig,
    bake,
    causal_effects,
    intervene,
    load_context_adapter,
    unload_context_adapter,
)

from ..test_pipelines import ATTENTION_KWARGS, CLOSE, CONTEXTS, build, denoiser, run, write_adapter

CONTEXT = CONTEXTS[1]
ORDERS = ("style first", "style last")
pytestmark = pytest.mark.filterwarnings("ignore:.*was saved without")


def write_style(pipe, folder, rank=2):
    """A LoRA of the denoiser as diffusers' training scripts save it; the pipeline stays as it is."""
    pipe = copy.deepcopy(pipe)
    torch.manual_seed(2)
    config = LoraConfig(r=rank, init_lora_weights=False, target_modules=["to_q", "to_v", "to_out.0"])
    denoiser(pipe).add_adapter(config, "style")
    weights = get_peft_model_state_dict(denoiser(pipe), adapter_name="style")
    pipe.save_lora_weights(folder, **{f"{component(pipe)}_lora_layers": weights})
    return folder


def component(pipe):
    return "unet" if hasattr(pipe, "unet") else "transformer"


def with_style(pipe, folder):
    pipe.load_lora_weights(folder, adapter_name="style")
    return pipe


def beside(plain, style, ours, order):
    """Both on a copy of a pipeline."""
    pipe = copy.deepcopy(plain)
    if order == "style first":
        return load_context_adapter(with_style(pipe, style), ours)
    return with_style(load_context_adapter(pipe, ours), style)


def merged(plain, pipe, context):
    """A copy of a plain pipeline whose weights have a context of another pipeline's adapter, as a LoRA computes it."""
    config, weights = bake(denoiser(pipe), context)
    plain = copy.deepcopy(plain)
    lora = get_peft_model(denoiser(plain), config)
    set_peft_model_state_dict(lora, weights)
    setattr(plain, component(plain), lora.merge_and_unload())
    return plain


# HunyuanImage's pipeline loads no LoRAs.
@pytest.fixture(scope="module", params=[name for name in ATTENTION_KWARGS if name != "hunyuan_image"])
def made(request, tmp_path_factory):
    """Family, the plain pipeline, folders of a style and of an adapter, and images of the plain one and the style."""
    name = request.param
    plain = build(name)
    folder = tmp_path_factory.mktemp(name)
    style = write_style(plain, folder / "style")
    ours = write_adapter(denoiser(plain), folder / "ours")
    base, styled = run(name, plain), run(name, with_style(copy.deepcopy(plain), style))
    assert (base - styled).abs().max() > 5e-3
    return name, plain, style, ours, base, styled


@pytest.mark.parametrize("order", ORDERS)
def test_each_acts_as_it_does_alone(made, order):
    name, plain, style, ours, _, styled = made
    pipe = beside(plain, style, ours, order)
    assert torch.equal(run(name, pipe), styled)
    with intervene(pipe, CONTEXT):
        both = run(name, pipe)
    expected = run(name, with_style(merged(plain, pipe, CONTEXT), style))
    torch.testing.assert_close(both, expected, **CLOSE)
    assert (both - styled).abs().max() > 5e-3
    assert torch.equal(run(name, pipe, **{ATTENTION_KWARGS[name]: {"context": CONTEXT}}), both)


@pytest.mark.parametrize("order", ORDERS)
def test_unloading_takes_off_one_of_them(made, order):
    name, plain, style, ours, base, styled = made
    pipe = beside(plain, style, ours, order)
    unload_context_adapter(pipe)
    assert torch.equal(run(name, pipe), styled)
    assert pipe.get_list_adapters() == {component(pipe): ["style"]}
    stock = with_style(copy.deepcopy(plain), style)
    assert list(denoiser(pipe).state_dict()) == list(denoiser(stock).state_dict())
    assert type(pipe) is type(plain)
    pipe.unload_lora_weights()
    assert torch.equal(run(name, pipe), base)

    pipe = beside(plain, style, ours, order)
    pipe.delete_adapters("style")
    assert torch.equal(run(name, pipe), base)
    with intervene(pipe, CONTEXT):
        left = run(name, pipe)
    torch.testing.assert_close(left, run(name, merged(plain, pipe, CONTEXT)), **CLOSE)


@pytest.mark.parametrize("order", ORDERS)
def test_a_saved_pipeline_has_its_base_and_our_adapter(made, tmp_path, order):
    name, plain, style, ours, base, _ = made
    pipe = beside(plain, style, ours, order)
    with pytest.warns(UserWarning, match="saved without the adapters of other methods, 'style'"):
        pipe.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(run(name, again), base)
    load_context_adapter(again, tmp_path)
    again.load_lora_weights(style, adapter_name="style")
    for context in (CONTEXT, CONTEXTS):
        with intervene(pipe, context):
            expected = run(name, pipe)
        with intervene(again, context):
            assert torch.equal(run(name, again), expected)


@pytest.mark.parametrize("order", ORDERS)
def test_fusing_without_a_context_fuses_the_style_alone(made, order):
    name, plain, style, ours, _, styled = made
    pipe = beside(plain, style, ours, order)
    with intervene(pipe, CONTEXT):
        expected = run(name, pipe)
    with pytest.warns(UserWarning, match="Without a context causal context adapters add nothing"):
        pipe.fuse_lora([component(pipe)])
    assert pipe.fused_loras == {"style"}
    torch.testing.assert_close(run(name, pipe), styled, **CLOSE)
    with intervene(pipe, CONTEXT):
        torch.testing.assert_close(run(name, pipe), expected, **CLOSE)
    pipe.unload_lora_weights()  # the way to keep what is fused
    torch.testing.assert_close(run(name, pipe), styled, **CLOSE)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A plain pipeline, and folders of a style and of an adapter."""
    plain = build("stable_diffusion")
    folder = tmp_path_factory.mktemp("files")
    return plain, write_style(plain, folder / "style"), write_adapter(plain.unet, folder / "ours")


class TestOneFamily:
    """What does not depend on the family."""

    @pytest.fixture(params=ORDERS)
    def pipe(self, request, files):
        return beside(*files, request.param)

    def test_strengths_of_both_are_set_together(self, files, pipe):
        plain, style, _ = files
        pipe.set_adapters(["style", "default"], [0.5, 1.0])
        stock = with_style(copy.deepcopy(plain), style)
        stock.set_adapters(["style"], [0.5])
        assert torch.equal(run("stable_diffusion", pipe), run("stable_diffusion", stock))
        expected = with_style(merged(plain, pipe, CONTEXT), style)
        expected.set_adapters(["style"], [0.5])
        with intervene(pipe, CONTEXT):
            torch.testing.assert_close(run("stable_diffusion", pipe), run("stable_diffusion", expected), **CLOSE)

    def test_a_context_for_an_adapter_that_is_switched_off_is_an_error(self, pipe):
        with intervene(pipe, CONTEXT):
            both = run("stable_diffusion", pipe)
        off = "would change nothing: .* 'default', are not active. Active: 'style'.*set_adapters"
        entered = intervene(pipe, CONTEXT)
        named = intervene(pipe, CONTEXT, adapter_name="default")
        pipe.set_adapters(["style"], [0.8])
        for context in (CONTEXT, "nonsense", torch.ones(1, 3)):
            with pytest.raises(ValueError, match=off):
                intervene(pipe, context)
        with pytest.raises(ValueError, match=off):
            run("stable_diffusion", pipe, cross_attention_kwargs={"context": CONTEXT})
        for earlier in (entered, named):
            with earlier, pytest.raises(ValueError, match=off):
                run("stable_diffusion", pipe)
        pipe.set_adapters(["style", "default"])
        with entered:
            assert torch.equal(run("stable_diffusion", pipe), both)
        with pytest.raises(ValueError, match="Unknown concept 'nonsense'"):
            intervene(pipe, "nonsense")
        with pytest.raises(ValueError, match="Unknown adapter 'style'. This model has: 'default'"):
            intervene(pipe, CONTEXT, adapter_name="style")

    @pytest.fixture
    def no_collection(self):
        gc.disable()
        yield
        gc.enable()

    @pytest.mark.parametrize("taken_off", ["delete_adapters", "unload_lora_weights"])
    @pytest.mark.parametrize("hooks", [False, True], ids=["", "with hooks of others"])
    def test_a_context_for_an_adapter_that_is_gone_is_an_error(self, pipe, taken_off, hooks, no_collection):
        if hooks:  # these refer to our layers in a circle, which lives until the next garbage collection
            pipe.unet.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
        entered = intervene(pipe, CONTEXT)
        with entered:
            pipe.delete_adapters("default") if taken_off == "delete_adapters" else pipe.unload_lora_weights()
            with pytest.raises(ValueError, match="adapters that were taken off the model since"):
                run("stable_diffusion", pipe)
        expected = run("stable_diffusion", pipe)
        with pytest.raises(ValueError, match="No component of .* has a causal context adapter"):
            intervene(pipe, CONTEXT)
        with pytest.raises(ValueError, match="no component of .* has a causal context adapter any more"):
            run("stable_diffusion", pipe, cross_attention_kwargs={"context": CONTEXT})
        with pytest.raises(ValueError, match="adapters that were taken off the model since"), entered:
            pass
        assert torch.equal(run("stable_diffusion", pipe), expected)

    def test_an_adapter_can_come_back(self, files, pipe):
        with intervene(pipe, CONTEXT):
            both = run("stable_diffusion", pipe)
        pipe.delete_adapters("default")
        load_context_adapter(pipe, files[2])
        with intervene(pipe, CONTEXT):
            assert torch.equal(run("stable_diffusion", pipe), both)

    def test_fusing_in_a_context_fuses_both_and_can_be_undone(self, pipe):
        with intervene(pipe, CONTEXT):
            both = run("stable_diffusion", pipe)
            pipe.fuse_lora()
        assert pipe.fused_loras == {"style", "default"}
        torch.testing.assert_close(run("stable_diffusion", pipe), both, **CLOSE)
        with pytest.raises(ValueError, match="merged into the weights of pipe.unet. Call pipe.unfuse_lora.*'unet'"):
            unload_context_adapter(pipe)
        pipe.unfuse_lora(["unet"])
        unload_context_adapter(pipe)

    def test_our_observational_context_is_not_fused_by_the_way(self, files, tmp_path):
        plain, style, _ = files
        reduced = write_adapter(plain.unet, tmp_path / "reduced", mechanism="reduced")
        pipe = beside(plain, style, reduced, "style first")
        styled = run("stable_diffusion", pipe)
        with pytest.warns(UserWarning, match="Without a context"):
            pipe.fuse_lora()
        pipe.unload_lora_weights()
        torch.testing.assert_close(run("stable_diffusion", pipe), styled, **CLOSE)

    def test_set_lora_device_knows_both(self, pipe):
        names = [name for name, _ in pipe.unet.named_parameters()]
        pipe.set_lora_device(["style", "default"], "meta")
        for name, weight in zip(names, pipe.unet.parameters(), strict=True):
            ours, theirs = ".causal_context_" in name, ".lora_" in name
            assert (weight.device.type == "meta") == (ours or theirs), name
        pipe.set_lora_device(["nobody"], "cpu")

    def test_attaching_ours_leaves_the_style_trainable_or_frozen(self, files):
        plain, style, ours = files
        for trainable in (True, False):
            pipe = with_style(copy.deepcopy(plain), style)
            for name, weight in pipe.unet.named_parameters():
                weight.requires_grad_(trainable and "lora_" in name)
            before = {name: weight.requires_grad for name, weight in pipe.unet.named_parameters()}
            assert any(before.values()) == trainable
            load_context_adapter(pipe, ours)
            for name, weight in pipe.unet.named_parameters():
                known = before.get(name.replace(".base_layer.base_layer", ".base_layer"), False)
                known = known or before.get(name.replace(".base_layer", ""), False)
                assert weight.requires_grad == known, name
            unload_context_adapter(pipe)
            assert {name: weight.requires_grad for name, weight in pipe.unet.named_parameters()} == before

    def test_a_style_saved_from_both_is_the_stock_file(self, files, pipe):
        plain, style, _ = files
        stock = get_peft_model_state_dict(with_style(copy.deepcopy(plain), style).unet, adapter_name="style")
        saved = get_peft_model_state_dict(pipe.unet, adapter_name="style")
        assert saved.keys() == stock.keys()
        assert all(torch.equal(value, stock[name]) for name, value in saved.items())

    def test_the_file_of_a_lora_takes_the_style_only(self, files, pipe, tmp_path):
        with pytest.raises(ValueError, match="'default' is a causal context adapter, and nothing could load it"):
            pipe.unet.save_lora_adapter(tmp_path / "ours")
        assert not (tmp_path / "ours").exists()
        pipe.unet.save_lora_adapter(tmp_path / "style", adapter_name="style")
        plain, style, _ = files
        stock = with_style(copy.deepcopy(plain), style)
        again = copy.deepcopy(plain)
        written = "pytorch_lora_weights.safetensors"
        again.unet.load_lora_adapter(tmp_path / "style", weight_name=written, prefix=None)
        assert torch.equal(run("stable_diffusion", again), run("stable_diffusion", stock))
        unload_context_adapter(pipe)
        assert "save_lora_adapter" not in vars(pipe.unet)

    def test_another_adapter_of_each_kind(self, files, pipe, tmp_path):
        plain, style, _ = files
        other = write_adapter(plain.unet, tmp_path / "other", concepts=("dark",), target_modules=["to_q", "conv1"])
        load_context_adapter(pipe, other, "other")
        pipe.load_lora_weights(write_style(plain, tmp_path / "style", rank=3), adapter_name="style_2")
        pipe.set_adapters(["style", "style_2", "default", "other"], [0.5, 0.5, 1.0, 1.0])
        with intervene(pipe, "dark"):
            dark = run("stable_diffusion", pipe)
        alone = merged(plain, load_context_adapter(copy.deepcopy(plain), other, "default"), "dark")
        with_style(alone, style)
        alone.load_lora_weights(tmp_path / "style", adapter_name="style_2")
        alone.set_adapters(["style", "style_2"], [0.5, 0.5])
        torch.testing.assert_close(dark, run("stable_diffusion", alone), **CLOSE)

    def test_what_is_read_off_and_baked_names_the_modules_of_the_base(self, files, pipe):
        plain, _, ours = files
        alone = load_context_adapter(copy.deepcopy(plain), ours)
        assert causal_effects(pipe.unet).layers == causal_effects(alone.unet).layers
        config, weights = bake(pipe.unet, CONTEXT)
        expected_config, expected = bake(alone.unet, CONTEXT)
        assert set(config.target_modules) == set(expected_config.target_modules)
        assert all(torch.equal(weights[name], value) for name, value in expected.items())

    def test_peft_merges_and_takes_off_both(self, files):
        plain, style, ours = files
        inputs = torch.randn(2, 4, 8, 8), 10, torch.randn(2, 5, 16)

        def adapted():
            return PeftModel.from_pretrained(with_style(copy.deepcopy(plain), style).unet, str(ours)).eval()

        with torch.no_grad():
            model = adapted()
            with intervene(model, CONTEXT):
                both = model(*inputs).sample
                merged = model.merge_and_unload()
            torch.testing.assert_close(merged(*inputs).sample, both, **CLOSE)
            assert list(merged.state_dict()) == list(plain.unet.state_dict())
            assert torch.equal(adapted().unload()(*inputs).sample, plain.unet(*inputs).sample)


@pytest.mark.parametrize("order", ORDERS)
def test_flux_takes_a_second_style_after_both(tmp_path, order):
    plain = build("flux")
    style, ours = write_style(plain, tmp_path / "style"), write_adapter(plain.transformer, tmp_path / "ours")
    second = write_style(plain, tmp_path / "second", rank=3)

    def with_second(pipe, *others):
        pipe.load_lora_weights(second, adapter_name="second")
        pipe.set_adapters(["style", "second", *others])
        return pipe

    pipe = with_second(beside(plain, style, ours, order), "default")
    assert torch.equal(run("flux", pipe), run("flux", with_second(with_style(copy.deepcopy(plain), style))))
    with intervene(pipe, CONTEXT):
        both = run("flux", pipe)
    expected = run("flux", with_second(with_style(merged(plain, pipe, CONTEXT), style)))
    torch.testing.assert_close(both, expected, **CLOSE)


@pytest.fixture(scope="module")
def encoder_files(tmp_path_factory):
    """A plain pipeline, folders of a style and of an adapter that have text encoders, and images of the style."""
    plain = build("stable_diffusion")
    folder = tmp_path_factory.mktemp("files")
    trained = copy.deepcopy(plain)
    config = LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj", "v_proj"])
    get_peft_model(trained.text_encoder, config)
    trained.unet.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q"]), "default")
    trained.save_lora_weights(
        folder / "style",
        unet_lora_layers=get_peft_model_state_dict(trained.unet),
        text_encoder_lora_layers=get_peft_model_state_dict(trained.text_encoder),
    )
    write_adapter(plain.unet, folder / "ours")
    write_adapter(plain.text_encoder, folder / "ours" / "text_encoder", target_modules=["q_proj", "v_proj"])
    styled = with_style(copy.deepcopy(plain), folder / "style")
    assert (run("stable_diffusion", styled) - run("stable_diffusion", plain)).abs().max() > 5e-3
    return plain, folder / "style", folder / "ours", run("stable_diffusion", styled)


@pytest.mark.parametrize("order", ORDERS)
def test_those_of_text_encoders_act_are_saved_and_come_off(encoder_files, tmp_path, order):
    *files, styled = encoder_files
    plain, style, _ = files
    pipe = beside(*files, order)
    assert torch.equal(run("stable_diffusion", pipe), styled)
    with intervene(pipe, CONTEXT):
        both = run("stable_diffusion", pipe)
    assert (both - styled).abs().max() > 5e-3
    pipe.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path, requires_safety_checker=False)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(run("stable_diffusion", again), run("stable_diffusion", plain))
    with_style(load_context_adapter(again, tmp_path), style)
    with intervene(again, CONTEXT):
        assert torch.equal(run("stable_diffusion", again), both)
    unload_context_adapter(pipe)
    assert torch.equal(run("stable_diffusion", pipe), styled)
    assert pipe.get_list_adapters() == {"unet": ["style"], "text_encoder": ["style"]}


def test_training_beside_a_style_in_training_mode_still_asks_for_a_context():
    """The flag is the base's own: a base in training mode is one."""
    unet = build("stable_diffusion").unet.train()
    unet.add_adapter(LoraConfig(target_modules=["to_q"]), "style")
    unet.add_adapter(CausalContextConfig(concepts=("thick",), target_modules=["to_q"]), "ours")
    with pytest.raises(ValueError, match="No context is set for adapter 'ours' in training mode"):
        unet(torch.randn(2, 4, 8, 8), 10, torch.randn(2, 5, 16))
