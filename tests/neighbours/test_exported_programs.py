"""torch.export keeps the context of the moment: inside `intervene`, or a mask that is an input."""

import pytest
import torch
from torch import nn

from hf_causal_context import intervene

from ..adapter.small import adapted, inputs


class WithMask(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, mask):
        return self.model(x, context=mask)


@torch.no_grad()
def test_a_program_keeps_the_context_in_which_it_was_exported():
    model = adapted()
    with intervene(model, "thick"):
        expected = model(inputs())
        exported = torch.export.export(model, (inputs(),)).module()
    assert torch.equal(exported(inputs()), expected)
    assert not torch.equal(expected, model(inputs()))


@torch.no_grad()
def test_a_mask_can_be_an_input():
    model = adapted()
    exported = torch.export.export(WithMask(model), (inputs(2), torch.eye(3)[:2])).module()
    mask = torch.tensor([[0, 0, 1.0], [0, 2.0, 0]])
    torch.testing.assert_close(exported(inputs(2), mask), model(inputs(2), context=mask))


@torch.no_grad()
def test_exporting_without_a_context_is_told():
    model = adapted()
    with pytest.warns(UserWarning, match="exported without a context, so as the base for good"):
        exported = torch.export.export(model, (inputs(),)).module()
    assert torch.equal(exported(inputs()), model(inputs()))


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_so_is_tracing():
    model = adapted()
    with pytest.warns(UserWarning, match="exported without a context, so as the base for good"):
        torch.jit.trace(model.get_base_model(), inputs())
    with intervene(model, "thick"):
        traced = torch.jit.trace(model.get_base_model(), inputs())
    torch.testing.assert_close(traced(inputs()), model(inputs(), context="thick"))
