"""Aspect-ratio buckets: images keep their shape, batches have one, and all else is as without them."""

import io
import math
import shutil
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image

from hf_causal_context.bases.diffusion_base import DiffusionBase
from hf_causal_context.bases.families import FAMILIES
from hf_causal_context.bases.images import read_image
from hf_causal_context.bases.loading import load_base
from hf_causal_context.data import ContextSampler, load_folders
from hf_causal_context.training.arguments import TrainingArguments
from hf_causal_context.training.denoiser.batches import DenoiserBatches
from hf_causal_context.training.denoiser.buckets import BucketSampler, bucket_sizes, nearest_bucket, upright_sizes
from hf_causal_context.training.denoiser.objectives import denoising_objective
from hf_causal_context.training.finetune import train
from hf_causal_context.training.noise import Draws
from hf_causal_context.training.recipe import attach_adapter

from .small import CONTEXTS, adapter_weights, assert_close_to_largest, settings
from .tiny_pipelines import PIPELINES

pytestmark = pytest.mark.usefixtures("on_cpu")
CPU = torch.device("cpu")
SHAPES = {(16, 16): 4, (30, 10): 4, (8, 8): 2, (9, 27): 2}  # of images in each folder; their buckets:
BUCKETS = {(16, 16): 6, (24, 8): 4, (8, 24): 2}


def write_shapes(root, shapes=SHAPES):
    generator = np.random.default_rng(0)
    for context in CONTEXTS:
        (root / context).mkdir(parents=True)
        for shape, count in shapes.items():
            for number in range(count):
                pixels = generator.integers(0, 256, (*shape[::-1], 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / context / f"{shape[0]}-{shape[1]}-{number}.png")
    return root


@pytest.fixture
def root(tmp_path):
    return write_shapes(tmp_path / "data")


@pytest.fixture
def given(pipeline_folder, root, tmp_path):
    def given(name="stable_diffusion", root=root, **changes):
        changes = {"resolution": 16, "train_batch_size": 3, "aspect_ratio_buckets": True, **changes}
        return TrainingArguments(**settings(pipeline_folder(name), root, tmp_path / "out", **changes))

    return given


@pytest.fixture
def make(given):
    def make(name="stable_diffusion", rank=0, world_size=1, base=None, **changes):
        arguments = given(name, **changes)
        base = base or load_base(arguments.pretrained_model_name_or_path)
        data = load_folders(arguments.train_data_dir)
        return DenoiserBatches(base, data, arguments, 40, CPU, rank, world_size)

    return make


class TestSizes:
    @pytest.mark.parametrize(("resolution", "multiple"), [(512, 8), (1024, 16), (520, 8), (768, 16), (256, 32)])
    def test_they_have_about_the_area_and_sides_that_the_base_takes(self, resolution, multiple):
        sizes = bucket_sizes(resolution, multiple)
        assert (resolution, resolution) in sizes
        assert all((height, width) in sizes for width, height in sizes)
        assert all(side % multiple == 0 for size in sizes for side in size)
        areas = [width * height / resolution**2 for width, height in sizes]
        assert min(areas) > 0.87
        assert max(areas) < 1.13
        assert max(width / height for width, height in sizes) == pytest.approx(4, rel=0.04)

    def test_an_image_loses_little_in_the_nearest(self):
        sizes = bucket_sizes(512, 8)
        for ratio in np.geomspace(0.25, 4, 200):
            width, height = sizes[nearest_bucket((round(1000 * ratio), 1000), sizes)]
            kept = math.exp(-abs(math.log(width / height / ratio)))
            assert kept > 0.93
        assert sizes[nearest_bucket((3000, 3000), sizes)] == (512, 512)
        assert sizes[nearest_bucket((9000, 10), sizes)] == (1024, 256)

    def test_sizes_are_of_upright_images_in_files_and_in_bytes(self, tmp_path):
        image = Image.new("RGB", (6, 4))
        exif = image.getexif()
        exif[0x0112] = 6
        image.save(tmp_path / "a.jpg", exif=exif)
        image.save(tmp_path / "b.png")
        held = io.BytesIO()
        Image.new("L", (3, 9)).save(held, "png")
        values = [{"path": str(tmp_path / name), "bytes": None} for name in ("a.jpg", "b.png")]
        values.append({"path": None, "bytes": held.getvalue()})
        rows = Dataset.from_dict({"image": values}).cast_column("image", ImageFeature())
        assert list(upright_sizes(rows, "image")) == [(4, 6), (6, 4), (3, 9)]


class TestSampler:
    CONTEXTS = ("", "a", "b")

    @pytest.fixture
    def rows(self):
        """Contexts and buckets of rows: the second bucket lacks "b", the third has nothing else."""
        counts = {("", 0): 8, ("a", 0): 4, ("b", 0): 8, ("", 1): 2, ("a", 1): 6, ("b", 2): 2}
        pairs = [pair for pair, count in counts.items() for _ in range(count)]
        np.random.default_rng(0).shuffle(pairs)
        return np.array([int(bucket) for _, bucket in pairs]), [context for context, _ in pairs]

    @staticmethod
    def sampler(rows, size=4, num=400, start=0, rank=0, world_size=1, weights=None, num_observational=0):
        return BucketSampler(*rows, size, 0, num, start, rank, world_size, weights or {}, num_observational)

    def test_a_batch_is_of_one_bucket(self, rows):
        seen = {frozenset(rows[0][batch].tolist()) for batch in self.sampler(rows)}
        assert seen == {frozenset({0}), frozenset({1}), frozenset({2})}

    @pytest.mark.parametrize("weights", [{}, {"": 2.0, "b": 0.5}])
    def test_contexts_and_their_rows_come_as_often_as_without_buckets(self, weights, rows):
        drawn = Counter(row for batch in self.sampler(rows, num=3000, weights=weights) for row in batch)
        of_context = Counter(rows[1])
        whole = sum(weights.get(context, 1) for context in self.CONTEXTS)
        for row, context in enumerate(rows[1]):
            expected = weights.get(context, 1) / whole / of_context[context]
            assert drawn[row] / 12000 == pytest.approx(expected, rel=0.02), (row, context)

    def test_strengths_share_the_share_of_their_concept_as_without_buckets(self):
        contexts = ["", "slant", "thick", "thick=0.25", "thick=0.5", "thick=0.75"] * 6
        buckets = np.arange(len(contexts)) // 6 % 2
        drawn = Counter(contexts[row] for batch in self.sampler((buckets, contexts), num=600) for row in batch)
        shares = {context: count / 2400 for context, count in drawn.items()}
        strengths = dict.fromkeys(contexts[2:6], pytest.approx(1 / 12, rel=0.02))
        assert shares == {"": pytest.approx(1 / 3, rel=0.02), "slant": pytest.approx(1 / 3, rel=0.02)} | strengths

    def test_the_batches_of_a_bucket_are_those_of_a_run_on_it_alone(self, rows):
        buckets, contexts = rows
        for bucket in range(3):
            own = np.flatnonzero(buckets == bucket)
            here = [contexts[row] for row in own]
            shares = {c: here.count(c) / contexts.count(c) for c in {*here}}
            alone = iter(ContextSampler(here, 4, 0, 400, weights=shares))
            batches = [batch for batch in self.sampler(rows) if buckets[batch[0]] == bucket]
            assert batches == [own[next(alone)].tolist() for _ in batches]

    def test_resumed_runs_and_several_processes_draw_the_same(self, rows):
        given = {"num_observational": 24, "weights": {"a": 2.0}}
        whole = list(self.sampler(rows, **given))
        assert list(self.sampler(rows, start=5, **given)) == whole[5:]
        halves = [list(self.sampler(rows, size=2, rank=rank, world_size=2, **given)) for rank in range(2)]
        assert [first + second for first, second in zip(*halves, strict=True)] == whole

    def test_the_first_samples_are_observational(self, rows):
        buckets, contexts = rows
        batches = list(self.sampler(rows, num_observational=40))
        first = [row for batch in batches[:10] for row in batch]
        assert {contexts[row] for row in first} == {""}
        assert all(len({*buckets[batch].tolist()}) == 1 for batch in batches)
        assert Counter(buckets[batch[0]] for batch in batches[:10]) == {0: 8, 1: 2}
        later = [{contexts[row] for row in batch} for batch in batches[10:] if buckets[batch[0]] == 0]
        assert all({"", "b"} <= seen for seen in later)
        in_square = [row for batch in batches if buckets[batch[0]] == 0 for row in batch if contexts[row] == ""]
        assert sorted(in_square[8:16]) == sorted(in_square[:8])  # each once before any again


def test_every_image_is_read_at_the_size_of_its_bucket_and_every_batch_has_all_contexts(make, root):
    batches = make(train_batch_size=6)
    expected, contexts = {}, {}
    sizes = bucket_sizes(16, 8)
    for path in sorted(root.rglob("*.png")):
        image = Image.open(path)
        size = sizes[nearest_bucket(image.size, sizes)]
        pixels = torch.from_numpy(read_image(image, 3, size).copy())[None].float() / 127.5 - 1
        expected.setdefault(size, []).append(batches._base.encode_images(pixels)[0])
        contexts.setdefault(size, []).append(path.parent.name)
    assert {size: len(latents) for size, latents in expected.items()} == {s: 3 * n for s, n in BUCKETS.items()}
    seen = Counter()
    for batch in islice(batches(0), 18):
        height, width = (2 * side for side in batch.clean.shape[2:])
        assert len(batch.context.unique(dim=0)) == 3
        for clean, mask in zip(batch.clean, batch.context.tolist(), strict=True):
            found = [i for i, one in enumerate(expected[width, height]) if torch.allclose(one, clean, atol=1e-4)]
            assert len(found) == 1
            assert contexts[width, height][found[0]] == {(0, 0): "obs", (1, 0): "slant", (0, 1): "thick"}[tuple(mask)]
            seen[width, height, found[0]] += 1
    assert set(seen.values()) == {3}  # of 36 rows, each in every epoch of 6 batches


@pytest.mark.parametrize("name", ["stable_diffusion", "stable_diffusion_3"])
def test_a_run_in_buckets_has_the_sum_of_its_buckets_gradients(name, make, root, tmp_path):
    whole = make(name)
    base, arguments = whole._base, whole._arguments
    torch.manual_seed(0)
    model = attach_adapter(base.denoiser, whole._data, arguments)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    objective = denoising_objective(base)
    num = 6

    def gradient(batches):
        model.zero_grad()
        for batch in batches:
            (objective(model, batch).mean() / num).backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}

    batches = list(islice(whole(0), num))
    shapes = [tuple(batch.clean.shape[2:]) for batch in batches]
    assert len({*shapes}) == 3
    actual = gradient(batches)
    total = {}
    for shape in {*shapes}:
        own_root = tmp_path / f"{shape[0]}-{shape[1]}"
        shutil.copytree(root, own_root)
        sizes = bucket_sizes(16, base.size_multiple)
        for path in own_root.rglob("*.png"):
            if sizes[nearest_bucket(Image.open(path).size, sizes)] != (2 * shape[1], 2 * shape[0]):
                path.unlink()
        own = make(name, base=base, root=own_root)(0)
        alone = []
        for number, other in enumerate(shapes):
            if other == shape:
                batch = next(own)
                assert torch.equal(batch.clean, batches[number].clean)
                batch.draws = Draws(arguments.seed, range(3 * number, 3 * number + 3))
                alone.append(batch)
        for n, tensor in gradient(alone).items():
            total[n] = total.get(n, 0) + tensor
    fresh = list(islice(whole(0), num))
    assert_close_to_largest(gradient(fresh), actual)
    assert_close_to_largest(total, actual)


def test_latents_of_all_buckets_are_kept_for_another_run(make, monkeypatch):
    make()
    counts, encode = [], DiffusionBase.encode_images
    monkeypatch.setattr(DiffusionBase, "encode_images", lambda self, x: counts.append(len(x)) or encode(self, x))
    make()
    assert counts == [1, 1, 1]  # for their shapes
    make(train_batch_size=2)
    assert counts == [1] * 6


def test_rows_that_are_measured_are_squares(make):
    assert make().few("thick", 12).clean.shape == (12, 4, 8, 8)


def test_the_run_says_what_is_in_each_bucket(make, root, capsys):
    for path in (root / "thick").glob("9-27-*"):
        path.unlink()
    make(train_batch_size=5)
    output = capsys.readouterr().out
    assert "  16 x 16: 18 images\n" in output
    assert "  8 x 24: 4 images; less than a batch, so it repeats them; none of 'thick', whose difference" in output
    make(rank=1, world_size=2)
    assert "16 x 16" not in capsys.readouterr().out


ANY_SIZE = [name for name, pipe in PIPELINES.items() if not FAMILIES[type(pipe()).__name__].fixed_size]


@pytest.mark.parametrize("name", ANY_SIZE)
def test_every_family_of_any_size_learns_from_all_shapes(name, make, pipeline_folder):
    base = load_base(pipeline_folder(name))
    batches = make(name, base=base, resolution=2 * base.size_multiple)
    model = attach_adapter(base.denoiser, batches._data, batches._arguments)
    objective, shapes = denoising_objective(base), set()
    for batch in islice(batches(0), 6):
        shapes.add(tuple(batch.clean.shape[2:]))
        losses = objective(model, batch)
        assert losses.isfinite().all()
    losses.mean().backward()
    assert len(shapes) > 1


def test_a_resumed_run_with_all_of_it_ends_like_one_that_was_not_interrupted(given, root, tmp_path):
    for context in CONTEXTS:
        mask = np.zeros((10, 30), dtype=np.uint8)
        mask[:, 10:20] = 255
        Image.fromarray(mask).save(root / context / "30-10-0.mask.png")
    changes = {"random_flip": True, "flip_changes": ["slant"], "instance_prompt": "a, b", "caption_dropout": 0.3}
    changes |= {"shuffle_tags": True, "max_train_steps": 6, "checkpointing_steps": 3, "observational_steps": 1}
    whole = train(given(**changes))
    shutil.copytree(whole, tmp_path / "whole")
    shutil.rmtree(whole / "checkpoint-6")
    train(given(**changes, resume_from_checkpoint="latest"))
    expected = adapter_weights(tmp_path / "whole")
    for name, tensor in adapter_weights(whole).items():
        assert torch.equal(tensor, expected[name]), name


def test_a_resumed_run_has_as_many_batches_in_a_step(given):
    """Each is of one bucket: otherwise cut, the step would have other rows."""
    changes = {"train_batch_size": 2, "gradient_accumulation_steps": 1, "max_train_steps": 1, "checkpointing_steps": 1}
    train(given(**changes))
    changes |= {"train_batch_size": 1, "gradient_accumulation_steps": 2, "max_train_steps": 2}
    with pytest.raises(ValueError, match="'2 x 1 x 1' then, '1 x 2 x 1' now"):
        train(given(**changes, resume_from_checkpoint="latest"))


def test_dry_runs_read_in_buckets_and_keep_nothing(given, tmp_path, capsys):
    train(given(dry_run=True))
    output = capsys.readouterr().out
    assert "  24 x 8: 12 images\n" in output
    assert "Time: " in output
    assert not list((tmp_path / "cache").rglob("latents-*"))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("ddpm", {}, "needs a base of any size, and DDPMPipeline generates 16 x 16 pixels only. Leave it out."),
        ("stable_diffusion", {"streaming": True}, "looks at the sizes of all images first, which a stream does not"),
    ],
)
def test_bases_of_one_size_and_streams_are_refused(name, changes, message, make):
    with pytest.raises(ValueError, match=message):
        make(name, **changes)
