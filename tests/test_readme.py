"""The documents hold: what they show runs, twice in a row, and what they point at is there."""

import json
import pkgutil
import re
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch
from PIL import Image

from hf_causal_context import quickstart
from hf_causal_context.commands import evaluate
from hf_causal_context.evaluation import calibrating

from .documents import NOT_RUN, ROOT, blocks, commands, documents, run, shorten_estimates, tiny_chat_model
from .hub.conftest import hub, server  # noqa: F401 (fixtures)
from .training.conftest import on_cpu, pipeline_folder  # noqa: F401 (fixtures)

STABLE_DIFFUSION = "stable-diffusion-v1-5/stable-diffusion-v1-5"
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"

# Settings of the guides' Python, as of the commands: `SHORTER` in documents.py.
SHORTER = {
    "num_samples=256": "num_samples=2, num_seeds=1, num_inference_steps=2",
    "max_train_steps=400": "max_train_steps=2, train_batch_size=4, num_validation_images=0",
    "num_inference_steps=50": "num_inference_steps=2",
}

pytestmark = pytest.mark.usefixtures("on_cpu")


@pytest.fixture
def newcomer(hub, tmp_path, monkeypatch, pipeline_folder):  # noqa: F811
    """The folder of somebody who has the images and texts of the README, and whose Hub has tiny bases by its names."""
    torch.manual_seed(0)
    chat = tiny_chat_model(tmp_path / "chat")
    for repo_id, folder in ((STABLE_DIFFUSION, pipeline_folder("stable_diffusion")), (SMOLLM2, chat)):
        files = {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}
        hub.server.create(repo_id).edit(files)
    place = tmp_path / "place"
    place.mkdir()
    monkeypatch.chdir(place)
    base = Path("hf_causal_context/models/digit_base")
    base.parent.mkdir(parents=True)
    base.symlink_to(ROOT / base)
    for number, context in enumerate(("obs", "glasses", "hat", "glasses+hat")):
        Path("images", context).mkdir(parents=True)
        for row in range(12):
            image = Image.new("RGB", (64, 64), (60 * number, 20 * row, 100))
            image.putpixel((row, number), (255, 255, 255))
            image.save(Path("images", context, f"{row:04}.png"))
    for context, word in {"obs": "It is", "formal": "Indeed it is", "brief": "Is"}.items():
        rows = [json.dumps({"text": f"{word} film number {row}."}) + "\n" for row in range(12)]
        Path("texts", context).mkdir(parents=True)
        Path("texts", context, "rows.jsonl").write_text("".join(rows))
    shorten_estimates(monkeypatch)
    return place


@pytest.fixture
def short_quickstart(monkeypatch):
    arguments = quickstart.training_arguments
    small = {"max_train_steps": 2, "checkpointing_steps": 2, "train_batch_size": 5, "target_modules": ["to_q", "to_v"]}
    monkeypatch.setattr(
        quickstart, "training_arguments", lambda folder, seed: replace(arguments(folder, seed), **small)
    )
    monkeypatch.setattr(quickstart, "NUM_SAMPLES", 8)
    monkeypatch.setattr(quickstart, "ROWS_PER_CONTEXT", 60)
    monkeypatch.setattr(quickstart, "NUM_INFERENCE_STEPS", 2)


def follow(name, names=None):
    """Run every block of Python and of shell code of a page; installing and serving are left out."""
    for kind, text in blocks(name):
        if kind == "python":
            for long, short in SHORTER.items():
                text = text.replace(long, short)
            exec(compile(text, f"{name}: {text.splitlines()[0]}", "exec"), {} if names is None else names)
        elif kind == "sh":
            for words in commands(text):
                if words[0] == "pip":
                    check_installation(words)
                elif words[1] not in NOT_RUN and words[:3] != ["python", "-m", "pytest"]:
                    run(words)
        else:
            assert kind in ("text", "yaml", "bibtex")


def check_installation(words):
    """`pip install` of this package names a constraints file and extras that there are."""
    assert words[1] == "install"
    constraints, target = words[words.index("-c") + 1], words[words.index("-e") + 1]
    assert (ROOT / constraints).exists()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert re.fullmatch(r"\.\[(\w+)\]", target)[1] in extras


def test_readme_runs_twice_as_it_stands(newcomer, short_quickstart, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"] + ["matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)  # the README's first command does not install it
    for _ in range(2):
        follow("README.md")
    assert Path("digits-context", "adapter_model.safetensors").exists()
    assert len(list(Path("samples").glob("*.png"))) == 4
    assert len(Path("samples.jsonl").read_text().splitlines()) == 3
    assert {path.name for path in Path("loras").iterdir()} == {
        *("glasses.safetensors", "hat.safetensors", "glasses+hat.safetensors", "glasses=0.5.safetensors")
    }


@pytest.fixture
def finished(newcomer):
    """The folder of somebody who followed the README: adapters of images and of texts, one of them on the Hub."""
    for kind, text in blocks("README.md"):
        for words in commands(text) if kind == "sh" else ():
            if words[:2] in (["hf-causal-context", command] for command in ("train", "train-text", "push")):
                run(words)
    return newcomer


@pytest.mark.parametrize("page", ["autoencoder", "methods", "reweighting", "scale"])
def test_guides_run_for_somebody_who_has_images(page, newcomer):
    follow(f"examples/guides/{page}.md", {})


@pytest.mark.filterwarnings("ignore:.* was saved without its causal context adapter")
@pytest.mark.filterwarnings("ignore:.*The reconstruction did not hold")  # a base of random weights
@pytest.mark.parametrize("page", ["apps", "evaluation"])
def test_guides_run_for_somebody_who_followed_the_readme(page, finished, monkeypatch):
    # Nothing was learned in two steps, so there is nothing to calibrate.
    knots = {name: [(0.0, 0.0), (0.5, 0.25), (1.0, 1.0)] for name in ("glasses", "hat")}
    monkeypatch.setattr(calibrating, "calibrations", lambda report: (knots, []))
    for module in (evaluate, calibrating):
        monkeypatch.setattr(module, "MIN_ROWS", 1)
    follow(f"examples/guides/{page}.md", {})


def test_the_guide_to_the_hub_runs(finished, hub):  # noqa: F811
    run(
        next(
            words for kind, text in blocks("examples/guides/evaluation.md") if kind == "sh" for words in commands(text)
        )
    )
    diffusers.DiffusionPipeline.from_pretrained(STABLE_DIFFUSION).save_pretrained("my-base")
    follow("examples/guides/hub.md", {})
    assert "user/my-base" in hub.server.repositories
    assert "evaluation/report.json" in hub.server.repositories["user/my-adapter"].contents()


def test_the_readme_can_be_read_in_five_minutes():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 250


@pytest.mark.parametrize("name", documents())
def test_links_lead_somewhere(name):
    text = re.sub(r"^```.*?^```$", "", (ROOT / name).read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}, link


@pytest.mark.parametrize("name", documents())
def test_scripts_that_are_named_exist_and_have_the_options(name):
    text = (ROOT / name).read_text(encoding="utf-8").replace("\\\n", " ")
    for module, options in re.findall(r"python -m (examples(?:\.\w+)+)([^`\n|&]*)", text):
        script = Path(*module.split(".")).with_suffix(".py")
        assert (ROOT / script).exists(), script
        known = "".join(path.read_text(encoding="utf-8") for path in (ROOT / script).parent.glob("*.py"))
        for option in re.findall(r"--\w+", options):
            assert f'"{option}"' in known, (script, option)


@pytest.mark.parametrize("name", documents())
def test_modules_that_are_named_exist(name):
    for dotted in set(re.findall(r"\bhf_causal_context(?:\.\w+)+", (ROOT / name).read_text(encoding="utf-8"))):
        pkgutil.resolve_name(dotted)
