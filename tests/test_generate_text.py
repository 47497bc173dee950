"""Texts in chosen contexts, from Python and from the command line."""

import json
import re

import pytest
import torch
from peft import get_peft_model

from hf_causal_context import CausalContextConfig, Context
from hf_causal_context.bases.chats import render_chat
from hf_causal_context.cli import main
from hf_causal_context.inference import texts as inference_texts
from hf_causal_context.inference.texts import generate_texts

from .training.conftest import pipeline_folder  # noqa: F401 (a fixture)
from .training.small_language import language_model, word_tokenizer

CONTEXTS = [Context(), Context("formal"), Context("formal", "loud"), Context({"formal": 0.5, "loud": -2.0})]
PROMPT = "the dog ran"


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def talkative(name):
    """A tiny model that does not say the same whatever it reads, and seldom ends."""
    model = language_model(name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.5)
    return model


def adapted(name, **kwargs):
    model = talkative(name)
    task = "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"
    given = {"concepts": ("formal", "loud"), "task_type": task, "init_weights": False, "mechanism": "reduced"}
    given["observational_rank"] = 0  # a random one drowns random concepts
    return get_peft_model(model, CausalContextConfig(**given | kwargs)).eval()


@pytest.fixture(params=["llama", "t5", "bart"])
def name(request):
    return request.param


@pytest.fixture
def store(tmp_path):
    """Saves a model, its tokenizer and its adapter, and returns the adapter's folder."""

    def save(name="llama", tokenizer=None, with_adapter=False, **kwargs):
        model, base = adapted(name, **kwargs), tmp_path / "base"
        talkative(name).save_pretrained(base)
        tokenizer = word_tokenizer() if tokenizer is None else tokenizer
        tokenizer.save_pretrained(tmp_path / "adapter" if with_adapter else base)
        model.peft_config["default"].base_model_name_or_path = str(base)
        model.save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter"

    return save


@pytest.fixture
def run(tmp_path, capsys):
    """Runs the command and returns its status, its rows and what it printed."""

    def call(adapter, *options, contexts=("obs", "formal", "formal+loud", "formal=0.5,loud=-2"), prompt=PROMPT):
        file = tmp_path / "made" / "texts.jsonl"
        arguments = ["generate-text", "--adapter", str(adapter), "--contexts", *contexts]
        arguments += [] if prompt is None else ["--prompt", prompt]
        status = main([*arguments, "--output_file", str(file), "--max_new_tokens", "8", *options])
        rows = [json.loads(line) for line in file.read_text().splitlines()] if status == 0 else None
        return status, rows, capsys.readouterr()

    return call


def alone(model, tokenizer, context, **kwargs):
    """The text of one context from a plain call of generate."""
    inputs = tokenizer(PROMPT, return_tensors="pt")
    output = model.generate(
        input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, context=context, max_new_tokens=8, **kwargs
    )[0]
    start = 0 if model.config.is_encoder_decoder else inputs.input_ids.shape[1]
    return tokenizer.decode(output[start:], skip_special_tokens=True)


def test_contexts_in_one_batch_are_those_of_separate_calls(name):
    model, tokenizer = adapted(name), word_tokenizer()
    prompts = ["a cat sat on the mat", PROMPT]
    texts = generate_texts(model, tokenizer, prompts, CONTEXTS, max_new_tokens=8, seed=None)
    assert [len(row) for row in texts] == [4, 4]
    assert texts[1] == [alone(model, tokenizer, context, do_sample=False) for context in CONTEXTS]
    assert len(set(texts[1])) > 1


def test_calibrated_strengths_are_those_that_are_meant(store, run):
    adapter = store(calibration={"formal": [[0, 0], [0.5, 0.25], [1, 1]]})
    _, dial, _ = run(adapter, "--greedy", "--calibrated", contexts=("formal=0.5", "formal"))
    _, plain, _ = run(adapter, "--greedy", contexts=("formal=0.25", "formal"))
    assert [row["text"] for row in dial] == [row["text"] for row in plain]
    assert [row["context"] for row in dial] == ["formal=0.5", "formal"]
    status, _, printed = run(adapter, "--calibrated", contexts=("loud=0.5",))
    assert (status, "no calibration of 'loud'" in printed.err) == (1, True)


def test_draws_follow_the_seed_and_leave_the_random_state():
    model, tokenizer = adapted("llama"), word_tokenizer()

    def draw(seed, **kwargs):
        return generate_texts(model, tokenizer, [PROMPT], CONTEXTS[1:2], max_new_tokens=8, seed=seed, **kwargs)[0][0]

    torch.manual_seed(3)
    expected = alone(model, tokenizer, "formal", do_sample=True)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert draw(3) == draw(3) == expected
    assert torch.equal(torch.get_rng_state(), state)
    assert draw(4) != expected
    likeliest = generate_texts(model, tokenizer, [PROMPT], CONTEXTS[1:2], max_new_tokens=8, seed=None)[0][0]
    assert draw(3, temperature=1e-4) == draw(3, top_p=1e-6) == likeliest != expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0.0}, "temperature=0.0 must be positive. For the likeliest tokens"),
        ({"top_p": 1.5}, "top_p=1.5 must be from 0 to 1"),
    ],
)
def test_numbers_out_of_range(changes, message):
    with pytest.raises(ValueError, match=message):
        generate_texts(adapted("llama"), word_tokenizer(), [PROMPT], CONTEXTS, max_new_tokens=8, seed=0, **changes)


def test_messages_go_through_the_chat_template():
    model, tokenizer = adapted("llama"), word_tokenizer()
    chat = [{"role": "user", "content": PROMPT}]
    texts = generate_texts(
        model, tokenizer, [chat, f"user : {PROMPT} </s>assistant :"], CONTEXTS, max_new_tokens=8, seed=None
    )
    assert texts[0] == texts[1]
    plain = word_tokenizer(chat=False)
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        generate_texts(model, plain, [chat], CONTEXTS, max_new_tokens=8, seed=None)


def test_the_command_writes_a_line_per_seed_and_context(store, run, name):
    adapter = store(name)
    status, rows, printed = run(adapter, "--seeds", "3", "4")
    assert status == 0, printed.err
    assert [json.loads(line) for line in printed.out.splitlines()] == rows
    assert [(row["context"], row["seed"]) for row in rows] == [
        (context, seed) for seed in (3, 4) for context in ("obs", "formal", "formal+loud", "formal=0.5+loud=-2.0")
    ]
    assert {row["prompt"] for row in rows} == {PROMPT}
    model, tokenizer = adapted(name), word_tokenizer()
    for seed, part in ((3, rows[:4]), (4, rows[4:])):
        [texts] = generate_texts(model, tokenizer, [PROMPT], CONTEXTS, max_new_tokens=8, seed=seed)
        assert [row["text"] for row in part] == texts
    assert [path.name for path in (adapter.parent / "made").iterdir()] == ["texts.jsonl"]


def test_options_of_the_command(store, run):
    adapter = store()
    model, tokenizer = adapted("llama"), word_tokenizer()

    def expected(prompt=PROMPT, **kwargs):
        return generate_texts(model, tokenizer, [prompt], CONTEXTS[:2], max_new_tokens=8, **kwargs)[0]

    two = {"contexts": ("none", "formal")}
    _, rows, _ = run(adapter, "--greedy", "--observational_name", "none", **two)
    assert [(row["context"], row["seed"]) for row in rows] == [("none", None), ("formal", None)]
    assert [row["text"] for row in rows] == expected(seed=None)
    _, also, _ = run(adapter, "--greedy", "--observational_name", "none", contexts=("obs",))
    assert also == rows[:1]
    _, rows, _ = run(adapter, "--temperature", "0.5", "--top_p", "0.8", "--observational_name", "none", **two)
    assert [row["text"] for row in rows] == expected(seed=0, temperature=0.5, top_p=0.8)
    _, rows, _ = run(adapter, "--chat", "--greedy", "--observational_name", "none", **two)
    assert [row["text"] for row in rows] == expected([{"role": "user", "content": PROMPT}], seed=None)
    assert rows[0]["prompt"] == PROMPT
    _, rows, _ = run(adapter, "--dtype", "bfloat16", "--greedy", "--observational_name", "none", **two)
    assert len(rows) == 2


def test_the_adapters_tokenizer_comes_before_that_of_the_base(store, run):
    adapter = store(with_adapter=True)  # the base has none
    status, rows, printed = run(adapter, "--greedy")
    assert status == 0, printed.err
    texts = generate_texts(adapted("llama"), word_tokenizer(), [PROMPT], CONTEXTS, max_new_tokens=8, seed=None)
    assert [row["text"] for row in rows] == texts[0]


def test_a_tokenizer_that_is_not_that_of_the_base_is_refused(store, run):
    adapter = store()
    more = word_tokenizer()
    more.add_tokens(["pirate"])
    more.save_pretrained(adapter)
    assert run(adapter, "--greedy")[0] == 0  # it may have more tokens
    more.add_tokens([f"word{i}" for i in range(20)])
    more.save_pretrained(adapter)
    status, _, printed = run(adapter, "--greedy")
    assert status == 1
    assert f"The tokenizer has {len(more)} tokens, the model's embeddings 32" in printed.err
    assert store(with_adapter=True) == adapter
    state = json.loads((adapter / "tokenizer.json").read_text())
    words = state["model"]["vocab"]
    words["cat"], words["dog"] = words["dog"], words["cat"]
    (adapter / "tokenizer.json").write_text(json.dumps(state))
    status, _, printed = run(adapter, "--greedy")
    assert status == 1
    assert "2 of the base's " in printed.err
    assert "tokens have another id or none, such as 'cat' (5 in the base, 6 here)" in printed.err


def test_no_padding_token_is_needed(store, run):
    tokenizer = word_tokenizer()
    tokenizer.pad_token = None
    status, rows, printed = run(store(tokenizer=tokenizer))
    assert status == 0, printed.err
    assert len(rows) == 4


def test_texts_of_different_lengths_end_where_they_end():
    model, tokenizer = adapted("llama"), word_tokenizer()
    for pad in ("<pad>", None):
        tokenizer.pad_token = pad
        for seed in range(20):
            texts = generate_texts(model, tokenizer, [PROMPT], CONTEXTS, max_new_tokens=20, seed=seed)[0]
            lengths = {len(text.split()) for text in texts}
            if len(lengths) > 2:
                break
        assert len(lengths) > 2
        assert not any("<" in text for text in texts)


def test_an_empty_prompt(store, run):
    model = adapted("llama")
    begun = [
        generate_texts(model, word_tokenizer(bos), [""], CONTEXTS, max_new_tokens=8, seed=None) for bos in (True, False)
    ]
    assert begun[0] == begun[1]
    tokenizer = word_tokenizer()
    tokenizer.bos_token = None
    begun_at_the_end = generate_texts(model, tokenizer, [""], CONTEXTS, max_new_tokens=8, seed=None)
    assert begun_at_the_end == generate_texts(model, word_tokenizer(), ["</s>"], CONTEXTS, max_new_tokens=8, seed=None)
    tokenizer.eos_token = None
    status, _, printed = run(store(tokenizer=tokenizer), prompt="")
    assert status == 1
    assert "tokenizer has no beginning- or end-of-sequence token to begin with. Give a --prompt" in printed.err


@pytest.mark.parametrize(
    ("name", "words", "new", "message"),
    [
        ("llama", 3, 62, r"knows 64 positions, and the prompt has 3 tokens, so max_new_tokens=62 .* at most 61"),
        ("gpt2", 64, 1, r"The prompt has 64 tokens, and the model knows 64 positions. Shorten it"),
        ("bart", 65, 4, r"The prompt has 65 tokens, and the model reads 64. Shorten it"),
        ("bart", 3, 65, r"max_new_tokens=65 is too much. Give at most 64"),
        ("llama", 3, 0, r"max_new_tokens=0 must be at least 1"),
    ],
)
def test_no_room(name, words, new, message):
    prompt = " ".join(["dog"] * words)
    with pytest.raises(ValueError, match=message):
        generate_texts(adapted(name), word_tokenizer(), [PROMPT, prompt], CONTEXTS, max_new_tokens=new, seed=0)


@pytest.mark.parametrize(("name", "words", "new"), [("llama", 3, 61), ("bart", 64, 64), ("t5", 80, 80)])
def test_just_enough_room(name, words, new):
    prompt = " ".join(["dog"] * words)
    assert generate_texts(adapted(name), word_tokenizer(), [prompt], CONTEXTS, max_new_tokens=new, seed=0)


def test_refusals(store, run, tmp_path, pipeline_folder, monkeypatch):  # noqa: F811
    adapter = store()

    def refused(message, *args, **kwargs):
        status, _, printed = run(*args, **kwargs)
        assert status == 1
        assert message in printed.err
        assert not (tmp_path / "made").exists()

    with monkeypatch.context() as patch:
        patch.setattr("hf_causal_context.inference.adapted.load_language_model", None)  # before anything is loaded
        refused("Unknown concept 'joyful'", adapter, contexts=("joyful",))
        refused("is no folder here, the cache does not hold it", "no/adapter")
    refused("which is not here. Give --pretrained_model_name_or_path", _renamed_base(adapter, "/nowhere/base"))
    other = tmp_path / "other"
    language_model("gpt2").save_pretrained(other)
    word_tokenizer().save_pretrained(other)
    refused("does not fit this GPT2LMHeadModel", adapter, "--pretrained_model_name_or_path", str(other))
    refused(
        "could not be read as a model of transformers",
        adapter,
        "--pretrained_model_name_or_path",
        str(pipeline_folder("ddpm")),
    )


def _renamed_base(adapter, name):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": name}))
    return adapter


def test_adapters_of_the_other_kind(store, run, tmp_path, capsys, pipeline_folder):  # noqa: F811
    from hf_causal_context.bases.loading import load_base

    base = str(pipeline_folder("ddpm"))
    model = get_peft_model(load_base(base).denoiser, CausalContextConfig(concepts=("formal",), init_weights=False))
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(tmp_path / "images")
    status, _, printed = run(tmp_path / "images")
    assert status == 1
    assert "is an adapter of a diffusion model. `hf-causal-context generate` makes images" in printed.err
    command = ["generate", "--adapter", str(store()), "--contexts", "obs", "--output_dir", str(tmp_path / "made")]
    assert main(command) == 1
    assert (
        "is an adapter of a language model, not of a diffusers pipeline. `hf-causal-context generate-text`"
        in capsys.readouterr().err
    )
    status, _, printed = run(_with_task(tmp_path / "adapter", "TOKEN_CLS"))
    assert status == 1
    assert "is an adapter for TOKEN_CLS, which writes no texts" in printed.err


def _with_task(adapter, task):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"task_type": task}))
    return adapter


def test_the_file_is_complete_or_absent(store, run, tmp_path, monkeypatch):
    adapter = store()
    assert run(adapter, "--greedy")[0] == 0
    file = tmp_path / "made" / "texts.jsonl"
    before = file.read_text()

    def interrupted(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.write_text", interrupted)
        assert run(adapter, "--greedy", contexts=("formal",))[0] == 1
    assert file.read_text() == before
    assert [path.name for path in file.parent.iterdir()] == ["texts.jsonl"]
    file.unlink()
    file.mkdir()
    status, _, printed = run(adapter)
    assert status == 1
    assert "is a folder. Give a file in it, such as texts.jsonl" in printed.err


@pytest.mark.parametrize("size", [1, 3, 32])
def test_prompts_of_different_lengths_share_batches(name, size):
    model, tokenizer = adapted(name), word_tokenizer()
    prompts = ["a", PROMPT, "a cat sat on the mat and then it barked loudly"]
    together = generate_texts(model, tokenizer, prompts, CONTEXTS, max_new_tokens=8, seed=None, batch_size=size)
    apart = [generate_texts(model, tokenizer, [one], CONTEXTS, max_new_tokens=8, seed=None)[0] for one in prompts]
    assert together == apart
    with pytest.raises(ValueError, match="batch_size=0 must be at least 1"):
        generate_texts(model, tokenizer, prompts, CONTEXTS, max_new_tokens=8, seed=None, batch_size=0)


@pytest.mark.parametrize(
    "asked",
    [{"num_return_sequences": 2, "num_beams": 1, "do_sample": True}, {"return_dict_in_generate": True}],
)
def test_a_base_that_asks_for_more_than_one_text_per_row(name, asked):
    model, tokenizer, prompts = adapted(name), word_tokenizer(), ["a cat sat on the mat", PROMPT]

    def draw():
        return generate_texts(model, tokenizer, prompts, CONTEXTS, max_new_tokens=8, seed=0)

    expected = draw()
    model.get_base_model().generation_config.update(**asked)
    assert draw() == expected


def test_strings_at_which_a_base_stops():
    model, tokenizer = adapted("llama"), word_tokenizer()
    tokenizer.add_tokens("abcdef")  # transformers looks at words behind these letters
    prompts = [PROMPT, "a cat"]
    [text] = generate_texts(model, tokenizer, prompts[:1], CONTEXTS[1:2], max_new_tokens=8, seed=None)[0]
    model.get_base_model().generation_config.stop_strings = [text.split()[1]]
    [stopped] = generate_texts(model, tokenizer, prompts, CONTEXTS[1:2], max_new_tokens=8, seed=None)[0]
    assert text.split()[:2] == stopped.split() != text.split()


def test_prompts_and_chats_of_files(store, run, tmp_path):
    adapter = store()
    model, tokenizer = adapted("llama"), word_tokenizer()
    two = CONTEXTS[:2]
    prompts, chats = tmp_path / "prompts.txt", tmp_path / "chats.jsonl"
    prompts.write_text(f"a cat\n\n{PROMPT}\n")
    first = [{"role": "user", "content": "a cat"}, {"role": "assistant", "content": "sat"}]
    second = [*first, {"role": "user", "content": PROMPT}]
    chats.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in (first, second)))

    def made(*options):
        status, rows, printed = run(adapter, "--greedy", *options, contexts=("obs", "formal"), prompt=None)
        assert status == 0, printed.err
        return [(row["prompt"], row["context"], row["text"]) for row in rows]

    def expected(given, shown=None):
        texts = generate_texts(model, tokenizer, given, two, max_new_tokens=8, seed=None)
        return [
            (prompt, context, text)
            for prompt, own in zip(shown or given, texts, strict=True)
            for context, text in zip(("obs", "formal"), own, strict=True)
        ]

    assert made("--prompts_file", str(prompts)) == expected(["a cat", PROMPT])
    answered = [first[:1], second]  # the last answer is what is written
    assert made("--messages_file", str(chats)) == expected(answered)
    system = {"role": "system", "content": "good sir"}
    with_system = [[system, *chat] for chat in answered]
    assert made("--messages_file", str(chats), "--system_prompt", "good sir") == expected(with_system)
    asked = [[system, {"role": "user", "content": text}] for text in ("a cat", PROMPT)]
    assert made("--prompts_file", str(prompts), "--chat", "--system_prompt", "good sir") == expected(asked)
    assert made("--prompt", "a cat", "--chat", "--system_prompt", "good sir") == expected(asked[:1], ["a cat"])


def test_prompts_that_are_refused(store, run, tmp_path):
    adapter = store()
    chats, empty = tmp_path / "chats.jsonl", tmp_path / "empty.txt"
    chats.write_text(json.dumps({"messages": [{"role": "system", "content": "yo"}, {"role": "user", "content": "a"}]}))
    empty.write_text("\n")

    def refused(message, *options, prompt=None):
        status, _, printed = run(adapter, *options, prompt=prompt)
        assert (status, message in printed.err) == (1, True), printed.err

    refused("Give one of --prompt, --prompts_file, --messages_file. Received: none.")
    refused("Received: --prompt and --messages_file", "--messages_file", str(chats), prompt="a")
    refused("--messages_file holds chats already, so --chat has no effect", "--messages_file", str(chats), "--chat")
    refused("has chats with a system message, and", "--messages_file", str(chats), "--system_prompt", "good")
    refused("--system_prompt is a message of a chat. Give --chat", "--system_prompt", "good", prompt="a")
    refused("empty.txt has no lines. Add some", "--prompts_file", str(empty))
    refused("none.txt does not exist. Give a .txt file", "--prompts_file", str(tmp_path / "none.txt"))
    refused("must be a .txt file", "--prompts_file", str(chats))
    same = ("--output_file", str(tmp_path / "." / chats.name))
    refused("chats.jsonl holds the prompts, and would be replaced", "--messages_file", str(chats), *same)
    chats.write_text(json.dumps({"text": "a"}))
    refused("Line 1 of", "--messages_file", str(chats))
    chats.write_text(json.dumps({"messages": [{"role": "usr", "content": "a"}]}))
    refused(f"Line 1 of {str(chats)!r}: 'messages' has the role 'usr' in message 0", "--messages_file", str(chats))
    chats.write_text(json.dumps({"messages": [{"role": "assistant", "content": "a"}]}))
    refused("There is no message before the assistant's first one", "--messages_file", str(chats))
    user = json.dumps({"messages": [{"role": "user", "content": "a"}]})
    chats.write_text(f"{user}\n{chats.read_text()}")
    refused("Prompt 2 of 2: There is no message", "--messages_file", str(chats))
    assert run(adapter, "--messages_file", str(chats), "--system_prompt", "good sir", prompt=None)[0] == 0


@pytest.mark.parametrize(
    ("system", "message"),
    [
        ("{{ raise_exception('System role not supported') }}", "refuses system messages: System role not supported"),
        ("", "leaves system messages out, so the model would not read them"),
    ],
)
def test_a_chat_template_without_a_system_role(store, run, system, message):
    tokenizer = word_tokenizer()
    tokenizer.chat_template = (
        f"{{% for m in messages %}}{{% if m.role == 'system' %}}{system}{{% else %}}{{{{ m.role }}}} : "
        "{{ m.content }}{% endif %}{% endfor %}"
    )
    adapter = store(tokenizer=tokenizer)
    assert run(adapter, "--chat")[0] == 0
    status, _, printed = run(adapter, "--chat", "--system_prompt", "good sir")
    assert status == 1
    assert f"{message}. Write what they say into the first message of the user." in printed.err
    alone = [{"role": "system", "content": "good sir"}]
    with pytest.raises(ValueError, match="The chat template (refuses these messages|leaves system messages out)"):
        render_chat(tokenizer, alone)


def test_a_chat_template_without_a_developer_role():
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    chat = [{"role": "developer", "content": "good sir"}, {"role": "user", "content": "a"}]
    with pytest.raises(ValueError, match="The chat template leaves developer messages out, so the model would not"):
        render_chat(tokenizer, chat)


@pytest.mark.parametrize("role", ["system", "tool"])
def test_a_chat_template_that_passes_over_a_later_message(role):
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    chat = [{"role": "user", "content": "a"}, {"role": role, "content": "good"}, {"role": "user", "content": "b"}]
    with pytest.raises(ValueError, match=f"leaves message 1 out, of the role '{role}', so the model would not read it"):
        render_chat(tokenizer, chat)
    assert render_chat(tokenizer, [chat[0], chat[1] | {"content": ""}, chat[2]]) == "ab"


def test_a_replaced_file_is_told_beside_the_lines(store, run):
    adapter = store()
    assert "Replaced" not in run(adapter, contexts=("obs",))[2].err
    _, rows, printed = run(adapter, contexts=("formal",))
    assert re.search(r"^Replaced .*made/texts.jsonl\.$", printed.err, re.M)
    assert [json.loads(line) for line in printed.out.splitlines()] == rows


def test_a_temperature_that_is_not_positive_is_told_in_options(store, run):
    _, _, printed = run(store(), "--temperature", "-1")
    assert "--temperature=-1.0 must be positive. For the likeliest tokens give --greedy.\n" in printed.err


def test_padding_is_tried_out_once_for_all_seeds(store, run, tmp_path, monkeypatch):
    tried = []
    original = inference_texts._ignores_padding
    monkeypatch.setattr(inference_texts, "_ignores_padding", lambda *a, **k: tried.append(1) or original(*a, **k))
    (tmp_path / "prompts.txt").write_text("a cat\na\n")
    options = ["--prompts_file", str(tmp_path / "prompts.txt")]
    _, rows, _ = run(adapter := store(), *options, "--seeds", "0", "1", "2", contexts=("formal",), prompt=None)
    assert tried == [1]
    _, one, _ = run(adapter, *options, "--seeds", "2", contexts=("formal",), prompt=None)
    assert one == rows[4:]


def test_keys_of_messages_that_are_not_read_are_named_beside_the_lines(store, run, tmp_path):
    chat = {"messages": [{"role": "user", "content": "a cat", "mood": "good"}]}
    (tmp_path / "chats.jsonl").write_text(json.dumps(chat) + "\n")
    status, _, printed = run(
        store(), "--messages_file", str(tmp_path / "chats.jsonl"), contexts=("formal",), prompt=None
    )
    assert (status, "Of messages, 'mood' is not read" in printed.err) == (0, True)
