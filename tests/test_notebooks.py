"""The notebooks run in a fresh kernel, with few rows, few steps and tiny bases, and hold no traces of earlier runs."""

import os
import re

import nbformat
import pytest
import torch
from nbclient import NotebookClient

from hf_causal_context.messages import installation

from .documents import ROOT, tiny_chat_model
from .training.conftest import pipeline_folder  # noqa: F401 (fixture)

FOLDER = ROOT / "examples" / "notebooks"
WITH_IMAGES = ("quickstart", "two_gaussians")
NAMES = (*WITH_IMAGES, "own_images", "language_model")
# Where Colab finds this folder, once the repository has a public address: https://colab.research.google.com/github/...
COLAB = None


def read(name):
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def follow(name, folder, changes):
    """Run a notebook in a folder, after its text is changed; return what it prints."""
    notebook, unused = read(name), set(changes)
    for cell in code(notebook):
        for old, new in changes.items():
            unused -= {old} if old in cell.source else set()
            cell.source = cell.source.replace(old, new)
    assert not unused
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "HF_DATASETS_CACHE": str(folder)}
    NotebookClient(notebook, timeout=240, resources={"metadata": {"path": folder}}).execute(env=environment)
    outputs = [output for cell in code(notebook) for output in cell.outputs]
    return "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")


@pytest.mark.slow
def test_two_gaussians(tmp_path):
    changes = {"steps=1000, rows=256": "steps=300", "steps=500": "steps=200"}
    output = follow("two_gaussians", tmp_path, changes)
    dark = {
        line.split()[0]: float(line.split()[-1]) for line in output.splitlines() if re.match(r"\w+ +thick .*dark", line)
    }
    assert dark["truth"] == pytest.approx(-2.5, abs=0.05)
    assert abs(dark["reweighted"] - dark["truth"]) < 0.3
    assert dark["added"] > dark["truth"] + 0.6


@pytest.mark.slow
def test_quickstart(tmp_path):
    settings = 'quickstart.training_arguments(Path("digits-context"), seed=0)'
    few = 'max_train_steps=2, checkpointing_steps=2, train_batch_size=5, target_modules=["to_q", "to_v"]'
    changes = {
        settings: f"__import__('dataclasses').replace({settings}, {few})",
        "quickstart.digit_data()": "quickstart.digit_data(60)",
        "num_inference_steps=15": "num_inference_steps=2",
    }
    follow("quickstart", tmp_path, changes)
    assert (tmp_path / "digits-context" / "adapter_model.safetensors").exists()


@pytest.mark.slow
def test_own_images(tmp_path, pipeline_folder):  # noqa: F811
    changes = {
        "stable-diffusion-v1-5/stable-diffusion-v1-5": pipeline_folder("stable_diffusion"),
        "NUM_IMAGES = 100": "NUM_IMAGES = 12",
        '"resolution": 512': '"resolution": 16, "num_inference_steps": 2',
        "resolution=512": "resolution=16, num_inference_steps=2",
        '"max_train_steps": 1000': '"max_train_steps": 2',
    }
    output = follow("own_images", tmp_path, changes)
    assert re.search(r"glasses\+hat +held out +12", output)
    assert "Dry run: nothing is written." in output
    assert (tmp_path / "my-adapter" / "adapter_model.safetensors").exists()


@pytest.mark.slow
def test_language_model(tmp_path):
    torch.manual_seed(0)
    changes = {
        "HuggingFaceTB/SmolLM2-135M-Instruct": tiny_chat_model(tmp_path / "chat"),
        "NUM_TEXTS = 200": "NUM_TEXTS = 12",
        "max_train_steps=110": "max_train_steps=2, max_new_tokens=4",
        "num_new_tokens=40": "num_new_tokens=4",
    }
    output = follow("language_model", tmp_path, changes)
    for context in ("obs", "capitals", "emoji", "capitals+emoji"):
        assert re.search(rf"^{re.escape(context)} +capitals \d+%, emoji \d+%$", output, re.MULTILINE)
    assert (tmp_path / "texts-adapter" / "adapter_model.safetensors").exists()


def test_every_notebook_is_tested_and_listed():
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(NAMES)
    index = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    assert all(f"(notebooks/{name}.ipynb)" in index for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_says_how_to_open_it_in_colab(name):
    first = read(name).cells[0].source
    if COLAB:
        assert f"]({COLAB}/{name}.ipynb)" in first
    else:
        assert "There is no button for it here" in first
        assert not re.search(r"colab\.research\.google\.com/\w", first)  # nothing that leads nowhere


def test_all_notebooks_install_the_package_in_the_same_way():
    [installing] = {code(read(name))[0].source for name in NAMES}
    assert ("*.zip" in installing) is not installation.ON_PACKAGE_INDEX


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_holds_small_images_and_no_other_trace_of_a_run(name):
    notebook = read(name)
    nbformat.validate(notebook)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    outputs = [output for cell in code(notebook) for output in cell.outputs]
    assert all(cell.execution_count is None and not cell.metadata for cell in code(notebook))
    assert all(output.output_type == "display_data" and set(output.data) == {"image/png"} for output in outputs)
    assert bool(outputs) == (name in WITH_IMAGES)
    assert (FOLDER / f"{name}.ipynb").stat().st_size < 150_000


@pytest.mark.parametrize("name", NAMES)
def test_links_of_a_notebook_lead_somewhere(name):
    texts = [cell.source for cell in read(name).cells if cell.cell_type == "markdown"]
    for link in re.findall(r"\]\(([^)\s]+)\)", "\n".join(texts)):
        path, _, anchor = link.partition("#")
        if "://" in link:
            continue
        assert (FOLDER / path).exists(), link
        headings = re.findall(r"^#+ (.*)$", (FOLDER / path).read_text(encoding="utf-8"), re.MULTILINE) if anchor else []
        assert not anchor or anchor in {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}, link
