"""The guides run as they stand, block by block: with few rows, few steps, and tiny bases in place of downloads."""

import re
import runpy
import shlex
import sys
from importlib import import_module
from pathlib import Path

import diffusers
import pytest
import torch
from PIL import Image

from hf_causal_context.commands import COMMANDS
from hf_causal_context.commands.parsing import option_names

from .documents import ROOT, blocks, run, shorten_estimates, tiny_chat_model
from .training.conftest import on_cpu, pipeline_folder  # noqa: F401 (fixtures)
from .training.tiny_pipelines import TEXT_UNET

pytestmark = pytest.mark.usefixtures("on_cpu")


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    """The folder that the guides are followed in, and estimates that take no time."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("edit", "rewrite", "rules"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    shorten_estimates(monkeypatch)
    yield
    for name in ("edit", "rewrite", "rules"):
        sys.modules.pop(name, None)


def follow(name, changes):
    """Save the Python blocks under the names in their first lines, run the commands; return the names."""
    saved, unused = [], set(changes)
    for kind, text in blocks(f"examples/guides/{name}"):
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


@pytest.mark.filterwarnings("ignore:Contexts are made by selecting")
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


def test_video(pipeline_folder):  # noqa: F811
    changes = {
        "NUM_CLIPS, NUM_FRAMES, SIDE = 60, 17, 256": "NUM_CLIPS, NUM_FRAMES, SIDE = 4, 5, 64",
        "--num_frames 17": "--num_frames 5",
        "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": pipeline_folder("wan"),
        "--resolution 256": "--resolution 32",
    }
    assert follow("video.md", changes) == ["make_clips.py"]
    assert Path("clips-loras", "fast+tall.safetensors").exists()
    with Image.open("clips-samples/grid.png") as grid:
        assert grid.height > 4 * 64


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
    assert saved == ["rewrite.py", "make_texts.py", "make_sets.py", "rewrite.py", "count.py", "rules.py", "judge.py"]
    output = capsys.readouterr().out
    assert "your observational set (perplexity" in output
    for context in ("obs", "capitals", "emoji", "capitals+emoji"):
        assert re.search(rf"^{re.escape(context)} +12 texts, ", output, re.MULTILINE)  # count.py
        assert re.search(rf"^{re.escape(context)} +1 samples: ", output, re.MULTILINE)  # judge.py
    assert Path("texts-report", "report.md").read_text().startswith("# Does it compose?")
    # the second rewrite.py, with a model
    assert isinstance(runpy.run_path("rewrite.py")["rewrite"]("A film.", "Write it in capital letters."), str)


def test_what_goes_wrong_first_names_messages_and_options_that_there_are():
    page = (ROOT / "examples/guides/faults.md").read_text(encoding="utf-8")
    rows = page.partition("## The first ten")[2].partition("\n## ")[0].split("|---|---|---|\n")[1].strip().splitlines()
    assert len(rows) == 10
    sources = " ".join(path.read_text(encoding="utf-8") for path in (ROOT / "hf_causal_context").rglob("*.py"))
    messages = {message for row in rows for message in re.findall(r'"(.+?)"', row)}
    assert len(messages) > 4
    # Numbers and words that a message is made of may stand between its parts.
    assert [m for m in messages if m not in sources and m != "The loss became nan at step"] == []
    assert 'f"The loss became {loss}"' in sources
    modules = (import_module(f"hf_causal_context.commands.{name.replace('-', '_')}") for name in COMMANDS)
    known = {option for module in modules for option in option_names(module.Arguments)}
    assert {option for row in rows for option in re.findall(r"--(\w+)", row)} <= known
