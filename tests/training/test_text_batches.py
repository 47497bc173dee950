"""Batches of texts, and the loss on them."""

import itertools
import math

import pytest
import torch

from hf_causal_context.bases.likelihoods import negative_log_likelihoods, perplexity
from hf_causal_context.bases.packing import pack
from hf_causal_context.bases.token_batches import Collation
from hf_causal_context.bases.tokens import IGNORED, Tokenization
from hf_causal_context.training.language.batches import TextBatches
from hf_causal_context.training.language.objective import LanguageModelingObjective

from .small_language import (
    CPU,
    TOKENIZER,
    adapted,
    arguments,
    collation,
    gradients,
    rows_and_masks,
    text_data,
    tokenization,
)

pytestmark = pytest.mark.usefixtures("on_cpu")


class TestObjective:
    @pytest.mark.parametrize(
        ("name", "shape"),
        [("llama", "text"), ("gpt2", "prompt"), ("qwen3", "messages"), ("t5", "prompt"), ("bart", "prompt")],
    )
    def test_padding_and_the_other_rows_change_nothing(self, name, shape):
        model = adapted(name)
        rows, masks = rows_and_masks(model, shape)
        collate, objective = collation(model), LanguageModelingObjective(5.0)
        together = objective(model, collate(rows, masks))
        alone = torch.cat([objective(model, collate([row], mask[None])) for row, mask in zip(rows, masks, strict=True)])
        torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
        assert (together[4:] - objective(model, collate(rows, masks * 0))[4:]).abs().min() > 1e-6  # contexts arrive

    @pytest.mark.parametrize("name", ["llama", "t5", "bart"])
    def test_it_is_the_loss_that_transformers_computes(self, name):
        model = adapted(name)
        rows, masks = rows_and_masks(model, "prompt")
        for row, mask in zip(rows[3:7], masks[3:7], strict=True):
            ids, labels = (torch.tensor(x[None], dtype=torch.long) for x in (row.ids, row.labels))
            expected = model(input_ids=ids, labels=labels, context=mask[None]).loss
            batch = collation(model)([row], mask[None])
            objective = LanguageModelingObjective(int((batch.targets != IGNORED).sum()))
            torch.testing.assert_close(objective(model, batch)[0], expected, rtol=1e-5, atol=1e-6)

    def test_losses_are_float32(self):
        model = adapted("llama").to(torch.bfloat16)
        rows, masks = rows_and_masks(model, "text")
        assert LanguageModelingObjective(5.0)(model, collation(model)(rows, masks)).dtype == torch.float32

    @pytest.mark.parametrize(("name", "shape"), [("llama", "text"), ("llama", "prompt"), ("t5", "prompt")])
    @pytest.mark.parametrize("streaming", [False, True])
    def test_the_mean_loss_is_per_token(self, name, shape, streaming, tmp_path):
        model, data = adapted(name), text_data(shape, streaming=streaming)
        rows = 12  # all of them
        given = arguments(tmp_path, train_batch_size=rows)
        batches = TextBatches(data, tokenization(model, shape), collation(model), given)
        batch = next(batches(0))
        losses = LanguageModelingObjective(batches.tokens_per_row)(model, batch)
        sums, counts = negative_log_likelihoods(model, batch)
        assert len(set(counts.tolist())) > 1
        tolerance = 0.03 if streaming else 1e-5  # of a stream the first rows count, here 64 of these 12
        torch.testing.assert_close(losses.mean(), sums.sum() / counts.sum(), rtol=tolerance, atol=0)

    def test_what_counts_of_a_stream_does_not_depend_on_the_batch_size(self, tmp_path):
        model, data = adapted("llama"), text_data(streaming=True)
        tokens_per_row = {
            TextBatches(
                data, tokenization(model, "text"), collation(model), arguments(tmp_path, train_batch_size=size)
            ).tokens_per_row
            for size in (1, 4, 12)
        }
        assert len(tokens_per_row) == 1

    @pytest.mark.parametrize("checkpointing", [False, True])
    @pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
    def test_packed_texts_are_learned_as_if_alone(self, name, checkpointing):
        model = adapted(name)
        rows, masks = rows_and_masks(model, "prompt")
        packed = pack(rows[4:8], 20)
        assert [len(row.lengths) for row in packed] != [1] * 4
        batch = collation(model, packed=True)(packed, masks[4:5].expand(len(packed), -1))
        assert "attention_mask" not in batch.inputs
        apart = collation(model)(rows[4:8], masks[4:8])
        if checkpointing:
            model.base_model.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.train()
        sums, counts = negative_log_likelihoods(model, batch)
        expected, their_counts = negative_log_likelihoods(model, apart)
        assert counts.sum() == their_counts.sum()
        torch.testing.assert_close(sums.sum(), expected.sum(), rtol=1e-5, atol=0)
        found, wanted = gradients(model, sums), gradients(model, expected)
        for key, gradient in wanted.items():
            torch.testing.assert_close(found[key], gradient, rtol=1e-4, atol=1e-5, msg=key)

    def test_perplexity_counts_every_token_alike(self):
        model = adapted("llama")
        rows, masks = rows_and_masks(model, "text")
        sums, counts = negative_log_likelihoods(model, collation(model)(rows, masks))
        batches = [collation(model)(rows[i : i + 5], masks[i : i + 5]) for i in (0, 5, 10)]
        assert perplexity(model, batches) == pytest.approx(math.exp(sums.sum().item() / counts.sum().item()), rel=1e-5)


class TestBatches:
    def make(self, tmp_path, shape="text", streaming=False, rank=0, world_size=1, max_length=64, **changes):
        tokenize = Tokenization(TOKENIZER, shape, max_length=max_length)
        packing = changes.get("packing", False)
        return TextBatches(
            text_data(shape, streaming=streaming),
            tokenize,
            Collation(0, CPU, packed=packing),
            arguments(tmp_path, **changes),
            rank,
            world_size,
        )

    @staticmethod
    def texts(batch):
        """Context and text of every row; "|" between the texts of a packed row."""
        found = []
        for number, (ids, mask) in enumerate(zip(batch.inputs["input_ids"], batch.context, strict=True)):
            if "attention_mask" in batch.inputs:
                pieces = [ids[: batch.inputs["attention_mask"][number].sum()]]
            else:
                starts = torch.where(batch.inputs["position_ids"][number] == 0)[0][1:]
                pieces = [piece for piece in torch.tensor_split(ids, starts) if piece[0] != 0]
            found.append((tuple(mask.tolist()), "|".join(map(TOKENIZER.decode, pieces))))
        return found

    @pytest.mark.parametrize("streaming", [False, True])
    def test_the_nth_batch_is_the_same_for_every_start_and_number_of_processes(self, tmp_path, streaming):
        whole = list(itertools.islice(self.make(tmp_path, streaming=streaming)(0), 4))
        later = next(self.make(tmp_path, streaming=streaming)(3))
        assert self.texts(later) == self.texts(whole[3])
        halves = [
            next(self.make(tmp_path, streaming=streaming, rank=rank, world_size=2, train_batch_size=3)(3))
            for rank in (0, 1)
        ]
        assert self.texts(halves[0]) + self.texts(halves[1]) == self.texts(whole[3])

    @pytest.mark.parametrize("streaming", [False, True])
    def test_contexts_are_balanced_and_belong_to_their_texts(self, tmp_path, streaming):
        known = dict(zip(text_data().rows["text"], text_data().rows["context"], strict=True))
        for batch in itertools.islice(self.make(tmp_path, streaming=streaming)(0), 4):
            rows = self.texts(batch)
            assert len({mask for mask, _ in rows}) == 3
            for mask, text in rows:
                expected = known[text.removesuffix(" </s>")]
                assert mask == {"": (0.0, 0.0), "formal": (1.0, 0.0), "loud": (0.0, 1.0)}[expected]

    def test_packed_rows_hold_texts_of_one_context(self, tmp_path):
        batches = self.make(tmp_path, packing=True, max_length=16)
        assert batches.num_rows == 6
        known = dict(zip(text_data().rows["text"], text_data().rows["context"], strict=True))
        seen = set()
        for batch in itertools.islice(batches(0), 8):
            for mask, texts in self.texts(batch):
                pieces = [text.removesuffix(" </s>") for text in texts.split("|")]
                assert len({known[text] for text in pieces}) == 1
                assert mask == {"": (0.0, 0.0), "formal": (1.0, 0.0), "loud": (0.0, 1.0)}[known[pieces[0]]]
                seen |= set(pieces)
            starts = batch.inputs["position_ids"] == 0
            # Neither the first token of a text nor padding is a target.
            assert (batch.targets[:, :-1][starts[:, 1:]] == IGNORED).all()
            assert (batch.targets != 0).all()
        assert seen == set(known)

    def test_shares_of_contexts(self, tmp_path):
        batches = self.make(tmp_path, context_weights=["obs=4"])
        masks = torch.cat([batch.context for batch in itertools.islice(batches(0), 4)])
        assert (masks.sum(1) == 0).sum() == 16
        with pytest.raises(ValueError, match="--context_weights names 'size', which is not trained on. Contexts: obs"):
            self.make(tmp_path, context_weights=["size=2"])
        with pytest.raises(ValueError, match="--context_weights obs=-1 must be finite numbers, none negative"):
            self.make(tmp_path, context_weights=["obs=-1"])

    @pytest.mark.parametrize("packing", [False, True])
    def test_rows_that_are_cut_are_counted_once_for_each_context(self, tmp_path, packing, capsys):
        whole = self.make(tmp_path, packing=packing)
        assert capsys.readouterr().out == ""
        lengths = {
            context: [len(whole._tokenize(row).ids) for row in whole._data.rows if row["context"] == context]
            for context in ("", "formal")
        }
        limit = max(lengths["formal"]) - 1
        cut = {context: sum(length > limit for length in own) for context, own in lengths.items()}
        assert 0 < cut["formal"] < len(lengths["formal"])
        self.make(tmp_path, packing=packing, max_length=limit)
        (line,) = capsys.readouterr().out.splitlines()
        assert line.startswith(f"Cut at --max_length={limit}: ")
        assert f"{cut['formal']} of {len(lengths['formal'])} rows of 'formal'" in line
        assert ("of the observational context" in line) is (cut[""] > 0)
        self.make(tmp_path, packing=packing, max_length=limit, rank=1, world_size=2)
        assert capsys.readouterr().out == ""

    def test_of_a_stream_the_first_rows_are_looked_at(self, tmp_path, capsys):
        self.make(tmp_path, streaming=True, max_length=2)
        expected = "22 of 22 rows of the observational context, 21 of 21 rows of 'formal', 21 of 21 rows of 'loud'"
        assert f"Cut at --max_length=2: {expected}." in capsys.readouterr().out

    @pytest.mark.parametrize("streaming", [False, True])
    def test_a_row_that_cannot_be_learned_is_named(self, tmp_path, streaming):
        message = "The row of .*context.* that begins '.* .*': The prompt has 2 tokens of --max_length=2"
        with pytest.raises(ValueError, match=message):
            next(self.make(tmp_path, shape="prompt", streaming=streaming, max_length=2)(0))
