"""Settings files: the options of a command in YAML or JSON, and what a run leaves to be repeated."""

import json

import pytest
from safetensors.torch import load_file

from hf_causal_context.cli import main

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
    ],
)
def test_a_file_that_holds_no_options_is_refused(tmp_path, capsys, content, message):
    (tmp_path / "bad.yaml").write_text(content)
    assert main(["train", "--config", str(tmp_path / "bad.yaml")]) == 1
    assert message in capsys.readouterr().err


def test_a_missing_file_is_an_error_without_a_traceback(tmp_path, capsys):
    assert main(["generate", "--config", str(tmp_path / "none.yaml")]) == 1
    assert "none.yaml" in capsys.readouterr().err
