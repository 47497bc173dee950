"""The quickstart in small: the real base, the real steps, fewer of them."""

import dataclasses
import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from hf_causal_context import quickstart
from hf_causal_context.bases.loading import load_base
from hf_causal_context.cli import main
from hf_causal_context.data import density_ratios


def test_the_shipped_base_is_small_and_the_peers_are_complete():
    size = sum(path.stat().st_size for path in quickstart.BASE.parent.rglob("*") if path.is_file())
    assert size < 6e6
    assert load_base(str(quickstart.BASE)).prediction == "v_prediction"
    peers = json.loads(quickstart.PEERS.read_text())["stacked_loras"]
    assert peers.keys() == {str(context) for context in quickstart.CONTEXTS if context}


def test_train_score_save_reload(tmp_path, monkeypatch, capsys):
    small = dataclasses.replace(
        quickstart.training_arguments(tmp_path, 0),
        max_train_steps=2,
        train_batch_size=5,
        target_modules=["to_q", "to_v"],
    )
    monkeypatch.setattr(quickstart, "training_arguments", lambda folder, seed: small)
    monkeypatch.setattr(quickstart, "NUM_SAMPLES", 8)
    monkeypatch.setattr(quickstart, "digit_data", partial(quickstart.digit_data, 60))
    monkeypatch.setattr(density_ratios, "FEWEST_STEPS", 2)
    monkeypatch.setattr(quickstart, "NUM_INFERENCE_STEPS", 2)
    quickstart.quickstart(tmp_path)
    output = capsys.readouterr().out
    assert "Combinations drawn from the training rows" in output
    assert "identical images" in output
    assert "| darkness+thickness | none |" in output
    assert "mean of the pairs" in (tmp_path / "README.md").read_text()
    for name in ("results.png", "adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / name).exists()


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
