"""The quickstart in small: the real base, the real steps, fewer of them."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMPipeline, DPMSolverMultistepScheduler
from peft import get_peft_model

from hf_causal_context import CausalContextConfig, Context, quickstart
from hf_causal_context.bases.loading import load_base
from hf_causal_context.cli import main
from hf_causal_context.data import density_ratios
from hf_causal_context.inference.sampling import generate
from hf_causal_context.training import finetune


def test_the_shipped_base_is_small_and_the_peers_are_complete():
    size = sum(path.stat().st_size for path in quickstart.BASE.parent.rglob("*") if path.is_file())
    assert size < 6e6
    assert load_base(str(quickstart.BASE)).prediction == "v_prediction"
    peers = json.loads(quickstart.PEERS.read_text())["stacked_loras"]
    assert peers.keys() == {str(context) for context in quickstart.CONTEXTS if context}


@pytest.fixture
def short(tmp_path, monkeypatch):
    small = dataclasses.replace(
        quickstart.training_arguments(tmp_path, 0),
        max_train_steps=2,
        train_batch_size=7,
        target_modules=["to_q", "to_v"],
    )
    monkeypatch.setattr(quickstart, "training_arguments", lambda folder, seed: small)
    monkeypatch.setattr(quickstart, "NUM_SAMPLES", 8)
    monkeypatch.setattr(quickstart, "ROWS_PER_CONTEXT", 60)
    monkeypatch.setattr(density_ratios, "FEWEST_STEPS", 2)
    monkeypatch.setattr(quickstart, "NUM_INFERENCE_STEPS", 2)


@pytest.mark.usefixtures("short")
def test_train_score_save_reload(tmp_path, monkeypatch, capsys):
    data_image = []

    def train(*arguments):
        data_image.append((tmp_path / "data.png").exists())  # something to look at before what takes long
        return finetune.train(*arguments)

    monkeypatch.setattr(quickstart, "train", train)
    quickstart.quickstart(tmp_path)
    assert data_image == [True]
    output = capsys.readouterr().out
    assert "Combinations drawn from the training rows" in output
    assert "identical images" in output
    assert "| darkness+thickness | none |" in output
    assert "mean of the pairs" in (tmp_path / "README.md").read_text()
    for name in ("results.png", "adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / name).exists()
    assert "| stacked LoRAs |" in (tmp_path / "results.md").read_text()


@pytest.mark.usefixtures("short")
def test_the_fast_one_takes_less_of_everything_and_shows_no_numbers_of_more_samples(tmp_path, monkeypatch):
    monkeypatch.setattr(quickstart, "FAST_ROWS", 20)
    monkeypatch.setattr(quickstart, "FAST_STEPS", 1)
    monkeypatch.setattr(quickstart, "FAST_SAMPLES", 4)
    sizes = []
    table = quickstart.results_table

    def results_table(samples):
        sizes.append({len(images) for images in samples.values()})
        return table(samples)

    monkeypatch.setattr(quickstart, "results_table", results_table)
    assert main(["quickstart", "--fast", "--output_dir", str(tmp_path)]) == 0
    assert sizes == [{4}]
    assert json.loads((tmp_path / "training_arguments.json").read_text())["max_train_steps"] == 1
    assert json.loads((tmp_path / "training_data.json").read_text())["trained"]["thickness"] == 20
    assert "stacked LoRAs" not in (tmp_path / "results.md").read_text()


@pytest.mark.usefixtures("short")
def test_a_fast_one_is_not_gone_on_with_by_another(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(quickstart, "FAST_ROWS", 20)
    monkeypatch.setattr(quickstart, "FAST_STEPS", 1)

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(quickstart, "sample", stop)  # it has trained
    assert main(["quickstart", "--fast", "--output_dir", str(tmp_path)]) == 130
    assert main(["quickstart", "--output_dir", str(tmp_path)]) == 1
    assert "holds a run of 1 steps, and this one would have 2, on other data" in capsys.readouterr().err
    assert main(["quickstart", "--fast", "--output_dir", str(tmp_path)]) == 130


def test_a_context_in_the_weights_gives_the_samples_of_the_context(tmp_path, monkeypatch):
    monkeypatch.setattr(quickstart, "NUM_INFERENCE_STEPS", 2)
    torch.manual_seed(0)
    config = CausalContextConfig(concepts=quickstart.CONCEPTS, target_modules=["to_q", "conv1"], init_weights=False)
    base = load_base(str(quickstart.BASE))
    get_peft_model(base.denoiser, config).save_pretrained(tmp_path)
    contexts = (Context(), Context({"thickness": 20.0}))
    samples = quickstart.sample(tmp_path, contexts, 2)
    scheduler = DPMSolverMultistepScheduler.from_config(base.pipe.scheduler.config)
    pipe = DDPMPipeline(base.denoiser, scheduler)
    expected = generate(pipe, contexts, seeds=range(2), num_inference_steps=2)
    assert not torch.allclose(*expected, atol=0.05)
    for context, images in zip(contexts, expected, strict=True):
        torch.testing.assert_close(samples[context], images, atol=1e-3, rtol=0)


@pytest.mark.parametrize(("slow", "expected"), [(3, 1), (1, 3)])
def test_it_computes_with_one_thread_where_all_take_longer(slow, expected, monkeypatch, capsys):
    now, threads = [0.0], [3]

    class Denoiser:
        def __call__(self, batch, t):
            now[0] += 2.0 if threads[0] == slow else 1.0

    monkeypatch.setattr(quickstart, "load_base", lambda path: SimpleNamespace(denoiser=Denoiser()))
    monkeypatch.setattr(quickstart.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[0])
    monkeypatch.setattr(torch, "set_num_threads", lambda number: threads.__setitem__(0, number))
    quickstart.choose_threads()
    assert threads[0] == expected
    assert ("one thread, now 2.0 times as fast as 3 threads" in capsys.readouterr().out) == (expected == 1)


def test_an_interruption_before_the_training_says_how_to_go_on(monkeypatch, tmp_path, capsys):
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(quickstart, "choose_threads", interrupt)
    assert main(["quickstart", "--output_dir", str(tmp_path)]) == 130
    assert "Interrupted. Go on by running the same command again." in capsys.readouterr().err


def test_scores_tell_the_truth_of_a_context_from_another():
    contexts = quickstart.CONTEXTS[:3]
    truth = {c: torch.from_numpy(quickstart.reference_images(c, 192))[:, None] / 255 for c in contexts}
    right = list(quickstart.score(truth).values())
    wrong = list(quickstart.score(dict.fromkeys(contexts, truth[contexts[0]])).values())
    assert right[0] == wrong[0]
    assert all(r < 0.6 * w for r, w in zip(right[1:], wrong[1:], strict=True))
