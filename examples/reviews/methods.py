"""The methods that `compare.py` compares: how each is trained on single interventions, and how it makes combinations.

Shapes: B rows, T tokens, D features of the base.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_causal_context import ConceptSet, Context, intervene
from hf_causal_context.data import texts_from_dataset
from hf_causal_context.training.language import train_text

from .base import LEARNING_RATE, ROWS, TARGETS, WIDTH, adapter_arguments

OBSERVATIONAL_LORA = "obs"
STEERING_FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)

Rows = Mapping[Context, Sequence[list[int]]]  # token ids, from the beginning to the end of the text


@dataclass
class Method:
    """A model, how it is put under a context, and the control tokens that it wants after the beginning of a text."""

    model: Any
    under: Callable[[Context], AbstractContextManager[Any]]
    prefix: Callable[[Context], list[int]] = lambda context: []


@dataclass
class Setting:
    """What all methods share; the methods of LoRAs also share these, once they are trained."""

    base: Path
    tokenizer: PreTrainedTokenizerFast
    concepts: ConceptSet
    max_steps: int
    seed: int
    loras: Any = None

    def load_base(self) -> Any:
        """A fresh copy of the base; everything drawn from now on follows the seed."""
        set_seed(self.seed)
        return AutoModelForCausalLM.from_pretrained(self.base)

    def fit(
        self,
        model: nn.Module,
        rows: Rows,
        batch_size: int,
        prefix: Callable[[Context], list[int]] = lambda context: [],
    ) -> None:
        """Train a peer, all of it that requires gradients, on rows of all the contexts, mixed."""
        table: dict[str, list[Any]] = {"input_ids": [], "labels": []}
        for context, texts in rows.items():
            control = prefix(context)
            for begin, *rest in texts:
                table["input_ids"].append([begin, *control, *rest])
                table["labels"].append([begin, *[-100] * len(control), *rest])
        collate = DataCollatorForSeq2Seq(self.tokenizer)  # pads labels, too
        with TemporaryDirectory() as folder:  # Trainer wants one
            settings = TrainingArguments(
                output_dir=folder,
                max_steps=self.max_steps,
                per_device_train_batch_size=batch_size,
                learning_rate=LEARNING_RATE,
                lr_scheduler_type="cosine",
                warmup_steps=self.max_steps // 20,
                save_strategy="no",
                logging_strategy="no",
                report_to="none",
                seed=self.seed,
            )
            Trainer(model, settings, collate, Dataset.from_dict(table)).train()
        model.eval()


def base(setting: Setting, rows: Rows) -> Method:
    """The frozen base: what happens by chance."""
    return Method(setting.load_base().eval(), lambda context: nullcontext())


def adapter(
    setting: Setting, rows: Rows, reweighted: Sequence[str] = (), observational_rank: int | None = None
) -> Method:
    """Ours: one adapter for all concepts, by the package's own trainer."""
    columns = {
        "text": [setting.tokenizer.decode(ids[1:-1]) for texts in rows.values() for ids in texts],
        "context": [str(context) for context, texts in rows.items() for _ in texts],
    }
    data = texts_from_dataset(
        Dataset.from_dict(columns), concepts=setting.concepts, training_contexts=[str(context) for context in rows]
    )
    model = setting.load_base()
    with TemporaryDirectory() as folder:
        arguments = adapter_arguments(
            str(setting.base),
            folder,
            setting.max_steps,
            observational_rank,
            reweighted_contexts=list(reweighted),
            num_validation_texts=0,
            seed=setting.seed,
        )
        train_text(arguments, model, setting.tokenizer, data)
    return Method(model.eval(), lambda context: intervene(model, context))


def reweighted_adapter(setting: Setting, rows: Rows) -> Method:
    """The same, also trained on rows of the single interventions that were drawn to follow the pairs."""
    return adapter(setting, rows, reweighted=["pairs"])


def adapter_without_part(setting: Setting, rows: Rows) -> Method:
    """The same without the observational part: each concept also learns how the data differ from the base."""
    return adapter(setting, rows, observational_rank=0)


@contextmanager
def lora_sum(model: Any, factors: Mapping[str, float]) -> Iterator[None]:
    """The base's weights plus those of its LoRAs, each times its factor; without any, the base."""
    if not factors:
        with model.disable_adapter():
            yield
        return
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    model.base_model.set_adapter(list(factors))
    for layer in layers:
        for name, factor in factors.items():
            layer.set_scale(name, factor)
    try:
        yield
    finally:
        for layer in layers:
            for name in factors:
                layer.set_scale(name, 1.0)


def stacked(context: Context) -> dict[str, float]:
    """Factors of the LoRAs of a combination that adds them up: the strengths."""
    return context.strengths


def less_observational(context: Context) -> dict[str, float]:
    """What the data differ from the base by should be added once: a + b - obs, a + b + c - 2 obs, a alone, obs.

    So do half a + half obs, at strength 0.5.
    """
    factors = {**context.strengths, OBSERVATIONAL_LORA: 1.0 - sum(context.strengths.values())}
    return {name: factor for name, factor in factors.items() if factor}


def single_loras(setting: Setting, rows: Rows, names: Sequence[str]) -> Any:
    """One LoRA per name, concept or observational, each trained on its own set for as many steps and rows."""
    config = LoraConfig(r=WIDTH, lora_alpha=WIDTH, target_modules=TARGETS, task_type="CAUSAL_LM")
    for name in names:
        if setting.loras is None:
            setting.loras = get_peft_model(setting.load_base(), config, adapter_name=name)
        elif name in setting.loras.peft_config:
            continue
        else:
            setting.loras.add_adapter(name, config)
        setting.loras.set_adapter(name)
        context = Context() if name == OBSERVATIONAL_LORA else Context(name)
        setting.fit(setting.loras, {context: rows[context]}, ROWS)
    return setting.loras


def stacked_loras(setting: Setting, rows: Rows) -> Method:
    """A combination adds up the LoRAs of its concepts."""
    model = single_loras(setting, rows, setting.concepts.names)
    return Method(model, lambda context: lora_sum(model, stacked(context)))


def subtracted_loras(setting: Setting, rows: Rows) -> Method:
    """A combination also subtracts the LoRA of the observational set, but for one time."""
    model = single_loras(setting, rows, [*setting.concepts.names, OBSERVATIONAL_LORA])
    return Method(model, lambda context: lora_sum(model, less_observational(context)))


def control_tokens(setting: Setting, rows: Rows) -> Method:
    """A LoRA of the rank of all concepts, and one new token per concept; a combination begins with several."""
    model = setting.load_base()
    size = model.config.vocab_size
    model.resize_token_embeddings(size + len(setting.concepts))
    config = LoraConfig(
        r=WIDTH * len(setting.concepts),
        lora_alpha=WIDTH * len(setting.concepts),
        target_modules=TARGETS,
        task_type="CAUSAL_LM",
        trainable_token_indices=list(range(size, size + len(setting.concepts))),
    )

    def prefix(context: Context) -> list[int]:
        return [size + setting.concepts.index(name) for name in setting.concepts if name in context.targets]

    adapted = get_peft_model(model, config)
    setting.fit(adapted, rows, ROWS * len(rows), prefix)
    return Method(adapted, lambda context: nullcontext(), prefix)


def steerable(layers: Any) -> Callable[[Sequence[tuple[int, Tensor]]], AbstractContextManager[None]]:
    """Return what adds vectors (D,) to the outputs of numbered layers of a model, while it is entered."""
    added: dict[int, Tensor] = {}
    for number, layer in enumerate(layers):
        layer.register_forward_hook(lambda module, args, output, n=number: output + added[n] if n in added else output)

    @contextmanager
    def steered(vectors: Sequence[tuple[int, Tensor]]) -> Iterator[None]:
        for layer, vector in vectors:
            added[layer] = added.get(layer, 0) + vector
        try:
            yield
        finally:
            added.clear()

    return steered


def steering_vectors(setting: Setting, rows: Rows) -> Method:
    """Difference of mean activations, added to a layer's output; layer and factor suit the single set best."""
    model = setting.load_base().eval()
    layers = model.model.layers
    steered = steerable(layers)
    half = {context: len(texts) // 2 for context, texts in rows.items()}
    means = {context: _mean_activations(model, texts[: half[context]]) for context, texts in rows.items()}
    chosen: dict[str, tuple[int, Tensor]] = {}
    for concept in setting.concepts:
        single = Context(concept)
        losses: dict[tuple[int, float], float] = {}
        for layer in range(len(layers) - 1):
            for factor in STEERING_FACTORS:
                with steered([(layer, factor * (means[single] - means[Context()])[layer])]):
                    sums, counts = log_losses(model, rows[single][half[single] :][:200])
                losses[layer, factor] = float(sums.sum() / counts.sum())
        layer, factor = min(losses, key=losses.__getitem__)
        chosen[concept] = (layer, factor * (means[single] - means[Context()])[layer])
        print(f"  steering {concept}: layer {layer}, factor {factor:g}")
    return Method(model, lambda context: steered([chosen[name] for name in context.targets]))


@torch.no_grad()
def _mean_activations(model: Any, texts: Sequence[list[int]]) -> Tensor:
    """(layers - 1, D) means over all tokens of the layers' outputs; of the last, transformers tells the norm's only."""
    total, count = torch.zeros(()), 0
    for start in range(0, len(texts), 100):
        ids, kept = padded(texts[start : start + 100])
        hidden = torch.stack(model(ids, output_hidden_states=True).hidden_states[1:-1])
        total = total + (hidden * kept[..., None]).sum((1, 2))
        count += int(kept.sum())
    return total / count


def padded(texts: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
    """Token ids (B, T), padded on the right with 0, and which of them are the texts'."""
    longest = max(map(len, texts))
    ids = torch.tensor([text + [0] * (longest - len(text)) for text in texts])
    return ids, torch.arange(longest) < torch.tensor([[len(text)] for text in texts])


@torch.no_grad()
def log_losses(model: Any, texts: Sequence[list[int]], control: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
    """Negative log likelihoods in nats and numbers of tokens, (B,) each; control tokens do not count."""
    sums, counts = [], []
    for start in range(0, len(texts), 100):
        some = [[begin, *control, *rest] for begin, *rest in texts[start : start + 100]]
        ids, kept = (tensor.to(model.device) for tensor in padded(some))
        logits = model(ids).logits[:, len(control) : -1]
        kept = kept[:, 1 + len(control) :]
        losses = nn.functional.cross_entropy(logits.mT, ids[:, 1 + len(control) :], reduction="none")
        sums.append((losses * kept).sum(1).cpu())
        counts.append(kept.sum(1).cpu())
    return torch.cat(sums), torch.cat(counts)


METHODS: dict[str, Callable[[Setting, Rows], Method]] = {
    "base": base,
    "adapter": adapter,
    "adapter, no observational part": adapter_without_part,
    "adapter, reweighted pairs": reweighted_adapter,
    "stacked LoRAs": stacked_loras,
    "a+b-obs": subtracted_loras,
    "control tokens": control_tokens,
    "steering vectors": steering_vectors,
}
