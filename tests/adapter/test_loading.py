"""An adapter is loaded with at most 1.2 times the work of LoRA: calls of functions, so that no machine matters."""

import pytest

from examples.benchmarks import loading

LIMIT = 1.2


@pytest.mark.parametrize("layers", [2, 12])
def test_a_language_model_takes_no_more_work_than_with_lora(layers, tmp_path):
    cases = loading.language_case({"num_hidden_layers": layers, "hidden_size": 32}, tmp_path)
    counts = {method: loading.calls(prepare()) for method, prepare in cases.items()}
    assert all(count <= LIMIT * counts["LoRA"] for count in counts.values()), counts


@pytest.mark.slow
def test_a_pipeline_takes_no_more_work_than_with_lora(tmp_path):
    cases = loading.pipeline_case(tmp_path)
    counts = {method: loading.calls(prepare()) for method, prepare in cases.items()}
    assert all(count <= LIMIT * counts["LoRA"] for count in counts.values()), counts
