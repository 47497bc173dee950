"""The context module against dense matrices, written by hand for every sample; float64."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from hf_causal_context import functional as F
from hf_causal_context.context_module import ContextModule, DenseInterventionLayer, NoiseModule, Posterior

EXACT = {"rtol": 0, "atol": 1e-10}
FEATURES, OUT, K, N, W = 7, 6, 4, 5, 3
MASKS = [
    (0, 0, 0, 0),
    (1, 0, 0, 0),
    (0, 0, 1, 0),
    (1, 0, 1, 0),
    (0, 1, 1, 1),
    (1, 1, 1, 1),
    (0, 0.5, 0, 0),
    (0, 0, 0, -1),
    (2, 0, 0, 0),
    (0.5, 1, -1, 2),
]
TARGETS = [(), (0,), (2,), (3,), (0, 2), (1, 2, 3), (0, 1, 2, 3)]


def random_module(**kwargs):
    """No parameter, and no statistic of a batch norm, has a value that hides what it does."""
    module = ContextModule(FEATURES, OUT, K, N, W, **kwargs).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_().mul_(0.5)
        for layer in module.expressive:
            layer.norm.running_mean.normal_()
            layer.norm.running_var.uniform_(0.5, 2)
    return module.eval()


def noise(num):
    return torch.randn(num, K, N, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def masks(rows=MASKS):
    return torch.tensor(rows, dtype=torch.float64)


def as_masks(targets):
    return masks([[float(k in chosen) for k in range(K)] for chosen in targets])


def gelu(x):
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def block(i, j, height, width):
    """Where concept j acts on concept i in a dense matrix."""
    return slice(i * height, (i + 1) * height), slice(j * width, (j + 1) * width)


def dense(blocks):
    """One map per concept as the dense matrix that it is."""
    height, width = blocks.shape[1:]
    matrix = blocks.new_zeros(K * height, K * width)
    for k in range(K):
        matrix[block(k, k, height, width)] = blocks[k]
    return matrix


def clean_matrices(module, m, perfect):
    """The first matrix, its bias, and the causal matrix under the mask `m` of one sample, block by block."""
    first, causal = module.first, module.causal
    e = dense(torch.stack([(1 - m[k]) * first.observational[k] + m[k] * first.interventional[k] for k in range(K)]))
    bias = torch.cat([(1 - m[k]) * first.bias[k] + m[k] * first.interventional_bias[k] for k in range(K)])
    q = [min(max(float(strength), 0.0), 1.0) for strength in m]
    c = torch.eye(K * W, dtype=torch.float64)
    for i in range(K):
        for j in range(K):
            if i != j:
                at = block(i, j, W, W)
                c[at] = (1 - q[i]) * (1 - q[j]) * causal.observational[at]
                c[at] += (1 - q[i] if perfect else 1) * q[j] * causal.interventional[at]
    return e, bias, c


def published_matrices(module, targets):
    """What the published experiments multiplied with in the context of `targets`, in the words of PAPER.md."""
    first, causal = module.first, module.causal
    if targets:
        e = torch.zeros_like(first.observational)
        for k in range(K):
            at = block(k, k, N, N)
            e[at] = (first.interventional if k in targets else first.observational)[at]
    else:
        e = first.observational
    c = torch.eye(K * W, dtype=torch.float64)
    for i in range(K):
        for j in range(K):
            at = block(i, j, W, W)
            if i == j:
                continue
            if j in targets:
                c[at] = causal.interventional[at]
            elif i not in targets:
                c[at] = causal.observational[at]
    return e, first.bias, c


@torch.no_grad()
def reference(module, noise, matrices):
    """`module` sample by sample, given the first and the causal matrix of each; batch norm by its formula."""
    x = torch.stack([gelu(e @ z.flatten() + bias) for z, (e, bias, _) in zip(noise, matrices, strict=True)])
    for layer in module.expressive:
        x = torch.stack([dense(layer.linear.weight) @ row + layer.linear.bias.flatten() for row in x])
        mean, variance = layer.norm.running_mean, layer.norm.running_var
        if module.training:
            mean, variance = x.mean(0), x.var(0, unbiased=False)
        x = gelu((x - mean) / (variance + 1e-5).sqrt() * layer.norm.weight + layer.norm.bias)
    c = torch.stack([c @ row + module.causal.bias for row, (*_, c) in zip(x, matrices, strict=True)])
    output = torch.stack([module.output.weight @ row + module.output.bias for row in c])
    return c.view(len(noise), K, W), output


class TestClean:
    @pytest.mark.parametrize("depth", [2, 3])
    @pytest.mark.parametrize("perfect", [True, False])
    def test_is_the_equations(self, perfect, depth):
        module, z = random_module(perfect_interventions=perfect, depth=depth), noise(len(MASKS))
        concepts, output = reference(module, z, [clean_matrices(module, m, perfect) for m in masks()])
        torch.testing.assert_close(module.concepts(z, masks()), concepts, **EXACT)
        torch.testing.assert_close(module(z, masks()), output, **EXACT)

    def test_interventions_are_perfect_unless_told_otherwise(self):
        assert random_module().causal.perfect_interventions
        assert not random_module(published=True).causal.perfect_interventions
        assert not random_module(perfect_interventions=False).causal.perfect_interventions

    def test_one_mask_serves_a_batch(self):
        module, z = random_module(), noise(3)
        torch.testing.assert_close(module(z, masks(MASKS[3:4])), module(z, masks(MASKS[3:4] * 3)), **EXACT)


@pytest.mark.parametrize("published", [False, True])
def test_a_mixed_batch_equals_separate_batches(published):
    module, z = random_module(published=published, depth=3), noise(len(MASKS))
    together = module(z, masks())
    apart = torch.cat([module(z[i : i + 1], masks()[i : i + 1]) for i in range(len(MASKS))])
    torch.testing.assert_close(together, apart, **EXACT)
    assert torch.pdist(together).min() > 1e-3


def influence(module, mask):
    """(K, K): whether the noise of concept j, column, reaches concept i, row."""
    jacobian = torch.autograd.functional.jacobian(lambda z: module.concepts(z, masks([mask]))[0], noise(1))
    return jacobian[:, :, 0].abs().sum(dim=(1, 3)) != 0


class TestInfluence:
    @pytest.mark.parametrize("strength", [1.0, 1.7])
    def test_an_intervened_concept_listens_to_nobody(self, strength):
        module = random_module(depth=3)
        for targets in TARGETS:
            expected = torch.ones(K, K, dtype=torch.bool)
            for i in targets:
                expected[i] = torch.arange(K) == i
            assert torch.equal(influence(module, [strength * (k in targets) for k in range(K)]), expected)

    def test_a_half_intervention_cuts_no_edge(self):
        assert influence(random_module(), (0.5, 0.5, 0, -1)).all()

    @pytest.mark.parametrize("kwargs", [{"perfect_interventions": False}, {"published": True}])
    def test_an_imperfect_intervention_listens_to_the_other_targets_only(self, kwargs):
        module = random_module(**kwargs)
        for targets in TARGETS:
            expected = torch.ones(K, K, dtype=torch.bool)
            for i in targets:
                expected[i] = torch.tensor([j == i or j in targets for j in range(K)])
            assert torch.equal(influence(module, [float(k in targets) for k in range(K)]), expected)

    def test_without_mixing_concepts_keep_apart(self):
        module = random_module()
        with torch.no_grad():
            module.causal.observational.zero_()
            module.causal.interventional.zero_()
        assert torch.equal(influence(module, (0, 1, 0, 0)), torch.eye(K, dtype=torch.bool))


class TestPublished:
    @pytest.mark.parametrize("depth", [2, 4])
    @pytest.mark.parametrize("training", [False, True])
    def test_is_what_was_computed(self, depth, training):
        module, z = random_module(published=True, depth=depth).train(training), noise(len(TARGETS))
        concepts, output = reference(module, z, [published_matrices(module, targets) for targets in TARGETS])
        torch.testing.assert_close(module.concepts(z, as_masks(TARGETS)), concepts, **EXACT)
        torch.testing.assert_close(module(z, as_masks(TARGETS)), output, **EXACT)

    @pytest.mark.parametrize("targets", TARGETS)
    def test_batches_of_one_context_in_training(self, targets):
        module, z = random_module(published=True, depth=4).train(), noise(6)
        _, output = reference(module, z, [published_matrices(module, targets)] * 6)
        torch.testing.assert_close(module(z, as_masks([targets])), output, **EXACT)

    @pytest.mark.parametrize("depth", [2, 3, 4, 5])
    @pytest.mark.parametrize(("noise_width", "concept_width"), [(15, 5), (22, 22), (50, 5), (16, 32), (32, 8), (5, 3)])
    def test_widths_are_equal_steps_truncated(self, depth, noise_width, concept_width):
        module = ContextModule(2, 2, 1, noise_width, concept_width, depth, published=True)
        shapes = [tuple(layer.linear.weight.shape) for layer in module.expressive]
        widths = np.linspace(noise_width, concept_width, depth).astype(int).tolist()
        assert shapes == [(1, after, before) for before, after in itertools.pairwise(widths)]

    def test_both_ends_are_exact(self):
        layer, z = DenseInterventionLayer(K, N), noise(3).float()
        zero, one = torch.zeros(3, K), torch.eye(K)[:3]
        with torch.no_grad():
            everything = F.linear(z.flatten(1), layer.observational) + layer.bias
            blocks = [F.diagonal_blocks(weight, K) for weight in (layer.observational, layer.interventional)]
            masked = F.intervenable(z, one, *blocks).flatten(1) + layer.bias
            assert torch.equal(layer(z, zero).flatten(1), everything)
            assert torch.equal(layer(z, one).flatten(1), masked)
            mixed = layer(z, torch.stack((zero[0], one[1], zero[2]))).flatten(1)
        assert torch.equal(mixed, torch.stack((everything[0], masked[1], everything[2])))

    def test_dense_weights_learn_in_the_observational_context_only(self):
        module = random_module(published=True)
        inside = dense(torch.ones(K, N, N)).bool()
        for mask, dense_gradient in ((MASKS[0], True), (MASKS[1], False)):
            module.zero_grad()
            module(noise(4), masks([mask])).square().sum().backward()
            gradient = module.first.observational.grad
            assert gradient[inside].any()
            assert gradient[~inside].any() == dense_gradient

    def test_effects_are_kept_in_the_unit_interval(self):
        for published in (True, False):
            module = random_module(published=published)
            before = {name: value.clone() for name, value in module.state_dict().items()}
            module.causal.after_step()
            for name, value in module.state_dict().items():
                clamped = published and name in ("causal.observational", "causal.interventional")
                assert torch.equal(value, before[name].clamp(0, 1) if clamped else before[name]), name
            assert before["causal.observational"].min() < 0
            assert before["causal.interventional"].max() > 1

    def test_clamped_weights_go_on_learning(self):
        module = random_module(published=True)
        optimizer = torch.optim.Adam(module.parameters(), 0.5)
        for _ in range(3):
            optimizer.zero_grad()
            module(noise(4), masks(MASKS[1:2])).square().sum().backward()
            optimizer.step()
            module.causal.after_step()
            assert 0 <= module.causal.interventional.min() <= module.causal.interventional.max() <= 1


class TestWeights:
    @pytest.mark.parametrize("published", [False, True])
    def test_one_for_each_published_one(self, published):
        first = (K * N, K * N) if published else (K, N, N)
        linear = {"mean": (K * N, FEATURES), "log_variance": (K * N, FEATURES), "output": (OUT, K * W)}
        expected = {f"{name}.weight": shape for name, shape in linear.items()}
        expected |= {f"{name}.bias": shape[:1] for name, shape in linear.items()}
        expected |= {"first.observational": first, "first.interventional": first, "first.bias": first[:-1]}
        if not published:  # which has one bias, and encodes no contexts
            expected["first.interventional_bias"] = (K, N)
            for name in ("mean_shift", "log_variance_shift"):
                expected |= {f"{name}.weight": (K * N, FEATURES), f"{name}.bias": (K * N,)}
        for i, (before, after) in enumerate(((5, 4), (4, 3))):
            expected |= {f"expressive.{i}.linear.weight": (K, after, before), f"expressive.{i}.linear.bias": (K, after)}
            norm = ("weight", "bias", "running_mean", "running_var")
            expected |= {f"expressive.{i}.norm.{name}": (K * after,) for name in norm}
            expected[f"expressive.{i}.norm.num_batches_tracked"] = ()
        expected |= {f"causal.{name}": (K * W, K * W) for name in ("observational", "interventional")}
        expected["causal.bias"] = (K * W,)
        module = ContextModule(FEATURES, OUT, K, N, W, depth=3, published=published)
        assert {name: tuple(value.shape) for name, value in module.state_dict().items()} == expected

    @pytest.mark.parametrize("published", [False, True])
    def test_dense_weights_load_by_their_diagonal_blocks(self, published):
        module, z = random_module(published=published, depth=3), noise(len(MASKS))
        state = dict(module.state_dict())
        for i in (0, 1):
            name = f"expressive.{i}.linear"
            matrix = dense(state[f"{name}.weight"])
            matrix[dense(torch.ones_like(state[f"{name}.weight"])) == 0] = 9.0  # masked, so without effect
            state |= {f"{name}.weight": matrix, f"{name}.bias": state[f"{name}.bias"].flatten()}
        loaded = random_module(published=published, depth=3)
        assert not torch.equal(loaded(z, masks()), module(z, masks()))
        loaded.load_state_dict(state)
        assert torch.equal(loaded(z, masks()), module(z, masks()))
        loaded.load_state_dict(module.state_dict())
        assert torch.equal(loaded(z, masks()), module(z, masks()))

    def test_other_shapes_do_not_load(self):
        module = random_module()
        for wrong in (torch.zeros(K * W, N), torch.zeros(K, N, W), torch.zeros(K * N, K * W)):
            with pytest.raises(RuntimeError, match="size mismatch for expressive.0.linear.weight"):
                module.load_state_dict({**module.state_dict(), "expressive.0.linear.weight": wrong})

    @pytest.mark.parametrize("published", [False, True])
    def test_start_within_one_by_the_root_of_their_inputs(self, published):
        module = ContextModule(FEATURES, OUT, K, N, W, published=published)
        inputs = {"first": K * N if published else N, "expressive": N, "causal": K * W}
        for name, parameter in module.named_parameters():
            if (layer := name.split(".")[0]) in inputs and "norm" not in name and name != "first.interventional_bias":
                bound = 1 / math.sqrt(inputs[layer])
                assert 0.5 * bound < parameter.abs().max() <= bound, name

    def test_diagonal_blocks_of_effects_do_not_matter(self):
        module, z = random_module(), noise(len(MASKS))
        before = module(z, masks())
        with torch.no_grad():
            for weight in (module.causal.observational, module.causal.interventional):
                for k in range(K):
                    weight[block(k, k, W, W)] = 9.0
        assert torch.equal(module(z, masks()), before)
        for effects in module.causal.effects():
            assert torch.equal(effects == 0, dense(torch.ones(K, W, W)).bool())


class TestPosterior:
    def test_encoding(self):
        module, features = random_module(), torch.randn(5, FEATURES, dtype=torch.float64)
        posterior = module.encode(features, masks(MASKS[:5]))
        layers = ((module.mean, module.mean_shift), (module.log_variance, module.log_variance_shift))
        for given, (layer, shift) in zip(posterior, layers, strict=True):
            for row, (x, m) in enumerate(zip(features, masks(MASKS[:5]), strict=True)):
                observed, moved = ((part.weight @ x + part.bias).view(K, N) for part in (layer, shift))
                torch.testing.assert_close(given[row], observed + m[:, None] * moved, **EXACT)

    @pytest.mark.parametrize("kwargs", [{"published": True}, {"encode_context": False}])
    def test_encoding_without_contexts(self, kwargs):
        module, features = random_module(**kwargs), torch.randn(5, FEATURES, dtype=torch.float64)
        for one, two in zip(module.encode(features, masks()[:1]), module.encode(features, masks()[5:6]), strict=True):
            assert torch.equal(one, two)
        assert not hasattr(module, "mean_shift")

    def test_an_intervention_starts_with_an_effect_on_its_concept_that_the_posterior_does_not_share(self):
        module, features = ContextModule(FEATURES, OUT, K, N, W).double(), torch.randn(5, FEATURES).double()
        for one, two in zip(module.encode(features, masks()[:1]), module.encode(features, masks()[5:6]), strict=True):
            assert torch.equal(one, two)
        # Nothing moves but the concept, and that by about the deviation of a standard normal bias.
        context = torch.eye(K, dtype=torch.float64)[:1]
        moved = module.first(noise(3), context) - module.first(noise(3), torch.zeros_like(context))
        assert torch.equal(moved[:, 1:], torch.zeros_like(moved[:, 1:]))
        assert 0.3 < module.first.interventional_bias.std() < 3
        assert moved[:, 0].abs().mean() > 0.3

    def test_extreme_variances_are_bounded(self):
        module = random_module()
        for sign, bound in ((1, 10), (-1, -30)):
            nn.init.constant_(module.log_variance.bias, sign * 1e9)
            posterior = module.encode(torch.zeros(1, FEATURES, dtype=torch.float64), masks()[:1])
            assert (posterior.log_variance == bound).all()
            assert posterior.kl().isfinite().all()

    def test_kl_divergence(self):
        mean, log_variance = torch.randn(2, 5, K, N, dtype=torch.float64)
        normal = torch.distributions.Normal
        expected = torch.distributions.kl_divergence(normal(mean, (log_variance / 2).exp()), normal(0, 1)).sum((1, 2))
        torch.testing.assert_close(Posterior(mean, log_variance).kl(), expected, **EXACT)
        assert torch.equal(Posterior(torch.zeros(2, K, N), torch.zeros(2, K, N)).kl(), torch.zeros(2))

    def test_draws(self):
        mean, log_variance = torch.randn(2, 5, K, N)
        posterior = Posterior(mean.requires_grad_(), log_variance.requires_grad_())
        draw = posterior.sample(torch.Generator().manual_seed(3))
        standard = torch.randn(5, K, N, generator=torch.Generator().manual_seed(3))
        torch.testing.assert_close(draw, mean + log_variance.exp().sqrt() * standard)
        draw.sum().backward()
        assert torch.equal(mean.grad, torch.ones(5, K, N))
        torch.testing.assert_close(log_variance.grad, 0.5 * (draw - mean).detach())


class TestNoiseModule:
    def test_contexts_have_no_effect(self):
        module, z = NoiseModule(FEATURES, OUT, K, N).double(), noise(len(MASKS))
        expected = z.flatten(1) @ module.output.weight.T + module.output.bias
        torch.testing.assert_close(module(z, masks()), expected, **EXACT)
        assert torch.equal(module.concepts(z, masks()), z)

    def test_encodes_as_a_context_module_does(self):
        module, features = random_module(), torch.randn(5, FEATURES, dtype=torch.float64)
        plain = NoiseModule(FEATURES, OUT, K, N).double()
        names = ("mean.weight", "mean.bias", "log_variance.weight", "log_variance.bias")
        plain.load_state_dict({name: module.state_dict()[name] for name in names}, strict=False)
        for given, expected in zip(
            plain.encode(features, masks()[:1]), module.encode(features, masks()[:1]), strict=True
        ):
            assert torch.equal(given, expected)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_concepts": 0}, "num_concepts=0 must be at least 1."),
        ({"noise_width": 0}, "noise_width=0 must be at least 1."),
        ({"concept_width": -1}, "concept_width=-1 must be at least 1."),
        ({"depth": 1}, "depth=1 must be at least 2."),
        ({"published": True, "perfect_interventions": True}, "which had no perfect_interventions. Leave one"),
        ({"published": True, "encode_context": True}, "which had no encode_context. Leave one"),
    ],
)
def test_wrong_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        ContextModule(2, 2, **{"num_concepts": 2, "noise_width": 2, "concept_width": 2} | kwargs)
