"""The settings files in examples/configs: `train` takes them, and their memory is what their shapes come to."""

import re
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

from examples.configs.plan import SIZES, Allocations, file_name, text
from examples.configs.shapes import SHAPES
from hf_causal_context.commands.parsing import parse
from hf_causal_context.training.arguments import TrainingArguments

FOLDER = Path(__file__).parents[1] / "examples" / "configs"
FILES = {file_name(base, size): (base, size) for base, sizes in SIZES.items() for size in sizes}
# As published with the bases.
PARAMETERS = {
    "sd15": {"unet": 859_520_964, "text_encoder": 123_060_480, "vae": 83_653_863},
    "sdxl": {"unet": 2_567_463_684, "text_encoder_2": 694_659_840},
    "flux1-dev": {"transformer": 11_901_408_320, "text_encoder_2": 4_762_310_656},
    "qwen-image": {"transformer": 20_430_401_088, "text_encoder": 8_292_166_656},
    "z-image": {"transformer": 6_154_908_736, "text_encoder": 4_022_468_096},
}


def test_there_is_a_file_for_each_base_and_size_and_no_other():
    assert {path.name for path in FOLDER.glob("*.yaml")} == FILES.keys()


@pytest.mark.parametrize("name", FILES)
def test_train_takes_the_file(name, monkeypatch):
    monkeypatch.setattr("hf_causal_context.training.arguments.check_quantization", lambda name: None)  # without a GPU
    base, size = FILES[name]
    arguments = parse("train", TrainingArguments, ["--config", str(FOLDER / name), "--output_dir", "out"])
    for option, value in SIZES[base][size].items():
        assert getattr(arguments, option) == value
    assert arguments.pretrained_model_name_or_path == SHAPES[base].name


@pytest.mark.parametrize("name", FILES)
def test_a_tenth_of_the_gpu_is_left(name):
    (peak,) = re.findall(r"computed from shapes by plan\.py: ([\d.]+) GB", (FOLDER / name).read_text())
    assert 0 < float(peak) * 1e9 <= 0.9 * FILES[name][1] * 2**30  # as GPUs are sold


@pytest.mark.parametrize("base", PARAMETERS)
def test_shapes_are_those_of_the_base(base):
    pipe = SHAPES[base].pipeline(torch.bfloat16)
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    counts = {name: sum(parameter.numel() for parameter in part.parameters()) for name, part in parts.items()}
    assert counts | PARAMETERS[base] == counts


@pytest.mark.slow
@pytest.mark.parametrize("name", [file_name(base, min(sizes)) for base, sizes in SIZES.items()])
def test_the_numbers_in_the_file_are_computed_from_its_settings(name):
    written, computed = ((FOLDER / name).read_text(), text(*FILES[name]))
    number = re.compile(r"\d+\.\d(?= GB)")
    assert number.sub("", written) == number.sub("", computed)
    found, expected = ([float(each) for each in number.findall(given)] for given in (written, computed))
    assert len(found) == 5
    assert found == pytest.approx(expected, rel=0.03, abs=0.1)


def test_allocations_are_counted_while_they_are_alive():
    given = torch.zeros(100)
    with Allocations([given]) as allocations:
        first = given + 1
        view = first[:10]
        del first
        second = given.double()
        assert allocations.bytes.now == 4 * (100 + 100) + 8 * 100
        gone = weakref.ref(view.untyped_storage())
        del view
        assert gone() is None
        given.add_(1)
        assert allocations.bytes.now == 4 * 100 + 8 * 100
    assert allocations.bytes.peak == 4 * (100 + 100) + 8 * 100
    del second
    assert allocations.bytes.now == 4 * 100
