"""Runs the blocks of the documents in this process, as they stand: with few rows, few steps and tiny bases."""

import itertools
import re
import runpy
import shlex
import shutil
from pathlib import Path

from accelerate.state import AcceleratorState, GradientState
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_causal_context.cli import main
from hf_causal_context.data import density_ratios
from hf_causal_context.evaluation import classifiers, metrics
from hf_causal_context.training.denoiser import gap as denoiser_gap
from hf_causal_context.training.denoiser import losses as denoiser_losses
from hf_causal_context.training.language import gap as text_gap

from .training.small_language import CHAT

ROOT = Path(__file__).parents[1]
# Later options win; these make a command of a document short.
SHORTER = {
    "check-data": {},
    "train": {
        "max_train_steps": 2,
        "checkpointing_steps": 2,
        "validation_steps": 2,
        "train_batch_size": 4,
        "num_validation_images": 1,
        "num_inference_steps": 2,
    },
    "generate": {"seeds": 0, "num_inference_steps": 2},
    "evaluate": {"num_samples": 2, "num_seeds": 1},
    "train-text": {
        "max_train_steps": 2,
        "checkpointing_steps": 2,
        "validation_steps": 2,
        "num_validation_texts": 1,
        "max_new_tokens": 4,
    },
    "generate-text": {"seeds": 0, "max_new_tokens": 4},
    "train-autoencoder": {
        "max_train_steps": 2,
        "checkpointing_steps": 2,
        "validation_steps": 2,
        "train_batch_size": 4,
        "lr_warmup_steps": 0,
        "num_validation_images": 1,
    },
    "push": {"num_inference_steps": 2},
    "export": {},
    "edit": {"num_inference_steps": 2},
    "merge": {},
    "quickstart": {},
}
# Bases that are trained on images of another size than the tiny ones.
SMALLER = ("--resolution", "512")
NOT_RUN = {"demo": "serves a page until it is stopped; tests/test_demo.py opens it"}


def shorten_estimates(monkeypatch):
    """Let what commands estimate take no time."""
    monkeypatch.setattr(metrics, "NUM_PROJECTIONS", 20)
    monkeypatch.setattr(classifiers, "_MIN_STEPS", 20)
    for module in (denoiser_gap, text_gap):
        monkeypatch.setattr(module, "NUM_ROWS", 4)
    monkeypatch.setattr(denoiser_gap, "NUM_INFERENCE_STEPS", 2)
    monkeypatch.setattr(denoiser_losses, "MOST_ROWS", 4)
    for name, value in {"NUM_MODELS": 1, "FEWEST_STEPS": 2, "SMALLEST_BATCH": 2}.items():
        monkeypatch.setattr(density_ratios, name, value)


def documents():
    """Every page of the documentation, relative to the root."""
    pages = [ROOT / "README.md", *(ROOT / "examples").rglob("*.md")]
    return sorted(str(page.relative_to(ROOT)) for page in pages)


def blocks(name):
    """Kind and text of each block of a page."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", (ROOT / name).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def commands(block):
    """The words of each command of a block of shell code."""
    for line in block.replace("\\\n", " ").splitlines():
        for command in line.split(" && "):
            yield shlex.split(command)


def run(words):
    """Run one command in this process."""
    AcceleratorState._reset_state(reset_partial_state=True)  # each command is a process of its own
    GradientState._reset_state()
    if words[0] == "python":
        runpy.run_path(words[1], run_name="__main__")
    elif words[:2] == ["rm", "-rf"]:
        shutil.rmtree(words[2], ignore_errors=True)
    else:
        assert words[0] == "hf-causal-context"
        shorter = [f"--{name}={value}" for name, value in SHORTER[words[1]].items()]
        shorter += ["--num_inference_steps=2"] if "--num_inference_steps" in words else []
        shorter += ["--resolution=16"] if SMALLER in itertools.pairwise(words) else []
        given = words[1:]
        if "--seeds" in given and "seeds" in SHORTER[words[1]]:  # options of several values are refused where repeated
            start = given.index("--seeds")
            given = [*given[:start], *itertools.dropwhile(lambda word: not word.startswith("--"), given[start + 1 :])]
        assert main([*given, *shorter]) == 0


def tiny_chat_model(folder):
    """Save a Llama that reads and writes bytes, with a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<pad>", "<s>", "</s>"]
    tokens = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(special + alphabet)}, merges=[]))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"vocab_size": len(tokenizer), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, **ids, max_position_embeddings=512)).save_pretrained(folder)
    return str(folder)
