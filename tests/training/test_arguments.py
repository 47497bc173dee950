"""What the settings refuse, before any work is lost."""

import dataclasses

import pytest

from hf_causal_context.training.arguments import TextArguments, TrainingArguments
from hf_causal_context.training.autoencoder.arguments import AutoencoderArguments

BASE = {"pretrained_model_name_or_path": "base", "output_dir": "out"}


@pytest.mark.parametrize("settings", [TrainingArguments, TextArguments])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pretrained_model_name_or_path": ""}, "Missing: --pretrained_model_name_or_path. Give the base and the"),
        ({"output_dir": ""}, "Missing: --output_dir. Give the base and the folder"),
        ({"mechanism": "magic"}, "--mechanism=magic is unknown. Allowed: independent, reduced, structural"),
        ({"concept_rank": 0}, "--concept_rank=0 must be at least 1"),
        ({"learning_rate": 0.0}, "--learning_rate=0.0 must be positive"),
        ({"learning_rate": float("inf")}, "--learning_rate=inf must be positive, and at most 3.4"),
        ({"optimizer": "adafactor", "optimizer_args": ["lr=1"]}, "lr=1 has an option of its own. Give --learning_rate"),
        ({"adam_beta2": 1.0}, "--adam_beta2=1.0 must be at least 0 and below 1"),
        ({"adam_epsilon": -1.0}, "--adam_epsilon=-1.0 must be at least 0"),
        ({"lr_warmup_steps": 5}, "constant_with_warmup warms a constant rate up, so --lr_warmup_steps would have no"),
        (
            {"optimizer": "adafactor", "adam_beta1": 0.5, "adam_weight_decay": 0.3},
            "has its settings in --optimizer_args, so --adam_beta1, --adam_weight_decay would have no effect",
        ),
        ({"ema_decay": 0.5}, "--use_ema was not given, so --ema_decay would have no effect"),
        ({"logging_dir": "runs"}, "--report_to was not given, so --logging_dir would have no effect"),
        ({"hub_model_id": "user/name"}, "--push_to_hub was not given, so --hub_model_id would have no effect"),
        ({"mixed_precision": "fp8"}, "--mixed_precision=fp8 is unknown. Allowed: no, fp16, bf16"),
    ],
)
def test_adapters_of_all_bases(settings, changes, message):
    with pytest.raises(ValueError, match=message):
        settings(**(BASE | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_length": 1}, "--max_length=1 must be at least 2"),
        ({"num_validation_texts": -1}, "--num_validation_texts=-1 must be at least 0"),
        ({"max_new_tokens": 0}, "--max_new_tokens=0 must be at least 1"),
        (
            {"packing": True, "streaming": True},
            "--packing puts texts together before .* Leave --streaming or --packing",
        ),
    ],
)
def test_texts(changes, message):
    with pytest.raises(ValueError, match=message):
        TextArguments(**(BASE | changes))


@pytest.mark.parametrize(
    ("settings", "needed"), [(TrainingArguments, BASE), (AutoencoderArguments, {"output_dir": "o"})]
)
def test_images(settings, needed):
    with pytest.raises(ValueError, match="--num_validation_images=-1 must be at least 0"):
        settings(**needed, num_validation_images=-1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prior_loss_weight": 5.0}, "--class_data_dir was not given, so --prior_loss_weight would have no effect"),
        ({"streaming": True, "dataloader_num_workers": 2}, "read in one process, so --dataloader_num_workers would"),
        ({"snr_gamma": 0.0}, "--snr_gamma=0.0 must be positive: with 0, every loss is 0"),
    ],
)
def test_what_has_no_effect_on_images(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainingArguments(**BASE, **changes)


def test_a_warm_up_needs_a_schedule_with_one():
    for scheduler, steps in (("constant_with_warmup", 5), ("cosine", 5), ("constant", 0)):
        assert TrainingArguments(**BASE, lr_scheduler=scheduler, lr_warmup_steps=steps).lr_warmup_steps == steps


def test_texts_are_asked_nothing_about_images():
    names = {field.name for field in dataclasses.fields(TextArguments)}
    assert names.isdisjoint({"num_validation_images", "image_column", "caption_column", "class_column", "resolution"})
