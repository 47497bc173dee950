"""Generation by language models, compared with separate runs: one per sample."""

import copy
import pickle
import threading

import pytest
import torch
import transformers
from peft import AutoPeftModelForCausalLM, PeftModel
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import nn
from transformers import PreTrainedTokenizerFast, TextIteratorStreamer, TextStreamer, pipeline

from hf_causal_context import intervene, save_baked

from ..architectures import ARCHITECTURES, LLAMA
from .small import VARIANTS, adapted, config

CONTEXTS = [("thick",), (), {"slant": 2.0, "size": -1.0}, "thick+slant"]
MODELS = ("llama", "gpt2", "qwen3", "t5", "bart")
CAUSAL = ("llama", "gpt2", "qwen3")
PROMPTS = ["w3 w9 w17", "w40 w5 w33", "w8 w50 w21", "w60 w4 w11"]


def bart():
    torch.manual_seed(0)
    sizes = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = transformers.BartConfig(vocab_size=64, max_position_embeddings=40, init_std=0.3, **sizes, **heads)
    return transformers.BartForConditionalGeneration(config).eval()


def base_model(name):
    model = bart() if name == "bart" else ARCHITECTURES[name].build()
    # No early ends: all rows have the same length.
    model.generation_config.eos_token_id = model.generation_config.forced_eos_token_id = None
    model.generation_config.pad_token_id = model.config.pad_token_id = 0
    model.generation_config.decoder_start_token_id = 0 if model.config.is_encoder_decoder else None
    return model


def build(name, **kwargs):
    task = "CAUSAL_LM" if name in CAUSAL else "SEQ_2_SEQ_LM"
    return adapted(base_model(name), task_type=task, **kwargs)


@pytest.fixture(params=MODELS)
def name(request):
    return request.param


@pytest.fixture
def ids():
    return torch.randint(3, 62, (len(CONTEXTS), 4), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def tokenizer():
    words = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *(f"w{n}" for n in range(3, 64))])}
    backend = Tokenizer(WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def generate(model, ids, seed=0, **kwargs):
    torch.manual_seed(seed)
    kwargs = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)} | kwargs
    return model.generate(input_ids=ids, **kwargs)


def separately(model, ids, **kwargs):
    """One call of generate per sample."""
    rows = [generate(model, ids[i : i + 1], context=context, **kwargs) for i, context in enumerate(CONTEXTS)]
    return torch.cat(rows)


def differing(rows):
    return len({tuple(row.tolist()) for row in rows})


@pytest.mark.parametrize("variant", ["independent", "reduced", "structural, anchored, ordered"])
def test_greedy_in_mixed_contexts(name, ids, variant):
    model = build(name, **VARIANTS[variant], observational_rank=0)  # a random one drowns T5's random concepts
    together = generate(model, ids, context=CONTEXTS)
    assert torch.equal(together, separately(model, ids))
    assert not torch.equal(together, generate(model, ids, context=()))
    same_prompt = ids[:1].expand(len(CONTEXTS), -1)
    assert differing(generate(model, same_prompt, context=CONTEXTS)) > 1


@pytest.mark.parametrize("kwargs", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}])
def test_beams(name, ids, kwargs):
    model = build(name)
    together = generate(model, ids, context=CONTEXTS, **kwargs)
    assert together.shape[0] == len(CONTEXTS) * kwargs.get("num_return_sequences", 1)
    assert torch.equal(together, separately(model, ids, **kwargs))


def test_generate_of_a_model_whose_part_has_the_adapter(ids):
    torch.manual_seed(0)
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=4, patch_size=2
        ),
        text_config=transformers.LlamaConfig(
            vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
        ),
        image_token_index=63,
    )
    whole = transformers.LlavaForConditionalGeneration(config).eval()
    whole.generation_config.eos_token_id, whole.generation_config.pad_token_id = None, 0
    adapted(whole.model.language_model)
    with intervene(whole, CONTEXTS):
        together = generate(whole, ids, num_beams=3)
    apart = []
    for i, context in enumerate(CONTEXTS):
        with intervene(whole, context):
            apart.append(generate(whole, ids[i : i + 1], num_beams=3))
    assert torch.equal(together, torch.cat(apart))
    with intervene(whole, CONTEXTS[:2]), pytest.raises(ValueError, match="2 contexts were given, but generate.. was"):
        generate(whole, ids, num_beams=3)


def test_copies_for_guidance_that_a_model_makes_itself(ids):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64}
    crossed = {"cross_num_attention_heads": 2, "cross_num_key_value_heads": 2, "cross_head_dim": 8}
    tokens = {"pad_token_id": 61, "eos_token_id": 60, "bos_token_id": 62}
    decoder = transformers.DiaDecoderConfig(**sizes, **crossed, **tokens, cross_hidden_size=16, num_channels=2)
    parts = {"encoder_config": transformers.DiaEncoderConfig(**sizes), "decoder_config": decoder}
    config = transformers.DiaConfig(**parts, delay_pattern=[0, 1])
    dia = transformers.DiaForConditionalGeneration(config).eval()
    for parameter in dia.parameters():
        nn.init.normal_(parameter, std=0.3)
    model = adapted(dia, target_modules=["q_proj", "v_proj"])

    def logits(rows, contexts, **options):
        asked = {"guidance_scale": 3.0, "output_logits": True, "return_dict_in_generate": True}
        with intervene(model, contexts, **options):
            found = generate(dia, rows, max_new_tokens=2, **asked).logits[0]
        return torch.stack(found.chunk(2)).nan_to_num(neginf=0)  # with and without the prompts

    with pytest.raises(ValueError, match="2 contexts were given, but the model's input has 4 rows.*guidance_copies=2"):
        logits(ids[:2], CONTEXTS[:2])
    apart = torch.cat([logits(ids[i : i + 1], CONTEXTS[i]) for i in range(2)], dim=1)
    torch.testing.assert_close(logits(ids[:2], CONTEXTS[:2], guidance_copies=2), apart, rtol=1e-4, atol=1e-4)


class TestWhisper:
    """It drops sounds from the batch that are done, and repeats windows that turned out badly, without a word."""

    @pytest.fixture
    def model(self):
        sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
        heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
        tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}
        lengths = {"num_mel_bins": 4, "max_source_positions": 8, "max_target_positions": 30}
        torch.manual_seed(0)
        config = transformers.WhisperConfig(vocab_size=80, **sizes, **heads, **tokens, **lengths, init_std=0.5)
        whisper = transformers.WhisperForConditionalGeneration(config).eval()
        options = {"no_timestamps_token_id": 60, "is_multilingual": False, "max_initial_timestamp_index": None}
        options |= {"begin_suppress_tokens": None, "suppress_tokens": None, "max_length": 8}
        for name, value in options.items():
            setattr(whisper.generation_config, name, value)
        return adapted(whisper, target_modules=["decoder.layers.0.self_attn.q_proj", "fc1", "fc2"], alpha=8.0)

    @staticmethod
    def write(model, rows, context, windows=1, **options):
        sounds = torch.randn(4, 4, 48, generator=torch.Generator().manual_seed(1))[rows, :, : 16 * windows]
        mask = torch.ones(4, 16 * windows, dtype=torch.long)
        mask[:2, 16:] = 0  # the first two end first, and the others with two beams are as many rows as all
        with intervene(model, context):
            return model.generate(input_features=sounds, attention_mask=mask[rows], return_timestamps=True, **options)

    @pytest.mark.parametrize("beams", [1, 2])
    def test_one_window_has_the_context_of_its_sound(self, model, beams):
        together = self.write(model, slice(0, 4), CONTEXTS, num_beams=beams)
        for i, context in enumerate(CONTEXTS):
            (alone,) = self.write(model, slice(i, i + 1), context, num_beams=beams)
            assert torch.equal(together[i, : len(alone)], alone)
        assert differing(together) > 1

    @pytest.mark.parametrize(
        "options",
        [
            {"windows": 2, "num_beams": 2},
            {"windows": 2, "cache_implementation": "static"},
            {"temperature": (0.0, 0.2), "compression_ratio_threshold": 1.3, "logprob_threshold": -0.5},
        ],
    )
    def test_other_sounds_need_one_context(self, model, options):
        self.write(model, slice(0, 4), "thick", **options)
        with pytest.raises(ValueError, match="Whisper goes on with some of the sounds of a batch alone"):
            self.write(model, slice(0, 4), CONTEXTS, **options)
        base = model.unload()
        assert not {"generate", "generate_with_fallback"} & vars(base).keys()


class Sampler(nn.Module):
    """A model of somebody's own, whose generate() takes a number."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x)

    def generate(self, num):
        return self(torch.ones(num, 4))


def test_generate_of_other_models_is_left_alone(ids):
    model = adapted(Sampler(), target_modules=["linear"])
    with intervene(model, CONTEXTS):
        assert torch.equal(model.get_base_model().generate(4), model(torch.ones(4, 4)))


def test_what_others_put_around_generate_runs_and_stays(ids):
    model = build("llama")
    base, calls = model.get_base_model(), []
    inner = base.generate

    def around(*args, **kwargs):  # as FSDP2 gathers weights
        calls.append(len(kwargs["input_ids"]))
        return inner(*args, **kwargs)

    expected = generate(model, ids, context=CONTEXTS, num_beams=2)
    base.generate = around
    assert torch.equal(generate(model, ids, context=CONTEXTS, num_beams=2), expected)
    assert calls == [len(ids)]
    model.unload()
    assert base.generate is around


def test_a_copy_and_a_pickle_generate_as_the_model_does(name, ids):
    model = build(name)
    expected = generate(model, ids, context=CONTEXTS, num_beams=2)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(generate(again, ids, context=CONTEXTS, num_beams=2), expected)


def test_a_context_of_the_call_replaces_the_one_around_it(name, ids):
    model = build(name)
    expected = generate(model, ids[:2], context=CONTEXTS[:2])
    with intervene(model, CONTEXTS):
        assert torch.equal(generate(model, ids[:2], context=CONTEXTS[:2]), expected)


def test_sampling(name, ids):
    model = build(name)
    kwargs = {"do_sample": True, "top_k": 0}
    for i, context in enumerate(CONTEXTS):
        with intervene(model, context):
            expected = generate(model, ids[i : i + 1], seed=3, num_return_sequences=3, **kwargs)
        listed = generate(model, ids[i : i + 1], seed=3, context=[context], num_return_sequences=3, **kwargs)
        assert torch.equal(listed, expected)
        assert differing(expected) == 3
    # Random numbers are drawn for the whole batch, so draws without a choice show who got which context.
    kwargs = {"do_sample": True, "top_k": 1, "num_return_sequences": 3}
    assert torch.equal(generate(model, ids, context=CONTEXTS, **kwargs), separately(model, ids, **kwargs))
    kwargs = {"do_sample": True, "top_k": 0}
    uniform = generate(model, ids, seed=5, context=["thick"] * 4, **kwargs)
    assert torch.equal(uniform, generate(model, ids, seed=5, context="thick", **kwargs))


def test_with_and_without_the_cache(name, ids):
    model = build(name, mechanism="reduced")
    cached = generate(model, ids, context=CONTEXTS)
    assert torch.equal(generate(model, ids, context=CONTEXTS, use_cache=False), cached)
    assert torch.equal(generate(model, ids, context=CONTEXTS, cache_implementation="static"), cached)


@pytest.mark.parametrize("name", CAUSAL)
def test_left_padding(name, ids):
    model, lengths = build(name, observational_rank=0), (2, 4, 1, 3)
    mask = torch.tensor([[0] * (4 - n) + [1] * n for n in lengths])
    together = generate(model, ids * mask, context=CONTEXTS, attention_mask=mask)[:, 4:]
    for i, (context, n) in enumerate(zip(CONTEXTS, lengths, strict=True)):
        alone = generate(model, ids[i : i + 1, 4 - n :], context=context)[:, n:]
        assert torch.equal(together[i : i + 1], alone)
    base = generate(base_model(name), ids * mask, attention_mask=mask)[:, 4:]
    assert torch.equal(together[1], base[1])
    assert not torch.equal(together, base)


@pytest.mark.parametrize("mechanism", ["independent", "reduced"])
def test_layers_of_different_sizes_share_one_forward(ids, mechanism):
    ranks = {"q_proj": 2, "down_proj": 3, "lm_head": 1}
    targets = ["q_proj", "v_proj", "down_proj", "lm_head"]
    model = build("llama", mechanism=mechanism, target_modules=targets, rank_pattern=ranks)
    model.add_adapter("other", config(concepts=("calm", "joy", "dry"), mechanism=mechanism, target_modules=targets))
    model.base_model.set_adapter(["default", "other"])
    model.eval()
    contexts = [("thick",), (), {"joy": -1.0}, "thick+joy"]
    together = model(ids, context=contexts).logits
    apart = torch.cat([model(ids[i : i + 1], context=context).logits for i, context in enumerate(contexts)])
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-4)
    if mechanism == "independent":  # each adapter acts in its own contexts alone
        for name, i, context in (("default", 0, "thick"), ("other", 2, {"joy": -1.0})):
            model.set_adapter(name)
            torch.testing.assert_close(model(ids, context=context).logits[i], apart[i], rtol=1e-4, atol=1e-4)


def test_the_empty_context_has_the_logits_of_the_base(name, ids):
    model = build(name, observational_rank=0)
    kwargs = {"output_logits": True, "return_dict_in_generate": True}
    # Frozen, as get_peft_model leaves it: torch.matmul rounds strided features by `requires_grad` of the weight.
    frozen = base_model(name).requires_grad_(False)
    base, empty, mixed = (
        torch.stack(generate(m, ids, **kwargs, **context).logits, 1)
        for m, context in ((frozen, {}), (model, {"context": ()}), (model, {"context": CONTEXTS}))
    )
    assert torch.equal(empty, base)
    assert torch.equal(mixed[1], base[1])
    assert not torch.equal(mixed[0], base[0])


def test_baked_and_merged_equal_the_context(name, ids, tmp_path):
    model, context = build(name, mechanism="reduced"), {"thick": 1.0, "slant": 0.5}
    expected = generate(model, ids, context=context)
    assert not torch.equal(expected, generate(model, ids, context=()))
    baked = PeftModel.from_pretrained(base_model(name), save_baked(model, context, tmp_path / "baked")).eval()
    assert torch.equal(generate(baked, ids), expected)
    assert torch.equal(generate(baked.merge_and_unload(), ids), expected)
    with intervene(model, context):
        assert torch.equal(generate(model.merge_and_unload(), ids), expected)


def test_after_saving_and_loading(ids, tmp_path):
    model = build("llama")
    with pytest.warns(UserWarning, match="was saved without its causal context adapter"):
        model.get_base_model().save_pretrained(tmp_path / "base")
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(generate(loaded, ids, context=CONTEXTS), generate(model, ids, context=CONTEXTS))


class TestCounts:
    """A wrong number of contexts is found while the prompts are read."""

    @pytest.fixture(params=[2, 3, 8])
    def contexts(self, request):
        return (CONTEXTS + CONTEXTS[::-1])[: request.param]

    @pytest.mark.parametrize("kwargs", [{}, {"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}])
    def test_none_fits_by_accident(self, name, ids, contexts, kwargs):
        model, count = build(name), []
        model.get_base_model().lm_head.register_forward_hook(lambda *_: count.append(1))
        message = f"{len(contexts)} contexts were given, but generate.. was called with 4 prompts. Pass one context, or"
        with pytest.raises(ValueError, match=message):
            generate(model, ids, context=contexts, **kwargs)
        assert not count

    def test_equal_contexts_are_one(self, ids):
        model = build("llama")
        assert torch.equal(
            generate(model, ids, context=["thick", "thick"], num_beams=2),
            generate(model, ids, context="thick", num_beams=2),
        )


class TestStreamers:
    def test_text_streamer(self, ids, tokenizer, capsys):
        model = build("llama")
        expected = generate(model, ids[2:3], context=CONTEXTS[2])
        streamer = TextStreamer(tokenizer, skip_prompt=True)
        assert torch.equal(generate(model, ids[2:3], context=CONTEXTS[2], streamer=streamer), expected)
        assert capsys.readouterr().out.split() == tokenizer.decode(expected[0, 4:]).split()

    def test_in_threads(self, ids, tokenizer):
        model = build("llama")
        expected = separately(model, ids)
        streamers = [TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=20) for _ in CONTEXTS]

        def run(i):
            model.generate(
                input_ids=ids[i : i + 1],
                attention_mask=torch.ones(1, 4),
                context=CONTEXTS[i],
                streamer=streamers[i],
                max_new_tokens=6,
                do_sample=False,
            )

        threads = [threading.Thread(target=run, args=(i,)) for i in range(len(CONTEXTS))]
        for thread in threads:
            thread.start()
        texts = ["".join(streamer) for streamer in streamers]
        for thread in threads:
            thread.join()
        assert [text.split() for text in texts] == [tokenizer.decode(row[4:]).split() for row in expected]


PIPELINE_OPTIONS = {"max_new_tokens": 6, "do_sample": False, "return_full_text": False}


class TestPipeline:
    @pytest.fixture
    def model(self):
        return build("llama")

    @pytest.fixture
    def pipe(self, model, tokenizer):
        return pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")

    @pytest.fixture
    def expected(self, model, tokenizer):
        rows = separately(model, torch.tensor(tokenizer(PROMPTS)["input_ids"]))
        return [tokenizer.decode(row[3:], skip_special_tokens=True) for row in rows]

    @staticmethod
    def texts(outputs):
        return [output[0]["generated_text"].strip() for output in outputs]

    def test_one_context(self, pipe, model, expected):
        assert self.texts([pipe(PROMPTS[0], context="thick", **PIPELINE_OPTIONS)]) == expected[:1]
        with intervene(model, CONTEXTS[2]):
            assert self.texts(pipe(PROMPTS, **PIPELINE_OPTIONS))[2] == expected[2]
        assert self.texts(pipe(PROMPTS, context=CONTEXTS[3], **PIPELINE_OPTIONS))[3] == expected[3]

    def test_a_context_per_prompt(self, pipe, model, expected):
        kwargs = PIPELINE_OPTIONS | {"batch_size": len(PROMPTS)}
        assert self.texts(pipe(PROMPTS, context=CONTEXTS, **kwargs)) == expected
        with intervene(model, CONTEXTS):
            assert self.texts(pipe(PROMPTS, **kwargs)) == expected

    def test_batches_do_not_share_a_context_per_prompt(self, pipe, model):
        message = "2 contexts were given to a pipeline of transformers that has 4 inputs"
        with intervene(model, CONTEXTS[:2]), pytest.raises(ValueError, match=message):
            pipe(PROMPTS, batch_size=2, **PIPELINE_OPTIONS)
        with pytest.raises(ValueError, match=message):
            pipe(PROMPTS, batch_size=2, context=CONTEXTS[:2], **PIPELINE_OPTIONS)
        pipe(PROMPTS, batch_size=2, context="thick", **PIPELINE_OPTIONS)

    @pytest.mark.parametrize("task", ["text-classification", "token-classification"])
    def test_neither_do_those_of_a_classifier_or_pieces_of_a_text(self, tokenizer, task):
        kind = {"text": "Sequence", "token": "Token"}[task.partition("-")[0]]
        torch.manual_seed(0)
        config = transformers.LlamaConfig(**LLAMA, pad_token_id=0)
        model = getattr(transformers, f"LlamaFor{kind}Classification")(config).eval()
        adapted(model, target_modules=["q_proj"])
        classify = pipeline(task, model=model, tokenizer=tokenizer, device="cpu")
        with intervene(model, CONTEXTS[:2]), pytest.raises(ValueError, match="to a pipeline of transformers that"):
            classify(PROMPTS, batch_size=2)
        with intervene(model, "thick"):
            classify(PROMPTS, batch_size=2)
        if kind == "Sequence":
            with intervene(model, CONTEXTS):
                together = classify(PROMPTS, batch_size=4)
            for prompt, context, found in zip(PROMPTS, CONTEXTS, together, strict=True):
                with intervene(model, context):
                    assert classify(prompt)[0]["score"] == pytest.approx(found["score"], abs=1e-5)

    def test_prompts_one_by_one(self, pipe, model):
        message = r"4 contexts were given, but generate\(\) was called with 1 prompt\. .*batch_size=len\(prompts\)"
        with pytest.raises(ValueError, match=message):
            pipe(PROMPTS, context=CONTEXTS, **PIPELINE_OPTIONS)
        with intervene(model, CONTEXTS), pytest.raises(ValueError, match=message):
            pipe(PROMPTS, **PIPELINE_OPTIONS)
