"""Autoencoders around every kind of base: files, contexts, counterfactuals, strictness."""

import json

import pytest
import torch
from diffusers import AutoencoderKL
from torch import nn

from hf_causal_context.context_module import ContextModule
from hf_causal_context.models.context_autoencoder import ContextAutoencoder
from hf_causal_context.models.encoder_decoders import EncoderDecoder, KLAutoencoder, LightweightVAE, base_from_config
from hf_causal_context.models.hierarchical_vae import GaussianLatent, HierarchicalVAE, LatentGroup

CONCEPTS = ("a", "b", "c")
CONTEXTS = ["", "a", "b+c", {"c": -0.5}]
N, W = 4, 3


class TwoLines(EncoderDecoder):
    """A base of somebody else's."""

    def __init__(self, size, features):
        super().__init__()
        self.config = {"size": size, "features": features}
        self.size, self.channels, self.features = size, 2, features
        self.to_features = nn.Linear(2 * size**2, features)
        self.to_images = nn.Linear(features, 2 * size**2)

    def encode(self, images):
        return self.to_features(images.flatten(1)).tanh()

    def decode(self, features):
        return self.to_images(features).unflatten(1, (2, self.size, self.size))


def kl_autoencoder(**settings):
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=2,
        norm_num_groups=4,
        scaling_factor=0.7,
        shift_factor=0.1,
        **settings,
    )
    return KLAutoencoder(16, vae)


BASES = {
    "light64": lambda: {"class": "LightweightVAE", "size": 64},
    "light32": lambda: {"class": "LightweightVAE", "size": 32, "channels": 1},
    "light28": lambda: LightweightVAE(28, 1),
    "kl": kl_autoencoder,
    "hierarchical": lambda: HierarchicalVAE(16, 3, width=4, latent_channels=2),
    "custom": lambda: TwoLines(8, 5),
}
ALL = pytest.mark.parametrize("name", BASES)


def settings(name):
    return {"latent_module": "top"} if name == "hierarchical" else {}


def images_for(model, num=4):
    base = model.backbone
    return torch.rand(num, base.channels, base.size, base.size, generator=seeded(5))


def as_json(value):
    return json.loads(json.dumps(value))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def trained(name, **kwargs):
    """Weights of the size that training gives, and batch norm that has seen data."""
    model = ContextAutoencoder(CONCEPTS, BASES[name](), N, W, **settings(name), **kwargs)
    with torch.no_grad():
        for key, parameter in model.context_module.named_parameters():
            parameter.mul_(2)
            if "shift" in key or "interventional" in key:  # which start without an effect of their own
                parameter.add_(0.2 * torch.randn_like(parameter))
        for _ in range(3):
            model.train()(images_for(model, 8), model.mask([""] * 4 + ["a"] * 4, 8))
    return model.eval()


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    return {name: trained(name) for name in BASES}


class TestFiles:
    @ALL
    @pytest.mark.parametrize("kwargs", [{}, {"published": True, "depth": 3}, {"with_context_module": False}])
    def test_a_loaded_model_draws_the_same_images(self, tmp_path, name, kwargs):
        model = trained(name, **kwargs)
        model.save_pretrained(tmp_path)
        own = {"base": BASES[name]()} if name == "custom" else {}
        loaded = ContextAutoencoder.from_pretrained(tmp_path, **own)
        assert dict(loaded.config).items() >= {"concepts": list(CONCEPTS), "noise_width": N, **kwargs}.items()
        assert type(loaded.backbone) is type(model.backbone)
        assert as_json(loaded.backbone.config) == as_json(model.backbone.config)
        assert not loaded.training
        assert model.state_dict().keys() == loaded.state_dict().keys()
        for key, value in model.state_dict().items():
            assert torch.equal(value, loaded.state_dict()[key]), key
        for context in CONTEXTS:
            assert torch.equal(model.sample(context, 3, seeded()), loaded.sample(context, 3, seeded()))
        images = images_for(model)
        assert torch.equal(model.counterfactual(images, "a", "b"), loaded.counterfactual(images, "a", "b"))

    def test_a_base_of_ones_own_must_be_passed_again(self, tmp_path, models):
        models["custom"].save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="built around 'TwoLines'. Known: .*from_pretrained\\(folder, base="):
            ContextAutoencoder.from_pretrained(tmp_path)

    @pytest.mark.parametrize(
        "name", ["os.system", "hf_causal_context.models.encoder_decoders.LightweightVAE", "EncoderDecoder", None, ["a"]]
    )
    def test_a_file_names_no_code(self, tmp_path, models, name):
        models["light28"].save_pretrained(tmp_path)
        file = tmp_path / "config.json"
        config = json.loads(file.read_text())
        config["base"]["class"] = name
        file.write_text(json.dumps(config))
        with pytest.raises(ValueError, match="built around .* Known: LightweightVAE, KLAutoencoder, HierarchicalVAE"):
            ContextAutoencoder.from_pretrained(tmp_path)

    @pytest.mark.parametrize("name", [name for name in BASES if name != "custom"])
    def test_configurations_rebuild_the_base(self, models, name):
        config = as_json(models[name].config["base"])
        rebuilt = base_from_config(config)
        assert type(rebuilt).__name__ == config.pop("class")
        assert as_json(rebuilt.config) == config


class TestContexts:
    @ALL
    def test_one_for_the_batch_or_one_for_each_sample(self, models, name):
        model = models[name]
        together = model.sample(CONTEXTS, 4, seeded())
        base = model.backbone
        assert together.shape == (4, base.channels, base.size, base.size)
        assert 0 <= together.min() < together.max() <= 1
        for i, context in enumerate(CONTEXTS):
            torch.testing.assert_close(together[i], model.sample(context, 4, seeded())[i], rtol=0, atol=1e-5)
        assert torch.equal(model.sample((), 4, seeded()), model.sample("", 4, seeded()))
        mask = torch.tensor([[0, 0, 0], [1, 0, 0], [0, 1, 1], [0, 0, -0.5]])
        assert torch.equal(model.sample(mask, 4, seeded()), together)

    @ALL
    def test_contexts_differ(self, models, name):
        images = [models[name].sample(context, 4, seeded()) for context in CONTEXTS]
        for i in range(len(CONTEXTS)):
            for j in range(i):
                assert (images[i] - images[j]).abs().max() > 1e-3

    @pytest.mark.parametrize("name", ["light28", "hierarchical"])
    def test_contexts_have_no_effect_without_a_context_module(self, name):
        model = trained(name, with_context_module=False)
        assert torch.equal(model.sample("a", 3, seeded()), model.sample("", 3, seeded()))
        assert not any("causal" in key for key in model.state_dict())

    @ALL
    def test_a_seed_decides(self, models, name):
        model, state = models[name], torch.get_rng_state()
        images = model.sample("a", 3, seeded())
        assert torch.equal(images, model.sample("a", 3, seeded()))
        assert torch.equal(torch.get_rng_state(), state)
        assert not torch.equal(images, model.sample("a", 3, seeded(1)))
        assert torch.pdist(images.flatten(1)).min() > 1e-3
        torch.manual_seed(0)
        first = model.sample("a", 3)
        torch.manual_seed(0)
        assert torch.equal(first, model.sample("a", 3))

    @ALL
    def test_samples_are_decoded_noise(self, models, name):
        model = models[name]
        generator = seeded()
        noise = torch.randn(4, len(CONCEPTS), N, generator=generator)
        assert torch.equal(model.decode(noise, CONTEXTS, generator), model.sample(CONTEXTS, 4, seeded()))

    @pytest.mark.parametrize("name", [name for name in BASES if name != "hierarchical"])
    def test_pixels_of_decoded_noise(self, models, name):
        model = models[name]
        noise = torch.randn(4, len(CONCEPTS), N)
        output = model.backbone.decode(model.context_module(noise, model.mask(CONTEXTS, 4)))
        expected = output.clamp(0, 1) if name == "kl" else output.sigmoid()
        assert torch.equal(model.decode(noise, CONTEXTS), expected)


class TestImages:
    @ALL
    def test_encoding_and_decoding(self, models, name):
        model = models[name]
        images = images_for(model)
        posterior = model.encode(images, CONTEXTS)
        assert posterior.mean.shape == posterior.log_variance.shape == (4, len(CONCEPTS), N)
        output, kl, mean = model(images, model.mask(CONTEXTS, 4), seeded())
        assert output.shape == images.shape
        assert kl.shape == (4,)
        assert (kl >= posterior.kl() - 1e-5).all()
        torch.testing.assert_close(mean, posterior.mean)
        if name != "hierarchical":
            features = model.context_module(posterior.sample(seeded()), model.mask(CONTEXTS, 4))
            assert torch.equal(output, model.backbone.decode(features))
            assert torch.equal(kl, posterior.kl())

    @ALL
    def test_concepts(self, models, name):
        model = models[name]
        concepts = model.concepts(images_for(model), CONTEXTS)
        assert concepts.shape == (4, len(CONCEPTS), W)
        mean = model.encode(images_for(model), CONTEXTS).mean
        torch.testing.assert_close(concepts, model.context_module.concepts(mean, model.mask(CONTEXTS, 4)))
        assert not torch.equal(concepts, model.concepts(images_for(model)))

    @ALL
    def test_counterfactuals(self, models, name):
        model = models[name]
        images = images_for(model)
        reconstructed = model.reconstruct(images, "a")
        assert 0 <= reconstructed.min() < reconstructed.max() <= 1
        assert torch.equal(model.counterfactual(images, "a", "a"), reconstructed)
        changed = model.counterfactual(images, "a", "b")
        assert changed.shape == images.shape
        assert (changed - reconstructed).abs().max() > 1e-3
        assert torch.equal(changed, model.counterfactual(images, "a", "b"))
        mixed = model.counterfactual(images, "a", ["a", "b", "a", "b"])
        torch.testing.assert_close(mixed[::2], reconstructed[::2], rtol=0, atol=1e-5)
        torch.testing.assert_close(mixed[1::2], changed[1::2], rtol=0, atol=1e-5)

    @ALL
    def test_every_weight_that_acts_learns(self, name):
        model = trained(name)
        for parameter in model.parameters():
            parameter.grad = None
        output, kl, _ = model(images_for(model), model.mask(CONTEXTS, 4), seeded())
        (output.sum() + kl.sum()).backward()
        for key, parameter in model.named_parameters():
            if key.startswith("backbone.top."):
                assert parameter.grad is None
                assert not parameter.requires_grad
            else:
                assert parameter.grad is not None, key
                assert parameter.grad.isfinite().all()
                assert parameter.grad.any(), key
                assert parameter.requires_grad

    @pytest.mark.parametrize("published", [False, True])
    def test_a_frozen_backbone_keeps_its_statistics_unless_published(self, published):
        model = trained("light28", published=published)
        model.backbone_is_frozen = True
        assert model.train().context_module.training
        assert model.backbone.training == published
        model.backbone_is_frozen = False
        assert model.train().backbone.training
        assert not model.eval().backbone.training

    @pytest.mark.parametrize("name", ["light28", "kl", "hierarchical"])
    def test_precision_is_that_of_the_weights(self, name):
        model = trained(name)
        expected = model.reconstruct(images_for(model), CONTEXTS)
        for dtype, tolerance in ((torch.float64, 1e-4), (torch.bfloat16, 0.1)):
            images = model.to(dtype).reconstruct(images_for(model).to(dtype), CONTEXTS)
            assert images.dtype == model.sample("a", 2, seeded()).dtype == dtype
            if name != "hierarchical":  # its lower latents are drawn, and in another precision differ
                torch.testing.assert_close(images.float(), expected, rtol=0, atol=tolerance)

    @ALL
    def test_images_may_be_of_another_dtype_than_the_weights(self, name):
        model = trained(name).to(torch.bfloat16)
        images, noise = images_for(model), torch.randn(4, len(CONCEPTS), N)
        rounded, rounded_noise = images.bfloat16(), noise.bfloat16()
        assert torch.equal(model.encode(images).mean, model.encode(rounded).mean)
        assert torch.equal(model.decode(noise, "a", seeded()), model.decode(rounded_noise, "a", seeded()))
        assert torch.equal(model.counterfactual(images, "a", "b"), model.counterfactual(rounded, "a", "b"))

    @ALL
    def test_drawing_in_training_mode_is_as_in_eval_mode_and_changes_nothing(self, name):
        model = trained(name)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        model.backbone_is_frozen = True
        model.train()
        modes = [module.training for module in model.modules()]
        images = images_for(model)
        for use in (
            lambda: model.sample("a", 1, seeded()),
            lambda: model.reconstruct(images, "a"),
            lambda: model.counterfactual(images, "a", "b"),
            lambda: model.concepts(images, "a"),
        ):
            found = use()
            assert [module.training for module in model.modules()] == modes
            model.eval()
            assert torch.equal(found, use())
            model.train()
        assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())


class TestHierarchicalBase:
    def test_encodes_the_features_of_the_named_module(self, models):
        model = models["hierarchical"]
        features = images_for(model)
        for layer in model.backbone.up:
            features = layer(features)
        assert features.shape[1:] == model.backbone.latent_shape
        for given, expected in zip(
            model.encode(images_for(model), CONTEXTS),
            model.context_module.encode(features.flatten(1), model.mask(CONTEXTS, 4)),
            strict=True,
        ):
            assert torch.equal(given, expected)

    def test_the_context_module_gives_the_top_latent(self):
        model = trained("hierarchical")
        base = model.backbone
        with torch.no_grad():
            for group in base.groups:
                for layer in (group.to_state, group.to_residual):
                    layer.weight.zero_()
                    layer.bias.zero_()
        noise = torch.randn(4, len(CONCEPTS), N)
        posterior = model.encode(images_for(model))
        posteriors = model.encode(images_for(model), CONTEXTS)
        for exogenous, decode in (
            (noise, lambda: model.decode(noise, CONTEXTS)),
            (posterior.mean, lambda: model.counterfactual(images_for(model), "", CONTEXTS)),
        ):
            state = model.context_module(exogenous, model.mask(CONTEXTS, 4)).view(4, *base.latent_shape)
            expected = base.to_output(base.down[1](base.down[0](state))).sigmoid()
            torch.testing.assert_close(decode(), expected, rtol=0, atol=1e-6)
        _, kl, mean = model(images_for(model), model.mask(CONTEXTS, 4))
        torch.testing.assert_close(kl, posteriors.kl())
        torch.testing.assert_close(mean, posteriors.mean)

    def test_the_base_is_left_as_it_was(self, models):
        base = models["hierarchical"].backbone
        before = base.sample(2, seeded())
        models["hierarchical"].sample("a", 2)
        models["hierarchical"].encode(torch.zeros(1, 3, 16, 16))
        assert torch.equal(base.sample(2, seeded()), before)
        assert "forward" not in vars(base.top)

    def test_a_module_that_is_never_called(self):
        model = ContextAutoencoder(CONCEPTS, HierarchicalVAE(8, width=2), latent_module="up").eval()
        with pytest.raises(ValueError, match="The base never called 'up', so there is nothing to encode."):
            model.encode(torch.zeros(1, 3, 8, 8))
        with pytest.raises(ValueError, match="The base never called 'up'"):
            model(torch.zeros(1, 3, 8, 8), model.mask("", 1))


class TestHierarchicalVAE:
    @pytest.mark.parametrize(("size", "channels"), [(8, 1), (24, 3)])
    def test_shapes(self, size, channels):
        model = HierarchicalVAE(size, channels, width=4, latent_channels=2)
        output, kl = model(torch.rand(3, channels, size, size))
        assert output.shape == (3, channels, size, size)
        assert kl.shape == (3,)
        assert (kl >= 0).all()
        assert model.sample(2).shape == (2, channels, size, size)
        assert torch.equal(model.eval().sample(2, seeded()), model.sample(2, seeded()))

    def test_kl_divergences_of_all_groups_add(self):
        model, divergences = HierarchicalVAE(8, width=4).eval(), []
        for latent in (model.top, *model.groups):
            latent.register_forward_hook(lambda _, __, output: divergences.append(output[1]))
        _, kl = model(torch.rand(3, 3, 8, 8))
        assert len(divergences) == 3
        assert torch.stack(divergences).min() > 0
        torch.testing.assert_close(kl, torch.stack(divergences).sum(0))

    def test_kl_divergence_of_the_top_latent(self):
        latent, features = GaussianLatent(4), torch.randn(3, 4, 2, 2)
        mean, log_variance = latent.to_posterior(features).chunk(2, dim=1)
        normal = torch.distributions.Normal
        expected = torch.distributions.kl_divergence(normal(mean, (log_variance / 2).exp()), normal(0, 1))
        _, kl = latent(features)
        torch.testing.assert_close(kl, expected.sum((1, 2, 3)))
        nn.init.zeros_(latent.to_posterior.weight)
        nn.init.zeros_(latent.to_posterior.bias)
        sample, kl = latent(features, seeded())
        assert torch.equal(kl, torch.zeros(3))
        assert torch.equal(sample, latent(features, seeded(), prior=True)[0])

    def test_kl_divergence_of_a_lower_latent_from_its_prior(self):
        group, (state, features) = LatentGroup(4, 2), torch.randn(2, 3, 4, 2, 2)
        mean, log_variance = group.to_prior(state).chunk(2, dim=1)
        shift, log_ratio = group.to_residual(torch.cat((state, features), dim=1)).chunk(2, dim=1)
        normal = torch.distributions.Normal
        posterior = normal(mean + shift, ((log_variance + log_ratio) / 2).exp())
        expected = torch.distributions.kl_divergence(posterior, normal(mean, (log_variance / 2).exp()))
        after, kl = group(state, features, seeded())
        torch.testing.assert_close(kl, expected.sum((1, 2, 3)))
        latent = posterior.loc + posterior.scale * torch.randn(posterior.loc.shape, generator=seeded())
        torch.testing.assert_close(after, state + group.to_state(latent))
        nn.init.zeros_(group.to_residual.weight)
        nn.init.zeros_(group.to_residual.bias)
        after, kl = group(state, features, seeded())
        assert torch.equal(kl, torch.zeros(3))
        assert torch.equal(after, group(state, None, seeded())[0])


def layers(stack):
    """Kind and sizes of every layer, as PAPER.md lists them."""
    shapes = []
    for layer in stack:
        name = type(layer).__name__
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            kernel = tuple(sizes[0] for sizes in (layer.kernel_size, layer.stride, layer.padding))
            assert layer.bias is not None
            shapes.append((name, layer.in_channels, layer.out_channels, *kernel))
        elif isinstance(layer, nn.Linear):
            shapes.append((name, layer.in_features, layer.out_features))
        elif isinstance(layer, nn.BatchNorm2d):
            shapes.append((name, layer.num_features))
        elif isinstance(layer, nn.Unflatten):
            shapes.append((name, *layer.unflattened_size))
        else:
            shapes.append((name,))
    return shapes


class TestLightweightVAE:
    def test_published_layers_for_64(self):
        model = LightweightVAE(64, 3)
        relu = ("ReLU",)
        expected = []
        for before, after in ((3, 32), (32, 64), (64, 128), (128, 256)):
            expected += [("Conv2d", before, after, 4, 2, 1), relu, ("BatchNorm2d", after)]
        assert layers(model.encoder) == [*expected, ("Flatten",), ("Linear", 4096, 128), relu]
        expected = [("Linear", 128, 128), relu, ("Linear", 128, 4096), relu, ("Unflatten", 256, 4, 4)]
        for before, after in ((256, 128), (128, 64), (64, 32)):
            expected += [("ConvTranspose2d", before, after, 4, 2, 1), relu, ("BatchNorm2d", after)]
        assert layers(model.decoder) == [*expected, ("ConvTranspose2d", 32, 3, 4, 2, 1)]

    def test_published_layers_for_28(self):
        model = LightweightVAE(28, 1)
        relu = ("ReLU",)
        expected = []
        for before, after, kernel in ((1, 32, (4, 2, 1)), (32, 64, (4, 2, 1)), (64, 128, (7, 1, 0))):
            expected += [("Conv2d", before, after, *kernel), ("BatchNorm2d", after), relu]
        assert layers(model.encoder) == [*expected, ("Flatten",), ("Linear", 128, 128), relu]
        expected = [("Linear", 128, 128), relu, ("Unflatten", 128, 1, 1)]
        for before, after, kernel in ((128, 64, (7, 1, 0)), (64, 32, (4, 2, 1))):
            expected += [("ConvTranspose2d", before, after, *kernel), ("BatchNorm2d", after), relu]
        assert layers(model.decoder) == [*expected, ("ConvTranspose2d", 32, 1, 4, 2, 1)]

    @pytest.mark.parametrize(("size", "channels"), [(16, 1), (28, 3), (48, 2)])
    def test_shapes(self, size, channels):
        model = LightweightVAE(size, channels).eval()
        features = model.encode(torch.rand(2, channels, size, size))
        assert features.shape == (2, model.features)
        assert model.decode(features).shape == (2, channels, size, size)


def test_a_diffusers_autoencoder_reconstructs_as_it_does_alone():
    base = kl_autoencoder().eval()
    images = torch.rand(2, 3, 16, 16)
    features = base.encode(images)
    mean = base.vae.encode(images * 2 - 1).latent_dist.mean
    assert features.shape == (2, base.features) == (2, 2 * 8 * 8)
    torch.testing.assert_close(features, (0.7 * (mean - 0.1)).flatten(1))
    torch.testing.assert_close(base.decode(features), (base.vae.decode(mean).sample + 1) / 2)


class TestStrictness:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda x: 2 * x - 1, r"values from -.* to .*; they must lie in \[0, 1\]. Divide bytes by 255"),
            (lambda x: x * 255, r"values from .* to 2.*; they must lie in \[0, 1\]"),
            (lambda x: x.index_fill(0, torch.tensor(1), torch.nan), "values from nan to nan"),
            (lambda x: x.index_fill(0, torch.tensor(1), torch.inf), "values from .* to inf"),
            (lambda x: (x * 255).byte(), r"dtype torch.uint8; this .* takes float tensors \(B, 1, 28, 28\)"),
            (lambda x: x[..., 1:], r"Images of shape \(4, 1, 28, 27\) .* Resize or convert them."),
            (lambda x: x.expand(-1, 3, -1, -1), r"Images of shape \(4, 3, 28, 28\)"),
            (lambda x: x[0], r"Images of shape \(1, 28, 28\)"),
        ],
    )
    def test_images(self, models, change, message):
        model = models["light28"]
        wrong = change(images_for(model))
        for use in (
            model.encode,
            model.reconstruct,
            model.concepts,
            lambda images: model.counterfactual(images, "a", "b"),
        ):
            with pytest.raises(ValueError, match=message):
                use(wrong)

    @pytest.mark.parametrize("name", ["light28", "hierarchical"])
    def test_contexts(self, models, name):
        model = models[name]
        images = images_for(model)
        unknown = "Unknown concept 'z' in context 'a\\+z'. Known concepts: 'a', 'b', 'c'"
        for use in (
            lambda context: model.sample(context, 4),
            lambda context: model.reconstruct(images, context),
            lambda context: model.concepts(images, context),
            lambda context: model.counterfactual(images, context, "a"),
            lambda context: model.counterfactual(images, "a", context),
            lambda context: model.decode(torch.zeros(4, 3, N), context),
        ):
            with pytest.raises(ValueError, match=unknown):
                use("a+z")
            with pytest.raises(ValueError, match="2 contexts for 4 samples. Give one, or one for each sample."):
                use(["a", "b"])
            with pytest.raises(ValueError, match=r"mask has shape \(4, 2\); it must be \(rows, 3\)"):
                use(torch.zeros(4, 2))

    @pytest.mark.parametrize("name", ["light28", "hierarchical"])
    @pytest.mark.parametrize("shape", [(2, 3, N + 1), (2, 2, N), (3, N), (2, 3, N, 1)])
    def test_noise(self, models, name, shape):
        with pytest.raises(ValueError, match=r"must be \(B, 3, 4\): concepts and noise_width."):
            models[name].decode(torch.zeros(shape), "a")

    @pytest.mark.parametrize(
        ("base", "kwargs", "message"),
        [
            ({"class": "Missing"}, {}, "built around 'Missing'. Known: LightweightVAE, KLAutoencoder, HierarchicalVAE"),
            ({"size": 28}, {}, "built around None"),
            ({"class": "LightweightVAE", "size": 30}, {}, "size=30 must be 28 or a multiple of 16. Resize"),
            ({"class": "LightweightVAE", "size": 0}, {}, "size=0 must be"),
            ({"class": "LightweightVAE", "channels": 0}, {}, "channels=0 must be at least 1."),
            ({"class": "HierarchicalVAE", "size": 12}, {"latent_module": "top"}, "size=12 must be a multiple of 8."),
            ({"class": "HierarchicalVAE", "width": 0}, {"latent_module": "top"}, "width=0 must be at least 1."),
            ({"class": "HierarchicalVAE"}, {"latent_module": "bottom"}, "'bottom' is no module .* It has: .*'top'"),
            ({"class": "HierarchicalVAE"}, {"latent_module": ""}, "latent_module='' is no module of the base"),
            ({"class": "LightweightVAE"}, {"depth": 1}, "depth=1 must be at least 2."),
            (
                {"class": "LightweightVAE"},
                {"published": True, "perfect_interventions": True},
                "no perfect_interventions",
            ),
        ],
    )
    def test_construction(self, base, kwargs, message):
        with pytest.raises(ValueError, match=message):
            ContextAutoencoder(CONCEPTS, base, **kwargs)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda base: delattr(base, "features"), "has no features. EncoderDecoder shows what a base needs"),
            (lambda base: setattr(base, "output", "logit"), "output='logit'. It must be 'logits' or 'pixels'"),
            (lambda base: base.config.update(dtype=torch.float32), "a config that JSON cannot hold .*dtype"),
        ],
    )
    def test_a_base_that_lacks_something(self, change, message):
        base = TwoLines(8, 5)
        change(base)
        with pytest.raises(ValueError, match=message):
            ContextAutoencoder(CONCEPTS, base)

    def test_sizes_of_a_diffusers_autoencoder(self):
        vae = kl_autoencoder().vae
        for size in (0, 17):
            with pytest.raises(ValueError, match=f"size={size} must be a multiple of 2, by which"):
                KLAutoencoder(size, vae)

    def test_concepts(self):
        with pytest.raises(ValueError, match="Duplicate concepts: 'a'"):
            ContextAutoencoder(("a", "a"), BASES["custom"]())


def test_latents_of_a_diffusers_autoencoder_have_unit_variance_where_it_knows_their_statistics(tmp_path):
    mean, std = [0.5, -2.0], [3.0, 0.25]
    torch.manual_seed(0)
    plain, base = kl_autoencoder(), kl_autoencoder(latents_mean=mean, latents_std=std)
    base.vae.load_state_dict(plain.vae.state_dict())
    images = images_for(ContextAutoencoder(CONCEPTS, base))
    latents = plain.encode(images).unflatten(1, plain.latent_shape) / plain.scale + plain.shift
    features = base.encode(images)
    # As the pipelines of Stable Diffusion XL compute them, of which one of Playground has such a VAE.
    shape = (1, 2, 1, 1)
    expected = (latents - torch.tensor(mean).view(shape)) * 0.7 / torch.tensor(std).view(shape)
    torch.testing.assert_close(features, expected.flatten(1))
    torch.testing.assert_close(base.decode(features), plain.decode(plain.encode(images)))
    ContextAutoencoder(CONCEPTS, base).save_pretrained(tmp_path)
    loaded = ContextAutoencoder.from_pretrained(tmp_path).backbone
    assert torch.equal(loaded.encode(images), features)
    assert loaded.to(torch.bfloat16).encode(images.bfloat16()).dtype == torch.bfloat16
    one_alone = kl_autoencoder(latents_mean=mean)
    assert (one_alone.scale, one_alone.shift) == (0.7, 0.1)


def test_settings_reach_the_context_module():
    model = ContextAutoencoder(CONCEPTS, LightweightVAE(28, 1), 7, 2, depth=4, perfect_interventions=False)
    module = model.context_module
    assert isinstance(module, ContextModule)
    assert (module.noise_width, module.concept_width, len(module.expressive)) == (7, 2, 3)
    assert not module.causal.perfect_interventions
    assert not module.causal.weights_in_unit_interval
    assert ContextAutoencoder(CONCEPTS, LightweightVAE(28, 1), published=True).context_module.first.bias.shape == (96,)
