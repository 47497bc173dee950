"""Training of ContextAutoencoder: its losses, modes, batches, resuming, early stopping and errors."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from torch import nn

from hf_causal_context import cli
from hf_causal_context.contexts import ConceptSet, Context
from hf_causal_context.models.context_autoencoder import ContextAutoencoder
from hf_causal_context.models.encoder_decoders import KLAutoencoder
from hf_causal_context.training.autoencoder.arguments import AutoencoderArguments
from hf_causal_context.training.autoencoder.images import ImageBatches, ImageSet, to_floats
from hf_causal_context.training.autoencoder.objective import (
    AutoencoderObjective,
    ImageBatch,
    TrainingMode,
    bits_per_dimension,
    squared_means,
)
from hf_causal_context.training.autoencoder.train import make_autoencoder, mean_loss, train_autoencoder
from hf_causal_context.training.loop.early_stopping import EarlyStopping
from hf_causal_context.training.loop.processes import make_accelerator
from hf_causal_context.training.loop.trainer import TrainingDivergedError

from .small import write_folders

pytestmark = pytest.mark.usefixtures("on_cpu")

CONCEPTS = ConceptSet(("dark", "tall"))
PARTS = ((), ("dark",), ("tall",), ("dark", "tall"))
WEIGHTS = "diffusion_pytorch_model.safetensors"


def images(num=10, contexts=("", "dark", "tall"), size=16):
    generator = np.random.default_rng(0)
    arrays = {
        Context.parse(name): generator.integers(0, 256 >> ("dark" in name), (num, 1, size, size), dtype=np.uint8)
        for name in contexts
    }
    return ImageSet.of_arrays(arrays, CONCEPTS)


def arguments(folder, **changes):
    given = {
        "output_dir": str(folder),
        "resolution": 16,
        "channels": 1,
        "noise_width": 3,
        "concept_width": 2,
        "train_batch_size": 6,
        "max_train_steps": 3,
        "lr_warmup_steps": 0,
        "num_validation_images": 0,
    }
    return AutoencoderArguments(**given | changes)


def autoencoder(**changes):
    torch.manual_seed(0)
    base = {"class": "LightweightVAE", "size": 16, "channels": 1}
    return ContextAutoencoder(CONCEPTS.names, base, noise_width=3, concept_width=2, **changes)


def tiny_kl():
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    widths = {"block_out_channels": (4, 8), "norm_num_groups": 2, "latent_channels": 2}
    return AutoencoderKL(in_channels=1, out_channels=1, **blocks, **widths)


def weights(folder):
    return load_file(folder / WEIGHTS)


def backbone(tensors, *, buffers):
    return {
        name: tensor
        for name, tensor in tensors.items()
        if name.startswith("backbone.") and (("running" in name or "num_batches" in name) == buffers)
    }


def differing(one, two):
    return {name for name in one if not torch.equal(one[name], two[name])}


class TestObjective:
    def batch(self, num=4):
        x = torch.rand(num, 1, 16, 16, generator=torch.Generator().manual_seed(1))
        mask = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])[:num]
        return ImageBatch(x, mask, torch.Generator().manual_seed(2))

    @pytest.mark.parametrize("reconstruction", ["bce", "gaussian"])
    def test_is_the_negative_evidence_bound(self, reconstruction):
        model, batch = autoencoder().eval(), self.batch()
        losses = AutoencoderObjective(model, reconstruction, beta=0.5)(model, batch)
        posterior = model.encode(batch.images, batch.context)
        logits = model.backbone.decode(
            model.context_module(posterior.sample(torch.Generator().manual_seed(2)), batch.context)
        )
        normal = torch.distributions.Normal(posterior.mean, (0.5 * posterior.log_variance).exp())
        kl = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).flatten(1).sum(1)
        if reconstruction == "bce":
            likelihood = torch.distributions.ContinuousBernoulli(logits=logits)
            errors = -(likelihood.log_prob(batch.images) - likelihood._cont_bern_log_norm())
        else:
            likelihood = torch.distributions.Normal(logits.sigmoid(), 0.1)
            errors = -likelihood.log_prob(batch.images) + likelihood.log_prob(logits.sigmoid())
        torch.testing.assert_close(losses, errors.flatten(1).sum(1) + 0.5 * kl)

    def test_penalties_count_effects_between_concepts_only(self):
        model, batch = autoencoder(), self.batch()
        with torch.no_grad():
            for weight in (model.context_module.causal.observational, model.context_module.causal.interventional):
                weight.fill_(7.0)  # on the diagonal, where nothing acts
                weight[:2, 2:] = 2.0  # 4 numbers: norm 4, squares 16
                weight[2:, :2] = 1.0  # norm 2, squares 4
        group, l2 = (AutoencoderObjective(model, **{f"{name}_penalty": 3.0}).penalty() for name in ("group", "l2"))
        assert group.item() == pytest.approx(3 * 2 * (4 + 2))
        assert l2.item() == pytest.approx(3 * 2 * (16 + 4))
        without = AutoencoderObjective(model.eval())(model, self.batch())
        with_penalty = AutoencoderObjective(model, group_penalty=1.0, l2_penalty=1.0)(model, batch)
        torch.testing.assert_close(with_penalty - without, torch.full((4,), 52.0))

    def test_squared_means_multiply_each_sample_with_the_others_of_its_context(self):
        mean = torch.tensor([[[1.0, 2.0]], [[3.0, 0.0]], [[5.0, 4.0]], [[9.0, 9.0]]])  # two coordinates, B = 4
        contexts = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
        # Pairs of rows 0, 2 and 3: 5 + 8, 9 + 18, 45 + 36. Row 1 is alone.
        expected = torch.tensor([121 / 3, 0, 121 / 3, 121 / 3])
        torch.testing.assert_close(squared_means(mean, contexts), expected)
        # On average it is the square of the mean.
        many = torch.randn(60, 1, 2, generator=torch.Generator().manual_seed(0)) + torch.tensor([3.0, 4.0])
        assert squared_means(many, torch.zeros(60, 2)).mean().item() == pytest.approx(25, rel=0.1)

    def test_squared_means_do_not_reward_samples_that_cancel_each_other(self):
        """As batch norm lets them; with few samples of a context this outweighed the KL divergence, without a bound."""
        mean = torch.tensor([[[3.0]], [[-3.0]], [[2.0]], [[4.0]]], requires_grad=True)
        penalties = squared_means(mean, torch.tensor([[0.0], [0.0], [1.0], [1.0]]))
        assert penalties.tolist() == [0, 0, 8, 8]
        penalties.sum().backward()
        assert mean.grad.flatten().tolist() == [0, 0, 8, 4]

    def test_the_penalty_of_means_is_on_where_contexts_act(self, tmp_path):
        assert arguments(tmp_path).mean_penalty == 25
        for name in ("published", "without_context_module", "ignore_contexts"):
            assert arguments(tmp_path, **{name: True}).mean_penalty == 0
            assert arguments(tmp_path, **{name: True}, mean_penalty=2.0).mean_penalty == 2
        with pytest.raises(ValueError, match="--mean_penalty=-1 must not be negative"):
            arguments(tmp_path, mean_penalty=-1)
        model = autoencoder().eval()
        batch = self.batch()
        batch.context[2] = batch.context[1]
        losses = (
            AutoencoderObjective(model, beta=2, mean_penalty=w)(
                model, replace(batch, generator=torch.Generator().manual_seed(2))
            )
            for w in (0, 6)
        )
        without, with_penalty = losses
        mean = model.encode(batch.images, batch.context).mean
        product = (mean[1] * mean[2]).sum()
        expected = torch.stack([torch.zeros(()), 6 * product, 6 * product, torch.zeros(())])
        assert product.abs() > 1e-6
        torch.testing.assert_close(with_penalty - without, expected, rtol=0, atol=1e-4)

    def test_refuses_what_does_not_fit(self):
        with pytest.raises(ValueError, match="has no context module"):
            AutoencoderObjective(autoencoder(with_context_module=False), group_penalty=1.0)
        vae = tiny_kl()
        with pytest.raises(ValueError, match="this KLAutoencoder decodes to pixels. Use --reconstruction=gaussian"):
            AutoencoderObjective(ContextAutoencoder(("a",), KLAutoencoder(8, vae)))

    def test_bits_per_dimension_count_pixels(self):
        assert bits_per_dimension(256 * np.log(2), autoencoder().backbone) == pytest.approx(1.0)


class TestBatches:
    def batches(self, tmp_path, start=0, rank=0, world_size=1, **changes):
        set_of = images(7)
        made = ImageBatches(set_of, arguments(tmp_path, **changes), 4, torch.device("cpu"), rank, world_size)
        return list(made(start))

    def test_contexts_are_mixed_and_belong_to_their_images(self, tmp_path):
        known = {bytes(p.numpy()): c for p, c in zip(images(7).images, images(7).contexts, strict=True)}
        for batch in self.batches(tmp_path):
            contexts = [str(context) for context in CONCEPTS.contexts(batch.context)]
            assert sorted(contexts) == sorted(["", "dark", "tall"] * 2)
            assert [known[bytes((p * 255).round().byte().numpy())] for p in batch.images] == contexts

    def test_any_start_continues_the_same_stream(self, tmp_path):
        for whole, resumed in zip(self.batches(tmp_path)[2:], self.batches(tmp_path, start=2), strict=True):
            assert torch.equal(whole.images, resumed.images)
            noise = [torch.randn(3, generator=batch.generator) for batch in (whole, resumed)]
            assert torch.equal(*noise)

    def test_processes_share_the_rows_but_not_the_noise(self, tmp_path):
        one = self.batches(tmp_path, train_batch_size=6)[0]
        parts = [self.batches(tmp_path, rank=rank, world_size=2, train_batch_size=3)[0] for rank in range(2)]
        assert torch.equal(torch.cat([part.images for part in parts]), one.images)
        first, second = (torch.randn(3, generator=part.generator) for part in parts)
        assert not torch.equal(first, second)

    def test_contexts_can_be_weighted(self, tmp_path):
        weighted = self.batches(tmp_path, context_weights=["obs=4"])
        assert sum(int((batch.context.sum(1) == 0).sum()) for batch in weighted) == 16

    def test_published_batches_hold_one_context_and_take_turns(self, tmp_path):
        one = self.batches(tmp_path, published=True, train_batch_size=3)
        contexts = [[str(context) for context in CONCEPTS.contexts(batch.context)] for batch in one]
        assert contexts == [[""] * 3, ["dark"] * 3, ["tall"] * 3, [""] * 3]
        assert torch.equal(self.batches(tmp_path, start=3, published=True, train_batch_size=3)[0].images, one[3].images)
        # Every row of a context once before any is drawn again.
        drawn = torch.cat([one[0].images, one[3].images]).flatten(1)
        assert len(drawn.unique(dim=0)) == 6
        second = self.batches(tmp_path, rank=1, world_size=2, published=True, train_batch_size=3)
        assert torch.equal(second[0].images, one[1].images)

    def test_published_turns_bring_every_context_to_every_process(self, tmp_path):
        four = ImageSet.of_arrays({Context(*names): np.zeros((2, 1, 16, 16), np.uint8) for names in PARTS}, CONCEPTS)
        settings = arguments(tmp_path, published=True, train_batch_size=1)
        ranks = [ImageBatches(four, settings, 8, torch.device("cpu"), rank, 2)(0) for rank in range(2)]
        seen = [[str(CONCEPTS.contexts(batch.context)[0]) for batch in batches] for batches in ranks]
        assert [sorted(set(contexts)) for contexts in seen] == [["", "dark", "dark+tall", "tall"]] * 2
        # Each context has as many turns as any other, four at a time.
        together = [context for pair in zip(*seen, strict=True) for context in pair]
        assert all(len(set(together[i : i + 4])) == 4 for i in range(0, 16, 4))

    def test_splits_are_stratified_and_disjoint(self):
        first, second = images(10).split(0.3, seed=0)
        assert [(first.contexts == name).sum() for name in first.names] == [7, 7, 7]
        together = np.concatenate([first.images.numpy(), second.images.numpy()]).reshape(30, -1)
        everything = images(10).images.numpy().reshape(30, -1)
        assert sorted(map(bytes, together)) == sorted(map(bytes, everything))
        with pytest.raises(ValueError, match="The context '' has 1 rows, too few to keep 0.3 of them"):
            images(1).split(0.3, seed=0)

    def test_refuses_what_is_no_image_set(self):
        with pytest.raises(ValueError, match="dtype torch.float32 with 30 contexts. They must be bytes"):
            ImageSet(torch.rand(30, 1, 4, 4), np.array([""] * 30, dtype=object), CONCEPTS)
        with pytest.raises(ValueError, match="Unknown concept 'odd'"):
            ImageSet(torch.zeros(1, 1, 4, 4).byte(), np.array(["odd"], dtype=object), CONCEPTS)
        with pytest.raises(ValueError, match="The context 'dark.tall' has no images. There are: '', 'dark', 'tall'"):
            images(2).of("dark+tall")
        sizes = {Context(): np.zeros((1, 1, 4, 4), np.uint8), Context("dark"): np.zeros((1, 1, 8, 8), np.uint8)}
        for arrays, count in ((sizes, 2), ({}, 0)):
            with pytest.raises(ValueError, match=f"The arrays of {count} contexts hold images of the shapes .* all of"):
                ImageSet.of_arrays(arrays, CONCEPTS)

    def test_contexts_may_be_written_in_any_way(self):
        one = ImageSet(torch.zeros(4, 1, 4, 4).byte(), ["obs", "tall + dark", "dark+tall", Context("dark")], CONCEPTS)
        assert one.names == ("", "dark", "dark+tall")
        assert len(one.of("tall+dark")) == 2
        assert one.select(np.array([1])).contexts.tolist() == ["dark+tall"]


class TestModes:
    def trained(self, tmp_path, mode, steps, published=False):
        base = tmp_path / "base"
        if not base.exists():
            train_autoencoder(arguments(base, without_context_module=True, max_train_steps=2), images())
        folder = tmp_path / f"{mode}-{steps}-{published}"
        settings = {"mode": mode, "base": str(base), "max_train_steps": steps, "published": published}
        train_autoencoder(arguments(folder, **settings), images())
        return weights(base), weights(folder)

    def test_frozen_trains_the_context_module_only(self, tmp_path):
        base, result = self.trained(tmp_path, "frozen", 3)
        assert not differing(backbone(base, buffers=False), result)
        assert not differing(backbone(base, buffers=True), result)
        fresh = ContextAutoencoder.from_config(ContextAutoencoder.load_config(tmp_path / "frozen-3-False"))
        assert {name for name in result if name.startswith("context_module.")} == {
            f"context_module.{name}" for name in fresh.context_module.state_dict()
        }
        torch.manual_seed(0)
        untrained = ContextAutoencoder.from_config(dict(fresh.config)).state_dict()
        changed = differing(untrained, result)
        assert {f"context_module.{name}" for name, _ in fresh.context_module.named_parameters()} <= changed

    def test_published_frozen_parts_keep_updating_batch_norm(self, tmp_path):
        base, result = self.trained(tmp_path, "frozen", 3, published=True)
        assert not differing(backbone(base, buffers=False), result)
        assert differing(backbone(base, buffers=True), result)

    def test_fine_tuning_thaws_after_a_fifth(self, tmp_path):
        base, whole = self.trained(tmp_path, "fine-tune", 5)
        assert differing(backbone(base, buffers=False), whole)
        model = ContextAutoencoder.from_pretrained(tmp_path / "base")
        mode = TrainingMode(model, "fine-tune", begun_steps=10)
        model.train()
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        mode.start_step(1)
        mode.end_backward()
        assert model.backbone_is_frozen
        assert not model.backbone.training
        assert model.context_module.training
        assert all(parameter.grad is None for parameter in model.backbone.parameters())
        assert all(parameter.grad is not None for parameter in model.context_module.parameters())
        mode.start_step(2)
        assert not model.backbone_is_frozen
        assert model.backbone.training

    def test_a_base_stays_thawed_where_its_run_is_made_longer(self, tmp_path):
        self.trained(tmp_path, "fine-tune", 5)
        frozen = []

        class Seen(AutoencoderObjective):
            def __call__(self, model, batch):
                frozen.append(model.backbone_is_frozen)
                return super().__call__(model, batch)

        given = {"mode": "fine-tune", "base": str(tmp_path / "base"), "resume_from_checkpoint": "latest"}
        folder = tmp_path / "fine-tune-5-False"
        for steps in (30, 32):  # a fifth of 30 are 6
            train_autoencoder(arguments(folder, **given, max_train_steps=steps), images(), objective_class=Seen)
        assert frozen == [False] * 27

    @pytest.mark.parametrize("mode", ["frozen", "fine-tune"])
    def test_nothing_is_frozen_after_a_run(self, tmp_path, mode):
        autoencoder(with_context_module=False).save_pretrained(tmp_path / "base")
        model = autoencoder()
        for parameter in model.backbone.encoder.parameters():  # by its owner
            parameter.requires_grad_(False)
        given = arguments(tmp_path / "first", mode=mode, base=str(tmp_path / "base"), max_train_steps=1)
        train_autoencoder(given, images(), model=model)
        assert not model.backbone_is_frozen
        assert not any(module.training for module in model.modules())
        before = {name: parameter.clone() for name, parameter in model.named_parameters()}
        train_autoencoder(arguments(tmp_path / "second", max_train_steps=1), images(), model=model)
        changed = differing(before, dict(model.named_parameters()))
        assert "backbone.decoder.0.weight" in changed
        assert not any(name.startswith("backbone.encoder.") for name in changed)

    def test_a_pretrained_autoencoder_kl_is_a_base(self, tmp_path):
        tiny_kl().save_pretrained(tmp_path / "kl")
        given = {"base": str(tmp_path / "kl"), "mode": "frozen", "reconstruction": "gaussian"}
        folder = train_autoencoder(arguments(tmp_path / "out", **given), images())
        model = ContextAutoencoder.from_pretrained(folder)
        assert isinstance(model.backbone, KLAutoencoder)
        before = AutoencoderKL.from_pretrained(tmp_path / "kl").state_dict()
        assert not differing(before, model.backbone.vae.state_dict())
        assert model.sample("dark+tall", 2).shape == (2, 1, 16, 16)

    def test_a_hierarchical_model_learns_through_its_top_latent(self, tmp_path):
        given = arguments(tmp_path / "out", architecture="HierarchicalVAE", resolution=24)
        torch.manual_seed(given.seed)
        before = make_autoencoder(given, CONCEPTS).state_dict()
        folder = train_autoencoder(given, images(size=24))
        assert ContextAutoencoder.from_pretrained(folder).sample("dark+tall", 2).shape == (2, 1, 24, 24)
        unchanged = set(before) - differing(before, weights(folder))
        assert {name for name in unchanged if not name.endswith(("observational", "interventional"))} == {
            name for name in before if name.startswith("backbone.top.")
        }


class TestRuns:
    def test_learns(self, tmp_path):
        generator = np.random.default_rng(0)
        gray = generator.integers(120, 256, (20, 1, 1, 1), dtype=np.uint8) * np.ones((1, 1, 16, 16), dtype=np.uint8)
        data = ImageSet.of_arrays({Context(): gray, Context("dark"): gray // 4, Context("tall"): gray}, CONCEPTS)
        given = {"max_train_steps": 150, "learning_rate": 1e-2, "train_batch_size": 12, "beta": 10.0, "seed": 1}
        folder = train_autoencoder(arguments(tmp_path / "out", num_validation_images=2, **given), data)
        model = ContextAutoencoder.from_pretrained(folder)
        assert (folder / "samples" / "step-000150.png").exists()
        mean = {name: float(model.sample(name, 64, torch.Generator().manual_seed(0)).mean()) for name in data.names}
        # Dark images have a quarter of the values of the others.
        assert mean["dark"] < 0.7 * mean[""]
        assert mean["tall"] > 0.9 * mean[""]
        objective = AutoencoderObjective(model)
        torch.manual_seed(0)
        fresh = ContextAutoencoder.from_config(dict(model.config)).eval()
        assert sum(mean_loss(objective, model, data)) < 0.98 * sum(mean_loss(objective, fresh, data))

    @pytest.mark.parametrize("changes", [{}, {"published": True}, {"use_ema": True, "mode": "fine-tune"}])
    def test_a_resumed_run_equals_the_whole_one(self, tmp_path, changes):
        if "mode" in changes:
            train_autoencoder(arguments(tmp_path / "base", without_context_module=True), images())
            changes = changes | {"base": str(tmp_path / "base")}
        changes = changes | {
            "max_train_steps": 10,
            "checkpointing_steps": 3,
            "validation_steps": 3,
            "early_stopping_patience": 50,
            "lr_warmup_steps": 2,
        }
        train_autoencoder(arguments(tmp_path / "whole", **changes), images())
        train_autoencoder(arguments(tmp_path / "parts", **changes), images())
        for step in (6, 9, 10):  # as if killed after step 5
            folder = tmp_path / "parts" / f"checkpoint-{step}"
            folder.rename(tmp_path / f"removed-{step}")
        (tmp_path / "parts" / WEIGHTS).unlink()
        train_autoencoder(arguments(tmp_path / "parts", **changes, resume_from_checkpoint="latest"), images())
        assert not differing(weights(tmp_path / "whole"), weights(tmp_path / "parts"))

    def test_images_that_changed_since_the_run_began_are_told(self, tmp_path, capsys):
        def go_on(steps, rows):
            capsys.readouterr()
            changes = {"checkpointing_steps": 1, "max_train_steps": steps, "resume_from_checkpoint": "latest"}
            train_autoencoder(arguments(tmp_path, **changes), rows)
            return capsys.readouterr().out

        rows = images()
        assert "the data is not what" not in go_on(1, rows) + go_on(2, rows)
        fewer = rows.select(np.arange(len(rows.contexts) - 5))
        then_now = "rows then: obs: 7, dark: 7, tall: 7; now: obs: 7, dark: 7, tall: 4"
        assert f"not what this run was trained on until now ({then_now})" in go_on(3, fewer)
        others = ImageSet(fewer.images // 2, fewer.contexts, fewer.concepts)
        assert "(as many rows, but others, or in another order)" in go_on(4, others)

    @pytest.mark.parametrize("changes", [{}, {"published": True}])
    def test_trains_in_half_precision(self, tmp_path, changes):
        folder = train_autoencoder(arguments(tmp_path / "out", mixed_precision="bf16", **changes), images())
        assert {tensor.dtype for tensor in weights(folder).values()} <= {torch.float32, torch.int64}

    def test_a_run_does_not_have_the_precision_of_an_earlier_one(self, tmp_path):
        given = ("bf16", None, "no", "bf16")
        made = [make_accelerator(arguments(tmp_path, mixed_precision=each)).mixed_precision for each in given]
        assert made == ["bf16", "no", "no", "bf16"]

    def test_the_precision_of_the_callers_own_accelerator_is_kept(self, tmp_path):
        Accelerator(mixed_precision="bf16")
        assert make_accelerator(arguments(tmp_path)).mixed_precision == "bf16"

    def test_ignored_contexts_have_no_effect(self, tmp_path):
        model = ContextAutoencoder.from_pretrained(
            train_autoencoder(arguments(tmp_path / "out", ignore_contexts=True), images(contexts=("", "dark")))
        )
        samples = [model.sample(name, 4, torch.Generator().manual_seed(0)) for name in ("", "dark+tall")]
        assert torch.equal(*samples)
        x = torch.rand(2, 1, 16, 16)
        masks = CONCEPTS.mask([Context(), Context("dark")]).split(1)
        outputs = [model(x, mask, torch.Generator().manual_seed(0)) for mask in masks]
        assert torch.equal(outputs[0].output, outputs[1].output)

    def test_a_base_with_a_tuple_in_its_configuration_resumes(self, tmp_path):
        given = {"reconstruction": "gaussian", "checkpointing_steps": 1}
        for resumed in (None, "latest"):
            model = ContextAutoencoder(CONCEPTS.names, KLAutoencoder(16, tiny_kl()), noise_width=3, concept_width=2)
            train_autoencoder(arguments(tmp_path, resume_from_checkpoint=resumed, **given), images(), model=model)

    def test_published_weights_stay_in_the_unit_interval(self, tmp_path):
        folder = train_autoencoder(arguments(tmp_path / "out", published=True, learning_rate=0.3), images())
        for name in ("observational", "interventional"):
            causal = weights(folder)[f"context_module.causal.{name}"]
            assert causal.min() == 0
            assert 0.3 < causal.max() <= 1

    def test_the_learning_rate_ends_at_a_hundredth(self, tmp_path):
        folder = train_autoencoder(arguments(tmp_path / "out", max_train_steps=6, lr_warmup_steps=2), images())
        state = torch.load(folder / "checkpoint-6" / "optimizer.bin", weights_only=True)
        assert state["param_groups"][0]["lr"] == pytest.approx(1e-5)

    def test_stops_when_validation_no_longer_improves(self, tmp_path, capsys):
        given = {"validation_steps": 1, "early_stopping_patience": 2, "early_stopping_min_delta": 1e9}
        train_autoencoder(arguments(tmp_path / "out", max_train_steps=20, checkpointing_steps=1, **given), images())
        assert "stopped after step 3 of 20" in capsys.readouterr().out
        assert (tmp_path / "out" / WEIGHTS).exists()
        # A resumed run comes to the same end.
        for step in (2, 3):
            (tmp_path / "out" / f"checkpoint-{step}").rename(tmp_path / f"removed-{step}")
        again = arguments(
            tmp_path / "out", max_train_steps=20, checkpointing_steps=1, resume_from_checkpoint="latest", **given
        )
        train_autoencoder(again, images())
        assert "stopped after step 3 of 20" in capsys.readouterr().out

    def test_early_stopping_counts_and_resumes(self):
        stopping = EarlyStopping(patience=2, min_delta=0.1)
        assert [stopping.should_stop(loss) for loss in (5.0, 4.0, 3.95)] == [False, False, False]
        resumed = EarlyStopping(patience=2, min_delta=0.1)
        resumed.load_state_dict(json.loads(json.dumps(stopping.state_dict())))
        assert resumed.should_stop(3.92)
        assert not resumed.should_stop(3.5)

    def test_the_command_trains_on_folders(self, tmp_path, capsys):
        write_folders(tmp_path / "data", images=8)
        options = {
            "train_data_dir": tmp_path / "data",
            "output_dir": tmp_path / "out",
            "resolution": 16,
            "train_batch_size": 4,
            "max_train_steps": 2,
            "lr_warmup_steps": 1,
            "num_validation_images": 1,
        }
        line = [part for name, value in options.items() for part in (f"--{name}", str(value))]
        assert cli.main(["train-autoencoder", *line]) == 0
        assert f"The autoencoder is in {tmp_path / 'out'}." in capsys.readouterr().out
        assert ContextAutoencoder.from_pretrained(tmp_path / "out").config.concepts == ["slant", "thick"]
        for command in (["info"], ["generate", "--context", "obs", "--output_dir", str(tmp_path / "images")]):
            assert cli.main([*command, "--adapter", str(tmp_path / "out")]) == 1
            said = capsys.readouterr().err
            assert (
                "out is an autoencoder, as train-autoencoder makes them: in Python, hf_causal_context.models." in said
            )
            assert "not finished" not in said
        assert cli.main(["train-autoencoder", *line, "--resume_from_checkpoint", "latest", "--depth", "4"]) == 1
        assert "belongs to a run with other settings (--depth: 2 then, 4 now)" in capsys.readouterr().err


class TestErrors:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"published": True, "context_weights": ["obs=2"]}, "--published gives contexts turns"),
            ({"base": "folder"}, "--mode=end-to-end with --base=folder: end-to-end starts from nothing"),
            ({"mode": "thawed"}, "--mode=thawed is unknown. Allowed: end-to-end, frozen, fine-tune"),
            ({"reconstruction": "mse"}, "--reconstruction=mse is unknown. Allowed: bce, gaussian"),
            ({"beta": -1.0}, "--beta=-1.0 must not be negative"),
            ({"resolution": 30}, "--resolution=30 must be 28, or a multiple of 16"),
            ({"architecture": "NVAE"}, "--architecture=NVAE is unknown. Allowed: LightweightVAE, HierarchicalVAE"),
            ({"architecture": "HierarchicalVAE", "resolution": 28}, "--resolution=28 must be a multiple of 8"),
            (
                {"architecture": "HierarchicalVAE", "mode": "frozen", "base": "folder"},
                "--base=folder has an architecture of its own",
            ),
            ({"validation_fraction": 1.0}, "must lie between 0 and 1"),
            ({"early_stopping_patience": 3}, "Give --validation_steps, too"),
            ({"channels": 2}, "--channels=2 must be 1, for gray images, or 3, for RGB"),
            ({"caption_column": "text"}, "reads images and contexts alone, so --caption_column would have no effect"),
            ({"pair_column": "of"}, "so --pair_column would have no effect"),
            ({"paired_files": True}, "so --paired_files would have no effect"),
            ({"class_column": "label"}, "so --class_column would have no effect. Leave it out"),
            ({"early_stopping_min_delta": 1.0}, "--early_stopping_patience was not given, so --early_stopping_min_del"),
            ({"lr_scheduler": "constant", "lr_warmup_steps": 3}, "so --lr_warmup_steps would have no effect"),
            ({"streaming": True}, "kept in memory. Leave --streaming out"),
            ({"output_dir": ""}, "Missing: --output_dir"),
        ],
    )
    def test_arguments_that_contradict(self, tmp_path, changes, message):
        with pytest.raises(ValueError, match=message):
            arguments(**{"folder": tmp_path} | changes) if "output_dir" not in changes else AutoencoderArguments()

    def test_a_context_without_images(self, tmp_path):
        with pytest.raises(ValueError, match="There are no images of 'tall' .* There are images of '', 'dark'"):
            train_autoencoder(arguments(tmp_path / "out"), images(contexts=("", "dark")))
        # An ordinary VAE needs no contexts.
        train_autoencoder(arguments(tmp_path / "base", without_context_module=True), images(contexts=("",)))

    @pytest.mark.parametrize("name", ["obs", "dark"])
    def test_a_context_that_is_left_out_of_batches(self, tmp_path, name):
        given = {"context_weights": [f"{name}=0", "tall=2"]}
        with pytest.raises(ValueError, match=f"--context_weights {name}=0 leaves out sets that say what the contexts"):
            train_autoencoder(arguments(tmp_path / "out", **given), images())
        train_autoencoder(arguments(tmp_path / "base", without_context_module=True, **given), images())

    def test_a_model_of_other_concepts_or_images(self, tmp_path):
        base = {"class": "LightweightVAE", "size": 16, "channels": 1}
        with pytest.raises(ValueError, match="concepts are 'tall', 'dark', the data's 'dark', 'tall'"):
            train_autoencoder(arguments(tmp_path), images(), model=ContextAutoencoder(("tall", "dark"), base))
        with pytest.raises(ValueError, match=r"takes float tensors \(B, 3, 32, 32\)"):
            train_autoencoder(arguments(tmp_path, channels=3, resolution=32), images())

    def test_settings_that_another_model_has(self, tmp_path):
        for name in ("published", "ignore_contexts", "without_context_module"):
            with pytest.raises(ValueError, match=f"has {name}=False, the arguments True. Give both the same"):
                train_autoencoder(arguments(tmp_path, **{name: True}), images(), model=autoencoder())
        with pytest.raises(ValueError, match="--mode=frozen starts from an autoencoder. Give it: --base"):
            train_autoencoder(arguments(tmp_path, mode="frozen"), images())
        with pytest.raises(ValueError, match="--train_batch_size=1: batch norm compares the images of a batch. Give 2"):
            train_autoencoder(arguments(tmp_path, train_batch_size=1), images())
        with pytest.raises(ValueError, match="The run has 3 optimizer steps, all of them within --lr_warmup_steps=200"):
            train_autoencoder(arguments(tmp_path, lr_warmup_steps=200), images())

    def test_a_base_that_is_no_autoencoder(self, tmp_path):
        (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
        with pytest.raises(ValueError, match="holds a UNet2DModel. It must be a ContextAutoencoder or a diffusers"):
            train_autoencoder(arguments(tmp_path / "out", mode="frozen", base=str(tmp_path)), images())

    def test_a_base_that_is_not_there_or_a_whole_pipeline(self, tmp_path):
        (tmp_path / "pipeline").mkdir()
        for name, error, message in (
            ("missing", FileNotFoundError, "There is no base '.*missing': such a folder does not exist"),
            ("pipeline", ValueError, "no autoencoder's config.json. .* of a pipeline's folder, its folder vae"),
        ):
            with pytest.raises(error, match=message):
                train_autoencoder(arguments(tmp_path / "out", mode="frozen", base=str(tmp_path / name)), images())

    def test_images_of_another_shape_than_the_bases(self, tmp_path):
        base = tmp_path / "base"
        autoencoder(with_context_module=False).save_pretrained(base)
        tiny_kl().save_pretrained(tmp_path / "kl")
        given = {"mode": "frozen", "resolution": None, "channels": None, "base": str(base)}
        for name, value, own in (("resolution", 64, 16), ("channels", 3, 1)):
            with pytest.raises(ValueError, match=f"--{name}={value}, but --base=.* is for {name} {own}. Leave it out"):
                make_autoencoder(arguments(tmp_path, **given | {name: value}), CONCEPTS)
        with pytest.raises(ValueError, match="--channels=3, but --base=.* is for channels 1"):
            make_autoencoder(arguments(tmp_path, **given | {"base": str(tmp_path / "kl"), "channels": 3}), CONCEPTS)
        for folder, size in ((base, 16), (tmp_path / "kl", 64)):
            made = make_autoencoder(arguments(tmp_path, **given | {"base": str(folder)}), CONCEPTS).backbone
            assert (made.size, made.channels) == (size, 1)
        fresh = AutoencoderArguments(output_dir="out")
        assert (fresh.resolution, fresh.channels) == (64, 3)

    def test_images_are_read_in_gray_or_rgb_alone(self, tmp_path):
        base = {"class": "LightweightVAE", "size": 16, "channels": 2}
        model = ContextAutoencoder(("slant", "thick"), base, noise_width=3, concept_width=2)
        given = arguments(tmp_path / "out", train_data_dir=str(write_folders(tmp_path / "data", images=2)))
        with pytest.raises(ValueError, match=r"takes images of 2 channels, .* in gray \(1\) or RGB \(3\). Choose"):
            train_autoencoder(given, model=model)

    def test_what_no_grid_can_show_is_refused_before_the_training(self, tmp_path):
        def refused(match, model=None, **changes):
            given = arguments(tmp_path / "out", num_validation_images=1, **changes)
            with pytest.raises(ValueError, match=match):
                train_autoencoder(given, images(), model=model)
            assert not (tmp_path / "out").exists()

        base = {"class": "LightweightVAE", "size": 16, "channels": 2}
        model = ContextAutoencoder(CONCEPTS.names, base, noise_width=3, concept_width=2)
        refused("Grids .* have 2 channels. Give --num_validation_images 0", model)
        refused("sets the strength of the observational part", validation_contexts=["dark", "observational=0"])
        refused("--validation_contexts names no context", validation_contexts=[])

    def test_images_to_validate_on_that_do_not_fit(self, tmp_path):
        rows = images()
        for validation, message in (
            (
                ImageSet(rows.images, rows.contexts, ConceptSet(("tall", "dark"))),
                "to validate on are 'tall', 'dark', and",
            ),
            (images(size=32), r"Images of shape \(1, 1, 32, 32\)"),
            (rows.select(np.array([], dtype=np.int64)), "There are no images to validate on"),
        ):
            with pytest.raises(ValueError, match=message):
                train_autoencoder(arguments(tmp_path / "out"), rows, validation=validation)

    def test_frames_of_images(self, tmp_path):
        root = str(write_folders(tmp_path / "data", images=2))
        with pytest.raises(ValueError, match="The data are images, so --num_frames would have no effect"):
            train_autoencoder(arguments(tmp_path / "out", train_data_dir=root, num_frames=3))

    def test_a_constant_rate_asks_for_no_steps_beyond_a_warm_up(self, tmp_path):
        train_autoencoder(arguments(tmp_path, lr_scheduler="constant", lr_warmup_steps=200), images())

    def test_a_loss_that_is_not_finite(self, tmp_path):
        model = autoencoder()
        nn.init.constant_(model.context_module.output.bias, float("nan"))
        with pytest.raises(TrainingDivergedError, match="The loss became nan at step 1"):
            train_autoencoder(arguments(tmp_path / "out"), images(), model=model)
        assert not (tmp_path / "out" / WEIGHTS).exists()

    def test_images_are_bytes_scaled_to_the_unit_interval(self):
        assert to_floats(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [0.0, 1.0]
