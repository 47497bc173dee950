"""How contexts reach the layers."""

import copy
import pickle
import threading

import pytest
import torch
from torch import nn
from transformers import (
    FSMTConfig,
    FSMTModel,
    LongformerConfig,
    LongformerModel,
    SegGptConfig,
    SegGptForImageSegmentation,
)

from hf_causal_context import ConceptSet, Context, intervene
from hf_causal_context.adapter.conditioning.in_force import STATE

from ..architectures import ARCHITECTURES, IMAGE_TOKEN
from .small import CONCEPTS, MIXED, VARIANTS, Mlp, adapted, config, gpt2, inputs


@pytest.fixture(params=VARIANTS)
def model(request):
    return adapted(**VARIANTS[request.param])


@pytest.fixture(autouse=True)
def _nothing_is_left_behind():
    yield
    assert STATE.box.request is None
    assert STATE.box.frame is None


def test_a_mixed_batch_equals_separate_runs(model):
    x = inputs()
    with intervene(model, MIXED):
        together = model(x)
    apart = []
    for i, context in enumerate(MIXED):
        with intervene(model, context):
            apart.append(model(x[i : i + 1]))
    torch.testing.assert_close(together, torch.cat(apart), rtol=1e-5, atol=1e-6)
    assert (together[0] - together[3]).abs().max() > 1e-3


def test_an_adapted_part_that_is_put_in_later_is_found():
    part, whole = adapted(), nn.Sequential(nn.Identity())
    with pytest.raises(ValueError, match="has no causal context adapter"):
        intervene(whole, "thick")
    whole.append(copy.deepcopy(part))
    x = inputs()
    with intervene(whole, "thick"):
        assert torch.equal(whole(x), part(x, context="thick"))


def test_contexts_are_resolved_once_however_often_they_are_used(model, monkeypatch):
    calls = []
    strengths = ConceptSet.strengths
    monkeypatch.setattr(ConceptSet, "strengths", lambda *args: calls.append(args) or strengths(*args))
    context = intervene(model, MIXED)
    for _ in range(2):
        with context:
            model(inputs())
    assert len(calls) == 1


def test_every_way_to_say_it_gives_the_same(model):
    x = inputs()
    mask = torch.tensor([[1, 0, 0], [0, 0, 0], [0, -0.5, 2], [1, 1, 0]])
    contexts = [Context("thick"), Context(), Context({"slant": -0.5, "size": 2.0}), Context("thick") | Context("slant")]
    expected = model(x, context=MIXED)
    for same in (mask, contexts, tuple(contexts)):
        assert torch.equal(model(x, context=same), expected)
        with intervene(model, same):
            assert torch.equal(model(x), expected)
    one = model(x, context="thick+slant")
    for same in (
        {"thick": 1.0, "slant": 1.0},
        ("slant", "thick"),
        torch.tensor([1.0, 1, 0]),
        torch.tensor([[1.0, 1, 0]]),
    ):
        assert torch.equal(model(x, context=same), one)


def test_without_a_context_the_model_is_the_base_bit_for_bit(model):
    x, base = inputs(), Mlp()(inputs())
    assert torch.equal(model(x), base)
    assert torch.equal(model(x, context=None), base)
    assert not torch.equal(model(x, context=()), base)


def test_training_without_a_context_is_an_error(model):
    model.train()
    with pytest.raises(ValueError, match="No context is set for adapter 'default' in training mode"):
        model(inputs())
    model(inputs(), context=())
    with model.disable_adapter():
        model(inputs())


@pytest.mark.parametrize("variant", ["independent", "reduced, anchored", "structural, anchored, ordered"])
def test_without_an_observational_part_the_empty_context_is_bit_identical_to_the_base(variant):
    model, x = adapted(**VARIANTS[variant], observational_rank=0), inputs()
    base = Mlp()(x)
    assert torch.equal(model(x), base)
    assert torch.equal(model(x, context=()), base)
    mixed = model(x, context=MIXED)
    assert torch.equal(mixed[1], base[1])
    assert not torch.equal(mixed[0], base[0])


def test_nested_uses_replace_each_other_and_end():
    model, x = adapted(), inputs()
    thick, slant = model(x, context="thick"), model(x, context="slant")
    with intervene(model, "thick"):
        with intervene(model, "slant"):
            assert torch.equal(model(x), slant)
        assert torch.equal(model(x), thick)
        assert torch.equal(model(x, context="slant"), slant)
        assert torch.equal(model(x), thick)
    assert torch.equal(model(x), Mlp()(x))


def test_one_object_can_be_entered_again():
    model, x = adapted(), inputs()
    thick = intervene(model, "thick")
    with thick, thick:
        inside = model(x)
    with thick:
        assert torch.equal(model(x), inside)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_exceptions_leave_nothing_behind(error):
    model, x = adapted(), inputs()

    def fail(*_):
        raise error

    handle = model.get_base_model().second.base_layer.register_forward_pre_hook(fail)
    with pytest.raises(error), intervene(model, "thick"):
        model(x)
    handle.remove()
    assert torch.equal(model(x), Mlp()(x))


def test_an_interrupted_forward_does_not_serve_the_next_context():
    model, x = adapted(), inputs()
    first = model.get_base_model().first
    with intervene(model, "slant"):
        expected = first(x)

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = model.get_base_model().second.base_layer.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(x, context="thick")
    handle.remove()
    with intervene(model, "slant"):
        assert torch.equal(first(x), expected)
    STATE.box.frame = None  # of the forward that was interrupted outside intervene()


def test_threads_do_not_mix():
    model, x = adapted(), inputs()
    expected = {name: model(x, context=name) for name in CONCEPTS}
    wrong, barrier = [], threading.Barrier(len(CONCEPTS))

    def run(name):
        with intervene(model, name):
            barrier.wait()
            wrong.extend(name for _ in range(200) if not torch.equal(model(x), expected[name]))

    threads = [threading.Thread(target=run, args=(name,)) for name in CONCEPTS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_two_models_do_not_mix():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.outer = adapted(concepts=("thick",))
            self.inner = adapted(concepts=("slant",))

    pair, x = Pair(), inputs()
    expected = pair.inner(x, context="slant")
    pair.outer.get_base_model().first.register_forward_hook(
        lambda *_: torch.testing.assert_close(pair.inner(x), expected)
    )
    with intervene(pair.inner, "slant"), intervene(pair.outer, "thick"):
        pair.outer(x)
        with pytest.raises(ValueError, match="Unknown concept 'thick'"):
            pair.inner(x, context="thick")
    with pytest.raises(ValueError, match="Pair holds 2 models with adapters of their own"):
        intervene(pair, "thick")


def test_deepcopy_and_pickle_give_models_of_their_own():
    model, x = adapted(), inputs()
    expected = model(x, context=MIXED)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(x, context=MIXED), expected)
        with intervene(model, "thick"):
            assert torch.equal(copied(x), Mlp()(x))
        with intervene(copied, MIXED):
            assert torch.equal(copied(x), expected)


def test_guidance_copies_are_tiled_and_images_interleaved():
    model = adapted()
    contexts, x = [("thick",), ("slant",)], inputs(2)
    a, b = model(x[:1], context="thick"), model(x[1:], context="slant")
    with intervene(model, contexts, guidance_copies=2):
        torch.testing.assert_close(model(torch.cat([x, x])), torch.cat([a, b, a, b]))
        torch.testing.assert_close(model(x), torch.cat([a, b]))  # a call without guidance in between
    with intervene(model, contexts, images_per_prompt=2, guidance_copies=2):
        torch.testing.assert_close(model(x.repeat_interleave(2, 0).repeat(2, 1)), torch.cat([a, a, b, b] * 2))
    with (
        intervene(model, contexts),
        pytest.raises(ValueError, match="2 contexts were given, but the model's input has 4 rows.*guidance_copies"),
    ):
        model(torch.cat([x, x]))
    with intervene(model, [("thick",), ("thick",)]):
        torch.testing.assert_close(model(torch.cat([x[:1]] * 4)), torch.cat([a] * 4))


@pytest.mark.parametrize(
    "kwargs",
    [
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3, "top_k": 1},
    ],
)
def test_generate_matches_rows_of_beams_and_returned_sequences(kwargs):
    model = adapted(gpt2())
    contexts = [("thick",), {"slant": 3.0}, ()]
    ids = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 9]])
    kwargs = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(ids)} | kwargs
    with intervene(model, contexts):
        together = model.generate(input_ids=ids, **kwargs)
    apart = []
    for i, context in enumerate(contexts):
        with intervene(model, context):
            apart.append(model.generate(input_ids=ids[i : i + 1], **kwargs | {"attention_mask": torch.ones(1, 3)}))
    assert torch.equal(together, torch.cat(apart))
    with intervene(model, contexts), pytest.raises(ValueError, match="3 contexts were given.*6 rows"):
        model(ids.repeat_interleave(2, 0))  # nobody but generate() may be trusted to interleave


def test_generate_takes_a_context():
    model = adapted(gpt2(), task_type="CAUSAL_LM")
    ids = torch.tensor([[1, 2, 3]])
    with intervene(model, {"slant": 3.0}):
        expected = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)
    assert torch.equal(
        model.generate(input_ids=ids, max_new_tokens=6, do_sample=False, context={"slant": 3.0}), expected
    )
    assert not torch.equal(model.generate(input_ids=ids, max_new_tokens=6, do_sample=False), expected)


class Flattened(nn.Module):
    """A layer that sees rows x frames, or rows that do not depend on the batch."""

    def __init__(self, rows):
        super().__init__()
        self.rows = rows
        self.layer = nn.Linear(10, 4)

    def forward(self, x):
        return self.layer(self.rows(x))


def test_rows_inside_a_model_are_sample_major():
    model = adapted(Flattened(lambda x: x.repeat_interleave(5, 0)), target_modules=["layer"])
    x = inputs()
    together = model(x, context=MIXED)
    apart = [model(x[i : i + 1], context=c) for i, c in enumerate(MIXED)]
    torch.testing.assert_close(together, torch.cat(apart))


def test_rows_that_cannot_be_matched_are_an_error():
    model = adapted(Flattened(lambda x: x[:1]), target_modules=["layer"])
    with pytest.raises(ValueError, match="Layer 'layer' sees 1 rows while the model's input has 4 with diff"):
        model(inputs(), context=MIXED)
    assert model(inputs(), context="thick").shape == (1, 4)
    assert model(inputs(), context=[("thick",)] * 4).shape == (1, 4)


def test_ragged_samples_are_an_error_even_where_the_numbers_fit():
    class Ragged(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(10, 4)

        def forward(self, samples):
            return self.layer(torch.cat(samples))

    model = adapted(Ragged(), target_modules=["layer"])
    samples = [inputs(1), inputs(3)]
    with pytest.raises(ValueError, match="samples are ragged"):
        model(samples, context=["thick", "slant"])
    assert model(samples, context="thick").shape == (4, 4)


@pytest.mark.parametrize("tokens", [2, 4])
def test_tokens_routed_to_experts_are_an_error(tokens):
    class Routed(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(10, 4)])

        def forward(self, x):
            return self.experts[0](x.flatten(0, 1)[1 : 1 + tokens])

    model, x = adapted(Routed(), target_modules=["experts.0"]), torch.randn(2, 3, 10)
    with pytest.raises(ValueError, match=f"Layer 'experts.0' sees {tokens} rows while the model's input has 2"):
        model(x, context=["thick", "slant"])
    model(x, context="thick")


@pytest.mark.parametrize("shape", [(2, 10), (2, 3, 10)])
def test_experts_that_all_see_the_samples_have_their_contexts(shape):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(10, 4), nn.Linear(10, 4)])

        def forward(self, x):
            return self.experts[0](x) + self.experts[1](x)

    model, x = adapted(Mixed(), target_modules=["experts.0", "experts.1"]), torch.randn(shape)
    apart = torch.cat([model(x[i : i + 1], context=name) for i, name in enumerate(("thick", "slant"))])
    torch.testing.assert_close(model(x, context=["thick", "slant"]), apart)


def longformer():
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LongformerModel(LongformerConfig(**sizes, vocab_size=20, attention_window=4, max_position_embeddings=20))


def fsmt():
    sizes = {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    return FSMTModel(FSMTConfig(**sizes, **heads, src_vocab_size=20, tgt_vocab_size=20, max_position_embeddings=20))


@pytest.mark.parametrize(("build", "targets"), [(longformer, ["query", "value"]), (fsmt, ["q_proj", "v_proj"])])
def test_sequence_first_architectures_take_one_context(build, targets):
    torch.manual_seed(0)
    model = adapted(build(), target_modules=targets)
    ids = torch.randint(3, 20, (2, 8))  # as many time steps as four times the samples
    with pytest.raises(ValueError, match=f"{build().__class__.__name__} has layers that see time steps before samples"):
        model(ids, context=["thick", "slant"])
    assert not torch.equal(model(ids, context="thick")[0], model(ids, context="slant")[0])


def test_other_time_steps_before_samples_are_found_by_their_shape():
    class Transposing(nn.Module):
        main_input_name = "x"  # as models of transformers have it

        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(10, 4)

        def forward(self, x):
            return self.layer(x.transpose(0, 1)).transpose(0, 1)

    model, x = adapted(Transposing(), target_modules=["layer"]), torch.randn(2, 8, 10)
    with pytest.raises(ValueError, match="Layer 'layer' sees 8 rows while .*2 with .*time steps come before samples"):
        model(x, context=["thick", "slant"])
    model(x, context="thick")


@torch.no_grad()
def test_samples_whose_parts_are_put_one_after_the_other_need_one_context():
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": [16, 8]}
    layers = {"patch_size": 2, "merge_index": 0, "intermediate_hidden_state_indices": [0], "decoder_hidden_size": 4}
    model = adapted(SegGptForImageSegmentation(SegGptConfig(**sizes, **layers)), target_modules=["qkv"])
    names = ("pixel_values", "prompt_pixel_values", "prompt_masks")
    values = {name: torch.randn(2, 3, 8, 8) for name in names}
    with pytest.raises(ValueError, match="SegGptForImageSegmentation puts parts of all samples one after the other"):
        model(**values, context=["thick", "slant"])
    model(**values, context="thick")


def test_images_that_belong_to_one_sample_only_are_an_error():
    architecture = ARCHITECTURES["llava"]
    values = architecture.inputs(2)
    language, vision = (
        adapted(architecture.build(), target_modules=rf".*{part}.*q_proj") for part in ("language", "vision")
    )
    for model in (language, vision):
        model(**values, context=["thick", "slant"])
    ids = values["input_ids"]
    ids[0, : 2 * int((ids[0] == IMAGE_TOKEN).sum())] = IMAGE_TOKEN  # both images in the first sample
    ids[1] = 1
    language(**values, context=["thick", "slant"])
    with pytest.raises(ValueError, match="with different numbers of images"):
        vision(**values, context=["thick", "slant"])
    vision(**values, context="thick")


def test_parts_of_a_model_can_run_on_their_own():
    model, x = adapted(), inputs()
    layer = model.get_base_model().first
    with intervene(model, MIXED):
        together = layer(x)
        with pytest.raises(ValueError, match="4 contexts were given"):
            layer(inputs(8))
    apart = []
    for i, context in enumerate(MIXED):
        with intervene(model, context):
            apart.append(layer(x[i : i + 1]))
    torch.testing.assert_close(together, torch.cat(apart))


def test_a_model_with_an_argument_called_context_keeps_it():
    class Takes(Mlp):
        def forward(self, x, context):
            return super().forward(x) + context

    model = adapted(Takes(), target_modules=["first"])
    assert torch.equal(model(inputs(), context=1.0), model(inputs(), context=0.0) + 1)


@pytest.mark.parametrize(
    ("context", "error", "message"),
    [
        (
            "color",
            ValueError,
            r"Unknown concept 'color' in context 'color'. Known concepts: 'thick', 'slant', 'size'",
        ),
        (["thick", "color+size"], ValueError, r"Unknown concept 'color' in context 'color\+size'"),
        ([], ValueError, "empty list of contexts"),
        (3, TypeError, "3 of type int is not a context"),
        ([3], TypeError, "3 of type int is not a context"),
        (torch.zeros(4, 2), ValueError, r"shape \(4, 2\); it must be \(rows, 3\)"),
        (torch.zeros(4, 3).long(), TypeError, "must be floating point"),
        (torch.full((4, 3), float("nan")), ValueError, "NaN or infinite"),
        (torch.zeros(4, 3, device="meta"), ValueError, "device 'meta'"),
        (torch.zeros(3, 3), ValueError, "3 contexts were given, but the model's input has 4 rows"),
    ],
)
def test_wrong_contexts(context, error, message):
    model = adapted()
    with pytest.raises(error, match=message):
        model(inputs(), context=context)
    with pytest.raises(error, match=message), intervene(model, context):
        model(inputs())


def test_none_is_not_a_context():
    with pytest.raises(TypeError, match=r"context=None is not a context. The observational context is \(\)"):
        intervene(adapted(), None)


def test_a_mask_on_another_device_than_the_input():
    model = adapted().to("meta")
    with pytest.raises(ValueError, match="The intervention mask lies on cpu, the model's input on meta. Move it"):
        model(inputs().to("meta"), context=torch.zeros(4, 3))
    assert model(inputs().to("meta"), context=MIXED).device.type == "meta"


@pytest.mark.parametrize("kwargs", [{"images_per_prompt": 0}, {"guidance_copies": 1.5}, {"guidance_copies": True}])
def test_wrong_factors(kwargs):
    with pytest.raises(ValueError, match="must be a whole number of at least 1"):
        intervene(adapted(), "thick", **kwargs)


def test_a_model_without_the_adapter():
    with pytest.raises(ValueError, match="Mlp has no causal context adapter, so a context would change nothing"):
        intervene(Mlp(), "thick")
    with pytest.raises(TypeError, match="takes a model"):
        intervene("unet", "thick")


def test_a_call_without_tensors():
    class NoInput(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self):
            return self.layer(torch.ones(2, 3))

    model = adapted(NoInput(), target_modules=["layer"])
    assert model().shape == (2, 3)
    with pytest.raises(ValueError, match="called without a tensor"):
        model(context="thick")


class TestSeveralAdapters:
    @pytest.fixture
    def model(self):
        model = adapted(concepts=("thick", "slant"), mechanism="reduced")
        model.add_adapter("other", config(concepts=("size", "slant"), target_modules=["second"]))
        return model.eval()

    def test_two_active_at_once_with_their_own_concepts(self, model):
        x = inputs()
        first = model(x, context="thick")
        model.base_model.set_adapter(["default", "other"])
        both = model(x, context=["thick", "thick+size", "size", ()])
        torch.testing.assert_close(both[0], first[0])
        assert (both[1] - first[1]).abs().max() > 1e-3
        with intervene(model, "thick"), intervene(model, "size", adapter_name="other"):
            torch.testing.assert_close(model(x)[1], both[1])
        with intervene(model, "thick+size"), intervene(model, (), adapter_name="default", observational=0):
            torch.testing.assert_close(model(x)[2], both[2])

    def test_a_shared_name_needs_the_adapter(self, model):
        model.base_model.set_adapter(["default", "other"])
        with pytest.raises(ValueError, match="Concept 'slant' belongs to several active adapters: 'default', 'other'"):
            intervene(model, "slant")
        with pytest.raises(ValueError, match="A mask of shape .* does not say for which of the active adapters"):
            intervene(model, torch.zeros(1, 2))
        with pytest.raises(ValueError, match="Unknown adapter 'third'. This model has: 'default', 'other'"):
            intervene(model, "slant", adapter_name="third")
        with intervene(model, "slant", adapter_name="other"):
            model(inputs())

    def test_inactive_adapters_have_no_say(self, model):
        with pytest.raises(ValueError, match="Unknown concept 'size'.* belongs to adapter 'other': activate that one"):
            intervene(model, "size")

    def test_a_context_is_checked_again_when_other_adapters_become_active(self, model):
        with intervene(model, "thick"):
            model.set_adapter("other")
            with pytest.raises(ValueError, match="Unknown concept 'thick'.* .of adapter 'other'"):
                model(inputs())
        with intervene(model, "size"):
            model.add_adapter("third", config(concepts=("size",), target_modules=["first"]))
            model.set_adapter("third")
            assert not torch.equal(model.eval()(inputs()), Mlp()(inputs()))

    @pytest.mark.parametrize(
        ("active", "concepts", "message"),
        [
            (
                ["default", "third"],
                ("thick", "slant"),
                "does not say for which of the active adapters 'default', 'third'",
            ),
            (["third"], ("a", "b"), "has columns for 'thick', 'slant', and adapter 'third', .* has 'a', 'b'"),
        ],
    )
    def test_so_is_a_mask_whose_columns_have_no_names(self, model, active, concepts, message):
        model.add_adapter("third", config(concepts=concepts, target_modules=["first"]))
        model.base_model.set_adapter("default")
        with intervene(model, torch.tensor([[1.0, 0]])):
            model.eval()(inputs())
            model.base_model.set_adapter(active)
            with pytest.raises(ValueError, match=message):
                model(inputs())

    def test_delete(self, model):
        x = inputs()
        expected = model(x, context="thick")
        model.delete_adapter("other")
        assert torch.equal(model(x, context="thick"), expected)
        with pytest.raises(ValueError, match="Unknown adapter 'other'. This model has: 'default'"):
            intervene(model, "size", adapter_name="other")


class TestAnAdapterThatIsReplacedInTheBlock:
    def replace(self, model, concepts):
        model.delete_adapter("default")
        model.add_adapter("default", config(concepts=concepts, target_modules=["first", "second"]))
        model.set_adapter("default")
        model.eval()

    @pytest.mark.parametrize("concepts", [("slant", "size", "thick"), ("thick", "slant", "size", "hue"), ("hue",)])
    @pytest.mark.parametrize("named", [{}, {"adapter_name": "default"}])
    def test_by_one_with_other_concepts_needs_another_context(self, concepts, named):
        model, x = adapted(), inputs()
        with intervene(model, "thick", **named):
            self.replace(model, concepts)
            with pytest.raises(ValueError, match="for an adapter 'default' with the concepts 'thick', 'slant', 'size'"):
                model(x)
        with intervene(model, concepts[0], **named):
            assert not torch.equal(model(x), Mlp()(x))

    def test_by_one_with_the_same_has_the_context(self):
        model, x = adapted(), inputs()
        with intervene(model, "thick"):
            self.replace(model, CONCEPTS)
            assert torch.equal(model(x), model(x, context="thick"))
            assert not torch.equal(model(x), model(x, context=()))


def test_a_context_for_an_adapter_by_name_that_is_off_is_refused_inside_another_too():
    model, x = adapted(), inputs()
    model.add_adapter("other", config(concepts=("hue",), target_modules=["first"]))
    model.set_adapter("default")
    model.eval()
    with (
        intervene(model, "thick"),
        intervene(model, "hue", adapter_name="other"),
        pytest.raises(ValueError, match="adapters it is for, 'other', are not active"),
    ):
        model(x)
