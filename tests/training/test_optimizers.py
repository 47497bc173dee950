"""Optimizers by name: they train, resume exactly, and say what they lack."""

import sys

import pytest
import torch
from safetensors.torch import load_file

from hf_causal_context.training.arguments import TrainingArguments
from hf_causal_context.training.finetune import train
from hf_causal_context.training.optimizers import OPTIMIZERS

from .small import adapter_weights, settings, write_folders

pytestmark = pytest.mark.usefixtures("on_cpu")
RATES = {"prodigy": 1.0, "adafactor": 1e-2, "lion": 1e-3}
CLASSES = {"adamw8bit": "bitsandbytes", "lion": "lion_pytorch", "prodigy": "prodigyopt", "schedulefree": "schedulefree"}


@pytest.fixture
def given(pipeline_folder, tmp_path):
    data = write_folders(tmp_path / "data")

    def given(output_dir, **changes):
        return TrainingArguments(**settings(pipeline_folder("ddpm"), data, tmp_path / output_dir, **changes))

    return given


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_run_is_the_same_bit_for_bit(given, tmp_path, name):
    pytest.importorskip(CLASSES.get(name, "torch"))
    changes = {
        "optimizer": name,
        "learning_rate": RATES.get(name, 1e-3),
        "checkpointing_steps": 2,
        "max_train_steps": 4,
    }
    whole = adapter_weights(train(given("whole", **changes)))
    train(given("cut", **changes | {"max_train_steps": 2}))
    resumed = adapter_weights(train(given("cut", **changes, resume_from_checkpoint="latest")))
    for key, weight in whole.items():
        assert torch.equal(resumed[key], weight), key
    before = load_file(tmp_path / "whole" / "checkpoint-2" / "adapter_model.safetensors")
    assert any(not torch.equal(weight, before[key]) for key, weight in whole.items())


def test_of_a_schedule_free_run_the_average_is_saved_and_validated(given, tmp_path):
    import schedulefree

    seen = []
    original = schedulefree.AdamWScheduleFree.eval

    def noted(self):
        original(self)
        seen.append([parameter.detach().clone() for group in self.param_groups for parameter in group["params"]])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedulefree.AdamWScheduleFree, "eval", noted)
        saved = adapter_weights(train(given("out", optimizer="schedulefree", max_train_steps=3)))
    final = {tensor.sum().item() for tensor in seen[-1]}
    assert {tensor.sum().item() for tensor in saved.values()} == final
    (group,) = torch.load(tmp_path / "out" / "checkpoint-3" / "optimizer.bin", weights_only=True)["param_groups"]
    assert not group["train_mode"]


def test_settings_reach_the_optimizer(given, tmp_path):
    train(
        given("out", optimizer="adafactor", optimizer_args=["weight_decay=0.5", "eps=(None, 1e-2)"], max_train_steps=1)
    )
    (group,) = torch.load(tmp_path / "out" / "checkpoint-1" / "optimizer.bin", weights_only=True)["param_groups"]
    assert (group["weight_decay"], group["eps"], group["lr"]) == (0.5, (None, 1e-2), 1e-2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "sgd"}, "--optimizer=sgd is unknown. Allowed: adamw, adamw8bit"),
        ({"optimizer_args": ["eps=1"]}, "with --optimizer=adamw: its settings are --adam_beta1"),
        ({"optimizer": "prodigy", "learning_rate": 1e-4}, "Give --learning_rate 1"),
        ({"optimizer": "schedulefree", "use_ema": True}, "Leave --use_ema out"),
        ({"optimizer": "schedulefree", "lr_scheduler": "cosine"}, "--lr_scheduler=cosine too"),
        ({"optimizer": "adafactor", "optimizer_args": ["decay=1"]}, "has no setting 'decay'. It has: 'lr'"),
        ({"optimizer": "adafactor", "optimizer_args": ["d"]}, "'d' has no value. Write weight_decay=0.01"),
        ({"optimizer": "adafactor", "optimizer_args": ["d=x"]}, "the value 'x' is no number"),
        ({"optimizer": "adafactor", "optimizer_args": ["d=-1"]}, "does not fit Adafactor"),
    ],
)
def test_wrong_settings_are_refused(given, changes, message):
    with pytest.raises(ValueError, match=message):
        given("out", **changes)


def test_a_missing_package_is_named_before_anything_is_loaded(given, monkeypatch):
    monkeypatch.setitem(sys.modules, "prodigyopt", None)
    with pytest.raises(ImportError, match="--optimizer=prodigy needs prodigyopt: pip install prodigyopt"):
        given("out", optimizer="prodigy", learning_rate=1.0)


def test_a_run_that_ends_within_its_warm_up_is_told(given, capsys):
    for steps, told in ((1, False), (2, True)):
        train(given(f"out-{steps}", lr_scheduler="cosine", lr_warmup_steps=steps))
        warning = f"Warning: The run has 2 optimizer steps, all of them within --lr_warmup_steps={steps}. Lower it"
        assert (warning in capsys.readouterr().out) == told
