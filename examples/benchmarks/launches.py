"""How many operations an adapter launches per adapted layer, beside LoRA: counted, so that no machine matters.

    python -m examples.benchmarks.launches

Small operations cost a GPU the time of their launch, whatever they compute, and adapters consist of small operations.
Counted are those of a training step, forward and backward, and of a forward pass in generation, less those of the base;
views launch nothing and are left out. All methods have the same rank in total.

`--compiled` counts the kernels that torch.compile makes of a training step on a CPU, its products of matrices included:
of one more layer, whose own product without an adapter is one forward and one backward.
"""

import argparse
import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code
from torch.utils._python_dispatch import TorchDispatchMode

from hf_causal_context import CausalContextConfig, intervene

LAYERS, FEATURES, ROWS, TOKENS = 24, 64, 4, 256
CONCEPTS, WIDTH = ("a", "b", "c", "d"), 4
CHAIN = tuple(pairwise(CONCEPTS))
MIXED = ["a", (), "a+b", {"c": 0.5}]
CONFIGS: dict[str, dict[str, Any]] = {
    "independent": {},
    "reduced": {"mechanism": "reduced"},
    "reduced, imperfect": {"mechanism": "reduced", "perfect_interventions": False},
    "reduced, anchored": {"mechanism": "reduced", "anchored": True},
    "structural, a chain": {"mechanism": "structural", "concept_graph": CHAIN},
    "structural, anchored": {"mechanism": "structural", "concept_graph": CHAIN, "anchored": True},
}
# They return other views of what is there, or memory without content.
NO_LAUNCH = (
    torch.ops.aten.detach,
    torch.ops.aten._unsafe_view,
    torch.ops.aten.new_empty,
    torch.ops.aten.new_empty_strided,
)
# Lines of compiled code, within `call`.
KERNEL = re.compile(r"^ +(cpp_fused|extern_kernels\.)\w+\(", re.MULTILINE)


class Counted(TorchDispatchMode):
    """Counts what is launched inside."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count += not (func.is_view or func.overloadpacket in NO_LAUNCH)
        return func(*args, **(kwargs or {}))


def base(layers: int = LAYERS) -> nn.Module:
    """Linear layers one after the other, the first of which is not adapted."""
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(FEATURES, FEATURES) for _ in range(1 + layers)))


def adapted(name: str, layers: int = LAYERS) -> nn.Module:
    """The base with LoRA, or with our adapter of a configuration, with weights that are not zero."""
    targets = [str(number) for number in range(1, 1 + layers)]
    if name == "LoRA":
        rank = WIDTH * len(CONCEPTS)
        return get_peft_model(base(layers), LoraConfig(r=rank, init_lora_weights=False, target_modules=targets))  # type: ignore[arg-type]
    settings = {"concept_rank": WIDTH, "observational_rank": 0, "init_weights": False, **CONFIGS[name]}
    config = CausalContextConfig(concepts=CONCEPTS, target_modules=targets, **settings)
    return get_peft_model(base(layers), config)  # type: ignore[arg-type]


def training_step(model: nn.Module, tokens: int = TOKENS) -> int:
    """Launches of a forward and backward pass of rows in contexts of their own."""
    model.train()
    x = torch.randn(ROWS, tokens, FEATURES)
    with Counted() as counted:
        in_contexts(model, MIXED, lambda: model(x).sum().backward())
    return counted.count


def compiled_step(model: nn.Module) -> Tensor:
    """Fused kernels, and products, of a compiled forward and backward pass of rows in contexts of their own."""
    torch._dynamo.reset()
    compiled = torch.compile(model.train())
    x = torch.randn(ROWS, TOKENS, FEATURES)
    _, sources = run_and_get_code(lambda: in_contexts(model, MIXED, lambda: compiled(x).sum().backward()))
    kinds = [kind for source in sources for kind in KERNEL.findall(source.partition("def call(")[2])]
    return torch.tensor([kinds.count("cpp_fused"), kinds.count("extern_kernels.")])


def compiled_layer(name: str) -> tuple[float, float]:
    """Fused kernels, and products of matrices, of one more adapted layer in a compiled training step."""
    fused, products = (compiled_step(adapted(name, 4)) - compiled_step(adapted(name, 2))) / 2
    return float(fused), float(products)


@torch.no_grad()
def forward_pass(model: nn.Module, tokens: int = 1) -> int:
    """Launches of a forward pass in one context, as generation makes for every token."""
    model.eval()
    x = torch.randn(ROWS, tokens, FEATURES)
    with Counted() as counted:
        in_contexts(model, "a+b", lambda: model(x))
    return counted.count


def in_contexts(model: nn.Module, contexts: Any, run: Callable[[], Tensor | None]) -> None:
    """Run, in contexts if the model has our adapter."""
    if isinstance(getattr(model, "peft_config", {}).get("default"), CausalContextConfig):
        with intervene(model, contexts):
            run()
    else:
        run()


def launches() -> dict[str, tuple[float, float]]:
    """Method -> launches per adapted layer of a training step, and of a forward pass of single tokens."""
    plain = base()
    nothing = training_step(plain), forward_pass(plain)
    counts = {}
    for name in ("LoRA", *CONFIGS):
        model = adapted(name)
        counts[name] = (
            (training_step(model) - nothing[0]) / LAYERS,
            (forward_pass(model) - nothing[1]) / LAYERS,
        )
    return counts


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compiled", action="store_true", help="count kernels of compiled code (minutes)")
    if parser.parse_args().compiled:
        print("| kernels of one more layer, compiled training step | fused | products | together |")
        print("|---|---|---|---|")
        for name in ("LoRA", *CONFIGS):
            fused, products = compiled_layer(name)
            print(f"| {name} | {fused:.1f} | {products:.1f} | {fused + products:.1f} |", flush=True)
        return
    print(f"| launches per layer ({LAYERS} layers, {ROWS} rows) | training step, {TOKENS} tokens | single tokens |")
    print("|---|---|---|")
    for name, (step, forward) in launches().items():
        print(f"| {name} | {step:.1f} | {forward:.1f} |")


if __name__ == "__main__":
    main()
