"""PEFT's `adapter_names=`, which chooses an adapter for each row, is refused: contexts do that."""

import pytest
import torch

from ..adapter.small import adapted, gpt2


@pytest.mark.parametrize("method", ["forward", "generate"])
def test_an_adapter_for_each_row_is_refused(method):
    model = adapted(gpt2(), task_type="CAUSAL_LM")
    ids = torch.tensor([[3, 4, 5], [6, 7, 8]])
    with pytest.raises(ValueError, match="Give each row a context instead"):
        getattr(model, method)(input_ids=ids, adapter_names=["default", "__base__"])
