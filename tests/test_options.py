"""What a command line says of its options: in --help, and in errors."""

import logging
import shlex
import subprocess
import sys

import datasets
import diffusers
import huggingface_hub
import pytest
import transformers
from datasets import Dataset

import hf_causal_context
from hf_causal_context.cli import main
from hf_causal_context.commands import COMMANDS, check_data, evaluate
from hf_causal_context.commands.parsing import parse
from hf_causal_context.contexts import ConceptSet
from hf_causal_context.data.from_arguments import load_data
from hf_causal_context.hub.contents import CardContents
from hf_causal_context.messages.progress import ProgressBar, say, set_quiet
from hf_causal_context.messages.wording import in_options
from hf_causal_context.training import finetune
from hf_causal_context.training.arguments import TrainingArguments
from tests.data.small import write_folders


def helped(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    return capsys.readouterr().out


def refused(arguments, capsys):
    assert main(arguments) == 1
    return capsys.readouterr().err


def test_the_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"hf-causal-context {hf_causal_context.__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_every_option_once(command, capsys):
    lines = helped(command, capsys).partition("\n\n")[2].splitlines()
    options = [line.split()[0] for line in lines if line.startswith("  --")]
    assert "--config" in options
    assert len(set(options)) == len(options)
    assert not [option for option in options if "-" in option[2:]]


def test_help_is_in_groups_with_what_is_required_first(capsys):
    text = helped("train", capsys)
    groups = [line for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert groups == [
        *("required:", "the data:", "the adapter and its base:", "options of this command:", "training:"),
        *("watching and resuming:", "the Hub:", "general:"),
    ]
    assert text.startswith("usage: hf-causal-context train --output_dir TEXT --pretrained_model_name_or_path TEXT [--")
    assert text.index("--train_data_dir TEXT\n") < text.index("the adapter and its base:")
    assert text.index("the Hub:") < text.index("--push_to_hub") < text.index("general:")


def test_help_shows_defaults(capsys):
    text = " ".join(helped("generate", capsys).split())
    assert "One image per context and seed. Default: 0 1 2 3 4 5 6 7 --grid" in text
    assert "Images per call of the pipeline. Default: 8" in text
    assert "--guidance_scale X By default the pipeline's. --" in text
    assert "--seed N Of the samples. Default: 0" in " ".join(helped("push", capsys).split())


def test_help_does_not_refer_to_the_option_above_which_groups_change(capsys):
    assert "--max_new_tokens N Length of the sample texts, in tokens. Default: 40" in " ".join(
        helped("train-text", capsys).split()
    )


def test_a_choice_of_yes_or_no_needs_no_word_whatever_its_default(capsys):
    assert "--completion_only_loss\n" in helped("train-text", capsys)
    given = {(): None, ("--completion_only_loss",): True, ("--completion_only_loss", "false"): False}
    for words, meant in given.items():
        parsed = parse("check-data", check_data.Arguments, [*words, "--train_data_dir", "."])
        assert (parsed.completion_only_loss, parsed.train_data_dir) == (meant, ".")


def test_a_value_of_another_type_is_told_with_one_spelling_of_the_option(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["train", "--max_train_steps", "three"])
    assert "error: argument --max_train_steps: invalid int value: 'three'\n" in capsys.readouterr().err


def test_an_unknown_command_is_guessed(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["trian"])
    assert "unknown command 'trian'. Did you mean 'train'? Allowed: quickstart, " in capsys.readouterr().err


def test_an_unknown_concept_is_guessed():
    with pytest.raises(ValueError, match=r"Unknown concept 'glases'.*'hat'\. Did you mean 'glasses'\? Correct"):
        ConceptSet(("glasses", "hat")).index("glases")


def test_a_word_for_several_contexts_is_guessed():
    concepts = ConceptSet(("hat", "repairs"))
    concepts.check_words(["pairs", "hat", "repairs", "hat=0.5", "unlike"], ["singles", "pairs"])
    with pytest.raises(ValueError, match=r"'pair'\. Did you mean 'pairs' or 'repairs'\? Allowed: 'singles', 'pairs'"):
        concepts.check_words(["pair"], ["singles", "pairs"])


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("name them with concepts=.", "name them with --concepts."),
        ("held_out_contexts= names 'a'", "--held_out_contexts names 'a'"),
        ("caption_column='text' was given", "--caption_column='text' was given"),
        ("--concepts=a is", "--concepts=a is"),
        ("the context 'concepts=2+a,concepts=1'", "the context 'concepts=2+a,concepts=1'"),
        ("call `f(x, concepts=1)` or g(concepts==1)", "call `f(x, concepts=1)` or g(concepts==1)"),
        ("Name another content_column=, or", "Name another --image_column, or"),
        ("other=1 and other=", "other=1 and other="),
    ],
)
def test_errors_name_options(message, shown):
    options = ("concepts", "held_out_contexts", "caption_column", "image_column")
    assert in_options(message, options) == shown


def test_errors_of_the_data_name_options(tmp_path, capsys):
    write_folders(tmp_path, {"obs": 1, "a": 1, "b": 1})
    command = ["check-data", "--train_data_dir", str(tmp_path)]
    assert "--held_out_contexts names 'c', which has no rows" in refused([*command, "--held_out_contexts", "c"], capsys)
    assert "--caption_column='text' was given, but" in refused([*command, "--caption_column", "text"], capsys)


def test_errors_of_the_columns_of_a_dataset_name_options(tmp_path, capsys):
    rows = Dataset.from_dict({"image": [{"bytes": b"", "path": None}] * 2, "kind": [0, 1], "context": ["obs", "a"]})
    rows.save_to_disk(tmp_path)
    command = ["check-data", "--dataset_name", str(tmp_path)]
    assert "The column 'image' holds {'bytes': Value('binary'), " in refused(command, capsys)
    assert "no column 'kinds' (--class_column)" in refused([*command, "--class_column", "kinds"], capsys)
    assert "--dataset_config_name='b' is for" in refused([*command, "--dataset_config_name", "b"], capsys)
    rules = ["--context_column", "made", "--attribute_rules", "a: kind == 1", "a: kind == 0"]
    rows.cast_column("image", datasets.Image()).save_to_disk(tmp_path / "images")
    command = ["check-data", "--dataset_name", str(tmp_path / "images"), *rules]
    assert "--attribute_rules has two rules for 'a'. Join them" in refused(command, capsys)


def test_files_that_no_image_can_be_written_to_are_refused(tmp_path, capsys):
    write_folders(tmp_path / "data", {"obs": 1, "a": 1})
    command = ["check-data", "--train_data_dir", str(tmp_path / "data"), "--contact_sheet"]
    for name in ("sheet", "sheet.txt", "data", "sheet.psd"):
        assert "is no file that images are written to, such as check.png" in refused(
            [*command, str(tmp_path / name)], capsys
        )


def test_results_in_the_folder_of_the_data_are_refused(tmp_path):
    """They would be read as a context by the next command, or by the same one when it is resumed."""
    write_folders(tmp_path / "data", {"obs": 1, "a": 1})
    data = tmp_path / "data"
    arguments = TrainingArguments(
        pretrained_model_name_or_path="base", output_dir=str(data / "out"), train_data_dir=str(data)
    )
    with pytest.raises(ValueError, match="--output_dir: .*data/out is in the folder of the data, .* Choose a folder"):
        load_data(arguments)


def test_descriptions_of_one_concept_are_not_dropped(tmp_path, capsys):
    told = refused(["push", str(tmp_path), "--descriptions", "a: this", "a : that"], capsys)
    assert "--descriptions has a concept twice" in told


MISTAKES = [
    ("check-data", "received neither"),
    ("check-data --train_data_dir a --dataset_name b", "received 'a' and 'b', which is one too many"),
    ("train TRAIN --train_data_dir nowhere", "--train_data_dir: 'nowhere' is not a folder"),
    ("train TRAIN --train_data_dir . --image_column photo", "--image_column='photo' is for datasets"),
    ("train-text TRAIN --train_data_dir . --text_column body", "--text_column='body' is for datasets"),
    ("train TRAIN --train_data_dir . --ema_decay 2", "--ema_decay=2.0 must be at least 0 and below 1"),
    ("train TRAIN --train_data_dir . --output_dir file", "--output_dir: file is a file"),
    ("train TRAIN --train_data_dir . --pretrained_model_name_or_path ./b", "There is no base './b'"),
    ("train-autoencoder --output_dir o --dataset_name d --mod frozen", "Did you mean '--mode'?"),
    ("evaluate . --output_dir o", "received neither"),
    ("generate nowhere/at/all --contexts a --output_dir o", "nowhere/at/all is no folder here"),
    ("generate . --context a --output_dir file", "--output_dir: file is a file"),
    ("export . --contexts a --format peft --output_dir file", "--output_dir: file is a file"),
    ("merge . --context a --output_dir file", "--output_dir: file is a file"),
    ("push . --output_dir file", "--output_dir: file is a file"),
    ("info ./nowhere", "./nowhere is no folder here"),
    ("info ./adaptor", "Did you mean 'adapter'?"),
    ("generate . --context a --output_dir o --num_inference_steps 0", "--num_inference_steps=0 must be at least 1"),
    ("generate . --context a --output_dir o --resolution 0", "--resolution=0 must be at least 1"),
    ("push . --max_new_tokens 0", "--max_new_tokens=0 must be at least 1"),
    ("edit . --image i --context a --output_dir file/o", "--output_dir: file/o cannot be made, since "),
    ("generate-text . --context a --output_file file/o", "--output_file: file/o cannot be made, since "),
    ("check-data --train_data_dir . --contact_sheet file/o", "--contact_sheet: file/o cannot be made, since "),
    ("train TRAIN --train_data_dir .", "--output_dir: o is in the folder of the data, .: what is written there would"),
    ("evaluate . --train_data_dir adapter/.. --output_dir o", "--output_dir: o is in the folder of the data"),
    ("generate . --context a --output_dir o --seeds 99999999999999999999", "--seeds: 99999999999999999999 is too"),
    ("train TRAIN --train_data_dir . --seed 4294967296", "--seed: 4294967296 is too large a number"),
    ("train TRAIN --config nowhere.yaml", "--config: nowhere.yaml does not exist"),
    ("generate . --context a --contexts b --output_dir o", "--contexts is there 2 times, and the last would replace"),
    ("train TRAIN --config a.yaml --config=b.yaml", "--config is there more than once, and is one file"),
    ("check-data --train_data_dir . --class_column kind", "--class_column='kind' is for datasets"),
]


def test_mistakes_are_told_before_what_takes_long_is_imported(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "adapter").mkdir()
    required = "--pretrained_model_name_or_path b --output_dir o"
    lines = [line.replace("TRAIN", required).split() for line, _ in MISTAKES]
    code = f"""
import sys
from hf_causal_context.cli import main
for line in {lines}:
    assert main(line) == 1, line
    assert not {{"datasets", "diffusers", "gradio"}} & set(sys.modules), line
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == len(MISTAKES)
    for line, (_, message) in zip(said, MISTAKES, strict=True):
        assert message in line


@pytest.mark.parametrize(
    ("checkpoint", "resume", "message"),
    [
        (None, [], "There is no checkpoint yet. Go on by running the same command again."),
        (3, [], "The last complete checkpoint is {}. Go on by running the same command with --resume_from_checkpoint"),
        (3, ["--resume_from_checkpoint", "latest"], "checkpoint is {}. Go on by running the same command again."),
    ],
)
def test_an_interruption_between_steps_says_how_to_go_on(checkpoint, resume, message, tmp_path, monkeypatch, capsys):
    def interrupted(_):
        if checkpoint is not None:
            (tmp_path / f"checkpoint-{checkpoint}").mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(finetune, "train", interrupted)
    required = ["--pretrained_model_name_or_path", "base", "--train_data_dir", ".", "--output_dir", str(tmp_path)]
    assert main(["train", *required, *resume]) == 130
    assert message.format(tmp_path / f"checkpoint-{checkpoint}") in capsys.readouterr().err


def test_the_folder_of_another_run_is_refused_before_the_base_and_the_data_are_read(tmp_path, capsys):
    (tmp_path / "checkpoint-3").mkdir()
    required = ["--pretrained_model_name_or_path", "no-base", "--dataset_name", "no-data"]
    for command in ("train", "train-text"):
        assert "holds checkpoints of another run" in refused(
            [command, *required, "--output_dir", str(tmp_path)], capsys
        )


@pytest.fixture
def completed(tmp_path, capsys):
    """The words that bash offers for the last one of a line."""
    assert main(["completion"]) == 0
    (tmp_path / "completion").write_text(capsys.readouterr().out)

    def words(*line):
        code = '. ./completion; COMP_WORDS=("$@"); COMP_CWORD=$(($#-1)); _hf_causal_context; echo "${COMPREPLY[@]}"'
        command = ["bash", "-c", code, "bash", "hf-causal-context", *line]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.split()

    return words


def test_completion_knows_commands_options_and_their_choices(completed):
    assert completed("tr") == ["train", "train-text", "train-autoencoder"]
    assert completed("export", "--for") == ["--format"]
    assert completed("export", "--format", "") == ["peft", "diffusers", "kohya", "comfyui", "gguf"]
    assert completed("export", "--format", "peft", "--co") == ["--config", "--contexts"]
    assert completed("export", "--output_dir", "") == []  # bash then offers files


@pytest.fixture
def restored():
    """The libraries say afterwards what they said before."""
    logs = (*(library.utils.logging for library in (transformers, diffusers, datasets, huggingface_hub)),)
    before = [log.get_verbosity() for log in logs]
    yield
    set_quiet(False)
    for log, level in zip(logs, before, strict=True):
        log.set_verbosity(level)
    transformers.utils.logging.enable_progress_bar()
    diffusers.utils.logging.enable_progress_bar()
    datasets.utils.enable_progress_bars()
    huggingface_hub.utils.enable_progress_bars()


def say_something(arguments):
    print("the result")
    say("a message")
    for _ in ProgressBar(range(2), desc="work", delay=0):
        pass


@pytest.mark.parametrize(
    ("flags", "out", "bar", "level"),
    [
        ([], "the result\na message\n", True, None),
        (["--quiet"], "the result\n", False, "WARNING"),
        (["--verbose"], "the result\na message\n", True, "INFO"),
    ],
)
def test_how_much_a_command_says(flags, out, bar, level, restored, monkeypatch, capsys):
    monkeypatch.setattr("hf_causal_context.commands.completion.run", say_something)
    before = transformers.utils.logging.get_verbosity()
    assert main(["completion", *flags]) == 0
    said = capsys.readouterr()
    assert said.out == out
    assert ("work: 100%" in said.err) == bar
    expected = before if level is None else getattr(logging, level)
    for library in (transformers, diffusers, datasets, huggingface_hub):
        if level is not None or library is transformers:
            assert library.utils.logging.get_verbosity() == expected
    assert (
        huggingface_hub.utils.are_progress_bars_disabled() == datasets.utils.are_progress_bars_disabled() == (not bar)
    )


def test_quiet_and_verbose_contradict_each_other(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["completion", "--quiet", "--verbose"])
    assert "--quiet and --verbose contradict each other" in capsys.readouterr().err


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """A function: makes `train` leave nothing but card.json."""

    def call(frame_rate=None, name="out"):
        (tmp_path / name).mkdir()
        CardContents("out", "diffusers", "base", "text-to-image", frame_rate=frame_rate).save(tmp_path / name)
        monkeypatch.setattr(finetune, "train", lambda arguments: tmp_path / name)

    return call


def test_what_it_says_reads_the_data_as_the_training_did(tmp_path, trained, capsys):
    trained(name="my out")
    given = ["--dataset_name", "some/set", "--observational_name", "plain", "--context_column", "kind", "--streaming"]
    given += ["--concepts", "a", "b", "--held_out_contexts", "a+b", "--image_column", "photo", "--resolution", "64"]
    base = ["--pretrained_model_name_or_path", "base", "--instance_prompt", "a dog", "--output_dir", "out"]
    assert main(["train", *base, *given, "--max_train_steps", "1"]) == 0
    command = shlex.split(capsys.readouterr().out.splitlines()[-1].partition("? ")[2])[2:]
    assert "--streaming" in command
    assert "True" not in command
    parsed = parse("evaluate", evaluate.Arguments, command)
    folder = str(tmp_path / "my out")
    expected = ["--prompt", "a dog", "--output_dir", f"{folder}-report", *given]
    assert parsed == parse("evaluate", evaluate.Arguments, [folder, *expected])


def test_of_videos_it_says_nothing(trained, tmp_path, capsys):
    trained(frame_rate=16)
    base = ["--pretrained_model_name_or_path", "base", "--output_dir", "out"]
    assert main(["train", *base, "--train_data_dir", str(tmp_path)]) == 0
    assert "Does it compose" not in capsys.readouterr().out


def test_a_training_says_how_to_measure_its_adapter(tmp_path, trained, capsys):
    trained()
    folder = str(tmp_path / "my images")
    (tmp_path / "my images").mkdir()
    base = ["--pretrained_model_name_or_path", "base"]
    assert main(["train", *base, "--train_data_dir", folder, "--output_dir", str(tmp_path / "out")]) == 0
    *_, said = capsys.readouterr().out.splitlines()
    assert said == (
        f"Does it compose? hf-causal-context evaluate {tmp_path}/out --train_data_dir '{folder}' --output_dir "
        f"{tmp_path}/out-report"
    )
    command = shlex.split(said.partition("? ")[2])[2:]
    assert parse("evaluate", evaluate.Arguments, command).train_data_dir == folder
