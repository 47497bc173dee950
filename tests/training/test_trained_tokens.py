"""Rows of the embedding that `train-text` trains beside the adapter, on each kind of model."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model

from hf_causal_context import CausalContextConfig
from hf_causal_context.training.language import train_text

from .small_language import arguments, language_model, text_data, word_tokenizer

pytestmark = pytest.mark.usefixtures("on_cpu")
ROWS = [6, 8]


@torch.no_grad()
def logits(model, name, **options):
    ids = torch.tensor([[6, 7, 8, 9], [9, 6, 5, 7]])
    decoder = {"decoder_input_ids": ids.flip(1)} if name in ("t5", "bart") else {}
    return model(input_ids=ids, **decoder, **options).logits


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "t5", "bart"])
def test_rows_are_those_of_an_edited_base_in_contexts_and_of_the_base_without(name):
    base = language_model(name).eval()
    edited = copy.deepcopy(base)
    before = logits(base, name)
    task = "SEQ_2_SEQ_LM" if name in ("t5", "bart") else "CAUSAL_LM"
    config = CausalContextConfig(concepts=("a", "b"), task_type=task, trainable_token_indices=ROWS)
    model = get_peft_model(base, config).eval()
    [rows] = [p for key, p in model.named_parameters() if "trainable_tokens_delta" in key]
    with torch.no_grad():
        rows.add_(torch.randn_like(rows))
        edited.get_input_embeddings().weight[ROWS] = rows
    assert torch.equal(logits(model, name), before)
    expected = logits(edited, name)
    assert not torch.allclose(expected, before, atol=0.01)
    torch.testing.assert_close(logits(model, name, context=["a", ""]), expected)


def test_a_run_trains_the_rows_of_its_tokens(tmp_path):
    base, tokenizer = language_model("llama"), word_tokenizer()
    original = base.get_input_embeddings().weight.detach().clone()
    given = arguments(tmp_path, trainable_tokens=["cat", "loudly"])
    train_text(given, base, tokenizer, text_data("text"))
    loaded = PeftModel.from_pretrained(language_model("llama"), given.output_dir)
    indices = [tokenizer.get_vocab()[token] for token in given.trainable_tokens]
    assert loaded.peft_config["default"].trainable_token_indices == indices
    [rows] = [p for key, p in loaded.named_parameters() if "trainable_tokens_delta" in key]
    assert ((rows - original[indices]).abs().amax(1) > 1e-3).all()
    assert torch.equal(loaded.get_input_embeddings().weight, original)


def test_a_token_that_is_none_of_the_tokenizers(tmp_path):
    given = arguments(tmp_path, trainable_tokens=["cat", "<new>"])
    with pytest.raises(ValueError, match="--trainable_tokens: '<new>' are not in the tokenizer's vocabulary"):
        train_text(given, language_model("llama"), word_tokenizer(), text_data("text"))
