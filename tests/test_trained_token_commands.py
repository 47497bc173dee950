"""Every command takes an adapter that has trained rows of the embedding beside it."""

import json

import pytest
from transformers import AutoModelForCausalLM

from hf_causal_context.cli import main
from hf_causal_context.evaluation import classifiers

from .training.small_language import language_model, word_tokenizer


@pytest.fixture(autouse=True)
def _on_cpu_and_quick(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(classifiers, "_MIN_STEPS", 20)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What `train-text --trainable_tokens` writes, beside its data and its base; texts are packed into rows."""
    root = tmp_path_factory.mktemp("trained")
    language_model("llama").save_pretrained(root / "base")
    word_tokenizer().save_pretrained(root / "base")
    for context, text in (("obs", "a cat sat"), ("formal", "indeed a cat sat"), ("loud", "a cat sat loudly")):
        (root / "data" / context).mkdir(parents=True)
        texts = [f"{text} {a} {b}" for a in ("on", "the", "mat", "it") for b in ("ran", "yo", "sir")]
        (root / "data" / context / "texts.txt").write_text("\n".join(texts))
    options = ["--trainable_tokens", "cat", "loudly", "--packing", "--max_train_steps=1", "--train_batch_size=2"]
    options += ["--num_validation_texts=0", f"--output_dir={root / 'adapter'}", f"--train_data_dir={root / 'data'}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.cuda.is_available", lambda: False)
        assert main(["train-text", f"--pretrained_model_name_or_path={root / 'base'}", *options]) == 0
    return root


def run(name, trained, *options):
    assert main([name, "--adapter", str(trained / "adapter"), *map(str, options)]) == 0


def test_generate_text(trained, tmp_path):
    contexts = ["--contexts", "obs", "formal", "--prompt", "a cat", "--max_new_tokens=3"]
    run("generate-text", trained, *contexts, "--output_file", tmp_path / "texts.jsonl")
    assert len((tmp_path / "texts.jsonl").read_text().splitlines()) == 2


def test_export(trained, tmp_path):
    run("export", trained, "--contexts", "formal", "--format=peft", "--output_dir", tmp_path)
    config = json.loads((tmp_path / "formal" / "adapter_config.json").read_text())
    assert config["trainable_token_indices"] == word_tokenizer().convert_tokens_to_ids(["cat", "loudly"])


def test_merge(trained, tmp_path):
    run("merge", trained, "--context", "formal", "--output_dir", tmp_path / "merged")
    merged, base = map(AutoModelForCausalLM.from_pretrained, (tmp_path / "merged", trained / "base"))
    changed = (merged.get_input_embeddings().weight != base.get_input_embeddings().weight).any(1)
    assert changed.nonzero().flatten().tolist() == sorted(word_tokenizer().convert_tokens_to_ids(["cat", "loudly"]))


def test_evaluate(trained, tmp_path):
    small = ["--num_samples=2", "--num_seeds=1", "--max_new_tokens=3"]
    run("evaluate", trained, "--train_data_dir", trained / "data", "--output_dir", tmp_path, *small)
    assert (tmp_path / "report.md").is_file()


def test_push(trained, tmp_path):
    run("push", trained, "--output_dir", tmp_path / "hub", "--prompt", "a cat", "--max_new_tokens=3")
    assert "generate" in (tmp_path / "hub" / "README.md").read_text()


def test_info(trained, capsys):
    run("info", trained, "--pretrained_model_name_or_path", trained / "base", "--json")
    assert set(json.loads(capsys.readouterr().out)["relative_change"]) == {"formal", "loud"}
