"""Images in several contexts, and grids of them."""

import math

import numpy
import pytest
import torch
from peft import get_peft_model

from hf_causal_context import CausalContextConfig, intervene
from hf_causal_context.bases.images import image_grid
from hf_causal_context.bases.loading import load_base
from hf_causal_context.inference.sampling import generate

from .tiny_pipelines import EVERY, projection, side

CONTEXTS = [(), ("thick",), {"thick": 1.0, "slant": -0.5}]
SEEDS = [3, 1, 2]
CLOSE = {"rtol": 1e-3, "atol": 1e-3}
ALL = pytest.mark.parametrize("name", EVERY)


@pytest.fixture
def adapted(pipeline_folder):
    def load(name):
        base = load_base(pipeline_folder(name))
        config = CausalContextConfig(
            concepts=("thick", "slant"),
            target_modules=["to_q", "to_v", projection(base)],
            init_weights=False,
            alpha=8.0,
            observational_rank=0,
        )
        get_peft_model(base.denoiser, config)
        return base

    return load


def options(base, **changes):
    given = {"seeds": SEEDS, "num_inference_steps": 2}
    if base.takes_classes:
        given["class_label"] = 3
    if base.takes_captions:
        given |= {"prompt": "a cat", "resolution": side(base)}
    if base.takes_guidance:
        given["guidance_scale"] = 2.0
    return given | changes


@ALL
def test_seeds_give_the_same_images_however_they_are_batched(name, adapted):
    base = adapted(name)
    base.denoiser.train()
    mixed = generate(base, CONTEXTS, **options(base, batch_size=5))
    assert base.denoiser.training
    assert [row.shape for row in mixed] == [(3, base.image_channels, side(base), side(base))] * 3
    assert all(row.min() >= 0 and row.max() <= 1 for row in mixed)
    for row, context in zip(mixed, CONTEXTS, strict=True):
        (alone,) = generate(base.pipe, [context], **options(base, seeds=SEEDS[:2], batch_size=1))
        torch.testing.assert_close(row[:2], alone, **CLOSE)
    assert (mixed[0] - mixed[1]).abs().max() > 1e-2
    assert (mixed[1] - mixed[2]).abs().max() > 1e-2
    assert (mixed[0][0] - mixed[0][1]).abs().max() > 1e-2


def test_where_memory_does_not_suffice_batches_are_smaller(adapted):
    base, rows = adapted("ddpm"), []
    expected = generate(base, CONTEXTS, **options(base))

    def no_room(module, args):
        rows.append(len(args[0]))
        if rows[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    full = base.denoiser.register_forward_pre_hook(no_room)
    with pytest.warns(UserWarning, match="Memory does not suffice") as warned:
        made = generate(base, CONTEXTS, **options(base))
    full.remove()
    expected_words = "Memory does not suffice for {} images at once: trying {}."
    assert [str(each.message) for each in warned] == [expected_words.format(8, 4), expected_words.format(4, 2)]
    assert rows == [8, 4] + [2, 2] * 4 + [1, 1]  # two steps each
    for row, other in zip(made, expected, strict=True):
        torch.testing.assert_close(row, other, **CLOSE)
    base.denoiser.register_forward_pre_hook(lambda module, args: no_room(module, [args[0].repeat(3, 1, 1, 1)]))
    with pytest.warns(UserWarning, match="trying"), pytest.raises(torch.OutOfMemoryError):
        generate(base, CONTEXTS, **options(base))


def test_images_that_would_be_black_are_a_warning(adapted):
    base = adapted("ddpm")

    def spoil(module, args, output):
        output.sample.fill_(torch.nan)

    base.denoiser.register_forward_hook(spoil)
    with pytest.warns(UserWarning, match="Images hold NaN or infinite values, and are black there. In float16 some"):
        (made,) = generate(base, [()], **options(base))
    assert made.isnan().all()


def test_images_are_those_of_the_pipeline(adapted):
    base = adapted("stable_diffusion")
    base.denoiser.eval()
    (ours,) = generate(base, ["thick"], **options(base, seeds=[7]))
    with intervene(base.denoiser, "thick"):
        theirs = base.pipe(
            "a cat",
            generator=torch.Generator().manual_seed(7),
            num_inference_steps=2,
            guidance_scale=2.0,
            output_type="pt",
        ).images
    torch.testing.assert_close(ours, theirs)


def test_class_labels_matter_and_leave_nothing_behind(adapted):
    base = adapted("ddpm_classes")
    hooks = len(base.denoiser._forward_pre_hooks)
    (one,), (other,) = (generate(base, [()], **options(base, class_label=label)) for label in (1, 4))
    assert (one - other).abs().max() > 1e-3
    assert len(base.denoiser._forward_pre_hooks) == hooks


def test_the_mode_and_the_progress_bar_come_back_after_an_error(adapted, monkeypatch, capfd):
    base = adapted("ddpm")
    base.denoiser.train()
    base.pipe.set_progress_bar_config(leave=True)
    capfd.readouterr()
    generate(base, [()], **options(base))
    assert "it/s" not in capfd.readouterr().err
    monkeypatch.setattr(base.pipe.scheduler, "step", None)
    with pytest.raises(TypeError, match="callable"):
        generate(base, [()], **options(base))
    assert base.denoiser.training
    assert base.pipe._progress_bar_config == {"leave": True}


def test_a_base_without_an_adapter_knows_the_observational_context_only(pipeline_folder):
    base = load_base(pipeline_folder("ddpm"))
    (images,) = generate(base, [()], **options(base))
    assert images.shape == (3, 1, 16, 16)
    with pytest.raises(ValueError, match="No component of DDPMPipeline has a causal context adapter"):
        generate(base, [(), "thick"], **options(base))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("ddpm", {"prompt": "a cat"}, "prompt='a cat' was given, but DDPMPipeline takes no captions"),
        ("ddpm", {"class_label": 1}, "class_label=1 was given, but this base has no classes"),
        ("ddpm", {"guidance_scale": 2.0}, "guidance_scale=2.0 was given, but DDPMPipeline has no guidance"),
        ("flux", {"guidance_scale": math.nan}, "guidance_scale=nan must be a finite number"),
        ("flux", {"resolution": 0}, "resolution=0 must be at least 1"),
        ("ddpm", {"resolution": 32}, "resolution=32 was given, but DDPMPipeline generates 16 pixels only"),
        ("flux", {"resolution": 18}, "resolution=18 was given, but FluxPipeline needs a multiple of 4"),
        ("ddpm_classes", {"class_label": None}, "class_label=None, but this base is conditioned on classes 0 to 4"),
        ("ddpm_classes", {"class_label": 5}, "class_label=5, but this base is conditioned on classes 0 to 4"),
        ("ddpm", {"seeds": []}, "Nothing to generate: 1 contexts, 0 seeds, batch_size=8"),
        ("ddpm", {"num_inference_steps": 0}, "num_inference_steps=0 must be at least 1"),
        (
            "ddpm",
            {"num_inference_steps": 1001},
            "=1001, but the base was trained with 1000 levels of noise, .*Lower it",
        ),
        ("ddpm", {"batch_size": 0}, "batch_size=0. Give at least one of each"),
    ],
)
def test_arguments_that_do_not_fit(name, changes, message, pipeline_folder):
    base = load_base(pipeline_folder(name))
    with pytest.raises(ValueError, match=message):
        generate(base, [()], **options(base, **changes))


def test_one_context_is_no_sequence_and_names_are_checked(adapted):
    base = adapted("ddpm")
    with pytest.raises(TypeError, match="contexts='thick' is a single context. Pass a list of contexts"):
        generate(base, "thick", **options(base))
    with pytest.raises(TypeError, match="seeds=3 is a single seed. Pass a list of seeds"):
        generate(base, ["thick"], **options(base, seeds=3))
    with pytest.raises(ValueError, match="Unknown concept 'large'"):
        generate(base, [("thick", "large")], **options(base))


@pytest.mark.parametrize("channels", [1, 3])
def test_grid_enlarges_images_and_keeps_their_values(channels):
    rows = [torch.rand(3, channels, 16, 16), torch.rand(2, channels, 16, 16)]
    grid = image_grid(rows, ["observational", "thick+slant=-0.5"])
    left = grid.width - 3 * 68
    assert grid.height == 2 * 68 + 4
    pixels = torch.from_numpy(numpy.array(grid))
    shown = pixels[72:136:4, left + 68 : left + 132 : 4]  # the second image of the second row
    expected = (rows[1][1] * 255).round().int().expand(3, -1, -1).permute(1, 2, 0)
    assert torch.equal(shown.int(), expected)
    for i in range(2):  # both labels are written, and stay in their column
        assert (pixels[i * 68 + 4 : i * 68 + 68, : left - 4] < 128).any()
    assert (pixels[:, left - 4 : left] == 255).all()
    assert image_grid(rows, ["a", "b"], scale=2).height == 2 * 36 + 4


@pytest.mark.parametrize(
    ("shapes", "labels"),
    [
        ([(2, 1, 8, 8)], []),
        ([(2, 2, 8, 8)], ["a"]),
        ([(1, 8, 8)], ["a"]),
        ([(2, 1, 8, 8), (2, 1, 9, 8)], ["a", "b"]),
        ([], []),
    ],
)
def test_rows_that_make_no_grid(shapes, labels):
    with pytest.raises(ValueError, match="make no grid. Give one label for each row"):
        image_grid([torch.zeros(shape) for shape in shapes], labels)
