"""Reweighted combinations in a run: drawn once, mixed into batches, read again when it goes on."""

import dataclasses
import json
import re

import pytest
import torch
from accelerate import Accelerator

from hf_causal_context.bases.images import read_image
from hf_causal_context.bases.loading import load_base
from hf_causal_context.contexts import Context
from hf_causal_context.data import density_ratios, load_folders, reweighting
from hf_causal_context.data.reweighting import Doubt, ReweightedContext
from hf_causal_context.training.arguments import TrainingArguments
from hf_causal_context.training.denoiser.batches import DenoiserBatches
from hf_causal_context.training.denoiser.features import denoiser_features
from hf_causal_context.training.finetune import train
from hf_causal_context.training.loop.processes import make_accelerator
from hf_causal_context.training.recipe import attach_adapter
from hf_causal_context.training.reweighting import FILE, RATIOS, add_reweighted_contexts, table

from .small import adapter_weights, settings, write_folders

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("on_cpu")


@pytest.fixture
def given(pipeline_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(density_ratios, "NUM_MODELS", 1)
    monkeypatch.setattr(density_ratios, "FEWEST_STEPS", 2)
    monkeypatch.setattr(density_ratios, "SMALLEST_BATCH", 2)
    monkeypatch.setattr(reweighting, "LARGEST_MASS_ERROR", 1e9)
    for name, value in {"MIN_EFFECTIVE_SAMPLE_SIZE": 1, "_LEAST_CONTRAST": -1, "_LEAST_PRESENCE": 0}.items():
        monkeypatch.setattr(reweighting, name, value)
    monkeypatch.setattr(reweighting, "_LEAST_OVERLAP", 0)
    data = write_folders(tmp_path / "data", contexts=("obs", "slant", "thick", "slant+thick"))
    changes = {"reweighted_contexts": ["pairs"], "checkpointing_steps": 1}
    return settings(pipeline_folder("ddpm"), data, tmp_path / "out", **changes)


def add(given, **changes):
    arguments = TrainingArguments(**(given | changes))
    base = load_base(arguments.pretrained_model_name_or_path)
    data = load_folders(arguments.train_data_dir, streaming=arguments.streaming)
    accelerator = make_accelerator(arguments)
    attach_adapter(base.denoiser, data, arguments)
    fingerprint = {"resolution": arguments.resolution}

    def look(rows):
        return denoiser_features(base, rows["image"], base.default_resolution)

    return add_reweighted_contexts(data, arguments, accelerator, look, fingerprint), base, arguments


@pytest.mark.parametrize("weights", [[], ["slant+thick=2"]])
def test_a_combination_gets_its_share_of_rows_of_single_interventions(given, weights):
    data, base, arguments = add(given, context_weights=weights, train_batch_size=7)
    assert data.contexts == ("", "slant", "thick")
    drawn = set(data.reweighted["slant+thick"].tolist())
    assert drawn <= set(range(12))
    stream = DenoiserBatches(base, data, arguments, 10, CPU)(0)
    masks = torch.cat([next(stream).context for _ in range(10)])
    of_pair = int((masks.sum(1) == 2).sum())
    assert of_pair == pytest.approx(70 * (2 / 5 if weights else 0.5 / 3.5), abs=1)
    # its images are those of the drawn rows
    size = (base.image_channels, base.default_resolution)
    known = {hash(read_image(data.rows[row]["image"], *size).tobytes()) for row in drawn}
    mixed = DenoiserBatches(base, data, dataclasses.replace(arguments, dataloader_num_workers=1), 10, CPU)(0)
    batches = [next(mixed) for _ in range(10)]
    images = torch.cat([batch.clean[batch.context.sum(1) == 2] for batch in batches])
    seen = {hash(p.numpy().tobytes()) for p in ((images + 1) * 127.5).round().to(torch.uint8)}
    assert seen <= known
    assert len(seen) > 1


def test_a_run_trains_on_the_combination_and_resumes_exactly(given, tmp_path, capsys, monkeypatch):
    train(TrainingArguments(**given))
    assert "slant+thick" in capsys.readouterr().out.split("effective sample size")[1]
    stored = json.loads((tmp_path / "out" / FILE).read_text())
    assert stored["made_from"]["combinations"] == ["slant+thick"]
    assert len(stored["contexts"]["slant+thick"]["rows"]) == 4
    whole = adapter_weights(tmp_path / "out")

    half = given | {"output_dir": str(tmp_path / "half")}
    train(TrainingArguments(**half | {"max_train_steps": 1}))
    # drawn rows are read, not estimated again
    monkeypatch.setattr("hf_causal_context.training.reweighting.reweight", lambda *a, **b: pytest.fail("estimated"))
    train(TrainingArguments(**half | {"resume_from_checkpoint": "latest"}))
    resumed = adapter_weights(tmp_path / "half")
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())

    elsewhere = given | {"output_dir": str(tmp_path / "elsewhere"), "max_train_steps": 3}
    for checkpoint in (tmp_path / "half" / "checkpoint-1", "latest"):
        train(TrainingArguments(**elsewhere | {"resume_from_checkpoint": str(checkpoint)}))
        assert json.loads((tmp_path / "elsewhere" / FILE).read_text()) == stored

    without = given | {"output_dir": str(tmp_path / "without"), "reweighted_contexts": []}
    train(TrainingArguments(**without))
    assert any(not torch.equal(tensor, whole[n]) for n, tensor in adapter_weights(tmp_path / "without").items())


def test_an_interruption_keeps_the_estimates_and_says_so(given, tmp_path, monkeypatch):
    expected, *_ = add(given)
    take_step = density_ratios._Fit.take_step
    monkeypatch.setattr(density_ratios, "STEPS_PER_SAVE", 1)
    taken = []

    def interrupted(fit):
        if len(taken) == 3:
            taken.append(None)
            raise KeyboardInterrupt
        take_step(fit)
        taken.append(fit.step)

    monkeypatch.setattr(density_ratios._Fit, "take_step", interrupted)
    elsewhere = {"output_dir": str(tmp_path / "interrupted")}
    kept = re.escape(str(tmp_path / "interrupted" / RATIOS))
    with pytest.raises(KeyboardInterrupt, match=f"kept in {kept}. Go on by running the same command again"):
        add(given, **elsewhere)
    resumed, *_ = add(given, **elsewhere)
    assert resumed.reweighted["slant+thick"].tolist() == expected.reweighted["slant+thick"].tolist()
    taken.remove(None)
    assert len(taken) == 2 * density_ratios._size_and_steps(6, 2)[1]  # of two fits


def test_an_interruption_before_anything_is_kept_says_so(given, monkeypatch):
    def interrupted(fit):
        raise KeyboardInterrupt

    monkeypatch.setattr(density_ratios._Fit, "take_step", interrupted)
    with pytest.raises(KeyboardInterrupt, match=r"None is kept yet. Start anew by running the same command again\."):
        add(given)


def test_combinations_without_support_are_named_and_left_out(given, monkeypatch, capsys):
    monkeypatch.setattr(reweighting, "MIN_EFFECTIVE_SAMPLE_SIZE", 1000)
    data, *_ = add(given)
    assert data.reweighted == {}
    output = capsys.readouterr().out
    assert "fewer than 1000; not trained on, left to the mechanism" in output
    assert "More rows of the sets 'slant', 'thick' would help" in output


ADVICE = {
    "apart": r"a\+b: more rows of the same kind hardly help, .* What helps: some rows in which all of it was changed, "
    r"trained on with --training_contexts; observational rows in which 'a', 'b' come by themselves at times, .*; or "
    "softer edits, .*some unedited rows look edited. If the tool leaves a trace .* Else leave these combinations to "
    "the mechanism",
    "alike": r"a\+b: the base sees no difference between the sets of 'a', 'b' and the observational one. Look whether "
    "the rows were changed at all",
    "few": r"More rows of the sets 'a', 'b' would help a\+b, or rows in which",
    "contradictory": r"a\+b: more rows of the sets 'a', 'b' would help if .* If they were selected, or share another "
    "change, leave these combinations to the mechanism",
}


@pytest.mark.parametrize("kind", ADVICE)
def test_each_kind_of_doubt_has_advice_that_fits_it(kind):
    doubt = Doubt(kind, "for a reason", ("a", "b"))
    nothing = torch.zeros(0, dtype=torch.long)
    drawn = [
        ReweightedContext(Context("a", "b"), nothing, 451.4, 1.0, doubt),
        ReweightedContext(Context("long", "name"), torch.arange(3), 120.0, 1.0, None),
    ]
    lines = table(drawn).splitlines()
    shown = "-" if kind in ("apart", "alike") else "451"
    assert lines[1] == f"  a+b        {shown:>9}  for a reason; not trained on, left to the mechanism"
    assert lines[2] == "  long+name        120"
    assert len(lines) == 4
    assert re.match(ADVICE[kind], lines[3])
    assert ("more rows of the sets" in lines[3].lower()) == (kind in ("few", "contradictory"))
    assert len(table(drawn[1:]).splitlines()) == 2


def test_other_processes_read_what_the_main_one_drew(given, monkeypatch):
    drawn, *_ = add(given)
    monkeypatch.setattr(Accelerator, "is_main_process", False)
    monkeypatch.setattr(density_ratios, "FEWEST_STEPS", 3)
    read, *_ = add(given)
    assert read.reweighted["slant+thick"].tolist() == drawn.reweighted["slant+thick"].tolist()
    with pytest.raises(FileNotFoundError, match="All processes must share the folder --output_dir"):
        add(given, output_dir=given["output_dir"] + "-elsewhere")


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("name", ["stable_diffusion", "stable_diffusion_3"])
def test_latents_in_any_precision(given, pipeline_folder, precision, name, tmp_path):
    changes = {"pretrained_model_name_or_path": pipeline_folder(name), "mixed_precision": precision, "resolution": 16}
    train(TrainingArguments(**given | changes))
    assert json.loads((tmp_path / "out" / FILE).read_text())["contexts"]["slant+thick"]["rows"]


def test_a_combination_with_rows_of_its_own_needs_none(given, tmp_path):
    train(TrainingArguments(**given, training_contexts=["obs", "slant", "thick", "slant+thick"]))
    assert not (tmp_path / "out" / FILE).exists()


def test_what_cannot_be_reweighted_is_an_error(given, tmp_path):
    with pytest.raises(ValueError, match="draws rows by number, which a stream has not. Leave --streaming or it out"):
        add(given, streaming=True)
    with pytest.raises(ValueError, match="draws rows by number, which a stream has not"):
        train(TrainingArguments(**given), data=load_folders(given["train_data_dir"], streaming=True))
    with pytest.raises(ValueError, match="Unknown concept 'round'"):
        add(given, reweighted_contexts=["round+thick"])
    train(TrainingArguments(**given | {"max_train_steps": 1, "reweighted_contexts": []}))
    with pytest.raises(ValueError, match="holds checkpoints of a run without --reweighted_contexts"):
        add(given)
    given["output_dir"] += "-2"
    train(TrainingArguments(**given | {"max_train_steps": 1}))
    with pytest.raises(ValueError, match="was made from other data or settings .* Resume with those, or choose"):
        add(given, seed=1)
