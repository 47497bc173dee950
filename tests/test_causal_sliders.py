"""One LoRA per concept in causal order: a peer of the composition benchmark."""

import sys
from functools import partial

import pytest
import torch

from examples.benchmarks import composition, composition_methods
from examples.benchmarks.causal_sliders import Sliders
from examples.benchmarks.vector_flow import VectorFlow
from examples.worlds.vectors import latent_model

TINY = ("--steps", 5, "--batch_size", 16, "--base_steps", 1)


def run(monkeypatch, module, *arguments):
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    module.main()


def test_causes_follow_paths_and_not_only_edges():
    causes = {name: latent_model().causes(name) for name in latent_model().names}
    assert causes["quad4"] == causes["orientation"] == frozenset()
    assert causes["quad2"] == {"quad3", "quad4", "shape", "orientation"}
    assert causes["size"] == {"color", "shape", "orientation"}
    assert latent_model(dependent=False).causes("size") == frozenset()


@pytest.fixture
def sliders():
    torch.manual_seed(0)
    model = Sliders(VectorFlow(dimension=32, width=16, num_blocks=1), order=(2, 0, 1))
    for layer in model.layers:
        torch.nn.init.normal_(layer.up)
    return model.requires_grad_(False)


def test_a_context_without_targets_is_the_base_bit_for_bit(sliders):
    torch.manual_seed(0)
    base = VectorFlow(dimension=32, width=16, num_blocks=1)
    x, time = torch.randn(5, 32), torch.rand(5)
    assert torch.equal(sliders(x, time, torch.zeros(5, 3)), base(x, time))
    assert (sliders(x, time, torch.eye(3)[[0] * 5]) - base(x, time)).abs().max() > 1e-3


def test_interventions_follow_each_other_in_causal_order(sliders):
    layer, x = sliders.layers[0], torch.randn(4, sliders.layers[0].base.in_features)
    steps = [torch.eye(layer.base.out_features) + (up.T @ down) for up, down in zip(layer.up, layer.down, strict=True)]
    layer.mask = torch.tensor([[0.0, 0, 0], [1, 0, 0], [1, 0, 1], [1, 1, 1]])
    weights = [torch.eye(layer.base.out_features), steps[0], steps[0] @ steps[2], steps[1] @ steps[0] @ steps[2]]
    expected = [weight @ layer.base(row) for weight, row in zip(weights, x, strict=True)]
    torch.testing.assert_close(layer(x), torch.stack(expected), rtol=1e-4, atol=1e-4)
    assert (steps[0] @ steps[2] - steps[2] @ steps[0]).abs().max() > 0.1  # the order is told from its reverse


def test_the_composition_benchmark_writes_a_row_for_causal_sliders(monkeypatch, tmp_path):
    monkeypatch.setattr(composition, "ROWS_PER_CONTEXT", 50)
    monkeypatch.setattr(composition, "NUM_SAMPLES", 10)
    monkeypatch.setattr(composition, "NUM_REFERENCE", 10)
    monkeypatch.setattr(composition_methods, "sample", partial(composition_methods.sample, steps=1))
    name = "CausalSliders, observational first"
    command = ("--output_dir", tmp_path, "--worlds", "dependent", "--seeds", 0, "--methods", name, *TINY)
    run(monkeypatch, composition, *command)
    assert f"| {name} |" in (tmp_path / "results.md").read_text()
