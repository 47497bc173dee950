"""The guides run as they stand, block by block: with few rows, few steps, and tiny bases in place of downloads."""

import re
import runpy
import shlex
import sys
from pathlib import Path

import diffusers
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_causal_context.cli import main
from hf_causal_context.data import density_ratios
from hf_causal_context.evaluation import classifiers, metrics
from hf_causal_context.training.denoiser import gap as denoiser_gap
from hf_causal_context.training.denoiser import losses as denoiser_losses
from hf_causal_context.training.language import gap as text_gap

from .training.conftest import on_cpu, pipeline_folder  # noqa: F401 (fixtures)
from .training.small_language import CHAT
from .training.tiny_pipelines import TEXT_UNET

ROOT = Path(__file__).parents[1]
GUIDES = ROOT / "examples" / "guides"
# Later options win; these make a command of a guide short.
SHORTER = {
    "check-data": {},
    "train": {
        "max_train_steps": 2,
        "validation_steps": 2,
        "train_batch_size": 4,
        "num_validation_images": 1,
        "num_inference_steps": 2,
    },
    "generate": {"seeds": 0, "num_inference_steps": 2},
    "evaluate": {"num_samples": 2, "num_seeds": 1},
    "train-text": {"max_train_steps": 2, "validation_steps": 2, "num_validation_texts": 1, "max_new_tokens": 4},
    "generate-text": {"seeds": 0, "max_new_tokens": 4},
}

pytestmark = pytest.mark.usefixtures("on_cpu")


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    """The folder that the guides are followed in, and estimates that take no time."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("edit", "rewrite"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(metrics, "NUM_PROJECTIONS", 20)
    monkeypatch.setattr(classifiers, "_MIN_STEPS", 20)
    for module in (denoiser_gap, text_gap):
        monkeypatch.setattr(module, "NUM_ROWS", 4)
    monkeypatch.setattr(denoiser_gap, "NUM_INFERENCE_STEPS", 2)
    monkeypatch.setattr(denoiser_losses, "MOST_ROWS", 4)
    for name, value in {"NUM_MODELS": 1, "FEWEST_STEPS": 2, "SMALLEST_BATCH": 2}.items():
        monkeypatch.setattr(density_ratios, name, value)
    yield
    for name in ("edit", "rewrite"):
        sys.modules.pop(name, None)


def blocks(name):
    """Kind and text of each block of a guide."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", (GUIDES / name).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def follow(name, changes):
    """Save the Python blocks under the names in their first lines, run the commands; return the names."""
    saved, unused = [], set(changes)
    for kind, text in blocks(name):
        for old, new in changes.items():
            unused -= {old} if old in text else set()
            text = text.replace(old, new)
        if kind == "python":
            file = re.match(r"# (\w+\.py)\b", text)
            assert file, f"{name} has a block without a file name:\n{text}"
            Path(file[1]).write_text(text, encoding="utf-8")
            saved.append(file[1])
        elif kind == "sh":
            for line in text.replace("\\\n", " ").splitlines():
                run(shlex.split(line))
        else:
            assert kind == "text"
    assert not unused
    return saved


def run(words):
    AcceleratorState._reset_state(reset_partial_state=True)  # each command is a process of its own
    GradientState._reset_state()
    if words[0] == "python":
        runpy.run_path(words[1], run_name="__main__")
    else:
        assert words[0] == "hf-causal-context"
        shorter = [f"--{name}={value}" for name, value in SHORTER[words[1]].items()]
        shorter += ["--num_inference_steps=2"] if "--num_inference_steps" in words else []
        assert main([*words[1:], *shorter]) == 0


def tiny_chat_model(folder):
    """A Llama that reads and writes bytes, with a chat template."""
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


@pytest.fixture
def tiny_editing_model(pipeline_folder, tmp_path_factory):  # noqa: F811
    given = diffusers.StableDiffusionPipeline.from_pretrained(pipeline_folder("stable_diffusion"))
    unet = diffusers.UNet2DConditionModel(**TEXT_UNET, in_channels=8, cross_attention_dim=16)
    pipe = diffusers.StableDiffusionInstructPix2PixPipeline(
        given.vae, given.text_encoder, given.tokenizer, unet, given.scheduler, None, None, requires_safety_checker=False
    )
    folder = str(tmp_path_factory.mktemp("editing"))
    pipe.save_pretrained(folder)
    return folder


def test_images(pipeline_folder, tiny_editing_model, capsys):  # noqa: F811
    base = Path("hf_causal_context/models/digit_base")
    base.parent.mkdir(parents=True)
    base.symlink_to(ROOT / base)
    changes = {
        "NUM_PHOTOS = 2000": "NUM_PHOTOS = 48",
        "timbrooks/instruct-pix2pix": tiny_editing_model,
        "(512, 512)": "(32, 32)",
        "num_inference_steps=20": "num_inference_steps=2",
        "stable-diffusion-v1-5/stable-diffusion-v1-5": pipeline_folder("stable_diffusion"),
        "--resolution 512": "--resolution 16",
    }
    assert follow("images.md", changes) == ["edit.py", "make_photos.py", "make_sets.py", "edit.py", "make_table.py"]
    output = capsys.readouterr().out
    assert re.search(r"glasses\+hat +held out +12", output)  # of the folders and of the table
    assert "Contexts are made by selecting rows, and selecting is not intervening" in output
    assert "your observational set (loss" in output
    assert "Combinations drawn from the training rows" in output
    for path in Path("faces", "obs").iterdir():
        assert Image.open(path).tobytes() == Image.open(Path("photos", path.name)).tobytes()
    assert Path("faces-samples", "grid.png").exists()
    assert (Path("faces-report", "report.md")).read_text().startswith("# Does it compose?")
    assert Path("faces-sd", "adapter_model.safetensors").exists()
    # the second edit.py, with a model
    edited = runpy.run_path("edit.py")["edit"](Image.open("photos/0000.png").convert("RGB"), "Put on a hat.")
    assert edited.size == (32, 32)


def test_language(tmp_path_factory, capsys):
    torch.manual_seed(0)
    model = tiny_chat_model(tmp_path_factory.mktemp("chat"))
    changes = {
        "NUM_TEXTS = 1000": "NUM_TEXTS = 48",
        "HuggingFaceTB/SmolLM2-135M-Instruct": model,
        "HuggingFaceTB/SmolLM2-1.7B-Instruct": model,
        "max_new_tokens=200": "max_new_tokens=5",
    }
    saved = follow("language.md", changes)
    assert saved == ["rewrite.py", "make_texts.py", "make_sets.py", "rewrite.py", "count.py", "judge.py"]
    output = capsys.readouterr().out
    assert "your observational set (perplexity" in output
    for context in ("obs", "capitals", "emoji", "capitals+emoji"):
        assert re.search(rf"^{re.escape(context)} +12 texts, ", output, re.MULTILINE)  # count.py
        assert re.search(rf"^{re.escape(context)} +1 samples: ", output, re.MULTILINE)  # judge.py
    assert Path("texts-report", "report.md").read_text().startswith("# Does it compose?")
    # the second rewrite.py, with a model
    assert isinstance(runpy.run_path("rewrite.py")["rewrite"]("A film.", "Write it in capital letters."), str)


@pytest.mark.parametrize("name", ["README.md", "examples/guides/images.md", "examples/guides/language.md"])
def test_links_of_and_to_the_guides_lead_somewhere(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    links = [link for link in links if name != "README.md" or "guides" in link]
    assert len(links) >= 2
    for link in links:
        path, _, anchor = link.partition("#")
        target = ROOT / name if not path else (ROOT / name).parent / path
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}, link
