"""Parameters, initialization and graphs of the causal layers."""

import pytest
import torch

from hf_causal_context import ConceptSet
from hf_causal_context.layers import ConceptGraph, IndependentLayer, ReducedLayer, StructuralLayer

CONCEPTS = ConceptSet(("a", "b", "c", "d"))
K, W = 4, 3


def random_layers(**kwargs):
    torch.manual_seed(0)
    graph = ConceptGraph(CONCEPTS, order=("c", "a", "d", "b"))
    layers = [cls(K, W, graph, identity=False, **kwargs).double() for cls in (ReducedLayer, StructuralLayer)]
    return [IndependentLayer(K, W), *layers]


@pytest.fixture
def z():
    return torch.randn(5, 7, K * W, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


MASKS = torch.tensor([[0, 0, 0, 0], [1, 0, 0, 0], [0, 1, 0, 1], [0.5, 0, -1, 0], [1, 1, 1, 1]], dtype=torch.float64)


@pytest.mark.parametrize("perfect", [True, False])
@pytest.mark.parametrize("anchored", [True, False])
def test_matrix_is_the_layer(z, perfect, anchored):
    for layer in random_layers(perfect_interventions=perfect, anchored=anchored):
        output = layer(z, MASKS)
        for i in range(5):
            expected = z[i] @ layer.matrix(MASKS[i : i + 1]).to(z).T
            torch.testing.assert_close(output[i], expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("mask", [MASKS, MASKS[3:4]], ids=["mixed", "one for all"])
@pytest.mark.parametrize("tokens", [(30,), (6, 5)])
@pytest.mark.parametrize("perfect", [True, False])
@pytest.mark.parametrize("anchored", [True, False])
def test_many_tokens_give_what_few_at_a_time_do(mask, tokens, perfect, anchored):
    z = torch.randn(5, *tokens, K * W, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    z.requires_grad_()
    for layer in random_layers(perfect_interventions=perfect, anchored=anchored):
        inputs = [z, *layer.parameters()]
        outputs = layer(z, mask), torch.cat([layer(part, mask) for part in z.flatten(1, -2).split(10, dim=1)], dim=1)
        torch.testing.assert_close(outputs[0].flatten(1, -2), outputs[1], rtol=0, atol=1e-10)
        gradients = [torch.autograd.grad(output.square().sum(), inputs) for output in outputs]
        for actual, expected in zip(*gradients, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("tokens", [7, 30])
def test_the_empty_context_of_an_anchored_layer_is_exactly_zero(tokens):
    z = torch.randn(5, tokens, K * W, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for layer in random_layers(anchored=True):
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            output = layer.to(dtype)(z.to(dtype), MASKS)
            assert torch.equal(output[0], torch.zeros_like(output[0]))
            assert output[1:].abs().amax((1, 2)).min() > 0


def test_anchored_layers_start_as_independent(z):
    graph = ConceptGraph(CONCEPTS)
    for cls in (ReducedLayer, StructuralLayer):
        layer = cls(K, W, graph, anchored=True).double()
        torch.testing.assert_close(layer(z, MASKS), IndependentLayer(K, W)(z, MASKS), rtol=0, atol=1e-10)


def test_before_anchoring_a_target_depends_on_no_other_noise(z):
    for layer in random_layers():
        jacobian = torch.autograd.functional.jacobian(
            lambda x, layer=layer: layer.concepts(x, MASKS[2:3])[0, 0], z[:1, :1]
        )[:, 0, 0].view(K, W, K, W)
        for target in (1, 3):
            others = [k for k in range(K) if k != target]
            assert torch.equal(jacobian[target][:, others], torch.zeros(W, 3, W, dtype=torch.float64))


def test_effects_follow_the_graph():
    graph = ConceptGraph(CONCEPTS, edges=[("a", "b"), ("b", "c")])
    assert graph.direct.nonzero().tolist() == [[1, 0], [2, 1]]
    assert graph.total.nonzero().tolist() == [[1, 0], [2, 0], [2, 1]]
    assert graph.longest_path == 2
    nothing = torch.zeros(1, K)
    for cls, allowed in ((ReducedLayer, graph.total), (StructuralLayer, graph.total)):
        blocks = cls(K, W, graph, identity=False).matrix(nothing).view(K, W, K, W).abs().sum((1, 3))
        assert torch.equal(blocks != 0, allowed | torch.eye(K, dtype=torch.bool))


def test_an_order_allows_all_edges_forward():
    graph = ConceptGraph(CONCEPTS, order=("c", "a", "d", "b"))
    assert graph.direct.sum() == 6
    assert graph.direct[1].tolist() == [True, False, True, True]
    assert not graph.direct[2].any()
    assert graph.longest_path == 3


def test_without_a_graph_every_concept_may_act_on_every_other():
    graph = ConceptGraph(CONCEPTS)
    assert torch.equal(graph.direct, ~torch.eye(K, dtype=torch.bool))
    assert graph.longest_path == K - 1


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"edges": [("a", "b"), ("b", "c"), ("c", "a")]}, "concept_graph has a cycle: .* Effects must not cause"),
        ({"edges": [("a", "a")]}, "cycle"),
        ({"edges": [("a", "x")]}, r"Unknown concept 'x' in edge \('a', 'x'\)"),
        ({"edges": [("a", "b", "c")]}, "must be a pair"),
        ({"order": ("a", "b")}, "must name every concept once"),
        ({"order": ("a", "b", "c", "d"), "edges": []}, "not both"),
    ],
)
def test_wrong_graphs(kwargs, message):
    with pytest.raises(ValueError, match=message):
        ConceptGraph(CONCEPTS, **kwargs)


def test_acyclicity_penalty_trains_cycles_away():
    torch.manual_seed(0)
    layer = StructuralLayer(2, 1, ConceptGraph(ConceptSet(("a", "b"))), identity=False)
    before = layer.acyclicity_penalty()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        layer.acyclicity_penalty().backward()
        optimizer.step()
    assert before > 0.1 > 0.01 > layer.acyclicity_penalty() >= 0
