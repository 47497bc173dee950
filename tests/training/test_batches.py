"""Batches: contexts mixed, the same after a restart and for any number of processes; latents and captions cached."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image

from hf_causal_context.bases.images import read_image
from hf_causal_context.bases.loading import load_base
from hf_causal_context.data import from_dataset, load_folders
from hf_causal_context.training.arguments import TrainingArguments
from hf_causal_context.training.denoiser import batches as batches_module
from hf_causal_context.training.denoiser.batches import DenoiserBatches
from hf_causal_context.training.weights import parse_weights

from .small import CONTEXTS, settings, write_folders

pytestmark = pytest.mark.usefixtures("on_cpu")
MASKS = {(0.0, 0.0): "obs", (1.0, 0.0): "slant", (0.0, 1.0): "thick"}


@pytest.fixture
def make(pipeline_folder, tmp_path):
    """A function: DenoiserBatches of small folders."""

    def build(name="ddpm", rank=0, world_size=1, captions=False, base=None, num_batches=20, **changes):
        root = tmp_path / f"data-{captions}"
        if not root.exists():
            write_folders(root, captions=captions)
        given = settings(pipeline_folder(name), root, tmp_path / "out", **{"resolution": 16, **changes})
        arguments = TrainingArguments(**given)
        data = load_folders(root, streaming=arguments.streaming)
        base = base or load_base(pipeline_folder(name))
        return DenoiserBatches(base, data, arguments, num_batches, torch.device("cpu"), rank, world_size)

    return build


def taken(batches, count, start=0):
    stream = batches(start)
    return [next(stream) for _ in range(count)]


def assert_same_batch(actual, expected):
    assert torch.equal(actual.clean, expected.clean)
    assert torch.equal(actual.context, expected.context)
    assert actual.conditions.keys() == expected.conditions.keys()
    assert all(torch.equal(actual.conditions[name], value) for name, value in expected.conditions.items())
    assert torch.equal(actual.draws.normal(3), expected.draws.normal(3))


STREAMING = pytest.mark.parametrize("streaming", [False, True])


@STREAMING
@pytest.mark.parametrize("size", [3, 4, 7])  # of 2 concepts, K + 1 and more
def test_all_contexts_are_in_every_batch(streaming, size, make):
    for batch in taken(make(streaming=streaming, train_batch_size=size), 8):
        assert len(batch.clean) == size
        assert {MASKS[tuple(row)] for row in batch.context.tolist()} == set(CONTEXTS)


@STREAMING
def test_images_come_with_the_context_of_their_folder(streaming, make, tmp_path):
    folders = {}
    batches = taken(make(streaming=streaming), 4)
    for context in CONTEXTS:
        for path in (tmp_path / "data-False" / context).iterdir():
            folders[np.asarray(Image.open(path).convert("L")).tobytes()] = context
    seen = set()
    for batch in batches:
        assert batch.clean.min() >= -1
        assert batch.clean.max() <= 1
        for image, mask in zip(batch.clean, batch.context.tolist(), strict=True):
            pixels = ((image[0] + 1) * 127.5).round().to(torch.uint8).numpy().tobytes()
            assert folders[pixels] == MASKS[tuple(mask)]
            seen.add(pixels)
    assert len(seen) == 12


@STREAMING
@pytest.mark.parametrize("name", ["ddpm", "stable_diffusion"])
def test_batches_from_the_nth_on_are_those_of_the_whole_run(name, streaming, make):
    given = {"name": name, "captions": name == "stable_diffusion", "streaming": streaming, "train_batch_size": 2}
    whole, resumed = make(**given), make(**given)
    for actual, expected in zip(taken(resumed, 4, start=5), taken(whole, 9)[5:], strict=True):
        assert_same_batch(actual, expected)


@STREAMING
def test_two_processes_share_the_batches_of_one(streaming, make):
    whole = taken(make(streaming=streaming, train_batch_size=4), 3)
    halves = [taken(make(rank=r, world_size=2, streaming=streaming, train_batch_size=2), 3) for r in range(2)]
    for expected, first, second in zip(whole, *halves, strict=True):
        assert torch.equal(torch.cat([first.clean, second.clean]), expected.clean)
        assert torch.equal(torch.cat([first.context, second.context]), expected.context)
        assert torch.equal(torch.cat([first.draws.normal(3), second.draws.normal(3)]), expected.draws.normal(3))


def test_worker_processes_change_nothing(make):
    for actual, expected in zip(taken(make(dataloader_num_workers=1), 3), taken(make(), 3), strict=True):
        assert_same_batch(actual, expected)


@STREAMING
def test_latents_and_captions_are_those_of_the_base(streaming, make, pipeline_folder, tmp_path):
    base = load_base(pipeline_folder("stable_diffusion"))
    batches = make("stable_diffusion", captions=True, streaming=streaming, base=base)
    found = {}
    for context in CONTEXTS:
        folder = tmp_path / "data-True" / context
        for line in map(json.loads, (folder / "metadata.jsonl").read_text().splitlines()):
            pixels = read_image(Image.open(folder / line["file_name"]), 3, 16)
            latents = base.encode_images(torch.from_numpy(pixels)[None].float() / 127.5 - 1)
            found[context, line["text"]] = [*found.get((context, line["text"]), []), latents[0]]
    texts = {text: base.encode_captions([text])["encoder_hidden_states"][0] for _, text in found}
    for batch in taken(batches, 4):
        hidden = batch.conditions["encoder_hidden_states"]
        for latents, mask, row in zip(batch.clean, batch.context.tolist(), hidden, strict=True):
            (text,) = [text for text, value in texts.items() if torch.allclose(value, row, atol=1e-5)]
            assert any(torch.allclose(latents, one, atol=1e-5) for one in found[MASKS[tuple(mask)], text])


class TestCacheOfLatents:
    @pytest.fixture
    def encoded(self, make, pipeline_folder):
        """A function: make batches and count the images that the VAE encoded."""

        def count(name="stable_diffusion", spoil=None, **changes):
            base = load_base(pipeline_folder(name))
            if spoil is not None:
                spoil(base.pipe.vae)
            rows = []
            base.pipe.vae.encoder.register_forward_hook(lambda module, args, output: rows.append(len(args[0])))
            batches = make(name, base=base, **changes)
            return sum(rows) - 1, taken(batches, 3)  # one is encoded for its shape

        return count

    def test_another_run_finds_them(self, encoded):
        first, expected = encoded()
        second, found = encoded(seed=0, learning_rate=1.0)
        assert (first, second) == (12, 0)
        for actual, batch in zip(found, expected, strict=True):
            assert_same_batch(actual, batch)

    def test_other_images_in_the_same_files_are_encoded_anew(self, encoded, tmp_path):
        _, before = encoded()
        for path in (tmp_path / "data-False").rglob("*.png"):
            Image.fromarray(255 - np.asarray(Image.open(path))).save(path)
        count, after = encoded()
        assert count == 12
        assert not torch.equal(before[0].clean, after[0].clean)

    def test_another_autoencoder_encodes_anew(self, encoded):
        """Also one in the same folder, after training it further."""
        encoded()

        def change(vae):
            with torch.no_grad():
                vae.encoder.conv_in.bias[0] += 1

        assert encoded(spoil=change)[0] == 12
        assert encoded(spoil=lambda vae: vae.register_to_config(scaling_factor=0.5))[0] == 12

    def test_another_column_of_the_same_rows_is_encoded_anew(self, pipeline_folder, tmp_path):
        base, columns = load_base(pipeline_folder("stable_diffusion")), {"context": ["", "slant", "thick"]}
        for name, level in (("dark", 0), ("light", 255)):
            columns[name] = [Image.new("RGB", (16, 16), (level,) * 3)] * 3
        rows = Dataset.from_dict(columns)
        for name, level in (("dark", -1.0), ("light", 1.0)):
            arguments = TrainingArguments(**settings("base", "data", tmp_path / "out", resolution=16))
            data = from_dataset(rows, content_column=name)
            (batch,) = taken(DenoiserBatches(base, data, arguments, 1, torch.device("cpu")), 1)
            expected = base.encode_images(torch.full((1, 3, 16, 16), level))
            torch.testing.assert_close(batch.clean, expected.expand(3, -1, -1, -1), rtol=1e-4, atol=1e-5)

    def test_other_resolutions_are_encoded_anew(self, encoded):
        encoded()
        assert encoded(resolution=32)[0] == 12


def test_captions_are_encoded_once(make, pipeline_folder):
    base = load_base(pipeline_folder("stable_diffusion"))
    seen, encode = [], base.encode_captions
    base.encode_captions = lambda captions: seen.extend(captions) or encode(captions)
    taken(make("stable_diffusion", captions=True, base=base), 8)
    assert sorted(seen) == sorted(f"a {context} {i}" for context in CONTEXTS for i in range(2))


def test_captions_of_a_stream_are_not_kept(make, pipeline_folder):
    batches = make("stable_diffusion", captions=True, streaming=True, train_batch_size=2)
    taken(batches, 8)
    assert len(batches._captions) <= 2


@STREAMING
def test_captions_of_different_lengths_join_with_zeros_after_them(streaming, make, pipeline_folder, monkeypatch):
    monkeypatch.setattr(batches_module, "ENCODED_AT_ONCE", 1)  # each caption in a call of its own, with its own length
    base = load_base(pipeline_folder("stable_diffusion"))
    lengths = {f"a {context} {i}": 2 * len(context) + i for context in CONTEXTS for i in range(2)}

    def encode(captions):
        (text,) = captions
        row = torch.full((1, lengths[text]), float(lengths[text]))
        return {"hidden": row[..., None].repeat(1, 1, 2), "mask": row > 0, "pooled": row[:, 0]}

    base.encode_captions = encode
    batches = make("stable_diffusion", captions=True, streaming=streaming, base=base)
    for batch in (*taken(batches, 2), batches.few("thick", 4)):
        hidden, mask, pooled = (batch.conditions[name] for name in ("hidden", "mask", "pooled"))
        expected = pooled.int().tolist()
        assert len(set(expected)) > 1
        assert [n // 2 for n in expected] == [len(MASKS[tuple(row)]) for row in batch.context.tolist()]
        assert mask.sum(1).tolist() == expected
        assert hidden.shape == (len(expected), max(expected), 2)
        assert mask.dtype == torch.bool
        for row, kept, length in zip(hidden, mask, expected, strict=True):
            assert kept[:length].all()
            assert (row[:length] == length).all()
            assert (row[length:] == 0).all()


def test_images_without_captions_take_the_instance_prompt(make, pipeline_folder):
    base = load_base(pipeline_folder("stable_diffusion"))
    (batch,) = taken(make("stable_diffusion", base=base, instance_prompt="a digit"), 1)
    expected = base.encode_captions(["a digit"])["encoder_hidden_states"]
    torch.testing.assert_close(batch.conditions["encoder_hidden_states"], expected.expand(3, -1, -1))


@STREAMING
def test_without_captions_the_empty_prompt_is_used_and_the_run_says_so(make, pipeline_folder, streaming, capsys):
    base = load_base(pipeline_folder("stable_diffusion"))
    (batch,) = taken(make("stable_diffusion", base=base, streaming=streaming), 1)
    expected = base.encode_captions([""])["encoder_hidden_states"]
    torch.testing.assert_close(batch.conditions["encoder_hidden_states"], expected.expand(3, -1, -1))
    message = "The data has no captions: the empty prompt is used. Caption the images (of a dataset: name the"
    assert capsys.readouterr().out.startswith(message)
    for name, changes in (
        ("stable_diffusion", {"captions": True}),
        ("stable_diffusion", {"instance_prompt": "a digit"}),
        ("stable_diffusion", {"rank": 1, "world_size": 2}),
        ("ddpm", {}),
    ):
        make(name, streaming=streaming, **changes)
        assert capsys.readouterr().out == ""


def test_captions_and_an_instance_prompt_exclude_each_other(make):
    message = "--instance_prompt='a digit' captions images that have no captions, but the data has some. Leave one of"
    with pytest.raises(ValueError, match=message):
        make("stable_diffusion", captions=True, instance_prompt="a digit")


def test_images_are_upright_gray_and_cut_to_the_middle():
    pixels = np.zeros((8, 16, 3), dtype=np.uint8)
    pixels[:, 4:12] = 255
    assert read_image(Image.fromarray(pixels), 1, 8).tolist() == [[[255] * 8] * 8]
    pixels[:, 4:8, 1:] = 0
    image = Image.fromarray(pixels)
    exif = image.getexif()
    exif[0x0112] = 6  # turned by a quarter when it was taken
    turned = read_image(image, 3, 8)
    assert turned.shape == (3, 8, 8)
    assert turned[1, 0].tolist() == [0] * 8
    assert turned[1, 7].tolist() == [255] * 8


def test_weights_of_contexts(make):
    assert parse_weights([], "obs") == {}
    assert parse_weights(["obs=2", "thick+slant=0.5", "thick=0.5=3"], "obs") == {
        "": 2,
        "slant+thick": 0.5,
        "thick=0.5": 3,
    }
    batches = taken(make(context_weights=["obs=2"], train_batch_size=4), 5)
    for batch in batches:
        assert sorted(MASKS[tuple(row)] for row in batch.context.tolist()) == ["obs", "obs", "slant", "thick"]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (["obs"], "--context_weights 'obs' must be a context and a number, such as obs=2"),
        (["thick+slant=2", "slant+thick=3"], r"--context_weights has 'slant\+thick' twice. Leave one of them"),
        (["obs=many"], "--context_weights 'obs=many' must be"),
        (["size=2"], "--context_weights names 'size', which is not trained on. Contexts: obs, slant, thick"),
        (["obs=-1"], "must be finite numbers, none negative"),
        (["obs=nan"], "must be finite numbers, none negative"),
        (["obs=0", "thick=0", "slant=0"], "not all zero"),
    ],
)
@STREAMING
def test_bad_weights_are_refused_before_training(weights, message, streaming, make):
    with pytest.raises(ValueError, match=message):
        make(context_weights=weights, streaming=streaming)
