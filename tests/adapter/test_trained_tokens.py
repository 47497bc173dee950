"""Trained rows of the embedding act in contexts only, at the strength of the observational part, as PEFT's would."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import conversion
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from hf_causal_context import CausalContextConfig, Context, intervene, save_baked

IDS = torch.tensor([[3, 4, 5, 6], [6, 3, 8, 9], [3, 3, 3, 3]])
ROWS = [3, 5]
TIED = pytest.mark.parametrize("tied", [False, True])


def llama(tied: bool, **changes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=12, **sizes, tie_word_embeddings=tied, **changes)).eval()


def trained(tied: bool, **changes) -> PeftModel:
    """An adapter whose rows are other ones, while its layers add nothing."""
    config = CausalContextConfig(concepts=("a", "b"), task_type="CAUSAL_LM", trainable_token_indices=ROWS, **changes)
    model = get_peft_model(llama(tied), config).eval()
    with torch.no_grad():
        rows_of(model).add_(torch.randn(2, 16))
    return model


def rows_of(model: PeftModel) -> torch.nn.Parameter:
    return model.base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta["default"]


@torch.no_grad()
def expected(tied: bool, model: PeftModel, strength: float = 1.0) -> torch.Tensor:
    """Of a base whose rows are the trained ones, or between."""
    base = llama(tied)
    weight = base.model.embed_tokens.weight.data
    weight[ROWS] = torch.lerp(weight[ROWS], rows_of(model), strength)
    return base(IDS).logits


def logits(model, **options) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, **options).logits


@TIED
def test_rows_act_in_contexts_only_and_the_base_is_the_base_bit_for_bit(tied):
    model, base = trained(tied), logits(llama(tied))
    assert torch.equal(logits(model), base)
    assert torch.equal(logits(model, context=Context(observational=0)), base)
    everywhere = expected(tied, model)
    assert not torch.allclose(everywhere, base, atol=0.01)
    for context in ("", "a", "a+b"):
        torch.testing.assert_close(logits(model, context=context), everywhere)
    half = Context("a", observational=0.5)
    torch.testing.assert_close(logits(model, context=half), expected(tied, model, 0.5))
    with model.disable_adapter():
        assert torch.equal(logits(model, context="a"), base)


@TIED
def test_every_sample_has_rows_of_its_own_context(tied):
    model, base = trained(tied), logits(llama(tied))
    mixed = logits(model, context=["a", Context(observational=0), Context(observational=0.5)])
    parts = [expected(tied, model)[0], base[1], expected(tied, model, 0.5)[2]]
    torch.testing.assert_close(mixed, torch.stack(parts))


@TIED
def test_rows_are_trained_as_those_of_peft(tied):
    model = trained(tied)
    lora = get_peft_model(llama(tied), LoraConfig(target_modules=["q_proj"], trainable_token_indices=ROWS)).eval()
    with torch.no_grad():
        rows_of(lora).copy_(rows_of(model))
    gradients = []
    for each, options in ((model, {"context": ["a", "", "b"]}), (lora, {})):
        each(IDS, labels=IDS, **options).loss.backward()
        gradients.append(rows_of(each).grad)
    torch.testing.assert_close(*gradients)
    assert gradients[0].abs().sum() > 0
    assert model.base_model.model.get_input_embeddings().weight.grad is None


@TIED
def test_rows_come_with_the_adapter(tied, tmp_path):
    model = trained(tied)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert [key for key in stored if "embed" in key or "lm_head" in key] == [
        "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    ]
    loaded = PeftModel.from_pretrained(llama(tied), tmp_path).eval()
    assert torch.equal(logits(loaded, context="a"), logits(model, context="a"))
    assert torch.equal(logits(loaded), logits(llama(tied)))


@TIED
def test_a_copy_and_the_saved_base_are_whole(tied, tmp_path):
    model = trained(tied)
    assert torch.equal(logits(copy.deepcopy(model), context="a"), logits(model, context="a"))
    with pytest.warns(UserWarning, match="was saved without its causal context adapter"):
        model.base_model.model.save_pretrained(tmp_path)
    assert torch.equal(logits(LlamaForCausalLM.from_pretrained(tmp_path)), logits(llama(tied)))


@TIED
def test_merging_writes_the_rows_at_the_strength_of_the_context_and_takes_them_back(tied):
    model = trained(tied)
    half = expected(tied, model, 0.5)
    with intervene(model, Context("a", observational=0.5)):
        model.merge_adapter()
    torch.testing.assert_close(logits(model), half)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(llama(tied)))
    torch.testing.assert_close(logits(model), half)
    model.unmerge_adapter()
    assert torch.equal(logits(model), logits(llama(tied)))
    with intervene(model, Context("a", observational=0.5)):
        merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), half)


@TIED
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_a_baked_lora_has_the_rows(tied, strength, tmp_path):
    model = trained(tied)
    save_baked(model, Context("a", observational=strength), tmp_path / "lora")
    lora = PeftModel.from_pretrained(llama(tied), tmp_path / "lora").eval()
    torch.testing.assert_close(logits(lora), expected(tied, model, strength))


def test_peft_does_not_convert_an_adapter_with_rows():
    with (
        intervene(model := trained(False), "a"),
        pytest.raises(TypeError, match="do not support LoRA conversion: .*ContextTokens"),
    ):
        conversion.convert_to_lora(model, rank=4)


@TIED
def test_beams_and_adapters_beside_have_their_own(tied):
    model = trained(tied)
    options = {"attention_mask": torch.ones_like(IDS), "pad_token_id": 0, "max_new_tokens": 3, "num_beams": 2}
    mixed = model.generate(input_ids=IDS, context=["a", Context(observational=0), "b"], **options)
    alone = [model.generate(input_ids=IDS[1:2], **options | {"attention_mask": torch.ones(1, 4)})]
    assert torch.equal(mixed[1:2, : alone[0].shape[1]], alone[0])
    model.add_adapter("other", CausalContextConfig(concepts=("c",), task_type="CAUSAL_LM"))
    model.base_model.set_adapter(["default", "other"])
    torch.testing.assert_close(logits(model, context="a"), expected(tied, model))
    assert torch.equal(logits(model, context="c"), logits(llama(tied)))  # the rows are of the other adapter


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trainable_token_indices": [3, 3]}, r"trainable_token_indices=\[3, 3\] must be a list .* each once"),
        ({"trainable_token_indices": []}, r"trainable_token_indices=\[\] must be a list"),
        ({"trainable_token_indices": 3}, "trainable_token_indices=3 must be a list"),
        ({"trainable_token_indices": [-1]}, "trainable_token_indices"),
        ({"trainable_token_indices": {"embed_tokens": [1]}}, "trainable_token_indices"),
        ({"trainable_token_indices": [3], "observational_rank": 0}, "belong to the observational part, and with"),
    ],
)
def test_what_are_no_rows(changes, message):
    with pytest.raises(ValueError, match=message):
        CausalContextConfig(concepts=("a",), **changes)


def test_rows_that_the_base_lacks():
    config = CausalContextConfig(concepts=("a",), task_type="CAUSAL_LM", trainable_token_indices=[3, 12])
    with pytest.raises(ValueError, match="has 12, and the embedding of LlamaForCausalLM has rows up to 11. Resize it"):
        get_peft_model(llama(False), config)
    config = CausalContextConfig(concepts=("a",), target_modules=["0"], trainable_token_indices=[3])
    with pytest.raises(ValueError, match="are rows of an embedding, and Sequential has none"):
        get_peft_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), config)


@pytest.mark.parametrize("fault", ["missing", "other number", "not asked for"])
def test_files_whose_rows_are_not_those_of_the_config(fault, tmp_path):
    trained(False).save_pretrained(tmp_path)
    weights, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    stored, key = load_file(weights), "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    if fault == "missing":
        del stored[key]
        save_file(stored, weights)
    else:
        indices = None if fault == "not asked for" else [3, 4, 5]
        config.write_text(json.dumps(json.loads(config.read_text()) | {"trainable_token_indices": indices}))
    message = "is not whole: it lacks 1 weights" if fault == "missing" else "trainable_tokens_delta' of shape"
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(llama(False), tmp_path)
