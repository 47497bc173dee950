"""Bases in pieces: two processes with half of the base each train what one does, and go on from each other's."""

import json
import shutil
from signal import SIGKILL

import numpy as np
import pytest
from PIL import Image

from hf_causal_context._files import checkpoint_steps
from hf_causal_context.bases.loading import as_base, load_base
from hf_causal_context.training import recipe
from hf_causal_context.training.arguments import TrainingArguments
from hf_causal_context.training.finetune import train
from hf_causal_context.training.loop import processes
from hf_causal_context.training.loop.sharding import blocks

from .run_tiny import Faults
from .small import adapter_weights, assert_close_to_largest, settings, write_folders
from .small_language import language_model, word_tokenizer
from .test_faults import assert_same_run
from .tiny_pipelines import PIPELINES

ONE_STEP = {"adam_epsilon": 1e-3}  # large enough that rounding is not amplified


@pytest.fixture
def texts(tmp_path):
    """A function: name of a language model -> the settings of runs on it, with texts and sample texts."""

    def make(name):
        base = language_model(name)
        for dropout in ("dropout_rate", "attn_pdrop", "embd_pdrop", "resid_pdrop"):  # T5's, GPT-2's
            setattr(base.config, dropout, 0.0)
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
        ("pixart_sigma", {"mechanism": "structural", "use_ema": True}),
    ],
)
@pytest.mark.slow
def test_two_halves_of_a_denoiser_train_as_a_whole_one(name, changes, start, together, pipeline_folder, tmp_path):
    data = write_folders(tmp_path / "data", captions=True)
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
        images = [np.asarray(Image.open(tmp_path / run / "samples" / grid), int) for run in ("one", "halves")]
        assert abs(images[0] - images[1]).max() <= 1


@pytest.mark.parametrize(
    ("name", "held_out", "changes"),
    [
        ("llama", True, {"shard_base": True, "gradient_checkpointing": True, "packing": True}),
        ("llama", True, {}),
        ("gpt2", True, {"shard_base": True}),  # its output layer is its embedding
        ("t5", False, {"shard_base": True}),
        ("t5", True, {}),
    ],
)
def test_two_processes_train_a_language_model_as_one(name, held_out, changes, start, together, texts, tmp_path):
    given = texts(name) | changes | {"shard_base": False}
    if not held_out:  # then texts are the first that a validation asks of the model
        shutil.rmtree(tmp_path / "texts" / "formal+loud")
        del given["held_out_contexts"]
    one = start(given)
    two = given | {"output_dir": str(tmp_path / "two"), "train_batch_size": 3} | changes
    assert [run.wait() for run in together(two, 2)] == [two["output_dir"]] * 2
    assert one.wait() == given["output_dir"]
    assert_close_to_largest(adapter_weights(tmp_path / "two"), adapter_weights(tmp_path / "one"))
    for samples in ("step-000001.md", "step-000002.md"):
        one_said, two_said = ((tmp_path / run / "samples" / samples).read_text() for run in ("one", "two"))
        assert one_said == two_said


@pytest.mark.slow
def test_runs_on_whole_and_sharded_bases_go_on_from_each_other(start, together, pipeline_folder, tmp_path):
    data = write_folders(tmp_path / "data", captions=True)
    given = settings(pipeline_folder("stable_diffusion"), data, tmp_path / "whole", use_ema=True, max_train_steps=6)
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
    for steps, shard_base in ((8, False), (10, True)):
        longer = killed | {"max_train_steps": steps, "shard_base": shard_base}
        assert [run.wait() for run in together(longer, 2)] == [killed["output_dir"]] * 2
    longer = given | {"max_train_steps": 10, "resume_from_checkpoint": "latest"}
    assert [run.wait() for run in together(longer, 2)] == [given["output_dir"]] * 2
    assert_close_to_largest(adapter_weights(killed["output_dir"]), adapter_weights(given["output_dir"]), 1e-4)


def test_a_validation_without_memory_ends_all_processes(together, pipeline_folder, tmp_path):
    data = write_folders(tmp_path / "data", captions=True)
    given = settings(pipeline_folder("stable_diffusion"), data, tmp_path / "out", shard_base=True)
    given |= {"num_validation_images": 1, "num_inference_steps": 2, "validation_steps": 1, "checkpointing_steps": 1}
    failed, other = together(given, 2, {0: Faults(no_memory_to_generate=True)})
    said = failed.wait()
    assert said.startswith("TrainingMemoryError: Validation ran out of memory at step 1 (CUDA out of memory).")
    assert f"The last complete checkpoint is {tmp_path}/out/checkpoint-1. Let it make less at once: fewer" in said
    assert said.endswith("Then resume with --resume_from_checkpoint latest.")
    assert other.wait().startswith("ProcessLostError: Another process")
    without = given | {"num_validation_images": 0, "resume_from_checkpoint": "latest"}
    assert [run.wait() for run in together(without, 2)] == [given["output_dir"]] * 2


def test_encoders_leave_the_device_before_the_base_is_cut(pipeline_folder, tmp_path, monkeypatch, on_cpu):
    data = write_folders(tmp_path / "data", captions=True)
    given = settings(pipeline_folder("stable_diffusion"), data, tmp_path / "out", shard_base=True)
    base, order = load_base(given["pretrained_model_name_or_path"]), []
    monkeypatch.setattr(processes, "check_processes", lambda _: None)  # one process is enough to see the order
    monkeypatch.setattr(base, "move_encoders", lambda device: order.append(type(device).__name__))
    monkeypatch.setattr(recipe, "shard_base", lambda *_: order.append("cut"))
    train(TrainingArguments(**given), base)
    assert order == ["device", "str", "cut"]  # where it is measured, then to the "cpu"


def test_a_base_without_named_blocks_is_refused(together, pipeline_folder, tmp_path):
    given = settings(pipeline_folder("ddpm"), write_folders(tmp_path / "data"), tmp_path / "out", shard_base=True)
    (run,) = together(given, 1)
    said = run.wait()
    assert said.startswith(
        "UserValueError: --shard_base: UNet2DModel does not name its blocks (_no_split_modules), so every"
    )


def test_every_other_base_names_blocks_that_hold_much_of_it():
    unnamed = set()
    for name, build in PIPELINES.items():
        base = as_base(build()).denoiser
        if found := blocks(base):
            held = {id(p): p.numel() for block in found for p in block.parameters()}
            share = sum(held.values()) / sum(p.numel() for p in base.parameters())
            assert share > 0.3, name  # of tiny ones; of large ones it is nearly all
        else:
            unnamed.add(name)
    assert unnamed == {"ddpm", "ddpm_classes", "ddim", "dit"}
    assert all(blocks(language_model(name)) for name in ("llama", "gpt2", "t5", "bart"))


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
            ({"push_to_hub": True}, "--push_to_hub makes samples with a whole base .* push the adapter afterwards"),
        ],
    )
    def test_options_that_need_a_whole_base(self, changes, message):
        with pytest.raises(ValueError, match=message):
            TrainingArguments(**settings("base", "data", "out", shard_base=True, **changes))
