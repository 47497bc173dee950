"""The settings files in examples/configs: `train` takes them, and their memory is what their shapes come to."""

import re
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from examples.configs import memory, plan
from examples.configs.memory import Allocations, language_peaks
from examples.configs.parts import LanguageShape
from examples.configs.plan import file_name, text
from examples.configs.shapes import LANGUAGE, SHAPES
from examples.configs.sizes import SIZES
from examples.configs.table import SAMPLES, row
from hf_causal_context.bases.loading import as_base
from hf_causal_context.commands.parsing import parse
from hf_causal_context.training.arguments import TrainingArguments

from .training.conftest import apart

FOLDER = Path(__file__).parents[1] / "examples" / "configs"
GUIDE = FOLDER.parent / "guides" / "scale.md"
FILES = {file_name(base, size): (base, size) for base, sizes in SIZES.items() for size in sizes}
NUMBER = re.compile(r"\d+\.\d(?= GB)")
# Of each base the file that is computed fastest; and one of each quantization, with checkpointing.
COMPUTED = [
    *(file_name(base, max(sizes)) for base, sizes in SIZES.items()),
    "z-image-12gb.yaml",
    "flux2-klein-4b-12gb.yaml",
]
# As published with the bases.
PARAMETERS = {
    "sd15": {"unet": 859_520_964, "text_encoder": 123_060_480, "vae": 83_653_863},
    "sdxl": {"unet": 2_567_463_684, "text_encoder_2": 694_659_840},
    "flux1-dev": {"transformer": 11_901_408_320, "text_encoder_2": 4_762_310_656},
    "qwen-image": {"transformer": 20_430_401_088, "text_encoder": 8_292_166_656},
    "z-image": {"transformer": 6_154_908_736, "text_encoder": 4_022_468_096},
}
# The same in billions, where only that is published.
BILLIONS = {
    "sd35-medium": 2.24,  # and 0.23 of positions, which are no parameters
    "sd35-large": 8.1,
    "pixart-sigma": 0.6,
    "flux2-klein-4b": 3.9,
    "flux2-klein-9b": 9.1,
    "flux2-dev": 32.2,
    "chroma": 8.9,
    "krea2": 12.8,
    "sana": 1.6,
    "lumina2": 2.6,
    "auraflow": 6.8,
    "hidream": 17.1,
    "cogview4": 6.4,
    "hunyuan-image": 17.4,
    "wan21-1.3b": 1.4,
    "wan22-a14b": 14.3,
    "ltx": 1.9,
    "cogvideox-5b": 5.6,
    "hunyuan-video": 12.8,
    "mochi": 10.0,
}
TINY = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
LLAMA = LlamaConfig(**TINY, num_hidden_layers=3, vocab_size=128)


@pytest.fixture(autouse=True)
def _apart(tmp_path, monkeypatch):
    yield from apart(tmp_path, monkeypatch)


def test_there_is_a_file_for_each_base_and_size_and_no_other():
    assert {path.name for path in FOLDER.glob("*.yaml")} == FILES.keys()


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_no_file_repeats_another(sizes):
    assert len({str(sorted(settings.items())) for settings in sizes.values()}) == len(sizes)


@pytest.mark.parametrize("name", FILES)
def test_train_takes_the_file(name, monkeypatch):
    monkeypatch.setattr("hf_causal_context.training.arguments.check_quantization", lambda name: None)  # without a GPU
    base, size = FILES[name]
    arguments = parse("train", TrainingArguments, ["--config", str(FOLDER / name), "--output_dir", "out"])
    for option, value in SIZES[base][size].items():
        assert getattr(arguments, option) == value
    assert arguments.pretrained_model_name_or_path == SHAPES[base].name


@pytest.mark.parametrize("name", FILES)
def test_the_file_is_what_the_command_writes_and_leaves_a_tenth_of_the_gpu(name, monkeypatch):
    written = (FOLDER / name).read_text()
    peak, before, step, of_base, kept = map(float, NUMBER.findall(written))
    assert 0 < peak * 1e9 <= 0.9 * FILES[name][1] * 2**30  # as GPUs are sold
    given = {"before": before, "step": step, "base": of_base, "kept for the backward pass": kept}
    monkeypatch.setattr(plan, "peaks", lambda *_: {part: 1e9 * size for part, size in given.items()})
    assert written == text(*FILES[name])
    assert peak == max(before, step)


@pytest.mark.parametrize("base", PARAMETERS)
def test_shapes_are_those_of_the_base(base):
    pipe = SHAPES[base].pipeline(torch.bfloat16)
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    counts = {name: sum(parameter.numel() for parameter in part.parameters()) for name, part in parts.items()}
    assert counts | PARAMETERS[base] == counts


def test_the_sizes_of_every_base_are_checked():
    assert PARAMETERS.keys() | BILLIONS.keys() == SHAPES.keys() == SIZES.keys()


# A CPU stands in for the GPU.
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")
@pytest.mark.filterwarnings("ignore:In CPU autocast, but the target dtype:UserWarning")
@pytest.mark.slow
@pytest.mark.parametrize("name", COMPUTED)
def test_the_numbers_in_the_file_are_computed_from_its_settings_and_published_sizes(name, monkeypatch):
    base, size = FILES[name]
    pipe = SHAPES[base].pipeline(torch.bfloat16)
    billions = sum(parameter.numel() for parameter in as_base(pipe).denoiser.parameters()) / 1e9
    assert billions == pytest.approx(BILLIONS.get(base, billions), abs=0.06)
    monkeypatch.setitem(SHAPES, base, replace(SHAPES[base], pipeline=lambda dtype: pipe))
    found, expected = (NUMBER.findall(given) for given in ((FOLDER / name).read_text(), text(base, size)))
    assert [*map(float, found)] == pytest.approx([*map(float, expected)], rel=0.03, abs=0.1)


@pytest.mark.slow
def test_the_table_of_the_guide_is_computed():
    assert f"| {' | '.join(row('smollm2-1.7b').values())} |" in GUIDE.read_text()


def test_the_table_of_the_guide_has_a_row_for_each_base():
    assert all(f"| {(LANGUAGE | SHAPES)[base].title} | " in GUIDE.read_text() for base in SAMPLES)


def test_memory_and_arithmetic_without_values_are_those_of_a_real_step(monkeypatch):
    shape = LanguageShape("tiny", "tiny", lambda: LlamaForCausalLM(LLAMA), tokens=64)
    settings = {"train_batch_size": 2, "mixed_precision": "bf16"}
    computed = [language_peaks(shape, settings | {"gradient_checkpointing": on}) for on in (False, True)]
    monkeypatch.setattr(memory, "no_values", lambda: torch.device("cpu"))
    real = [language_peaks(shape, settings | {"gradient_checkpointing": on}) for on in (False, True)]
    assert computed == [pytest.approx(one, rel=1e-3) for one in real]
    plain, checkpointed = computed
    kept = "kept for the backward pass"
    assert checkpointed[kept] < plain[kept]
    assert checkpointed["TFLOP"] > plain["TFLOP"]
    # Two operations for each weight and token, in the forward pass and again for the gradient of the input.
    weights = 3 * (64 * (64 + 32 + 32 + 64) + 3 * 64 * 256) + 64 * 128
    attention = 3 * 4 * 64 * 64 * 64 * 3.5
    own = 3 * 2 * plain["adapter"] / 4 * 128  # of which there is a gradient, too
    assert plain["TFLOP"] * 1e12 == pytest.approx(2 * 2 * weights * 128 + 2 * attention + own, rel=0.15)
    assert plain["base"] == pytest.approx(2 * sum(p.numel() for p in LlamaForCausalLM(LLAMA).parameters()), rel=0.01)


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
