"""Language models: training from texts to an adapter that generates."""

import json
import re

import pytest
import torch
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSeq2SeqLM
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoTokenizer

from hf_causal_context.bases.language import load_language_model
from hf_causal_context.bases.likelihoods import negative_log_likelihoods, perplexity
from hf_causal_context.cli import main
from hf_causal_context.contexts import Context
from hf_causal_context.training.language import train_text
from hf_causal_context.training.language.samples import sample_texts
from hf_causal_context.training.loop.checkpoints import write_files

from .conftest import pipeline_folder  # noqa: F401 (a fixture)
from .small import adapter_weights
from .small_language import (
    adapted,
    arguments,
    collation,
    language_model,
    rows_and_masks,
    text_data,
    tokenization,
    word_tokenizer,
)

pytestmark = pytest.mark.usefixtures("on_cpu")


class TestTraining:
    @pytest.mark.parametrize(
        ("name", "shape", "changes"),
        [
            ("llama", "text", {"validation_prompt": "a cat", "packing": True}),
            ("gpt2", "messages", {"gradient_checkpointing": True}),
            ("qwen3", "chat", {"validation_prompt": "a cat", "completion_only_loss": False}),
            ("t5", "prompt", {"gradient_checkpointing": True}),
            ("bart", "prompt", {"validation_prompt": "a cat"}),
        ],
    )
    def test_from_texts_to_an_adapter_that_generates(self, name, shape, changes, tmp_path):
        base = language_model(name)
        base.save_pretrained(tmp_path / "base")
        before = {key: tensor.clone() for key, tensor in base.state_dict().items()}
        given = arguments(
            tmp_path,
            max_train_steps=4,
            validation_steps=2,
            num_validation_texts=2,
            max_new_tokens=4,
            report_to="tensorboard",
            **changes,
        )
        tokenizer = word_tokenizer()
        folder = train_text(given, base, tokenizer, text_data(shape))

        for key, tensor in base.state_dict().items():
            if "causal" not in key:
                assert torch.equal(tensor, before.pop(key.replace(".base_layer", ""))), key
        assert not before

        samples = sorted((folder / "samples").iterdir())
        assert [path.name for path in samples] == ["step-000000.md", "step-000002.md", "step-000004.md"]
        table = samples[2].read_text()
        of_base = [line for line in table.splitlines() if line.startswith("| base |")]
        assert of_base == samples[0].read_text().splitlines()[-1:]
        for context in ("obs", "formal", "loud", "formal+loud"):
            assert re.search(rf"^\| {re.escape(context)} \|.*\|.*\|$", table, re.MULTILINE)
        assert ("a cat" in table.splitlines()[0]) == ("validation_prompt" in changes or shape != "text")
        assert not list(folder.glob(".*"))

        (events,) = (folder / "logs" / "hf_causal_context").glob("events.out.*")
        log = EventAccumulator(str(events)).Reload()
        assert "samples/text_summary" in log.Tags()["tensors"]
        (_, logged) = log.Scalars("validation_perplexity/formal+loud")

        encoder_decoder = base.config.is_encoder_decoder
        auto = AutoPeftModelForSeq2SeqLM if encoder_decoder else AutoPeftModelForCausalLM
        model = auto.from_pretrained(str(folder)).eval()
        weights = adapter_weights(folder)
        assert len(weights) > 0
        assert all(tensor.abs().max() > 0 for tensor in weights.values())
        data = text_data(shape)
        tokenize = tokenization(model, data.content_column, completion_only=given.completion_only_loss)
        batch = collation(model)([tokenize(row) for row in data.held_out["formal+loud"]], torch.ones(2, 2))
        assert perplexity(model, [batch]) == pytest.approx(logged.value, rel=1e-4)
        output = model.generate(**tokenizer(["a cat"], return_tensors="pt"), context="formal+loud", max_new_tokens=3)
        assert output.shape[0] == 1

    @pytest.mark.parametrize(("name", "shape"), [("llama", "text"), ("t5", "prompt")])
    def test_a_tokenizer_without_a_padding_token_trains_the_same_adapter(self, name, shape, tmp_path):
        weights = []
        for pad in ("<pad>", None):
            tokenizer = word_tokenizer()
            tokenizer.pad_token = pad
            given = arguments(tmp_path / str(pad), max_train_steps=2, num_validation_texts=1, max_new_tokens=3)
            folder = train_text(given, language_model(name), tokenizer, text_data(shape))
            weights.append(adapter_weights(folder))
            assert AutoTokenizer.from_pretrained(folder).pad_token == pad
        for key, tensor in weights[0].items():
            assert torch.equal(tensor, weights[1][key]), key

    def test_texts_become_likely_in_their_contexts(self, tmp_path):
        base = language_model("llama")
        targets = ["v_proj", "up_proj", "down_proj"]
        given = arguments(tmp_path, max_train_steps=40, learning_rate=3e-2, target_modules=targets)
        folder = train_text(given, base, word_tokenizer(), text_data())
        assert (folder / "adapter_model.safetensors").exists()
        assert not (folder / "samples").exists()
        rows, masks = rows_and_masks(base, "text")
        batch = collation(base)(rows, masks)
        base.eval()
        right, count = negative_log_likelihoods(base, batch)
        batch.context = masks.flip(1)
        wrong, _ = negative_log_likelihoods(base, batch)
        assert (right / count).mean() < 3.2  # log 32 = 3.47 before
        assert (right[4:] < wrong[4:]).all()

    @pytest.mark.parametrize(
        ("name", "shape", "changes"),
        [
            ("gpt2", "text", {"packing": True, "max_length": 16, "dropout": 0.3}),
            ("bart", "prompt", {"use_ema": True}),
            ("llama", "text", {"streaming": True}),
            ("llama", "text", {"trainable_tokens": ["cat", "loudly"]}),
        ],
    )
    def test_a_resumed_run_is_the_same_bit_for_bit(self, name, shape, changes, tmp_path):
        def run(folder, steps, resume=None):
            given = arguments(
                tmp_path, output_dir=str(tmp_path / folder), max_train_steps=steps, checkpointing_steps=3,
                train_batch_size=3, validation_steps=2, num_validation_texts=1, max_new_tokens=3,
                resume_from_checkpoint=resume, observational_steps=1, **changes,
            )  # fmt: skip
            data = text_data(shape, streaming=given.streaming)
            model = language_model(name, dropout=True)
            torch.manual_seed(steps)  # of the process that starts the run
            return train_text(given, model, word_tokenizer(), data)

        whole = adapter_weights(run("whole", 6))
        run("parts", 3)
        resumed = adapter_weights(run("parts", 6, "latest"))
        assert all(torch.equal(resumed[key], tensor) for key, tensor in whole.items())
        changes = changes | {"max_length": 20}
        with pytest.raises(ValueError, match="belongs to a run with other settings .*--max_length"):
            run("parts", 6, "latest")

    def test_what_comes_after_the_last_step_is_said(self, tmp_path, capsys):
        shown = {"num_validation_texts": 1, "max_new_tokens": 2, "max_train_steps": 3}
        for steps, known in ((2, r"; the one before took \d+ seconds\."), (None, r"\.")):
            given = arguments(tmp_path, output_dir=str(tmp_path / str(steps)), validation_steps=steps, **shown)
            folder = train_text(given, language_model("llama"), word_tokenizer(), text_data())
            said = rf"Trained, and saved in {folder}. What is left is the last validation{known}"
            assert re.search(said, capsys.readouterr().out)

    def test_accumulated_gradients_are_those_of_one_large_batch(self, tmp_path, monkeypatch):
        norms = {}

        def run(size, accumulation):
            found = []
            monkeypatch.setattr(
                "accelerate.Accelerator.clip_grad_norm_",
                lambda self, parameters, norm: found.extend(p.grad.clone() for p in parameters) or torch.tensor(1.0),
            )
            given = arguments(
                tmp_path, output_dir=str(tmp_path / str(size)), train_batch_size=size, max_train_steps=1,
                gradient_accumulation_steps=accumulation,
            )  # fmt: skip
            train_text(given, language_model("llama"), word_tokenizer(), text_data("prompt"))
            norms[size] = found

        run(8, 1)
        run(2, 4)
        assert max(gradient.abs().max() for gradient in norms[8]) > 1e-4
        for one, four in zip(norms[8], norms[2], strict=True):
            torch.testing.assert_close(one, four, rtol=1e-4, atol=1e-7)

    @pytest.mark.parametrize(("name", "shape"), [("llama", "text"), ("llama", "chat"), ("t5", "prompt")])
    def test_the_card_shows_code_that_runs(self, name, shape, tmp_path, monkeypatch, capsys):
        base, tokenizer = language_model(name), word_tokenizer()
        base.save_pretrained(tmp_path / "base")
        folder = train_text(arguments(tmp_path, max_train_steps=1), base, tokenizer, text_data(shape))
        card = (folder / "README.md").read_text()
        assert "for `base`" in card
        (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
        monkeypatch.chdir(tmp_path)
        capsys.readouterr()
        exec(code.replace("max_new_tokens=40", "max_new_tokens=4"))
        assert capsys.readouterr().out.endswith("\n")
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["task_type"] == ("SEQ_2_SEQ_LM" if name == "t5" else "CAUSAL_LM")
        assert config["base_model_name_or_path"] == str(tmp_path / "base")

    @pytest.mark.parametrize(
        ("changes", "shape", "message"),
        [
            ({"packing": True}, "prompt", "--packing: T5ForConditionalGeneration does not keep the texts"),
            ({}, "text", "An encoder-decoder reads a prompt"),
            ({"pad_token": "<fill>"}, "prompt", "--pad_token='<fill>' is not in the tokenizer's vocabulary"),
            ({"context_weights": ["size=2"]}, "prompt", "--context_weights names 'size'"),
            ({"validation_contexts": ["size"]}, "prompt", "Unknown concept 'size'"),
        ],
    )
    def test_what_does_not_fit_is_said_before_anything_is_written(self, changes, shape, message, tmp_path):
        with pytest.raises(ValueError, match=message):
            train_text(arguments(tmp_path, **changes), language_model("t5"), word_tokenizer(), text_data(shape))
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("name", ["llama", "bart"])
    def test_sample_texts_show_contexts_and_leave_the_random_state(self, name, tmp_path):
        model = adapted(name, target_modules=["v_proj", "fc1"] if name == "bart" else ["v_proj", "up_proj"])
        with torch.no_grad():
            for parameter in model.parameters():  # so that contexts outweigh the noise
                parameter.mul_(4)
        contexts = [Context(), Context("formal"), Context("loud"), Context()]
        given = arguments(tmp_path, num_validation_texts=3, max_new_tokens=6)
        asked = {"num_return_sequences": 2, "return_dict_in_generate": True, "do_sample": True}
        model.get_base_model().generation_config.update(**asked)  # as a base's file may
        before = torch.get_rng_state()
        texts = sample_texts(model, tokenization(model, "prompt"), [5, 6], contexts, given)
        assert torch.equal(torch.get_rng_state(), before)
        assert [len(row) for row in texts] == [3] * 4
        assert len({*texts[0]}) > 1
        assert texts[0] == texts[3]
        assert len({tuple(row) for row in texts}) == 3
        short = sample_texts(model, tokenization(model, "prompt"), [5] * 62, contexts[:1], given)
        if name == "llama":  # two positions are left
            assert max(len(text.split()) for text in short[0]) <= 2

    def test_sample_texts_need_something_to_begin_with(self, tmp_path):
        tokenizer = word_tokenizer()
        tokenizer.bos_token = tokenizer.eos_token = None
        given = {"num_validation_texts": 1}
        with pytest.raises(ValueError, match="no beginning- or end-of-sequence token.*--validation_prompt"):
            train_text(arguments(tmp_path, **given), language_model("llama"), tokenizer, text_data())
        long = given | {"validation_prompt": "a " * 64}
        with pytest.raises(ValueError, match="sample texts has 64 tokens, which leaves no room"):
            train_text(arguments(tmp_path, **long), language_model("llama"), tokenizer, text_data())

    def test_a_stream_without_rows_of_a_held_out_context_is_refused(self, tmp_path):
        data = text_data(streaming=True)
        data.held_out["formal+loud"] = data.held_out["formal+loud"].to_iterable_dataset().filter(lambda row: False)
        with pytest.raises(ValueError, match="no rows of the held-out contexts 'formal\\+loud'.*--held_out_contexts"):
            train_text(arguments(tmp_path), language_model("llama"), word_tokenizer(), data)

    def test_a_tokenizer_with_several_chat_templates_is_saved_again(self, tmp_path):
        tokenizer = word_tokenizer()
        tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
        for _ in range(2):
            write_files(tmp_path, "tokenizer_config.json", tokenizer.save_pretrained)
        assert [path.name for path in (tmp_path / "additional_chat_templates").iterdir()] == ["tool_use.jinja"]
        assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]

    def test_a_stream_has_no_epochs(self, tmp_path):
        given = arguments(tmp_path, max_train_steps=None, streaming=True)
        with pytest.raises(ValueError, match="A stream has no known length, so it has no epochs. Give --max_train"):
            train_text(given, language_model("llama"), word_tokenizer(), text_data(streaming=True))


class TestCommand:
    @pytest.fixture
    def texts(self, tmp_path):
        data = text_data()
        for context in data.contexts:
            folder = tmp_path / "texts" / (context or "obs")
            folder.mkdir(parents=True)
            own = data.rows.filter(lambda row, context=context: row["context"] == context)["text"]
            (folder / "texts.txt").write_text("\n".join(own))
        return tmp_path / "texts"

    def test_train_text(self, texts, tmp_path, capsys):
        language_model("llama").save_pretrained(tmp_path / "base")
        word_tokenizer().save_pretrained(tmp_path / "base")
        command = ["train-text", "--pretrained_model_name_or_path", str(tmp_path / "base"), "--train_data_dir"]
        command += [str(texts), "--output_dir", str(tmp_path / "out"), "--max_new_tokens", "3"]
        assert main([*command, "--num_train_epochs", "2", "--train_batch_size", "3"]) == 0
        assert "The adapter is in" in capsys.readouterr().out
        samples = sorted(path.name for path in (tmp_path / "out" / "samples").iterdir())
        assert samples == ["step-000000.md", "step-000008.md"]
        assert "formal+loud" in (tmp_path / "out" / "samples" / "step-000008.md").read_text()

    def test_each_command_names_the_other(self, texts, tmp_path, pipeline_folder, capsys):  # noqa: F811
        language_model("llama").save_pretrained(tmp_path / "base")
        rest = ["--train_data_dir", str(texts), "--output_dir", str(tmp_path / "out")]
        assert main(["train-text", "--pretrained_model_name_or_path", pipeline_folder("ddpm"), *rest]) == 1
        assert "could not be read as a model of transformers: it is a diffusers pipeline" in (
            error := capsys.readouterr().err
        )
        assert "by `hf-causal-context train`" in error
        assert main(["train", "--pretrained_model_name_or_path", str(tmp_path / "base"), *rest]) == 1
        assert "is a model of transformers, not a diffusers pipeline" in (error := capsys.readouterr().err)
        assert "by `hf-causal-context train-text`" in error

    def test_a_model_that_writes_nothing_is_refused(self, tmp_path):
        from transformers import ViTConfig

        ViTConfig().save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="is a vit, which is neither a causal nor an encoder-decoder language"):
            load_language_model(str(tmp_path), None, torch.float32)
