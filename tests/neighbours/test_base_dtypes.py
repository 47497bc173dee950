"""Bases that were saved in half precision: every component has the dtype that was asked for."""

import pytest
import torch
from diffusers import DiffusionPipeline
from peft import get_peft_model

from hf_causal_context import CausalContextConfig
from hf_causal_context.bases.loading import load_base
from hf_causal_context.inference.adapted import StoredAdapter
from hf_causal_context.inference.sampling import generate
from hf_causal_context.training.arguments import TrainingArguments
from hf_causal_context.training.finetune import train

from ..training.conftest import apart
from ..training.small import adapter_weights, settings, write_folders
from ..training.tiny_pipelines import PIPELINES

CAPTIONED = ("stable_diffusion", "stable_diffusion_xl", "stable_diffusion_3", "flux", "pixart_sigma")
SAVED_IN = (torch.float16, torch.bfloat16)


@pytest.fixture
def on_cpu(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    yield from apart(tmp_path, monkeypatch)


@pytest.fixture(scope="module", params=CAPTIONED)
def saved(request, tmp_path_factory):
    """Two folders of a base by dtype: saved in it, and in float32 with the same, rounded values."""
    torch.manual_seed(0)
    pipe = PIPELINES[request.param]()
    folder, folders = tmp_path_factory.mktemp(request.param), {}
    for dtype in SAVED_IN:
        folders[dtype] = folder / str(dtype), folder / f"{dtype} as float32"
        pipe.to(dtype).save_pretrained(folders[dtype][0])
        pipe.to(torch.float32).save_pretrained(folders[dtype][1])
    return folders


def dtypes(pipe):
    parts = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    return {weight.dtype for part in parts for weight in part.parameters()}


@pytest.mark.parametrize("dtype", SAVED_IN)
def test_all_components_are_float32_by_default(saved, dtype):
    assert dtypes(load_base(str(saved[dtype][0])).pipe) == {torch.float32}
    assert dtypes(load_base(str(saved[dtype][1]), dtype=torch.bfloat16).pipe) == {torch.bfloat16}


@pytest.mark.parametrize("dtype", SAVED_IN)
def test_images_are_those_of_the_same_weights_in_float32(saved, dtype, tmp_path):
    config = CausalContextConfig(concepts=("thick",), target_modules=["to_q", "to_v"], init_weights=False, alpha=8.0)
    denoiser = load_base(str(saved[dtype][1])).denoiser
    get_peft_model(denoiser, config).save_pretrained(tmp_path / "adapter")
    images = []
    for folder in saved[dtype]:
        base = StoredAdapter.open(tmp_path / "adapter", str(folder)).pipeline()
        images.append(generate(base, [("thick",), ()], prompt="a cat", resolution=16, num_inference_steps=1, seeds=[0]))
    for of_half, of_float32 in zip(*images, strict=True):
        assert torch.equal(of_half, of_float32)
    assert not torch.equal(*images[0])


def test_training_in_float32_is_that_of_the_same_weights_in_float32(saved, tmp_path, on_cpu):
    data = write_folders(tmp_path / "data", captions=True)
    options = {"max_train_steps": 1, "resolution": 16, "mixed_precision": "no"}
    weights = []
    for number, folder in enumerate(saved[torch.float16]):
        train(TrainingArguments(**settings(folder, data, tmp_path / str(number), **options)))
        weights.append(adapter_weights(tmp_path / str(number)))
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())
    assert any(value.any() for key, value in weights[0].items() if key.endswith("up.weight"))


def test_a_stock_pipeline_of_such_a_base_is_mixed(saved):
    """Why: as soon as this fails, diffusers does it by itself."""
    assert dtypes(DiffusionPipeline.from_pretrained(saved[torch.float16][0])) == {torch.float32, torch.float16}
