"""How far a language model is from the observational set."""

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from hf_causal_context.bases.gap import FAR, NEAR
from hf_causal_context.bases.tokens import IGNORED, TokenRow
from hf_causal_context.training.language.gap import MOST_TOKENS, text_gap
from hf_causal_context.training.language.own_texts import continuations

from .small_language import TOKENIZER, adapted, collation, language_model, text_data, tokenization

KINDS = {"cats": "a cat sat on the mat", "dogs": "the dog ran and then it barked loudly"}


def tokens(model, texts):
    tokenize = tokenization(model, "text")
    return [tokenize({"text": text}) for text in texts]


@pytest.fixture(scope="module")
def of_cats():
    """A tiny model that was trained on texts about cats, which end where they like."""
    model = language_model("llama").train()
    words = KINDS["cats"].split()
    texts = [" ".join(words[: 2 + i % 5]) for i in range(40)]
    batch = collation(model)(tokens(model, texts), torch.zeros(len(texts), 0))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        logits = model(**batch.inputs).logits
        loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch.targets, ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval(), texts


def gap(model, rows, seed=0):
    return text_gap(model, rows, collation(model), TOKENIZER.eos_token_id, seed)


def test_texts_of_its_own_kind_are_near_and_others_are_far(of_cats):
    model, texts = of_cats
    near = [gap(model, tokens(model, texts), seed) for seed in (0, 1)]
    assert all(found.factor < NEAR for found in near)
    assert gap(model, tokens(model, [KINDS["dogs"]] * 32)).times > FAR


@pytest.mark.parametrize(
    ("name", "shape"),
    [("llama", "text"), ("gpt2", "messages"), ("mamba", "prompt"), ("t5", "prompt"), ("bart", "prompt")],
)
def test_the_bare_base_is_measured_and_nothing_is_disturbed(name, shape):
    model = adapted(name, target_modules=["in_proj"] if name == "mamba" else None).get_base_model()
    model.train()
    rows = [tokenization(model, shape)(row) for row in text_data(shape).rows]
    weights = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    before = torch.get_rng_state()
    found = gap(model, rows)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(tensor, weights[key]) for key, tensor in model.state_dict().items())
    assert model.training
    assert found == gap(language_model(name), rows)  # the adapter has no part in it
    assert found.rows == 12
    assert 0 < found.factor < float("inf")


def test_own_texts_continue_the_prompts_no_longer_than_the_rows_do(of_cats, monkeypatch):
    model, _ = of_cats
    seen = []

    def note(rows, context):
        seen.append(list(rows))
        return collation(model)(rows, context)

    lengths = [(1, 3), (4, 60), (2, 5)]  # tokens of prompts and completions
    rows = []
    for prompt, completion in lengths:
        ids = np.arange(prompt + completion, dtype=np.int32) % 20 + 4
        labels = ids.copy()
        labels[:prompt] = IGNORED
        rows.append(TokenRow(ids, labels, (len(ids),)))
    text_gap(model, rows, note, TOKENIZER.eos_token_id, 0)
    data, own = seen
    assert [len(row.ids) for row in data] == [4, 64, 7]
    for row, text, (prompt, completion) in zip(data, own, lengths, strict=True):
        assert text.ids[:prompt].tolist() == row.ids[:prompt].tolist()
        assert (text.labels[:prompt] == IGNORED).all()
        written = text.ids[prompt:]
        assert text.labels[prompt:].tolist() == written.tolist()
        assert 1 <= len(written) <= completion
        assert TOKENIZER.eos_token_id not in written[:-1]


def written(model, **preferred):
    model.generation_config = GenerationConfig(eos_token_id=[2, 3], **preferred)
    torch.manual_seed(0)
    return [ids.tolist() for ids in continuations(model, [[5, 6]] * 16, [30] * 16, 2)]


def test_own_texts_end_at_any_token_at_which_the_model_stops():
    model = language_model("llama")
    texts = written(model)
    ends = {2, 3}
    assert {text[-1] for text in texts if len(text) < 30} == ends
    assert all(ends.isdisjoint(text[:-1]) for text in texts)  # nor is learned what fills up after it


@pytest.mark.parametrize(
    "preferred",
    [
        {"top_k": 2, "temperature": 0.1},
        {"min_p": 0.9},
        {"typical_p": 0.1},
        {"repetition_penalty": 3.0, "min_new_tokens": 30},
        {"guidance_scale": 5.0},
        {"exponential_decay_length_penalty": (1, 3.0)},
        {"num_return_sequences": 2, "do_sample": True, "return_dict_in_generate": True},
        {"stop_strings": ["a"]},
    ],
)
def test_own_texts_are_drawn_as_the_model_has_it_whatever_its_file_prefers(preferred):
    model = language_model("llama")
    assert written(model, **preferred) == written(model)


def test_forward_passes_are_bounded_however_long_the_rows_are():
    model = language_model("gpt2")
    calls = []
    model.register_forward_hook(lambda module, args, output: calls.append(1))
    model.config.max_position_embeddings = model.config.n_positions = 64
    ids = (np.arange(64, dtype=np.int32) % 20) + 4
    text_gap(model, [TokenRow(ids, ids, (64,))] * 20, collation(model), None, 0)
    assert len(calls) <= 2 * (MOST_TOKENS + 2)  # in two batches
