"""Rows -> tokens and labels; several texts in one row."""

import itertools

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_causal_context.bases.packing import check_packing, pack
from hf_causal_context.bases.tokens import (
    IGNORED,
    Tokenization,
    TokenRow,
    filler,
    known_positions,
    prepare_tokenizer,
    row_length,
)

from .small_language import language_model, word_tokenizer

CAT = [{"role": "user", "content": "a cat"}, {"role": "assistant", "content": "sat"}]
DOG = [{"role": "user", "content": "the dog"}, {"role": "assistant", "content": "ran on"}]


def ending(tokenizer):
    """The tokenizer, which now ends every text, as T5's does."""
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    return tokenizer


def trained_tokenizer(kind):
    """Byte pairs of words, as Llama 2 and Mistral, or GPT-2, have them."""
    backend = Tokenizer(models.BPE())
    if kind == "sentencepiece":
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        backend.decoder = decoders.Metaspace(prepend_scheme="first")
    else:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(special_tokens=["<pad>", "<s>", "</s>"], vocab_size=120, show_progress=False)
    backend.train_from_iterator(["Q: the film is fun", "the fi lm is fun and the film", "Q: the fi lm"] * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>")


def read(row, tokenizer):
    """What a row holds and what of it is learned, as text."""
    return tokenizer.decode(row.ids), tokenizer.decode(row.labels[row.labels != IGNORED])


class TestCausal:
    @pytest.mark.parametrize(
        ("tokenizer", "text", "expected"),
        [
            (word_tokenizer(), "a cat sat", "a cat sat </s>"),
            (word_tokenizer(bos=True), "a cat", "<s> a cat </s>"),
            (ending(word_tokenizer()), "a cat", "a cat </s>"),
            (word_tokenizer(), "a cat</s>", "a cat </s>"),
        ],
    )
    def test_a_text_is_learned_to_its_end(self, tokenizer, text, expected):
        row = Tokenization(tokenizer, "text")({"text": text})
        assert read(row, tokenizer) == (expected, expected)
        assert row.lengths == (len(row.ids),)

    def test_a_long_text_is_cut_on_the_right_and_has_no_end(self):
        tokenizer = word_tokenizer()
        row = Tokenization(tokenizer, "text", max_length=3)({"text": "a cat sat on the mat"})
        assert read(row, tokenizer) == ("a cat sat", "a cat sat")

    def test_a_tokenizer_without_an_end_adds_none(self):
        tokenizer = word_tokenizer()
        tokenizer.eos_token = None
        assert tokenizer.decode(Tokenization(tokenizer, "text")({"text": "a cat"}).ids) == "a cat"

    @pytest.mark.parametrize(
        ("tokenizer", "begin"),
        [(word_tokenizer(), ""), (word_tokenizer(bos=True), "<s> "), (ending(word_tokenizer()), "")],
    )
    def test_of_prompts_exactly_the_completion_and_its_end_are_learned(self, tokenizer, begin):
        row = {"prompt": "a cat", "completion": "sat on"}
        tokens = Tokenization(tokenizer, "prompt")(row)
        assert read(tokens, tokenizer) == (f"{begin}a cat sat on </s>", "sat on </s>")
        assert tokenizer.decode(Tokenization(tokenizer, "prompt").prompt_ids("a cat")) == f"{begin}a cat"
        everything = Tokenization(tokenizer, "prompt", completion_only=False)(row)
        assert read(everything, tokenizer) == (f"{begin}a cat sat on </s>",) * 2

    @pytest.mark.parametrize("prompt", ["a cat", [{"role": "user", "content": "a cat"}]])
    def test_no_space_comes_between_prompt_and_completion(self, prompt):
        """Some tokenizers put a space before any text; a completion follows another text."""
        pieces = [("<pad>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("\u2581", -1.0), *((c, -1.0) for c in "acst:#")]
        backend = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
        backend.decoder = decoders.Replace("\u2581", " ")
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>")
        tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}:{% endfor %}"
        chat = isinstance(prompt, list)
        row = {"prompt": prompt, "completion": [{"role": "assistant", "content": "sat"}] if chat else " sat"}
        ids = Tokenization(tokenizer, "prompt")(row).ids
        assert tokenizer.decode(ids).strip() == ("a cat:sat:" if chat else "a cat sat</s>")

    @pytest.mark.parametrize(
        ("prompt", "completion", "learned"),
        [
            (
                "Q: the fi",
                "lm is fun",
                "film is fun</s>",
            ),  # one token for the end of one and the beginning of the other
            ("Q: ", "the film", "the film</s>"),
            ("Q: the", " film", "film</s>"),
            ("Q:", "the film", "the film</s>"),
        ],
    )
    @pytest.mark.parametrize("kind", ["sentencepiece", "bytes"])
    def test_a_row_says_what_was_written(self, kind, prompt, completion, learned):
        tokenizer = trained_tokenizer(kind)
        whole, seen = read(Tokenization(tokenizer, "prompt")({"prompt": prompt, "completion": completion}), tokenizer)
        assert whole == f"{prompt}{completion}</s>"
        # A token of bytes holds its own space, and none is put before a text: so completions can be apart.
        assert seen == (learned if kind == "sentencepiece" else f"{completion}</s>")

    def test_rows_know_whether_they_are_cut(self):
        tokenizer, row = word_tokenizer(), {"prompt": "a cat", "completion": "sat on the mat"}
        seven = Tokenization(tokenizer, "prompt", max_length=7)(row)
        assert (read(seven, tokenizer)[1], seven.cut) == ("sat on the mat </s>", False)
        assert Tokenization(tokenizer, "prompt", max_length=6)(row).cut
        for max_length, cut in ((5, False), (4, True)):  # of an encoder-decoder on each side
            tokenize = Tokenization(tokenizer, "prompt", encoder_decoder=True, max_length=max_length)
            assert tokenize(row).cut is cut
            assert tokenize({"prompt": "a cat sat on the", "completion": "mat"}).cut is cut

    def test_a_completion_is_cut_but_never_away(self):
        tokenizer = word_tokenizer()
        row = {"prompt": "a cat sat", "completion": "on the mat"}
        assert read(Tokenization(tokenizer, "prompt", max_length=4)(row), tokenizer) == ("a cat sat on", "on")
        with pytest.raises(ValueError, match="The prompt has 3 tokens of --max_length=3, which leaves no room"):
            Tokenization(tokenizer, "prompt", max_length=3)(row)

    def test_messages_follow_the_chat_template(self):
        tokenizer = word_tokenizer(bos=True)
        whole = "user : a cat </s>assistant : sat </s>user : the dog </s>assistant : ran on </s>"
        expected = tokenizer(whole, add_special_tokens=False)["input_ids"]
        row = Tokenization(tokenizer, "messages")({"messages": CAT + DOG})
        assert row.ids.tolist() == row.labels.tolist() == expected
        last = Tokenization(tokenizer, "messages", completion_only=True)({"messages": CAT + DOG})
        assert last.ids.tolist() == expected
        assert read(last, tokenizer)[1] == "ran on </s>"
        chat = Tokenization(tokenizer, "prompt")({"prompt": [*CAT, DOG[0]], "completion": [DOG[1]]})
        assert (chat.ids.tolist(), chat.labels.tolist()) == (expected, last.labels.tolist())
        begin = Tokenization(tokenizer, "prompt").prompt_ids([*CAT, DOG[0]])
        assert begin == expected[: len(begin)]
        assert len(begin) == (last.labels == IGNORED).sum()

    def test_what_cannot_be_learned_is_an_error(self):
        tokenizer, without_chat = word_tokenizer(), word_tokenizer(chat=False)
        with pytest.raises(ValueError, match="the tokenizer has no chat template.*set tokenizer.chat_template"):
            Tokenization(without_chat, "messages")({"messages": CAT})
        with pytest.raises(
            ValueError, match="last message, which must be the assistant's. Roles: user, assistant, user"
        ):
            Tokenization(tokenizer, "messages", completion_only=True)({"messages": [*CAT, DOG[0]]})
        with pytest.raises(ValueError, match="There is nothing to learn: 0 tokens of prompt, 1 of text"):
            Tokenization(tokenizer, "text")({"text": ""})
        with pytest.raises(ValueError, match="must both be text, or both be messages"):
            Tokenization(tokenizer, "prompt")({"prompt": "a cat", "completion": CAT})
        with pytest.raises(ValueError, match="--completion_only_loss: the rows have 'text', without completions"):
            Tokenization(tokenizer, "text", completion_only=True)
        with pytest.raises(ValueError, match="Rows of the column 'image' are no texts"):
            Tokenization(tokenizer, "image")
        without_chat.chat_template = "{{ raise_exception('roles must alternate') }}"
        with pytest.raises(ValueError, match="The chat template refuses these messages: roles must alternate"):
            Tokenization(without_chat, "messages")({"messages": CAT})
        without_chat.chat_template = "{{ messages | length }} {{ add_generation_prompt }}"
        with pytest.raises(ValueError, match="writes the prompt in another way when the completion follows"):
            Tokenization(without_chat, "prompt")({"prompt": CAT[:1], "completion": CAT[1:]})


class TestEncoderDecoder:
    @pytest.mark.parametrize("tokenizer", [word_tokenizer(), ending(word_tokenizer())])
    def test_it_reads_the_prompt_and_learns_the_completion(self, tokenizer):
        ends = tokenizer("a")["input_ids"][-1] == 2
        tokens = Tokenization(tokenizer, "prompt", encoder_decoder=True)({"prompt": "a cat", "completion": "sat on"})
        assert tokenizer.decode(tokens.ids) == ("a cat </s>" if ends else "a cat")
        assert tokenizer.decode(tokens.labels) == "sat on </s>"
        cut = Tokenization(tokenizer, "prompt", encoder_decoder=True, max_length=2)
        tokens = cut({"prompt": "a cat sat", "completion": "sat on the"})
        assert tokenizer.decode(tokens.ids) == ("a </s>" if ends else "a cat")
        assert tokenizer.decode(tokens.labels) == "sat on"

    def test_other_rows_are_errors(self):
        tokenizer = word_tokenizer()
        for shape in ("text", "messages"):
            with pytest.raises(ValueError, match=f"but the rows have '{shape}'. Give them the columns 'prompt'"):
                Tokenization(tokenizer, shape, encoder_decoder=True)
        with pytest.raises(ValueError, match="--completion_only_loss=False: an encoder-decoder learns completions"):
            Tokenization(tokenizer, "prompt", encoder_decoder=True, completion_only=False)
        tokenize = Tokenization(tokenizer, "prompt", encoder_decoder=True)
        with pytest.raises(ValueError, match="takes prompt and completion as text, not as messages"):
            tokenize({"prompt": CAT[:1], "completion": CAT[1:]})
        with pytest.raises(ValueError, match="The prompt has no tokens"):
            tokenize({"prompt": "", "completion": "a cat"})


class TestTokenizer:
    def test_a_padding_token_that_is_named_is_one_of_its_tokens(self):
        tokenizer, model = word_tokenizer(), language_model("llama")
        tokenizer.pad_token = None
        with pytest.raises(ValueError, match="--pad_token='<fill>' is not in the tokenizer's vocabulary"):
            prepare_tokenizer(tokenizer, model, "<fill>")
        prepare_tokenizer(tokenizer, model, "</s>")
        assert tokenizer.pad_token_id == 2

    def test_without_a_padding_token_another_fills_rows_up(self):
        tokenizer, model = word_tokenizer(), language_model("llama")
        assert filler(tokenizer) == 0
        tokenizer.pad_token = None
        prepare_tokenizer(tokenizer, model, None)
        assert tokenizer.pad_token is None
        assert filler(tokenizer) == 2
        tokenizer.eos_token = None
        assert filler(tokenizer) == 0

    def test_it_must_fit_the_model(self):
        tokenizer = word_tokenizer()
        tokenizer.add_tokens([f"word{i}" for i in range(20)])
        message = f"The tokenizer has {len(tokenizer)} tokens, the model's embeddings 32"
        with pytest.raises(ValueError, match=message):
            prepare_tokenizer(tokenizer, language_model("llama"), None)

    def test_the_model_limits_the_length_of_rows(self):
        llama = language_model("llama")
        assert (row_length(llama, None), row_length(llama, 7)) == (64, 7)
        with pytest.raises(ValueError, match="--max_length=65, but LlamaForCausalLM knows 64 positions"):
            row_length(llama, 65)
        long = LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                            num_attention_heads=1, max_position_embeddings=4096))  # fmt: skip
        assert row_length(long, None) == 1024
        assert row_length(long, 2048) == 2048
        # Its files name positions that it does not mind.
        config = T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, n_positions=512)
        t5 = T5ForConditionalGeneration(config)
        assert known_positions(t5) is None
        assert (row_length(t5, None), row_length(t5, 5000)) == (1024, 5000)
        assert known_positions(language_model("gpt2")) == 64


class TestPacking:
    def rows(self, lengths):
        counter = itertools.count()
        return [TokenRow(*(np.array([next(counter)] * length, np.int32),) * 2, lengths=(length,)) for length in lengths]

    def test_every_text_is_there_once_and_rows_are_full(self):
        lengths = torch.randint(1, 30, (200,), generator=torch.Generator().manual_seed(0)).tolist()
        packed = pack(self.rows(lengths), 32)
        assert all(len(row.ids) <= 32 for row in packed)
        found = [length for row in packed for length in row.lengths]
        assert sorted(found) == sorted(lengths)
        assert sorted(set(np.concatenate([row.ids for row in packed]).tolist())) == list(range(200))
        assert len(packed) <= 1.05 * sum(lengths) / 32 + 1
        again = pack(self.rows(lengths), 32)
        assert all(np.array_equal(a.ids, b.ids) for a, b in zip(packed, again, strict=True))

    def test_no_text_is_learned_from_the_one_before_it(self):
        (row,) = pack(self.rows([2, 3, 4]), 9)
        assert row.lengths == (4, 3, 2)
        assert row.ids.tolist() == [2] * 4 + [1] * 3 + [0] * 2
        assert np.flatnonzero(row.labels == IGNORED).tolist() == [0, 4, 7]

    @pytest.mark.parametrize("implementation", ["eager", "sdpa"])
    @pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "gemma3", "mistral"])
    def test_models_that_keep_texts_apart_are_let_through(self, name, implementation):
        model = language_model(name)
        model.set_attn_implementation(implementation)
        check_packing(model.train())
        check_packing(model, batch_size=1)
        assert model.training

    @pytest.mark.parametrize("name", ["mamba", "t5", "bart"])
    def test_others_are_refused(self, name):
        with pytest.raises(ValueError, match="--packing: .* does not keep the texts of a row apart. Leave it out"):
            check_packing(language_model(name))

    def test_a_model_that_only_restarts_positions_is_refused(self, monkeypatch):
        monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda position_ids: None)
        with pytest.raises(ValueError, match="LlamaForCausalLM does not keep the texts"):
            check_packing(language_model("llama"))

    def test_half_precision_passes(self):
        check_packing(language_model("llama").to(torch.bfloat16))
