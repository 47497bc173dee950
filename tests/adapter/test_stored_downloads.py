"""Where adapters come from: folders, the Hub and its cache, and what is said when they cannot be had."""

import shutil
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from huggingface_hub import errors

from hf_causal_context import AdapterError
from hf_causal_context.adapter.config import CausalContextConfig
from hf_causal_context.adapter.storage import download as stored
from hf_causal_context.adapter.storage.download import download
from hf_causal_context.inference.adapted import StoredAdapter

from ..training.small_language import word_tokenizer
from .fixtures.adapters import ADAPTERS, FOLDER
from .stored_copies import base_for, edit_weights, pipeline


@pytest.fixture
def reduced(tmp_path):
    return shutil.copytree(FOLDER / "format_1_unet_reduced", tmp_path / "reduced")


def test_folders(tmp_path):
    assert download(tmp_path) == tmp_path
    (tmp_path / "file").touch()
    with pytest.raises(FileNotFoundError, match="is a file. Give the folder with an adapter_config.json"):
        download(tmp_path / "file")
    with pytest.raises(FileNotFoundError, match="holds no adapter: there is no adapter_config.json in it"):
        CausalContextConfig.read(tmp_path, "it")


@pytest.mark.parametrize("name", ["/nowhere/x", "./x", "../x", "a/b/c", "a b/c", "user/..", "x" * 200, "", "a\\b"])
def test_bad_names(name, monkeypatch):
    monkeypatch.setattr(stored, "snapshot_download", lambda *args, **kwargs: pytest.fail("asked the Hub"))
    monkeypatch.chdir("/")
    with pytest.raises(FileNotFoundError, match="is no folder here, and no id of a repository"):
        download(name)


def test_a_folder_wins(tmp_path, monkeypatch):
    monkeypatch.setattr(stored, "snapshot_download", lambda *args, **kwargs: pytest.fail("asked the Hub"))
    (tmp_path / "user" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert str(download("user/name")) == "user/name"


def test_the_cache(tmp_path, reduced, monkeypatch):
    with pytest.raises(ConnectionError, match="the cache does not hold it whole, .*.HF_HUB_OFFLINE is set"):
        download("user/name")
    asked = {}

    def answer(repo, **kwargs):
        asked.update(kwargs, repo=repo)
        return str(reduced)

    monkeypatch.setattr(stored, "snapshot_download", answer)
    assert download("user/name", revision="v1", token="t", places=("", "unet/"), tokenizer=True) == reduced
    assert asked["repo"] == "user/name"
    assert (asked["revision"], asked["token"]) == ("v1", "t")
    assert asked["allow_patterns"][:3] == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "unet/adapter_config.json",
    ]
    assert "tokenizer*.json" in asked["allow_patterns"]
    assert not any(pattern.endswith((".bin", ".py", ".pt", ".pkl")) for pattern in asked["allow_patterns"])


def test_a_token_that_is_not_valid(monkeypatch):
    refusal = errors.HfHubHTTPError.__new__(errors.HfHubHTTPError)
    Exception.__init__(refusal, "401 Unauthorized")
    refusal.response = SimpleNamespace(status_code=401)
    missing = errors.LocalEntryNotFoundError("not here")
    missing.__cause__ = refusal
    for error in (refusal, missing):
        monkeypatch.setattr(stored, "snapshot_download", Mock(side_effect=error))
        with pytest.raises(PermissionError, match="refuses the token for user/name .401 Unauthorized.: log in"):
            download("user/name")


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (
            errors.RepositoryNotFoundError,
            FileNotFoundError,
            "no repository on the Hub .*hf auth login.*HF_TOKEN.*n=",
        ),
        (errors.GatedRepoError, PermissionError, "is gated: accept its terms.*hf auth login"),
        (errors.RevisionNotFoundError, FileNotFoundError, "has no revision 'v9'. Give one of its branches or tags"),
        (errors.LocalTokenNotFoundError, PermissionError, "token=True was given.*hf auth login"),
        (errors.LocalEntryNotFoundError, ConnectionError, "the Hub could not be read .some words"),
        (errors.HfHubHTTPError, ConnectionError, "the Hub could not be read .some words"),
        (errors.HTTPError, ConnectionError, "the Hub could not be read .some words"),
    ],
)
def test_what_can_go_wrong(monkeypatch, error, kind, message):
    def fail(*args, **kwargs):
        exception = error.__new__(error)
        Exception.__init__(exception, "some words\nand more")
        raise exception

    monkeypatch.setattr(stored, "snapshot_download", fail)
    with pytest.raises(kind, match=message):
        download("user/name", revision="v9")


def test_one_download_for_all_parts(reduced, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    calls = []

    def answer(repo, **kwargs):
        calls.append((repo, kwargs["revision"], kwargs["token"]))
        return str(reduced)

    monkeypatch.setattr(stored, "snapshot_download", answer)
    pipeline(base_for("format_1_unet_reduced")).save_pretrained(tmp_path / "base")
    StoredAdapter.open("user/name", str(tmp_path / "base"), adapter_revision="v1", token="t").pipeline()
    assert calls == [("user/name", "v1", "t")]
    assert StoredAdapter.open("user/name", adapter_revision="v2").config.concept_rank == 2
    llama = shutil.copytree(FOLDER / "format_1_llama_independent", tmp_path / "llama")
    word_tokenizer().save_pretrained(llama)
    model = ADAPTERS["llama_independent"][0]()
    model.save_pretrained(tmp_path / "language")
    monkeypatch.setattr(stored, "snapshot_download", lambda repo, **kwargs: answer(repo, **kwargs) and str(llama))
    calls.clear()
    StoredAdapter.open("user/name", str(tmp_path / "language"), adapter_revision="v1", token="t").language_model()
    assert calls == [("user/name", "v1", "t")]
    (llama / "tokenizer.json").write_text("{")
    with pytest.raises(AdapterError, match="The tokenizer of user/name cannot be read .*of its base"):
        StoredAdapter.open("user/name", str(tmp_path / "language")).language_model()


def test_language_models_refuse_what_pipelines_refuse(tmp_path):
    folder = shutil.copytree(FOLDER / "format_1_llama_independent", tmp_path / "llama")
    ADAPTERS["llama_independent"][0]().save_pretrained(tmp_path / "base")
    word_tokenizer().save_pretrained(tmp_path / "base")
    for value, message in ((float("nan"), "NaN or infinite values"), (1e30, "values as large as 1e.30")):
        edit_weights(folder, lambda weights, value=value: next(iter(weights.values())).fill_(value))
        with pytest.raises(AdapterError, match=message):
            StoredAdapter.open(folder, str(tmp_path / "base")).language_model()
    edit_weights(folder, lambda weights: weights.popitem())
    with pytest.raises(AdapterError, match="is not whole"):
        StoredAdapter.open(folder, str(tmp_path / "base")).language_model()
