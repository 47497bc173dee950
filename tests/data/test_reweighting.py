"""Rows that stand for combinations: exact with true density ratios, and what the draw and its errors promise."""

import re

import numpy as np
import pytest
import torch

from hf_causal_context.contexts import ConceptSet, Context
from hf_causal_context.data import density_ratios, reweighting
from hf_causal_context.data.density_ratios import estimate_log_ratios, whiteness_penalty
from hf_causal_context.data.reweighting import (
    MIN_EFFECTIVE_SAMPLE_SIZE,
    cap,
    combination_logits,
    draw,
    draw_combinations,
    effective_sample_size,
    reweight,
    wanted_combinations,
    without_rows,
)
from hf_causal_context.data.worlds.linear_gaussian import LinearGaussianModel

CONCEPTS = ConceptSet(("a", "b"))
EFFECT, MEAN, SPREAD = 0.8, 1.0, 0.8
# a -> b, and an effect c of both that nobody intervenes on
WORLD = LinearGaussianModel(
    ("a", "b", "c"),
    effects={("a", "b"): EFFECT, ("a", "c"): 0.5, ("b", "c"): -0.5},
    deviations=(1.0, 0.6, 0.3),
    interventions={"a": (MEAN, SPREAD), "b": (-MEAN, SPREAD)},
)
SETS = ((), "a", "b")


@pytest.fixture
def short(monkeypatch):
    """Estimates in seconds."""
    for name, value in {"NUM_MODELS": 1}.items():
        monkeypatch.setattr(density_ratios, name, value)


def world(num, seed=0):
    rows = [WORLD.sample(num, context, np.random.default_rng(seed + i)) for i, context in enumerate(SETS)]
    contexts = [str(Context(context)) if context else "" for context in SETS for _ in range(num)]
    return torch.from_numpy(np.concatenate(rows)).float(), contexts


def true_log_ratios(rows):
    def log_normal(x, mean, deviation):
        return -0.5 * ((x - mean) / deviation) ** 2 - np.log(deviation)

    a, b = rows[:, 0], rows[:, 1]
    of_a = log_normal(a, MEAN, SPREAD) - log_normal(a, 0, 1)
    of_b = log_normal(b, -MEAN, SPREAD) - log_normal(b, EFFECT * a, 0.6)
    return torch.stack([of_a, of_b], dim=1)


def test_pooled_rows_weighted_by_the_true_ratios_follow_the_pair():
    rows, _ = world(40_000)
    truth = torch.from_numpy(WORLD.sample(40_000, ("a", "b"), np.random.default_rng(9))).float()
    logits = combination_logits(true_log_ratios(rows), torch.full((3,), 1 / 3), [0, 1])
    assert float(logits.exp().mean()) == pytest.approx(1, abs=0.1)
    weights = logits.softmax(0).float()
    mean = weights @ rows
    assert mean == pytest.approx(truth.mean(0), abs=0.06)
    assert ((rows - mean).T * weights) @ (rows - mean) == pytest.approx(truth.T.cov(), abs=0.06)
    # not what the rows of either set look like
    assert abs(rows[40_000:80_000].mean(0) - truth.mean(0)).max() > 0.5


def test_a_world_knows_its_log_ratios():
    rows, _ = world(100)
    found = np.stack([WORLD.log_ratio(rows.double().numpy(), name) for name in ("a", "b")], axis=1)
    assert found == pytest.approx(true_log_ratios(rows.double()).numpy(), abs=1e-9)


def test_shares_of_the_sets_are_accounted_for():
    rows, _ = world(40_000)
    kept = torch.cat([torch.arange(10_000), torch.arange(40_000, 80_000), torch.arange(80_000, 100_000)])
    shares = torch.tensor([1.0, 4.0, 2.0]) / 7
    truth = torch.from_numpy(WORLD.sample(40_000, ("a", "b"), np.random.default_rng(9))).float()
    weights = combination_logits(true_log_ratios(rows[kept]), shares, [0, 1]).softmax(0).float()
    assert weights @ rows[kept] == pytest.approx(truth.mean(0), abs=0.06)


def test_the_effective_sample_size_counts_rows():
    assert effective_sample_size(torch.full((40,), 1 / 40)) == pytest.approx(40)
    assert effective_sample_size(torch.tensor([0.5, 0.5, 0.0, 0.0])) == pytest.approx(2)


def test_a_draw_takes_every_row_as_often_as_its_weight_says():
    weights = torch.rand(2000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights /= weights.sum()
    drawn = draw(weights, 5000, torch.Generator().manual_seed(1))
    counts = torch.bincount(drawn, minlength=2000)
    assert len(drawn) == 5000
    assert (counts - 5000 * weights).abs().max() < 1
    assert drawn.equal(draw(weights, 5000, torch.Generator().manual_seed(1)))


def test_no_row_fills_a_combination():
    weights = torch.full((2000,), 1e-6, dtype=torch.float64)
    weights[7] = 1.0
    drawn = draw(cap(weights), 10_000, torch.Generator().manual_seed(0))
    assert (drawn == 7).sum() <= 31


@pytest.mark.slow
def test_estimated_ratios_find_the_pair_in_which_one_concept_causes_the_other(short):
    latents, contexts = world(3000)
    # rotated and squashed, so that concepts must be found
    mixing = torch.linalg.qr(torch.randn(6, 3, generator=torch.Generator().manual_seed(0))).Q
    inputs = torch.tanh(latents @ mixing.T / 2)
    (pair,) = reweight(inputs, contexts, CONCEPTS, [Context("a", "b")], seed=0)
    assert pair.doubt is None
    assert len(pair.rows) == 3000
    truth = WORLD.sample(20_000, ("a", "b"), np.random.default_rng(9))
    assert latents[pair.rows].mean(0).numpy() == pytest.approx(truth.mean(0), abs=0.25)
    assert abs(np.corrcoef(latents[pair.rows, :2].T.numpy())[0, 1]) < 0.3  # in do(a), 0.7


@pytest.mark.parametrize("of_b", [0.0, -9.0])
def test_what_the_data_does_not_hold_is_left_to_the_mechanism(of_b, monkeypatch):
    rows, contexts = world(200)
    estimate = torch.full((600, 2), of_b)
    estimate[:, 0] = 0.0
    if not of_b:
        estimate[3] = 12.0  # a single row looks like both
    monkeypatch.setattr(reweighting, "estimate_log_ratios", lambda *args, **kwargs: estimate)
    (pair,) = reweight(rows, contexts, CONCEPTS, [Context("a", "b")], seed=0)
    assert pair.doubt
    assert len(pair.rows) == 0
    if of_b:
        assert pair.effective_sample_size == pytest.approx(600)  # all rows alike, in being impossible
        assert pair.mass < 0.001
    else:
        assert pair.effective_sample_size < MIN_EFFECTIVE_SAMPLE_SIZE


def test_rows_of_enormous_weight_do_not_hide_the_others_that_carry_a_pair():
    codes = torch.arange(3).repeat_interleave(1000)
    shown = torch.zeros(3000, 2, dtype=torch.bool)
    shown[800:] = True  # some observational rows show both, and all of the sets do
    ratios = torch.where(shown, 0.6, -9.0)
    ratios[1500] = 6.4  # nearly a fifth of the weight
    (pair,) = draw_combinations(ratios, codes, CONCEPTS, [Context("a", "b")], seed=0)
    assert pair.effective_sample_size > 1000
    assert pair.doubt is None
    assert shown[pair.rows].all()
    assert (pair.rows == 1500).sum() <= 4
    ratios[1500:1503] = 6.4  # two fifths
    (pair,) = draw_combinations(ratios, codes, CONCEPTS, [Context("a", "b")], seed=0)
    assert pair.doubt is not None
    assert pair.doubt.kind == "few"
    assert pair.effective_sample_size < MIN_EFFECTIVE_SAMPLE_SIZE


def test_rows_of_other_contexts_are_not_used_and_a_missing_set_is_an_error(short):
    rows, contexts = world(300)
    marked = ["a=0.5" if i % 3 == 0 else context for i, context in enumerate(contexts)]
    (pair,) = reweight(rows, marked, CONCEPTS, [Context("a", "b")], seed=0)
    assert not (pair.rows % 3 == 0).any()
    without = [context.replace("b", "a") for context in contexts]
    with pytest.raises(ValueError, match="one set per concept at strength 1, .* the set of 'b' has 0. Add rows"):
        reweight(rows, without, CONCEPTS, [Context("a", "b")], seed=0)


@pytest.mark.parametrize(
    ("effect", "doubt", "kind"),
    [(6.0, "no rows look like all of it: most lack '.'", "apart"), (0.0, "cannot be told from the obs", "alike")],
)
def test_sets_that_never_overlap_and_sets_that_do_not_differ_are_doubted(effect, doubt, kind):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(900, 32, generator=generator)
    rows[300:600, 0] += effect
    rows[600:, 1] += effect
    contexts = [""] * 300 + ["a"] * 300 + ["b"] * 300
    (pair,) = reweight(rows, contexts, CONCEPTS, [Context("a", "b")], seed=0, input_noise=0.8, dropout=0.5)
    assert pair.doubt is not None
    assert re.search(doubt, pair.doubt.reason)
    assert pair.doubt.kind == kind
    assert len(pair.rows) == 0


def marked(num, natural, done=1.0):
    """Rows (3 num, 2) that show "a" and "b" by themselves or because of do(a), do(b), and their true log ratios.

    A concept comes by itself at the rate `natural`, under intervention on it at the rate `done`.
    """
    rng = np.random.default_rng(0)
    rates = np.full((len(SETS), 2), natural)
    rates[1, 0] = rates[2, 1] = done
    shown = rng.random((len(SETS) * num, 2)) < rates.repeat(num, 0)
    never = 1e-4
    ratios = np.where(shown, done / max(natural, never), max(1 - done, never) / (1 - natural))
    return torch.from_numpy(shown), torch.from_numpy(np.log(ratios)).float()


def draw_pair(monkeypatch, shown, log_ratios):
    monkeypatch.setattr(reweighting, "estimate_log_ratios", lambda *args, **kwargs: log_ratios)
    contexts = [str(Context(context)) if context else "" for context in SETS for _ in range(len(shown) // 3)]
    (pair,) = reweight(shown.float(), contexts, CONCEPTS, [Context("a", "b")], seed=0)
    return pair


def test_edits_of_everything_or_of_some_rows_carry_no_pair_where_nothing_varies_by_itself(monkeypatch):
    for done in (1.0, 0.7):
        shown, log_ratios = marked(1000, natural=0.0, done=done)
        pair = draw_pair(monkeypatch, shown, log_ratios)
        assert pair.effective_sample_size > 1000  # which is why it says nothing here
        assert pair.doubt is not None
        assert pair.doubt.kind == "apart"
        assert pair.doubt.concepts == ("a", "b")
        assert len(pair.rows) == 0
    # the same edits, of rows some of which show a concept by themselves
    shown, log_ratios = marked(1000, natural=0.2, done=0.7)
    pair = draw_pair(monkeypatch, shown, log_ratios)
    assert pair.doubt is None
    assert shown[pair.rows].all(1).double().mean() == pytest.approx(0.7 * 0.7, abs=0.03)


def test_few_rows_are_told_from_sets_that_lie_apart(monkeypatch):
    pair = draw_pair(monkeypatch, *marked(60, natural=0.3))
    assert pair.doubt == reweighting.Doubt("few", f"fewer than {MIN_EFFECTIVE_SAMPLE_SIZE}", ("a", "b"))
    assert draw_pair(monkeypatch, *marked(600, natural=0.3)).doubt is None


def test_rows_that_look_like_one_concept_or_the_other_are_not_the_pair(monkeypatch):
    shown, log_ratios = marked(1000, natural=0.1)
    # Estimates from few rows are not sure of what a row lacks; so rows with one concept come into the pair.
    pair = draw_pair(monkeypatch, shown, log_ratios.clamp(min=-0.2))
    assert pair.doubt is not None
    assert pair.doubt.kind == "few"
    assert re.search(r"only \d+% of the rows look like all of it", pair.doubt.reason)


def test_densities_that_contradict_each_other_are_said_to(monkeypatch):
    shown, log_ratios = marked(1000, natural=0.3)
    log_ratios[1000:] += 1.5  # as a mark of the tool does that made both sets, and not the observational one
    pair = draw_pair(monkeypatch, shown, log_ratios)
    assert pair.doubt is not None
    assert pair.doubt.kind == "contradictory"
    assert re.search("its mass is .* instead of 1: the estimated densities contradict each other", pair.doubt.reason)


def test_no_model_judges_rows_that_it_learned_from(monkeypatch):
    taught = []

    class Taught(density_ratios._Fit):
        def __init__(self, model, inputs, *rest):
            super().__init__(model, inputs, *rest)
            taught.append(set(inputs[:, 0].tolist()))
            self.step = self.num_steps

    def predict(model, inputs):
        assert taught[-1].isdisjoint(inputs[:, 0].tolist())
        return torch.zeros(len(inputs), 2)

    monkeypatch.setattr(density_ratios, "_Fit", Taught)
    monkeypatch.setattr(density_ratios, "_predict", predict)
    estimate_log_ratios(torch.randn(90, 3), torch.arange(3).repeat(30), 2, seed=0)
    assert [len(rows) for rows in taught] == [45] * 4


def test_whiteness_is_least_for_independent_standard_normal_coordinates():
    white = torch.randn(3, 50_000, 2, generator=torch.Generator().manual_seed(0))
    assert whiteness_penalty(white) < 0.01
    for worse in (white + 0.5, 1.5 * white, white.cumsum(2) / 2**0.5, white.exp() - 1, white.sign()):
        assert whiteness_penalty(worse) > 0.05


def test_combinations_are_named():
    three = ConceptSet(("a", "b", "c"))
    assert wanted_combinations(["pairs"], three) == [Context("a", "b"), Context("a", "c"), Context("b", "c")]
    assert wanted_combinations(["all"], three)[-1] == Context("a", "b", "c")
    assert wanted_combinations(["c+a"], three) == [Context("a", "c")]

    with pytest.raises(ValueError, match="Unknown concept 'd'"):
        wanted_combinations(["a+d"], three)
    for name in ("a", "", "a=0.5,b"):
        with pytest.raises(ValueError, match=r"is no combination of concepts at strength 1"):
            wanted_combinations([name], three)
    for name in ("pairs", "all"):
        with pytest.raises(ValueError, match=f"'{name}' are combinations of concepts, and there is only one, 'a'"):
            wanted_combinations([name], ConceptSet(("a",)))


@pytest.mark.parametrize(
    ("present", "left", "message"),
    [
        ((), ["a+b", "b+c"], []),
        (("a+b", "a"), ["b+c"], ["Not written, since they have training rows: 'a+b'."]),
        (("a+b", "b+c"), [], ["No combination is left to be written: all that were named have training rows."]),
    ],
)
def test_combinations_that_have_rows_are_left_out_and_told(present, left, message):
    messages = []
    wanted = [Context("a", "b"), Context("b", "c")]
    assert [str(c) for c in without_rows(wanted, present, "written", messages.append)] == left
    assert messages == message


@pytest.fixture
def few_steps(monkeypatch):
    for name, value in {"FEWEST_STEPS": 7, "NUM_EPOCHS": 1, "SMALLEST_BATCH": 8, "STEPS_PER_SAVE": 2}.items():
        monkeypatch.setattr(density_ratios, name, value)


def estimated(rows, **options):
    codes = torch.arange(3).repeat_interleave(len(rows) // 3)
    return estimate_log_ratios(rows, codes, 2, seed=1, input_noise=0.1, dropout=0.2, **options)


@pytest.mark.parametrize("steps", [1, 5, 7, 11, 28])
def test_estimates_that_were_interrupted_go_on_where_they_were(steps, few_steps, tmp_path, monkeypatch):
    rows, _ = world(20)
    expected = estimated(rows)
    taken = []
    take_step = density_ratios._Fit.take_step

    def interrupted(fit):
        if len(taken) == steps:
            raise KeyboardInterrupt
        take_step(fit)
        taken.append(fit.step)

    monkeypatch.setattr(density_ratios._Fit, "take_step", interrupted)
    keep_in = tmp_path / "ratios.pt"
    if steps < 28:  # of 4 fits with 7 steps each
        with pytest.raises(KeyboardInterrupt):
            estimated(rows, keep_in=keep_in)
    else:
        assert torch.equal(estimated(rows, keep_in=keep_in), expected)
    before, steps = len(taken), 100
    assert torch.equal(estimated(rows, keep_in=keep_in), expected)
    saved = 7 * (before // 7) + before % 7 // 2 * 2
    assert len(taken) == before + 28 - saved


def test_estimates_of_other_data_are_made_anew(few_steps, tmp_path):
    rows, _ = world(20)
    keep_in = tmp_path / "ratios.pt"
    estimated(rows, keep_in=keep_in)
    other = estimated(1 + rows.flip(0), keep_in=keep_in)
    assert torch.equal(other, estimated(1 + rows.flip(0)))
    assert torch.equal(estimated(1 + rows.flip(0), keep_in=keep_in), other)


def test_a_damaged_file_of_estimates_is_named(few_steps, tmp_path):
    (tmp_path / "ratios.pt").write_bytes(b"no")
    with pytest.raises(ValueError, match="ratios.pt cannot be read .* Remove it: density ratios are then"):
        estimated(world(20)[0], keep_in=tmp_path / "ratios.pt")
