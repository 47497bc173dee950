"""Mirrored images: half of the samples, by their own chance, and none of a concept that a mirror would change."""

from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image

from hf_causal_context.bases.diffusion_base import DiffusionBase
from hf_causal_context.bases.loading import load_base
from hf_causal_context.contexts import ConceptSet
from hf_causal_context.data import load_folders
from hf_causal_context.training.arguments import TrainingArguments
from hf_causal_context.training.denoiser.batches import DenoiserBatches
from hf_causal_context.training.denoiser.flips import Flips

from .small import settings, write_folders

pytestmark = pytest.mark.usefixtures("on_cpu")
CONCEPTS = ConceptSet(("slant", "thick"))
SLOTS = range(2000)


@pytest.fixture
def root(tmp_path):
    return write_folders(tmp_path / "data")


@pytest.fixture
def given(pipeline_folder, root, tmp_path):
    """A function: the settings of a run with mirrored images."""

    def given(name="ddpm", **changes):
        changes = {"resolution": 16, "train_batch_size": 4, "random_flip": True, **changes}
        return TrainingArguments(**settings(pipeline_folder(name), root, tmp_path / "out", **changes))

    return given


@pytest.fixture
def make(given, root):
    def make(name="ddpm", rank=0, world_size=1, **changes):
        arguments = given(name, **changes)
        data = load_folders(root, streaming=arguments.streaming, concepts=CONCEPTS)
        base = load_base(arguments.pretrained_model_name_or_path)
        return DenoiserBatches(base, data, arguments, 20, torch.device("cpu"), rank, world_size)

    return make


def images(root, base):
    """Number of the file -> its pixels in [-1, 1], of all contexts."""
    mode = "L" if base.image_channels == 1 else "RGB"
    for path in sorted(root.rglob("*.png")):
        pixels = torch.tensor(np.asarray(Image.open(path).convert(mode))).reshape(16, 16, -1).permute(2, 0, 1)
        yield pixels.float() / 127.5 - 1


def found(batches, root, count=10, start=0):
    """For each sample: its context, and whether it is mirrored; and that it is one of the images, or its mirror."""
    base = batches._base
    originals = torch.stack(list(images(root, base)))
    encoded = torch.stack([base.encode_images(originals), base.encode_images(originals.flip(3))])
    seen = []
    for batch in islice(batches(start), count):
        for clean, context in zip(batch.clean, batch.context.tolist(), strict=True):
            (where,) = torch.nonzero(((encoded - clean).abs() < 1e-4).flatten(2).all(2)).tolist()
            seen.append((tuple(context), bool(where[0])))
    return seen


def test_half_of_the_samples_are_mirrored(given):
    flips = Flips(given(), CONCEPTS)(["thick"] * len(SLOTS), SLOTS)
    assert sum(flips) / len(SLOTS) == pytest.approx(0.5, abs=0.03)
    assert not any(Flips(given(random_flip=False), CONCEPTS)(["thick"] * len(SLOTS), SLOTS))


@pytest.mark.parametrize(("name", "streaming"), [("ddpm", False), ("ddpm", True), ("stable_diffusion", False)])
def test_samples_are_images_or_their_mirrors_encoded(name, streaming, make, root):
    seen = found(make(name, streaming=streaming), root)
    assert {flipped for _, flipped in seen} == {True, False}
    assert found(make(name, streaming=streaming), root, 4, start=6) == seen[24:]
    halves = [
        found(make(name, rank, 2, streaming=streaming, train_batch_size=2), root, count=6, start=2) for rank in range(2)
    ]
    for batch in range(6):
        own = slice(2 * batch, 2 * batch + 2)
        assert halves[0][own] + halves[1][own] == seen[4 * batch + 8 : 4 * batch + 12]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_concept_that_a_mirror_changes_is_never_mirrored(streaming, make, root):
    seen = found(make(streaming=streaming, flip_changes=["slant"]), root, 20)
    assert {context for context, flipped in seen if flipped} == {(0.0, 0.0), (0.0, 1.0)}
    assert {context for context, _ in seen} == {(0.0, 0.0), (0.0, 1.0), (1.0, 0.0)}
    flips = Flips(make(flip_changes=["slant"])._arguments, CONCEPTS)
    assert not any(flips(["slant+thick"] * 100 + ["slant=0.5"] * 100, range(200)))


def test_noise_and_order_are_those_of_a_run_without_mirrors(make):
    for actual, expected in islice(zip(make()(0), make(random_flip=False)(0), strict=True), 5):
        assert torch.equal(actual.draws.normal(3), expected.draws.normal(3))
        assert torch.equal(actual.context, expected.context)


def test_worker_processes_mirror_the_same(make):
    for actual, expected in islice(zip(make(dataloader_num_workers=1)(0), make()(0), strict=True), 5):
        assert torch.equal(actual.clean, expected.clean)


def test_rows_that_are_measured_are_as_they_are(make, root):
    batches = make("stable_diffusion")
    rows = batches.few("thick", 4)
    expected = batches._base.encode_images(torch.stack(list(images(root, batches._base))[8:]))
    torch.testing.assert_close(rows.clean, expected, atol=1e-5, rtol=1e-4)


def test_latents_of_both_are_kept_for_another_run(make, monkeypatch):
    make("stable_diffusion")
    counts, encode = [], DiffusionBase.encode_images
    monkeypatch.setattr(DiffusionBase, "encode_images", lambda self, x: counts.append(len(x)) or encode(self, x))
    make("stable_diffusion")
    assert counts == [1, 1]  # for their shapes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"flip_changes": ["size"]}, "--flip_changes names 'size', which is no concept. Concepts: 'slant', 'thick'."),
        ({"flip_changes": ["slant", "thick"]}, "--flip_changes names all concepts, 'slant', 'thick': only images"),
        ({"flip_changes": ["thick"], "random_flip": False}, "--random_flip was not given, so --flip_changes"),
    ],
)
def test_bad_settings_are_refused(changes, message, make):
    with pytest.raises(ValueError, match=message):
        make(**changes)
