"""Trainings with `--quiet`: messages are left out, and warnings are not."""

import pytest
import torch

from hf_causal_context.bases.gap import BaseGap
from hf_causal_context.contexts import Context
from hf_causal_context.data.reweighting import Doubt, ReweightedContext
from hf_causal_context.messages import progress
from hf_causal_context.training import finetune, reweighting
from hf_causal_context.training.arguments import TrainingArguments
from hf_causal_context.training.autoencoder.arguments import AutoencoderArguments
from hf_causal_context.training.autoencoder.train import train_autoencoder

from .small import settings, write_folders

pytestmark = pytest.mark.usefixtures("on_cpu", "quiet")


@pytest.fixture
def quiet(monkeypatch):
    monkeypatch.setattr(progress, "_quiet", True)


def test_a_quiet_training_warns_of_its_data_its_base_and_what_it_leaves_out(
    pipeline_folder, tmp_path, monkeypatch, capsys
):
    nothing, doubt = torch.zeros(0, dtype=torch.long), Doubt("few", "for a reason", ("slant", "thick"))
    drawn = [ReweightedContext(Context("slant", "thick"), nothing, 2.0, 1.0, doubt)]
    monkeypatch.setattr(reweighting, "reweight", lambda *args, **options: drawn)
    monkeypatch.setattr(finetune, "denoiser_gap", lambda *args: BaseGap("images", 0.9, 0.1, 4))
    data = write_folders(tmp_path / "data")
    changes = {"reweighted_contexts": ["pairs"], "observational_rank": 0, "resolution": 16, "max_train_steps": 1}
    given = settings(pipeline_folder("stable_diffusion"), data, tmp_path / "out", **changes)
    finetune.train(TrainingArguments(**given))
    said = capsys.readouterr().out
    assert "WARNING  Fewer than 50 rows in (observational) (4), slant (4), thick (4)" in said
    assert "The data has no captions: the empty prompt is used." in said
    assert "for a reason; not trained on, left to the mechanism" in said
    assert "WARNING: The base is far from your observational set" in said
    assert "role" not in said  # the table of the data


def test_what_is_no_warning_of_the_base_is_left_out(pipeline_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(finetune, "denoiser_gap", lambda *args: BaseGap("images", 0.9, 0.1, 4))
    data = write_folders(tmp_path / "data")
    finetune.train(TrainingArguments(**settings(pipeline_folder("ddpm"), data, tmp_path / "out", max_train_steps=1)))
    assert "observational set" not in capsys.readouterr().out


def test_a_quiet_training_of_an_autoencoder_warns_of_its_data(tmp_path, capsys):
    data = write_folders(tmp_path / "data")
    given = {"train_data_dir": str(data), "output_dir": str(tmp_path / "out"), "max_train_steps": 1}
    train_autoencoder(AutoencoderArguments(**given, num_validation_images=0, lr_warmup_steps=0))
    assert "WARNING  Fewer than 50 rows" in capsys.readouterr().out
