"""Arbitrary command lines end in an exit status and a message, never in a traceback; none of them starts long work."""

import dataclasses
import json
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_causal_context.cli import main
from hf_causal_context.commands.evaluate import Arguments as EvaluationArguments
from hf_causal_context.data.arguments import AnyDataArguments
from hf_causal_context.training.arguments import TextArguments, TrainingArguments
from hf_causal_context.training.autoencoder.arguments import AutoencoderArguments
from tests.data.small import write_folders

from .cases import cases

VALUES = (
    *("", " ", "-", "--", "-1", "0", "1", "0.5", "1e400", "nan", "inf", "-inf", "9" * 25, "9" * 5_000, "true", "none"),
    *(
        "obs",
        "a",
        "a+b",
        "a=0.5",
        "a=x",
        "+",
        "singles",
        "pairs",
        "../..",
        "/dev/null",
        "nowhere",
        "user/nowhere",
        "%s",
    ),
    *("{}", "[", "x" * 300, "\0", "\udcff", "\u202eé", "smiling: Smiling == 1", ": ", "a: __import__('os')", "latest"),
    *("folders", "adapter", "broken", "file.txt", "bf16", "peft", "diffusers", "--help", "--output_dir", "constant"),
)
SETTINGS = {
    "train": TrainingArguments,
    "train-text": TextArguments,
    "train-autoencoder": AutoencoderArguments,
    "evaluate": EvaluationArguments,
    "check-data": AnyDataArguments,
}
ADAPTER = ("--adapter", "--pretrained_model_name_or_path", "--revision", "--dtype", "--variant", "--output_dir")
IMAGES = ("--prompt", "--class_label", "--num_inference_steps", "--guidance_scale", "--resolution")
OPTIONS = {name: [f"--{field.name}" for field in dataclasses.fields(kind)] for name, kind in SETTINGS.items()} | {
    "quickstart": ["--output_dir", "--seed", "--fast"],
    "generate": [*ADAPTER, *IMAGES, "--contexts", "--seeds", "--batch_size", "--observational_name", "--grid"],
    "generate-text": [
        *ADAPTER[:4],
        "--contexts",
        "--prompt",
        "--output_file",
        "--max_new_tokens",
        "--seeds",
        "--top_p",
    ],
    "export": [*ADAPTER, "--context", "--format"],
    "edit": [*ADAPTER, "--images", "--from_context", "--strengths", "--mask", "--batch_size"],
    "merge": [*ADAPTER, "--context", "--adapter_revision", "--quantization"],
    "info": [*ADAPTER[:3], "--json", "--adapter_revision"],
    "push": [*ADAPTER, *IMAGES, "--repo_id", "--private", "--branch", "--evaluation", "--license", "--contexts"],
    "demo": ["--adapter", "--pretrained_model_name_or_path", "--share", "--port"],
}
REQUIRED = {
    "train": ["--pretrained_model_name_or_path", "nowhere", "--train_data_dir", "folders", "--output_dir", "out"],
    "train-text": ["--pretrained_model_name_or_path", "nowhere", "--train_data_dir", "folders", "--output_dir", "out"],
    # Its image size is never one that an autoencoder takes.
    "train-autoencoder": ["--train_data_dir", "folders", "--output_dir", "out"],
    "evaluate": ["--adapter", "nowhere", "--train_data_dir", "folders"],
    "check-data": ["--train_data_dir", "folders"],
    "quickstart": [],
    "generate": ["--adapter", "nowhere", "--contexts", "a", "--output_dir", "out"],
    "generate-text": ["--adapter", "nowhere", "--contexts", "a", "--prompt", "p", "--output_file", "out.jsonl"],
    "export": ["--adapter", "broken", "--context", "a", "--format", "peft", "--output_dir", "out"],
    "edit": ["broken", "--image", "a.png", "--context", "a", "--output_dir", "out"],
    "merge": ["broken", "--context", "a", "--output_dir", "out"],
    "info": ["broken"],
    "push": ["--adapter", "broken", "--repo_id", "user/name"],
    "demo": ["--adapter", "nowhere"],
}
# Appended, so that these alone never begin.
NEVER_BEGINS = {"quickstart": ["--unknown"], "train-autoencoder": ["--resolution", "17"]}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with images in contexts, and adapters of which nothing can be made."""
    root = tmp_path_factory.mktemp("commands")
    write_folders(root / "folders", {"obs": 1, "a": 1, "b": 1})
    config = {"peft_type": "CAUSAL_CONTEXT", "concepts": ["a", "b"], "base_model_name_or_path": "nowhere"}
    for name, text in (("adapter", json.dumps(config)), ("broken", "[" * 20_000)):
        (root / name).mkdir()
        (root / name / "adapter_config.json").write_text(text)
    (root / "file.txt").write_text("no folder")
    return root


@st.composite
def command_lines(draw, name):
    line = list(draw(st.sampled_from([REQUIRED[name], REQUIRED[name], []])))
    for _ in range(draw(st.integers(0, 3))):
        option = draw(st.sampled_from([*OPTIONS[name], *OPTIONS[name], "--unknown", "-x"]))
        line += [option, *draw(st.lists(st.sampled_from(VALUES), max_size=2))]
    if line and draw(st.integers(0, 3)) == 0:
        line[draw(st.integers(0, len(line) - 1))] = draw(st.sampled_from(VALUES))
    return line + NEVER_BEGINS.get(name, [])


def status(arguments):
    try:
        return main(arguments)
    except SystemExit as exit_:  # of argparse
        return exit_.code


@pytest.mark.parametrize("name", OPTIONS)
def test_any_arguments_of_a_command(name, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    sys.stderr.reconfigure(errors="backslashreplace")  # as Python's own
    seen = set()

    @cases(90)
    @given(command_lines(name))
    def check(line):
        result = status([name, *line])
        said = capsys.readouterr()
        assert result in (0, 1, 2), line
        assert "Traceback" not in said.err
        if result:
            assert said.err.strip().rpartition("error: ")[2], line
        seen.add(result)

    check()
    assert seen - {0}, "nothing was refused"
    assert not (place / "out").exists() or not any(path.suffix == ".safetensors" for path in (place / "out").rglob("*"))


@cases(100)
@given(st.lists(st.sampled_from(VALUES), max_size=3))
def test_any_text_instead_of_a_command(capsys, line):
    sys.stderr.reconfigure(errors="backslashreplace")
    assert status(line) in (0, 2)
    assert "Traceback" not in capsys.readouterr().err
