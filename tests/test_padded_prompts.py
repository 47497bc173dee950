"""Prompts of different lengths in one call, on models of every kind of memory."""

import pytest
import torch
from peft import get_peft_model
from transformers import (
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
)

from hf_causal_context import CausalContextConfig, Context
from hf_causal_context.inference.texts import generate_texts

from .training.small_language import language_model, word_tokenizer

TOKENS = {"vocab_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GEMMA = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
GEMMA |= {"lru_width": 32, "attention_window_size": 8, "num_hidden_layers": 3}
# A model, its targets, and whether it keeps padding out by itself.
MODELS = {
    "llama": (lambda: language_model("llama"), ["q_proj"], True),
    "mamba": (lambda: language_model("mamba"), ["in_proj"], True),
    "rwkv": (lambda: RwkvForCausalLM(RwkvConfig(hidden_size=16, num_hidden_layers=2, **TOKENS)), ["key"], False),
    "recurrent_gemma": (
        lambda: RecurrentGemmaForCausalLM(RecurrentGemmaConfig(**GEMMA, **TOKENS)),
        ["q_proj", "linear_x"],
        False,
    ),
}
CONTEXTS = [Context(), Context("formal"), Context("formal", "loud")]
PROMPTS = ["a", "the dog ran", "yo", "a cat sat on the mat and then it barked loudly"]


@pytest.mark.parametrize("name", MODELS)
def test_a_prompt_goes_on_as_it_does_alone(name, monkeypatch):
    make, targets, shared = MODELS[name]
    torch.manual_seed(0)
    base = make().eval()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    options = {"concepts": ("formal", "loud"), "task_type": "CAUSAL_LM", "target_modules": targets}
    model = get_peft_model(base, CausalContextConfig(**options, init_weights=False)).eval()
    tokenizer, given = word_tokenizer(), {"max_new_tokens": 8, "seed": None}
    alone = [generate_texts(model, tokenizer, [prompt], CONTEXTS, **given)[0] for prompt in PROMPTS]
    assert len({text for texts in alone for text in texts}) > 1
    calls, generate = [], model.generate
    monkeypatch.setattr(model, "generate", lambda **inputs: calls.append(inputs) or generate(**inputs))
    assert generate_texts(model, tokenizer, PROMPTS, CONTEXTS, **given) == alone
    written = [len(call["input_ids"]) for call in calls if call["max_new_tokens"] == 8]
    assert written == ([12] if shared else [3, 3, 3, 3])
