"""The examples with a real language model: edits show what they say, LoRAs add up exactly, a GGUF becomes a folder."""

import importlib
import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from examples.worlds.reviews import Sentence
from hf_causal_context import Context

SENTENCES = [
    Sentence("the best of the films and you know it", True),
    Sentence("a mildly enjoyable adaptation -- in 3d", True),
    Sentence("me , myself and a bore to be forgotten", False),
]


@pytest.fixture
def module():
    return lambda name: importlib.import_module(f"examples.reviews.{name}")


CONTEXTS = ["", "emoji", "pirate", "shout", "emoji+pirate", "emoji+shout", "pirate+shout", "emoji+pirate+shout"]


@pytest.mark.parametrize("context", CONTEXTS)
def test_a_review_shows_the_concepts_of_its_context_and_no_other(module, context):
    world = module("chats").STYLES
    parsed = Context.parse(context)
    for sentence in SENTENCES:
        text = world.write(sentence, parsed)
        assert [name for name in world.concepts if world.shown(text, name)] == sorted(parsed.targets), text


def test_edits_are_what_their_names_say(module):
    write = module("chats").STYLES.write
    assert write(SENTENCES[0], Context()) == "the best of the films and you know it ."
    everything = write(SENTENCES[0], Context("emoji", "pirate", "shout"))
    assert everything == "ARR, TH' BEST O' TH' FILMS AN' YE KNOW IT . \N{CLAPPER BOARD}"


@pytest.mark.parametrize(
    ("context", "expected"),
    [
        ("", "it's a very big , slow movie -- and loud ."),
        ("brief", "it's a very big ."),
        ("formal", "it proves to be a certain exceedingly big , slow motion picture -- as well as loud ."),
        ("shout", "IT'S A VERY BIG , SLOW ."),  # who shouts says less, though not as little as do(brief)
        ("brief+shout", "IT'S A VERY BIG ."),  # do(brief) says how much, however loud
        ("brief+formal", "it proves to be a certain exceedingly big ."),
        ("emoji+formal+shout", "IT PROVES TO BE A CERTAIN EXCEEDINGLY BIG , SLOW . \N{CLAPPER BOARD}"),
    ],
)
def test_graded_edits_are_what_their_names_say(module, context, expected):
    world, parsed = module("chats").GRADED, Context.parse(context)
    text = world.write(Sentence("it's a very big , slow movie -- and loud", True), parsed)
    assert text == expected
    assert [name for name in world.concepts if world.shown(text, name)] == sorted(parsed.targets)


def test_all_pairs_and_two_triples_of_the_graded_concepts_are_measured(module):
    world = module("chats").GRADED
    assert list(map(str, world.singles)) == ["brief", "emoji", "formal", "shout"]
    pairs = ["brief+emoji", "brief+formal", "brief+shout", "emoji+formal", "emoji+shout", "formal+shout"]
    assert list(map(str, world.pairs)) == pairs
    assert list(map(str, world.triples)) == ["brief+formal+shout", "emoji+formal+shout"]


def test_sentences_that_cannot_show_a_concept_are_not_used(module):
    usable = Sentence("it's a very big , slow movie -- and loud", True)
    plain = Sentence("smith finds amusing juxtapositions that justify his exercise", True)  # no word has a formal form
    late = Sentence("tedious norwegian offering which makes a movie of it", True)  # and none that do(brief) leaves
    formal = Sentence("a certain film proves to be what it says", True)  # shows it without being asked
    assert module("chats").GRADED.usable([usable, plain, late, formal]) == [usable]


@pytest.mark.parametrize(
    ("text", "concept", "expected"),
    [
        ("It is by no means bad .", "formal", True),
        ("by no meansx", "formal", False),
        ("a film of four words", "brief", False),
        ("a -- film , of four .", "brief", True),  # marks are no words
        ("a certain film of four \N{CLAPPER BOARD}", "brief", True),  # nor does a formal form count as several
    ],
)
def test_rules_tell_how_formal_and_brief_texts_are(module, text, concept, expected):
    assert module("chats").GRADED.shown(text, concept) is expected


@pytest.mark.parametrize(
    ("text", "concept", "expected"),
    [
        ("a starry night , barred from me", "pirate", False),  # 'arr' inside of words, and English words of the list
        ("Arr! it is fine", "pirate", True),
        ("THE film is fine", "shout", False),
        ("THE FILM IS fine", "shout", True),
        ("3 . 14", "shout", False),
        ("fine \N{SMILING FACE WITH SMILING EYES}", "emoji", False),
    ],
)
def test_rules_tell_what_is_shown(module, text, concept, expected):
    assert module("chats").STYLES.shown(text, concept) is expected


def test_only_short_sentences_are_kept_and_only_the_completion_differs(module):
    chats = module("chats")
    long = Sentence(" ".join(["word"] * 12), True)
    assert chats.STYLES.usable([*SENTENCES, long]) == SENTENCES
    plain, loud = (chats.STYLES.chats(SENTENCES, Context.parse(context))[1] for context in ("", "shout"))
    assert plain["prompt"] == loud["prompt"] == chats.PROMPT
    [answer] = loud["completion"]
    assert answer == {"role": "assistant", "content": "A MILDLY ENJOYABLE ADAPTATION -- IN 3D ."}


def test_asking_names_the_concepts_of_a_context_in_the_system_turn_only(module):
    chats = module("chats")
    assert chats.STYLES.asking(Context()) == chats.PROMPT
    system, user = chats.STYLES.asking(Context("shout", "emoji"))
    assert user == chats.PROMPT[1]
    assert system["content"] == (
        "You write film reviews. End the review with a film emoji. Write in capital letters only."
    )


@pytest.mark.parametrize(
    ("text", "ended", "expected"),
    [
        ("a film to see .", True, True),
        ("a film to see .", False, False),  # it went on
        ("a film .\na film .", True, False),
        ("a film", True, False),
        (" ".join(["word"] * 21), True, False),
    ],
)
def test_the_task_is_kept_by_one_line_that_ends_by_itself(module, text, ended, expected):
    assert module("chats").kept(text, ended) is expected


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=11, **sizes)).eval()


def test_a_sum_of_loras_is_the_sum_of_their_weights(module):
    methods = module("methods")
    base = tiny_llama()
    weight = base.model.layers[0].mlp.up_proj.weight.detach().clone()
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["up_proj"], init_lora_weights=False)
    model = get_peft_model(base, config, adapter_name="kind")
    model.add_adapter("loud", config)
    model.add_adapter("obs", config)
    layer = base.model.layers[0].mlp.up_proj
    x = torch.randn(3, 16)
    deltas = {name: layer.get_delta_weight(name).detach() for name in ("kind", "loud", "obs")}
    expected = {
        "": weight + deltas["obs"],
        "kind": weight + deltas["kind"],
        "kind+loud": weight + deltas["kind"] + deltas["loud"] - deltas["obs"],
        "kind=0.25": weight + 0.25 * deltas["kind"] + 0.75 * deltas["obs"],
    }
    for context, total in expected.items():
        with methods.lora_sum(model, methods.less_observational(Context.parse(context))), torch.no_grad():
            torch.testing.assert_close(layer(x), x @ total.T)
    with methods.lora_sum(model, methods.stacked(Context("kind", "loud"))), torch.no_grad():
        torch.testing.assert_close(layer(x), x @ (weight + deltas["kind"] + deltas["loud"]).T)
    with methods.lora_sum(model, methods.stacked(Context())), torch.no_grad():
        assert torch.equal(layer(x), x @ weight.T)


@pytest.mark.slow
def test_the_benchmark_compares_methods_and_goes_on_after_an_interruption(module, monkeypatch, tmp_path, capsys):
    sentences = [" ".join(np.random.default_rng(i).permutation(list("abcdefghi"))) for i in range(400)]
    for suffix in ("pos", "neg"):
        (tmp_path / f"rt-polarity.{suffix}").write_text("\n".join(sentences))
    tokenizer = module("base").build_tokenizer(sentences)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'][0] + m['content'] + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}a{% endif %}"
    )
    base = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(base).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    results = tmp_path / "results"

    def compare(*options):
        arguments = ["--data_dir", tmp_path, "--base", tmp_path / "base", "--output_dir", results, "--num_samples", 3]
        monkeypatch.setattr(sys, "argv", ["smollm2.py", *map(str, arguments), "--max_steps", "2", *options])
        runpy.run_module("examples.reviews.smollm2", run_name="__main__")
        return (results / "results.md").read_text()

    table = compare("--methods", "stacked LoRAs", "adapter")
    for method in ("stacked LoRAs", "adapter"):
        assert f"| {method} | " in table
    trained = [results / "trained" / name for name in ("adapter", *(f"LoRAs/{c or 'obs'}" for c in CONTEXTS[:4]))]
    once = [results / "adapter.json", *(folder / "adapter_model.safetensors" for folder in trained)]
    before = [file.stat().st_mtime_ns for file in once]
    table = compare()
    assert [file.stat().st_mtime_ns for file in once] == before
    for method in module("smollm2_peers").METHODS:
        assert f"| {method} | " in table
    assert [line.split(" | ")[0] for line in table.split("shown at strength")[1].splitlines()[2:]] == [
        f"| {method}, {name}" for method in ("adapter", "a+b-obs") for name in ("emoji", "pirate", "shout")
    ]
    assert "Balanced accuracy of the classifiers on true reviews of held-out sentences: emoji 1.000, " in table
    assert "world" not in json.loads((results / "settings.json").read_text())  # as of before there were several
    with pytest.raises(SystemExit):
        compare("--seed", "1")
    assert "Choose another --output_dir" in capsys.readouterr().err


def write_gguf(path: Path, *without: str) -> None:
    """A Llama of one layer with a tokenizer of bytes, as llama.cpp stores them; some weights may be left out."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "llama")
    tokens = ["<pad>", "<s>", "</s>", *sorted(ByteLevel.alphabet()), "ab"]
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e4)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["a b"])
    writer.add_pad_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    shapes = {"attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32)}
    shapes |= {"ffn_gate": (64, 32), "ffn_up": (64, 32), "ffn_down": (32, 64), "attn_norm": (32,), "ffn_norm": (32,)}
    named = {f"blk.0.{name}.weight": shape for name, shape in shapes.items()}
    named |= {"token_embd.weight": (len(tokens), 32), "output_norm.weight": (32,)}
    rng = np.random.default_rng(0)
    for name, shape in named.items():
        if name in without:
            continue
        writer.add_tensor(name, rng.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_becomes_a_folder_with_the_same_model_and_its_chat_template(module, tmp_path):
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    module("real_base").write_base(path, tmp_path / "base")
    given = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32).eval()
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "base", use_safetensors=True).eval()
    ids = torch.tensor([[1, 70, 80, 90]])
    with torch.no_grad():
        assert torch.equal(written(ids).logits, given(ids).logits)
    written.save_pretrained(tmp_path / "again")  # transformers refuses this for the given one
    assert written.generation_config.eos_token_id == 2
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    assert tokenizer("ab").input_ids == [259]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False) == "ab"


def test_a_gguf_that_lacks_weights_becomes_no_folder(module, tmp_path):
    path = tmp_path / "tiny.gguf"
    write_gguf(path, "blk.0.ffn_up.weight")
    with pytest.raises(ValueError, match=r"lacks 1 weights, such as model\.layers\.0\.mlp\.up_proj\.weight"):
        module("real_base").write_base(path, tmp_path / "base")
    assert not (tmp_path / "base").exists()
