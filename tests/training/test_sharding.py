"""Bases in pieces: two processes with half of the base each train what one does, and go on from each other's."""

import json
import shutil
from signal import SIGKILL

import numpy as np
import pytest
from PIL import Image

from hf_causal_context.training.arguments import TrainingArguments
from hf_causal_context.training.checkpoints import checkpoint_steps
from hf_causal_context.training.finetune import train

from .run_tiny import Faults
from .small import adapter_weights, assert_close_to_largest, settings, write_folders
from .small_language import language_model, word_tokenizer
from .test_faults import assert_same_run

ONE_STEP = {"adam_epsilon": 1e-3}  # large enough that rounding is not amplified


@pytest.fixture
def texts(tmp_path):
    """A function: name of a language model -> the settings of runs on it, with texts and sample texts."""

    def make(name):
        base = language_model(name)
        base.config.dropout_rate = 0.0  # T5's
        base.save_pretrained(tmp_path / "base")
        word_tokenizer().save_pretrained(tmp_path / "base")
        for context, begin in (
            ("obs", "a cat"),
            ("formal", "indeed a dog"),
            ("loud", "yo it"),
            ("formal+loud", "good"),
        ):
            (tmp_path / "texts" / context).mkdir(parents=True)
            rows = [{"prompt": f"{begin} {word}", "completion": f" {word} on the mat"} for word in ("sat", "ran", "it")]
            lines = "\n".join(json.dumps(row) for row in rows)
            (tmp_path / "texts" / context / "texts.jsonl").write_text(lines)
        changes = {"train_batch_size": 6, "max_new_tokens": 4, "num_validation_texts": 1, "validation_steps": 1}
        changes |= {"held_out_contexts": ["formal+loud"]}
        given = settings(tmp_path / "base", tmp_path / "texts", tmp_path / "one", **ONE_STEP, **changes)
        del given["num_validation_images"]
        return given

    return make


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("stable_diffusion", {"use_ema": True, "gradient_accumulation_steps": 2, "mechanism": "reduced"}),
        ("flux", {"gradient_checkpointing": True, "resolution": 16}),
        ("ddpm", {"mechanism": "structural"}),
    ],
)
def test_two_halves_of_a_denoiser_train_as_a_whole_one(name, changes, start, together, pipeline_folder, tmp_path):
    data = write_folders(tmp_path / "data", captions=name != "ddpm")
    given = settings(pipeline_folder(name), data, tmp_path / "one", **ONE_STEP, **changes)
    given |= {"train_batch_size": 6, "num_validation_images": 1, "num_inference_steps": 2, "validation_steps": 1}
    one = start(given)
    halves = given | {"output_dir": str(tmp_path / "halves"), "train_batch_size": 3, "shard_base": True}
    assert [run.wait() for run in together(halves, 2)] == [halves["output_dir"]] * 2
    assert one.wait() == given["output_dir"]
    assert_close_to_largest(adapter_weights(tmp_path / "halves"), adapter_weights(tmp_path / "one"))
    configs = [json.loads((tmp_path / run / "adapter_config.json").read_text()) for run in ("one", "halves")]
    assert configs[0] == configs[1]
    for grid in ("step-000001.png", "step-000002.png"):
        pictures = [np.asarray(Image.open(tmp_path / run / "samples" / grid), int) for run in ("one", "halves")]
        assert abs(pictures[0] - pictures[1]).max() <= 1


@pytest.mark.parametrize(
    ("name", "shard_base", "held_out"),
    [("llama", True, True), ("llama", False, True), ("t5", True, False), ("t5", False, True)],
)
def test_two_processes_train_a_language_model_as_one(name, shard_base, held_out, start, together, texts, tmp_path):
    given = texts(name)
    if not held_out:  # then texts are the first that a validation asks of the model
        shutil.rmtree(tmp_path / "texts" / "formal+loud")
        del given["held_out_contexts"]
    one = start(given)
    two = given | {"output_dir": str(tmp_path / "two"), "train_batch_size": 3, "shard_base": shard_base}
    assert [run.wait() for run in together(two, 2)] == [two["output_dir"]] * 2
    assert one.wait() == given["output_dir"]
    assert_close_to_largest(adapter_weights(tmp_path / "two"), adapter_weights(tmp_path / "one"))
    for samples in ("step-000001.md", "step-000002.md"):
        one_said, two_said = ((tmp_path / run / "samples" / samples).read_text() for run in ("one", "two"))
        assert one_said == two_said


def test_a_run_goes_on_from_checkpoints_of_whole_and_sharded_bases(start, together, pipeline_folder, tmp_path):
    data = write_folders(tmp_path / "data")
    given = settings(pipeline_folder("ddpm"), data, tmp_path / "whole", use_ema=True, max_train_steps=6)
    given |= {"checkpointing_steps": 2, "shard_base": True}
    whole = together(given, 2)
    killed = given | {"output_dir": str(tmp_path / "killed"), "resume_from_checkpoint": "latest"}
    runs = together(killed, 2, {1: Faults(signal_in_microbatch=(4, SIGKILL))})
    assert runs[1].wait() is None
    assert runs[0].wait().startswith("ProcessLostError: Another process of this run has failed")
    assert list(checkpoint_steps(tmp_path / "killed")) == [2]
    assert [run.wait() for run in together(killed, 2)] == [killed["output_dir"]] * 2
    assert [run.wait() for run in whole] == [given["output_dir"]] * 2
    assert_same_run(killed["output_dir"], given["output_dir"])
    longer = killed | {"max_train_steps": 8, "shard_base": False}
    assert [run.wait() for run in together(longer, 2)] == [killed["output_dir"]] * 2
    assert list(checkpoint_steps(tmp_path / "killed")) == [2, 4, 6, 8]


@pytest.mark.usefixtures("on_cpu")
class TestRefusals:
    @pytest.mark.parametrize(
        ("changes", "variables", "message"),
        [
            ({"shard_base": True}, {}, "--shard_base cuts the base .* this run has one process. Start several"),
            (
                {},
                {"ACCELERATE_USE_FSDP": "true"},
                "configured to use FSDP .ACCELERATE_USE_FSDP=true.* pass --shard_base",
            ),
            ({}, {"ACCELERATE_USE_DEEPSPEED": "true"}, "configured to use DeepSpeed"),
        ],
    )
    def test_what_cannot_be_sharded_is_told_before_the_data_is_read(
        self, changes, variables, message, pipeline_folder, tmp_path, monkeypatch
    ):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        given = settings(pipeline_folder("ddpm"), tmp_path / "no data", tmp_path / "out", **changes)
        with pytest.raises(ValueError, match=message):
            train(TrainingArguments(**given))
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"reweighted_contexts": ["pairs"]}, "looks at rows with a whole base in one process. Leave --shard_base"),
            ({"compile": True}, "--compile was not made to work with --shard_base"),
        ],
    )
    def test_options_that_need_a_whole_base(self, changes, message):
        with pytest.raises(ValueError, match=message):
            TrainingArguments(**settings("base", "data", "out", shard_base=True, **changes))
