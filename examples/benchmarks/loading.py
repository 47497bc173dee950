"""How long it takes to load an adapter from a folder, beside LoRA.

    python -m examples.benchmarks.loading

Language models are loaded by `PeftModel.from_pretrained`, pipelines by `load_context_adapter` and, for LoRA, diffusers'
`load_lora_weights`. Calls of Python functions are counted as well: they are the same on every machine.
"""

import argparse
import gc
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from transformers import LlamaConfig, LlamaForCausalLM

from hf_causal_context import CausalContextConfig, load_context_adapter

CONCEPTS, WIDTH, OBSERVATIONAL_RANK = ("a", "b", "c", "d"), 4, 16
MECHANISMS = ("independent", "reduced", "structural")
# Layers and hidden features of a language model, and blocks and channels of a UNet.
DEEP, WIDE = {"num_hidden_layers": 24, "hidden_size": 64}, {"num_hidden_layers": 8, "hidden_size": 1024}
UNET = {"layers_per_block": 4, "block_out_channels": (32, 64)}


def language_model(sizes: dict[str, int]) -> LlamaForCausalLM:
    """A Llama of random weights."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=sizes["hidden_size"],
        num_hidden_layers=sizes["num_hidden_layers"],
        intermediate_size=2 * sizes["hidden_size"],
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    return LlamaForCausalLM(config)


def pipeline() -> StableDiffusionPipeline:
    """A Stable Diffusion pipeline of random weights, without what adapters do not touch."""
    unet = UNet2DConditionModel(
        sample_size=8,
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        **UNET,
    )
    scheduler: Any = DDPMScheduler(clip_sample=False, steps_offset=1)
    missing: dict[str, Any] = dict.fromkeys(("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    return StableDiffusionPipeline(unet=unet, scheduler=scheduler, requires_safety_checker=False, **missing)


def config(method: str, targets: list[str]) -> PeftConfig:
    """LoRA's, or ours with a mechanism, of the same rank."""
    if method == "LoRA":
        return LoraConfig(r=OBSERVATIONAL_RANK + len(CONCEPTS) * WIDTH, target_modules=targets)
    return CausalContextConfig(
        concepts=CONCEPTS,
        concept_rank=WIDTH,
        observational_rank=OBSERVATIONAL_RANK,
        mechanism=method,  # type: ignore[arg-type]
        target_modules=targets,
    )


def language_case(sizes: dict[str, int], folder: Path) -> dict[str, Callable[[], Callable[[], object]]]:
    """Method -> what prepares a load and returns it."""
    cases = {}
    for method in ("LoRA", *MECHANISMS):
        targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
        get_peft_model(language_model(sizes), config(method, targets)).save_pretrained(str(folder / method))

        def prepare(path: Path = folder / method) -> Callable[[], object]:
            base: Any = language_model(sizes)
            return lambda: PeftModel.from_pretrained(base, path)

        cases[method] = prepare
    return cases


def pipeline_case(folder: Path) -> dict[str, Callable[[], Callable[[], object]]]:
    """Method -> what prepares a load and returns it."""
    cases = {}
    for method in ("LoRA", *MECHANISMS):
        unet: Any = pipeline().unet
        own = config(method, ["to_q", "to_k", "to_v", "to_out.0"])
        if method == "LoRA":
            unet.add_adapter(own)
            weights: Any = get_peft_model_state_dict(unet)
            StableDiffusionPipeline.save_lora_weights(folder / method, weights)
        else:
            get_peft_model(unet, own).save_pretrained(str(folder / method))

        def prepare(path: Path = folder / method, is_lora: bool = method == "LoRA") -> Callable[[], object]:
            pipe = pipeline()
            return lambda: pipe.load_lora_weights(str(path)) if is_lora else load_context_adapter(pipe, path)

        cases[method] = prepare
    return cases


def calls(load: Callable[[], object]) -> int:
    """How many functions of Python a load calls."""
    count = 0

    def note(_frame: object, event: str, _argument: object) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(note)
    try:
        load()
    finally:
        sys.setprofile(None)
    return count


def seconds(load: Callable[[], object]) -> float:
    """How long a load takes."""
    gc.collect()
    begin = perf_counter()
    load()
    return perf_counter() - begin


def measured(
    cases: dict[str, Callable[[], Callable[[], object]]], rounds: int
) -> dict[str, tuple[float, float, float]]:
    """Method -> median milliseconds, median ratio to LoRA's time in the same round, and ratio of calls."""
    counted = {method: calls(prepare()) for method, prepare in cases.items()}  # and warms up
    times = [{method: seconds(prepare()) for method, prepare in cases.items()} for _ in range(rounds)]
    return {
        method: (
            1e3 * median(each[method] for each in times),
            median(each[method] / each["LoRA"] for each in times),
            counted[method] / counted["LoRA"],
        )
        for method in cases
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    print("| base | method | load ms | over LoRA's | calls over LoRA's |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        bases = {
            "Llama, 24 layers of 64": language_case(DEEP, Path(name, "deep")),
            "Llama, 8 layers of 1024": language_case(WIDE, Path(name, "wide")),
            "UNet": pipeline_case(Path(name, "unet")),
        }
        for base, cases in bases.items():
            for method, (milliseconds, ratio, work) in measured(cases, rounds).items():
                print(f"| {base} | {method} | {milliseconds:.0f} | {ratio:.2f} | {work:.2f} |")


if __name__ == "__main__":
    main()
