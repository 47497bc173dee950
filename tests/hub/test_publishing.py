"""`--push_to_hub`: a training that ends on the Hub, or says before it starts why it could not."""

import json
import weakref

import pytest
from huggingface_hub import HfApi

from hf_causal_context.bases.loading import load_base
from hf_causal_context.hub import load
from hf_causal_context.hub.contents import CardContents
from hf_causal_context.training import finetune, publishing
from hf_causal_context.training.arguments import TrainingArguments
from hf_causal_context.training.finetune import train
from hf_causal_context.training.language import train_text

from ..training.conftest import on_cpu, pipeline_folder  # noqa: F401 (fixtures)
from ..training.small import settings, write_folders
from ..training.small_language import arguments, language_model, text_data, word_tokenizer

pytestmark = pytest.mark.usefixtures("on_cpu")


@pytest.fixture
def given(hub, tmp_path, pipeline_folder):  # noqa: F811
    """Settings of a run whose base is on the Hub."""
    HfApi().create_repo("user/base")
    HfApi().upload_folder(repo_id="user/base", folder_path=pipeline_folder("ddim"))
    data = write_folders(tmp_path / "data")
    return settings("user/base", data, tmp_path / "strokes", push_to_hub=True, max_train_steps=1, num_inference_steps=1)


def test_a_trained_adapter_is_pushed_whole(hub, given):
    train(TrainingArguments(**given))
    repository = hub.server.repositories["user/strokes"]  # the user's, with the name of the output folder
    there = repository.contents()
    record = json.loads(there["training_data.json"])
    assert record["trained"] == {"": 4, "slant": 4, "thick": 4}
    assert json.loads(there["adapter_config.json"])["base_model_name_or_path"] == "user/base"
    assert {"README.md", "pictures/slant+thick.png", "training_arguments.json"} <= there.keys()
    assert not [name for name in there if name.startswith(("checkpoint", "logs"))]
    hub.new_cache()
    assert load("user/strokes").unet.peft_config["default"].concepts == ("slant", "thick")


def test_a_run_in_the_current_folder_is_pushed_too(hub, given, tmp_path, monkeypatch):
    run = tmp_path / "here"
    run.mkdir()
    monkeypatch.chdir(run)
    train(TrainingArguments(**given | {"output_dir": "."}))
    assert "adapter_config.json" in hub.server.repositories["user/here"].contents()


def test_a_language_model_too(hub, tmp_path):
    base = tmp_path / "base"
    language_model("llama").save_pretrained(base)
    word_tokenizer().save_pretrained(base)
    HfApi().create_repo("user/words")
    HfApi().upload_folder(repo_id="user/words", folder_path=base)
    run = {"pretrained_model_name_or_path": "user/words", "push_to_hub": True, "hub_model_id": "user/style"}
    train_text(arguments(tmp_path, max_train_steps=1, validation_prompt="a cat", **run), data=text_data("messages"))
    there = hub.server.repositories["user/style"].contents()
    assert {"tokenizer.json", "README.md", "card.json"} <= there.keys()
    contents = CardContents(**json.loads(there["card.json"]))
    assert "apply_chat_template" in contents.inputs  # as in the training data
    assert '"content": "a cat"' in contents.inputs


def test_the_base_of_the_training_is_gone_when_the_push_loads_it_once_more(given, monkeypatch):
    bases, alive = [], []

    def loaded(*args, **kwargs):
        base = load_base(*args, **kwargs)
        bases.append(weakref.ref(base.denoiser))
        return base

    monkeypatch.setattr(finetune, "load_base", loaded)
    monkeypatch.setattr(publishing, "save", lambda folder, *args, **kwargs: alive.append(bases[0]()) or folder)
    monkeypatch.setattr(publishing, "push", lambda *args: "there")
    train(TrainingArguments(**given))
    assert alive == [None]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hub_model_id": "no/such/name"}, "is no name of a repository.*Give user/name"),
        ({"pretrained_model_name_or_path": "local"}, "is a folder of this machine.*Push the base first"),
    ],
)
def test_what_cannot_be_pushed_is_refused_before_the_training(given, pipeline_folder, tmp_path, changes, message):  # noqa: F811
    if "pretrained_model_name_or_path" in changes:
        changes = {"pretrained_model_name_or_path": pipeline_folder("ddim")}
    with pytest.raises(ValueError, match=message):
        train(TrainingArguments(**given | changes))
    assert not (tmp_path / "strokes").exists()


def test_without_a_token_nothing_is_trained(hub, given, tmp_path):
    hub.login(None)
    with pytest.raises(PermissionError, match="Log in with `hf auth login`"):
        train(TrainingArguments(**given))
    assert not (tmp_path / "strokes").exists()


def test_a_hub_that_fails_at_the_end_costs_nothing(hub, given, tmp_path):
    hub.server.fail_next("POST .*/commit/", status=503)
    with pytest.raises(
        OSError, match="is trained and in .*strokes, but not on the Hub.*hf-causal-context push --adapter"
    ):
        train(TrainingArguments(**given))
    assert (tmp_path / "strokes" / "adapter_model.safetensors").exists()
    assert (tmp_path / "strokes-hub" / "README.md").exists()
