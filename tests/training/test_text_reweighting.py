"""Reweighted combinations of texts: what the base sees, drawn rows, batches, and runs that go on."""

import itertools
import json
import random
import re

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model

from hf_causal_context import CausalContextConfig
from hf_causal_context.bases.token_batches import Collation, tokenize_all
from hf_causal_context.bases.tokens import Tokenization
from hf_causal_context.data import density_ratios, reweighting
from hf_causal_context.training.language import batches as text_batches
from hf_causal_context.training.language import features as features_module
from hf_causal_context.training.language import train_text
from hf_causal_context.training.language.batches import TextBatches
from hf_causal_context.training.language.features import text_features, tokens_digest
from hf_causal_context.training.reweighting import FILE

from . import small_language
from .small import adapter_weights
from .small_language import CPU, language_model, word_tokenizer

pytestmark = pytest.mark.usefixtures("on_cpu")

CONCEPTS = ("formal", "loud")
MARKS = ("indeed", "loudly")  # what shows the concepts
NEUTRAL = ["a", "cat", "dog", "sat", "ran", "on", "the", "mat", "and", "then", "it"]
ROWS = 300


def write(rng, context, varies=True):
    """A text that shows a concept if it is intervened on, else sometimes or never; formal texts are less often loud."""
    formal = "formal" in context or rng.random() < 0.4 * varies
    loud = "loud" in context or rng.random() < (0.4 if formal else 0.6) * varies
    words = rng.choices(NEUTRAL, k=rng.randint(3, 8))
    for word, shown in zip(MARKS, (formal, loud), strict=True):
        if shown:
            words.insert(rng.randint(0, len(words)), word)
    return " ".join(words)


def world(shape="text", rows=ROWS, varies=True):
    rng = random.Random(0)
    columns = {"context": [context for context in ("", *CONCEPTS) for _ in range(rows)]}
    texts = [write(rng, context, varies) for context in columns["context"]]
    if shape == "prompt":
        columns |= {"prompt": ["a cat"] * len(texts), "completion": texts}
    else:
        columns["text"] = texts
    return small_language.singles_data(columns, shape)


def texts_of(data):
    return data.rows["completion" if data.content_column == "prompt" else "text"]


def arguments(tmp_path, **changes):
    return small_language.arguments(tmp_path, **{"train_batch_size": 7, "reweighted_contexts": ["pairs"]} | changes)


def run(tmp_path, data, name="llama", **changes):
    return train_text(arguments(tmp_path, **changes), language_model(name), word_tokenizer(), data)


def stored(tmp_path, folder="out"):
    return json.loads((tmp_path / folder / FILE).read_text())


@pytest.fixture
def quick(monkeypatch):
    """Ratios that are estimated in no time, and believed whatever they are."""
    for name, value in {"NUM_MODELS": 1, "NUM_EPOCHS": 1, "FEWEST_STEPS": 2}.items():
        monkeypatch.setattr(density_ratios, name, value)
    monkeypatch.setattr(reweighting, "LARGEST_MASS_ERROR", 1e9)
    for name, value in {"MIN_EFFECTIVE_SAMPLE_SIZE": 1, "_LEAST_CONTRAST": -1, "_LEAST_PRESENCE": 0}.items():
        monkeypatch.setattr(reweighting, name, value)


class TestFeatures:
    @staticmethod
    def see(name, data, base=None):
        model = base or language_model(name)
        encoder_decoder = model.config.is_encoder_decoder
        config = CausalContextConfig(
            concepts=CONCEPTS,
            task_type="SEQ_2_SEQ_LM" if encoder_decoder else "CAUSAL_LM",
            mechanism="structural",
            target_modules=["in_proj"] if name == "mamba" else None,
        )
        decoder_inputs = model.prepare_decoder_input_ids_from_labels if encoder_decoder else None
        tokenize = Tokenization(word_tokenizer(), data.content_column, encoder_decoder=encoder_decoder)
        rows = tokenize_all(data.rows, tokenize)
        model = get_peft_model(model, config).train()
        codes = torch.tensor([0, *range(1, 3)]).repeat_interleave(len(rows) // 3)
        return text_features(model, rows, Collation(0, CPU, decoder_inputs=decoder_inputs), codes), model

    @pytest.mark.parametrize("budget", [1, 64])
    @pytest.mark.parametrize(
        ("name", "shape"),
        [("llama", "text"), ("gpt2", "prompt"), ("mamba", "text"), ("t5", "prompt"), ("bart", "prompt")],
    )
    def test_a_text_is_seen_alike_whatever_it_is_batched_with(self, name, shape, budget, monkeypatch):
        monkeypatch.setattr(features_module, "_TOKENS_AT_ONCE", budget)
        data = world(shape, rows=40)
        data.rows = Dataset.from_dict(
            {column: [*data.rows[column][:119], data.rows[column][0]] for column in data.rows.column_names}
        )
        seen, model = self.see(name, data)
        assert seen.shape[0] == 120
        assert torch.isfinite(seen).all()
        distances = torch.cdist(seen, seen, compute_mode="donot_use_mm_for_euclid_dist")
        texts = texts_of(data)
        others = [row for row in range(1, 119) if texts[row] != texts[0]]
        assert distances[0, 119] < 1e-2 * distances[0, others].min()
        assert model.training
        monkeypatch.setattr(features_module, "_TOKENS_AT_ONCE", 4096)
        torch.testing.assert_close(self.see(name, data)[0].abs(), seen.abs(), rtol=1e-2, atol=1e-2)

    def test_tokens_that_interventions_bring_are_features(self):
        data = world()
        seen, _ = self.see("llama", data)
        for mark in MARKS:
            there = torch.tensor([mark in text.split() for text in texts_of(data)])
            (column,) = [
                column for column in seen.T if len(column.unique()) == 2 and torch.equal(column == column.max(), there)
            ]
            assert column.min() == 0

    def test_a_base_that_overflows_is_refused(self):
        base = language_model("llama")
        with torch.no_grad():
            base.get_parameter("model.layers.0.mlp.down_proj.weight").mul_(torch.inf)
        with pytest.raises(ValueError, match="sees in 12 of 12 samples is not finite"):
            self.see("llama", world(rows=4), base)

    def test_other_tokens_have_another_digest(self):
        tokenize = Tokenization(word_tokenizer(), "text")
        digests = [
            tokens_digest([tokenize({"text": text}) for text in texts])
            for texts in (["a cat", "a dog"], ["a cat", "a dog"], ["a dog", "a cat"], ["a cat", "a mat"])
        ]
        assert digests[0] == digests[1]
        assert len(set(digests)) == 3


@pytest.mark.parametrize(("name", "shape"), [("llama", "text"), ("t5", "prompt")])
def test_drawn_rows_show_both_concepts(name, shape, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(density_ratios, "NUM_MODELS", 1)
    monkeypatch.setattr(density_ratios, "FEWEST_STEPS", 150)
    data = world(shape)
    folder = run(tmp_path, data, name)
    assert "formal+loud" in capsys.readouterr().out.split("effective sample size")[1]
    drawn = stored(tmp_path)["contexts"]["formal+loud"]["rows"]
    assert len(drawn) == ROWS
    shown = [text.split() for text in texts_of(data)]
    shares = [sum(set(MARKS) <= set(shown[row]) for row in rows) / len(rows) for rows in (range(3 * ROWS), drawn)]
    assert shares[0] < 0.4
    assert shares[1] > 0.9
    card = (folder / "README.md").read_text()
    assert re.search(r"\| formal\+loud \| .*draws from rows of single interventions", card)


def test_rewriting_that_no_text_shows_by_itself_carries_no_pair(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(density_ratios, "NUM_MODELS", 1)
    monkeypatch.setattr(density_ratios, "FEWEST_STEPS", 150)
    run(tmp_path, world(varies=False))
    said = capsys.readouterr().out.split("effective sample size")[1]
    assert re.search("formal\\+loud +-  no rows look like all of it: .*; not trained on, left to the mechanism", said)
    assert re.search("formal\\+loud: more rows of the same kind hardly help", said)
    assert "observational rows in which 'formal', 'loud' come by themselves" in said
    assert "More rows" not in said
    assert stored(tmp_path)["contexts"]["formal+loud"]["rows"] == []


class TestBatches:
    @staticmethod
    def make(tmp_path, drawn, **changes):
        data = world(rows=20)
        data.reweighted = drawn
        given = arguments(tmp_path, **changes)
        tokenize = Tokenization(word_tokenizer(), "text", max_length=24)
        return data, TextBatches(data, tokenize, Collation(0, CPU, packed=given.packing), given)

    @pytest.mark.parametrize("packing", [False, True])
    def test_a_combination_gets_its_share_of_its_rows(self, packing, tmp_path):
        numbers = torch.tensor([3, 25, 25, 44, 59]).numpy()
        data, batches = self.make(tmp_path, {"formal+loud": numbers}, packing=packing)
        _, without = self.make(tmp_path, {}, packing=packing)
        assert batches.num_rows == without.num_rows  # an epoch is one of the data
        made = list(itertools.islice(batches(0), 10))
        masks = torch.cat([batch.context for batch in made])
        assert (masks.sum(1) == 2).sum() == pytest.approx(70 * 0.5 / 3.5, abs=1)
        tokenizer, found, of_singles = word_tokenizer(), set(), set()
        for batch in made:
            for ids, mask in zip(batch.inputs["input_ids"], batch.context, strict=True):
                texts = tokenizer.decode(ids).replace("<pad>", "").split("</s>")
                (found if mask.sum() == 2 else of_singles).update(text.strip() for text in texts if text.strip())
        texts = data.rows["text"]
        assert found == {texts[number] for number in numbers}
        assert found < of_singles or packing  # they stay in their own contexts, too

    def test_weights_may_name_it(self, tmp_path):
        drawn = {"formal+loud": torch.tensor([3, 25]).numpy()}
        _, batches = self.make(tmp_path, drawn, context_weights=["formal+loud=2"])
        masks = torch.cat([batch.context for batch in itertools.islice(batches(0), 10)])
        assert (masks.sum(1) == 2).sum() == pytest.approx(70 * 2 / 5, abs=1)
        with pytest.raises(ValueError, match="'formal\\+loud', which is not trained on. Contexts: obs, formal, loud"):
            self.make(tmp_path, {}, context_weights=["formal+loud=2"])


@pytest.mark.parametrize("changes", [{}, {"packing": True, "max_length": 24}, {"mixed_precision": "bf16"}])
def test_a_resumed_run_reads_what_was_drawn(changes, tmp_path, quick, monkeypatch):
    data = world(rows=20)
    monkeypatch.setattr(text_batches, "tokenize_all", None)  # a second time
    run(tmp_path, data, **changes)
    whole = adapter_weights(tmp_path / "out")
    half = changes | {"output_dir": str(tmp_path / "half"), "checkpointing_steps": 1}
    run(tmp_path, data, **half, max_train_steps=1)
    assert stored(tmp_path, "half") == stored(tmp_path)
    monkeypatch.setattr(density_ratios, "FEWEST_STEPS", 3)  # other ratios, if they were estimated again
    monkeypatch.setattr(features_module, "_hidden_states", None)
    run(tmp_path, data, **half, resume_from_checkpoint="latest")
    resumed = adapter_weights(tmp_path / "half")
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())
    changed = [*data.rows["text"][:-1], "the dog ran loudly"]
    data.rows = data.rows.remove_columns("text").add_column("text", changed)
    with pytest.raises(
        ValueError, match="was made from other data or settings .*tokens.* Resume with those, or choose"
    ):
        run(tmp_path, data, **half, resume_from_checkpoint="latest")


def test_a_stream_has_no_numbers_to_draw(tmp_path):
    with pytest.raises(ValueError, match="draws rows by number, which a stream has not. Leave --streaming or it out"):
        arguments(tmp_path, streaming=True)


def test_unknown_combinations_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="Unknown concept 'round'"):
        run(tmp_path, world(rows=20), reweighted_contexts=["round+loud"])
    assert not (tmp_path / "out" / FILE).exists()
