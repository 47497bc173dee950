"""Settings files: the options of a command in YAML or JSON, and what a run leaves to be repeated."""

import json

import pytest
from safetensors.torch import load_file

from hf_causal_context.cli import main
from hf_causal_context.commands.parsing import parse
from hf_causal_context.commands.train import Arguments

from .test_cli import base, images, pipeline_folder  # noqa: F401 (fixtures)

TINY = {"max_train_steps": 2, "train_batch_size": 3, "num_validation_images": 0, "learning_rate": 0.01, "use_ema": True}
YAML = """
pretrained_model_name_or_path: {base}
train_data_dir: {images}
output_dir: {output}
max_train_steps: 2
train_batch_size: 3
num_validation_images: 0
learning_rate: 0.01
use_ema: true
concepts: [thick, slant]
validation_steps: null
seed: 3
"""


@pytest.fixture
def settings(tmp_path, base, images):  # noqa: F811
    file = tmp_path / "my.yaml"
    file.write_text(YAML.format(base=base, images=images, output=tmp_path / "by-file"))
    return file


def weights(folder):
    return {name: tensor.tolist() for name, tensor in load_file(folder / "adapter_model.safetensors").items()}


def test_a_file_does_what_its_options_do_and_options_override_it(settings, base, images, tmp_path):  # noqa: F811
    assert main(["train", "--config", str(settings), "--seed", "0"]) == 0
    options = ["--pretrained_model_name_or_path", base, "--train_data_dir", str(images), "--concepts", "thick", "slant"]
    options += [f"--{name}={value}" for name, value in TINY.items()]
    assert main(["train", *options, "--output_dir", str(tmp_path / "by-options")]) == 0
    assert weights(tmp_path / "by-file") == weights(tmp_path / "by-options")
    then, now = (
        json.loads((tmp_path / name / "training_arguments.json").read_text()) for name in ("by-file", "by-options")
    )
    assert then | {"output_dir": ""} == now | {"output_dir": ""}


def test_what_a_run_leaves_repeats_it(settings, tmp_path):
    assert main(["train", f"--config={settings}"]) == 0
    assert main(["train", f"--config={settings}", "--resume_from_checkpoint", "latest"]) == 0
    left = tmp_path / "by-file" / "training_arguments.json"
    assert main(["train", "--config", str(left), "--output_dir", str(tmp_path / "again")]) == 0
    assert weights(tmp_path / "again") == weights(tmp_path / "by-file")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("learning_rat: 1.0", "has the unknown option 'learning_rat'. Did you mean 'learning_rate'?"),
        ("3: 1.0", "has the unknown option 3. The command's --help lists what there is."),
        ("- seed", "holds ['seed'], not options and their values"),
        ("seed: {a: 1}", "seed in"),
        ("concepts: [a, --seed, 1]", "holds '--seed', which would be read as an option. Write it as a line of its own"),
        ("concepts: [a, --seed=1]", "holds '--seed=1', which would be read as an option"),
        ("seed: [", "is neither YAML nor JSON"),
        ("", "holds None, not options"),
        ("seed: 1\noutput_dir: a\nseed: 2", "has 'seed' more than once. Leave one of them."),
        ('{"seed": 1, "seed": 1}', "has 'seed' more than once"),
        ("validation_prompt: yes", 'is text, and YAML reads yes in it as True. Put it in quotes: "yes".'),
        ("validation_prompt: 012", 'reads 012 in it as 10. Put it in quotes: "012".'),
        ("validation_prompt: 1.50", "reads 1.50 in it as 1.5."),
        ("observational_name: off", "observational_name in"),
        ("concepts: [a, no, b]", "reads no in it as False."),
        ("concepts: [a, null]", "reads null in it as None."),
        ("output_dir: 1:30", "reads 1:30 in it as 90."),
    ],
)
def test_a_file_that_holds_no_options_is_refused(tmp_path, capsys, content, message):
    (tmp_path / "bad.yaml").write_text(content)
    assert main(["train", "--config", str(tmp_path / "bad.yaml")]) == 1
    assert message in capsys.readouterr().err


def test_words_stay_as_written_and_switches_and_numbers_are_those_of_yaml(tmp_path):
    lines = ["pretrained_model_name_or_path: 12", "train_data_dir: 1.5", "output_dir: 2026-11-29", "use_ema: yes"]
    lines += ["concepts: ['no', \"012\", 7]", "validation_prompt: ~", "max_grad_norm: .inf", "seed: 0x10"]
    lines += ["resolution:", "dry_run: off"]
    (tmp_path / "words.yaml").write_text("\n".join(lines))
    parsed = parse("train", Arguments, ["--config", str(tmp_path / "words.yaml")])
    assert (parsed.pretrained_model_name_or_path, parsed.train_data_dir) == ("12", "1.5")
    assert (parsed.output_dir, parsed.validation_prompt) == ("2026-11-29", "")
    assert parsed.concepts == ["no", "012", "7"]
    assert (parsed.use_ema, parsed.dry_run, parsed.max_grad_norm, parsed.seed) == (True, False, float("inf"), 16)


def test_json_may_be_indented_by_tabs(tmp_path):
    (tmp_path / "settings.json").write_text(json.dumps(TINY | {"output_dir": "o"}, indent="\t"))
    required = ["--pretrained_model_name_or_path", "base"]
    assert parse("train", Arguments, ["--config", str(tmp_path / "settings.json"), *required]).max_train_steps == 2


def test_a_folder_is_no_file_of_options(tmp_path, capsys):
    assert main(["train", "--config", str(tmp_path)]) == 1
    assert f"error: --config: {tmp_path} is a folder. Give a file of options" in capsys.readouterr().err


def test_a_missing_file_is_an_error_without_a_traceback(tmp_path, capsys):
    assert main(["generate", "--config", str(tmp_path / "none.yaml")]) == 1
    assert "none.yaml" in capsys.readouterr().err
