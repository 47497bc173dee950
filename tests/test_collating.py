"""The collator in the trainers of transformers and TRL."""

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_causal_context import CausalContextConfig, ContextCollator
from hf_causal_context.contexts import Context

from .training.small_language import language_model, rows_of, text_data, word_tokenizer

CONCEPTS = ("formal", "loud")
TOKENIZER = word_tokenizer()


def adapted():
    config = CausalContextConfig(concepts=CONCEPTS, task_type="CAUSAL_LM", init_weights=False, mechanism="reduced")
    return get_peft_model(language_model("llama"), config)


def feature(words, context, **others):
    return {**TOKENIZER(words), "context": context, **others}


@pytest.fixture
def options(tmp_path):
    """Arguments of any trainer, on the CPU."""
    return {
        "output_dir": str(tmp_path), "use_cpu": True, "report_to": "none", "per_device_train_batch_size": 3,
        "per_device_eval_batch_size": 2, "max_steps": 2, "learning_rate": 1e-2, "remove_unused_columns": False,
        "logging_steps": 1, "save_strategy": "no",
    }  # fmt: skip


class Gradients(TrainerCallback):
    """Those of the adapter at every optimizer step, before they are clipped."""

    def __init__(self):
        self.found = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})


class TestCollator:
    @pytest.mark.parametrize(
        "collate",
        [
            DataCollatorWithPadding(TOKENIZER),
            DataCollatorForLanguageModeling(TOKENIZER, mlm=False),
            DataCollatorForSeq2Seq(TOKENIZER),
        ],
    )
    def test_it_adds_the_mask_to_what_a_collator_makes(self, collate):
        features = [
            feature("a cat", "loud+formal", text="a cat"),
            feature("the dog ran", "obs", text=None),
            feature("it", ["loud"], text="it", messages=[{"role": "user", "content": "it"}]),
            feature("it", {"loud": 0.5, "formal": None}, text="it"),
            feature("it", "", text="it"),
        ]
        if isinstance(collate, DataCollatorForSeq2Seq):
            features = [one | {"labels": one["input_ids"]} for one in features]
        before = [dict(one) for one in features]
        batch = ContextCollator(collate, CONCEPTS)(features)
        assert batch["context"].tolist() == [[1, 1], [0, 0], [0, 1], [0, 0.5], [0, 0]]
        assert batch["context"].dtype == torch.float32
        assert batch["input_ids"].shape == (5, 3)
        assert features == before
        kept = ("input_ids", "attention_mask", "token_type_ids", "labels")
        expected = collate([{name: value for name, value in one.items() if name in kept} for one in before])
        assert {*batch} - {"context"} == {*expected}
        assert all(torch.equal(batch[name], expected[name]) for name in expected)

    def test_a_collator_that_tokenizes_gets_its_texts(self):
        def collate(features):
            return TOKENIZER([one["text"] for one in features], return_tensors="pt", padding=True)

        wrapped = ContextCollator(collate, CONCEPTS, context_column="regime", observational_name="none")
        batch = wrapped([{"text": "a cat", "regime": "none"}, {"text": "it", "regime": "formal"}])
        assert batch["input_ids"].tolist() == TOKENIZER(["a cat", "it"], padding=True)["input_ids"]
        assert batch["context"].tolist() == [[0, 0], [1, 0]]

    def test_wrong_use_is_an_error(self):
        collator = ContextCollator(DataCollatorWithPadding(TOKENIZER), CONCEPTS)
        with pytest.raises(ValueError, match="no column 'context', but 'input_ids'.*remove_unused_columns=False"):
            collator([TOKENIZER("a cat")])
        with pytest.raises(ValueError, match="Unknown concept 'quiet' in context 'quiet'"):
            collator([feature("a cat", "quiet")])
        joined = ContextCollator(lambda features: {"input_ids": torch.zeros(1, 9)}, CONCEPTS)
        with pytest.raises(ValueError, match="made 1 rows of 2 features.*without packing, padding-free batches"):
            joined([feature("a cat", "loud"), feature("it", "obs")])


class TestTransformersTrainer:
    @staticmethod
    def dataset():
        return Dataset.from_list([feature(text, context) for text, context in zip(
            rows_of("text")["text"], rows_of("text")["context"], strict=True)])  # fmt: skip

    def trainer(self, options, model=None, **changes):
        collate = DataCollatorForLanguageModeling(TOKENIZER, mlm=False)
        gradients = Gradients()
        return Trainer(
            model or adapted(),
            TrainingArguments(**options | changes),
            data_collator=ContextCollator(collate, CONCEPTS),
            train_dataset=self.dataset(),
            eval_dataset=self.dataset(),
            callbacks=[gradients],
        ), gradients

    def test_a_step_has_the_gradient_of_our_objective(self, options):
        from hf_causal_context.bases.token_batches import Collation
        from hf_causal_context.bases.tokens import Tokenization
        from hf_causal_context.training.language.objective import LanguageModelingObjective

        options |= {"max_steps": 1, "gradient_accumulation_steps": 2}
        model = adapted().eval()
        texts = ["a cat sat", "the dog ran", "it ran on", "good sir it", "it barked loudly", "yo a cat"]
        contexts = ["", "", "formal", "formal", "loud", "formal+loud"]
        tokenizer = word_tokenizer()
        tokenizer.eos_token = None  # of equal length, so that means over rows and over tokens agree
        rows = [Tokenization(tokenizer, "text")({"text": text}) for text in texts]
        mask = ContextCollator(len, CONCEPTS).concepts.mask([Context.parse(context) for context in contexts])
        losses = LanguageModelingObjective(len(rows[0].ids) - 1)(model, Collation(0, torch.device("cpu"))(rows, mask))
        losses.mean().backward()
        expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

        trainer, gradients = self.trainer(options)
        trainer.train_dataset = Dataset.from_list([feature(*pair) for pair in zip(texts, contexts, strict=True)])
        trainer.train()
        (found,) = gradients.found
        assert found.keys() == expected.keys()
        assert all("causal" in name for name in found)
        assert max(gradient.abs().max() for gradient in expected.values()) > 1e-3
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)

    def test_it_evaluates_in_the_contexts_of_the_rows(self, options):
        trainer, _ = self.trainer(options)
        loss = trainer.evaluate()["eval_loss"]
        without = trainer.eval_dataset.remove_columns("context").add_column("context", ["obs"] * 12)
        assert abs(trainer.evaluate(without)["eval_loss"] - loss) > 1e-4

    def test_gradient_checkpointing_changes_no_gradient(self, options):
        options |= {"max_steps": 1}
        plain, expected = self.trainer(options)
        plain.train()
        kwargs = {"gradient_checkpointing_kwargs": {"use_reentrant": False}}
        saving, found = self.trainer(options, gradient_checkpointing=True, **kwargs)
        saving.train()
        for name, gradient in expected.found[0].items():
            torch.testing.assert_close(found.found[0][name], gradient, rtol=1e-4, atol=1e-6, msg=name)

    def test_without_the_setting_the_error_says_what_to_set(self, options):
        trainer, _ = self.trainer(options, remove_unused_columns=True)
        with pytest.raises(ValueError, match="no column 'context'.*remove_unused_columns=False"):
            trainer.train()


class TestTrlTrainer:
    @pytest.fixture
    def trainer(self, options):
        trl = pytest.importorskip("trl")
        from trl.trainer.sft_trainer import DataCollatorForLanguageModeling as TrlCollator

        def make(shape="prompt", **changes):
            gradients, model, data = Gradients(), adapted(), text_data(shape)
            rows, held_out = data.rows, data.held_out["formal+loud"]
            if shape == "prompt":  # TRL reads prompt and completion as one text
                rows, held_out = (
                    some.map(lambda row: {"completion": " " + row["completion"]}) for some in (rows, held_out)
                )
            return trl.SFTTrainer(
                model,
                trl.SFTConfig(**options | {"max_length": 64, "bf16": False, **changes}),
                data_collator=ContextCollator(TrlCollator(pad_token_id=0), CONCEPTS),
                train_dataset=rows,
                eval_dataset=held_out,
                processing_class=word_tokenizer(),
                callbacks=[gradients],
            ), gradients

        return make

    @pytest.mark.parametrize(
        "changes", [{}, {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}]
    )
    @pytest.mark.parametrize("shape", ["text", "prompt", "chat"])
    def test_it_trains_and_evaluates(self, trainer, shape, changes):
        made, gradients = trainer(shape, **changes)
        batch = made.data_collator([made.train_dataset[i] for i in (0, 5, 11)])
        assert batch["context"].shape == (3, 2)
        if shape != "text":  # of the two words of the prompt nothing is learned
            assert (batch["labels"][:, :2] == -100).all()
            assert (batch["labels"] != -100).any(1).all()
        loss = made.evaluate()["eval_loss"]
        made.train()
        assert len(gradients.found) == 2
        assert all("causal" in name for name in gradients.found[0])
        assert made.evaluate()["eval_loss"] != loss
        other = made.eval_dataset.remove_columns("context").add_column("context", ["obs", "formal"])
        assert abs(made.evaluate(other)["eval_loss"] - made.evaluate()["eval_loss"]) > 1e-4

    def test_packing_is_refused(self, trainer):
        with pytest.raises(ValueError, match="custom data collator is not supported when using padding-free"):
            trainer("text", packing=True)
        made, _ = trainer("text", packing=True, packing_strategy="wrapped")
        with pytest.raises(ValueError, match="no column 'context'.*and no packing, which joins rows"):
            made.train()
