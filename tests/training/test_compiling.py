"""`--compile`: one graph for all batches whatever their contexts, the adapter of an ordinary run, and eager samples."""

from functools import partialmethod

import pytest
import torch

from hf_causal_context.training.arguments import TrainingArguments
from hf_causal_context.training.finetune import train
from hf_causal_context.training.language import train_text

from .small import adapter_weights, assert_close_to_largest, settings, write_folders
from .small_language import arguments, language_model, text_data, word_tokenizer

pytestmark = pytest.mark.usefixtures("on_cpu")


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that are compiled, with the backend that does not make code, which takes minutes on a CPU."""
    made = []

    def backend(graph, _):
        made.append(graph)
        return graph.forward

    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend=backend))
    torch._dynamo.reset()
    yield made
    torch._dynamo.reset()


# Which torch hides, where warnings are no errors: the matrices of mixing layers are inputs with a gradient.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("ddpm", {"mechanism": "independent"}),
        ("stable_diffusion", {"mechanism": "structural"}),
        ("flux", {"mechanism": "reduced", "resolution": 16, "gradient_checkpointing": True}),
    ],
)
@pytest.mark.slow
def test_a_compiled_denoiser(name, changes, graphs, pipeline_folder, tmp_path):
    data = write_folders(tmp_path / "data", captions=name != "ddpm")
    changes |= {"num_validation_images": 2, "num_inference_steps": 1, "validation_steps": 1, "max_train_steps": 3}
    given = settings(pipeline_folder(name), data, tmp_path / "out", **changes)
    expected = adapter_weights(train(TrainingArguments(**given)))
    assert not graphs
    compiled = train(TrainingArguments(**given | {"output_dir": str(tmp_path / "compiled"), "compile": True}))
    assert_close_to_largest(adapter_weights(compiled), expected)
    # Of mechanisms that mix, what makes their matrices at the entry is a graph of its own.
    assert len(graphs) == (1 if changes["mechanism"] == "independent" else 2)
    assert len(list((compiled / "samples").iterdir())) == 4  # one of them before the first step


def test_a_compiled_language_model(graphs, tmp_path):
    given = {"max_train_steps": 3, "num_validation_texts": 1, "max_new_tokens": 3, "validation_steps": 1}
    runs = []
    for name in ("eager", "compiled"):
        run = arguments(tmp_path, **given, output_dir=str(tmp_path / name), compile=name == "compiled")
        runs.append(train_text(run, language_model("llama"), word_tokenizer(), text_data()))
        assert bool(graphs) == (name == "compiled")
    assert_close_to_largest(*(adapter_weights(folder) for folder in reversed(runs)))
    eager, compiled = ((folder / "samples" / "step-000003.md").read_text() for folder in runs)
    assert eager == compiled
