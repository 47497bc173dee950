"""Training on pairs: what is learned at the states of edits, which pairs are edited, and when."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import get_peft_model

from hf_causal_context import CausalContextConfig, ConceptSet, Context, intervene
from hf_causal_context.bases.loading import as_base
from hf_causal_context.data import InterventionalData
from hf_causal_context.inference.counterfactuals import Sampler
from hf_causal_context.inference.sampling_steps import sampling_steps
from hf_causal_context.training.arguments import TrainingArguments
from hf_causal_context.training.denoiser.edits import MOST_WEIGHT, NUM_STEPS, STATES, EditObjective, Edits, Pairs
from hf_causal_context.training.denoiser.objectives import denoising_objective
from hf_causal_context.training.finetune import train

from .small import adapter_weights, assert_close_to_largest, settings, write_folders
from .tiny_pipelines import PIPELINES

pytestmark = pytest.mark.usefixtures("on_cpu")

KINDS = ("ddpm", "stable_diffusion", "stable_diffusion_3")  # epsilon, velocity, and a flow
CONTEXTS = torch.tensor([[1.0, 0.0], [0.0, 1.0]])


def base_of(name):
    torch.manual_seed(0)
    base = as_base(PIPELINES[name]())
    config = CausalContextConfig(concepts=("slant", "thick"), init_weights=False, observational_rank=2, alpha=2.0)
    return base, get_peft_model(base.denoiser, config).eval()


def edits_for(base):
    """Two pairs of random images."""
    side = base.default_resolution
    clean = base.encode_images(torch.rand(4, base.image_channels, side, side) * 2 - 1).float()
    conditions = base.encode_captions(["a", "b"]) if base.takes_captions else {}
    return Edits(clean[:2], clean[2:], CONTEXTS, conditions, 0, [3, 4])


def output_of(prediction, x, clean, alpha, sigma):
    """What a denoiser puts out that takes `clean` for the clean images of x."""
    noise = (x - alpha * clean) / sigma
    return {
        "epsilon": noise,
        "v_prediction": alpha * noise - sigma * clean,
        "sample": clean,
        "flow": noise - clean,
    }[prediction]


@pytest.mark.parametrize("name", KINDS)
def test_states_are_those_of_an_edit(name):
    base, model = base_of(name)
    edits = edits_for(base)
    steps = sampling_steps(base, NUM_STEPS, edits.factual)
    noise = torch.randn((len(steps), 1, *edits.factual.shape[1:]), generator=torch.Generator().manual_seed(0))
    states, _ = EditObjective(base, denoising_objective(base))._edit(
        model, edits, steps, noise.expand(-1, 2, *noise.shape[2:])
    )

    sampler, seen = Sampler(base, NUM_STEPS, None, None), []
    predict = sampler.predict_clean
    sampler.predict_clean = lambda x, step, conditions: seen.append(x) or predict(x, step, conditions)
    sampler._conditions = lambda contexts: edits.conditions
    with torch.no_grad():
        found = sampler.backward(edits.factual, Context())  # draws the same noise
        del seen[:]
        with intervene(base.pipe, [Context("slant"), Context("thick")]):
            x = found.path[0]
            for number, step in enumerate(steps):
                x = step.mean(x, sampler.predict_clean(x, step, edits.conditions)) + step.deviation * found.maps[number]
    torch.testing.assert_close(states, torch.stack(seen), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", KINDS)
def test_nothing_is_left_to_learn_where_edits_arrive_at_the_partners(name, monkeypatch):
    base, model = base_of(name)
    edits, rows = edits_for(base), []
    guess = torch.randn_like(edits.factual)  # of the image that is edited: wrong, but right in what it changes to

    def predict(model, x, times, conditions, context):
        level = {int(s.time): (s.alpha, s.sigma) for s in sampling_steps(base, NUM_STEPS, edits.factual)}
        a, s = torch.tensor([level[int(t)] for t in times]).T.view(2, -1, *(1,) * (x.ndim - 1))
        pair = context[:, 1].long()  # the second pair is edited to the second concept
        asked = context.any(1)
        if not asked.all():  # the images themselves, then their edits
            pair = torch.arange(len(x)) % 2
        clean = guess[pair] + asked.view(-1, *(1,) * (x.ndim - 1)) * (edits.partner - edits.factual)[pair]
        rows.append(len(x))
        return output_of(base.prediction, x, clean + wrong, a, s)

    monkeypatch.setattr(base, "predict", predict)
    objective = EditObjective(base, denoising_objective(base))
    wrong = 0.0
    losses = objective.losses(model, edits)
    assert losses.shape == (2 * STATES,)
    assert losses.max() < 1e-6
    assert rows[-1] == 2 * STATES
    assert set(rows[:-1]) == {4}  # both pairs and their images at once
    # An error counts by how far the clean image is from where it should be.
    rows_before, shift = len(rows), 0.1

    def off(model, x, times, conditions, context):
        nonlocal wrong
        wrong = shift if len(x) == 2 * STATES else 0.0
        return predict(model, x, times, conditions, context)

    monkeypatch.setattr(base, "predict", off)
    losses = objective.losses(model, edits)
    assert len(rows) == 2 * rows_before
    sigma = torch.tensor([s.sigma for s in sampling_steps(base, NUM_STEPS, edits.factual)])
    allowed = (shift**2 * sigma**-2.0).clamp(max=shift**2 * MOST_WEIGHT)
    assert all((allowed - loss).abs().min() < 1e-4 for loss in losses)
    assert losses.max() <= shift**2 * MOST_WEIGHT * 1.001


class TestPairs:
    @pytest.fixture
    def pairs(self):
        contexts = ["", "", "", "slant", "slant", "thick", "thick", "thick"]
        names = ["a", "b", "c", "a", "?", "a", "b", "c"]
        rows = Dataset.from_dict({"context": contexts, "pair": names})
        data = InterventionalData(rows, ConceptSet(("slant", "thick")), ("", "slant", "thick"), {}, None)
        return lambda **weights: Pairs(data, TrainingArguments(**settings("base", "data", "out")), 5, weights)

    def test_each_context_is_as_likely_and_partners_have_the_name(self, pairs):
        slots, rows, partners = pairs().chosen(5, range(8000))
        assert slots == [*range(1000)]
        assert {*zip(rows, partners, strict=True)} == {(3, 0), (5, 0), (6, 1), (7, 2)}
        assert np.mean(np.array(rows) == 3) == pytest.approx(0.5, abs=0.05)

    def test_it_is_said_how_many_and_from_when_on(self, pairs):
        assert "After 25% of the steps, batches also edit some of the 4 pairs" in pairs().told(0.25)
        assert "the training does not look at them: none is in a context" in pairs(slant=0, thick=0).told(0.25)

    def test_they_belong_to_slots_and_begin_late(self, pairs):
        pairs = pairs()
        assert pairs.chosen(4, range(8)) == ([], [], [])
        whole = pairs.chosen(6, range(64, 128))
        assert whole == pairs.chosen(9, range(64, 128))
        assert pairs.chosen(9, range(64, 96)) == tuple(part[:4] for part in whole)

    @pytest.mark.parametrize("size", [1, 3, 4, 8, 12])
    def test_one_row_in_eight_is_edited_and_all_count_alike_in_batches_of_any_size(self, size, pairs):
        pairs, counts, samples, states = pairs(), [], 0.0, 0.0
        for batch in range(5, 5 + 48):
            edited = len(pairs.chosen(batch, range(batch * size, (batch + 1) * size))[0])
            counts.append(edited)
            each = pairs.weight(batch, size, edited) / (size + STATES * edited)  # of every loss in the mean
            samples, states = samples + size * each, states + STATES * edited * each
        assert counts[0] == max(counts)
        assert sum(counts) == 48 * size / 8
        assert (samples / 48, states / 48) == pytest.approx((2 / 3, 1 / 3))
        assert pairs.weight(4, size, 0) == 1

    def test_contexts_have_their_shares_of_the_batches(self, pairs):
        assert {*pairs(slant=0).chosen(5, range(8000))[1]} == {5, 6, 7}
        rows = np.array(pairs(slant=3).chosen(5, range(8000))[1])
        assert np.mean(rows == 3) == pytest.approx(0.75, abs=0.05)
        assert pairs(slant=0, thick=0).chosen(5, range(8000)) == ([], [], [])


@pytest.fixture
def folders(tmp_path):
    return write_folders(tmp_path / "data")


@pytest.mark.parametrize("name", KINDS)
def test_a_run_learns_from_pairs_after_its_first_steps_and_resumes_bit_for_bit(
    name, pipeline_folder, folders, tmp_path
):
    def run(folder, **changes):
        place = (pipeline_folder(name), folders, tmp_path / folder)
        given = settings(*place, max_train_steps=4, checkpointing_steps=1, observational_steps=0, **changes)
        train(TrainingArguments(**given))
        return tmp_path / folder

    plain, paired = run("plain"), run("paired", paired_files=True)
    for step, equal in ((1, True), (2, False)):  # it begins with the second step
        one, other = (adapter_weights(folder / f"checkpoint-{step}") for folder in (plain, paired))
        assert all(torch.equal(one[key], other[key]) for key in one) == equal, step
    again = run("again", paired_files=True, resume_from_checkpoint=str(paired / "checkpoint-3"))
    whole = adapter_weights(paired)
    assert all(torch.equal(value, whole[key]) for key, value in adapter_weights(again).items())


def test_a_run_that_is_made_longer_goes_on_with_its_edits(pipeline_folder, folders, tmp_path, capsys):
    given = settings(pipeline_folder("ddpm"), folders, tmp_path / "out", paired_files=True, observational_steps=0)
    train(TrainingArguments(**given | {"max_train_steps": 4}))
    assert "After 25% of the steps" in capsys.readouterr().out
    for steps in (8, 10):
        train(TrainingArguments(**given | {"max_train_steps": steps, "resume_from_checkpoint": "latest"}))
        assert f"After {1 / steps:.0%} of the steps" in capsys.readouterr().out


def test_accumulated_batches_learn_as_whole_ones_do(pipeline_folder, tmp_path):
    folders, trained = write_folders(tmp_path / "data", images=8), []
    for size in (8, 1):
        given = settings(pipeline_folder("ddpm"), folders, tmp_path / str(size), paired_files=True)
        given |= {"train_batch_size": size, "gradient_accumulation_steps": 8 // size, "observational_steps": 0}
        train(TrainingArguments(**given | {"max_train_steps": 4}))
        trained.append(adapter_weights(tmp_path / str(size)))
    assert_close_to_largest(trained[1], trained[0], 1e-3)


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("stable_diffusion", {"train_text_encoder": True}, "text encoders would have to be trained along edits"),
        ("stable_diffusion", {"aspect_ratio_buckets": True}, "in buckets, both images of a pair may have different"),
    ],
)
def test_where_pairs_are_not_trained_on_it_is_said(name, changes, reason, pipeline_folder, folders, tmp_path, capsys):
    changes = {"paired_files": True, "max_train_steps": 1} | changes
    train(TrainingArguments(**settings(pipeline_folder(name), folders, tmp_path / "out", **changes)))
    assert f"the training does not look at them: {reason}" in capsys.readouterr().out


def test_images_with_masks_are_not_edited(pipeline_folder, folders, tmp_path, capsys):
    for image in [*folders.rglob("*.png")]:
        image.with_suffix(".mask.png").write_bytes(image.read_bytes())
    train(TrainingArguments(**settings(pipeline_folder("ddpm"), folders, tmp_path / "out", paired_files=True)))
    assert "does not look at them: nobody knows what edits should do where masks" in capsys.readouterr().out
