"""Every example runs as it stands, with fewer steps."""

import os
import random
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(monkeypatch, name, *arguments):
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


@pytest.mark.parametrize("name", ["own_folder.py", "text_to_image.py"])
def test_training_examples(monkeypatch, tmp_path, name):
    run(monkeypatch, name, "--output_dir", tmp_path, "--max_train_steps", 2)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    assert (tmp_path / "adapter" / "samples" / "step-000002.png").exists()


def test_language_trainers(monkeypatch, tmp_path, capsys):
    run(monkeypatch, "language_trainers.py", "--output_dir", tmp_path, "--max_steps", 2)
    output = capsys.readouterr().out
    for name in ("transformers", "trl"):
        assert f"{name}: ['the cat" in output
        assert (tmp_path / name / "adapter_model.safetensors").exists()


@pytest.fixture
def movie_reviews(tmp_path):
    words = ["a", "warm", "and", "clever", "film", "about", "two", "brothers", "who", "lose", "their", "way"]
    generator = random.Random(0)
    for suffix in ("pos", "neg"):
        lines = [" ".join(generator.sample(words, len(words))) for _ in range(300)]
        (tmp_path / f"rt-polarity.{suffix}").write_text("\n".join(lines))
    return tmp_path


@pytest.mark.slow
def test_reviews(monkeypatch, movie_reviews, capsys):
    monkeypatch.syspath_prepend(EXAMPLES / "reviews")  # as for a script in that folder
    for name in ("base", "methods"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.chdir(movie_reviews)
    data = ("--data_dir", movie_reviews)
    run(monkeypatch, "reviews/base.py", *data, "--max_steps", 2)
    run(monkeypatch, "reviews/base.py", *data, "--max_steps", 2, "--gap", "--output_dir", "other-base")
    plain, gap = (load_file(movie_reviews / name / "model.safetensors") for name in ("reviews-base", "other-base"))
    assert not torch.equal(plain["model.norm.weight"], gap["model.norm.weight"])
    run(monkeypatch, "reviews/adapter.py", *data, "--max_steps", 2)
    assert (movie_reviews / "reviews-context" / "adapter_model.safetensors").exists()
    assert (movie_reviews / "reviews-context" / "layers.png").exists()
    methods = ("base", "adapter", "adapter, no observational part", "stacked LoRAs", "a+b-obs")
    methods = (*methods, "control tokens", "steering vectors")
    run(monkeypatch, "reviews/compare.py", *data, "--max_steps", 2, "--num_samples", 2, "--methods", *methods)
    run(monkeypatch, "reviews/selection.py", *data)
    output = capsys.readouterr().out
    assert "ebert+question" in output
    for method in (*methods, "oracle"):
        assert f"| {method} |" in output
    assert "| selected: positive |" in output
    table = (movie_reviews / "reviews-compare" / "results.md").read_text()
    assert table in output


def test_resume(monkeypatch, tmp_path, capsys):
    run(monkeypatch, "resume.py", "--output_dir", tmp_path, "--max_train_steps", 12)
    output = capsys.readouterr().out
    assert "--resume_from_checkpoint latest" in output
    assert "identical weights: True" in output


@pytest.mark.slow
def test_two_processes_equal_one(monkeypatch, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29533"]
    command += [str(EXAMPLES / "two_processes.py"), "--output_dir", str(tmp_path / "two"), "--max_train_steps", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(command, check=True, timeout=240, env=environment)
    from hf_causal_context import quickstart

    whole = quickstart.training_arguments(tmp_path / "one", 0)
    whole.train_batch_size, whole.max_train_steps = 20, 2
    monkeypatch.setattr(quickstart, "training_arguments", lambda folder, seed: whole)
    from hf_causal_context.training.finetune import train

    train(whole, data=quickstart.digit_data(rows_per_context=60))
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-5)
