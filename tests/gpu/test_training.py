"""Training on a GPU: precisions, the fused optimizer, compiled code, a sharded base, lack of memory."""

import math
import os
import subprocess
import sys
from functools import partialmethod
from pathlib import Path

import pytest
import torch

from hf_causal_context import load_context_adapter
from hf_causal_context.bases.loading import load_base
from hf_causal_context.inference.sampling import generate
from hf_causal_context.quickstart import BASE, TARGET_MODULES, digit_data
from hf_causal_context.training.arguments import TrainingArguments
from hf_causal_context.training.finetune import train
from hf_causal_context.training.loop.memory import TrainingMemoryError

from ..training.small import adapter_weights, settings, write_folders
from .conftest import ON_GPU, needs_gpu

pytestmark = [
    pytest.mark.skipif(ON_GPU and not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.usefixtures("_fresh_run"),
]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def digits():
    return digit_data(rows_per_context=12)


@pytest.fixture
def train_digits(digits, tmp_path):
    def call(folder, steps=6, **changes):
        given = {
            "pretrained_model_name_or_path": str(BASE),
            "output_dir": str(tmp_path / folder),
            "target_modules": list(TARGET_MODULES),
            "train_batch_size": 10,
            "max_train_steps": steps,
            "checkpointing_steps": 3,
            "learning_rate": 3e-3,
            "num_validation_images": 0,
        }
        return train(TrainingArguments(**given | changes), data=digits)

    return call


@needs_gpu
@pytest.mark.parametrize("quantization", ["nf4", "llm_int8"])
def test_a_base_of_fewer_bits_trains_and_resumes_bit_for_bit(train_digits, quantization):
    pytest.importorskip("bitsandbytes")
    options = {"mixed_precision": "bf16", "quantization": quantization}
    whole = adapter_weights(train_digits("whole", **options))
    train_digits("cut", steps=3, **options)
    resumed = adapter_weights(train_digits("cut", resume_from_checkpoint="latest", **options))
    assert all(torch.equal(resumed[name], weight) for name, weight in whole.items())


@pytest.mark.parametrize("precision", ["no", "bf16", pytest.param("fp16", marks=needs_gpu)])
def test_a_resumed_run_is_the_same_bit_for_bit(train_digits, logged, precision):
    options = {"mixed_precision": precision, "use_ema": True}
    whole = adapter_weights(train_digits("whole", **options))
    assert len(logged) == 6
    assert all(math.isfinite(loss) for loss in logged)
    assert {tensor.dtype for tensor in whole.values()} == {torch.float32}
    assert any(tensor.abs().max() > 0 for name, tensor in whole.items() if "causal_context_up" in name)
    train_digits("parts", steps=3, **options)
    resumed = adapter_weights(train_digits("parts", resume_from_checkpoint="latest", **options))
    assert logged[6:] == logged[:6]
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())


def test_checkpointing_and_a_gpu_trained_adapter_on_the_cpu(train_digits, logged):
    whole = train_digits("whole")
    train_digits("checkpointed", gradient_checkpointing=True)
    torch.testing.assert_close(torch.tensor(logged[6:]), torch.tensor(logged[:6]), rtol=1e-4, atol=1e-6)
    base = load_base(str(BASE))
    load_context_adapter(base.pipe, whole)
    options = {"contexts": [(), "thickness+slant"], "seeds": [0], "num_inference_steps": 2}
    without, edited = generate(base, **options)
    assert torch.isfinite(edited).all()
    assert (edited - without).abs().max() > 0


@pytest.mark.parametrize("precision", ["no", "bf16", pytest.param("fp16", marks=needs_gpu)])
def test_the_fused_optimizer_does_the_same(train_digits, logged, precision, monkeypatch):
    made = []

    class Plain(torch.optim.AdamW):
        def __init__(self, *args, fused, **kwargs):
            made.append(fused)
            super().__init__(*args, **kwargs)

    train_digits("fused", mixed_precision=precision)
    monkeypatch.setattr(torch.optim, "AdamW", Plain)
    train_digits("plain", mixed_precision=precision)
    assert made == [True if ON_GPU and precision != "fp16" else None]
    assert len(logged) == 12
    torch.testing.assert_close(torch.tensor(logged[6:]), torch.tensor(logged[:6]), rtol=1e-2, atol=1e-4)


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
@pytest.mark.parametrize("mechanism", ["independent", "reduced"])
def test_compiled_training_does_the_same(train_digits, logged, mechanism, gradient_checkpointing, monkeypatch):
    options = {"mechanism": mechanism, "gradient_checkpointing": gradient_checkpointing, "mixed_precision": "bf16"}
    train_digits("eager", **options)
    if not ON_GPU:  # making code takes minutes
        monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="eager"))
    with torch._dynamo.config.patch(error_on_recompile=True):
        train_digits("compiled", compile=True, num_validation_images=2, num_inference_steps=2, **options)
    assert len(logged) == 12
    torch.testing.assert_close(torch.tensor(logged[6:]), torch.tensor(logged[:6]), rtol=2e-2, atol=1e-3)


@needs_gpu
def test_a_base_sharded_over_one_gpu_trains_the_same(pipeline_folder, tmp_path):
    """With NCCL, in bfloat16; the base lies in the host's memory until it is sharded."""
    data = write_folders(tmp_path / "data", captions=True)
    # Not Flux: cuDNN's attention has no gradients for its tiny heads (8 features) in bfloat16, of LoRA neither.
    base = pipeline_folder("stable_diffusion")
    given = settings(base, data, tmp_path / "whole", mixed_precision="bf16", max_train_steps=4)
    given |= {"adam_epsilon": 1e-3}  # large enough that rounding is not amplified
    given |= {"num_validation_images": 1, "num_inference_steps": 2, "checkpointing_steps": 2, "validation_steps": 2}
    whole = adapter_weights(train(TrainingArguments(**given)))
    for steps in (2, 4):
        sharded = given | {"output_dir": tmp_path / "sharded", "max_train_steps": steps}
        line = [word for option, value in sharded.items() for word in (f"--{option}", str(value))]
        launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "1", "-m", "hf_causal_context.cli"]
        line = [*launch, "train", *line, "--shard_base", "--resume_from_checkpoint", "latest"]
        ended = subprocess.run(line, cwd=ROOT, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr[-3000:]
    assert (tmp_path / "sharded" / "samples" / "step-000004.png").exists()
    resumed = adapter_weights(tmp_path / "sharded")
    largest = max(tensor.abs().max() for tensor in whole.values())
    for weight, tensor in whole.items():
        assert (resumed[weight] - tensor).abs().max() < 0.05 * largest, weight


@needs_gpu
def test_a_gpu_without_memory_for_a_step(train_digits):
    torch.cuda.empty_cache()
    _, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_reserved() + 64 * 2**20) / total))
    try:
        with pytest.raises(TrainingMemoryError, match=r"Step 1 ran out of memory \(CUDA out of memory.* Resume with"):
            train_digits("out", train_batch_size=4000)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
