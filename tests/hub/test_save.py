"""`save` and what its cards promise: pushed, pulled into an empty cache, their code makes their samples."""

import contextlib
import io
import json
import re
import shutil
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file

from hf_causal_context import load_context_adapter
from hf_causal_context.adapter.effects import causal_effects
from hf_causal_context.bases.loading import load_base
from hf_causal_context.cli import main
from hf_causal_context.errors import UserValueError
from hf_causal_context.hub import load, push, save
from hf_causal_context.hub.card import is_edited
from hf_causal_context.hub.contents import CardContents
from hf_causal_context.inference.adapted import StoredAdapter
from hf_causal_context.training.arguments import TextArguments, TrainingArguments

from ..test_pipelines import write_adapter
from ..training.conftest import pipeline_folder  # noqa: F401 (a fixture)
from ..training.small_language import language_model, word_tokenizer
from ..training.tiny_pipelines import NEWER, SLOWLY, side

CONCEPTS = ("thick", "slant")
SHOWN = ["", "thick", "slant", "slant+thick"]


@pytest.fixture(autouse=True)
def _somewhere(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def adapter_of(base, folder, **kwargs):
    """An adapter with random weights for a saved pipeline, as a training leaves it."""
    attention = {"target_modules": ["to_q", "to_v"], "concepts": CONCEPTS}
    write_adapter(load_base(base).denoiser, folder, **(attention | kwargs))
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base}))
    arguments = {
        "pretrained_model_name_or_path": base,
        "output_dir": str(folder),
        "train_data_dir": str(folder / "data"),
    }
    (folder / "training_arguments.json").write_text(json.dumps(arguments | {"learning_rate": 0.001, "seed": 0}))
    data = {"chat": False, "trained": {"": 8, "thick": 8}, "held_out": {"slant+thick": 8}, "reweighted": {}}
    (folder / "training_data.json").write_text(json.dumps(data))
    return folder


@pytest.fixture
def adapter(tmp_path, pipeline_folder):  # noqa: F811
    return adapter_of(pipeline_folder("ddim"), tmp_path / "strokes")


def code_of(folder):
    [code] = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)
    return code


def run_code(code):
    """What the code prints; files go into the current folder."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(code, "card", "exec"), {})
    return printed.getvalue()


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB"))


# Unconditional, classes that the pipeline takes no argument for, classes, text.
@pytest.mark.parametrize("name", ["ddpm", "ddpm_classes", "dit", "stable_diffusion", *SLOWLY])
def test_code_of_the_card_makes_its_images(hub, name, tmp_path, pipeline_folder):  # noqa: F811
    base = pipeline_folder(name)
    HfApi().create_repo("user/base")
    HfApi().upload_folder(repo_id="user/base", folder_path=base)
    folder = save(
        adapter_of(base, tmp_path / "adapter"),
        tmp_path / "strokes",
        pretrained_model_name_or_path="user/base",
        num_inference_steps=2,
        seed=3,
        resolution=side(load_base(base)) if name in NEWER else None,  # else theirs is large
    )
    push(folder, "user/strokes")
    shutil.rmtree(folder / "pictures")
    hub.new_cache()  # another machine
    pulled = Path(HfApi().snapshot_download("user/strokes"))
    code = code_of(pulled)
    samples = CardContents.load(pulled).samples
    assert list(samples) == SHOWN
    images = {}
    for context, path in samples.items():
        run_code(code.replace('"slant+thick"', json.dumps(context)))
        images[context] = pixels("slant+thick.png")
        assert np.array_equal(images[context], pixels(pulled / path)), context
    assert not np.array_equal(images[""], images["slant+thick"])
    assert pixels(pulled / "pictures/grid.png").shape[0] > 4 * 64


@pytest.mark.slow
def test_in_a_fresh_process_the_packaged_base_comes_along(hub, client, tmp_path):
    base = "hf_causal_context/models/digit_base"
    folder = save(adapter_of(base, tmp_path / "adapter"), tmp_path / "digits", num_inference_steps=2)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == base
    push(folder, "user/digits")
    code = (Path(HfApi().snapshot_download("user/digits")) / "README.md").read_text()
    done = client(code_of_text(code))
    assert done.returncode == 0, done.stderr
    assert np.array_equal(pixels("slant+thick.png"), pixels(folder / "pictures/slant+thick.png"))


def code_of_text(card):
    return re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)[0]


def language_adapter(name, folder, base, chat=False):
    model = language_model(name)
    model.save_pretrained(base)
    word_tokenizer(bos=name != "t5").save_pretrained(base)
    task = "SEQ_2_SEQ_LM" if name == "t5" else "CAUSAL_LM"
    targets = ["q", "v"] if name == "t5" else ["q_proj", "v_proj"]
    write_adapter(
        model, folder, concepts=CONCEPTS, task_type=task, target_modules=targets, alpha=20.0, observational_rank=0
    )
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))
    (folder / "training_data.json").write_text(json.dumps({"chat": chat, "trained": {"": 8}, "held_out": {}}))
    return folder


@pytest.mark.parametrize(
    ("name", "prompt", "chat"),
    [("llama", "a cat", False), ("llama", "", False), ("llama", "a dog", True), ("t5", "a cat", False)],
)
def test_code_of_the_card_writes_its_texts(hub, tmp_path, name, prompt, chat):
    adapter = language_adapter(name, tmp_path / "adapter", tmp_path / "base", chat)
    HfApi().create_repo("user/base")
    HfApi().upload_folder(repo_id="user/base", folder_path=tmp_path / "base")
    folder = save(
        adapter, tmp_path / "style", pretrained_model_name_or_path="user/base", prompt=prompt, max_new_tokens=12, seed=5
    )
    assert "training_arguments.json" not in [path.name for path in folder.iterdir()]
    push(folder, "user/style")
    hub.new_cache()
    pulled = Path(HfApi().snapshot_download("user/style"))
    code = code_of(pulled)
    texts = CardContents.load(pulled).samples
    assert list(texts) == SHOWN
    for context, text in texts.items():
        assert run_code(code.replace('"slant+thick"', json.dumps(context))) == text + "\n"
    assert len(set(texts.values())) > 1
    card = ModelCard((pulled / "README.md").read_text())
    assert (card.data.pipeline_tag, card.data.base_model) == ("text-generation", "user/base")
    assert load("user/style").peft_config["default"].concepts == CONCEPTS
    stock = PeftModel.from_pretrained(language_model(name), pulled / "loras" / "thick")  # a LoRA, without this package
    assert stock.peft_config["default"].peft_type == "LORA"


def test_a_chat_model_is_asked_something_where_nobody_gives_a_prompt(tmp_path):
    adapter = language_adapter("llama", tmp_path / "adapter", tmp_path / "base", chat=True)
    contents = CardContents.load(save(adapter, tmp_path / "style", max_new_tokens=2))
    assert contents.prompt == "Tell me a short story."
    assert '[{"role": "user", "content": "Tell me a short story."}]' in contents.inputs


def test_the_folder_is_whole_and_says_nothing_of_the_machine(adapter, tmp_path):
    folder = save(adapter, tmp_path / "strokes-hub", num_inference_steps=1, license="mit")
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    contexts = ("obs", "thick", "slant", "slant+thick")
    assert there == {
        *("README.md", "adapter_config.json", "adapter_model.safetensors", "card.json", "influence.png"),
        *("training_arguments.json", "training_data.json", "pictures/grid.png", "pictures/strengths.png"),
        *(f"pictures/{name}.png" for name in contexts),
        *(f"loras/{name}/adapter_{part}" for name in contexts[1:] for part in ("config.json", "model.safetensors")),
    }
    for path in folder.rglob("*"):
        if path.suffix in (".json", ".md"):
            assert str(tmp_path) not in path.read_text(), path
            assert str(adapter.parent) not in path.read_text(), path
    own, saved = (load_file(place / "adapter_model.safetensors") for place in (adapter, folder))
    assert all(torch.equal(own[key], saved[key]) for key in own | saved)
    arguments = json.loads((folder / "training_arguments.json").read_text())
    assert (arguments["train_data_dir"], arguments["output_dir"]) == ("data", "strokes")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_no_setting_of_a_training_names_a_folder(adapter, tmp_path):
    places = {
        field.name
        for kind in (TrainingArguments, TextArguments)
        for field in fields(kind)
        if field.name.endswith(("_dir", "_file", "_name_or_path"))
    }
    assert len(places) > 5
    stored = json.loads((adapter / "training_arguments.json").read_text())
    (adapter / "training_arguments.json").write_text(json.dumps(stored | dict.fromkeys(places, str(tmp_path / "mine"))))
    folder = save(adapter, tmp_path / "strokes-hub", num_inference_steps=1)
    assert str(tmp_path) not in (folder / "training_arguments.json").read_text()


def test_a_folder_that_is_called_like_a_dataset_of_the_hub_is_none(adapter, tmp_path):
    Path("data/mine").mkdir(parents=True)
    stored = json.loads((adapter / "training_arguments.json").read_text())
    for name, expected in (("data/mine", None), ("user/faces", "user/faces")):
        (adapter / "training_arguments.json").write_text(json.dumps(stored | {"dataset_name": name}))
        folder = save(adapter, tmp_path / "strokes-hub", num_inference_steps=1)
        assert ModelCard((folder / "README.md").read_text()).data.datasets == expected


def test_only_the_adapters_own_parts_are_copied(adapter, tmp_path):
    shutil.copytree(adapter, tmp_path / "copy")
    shutil.move(tmp_path / "copy", adapter / "strokes-of-march")
    folder = save(adapter, tmp_path / "strokes-hub", num_inference_steps=1)
    assert not (folder / "strokes-of-march").exists()


def test_the_same_adapter_gives_the_same_bytes(adapter, tmp_path):
    one, two = (save(adapter, tmp_path / name / "s", num_inference_steps=1) for name in ("one", "two"))
    for path in one.glob("loras/*/adapter_config.json"):  # sets come in another order in each process
        targets = json.loads(path.read_text())["target_modules"]
        assert targets == sorted(targets)
    for path in one.rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (two / path.relative_to(one)).read_bytes(), path


def test_an_evaluation_comes_along_without_its_paths(adapter, tmp_path):
    evaluation = tmp_path / "report"
    evaluation.mkdir()
    report = {"concepts": list(CONCEPTS), "notes": [], "contexts": [], "trained": None, "unseen": None}
    data = tmp_path / "Jürgen" / "my data"  # in JSON the letter is another one
    report["settings"] = {"adapter": str(adapter), "data": str(data), "seed": 0}
    (evaluation / "report.json").write_text(json.dumps(report))
    (evaluation / "report.md").write_text(f"# Report\n\nadapter {adapter}, data {data}")
    Image.new("RGB", (8, 8)).save(evaluation / "report.png")
    folder = save(adapter, tmp_path / "out", num_inference_steps=1, evaluation=evaluation)
    assert (folder / "evaluation/report.md").read_text() == "# Report\n\nadapter strokes, data my data"
    assert json.loads((folder / "evaluation/report.json").read_text())["settings"]["data"] == "my data"
    assert "(evaluation/report.png)" in (folder / "README.md").read_text()
    (evaluation / "report.json").write_text(json.dumps(report | {"concepts": ["other"]}))
    with pytest.raises(ValueError, match=r"is about the concepts \['other'\].*Evaluate this adapter"):
        save(adapter, tmp_path / "out2", evaluation=evaluation)
    with pytest.raises(FileNotFoundError, match="There is no .*report.json. Give the folder that"):
        save(adapter, tmp_path / "out2", evaluation=tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"concepts', "cannot be read as JSON .*Remove it"),
        ("[1, 2]", r"holds \[1, 2\], where names and their values are expected"),
        (
            '{"concepts": ["thick", "slant"]}',
            "is no report of `hf-causal-context evaluate`: it has no 'contexts', 'notes'",
        ),
    ],
)
def test_a_report_of_another_kind_is_told(adapter, tmp_path, text, message):
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(UserValueError, match=message):
        save(adapter, tmp_path / "out", evaluation=tmp_path)


@pytest.mark.parametrize("name", ["training_arguments.json", "training_data.json", "card.json"])
def test_damaged_records_of_a_training_are_told_before_anything_is_made(adapter, tmp_path, name):
    (adapter / name).write_text('{"half')
    with pytest.raises(UserValueError, match=f"{name} cannot be read as JSON"):
        save(adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_edited_card_of_the_folder_is_kept(adapter, tmp_path, capsys):
    folder = save(adapter, tmp_path / "out", num_inference_steps=1)
    first = (folder / "README.md").read_text()
    assert not is_edited(first)
    (folder / "README.md").write_text(first + "\nMy own words.\n")
    (folder / "pictures" / "old.png").write_bytes(b"")
    save(adapter, folder, num_inference_steps=2)
    assert (folder / "README.md").read_text().endswith("My own words.\n")
    assert "was edited and is kept" in capsys.readouterr().out
    assert not (folder / "pictures" / "old.png").exists()
    (folder / "README.md").write_text(first)
    save(adapter, folder, num_inference_steps=2)
    assert "num_inference_steps=2" in (folder / "README.md").read_text()


def test_a_failure_leaves_the_earlier_folder(adapter, tmp_path, monkeypatch):
    folder = save(adapter, tmp_path / "out", num_inference_steps=1)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    monkeypatch.setattr(CardContents, "save", lambda *_: (_ for _ in ()).throw(OSError("No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        save(adapter, folder, num_inference_steps=2)
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"contexts": ["thick+size"]}, "Unknown concept 'size'"),
        (
            {"max_new_tokens": 5, "chat": True},
            "of a diffusers pipeline, so --chat, --max_new_tokens would have no effect",
        ),
        ({"class_label": 1}, "class_label=1 was given, but this base has no classes"),
        ({"prompt": "a cat"}, "prompt='a cat' was given, but DDIMPipeline takes no captions"),
    ],
)
def test_options_that_do_not_fit(adapter, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        save(adapter, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_the_current_folder(adapter):
    folder = save(adapter, ".", num_inference_steps=1)
    assert CardContents.load(folder).samples.keys() == set(SHOWN)
    assert not [path for path in Path().iterdir() if path.name.startswith(".")]


def test_folders_that_cannot_be_written_to(adapter, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="exists and holds other things. Choose another --output_dir"):
        save(adapter, tmp_path / "full")
    with pytest.raises(FileExistsError, match="holds the adapter itself"):
        save(adapter, adapter)
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        save(tmp_path / "nothing", tmp_path / "out")


def test_a_mechanism_without_loras_says_why(tmp_path, pipeline_folder):  # noqa: F811
    adapter = adapter_of(pipeline_folder("ddim"), tmp_path / "deep", expressive_depth=1)
    folder = save(adapter, tmp_path / "out", num_inference_steps=1)
    contents = CardContents.load(folder)
    assert contents.loras == {}
    assert contents.influence is None
    assert "its mechanism is not linear" in contents.without_loras
    assert "None: The adapter cannot be baked or merged" in (folder / "README.md").read_text()


def test_a_bug_while_loras_are_made_is_no_reason_on_the_card(tmp_path, pipeline_folder, monkeypatch):  # noqa: F811
    def broken(*args, **kwargs):
        raise ValueError("not enough values to unpack")

    monkeypatch.setattr("hf_causal_context.inference.export.export_contexts", broken)
    adapter = adapter_of(pipeline_folder("ddim"), tmp_path / "adapter")
    with pytest.raises(ValueError, match="not enough values"):
        save(adapter, tmp_path / "out", num_inference_steps=1)


def test_adapters_of_text_encoders_come_along(tmp_path, pipeline_folder):  # noqa: F811
    base = pipeline_folder("stable_diffusion")
    adapter = adapter_of(base, tmp_path / "both")
    write_adapter(
        load_base(base).pipe.text_encoder, adapter / "text_encoder", concepts=CONCEPTS, target_modules=["q_proj"]
    )
    folder = save(adapter, tmp_path / "out", num_inference_steps=1)
    pipe = load_context_adapter(load_base(base).pipe, folder)
    assert len(causal_effects(pipe.text_encoder).layers) == 2
    assert CardContents.load(folder).lora_format == "diffusers"
    assert any("text_encoder" in key for key in load_file(folder / "loras/thick.safetensors"))


def test_an_edited_card_is_pushed_with_code_that_loads_the_repository(hub, tmp_path):
    packaged = adapter_of("hf_causal_context/models/digit_base", tmp_path / "digits")
    folder = save(packaged, tmp_path / "digits-hub", num_inference_steps=1)
    card = (folder / "README.md").read_text()
    assert 'from_pretrained("digits", ' in card
    (folder / "README.md").write_text(card.replace("# digits", "# My digits"))
    push(folder, "user/digits")
    pushed = hub.server.repositories["user/digits"].contents()["README.md"].decode()
    assert "# My digits" in pushed
    assert 'from_pretrained("user/digits", ' in code_of_text(pushed)
    (folder / "README.md").write_text(card)
    push(folder, "user/digits", revision="v2")
    pushed = hub.server.repositories["user/digits"].contents("v2")["README.md"].decode()
    assert "# My digits" in pushed  # the branch began with the edited card, which is kept


def test_the_card_of_a_branch_loads_the_branch(hub, tmp_path):
    packaged = adapter_of("hf_causal_context/models/digit_base", tmp_path / "digits")
    push(save(packaged, tmp_path / "digits-hub", num_inference_steps=1), "user/digits", revision="v2")
    pushed = hub.server.repositories["user/digits"].contents("v2")["README.md"].decode()
    assert 'from_pretrained("user/digits", revision="v2", dtype=torch.float32)' in code_of_text(pushed)


def test_concepts_are_described(adapter, tmp_path):
    folder = save(adapter, tmp_path / "out", num_inference_steps=1, descriptions={"thick": "broad strokes"})
    assert "- thick: broad strokes\n" in (folder / "README.md").read_text()
    with pytest.raises(ValueError, match="Unknown concept 'wide'"):
        save(adapter, tmp_path / "out", descriptions={"wide": "?"})


def test_the_command(hub, adapter, tmp_path, capsys, monkeypatch, pipeline_folder):  # noqa: F811
    arguments = ["push", "--adapter", str(adapter), "--num_inference_steps", "1"]
    opened, read = [], StoredAdapter.open
    monkeypatch.setattr(StoredAdapter, "open", lambda *a, **k: opened.append(a) or read(*a, **k))
    assert main(arguments) == 0
    assert len(opened) == 1
    assert (tmp_path / "strokes-hub" / "README.md").exists()
    assert "Warning: The base" in (said := capsys.readouterr().out)
    assert "is a folder of this machine, which nobody who downloads the adapter has" in said
    assert main([*arguments, "--repo_id", "user/strokes"]) == 1
    error = capsys.readouterr().err
    assert "is a folder of this machine" in error
    assert "--pretrained_model_name_or_path user/base" in error
    assert not hub.server.repositories
    HfApi().create_repo("user/base")
    HfApi().upload_folder(repo_id="user/base", folder_path=pipeline_folder("ddim"))
    public = [*arguments, "--pretrained_model_name_or_path", "user/base", "--repo_id", "user/strokes", "--private"]
    assert main(public) == 0
    assert "/user/strokes/commit/" in capsys.readouterr().out
    assert hub.server.repositories["user/strokes"].private
    for changes, message in (
        (["--repo_id", "no/such/name"], "is no name of a repository"),
        (["--repo_id", "other/strokes"], "other/strokes is not yours: you are 'user'"),
        (["--license", "my own"], "license"),
        (["--descriptions", "thick"], "has not the form 'concept: what it means'"),
        (["--adapter", "nowhere"], "There is no folder nowhere"),
    ):
        hub.server.log.clear()
        assert main([*public, *changes]) == 1
        assert message in capsys.readouterr().err
        assert not hub.server.requests("PUT|POST .*/(create|commit)")
    hub.login(None)
    assert main(public) == 1
    assert "Log in with `hf auth login`" in capsys.readouterr().err
