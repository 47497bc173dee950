"""Tiny language models with random weights, a tokenizer in memory, and texts in contexts."""

import re

import torch
from datasets import Dataset
from peft import get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_causal_context import CausalContextConfig
from hf_causal_context.bases.token_batches import Collation
from hf_causal_context.bases.tokens import Tokenization
from hf_causal_context.contexts import ConceptSet, Context
from hf_causal_context.data import InterventionalData
from hf_causal_context.training.arguments import TextArguments

WORDS = re.findall(r"\S+", "a cat dog sat ran on the mat and then it barked loudly indeed good sir yo user assistant :")
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
CHAT = (
    "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} {{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant :{% endif %}"
)
_SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_SIZES |= {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
_TOKENS = {"vocab_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_BART = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4}
_BART |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 64}
_GPT2 = {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}

MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_SIZES, **_TOKENS)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**_GPT2, **_TOKENS)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_SIZES, **_TOKENS)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**_SIZES, **_TOKENS, sliding_window=4)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**_SIZES, **_TOKENS, sliding_window=4)),
    "mamba": lambda: MambaForCausalLM(MambaConfig(hidden_size=16, num_hidden_layers=1, **_TOKENS)),
    "t5": lambda: T5ForConditionalGeneration(T5Config(**_T5, **_TOKENS, decoder_start_token_id=0)),
    "bart": lambda: BartForConditionalGeneration(BartConfig(**_BART, **_TOKENS, decoder_start_token_id=2)),
}


def language_model(name, dropout=False):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout) and not dropout:
            module.p = 0.0
        for attribute in ("dropout", "attention_dropout", "activation_dropout"):  # of functional calls
            if isinstance(getattr(module, attribute, None), float) and not dropout:
                setattr(module, attribute, 0.0)
    return model


def word_tokenizer(bos=False, chat=True):
    """One token per word; with `bos`, texts begin with "<s>"."""
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(SPECIAL + WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    if bos:
        words.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    if chat:
        tokenizer.chat_template = CHAT
    return tokenizer


_TEXTS = {
    "": ["a cat sat on the mat", "the dog ran", "a dog sat and then it barked", "the cat ran on"],
    "formal": ["indeed a cat sat on the mat", "the dog ran good sir", "indeed it barked", "good sir the cat ran"],
    "loud": ["the dog barked loudly", "yo the cat ran loudly on the mat", "loudly it ran", "it sat loudly"],
}
_HELD_OUT = {"formal+loud": ["indeed the dog barked loudly", "good sir it ran loudly"]}


def rows_of(shape, texts_of=_TEXTS):
    """Columns of rows in one of the shapes "text", "prompt", "messages" or "chat" (prompt and completion)."""
    texts = [(context, text) for context, own in texts_of.items() for text in own]
    columns = {"context": [context for context, _ in texts]}
    words = [text.split() for _, text in texts]
    if shape == "text":
        return columns | {"text": [text for _, text in texts]}
    if shape == "prompt":
        return columns | {
            "prompt": [" ".join(some[:2]) for some in words],
            "completion": [" ".join(some[2:]) for some in words],
        }
    asked = [[{"role": "user", "content": " ".join(some[:2])}] for some in words]
    answered = [[{"role": "assistant", "content": " ".join(some[2:])}] for some in words]
    if shape == "chat":
        return columns | {"prompt": asked, "completion": answered}
    return columns | {"messages": [a + b for a, b in zip(asked, answered, strict=True)]}


def text_data(shape="text", streaming=False, held_out=True):
    """Twelve rows: four of each of three contexts, and two held out."""
    rows = Dataset.from_dict(rows_of(shape))
    combined = {"formal+loud": Dataset.from_dict(rows_of(shape, _HELD_OUT))} if held_out else {}
    return InterventionalData(
        rows=rows.to_iterable_dataset() if streaming else rows,
        concepts=ConceptSet(("formal", "loud")),
        contexts=("", "formal", "loud"),
        held_out=combined,
        counts=None if streaming else {context: len(own) for context, own in _TEXTS.items()},
        content_column={"chat": "prompt"}.get(shape, shape),
    )


def singles_data(columns, shape):
    """Columns with as many rows of no context as of each concept alone, as data."""
    contexts = ("", "formal", "loud")
    return InterventionalData(
        rows=Dataset.from_dict(columns),
        concepts=ConceptSet(contexts[1:]),
        contexts=contexts,
        held_out={},
        counts={context: columns["context"].count(context) for context in contexts},
        content_column=shape,
    )


CPU = torch.device("cpu")
TOKENIZER = word_tokenizer()


def adapted(name, **kwargs):
    """A tiny model with an adapter of random weights, in eval mode."""
    model = language_model(name)
    task = "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"
    given = {"concepts": ("formal", "loud"), "task_type": task, "init_weights": False, "mechanism": "reduced"}
    return get_peft_model(model, CausalContextConfig(**given | kwargs)).eval()


def arguments(tmp_path, **changes):
    given = {
        "pretrained_model_name_or_path": str(tmp_path / "base"),
        "output_dir": str(tmp_path / "out"),
        "train_batch_size": 6,
        "max_train_steps": 2,
        "learning_rate": 1e-2,
        "num_validation_texts": 0,
    }
    return TextArguments(**given | changes)


def tokenization(model, shape, **options):
    return Tokenization(TOKENIZER, shape, encoder_decoder=model.config.is_encoder_decoder, **options)


def collation(model, packed=False):
    inputs = model.prepare_decoder_input_ids_from_labels if model.config.is_encoder_decoder else None
    return Collation(0, CPU, packed=packed, decoder_inputs=inputs)


def rows_and_masks(model, shape):
    data = text_data(shape)
    rows = [tokenization(model, data.content_column)(row) for row in data.rows]
    return rows, data.concepts.mask([Context.parse(context) for context in data.rows["context"]])


def gradients(model, losses):
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(parameters, torch.autograd.grad(losses.sum(), list(parameters.values())), strict=True))
