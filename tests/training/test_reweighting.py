"""Reweighted combinations in a run: drawn once, mixed into batches, read again when it goes on."""

import dataclasses
import json

import pytest
import torch

from hf_causal_context.data import density_ratios, load_folders
from hf_causal_context.training import reweighting
from hf_causal_context.training.arguments import TrainingArguments
from hf_causal_context.training.bases import load_base
from hf_causal_context.training.batches import DenoiserBatches
from hf_causal_context.training.finetune import attach_adapter, train
from hf_causal_context.training.reweighting import FILE, add_reweighted_contexts

from .small import adapter_weights, settings, write_folders

pytestmark = pytest.mark.usefixtures("on_cpu")


@pytest.fixture
def given(pipeline_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(density_ratios, "NUM_MODELS", 1)
    monkeypatch.setattr(density_ratios, "FEWEST_STEPS", 2)
    monkeypatch.setattr(density_ratios, "SMALLEST_BATCH", 2)
    monkeypatch.setattr("hf_causal_context.data.reweighting.LARGEST_MASS_ERROR", 1e9)
    monkeypatch.setattr(reweighting, "MIN_EFFECTIVE_SAMPLE_SIZE", 1)
    monkeypatch.setattr("hf_causal_context.data.reweighting.MIN_EFFECTIVE_SAMPLE_SIZE", 1)
    data = write_folders(tmp_path / "data", contexts=("obs", "slant", "thick", "slant+thick"))
    changes = {"reweighted_contexts": ["pairs"], "checkpointing_steps": 1}
    return settings(pipeline_folder("ddpm"), data, tmp_path / "out", **changes)


def add(given, **changes):
    arguments = TrainingArguments(**(given | changes))
    base = load_base(arguments.pretrained_model_name_or_path)
    data = load_folders(arguments.train_data_dir, streaming=arguments.streaming)
    model = attach_adapter(base, data, arguments)
    return add_reweighted_contexts(data, base, model, arguments, is_main_process=True), base, arguments


@pytest.mark.parametrize("weights", [[], ["slant+thick=2"]])
def test_a_combination_gets_its_share_of_rows_of_single_interventions(given, weights):
    data, base, arguments = add(given, context_weights=weights, train_batch_size=7)
    assert data.contexts == ("", "slant", "thick")
    drawn = set(data.reweighted["slant+thick"].tolist())
    assert drawn <= set(range(12))
    stream = DenoiserBatches(base, data, arguments, 10, torch.device("cpu"))(0)
    masks = torch.cat([next(stream).context for _ in range(10)])
    of_pair = int((masks.sum(1) == 2).sum())
    assert of_pair == pytest.approx(70 * (2 / 5 if weights else 0.5 / 3.5), abs=1)
    # its pictures are those of the drawn rows
    unweighted = dataclasses.replace(arguments, context_weights=[])
    plain = DenoiserBatches(base, dataclasses.replace(data, reweighted={}), unweighted, 10, torch.device("cpu"))
    pictures = torch.cat([batch.clean for batch, _ in zip(plain(0), range(10), strict=False)])
    known = {tuple(picture.flatten().tolist()) for picture in pictures}
    mixed = DenoiserBatches(base, data, arguments, 10, torch.device("cpu"))(0)
    assert {tuple(picture.flatten().tolist()) for _ in range(10) for picture in next(mixed).clean} <= known


def test_a_run_trains_on_the_combination_and_resumes_exactly(given, tmp_path, capsys):
    train(TrainingArguments(**given))
    assert "slant+thick" in capsys.readouterr().out.split("effective sample size")[1]
    stored = json.loads((tmp_path / "out" / FILE).read_text())
    assert stored["made_from"] == {"rows": 12, "seed": 0, "combinations": ["slant+thick"]}
    whole = adapter_weights(tmp_path / "out")

    half = given | {"output_dir": str(tmp_path / "half")}
    train(TrainingArguments(**half | {"max_train_steps": 1}))
    # drawn rows are read, not estimated again
    density_ratios.FEWEST_STEPS = 3
    train(TrainingArguments(**half | {"resume_from_checkpoint": "latest"}))
    resumed = adapter_weights(tmp_path / "half")
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())

    without = given | {"output_dir": str(tmp_path / "without"), "reweighted_contexts": []}
    train(TrainingArguments(**without))
    assert any(not torch.equal(tensor, whole[n]) for n, tensor in adapter_weights(tmp_path / "without").items())


def test_combinations_without_support_are_named_and_left_out(given, monkeypatch, capsys):
    for module in (reweighting, "hf_causal_context.data.reweighting"):
        target = module if isinstance(module, str) else module.__name__
        monkeypatch.setattr(f"{target}.MIN_EFFECTIVE_SAMPLE_SIZE", 1000)
    data, *_ = add(given)
    assert data.reweighted == {}
    output = capsys.readouterr().out
    assert "below 1000: not trained on, left to the mechanism" in output
    assert "More rows of the sets 'slant', 'thick' would help" in output


def test_a_combination_with_rows_of_its_own_needs_none(given, tmp_path):
    train(TrainingArguments(**given, training_contexts=["obs", "slant", "thick", "slant+thick"]))
    assert not (tmp_path / "out" / FILE).exists()


def test_what_cannot_be_reweighted_is_an_error(given, tmp_path):
    with pytest.raises(ValueError, match="draws rows by number, which a stream has not. Leave --streaming out"):
        add(given, streaming=True)
    with pytest.raises(ValueError, match="Unknown concept 'round'"):
        add(given, reweighted_contexts=["round+thick"])
    train(TrainingArguments(**given | {"max_train_steps": 1}))
    with pytest.raises(ValueError, match="was made from other data or settings .* Resume with those, or choose"):
        add(given, seed=1)
