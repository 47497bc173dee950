"""The command line: every command with real models, and what it says when it is used wrongly."""

import json
import re
import shutil

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from PIL import Image

from hf_causal_context import CausalContextConfig
from hf_causal_context.adapter.calibration import store_calibration
from hf_causal_context.bases.loading import load_base
from hf_causal_context.cli import main

from .training.conftest import pipeline_folder  # noqa: F401 (a fixture)
from .training.small_language import language_model, word_tokenizer


@pytest.fixture
def base(pipeline_folder):  # noqa: F811
    return str(pipeline_folder("ddpm"))


@pytest.fixture
def images(tmp_path, base):
    unet = load_base(base).denoiser
    mode = "L" if unet.config.in_channels == 1 else "RGB"
    generator = torch.Generator().manual_seed(0)
    for name in ("obs", "thick", "slant", "slant+thick"):
        folder = tmp_path / "images" / name
        folder.mkdir(parents=True)
        for i in range(4):
            values = torch.randint(256, (16, 16, 3), dtype=torch.uint8, generator=generator).numpy()
            Image.fromarray(values).convert(mode).save(folder / f"{i}.png")
    return tmp_path / "images"


@pytest.fixture
def adapter(tmp_path, base):
    config = CausalContextConfig(concepts=("thick", "slant"), init_weights=False)
    model = get_peft_model(load_base(base).denoiser, config)
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(tmp_path / "adapter")
    return str(tmp_path / "adapter")


def test_check_data_counts_contexts(images, capsys):
    assert main(["check-data", "--train_data_dir", str(images)]) == 0
    output = capsys.readouterr().out
    assert "(observational)" in output
    assert "slant+thick" in output
    assert "held out" in output


def test_check_data_says_what_is_wrong(images, capsys):
    for path in (images / "obs").iterdir():
        path.unlink()
    (images / "obs").rmdir()
    assert main(["check-data", "--train_data_dir", str(images)]) == 1
    assert "observational" in capsys.readouterr().err
    assert main(["check-data"]) == 1
    assert "Give the data as either --train_data_dir" in capsys.readouterr().err


def test_check_data_draws_some_images_of_every_context(images, tmp_path, capsys):
    for context, color in (("obs", (0, 0, 0)), ("slant+thick", (255, 0, 0))):
        for path in (images / context).iterdir():
            Image.new("RGB", (30, 10), color).save(path)
    sheet = tmp_path / "check.png"
    command = ["check-data", "--train_data_dir", str(images), "--contact_sheet", str(sheet)]
    assert main(command) == 0
    assert "Replaced" not in capsys.readouterr().out
    assert main(command) == 0
    assert f"Replaced {sheet}.\nLook at {sheet}" in capsys.readouterr().out
    with Image.open(sheet) as grid:
        assert grid.height == 4 + 4 * (128 + 4)  # four contexts
        last = [grid.getpixel((grid.width - 4 - 64, 4 + row * 132 + 64)) for row in range(4)]
        assert (last[0], last[3]) == ((0, 0, 0), (255, 0, 0))
        assert grid.getpixel((grid.width - 4 - 64, 4 + 8)) == (255, 255, 255)  # above an image that is wide

    (tmp_path / "texts" / "obs").mkdir(parents=True)
    (tmp_path / "texts" / "obs" / "a.txt").write_text("one\n")
    (tmp_path / "texts" / "rude").mkdir()
    (tmp_path / "texts" / "rude" / "a.txt").write_text("two\n")
    assert main(["check-data", "--train_data_dir", str(tmp_path / "texts"), "--contact_sheet", str(sheet)]) == 1
    assert "is for images, and the data holds texts" in capsys.readouterr().err


def test_check_data_of_texts(tmp_path, capsys):
    for context in ("obs", "rude"):
        (tmp_path / "texts" / context).mkdir(parents=True)
        (tmp_path / "texts" / context / "replies.txt").write_text(f"one in {context}\nthe same\n")
    assert main(["check-data", "--train_data_dir", str(tmp_path / "texts")]) == 0
    output = capsys.readouterr().out
    assert "rude             train     2" in output
    assert "1 texts are in two contexts" in output
    (tmp_path / "texts" / "obs" / "replies.txt").write_bytes(b"caf\xe9")
    assert main(["check-data", "--train_data_dir", str(tmp_path / "texts")]) == 1
    assert "replies.txt' is not UTF-8" in capsys.readouterr().err

    Dataset.from_dict({"body": ["a", "b"], "context": ["obs", "rude"]}).save_to_disk(tmp_path / "saved")
    assert main(["check-data", "--dataset_name", str(tmp_path / "saved"), "--text_column", "body"]) == 0
    assert main(["check-data", "--dataset_name", str(tmp_path / "saved")]) == 1
    assert "no column 'image'" in capsys.readouterr().err


def test_check_data_says_how_far_a_base_is(images, base, tmp_path, capsys):
    command = ["check-data", "--train_data_dir", str(images), "--pretrained_model_name_or_path"]
    assert main([*command, base]) == 0
    said = re.search(r"^The base .* your observational set \(loss .*$", capsys.readouterr().out, re.MULTILINE)[0]
    assert main([*command, base, "--resolution", "8"]) == 1
    assert re.search("resolution=8 was given, but DDPMPipeline generates 16 pixels only", capsys.readouterr().err)
    trained = ["--output_dir", str(tmp_path / "out"), "--max_train_steps", "1", "--num_validation_images", "0"]
    assert main(["train", *command[1:], base, *trained]) == 0
    assert said in capsys.readouterr().out.splitlines()  # the same sentence as at the start of a training
    assert main([*command, str(tmp_path / "nowhere")]) == 1
    assert "nowhere': such a folder does not exist" in capsys.readouterr().err
    shutil.rmtree(images / "obs")
    assert main([*command, base]) == 1
    assert "The base" not in capsys.readouterr().out


def test_check_data_says_how_far_a_language_model_is(tmp_path, capsys):
    language_model("llama").save_pretrained(tmp_path / "base")
    word_tokenizer().save_pretrained(tmp_path / "base")
    for context, begin in (("obs", "a cat"), ("formal", "indeed a dog")):
        (tmp_path / "texts" / context).mkdir(parents=True)
        (tmp_path / "texts" / context / "texts.txt").write_text(f"{begin} sat\n{begin} ran on the mat\n")
    command = ["--train_data_dir", str(tmp_path / "texts"), "--pretrained_model_name_or_path", str(tmp_path / "base")]
    assert main(["check-data", *command]) == 0
    said = re.search(r"^The base .* your observational set \(perplexity .*$", capsys.readouterr().out, re.MULTILINE)[0]
    assert main(["train-text", *command, "--output_dir", str(tmp_path / "out"), "--max_train_steps", "1"]) == 0
    assert said in capsys.readouterr().out.splitlines()


def test_check_data_reads_chats_as_the_training_does(tmp_path, capsys):
    language_model("llama").save_pretrained(tmp_path / "base")
    word_tokenizer().save_pretrained(tmp_path / "base")
    chat = [{"role": "user", "content": "a cat sat"}, {"role": "assistant", "content": "it ran on the mat loudly"}]
    for context in ("obs", "formal"):
        (tmp_path / "texts" / context).mkdir(parents=True)
        (tmp_path / "texts" / context / "chats.jsonl").write_text(json.dumps({"messages": chat * 2}) + "\n")
    base = ["--pretrained_model_name_or_path", str(tmp_path / "base")]
    data = ["--train_data_dir", str(tmp_path / "texts")]
    reading = ["--assistant_only_loss", "--max_length", "16"]

    def said(*command):
        assert main([*command]) == 0
        return re.findall(r"^(?:The base .* observational|Cut at --max).*$", capsys.readouterr().out, re.MULTILINE)

    gap = said("check-data", *data, *base, *reading)
    assert len(gap) == 2
    assert gap == said(
        "train-text", *data, *base, *reading, "--output_dir", str(tmp_path / "out"), "--max_train_steps=1"
    )
    assert said("check-data", *data, *base)[-1] != gap[-1]
    assert main(["check-data", *data, *reading]) == 1
    assert ", so --max_length, --assistant_only_loss would have no effect. Leave it out." in capsys.readouterr().err
    assert main(["check-data", *data, *base, "--resolution", "32"]) == 1
    assert "The data holds texts, so --resolution would have no effect. Leave it out." in capsys.readouterr().err


def test_train_then_generate(images, base, tmp_path, capsys):
    command = ["train", "--pretrained_model_name_or_path", base, "--train_data_dir", str(images)]
    options = ["--max_train_steps", "2", "--train_batch_size", "3", "--num_validation_images", "1"]
    options += ["--num_inference_steps", "2", "--learning_rate", "0.01"]
    assert main([*command, "--output_dir", str(tmp_path / "out"), *options]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "causal-context" in card
    assert "samples/step-000002.png" in card
    made = tmp_path / "made"
    assert main(
        ["generate", "--adapter", str(tmp_path / "out"), "--contexts", "obs", "thick=0.5,slant", "--seeds", "1", "2",
         "--num_inference_steps", "2", "--output_dir", str(made)]
    ) == 0  # fmt: skip
    names = {"obs-seed1.png", "obs-seed2.png", "slant+thick=0.5-seed1.png", "slant+thick=0.5-seed2.png"}
    assert {path.name for path in made.iterdir()} == names
    assert set(capsys.readouterr().out.split()) >= {str(made / name) for name in names}
    # dials are stored with the adapter, and files keep the names of their positions
    generate = ["generate", "--adapter", str(tmp_path / "out"), "--seeds", "1", "--num_inference_steps", "2"]
    dial = [*generate, "--contexts", "thick=0.5", "--calibrated", "--output_dir", str(tmp_path / "dial")]
    assert main(dial) == 1
    assert "no calibration of 'thick'" in capsys.readouterr().err
    store_calibration(tmp_path / "out", [""], {"thick": [[0, 0], [0.5, 0.25], [1, 1]]})
    assert main(dial) == 0
    assert main([*generate, "--contexts", "thick=0.25", "--output_dir", str(made)]) == 0
    images_of = (tmp_path / "dial" / "thick=0.5-seed1.png", made / "thick=0.25-seed1.png")
    assert images_of[0].read_bytes() == images_of[1].read_bytes()
    # a second run does not mix with the first one's checkpoints
    assert main([*command, "--output_dir", str(tmp_path / "out"), *options]) == 1
    assert "--resume_from_checkpoint latest" in capsys.readouterr().err


def test_a_base_is_found_from_anywhere_or_asked_for(images, base, tmp_path, monkeypatch, capsys):
    (tmp_path / "base").symlink_to(base)
    monkeypatch.chdir(tmp_path)
    command = [
        "train",
        "--pretrained_model_name_or_path",
        "base",
        "--train_data_dir",
        "images",
        "--output_dir",
        "out",
    ]
    assert main([*command, "--max_train_steps", "1", "--num_validation_images", "0"]) == 0
    monkeypatch.chdir("/")
    generate = ["generate", "--adapter", str(tmp_path / "out"), "--contexts", "obs", "--num_inference_steps", "1"]
    generate += ["--seeds", "0", "--output_dir", str(tmp_path / "made")]
    assert main(generate) == 0
    config = tmp_path / "out" / "adapter_config.json"
    config.write_text(config.read_text().replace(base, "/nowhere"))
    assert main(generate) == 1
    assert "was trained on the base /nowhere, which is not here. Give --pretrained" in capsys.readouterr().err


def test_generate_does_not_write_one_context_over_another(adapter, tmp_path, capsys):
    command = ["generate", "--adapter", adapter, "--contexts", "thick=0.5", "Thick=0.5", "--seeds", "0"]
    assert main([*command, "--output_dir", str(tmp_path / "made")]) == 1
    assert "contexts 'thick=0.5' and 'Thick=0.5' would both be written to 'Thick=0.5'" in capsys.readouterr().err


def test_generate_a_grid_that_depends_on_the_context(adapter, tmp_path, capsys):
    options = ["--num_inference_steps", "2", "--output_dir", str(tmp_path / "made")]
    assert main(["generate", "--adapter", adapter, "--contexts", "obs", "thick", "--grid", *options]) == 0
    with Image.open(tmp_path / "made" / "grid.png") as grid:
        assert grid.width > 64
    assert main(["generate", "--adapter", adapter, "--contexts", "obs", "thick", "--seeds", "0", *options]) == 0
    one, other = (Image.open(tmp_path / "made" / f"{name}-seed0.png").tobytes() for name in ("obs", "thick"))
    assert one != other
    assert "Replaced" not in capsys.readouterr().out
    assert main(["generate", "--adapter", adapter, "--contexts", "thick", "--seeds", "0", "1", *options]) == 0
    assert "Replaced files of the same names: 1.\n" in capsys.readouterr().out


def test_wrong_use_is_an_error_without_a_traceback(adapter, tmp_path, capsys):
    made = ["--output_dir", str(tmp_path / "made")]
    assert main(["generate", "--adapter", adapter, "--contexts", "color", *made]) == 1
    assert "Unknown concept 'color'" in capsys.readouterr().err
    assert main(["generate", "--adapter", adapter, "--contexts", "thick", "--prompt", "a digit", *made]) == 1
    assert "takes no captions" in capsys.readouterr().err
    assert main(["train", "--output_dir", str(tmp_path / "out")]) == 1
    assert "Missing: --pretrained_model_name_or_path. Give the base" in capsys.readouterr().err
    assert (
        main(["train", "--max_train_step", "3", "--foo", "--output_dir", "a", "--pretrained-model-name-or-path", "b"])
        == 1
    )
    assert "Unknown arguments: --max_train_step 3 --foo. Did you mean '--max_train_steps'?" in capsys.readouterr().err
    assert main(["merge", adapter, "--context", "thick", "slant", *made]) == 1
    assert "Unknown arguments: slant. --context takes one value, which stands in quotes" in capsys.readouterr().err
    (tmp_path / "half" / "checkpoint-7").mkdir(parents=True)
    assert main(["generate", "--adapter", str(tmp_path / "half"), "--contexts", "thick", *made]) == 1
    assert "training is not finished: resume it, or use a checkpoint" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["no-such-command"])


@pytest.mark.parametrize("command", ["generate", "export"])
def test_a_missing_adapter_is_explained(tmp_path, capsys, command):
    chosen = ["--contexts", "obs"] if command == "generate" else ["--context", "singles", "--format", "peft"]
    arguments = [command, "--adapter", str(tmp_path / "nowhere"), *chosen, "--output_dir", str(tmp_path / "output")]
    assert main(arguments) == 1
    assert "nowhere is no folder here" in capsys.readouterr().err
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--target_modules", "to_x"], r"Target modules \{'to_x'\} not found in the base model. .* Candidates: "),
        (["--report_to", "paper"], "--report_to=paper is unknown. Allowed: .*tensorboard"),
        (["--variant", "fp16"], "The base .* cannot be loaded: .* `variant=fp16`"),
    ],
)
def test_what_libraries_refuse_is_an_error_without_a_traceback(changes, message, images, base, tmp_path, capsys):
    data = ["--train_data_dir", str(images), "--output_dir", str(tmp_path / "out"), "--max_train_steps", "1"]
    assert main(["train", "--pretrained_model_name_or_path", base, *data, *changes]) == 1
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{}", "The tokenizer of .* cannot be read"),
        ("model.safetensors", "?", "The base .* cannot be loaded: Error while deserializing header"),
    ],
)
def test_a_damaged_language_model_is_an_error_without_a_traceback(name, content, message, tmp_path, capsys):
    language_model("llama").save_pretrained(tmp_path / "base")
    word_tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "base" / name).write_text(content)
    for context in ("obs", "formal"):
        (tmp_path / "texts" / context).mkdir(parents=True)
        (tmp_path / "texts" / context / "texts.txt").write_text("a cat sat\na dog ran\n")
    command = ["--train_data_dir", str(tmp_path / "texts"), "--pretrained_model_name_or_path", str(tmp_path / "base")]
    assert main(["check-data", *command]) == 1
    assert re.search(message, capsys.readouterr().err)
