"""Losses weighted by masks: the mean over what a mask shows, at the size of what is trained on."""

from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image

from hf_causal_context.bases.loading import as_base, load_base
from hf_causal_context.data import load_folders
from hf_causal_context.training.arguments import TrainingArguments
from hf_causal_context.training.autoencoder.arguments import AutoencoderArguments
from hf_causal_context.training.autoencoder.train import train_autoencoder
from hf_causal_context.training.denoiser.batches import DenoiserBatches
from hf_causal_context.training.denoiser.objectives import Batch, denoising_objective
from hf_causal_context.training.few_rows import part_of
from hf_causal_context.training.finetune import train
from hf_causal_context.training.noise import Draws

from .small import CONTEXTS, settings, write_folders
from .test_objectives import Remembering
from .tiny_pipelines import PIPELINES

pytestmark = pytest.mark.usefixtures("on_cpu")
MASK = np.zeros((16, 16), dtype=np.uint8)
MASK[:8, :6] = 255
MASK[:8, 6] = 51  # a fifth


@pytest.fixture
def root(tmp_path):
    """Folders in which every second image has the mask."""
    root = write_folders(tmp_path / "data")
    for context in CONTEXTS:
        for number in (0, 2):
            Image.fromarray(MASK).save(root / context / f"{number}.mask.png")
    return root


@pytest.fixture
def make(pipeline_folder, root, tmp_path):
    def make(name="ddpm", **changes):
        given = {"resolution": 16, "train_batch_size": 6, **changes}
        arguments = TrainingArguments(**settings(pipeline_folder(name), root, tmp_path / "out", **given))
        data = load_folders(root, streaming=arguments.streaming, concepts=("slant", "thick"))
        return DenoiserBatches(load_base(pipeline_folder(name)), data, arguments, 20, torch.device("cpu"))

    return make


@pytest.mark.parametrize("name", ["ddpm", "stable_diffusion_3"])
def test_the_loss_is_the_mean_over_the_mask(name):
    base = as_base(PIPELINES[name]())
    shape = (base.in_channels, 8, 8)
    clean, prediction = torch.randn(2, 3, *shape)
    mask = torch.zeros(3, 1, 8, 8)
    mask[0], mask[1, 0, :4, 2:], mask[2, 0, 0, 0], mask[2, 0, 7, 7] = 1, 1, 0.25, 0.75
    batch = Batch(clean, torch.zeros(3, 2), {}, Draws(1, range(3)), mask)
    objective = denoising_objective(base)
    base.predict = lambda model, noisy, *rest: prediction
    losses = objective(Remembering(prediction), batch)
    draws = Draws(1, range(3))
    _ = draws.integers(1000) if name == "ddpm" else draws.normal()  # the time
    noise = draws.normal(*shape)
    target = noise if name == "ddpm" else noise - clean
    squares = (prediction - target).square()
    by_corner = 0.25 * squares[2, :, 0, 0].mean() + 0.75 * squares[2, :, 7, 7].mean()
    expected = torch.stack([squares[0].mean(), squares[1, :, :4, 2:].mean(), by_corner])
    torch.testing.assert_close(losses, expected)


@pytest.mark.parametrize(
    ("name", "streaming"), [("ddpm", False), ("ddpm", True), ("stable_diffusion", False), ("stable_diffusion", True)]
)
def test_batches_have_the_masks_at_the_size_of_what_is_trained_on(name, streaming, make):
    scale = 1 if name == "ddpm" else 2
    masked = torch.from_numpy(MASK.astype(np.float32) / 255)[None]
    masked = masked.unflatten(1, (-1, scale)).unflatten(3, (-1, scale)).mean((2, 4))
    seen = set()
    for batch in islice(make(name, streaming=streaming)(0), 4):
        assert batch.loss_mask.shape == (6, 1, *batch.clean.shape[2:])
        for mask in batch.loss_mask:
            whole = bool((mask == 1).all())
            if not whole:
                torch.testing.assert_close(mask, masked)
            seen.add(whole)
    assert seen == {True, False}


@pytest.mark.parametrize("name", ["ddpm", "stable_diffusion"])
def test_a_mirrored_image_has_a_mirrored_mask(name, make):
    plain = {tuple(mask.flatten().tolist()) for batch in islice(make(name)(0), 6) for mask in batch.loss_mask}
    both = {
        tuple(mask.flatten().tolist())
        for batch in islice(make(name, random_flip=True)(0), 6)
        for mask in batch.loss_mask
    }
    side = 16 if name == "ddpm" else 8
    mirrored = {tuple(torch.tensor(mask).view(side, side).flip(1).flatten().tolist()) for mask in plain}
    assert len(plain) == 2
    assert both == plain | mirrored


def test_rows_that_are_measured_keep_their_masks(make):
    rows = make("stable_diffusion").few("thick", 4)
    assert rows.loss_mask.flatten(1).mean(1).tolist() == pytest.approx([0.2, 1, 0.2, 1], abs=0.02)
    part = part_of(rows, range(1, 3), Draws(0, range(2)), torch.device("cpu"))
    assert torch.equal(part.loss_mask, rows.loss_mask[1:3])


def test_without_masks_there_are_none(make, root):
    for path in root.rglob("*.mask.png"):
        path.unlink()
    batches = make("stable_diffusion")
    assert next(batches(0)).loss_mask is None
    assert batches.few("thick", 2).loss_mask is None


def test_another_mask_in_the_same_file_is_read_anew(make, root):
    make("stable_diffusion")
    for path in root.rglob("*.mask.png"):
        Image.fromarray(np.where(MASK, 0, 255).astype(np.uint8)).save(path)
    assert make("stable_diffusion").few("thick", 1).loss_mask[0, 0, 0, 0] == 0


def test_a_mask_outside_of_the_middle_square_is_refused_by_its_name(make, root):
    Image.new("RGB", (48, 16)).save(root / "thick" / "0.png")
    mask = np.zeros((16, 48), dtype=np.uint8)
    mask[:, :8] = 255
    Image.fromarray(mask).save(root / "thick" / "0.mask.png")
    message = r"the mask of .*thick/0.png is white only where the image is cut off. Cut"
    for name in ("stable_diffusion", "ddpm"):
        with pytest.raises(ValueError, match=message):
            make(name)


def test_a_run_trains_with_masks(root, pipeline_folder, tmp_path):
    given = settings(pipeline_folder("stable_diffusion"), root, tmp_path / "out", resolution=16, validation_steps=1)
    assert (train(TrainingArguments(**given)) / "adapter_model.safetensors").exists()


def test_autoencoders_refuse_them(root, tmp_path):
    with pytest.raises(ValueError, match="An autoencoder's loss has no masks. Leave --mask_column out, or take"):
        train_autoencoder(AutoencoderArguments(output_dir=str(tmp_path / "out"), train_data_dir=str(root)))
