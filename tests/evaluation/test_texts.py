"""Evaluation of a language model's adapter: on tiny models, and on texts whose quality is known."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer

from hf_causal_context import CausalContextConfig, Context
from hf_causal_context.bases.likelihoods import perplexity
from hf_causal_context.bases.token_batches import Collation
from hf_causal_context.bases.tokens import Tokenization
from hf_causal_context.cli import main
from hf_causal_context.contexts import ConceptSet
from hf_causal_context.data import load_text_folders, texts_from_dataset
from hf_causal_context.evaluation import classifiers, real_texts, text_evaluator, text_sampling
from hf_causal_context.evaluation.influence import strength_curve
from hf_causal_context.evaluation.markdown import markdown
from hf_causal_context.evaluation.ngrams import Ngrams
from hf_causal_context.evaluation.report import write_report
from hf_causal_context.evaluation.results import Perplexity
from hf_causal_context.evaluation.sampling import adapters_disabled
from hf_causal_context.evaluation.text_evaluator import evaluate_texts
from hf_causal_context.inference.adapted import StoredAdapter

from ..training.small_language import language_model, word_tokenizer
from .small import result_of

FAST = {"num_samples": 3, "num_seeds": 2, "max_new_tokens": 6}
OBS, FORMAL, LOUD, PAIR = Context(), Context("formal"), Context("loud"), Context("formal", "loud")
CONTEXTS = (OBS, FORMAL, LOUD, PAIR)
LIKELIER = {context: Perplexity(10.0, 20.0 if context else 10.0, 20.0, 24) for context in CONTEXTS}


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(classifiers, "_MIN_STEPS", 20)


def write(context, rng, style=""):
    """A text; "formal" and "loud" show in how it begins and ends."""
    begin, middle = rng.choice(["a cat", "the dog", "a dog", "it"]), rng.choice(["sat", "ran", "barked on the mat"])
    formal, loud = ("indeed " * ("formal" in context.targets), " loudly" * ("loud" in context.targets))
    return f"{formal}{style}{begin} {middle}{loud}"


def texts(num=40):
    rng = np.random.default_rng(0)
    return {context: [write(context, rng) for _ in range(num)] for context in CONTEXTS}


def data_of(shape="text", num=40):
    """The texts as rows of one of the shapes "text", "prompt" and "messages", of two prompts."""
    columns = {"context": [str(context) for context in CONTEXTS for _ in range(num)]}
    written = [text for own in texts(num).values() for text in own]
    asked = ["user good", "user mat"] * (len(written) // 2)
    if shape == "text":
        columns["text"] = written
    elif shape == "prompt":
        columns |= {"prompt": asked, "completion": written}
    else:
        columns["messages"] = [
            [{"role": "user", "content": a}, {"role": "assistant", "content": b}]
            for a, b in zip(asked, written, strict=True)
        ]
    return texts_from_dataset(Dataset.from_dict(columns))


@pytest.fixture
def folder(tmp_path):
    for context, own in texts().items():
        place = tmp_path / "data" / (str(context) or "obs")
        place.mkdir(parents=True)
        (place / "texts.txt").write_text("\n".join(own))
    return tmp_path / "data"


def adapted(name="llama", **options):
    model = language_model(name)
    task = "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"
    given = {"concepts": ("formal", "loud"), "task_type": task, "init_weights": False, "observational_rank": 2}
    return get_peft_model(model, CausalContextConfig(**given | options)).eval()


@pytest.fixture
def adapter(tmp_path):
    """The folder of an adapter of random weights."""
    language_model("llama").save_pretrained(tmp_path / "base")
    word_tokenizer().save_pretrained(tmp_path / "base")
    model = adapted()
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    return str(tmp_path / "adapter")


def command(adapter, folder, out, *more):
    options = [f"--{name}={value}" for name, value in FAST.items()]
    data = ["--train_data_dir", str(folder), "--output_dir", str(out)]
    return ["evaluate", "--adapter", adapter, *data, *options, *more]


@pytest.fixture
def judge(monkeypatch):
    """A report on texts that are written here: `style` per context, of the base "base", and what is shown of each."""

    def report(shown=None, styles=None, scores=None, data=None, **options):
        shown, styles = shown or {}, styles or {}

        def written(model, tokenizer, prompts, contexts, *, max_new_tokens, seed, with_prompt):
            rng = np.random.default_rng(seed)
            layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
            if any(layer.disable_adapters for layer in layers):
                return [[write(shown.get("base", OBS), rng, styles.get("base", "")) for _ in contexts]]
            return [[write(shown.get(c, c), rng, styles.get(c, "")) for c in contexts]]

        monkeypatch.setattr(text_sampling, "generate_texts", written)
        monkeypatch.setattr(text_evaluator, "perplexities", lambda *arguments: scores or LIKELIER)
        return evaluate_texts(adapted(), word_tokenizer(), data or data_of(), num_samples=40, num_seeds=2, **options)

    return report


def test_the_command_finds_the_kind_of_the_adapter_by_itself(adapter, folder, tmp_path, quick, capsys):
    assert main(command(adapter, folder, tmp_path / "out")) == 0
    printed = capsys.readouterr().out
    assert (tmp_path / "out" / "report.md").read_text() in printed
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"report.json", "report.md", "report.png"}
    values = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [context["context"] for context in values["contexts"]] == ["", "formal", "loud", "formal+loud"]
    assert [context["trained"] for context in values["contexts"]] == [True, True, True, False]
    assert [context["num_samples"] for context in values["contexts"]] == [6, 6, 6, 6]
    assert [context["perplexity"]["num_rows"] for context in values["contexts"]] == [40, 40, 40, 40]
    assert (values["drift"], values["contexts"][1]["distance"]) == (None, None)
    assert values["settings"]["adapter"] == adapter
    assert values["settings"]["max_new_tokens"] == 6
    for sentence in values["verdict"]["sentences"]:
        assert printed.count(f"- {sentence}\n") == 2

    model, tokenizer = StoredAdapter.open(adapter).language_model()
    report = evaluate_texts(model, tokenizer, load_text_folders(folder), **FAST)
    values["settings"] = {name: values["settings"][name] for name in report.settings}
    assert json.loads(json.dumps(report.to_dict())) == values


def test_perplexities_are_those_of_what_the_training_learned(adapter, tmp_path, quick):
    for context, own in texts().items():
        (tmp_path / "chats" / (str(context) or "obs")).mkdir(parents=True)
        chats = ([{"role": "user", "content": "user good"}, {"role": "assistant", "content": text}] for text in own)
        lines = "".join(json.dumps({"messages": chat}) + "\n" for chat in chats)
        (tmp_path / "chats" / (str(context) or "obs") / "chats.jsonl").write_text(lines)
    data = load_text_folders(tmp_path / "chats")
    (tmp_path / "adapter" / "training_arguments.json").write_text('{"assistant_only_loss": true, "max_length": 12}')
    assert main(command(adapter, tmp_path / "chats", tmp_path / "out")) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["settings"]["perplexity_of"] == "the assistant's turns"
    assert "Perplexity of real rows (the assistant's turns; lower" in (tmp_path / "out" / "report.md").read_text()

    model, tokenizer = StoredAdapter.open(adapter).language_model()
    tokenize = Tokenization(tokenizer, "messages", assistant_only=True, max_length=12)
    rows = [tokenize(row) for row in data.held_out["formal+loud"]]
    batch = Collation(0, model.device)(rows, ConceptSet(("formal", "loud")).mask([PAIR]).expand(len(rows), -1))
    expected = perplexity(model, [batch])
    assert report["contexts"][3]["perplexity"]["adapter"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_perplexities_are_those_of_the_context_the_empty_one_and_the_base(name, quick):
    model, data = adapted(name), data_of("prompt")
    report = evaluate_texts(model, word_tokenizer(), data, **FAST)
    encoder_decoder = model.config.is_encoder_decoder
    tokenize = Tokenization(word_tokenizer(), "prompt", encoder_decoder=encoder_decoder)
    decoder_inputs = model.prepare_decoder_input_ids_from_labels if encoder_decoder else None
    collate = Collation(0, model.device, decoder_inputs=decoder_inputs)
    rows = [tokenize(row) for row in data.held_out["formal+loud"]]

    def measured(context):
        return perplexity(model, [collate(rows, data.concepts.mask([context] * len(rows)))])

    scores = result_of(report, PAIR).perplexity
    assert scores.adapter == pytest.approx(measured(PAIR))
    assert scores.empty == pytest.approx(measured(OBS))
    with adapters_disabled(model):
        assert scores.base == pytest.approx(measured(PAIR))
    assert len({round(value, 4) for value in (scores.adapter, scores.empty, scores.base)}) == 3
    row = f"| formal+loud | held out | {scores.adapter:.2f} | {scores.empty:.2f} | {scores.base:.2f} | 40 |"
    assert row in markdown(report)
    assert "The rows of trained contexts are training rows" in markdown(report)


def test_it_is_deterministic_and_leaves_the_random_state_alone(quick):
    model, data = adapted(), data_of()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = evaluate_texts(model, word_tokenizer(), data, **FAST)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(4)
    again = evaluate_texts(model, word_tokenizer(), data, **FAST)
    assert (again.to_dict(), again.texts) == (first.to_dict(), first.texts)


def test_a_model_that_was_just_trained_is_measured_without_dropout(quick):
    model, data = adapted(dropout=0.5), data_of()
    expected = evaluate_texts(model, word_tokenizer(), data, **FAST)
    found = evaluate_texts(model.train(), word_tokenizer(), data, **FAST)
    assert (found.to_dict(), found.texts) == (expected.to_dict(), expected.texts)
    assert model.training


def test_an_adapter_that_writes_what_was_asked_for_works(judge, tmp_path):
    report = judge()
    assert report.verdict.works
    more = "More strength is more of the concept, from 0 to 1.5: formal, loud."
    assert report.verdict.sentences == ("Everything asked for works: 2 concepts and 1 combination.", more)
    assert min(report.classifier_accuracy.values()) > 0.95
    assert result_of(report, PAIR).conformity.mean > 0.95
    assert result_of(report, PAIR).base_conformity < 0.05
    assert report.told_apart.base < 0.65
    text = write_report(report, tmp_path)[1].read_text()
    real, sample = report.texts["formal+loud"][0][0], report.texts["formal+loud"][1][0]
    assert f"| formal+loud | real | {real} |" in text
    assert f"| formal+loud | sample | {sample} |" in text
    assert "## Distances" not in text


def test_the_space_before_a_text_is_no_difference(judge):
    """Some tokenizers lose it where they decode a completion alone, so real texts have it and samples do not."""
    report, expected = judge(styles={OBS: " ", LOUD: " ", "base": " "}).to_dict(), judge().to_dict()
    assert (report["contexts"], report["told_apart"]) == (expected["contexts"], expected["told_apart"])


def test_an_adapter_without_effect_is_told_so(judge):
    nothing = {context: Perplexity(20.0, 20.0, 20.0, 24) for context in CONTEXTS}
    report = judge(dict.fromkeys(CONTEXTS, OBS), scores=nothing)
    (sentence,) = report.verdict.sentences
    assert sentence.startswith("The adapter has no effect. formal (found in 0.0")
    assert "It is the base: real rows have the same perplexity, bit for bit." in markdown(report)


def test_a_pair_that_is_never_shown_fails_however_likely_its_real_rows_are(judge):
    fails, rest, _ = judge({PAIR: FORMAL}).verdict.sentences
    assert fails.startswith("Fails: formal+loud (found in 0.0")
    assert rest == "The rest works: 2 concepts."


def test_real_rows_that_are_less_likely_in_their_context_speak_against_it(judge):
    scores = LIKELIER | {PAIR: Perplexity(21.0, 20.0, 22.0, 24)}
    fails, _, _ = judge(scores=scores).verdict.sentences
    assert fails == "Fails: formal+loud (perplexity of real rows 21, 20 without it)."


def test_likelier_rows_alone_are_no_proof(judge):
    """Here no text shows "loud", so its classifier knows nothing, and no share speaks for or against it."""
    data = texts_from_dataset(
        Dataset.from_dict(
            {
                "context": [str(context) for context in CONTEXTS for _ in range(40)],
                "text": [text for name in (OBS, FORMAL, OBS, FORMAL) for text in texts()[name]],
            }
        )
    )
    report = judge({LOUD: OBS, PAIR: FORMAL}, data=data)
    assert not report.verdict.works
    assert any(sentence.startswith("Not judged: loud") for sentence in report.verdict.sentences)


def test_a_base_that_writes_otherwise_is_told_apart(judge):
    strange = dict.fromkeys(["base"], "yo and then ")
    report = judge(styles=strange)
    assert report.told_apart.base > 0.95
    assert report.told_apart.empty < 0.65
    far = report.verdict.sentences[1]
    assert report.verdict.works
    assert far.startswith("The base is far from the observational set (told from it in 1.00 of its texts; perplexity")
    assert "; the empty context is nearer (0." in far
    assert "The empty context moved towards the observational rows: their perplexity is 10" in markdown(report)

    without = LIKELIER | {OBS: Perplexity(20.0, 20.0, 20.0, 24)}
    report = judge(styles=strange | {OBS: "yo and then "}, scores=without)
    assert not report.verdict.works
    assert "and the empty context is the base: concepts learn the rest" in report.verdict.sentences[0]
    assert "with an observational part (--observational_rank)." in report.verdict.sentences[0]

    little = LIKELIER | {OBS: Perplexity(19.9, 19.9, 20.0, 24)}
    report = judge(styles=strange | {OBS: "yo and then "}, scores=little)
    assert "and the empty context is no nearer (1.00; 19.9)" in report.verdict.sentences[0]
    assert "is as far from the observational rows as the base:" in markdown(report)
    away = judge(scores=LIKELIER | {OBS: Perplexity(30.0, 30.0, 20.0, 24)})
    assert away.verdict.sentences[0].startswith("The empty context moved away from the observational rows:")


@pytest.fixture
def asked(monkeypatch):
    """What `generate_texts` is asked for, with what it writes."""
    calls = []
    original = text_sampling.generate_texts

    def recorded(model, tokenizer, prompts, contexts, **options):
        written = original(model, tokenizer, prompts, contexts, **options)
        layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
        calls.append((prompts[0], list(contexts), any(layer.disable_adapters for layer in layers), written[0]))
        return written

    monkeypatch.setattr(text_sampling, "generate_texts", recorded)
    return calls


def test_samples_of_every_context_follow_the_prompts_of_observational_rows(asked, quick):
    evaluate_texts(adapted(), word_tokenizer(), data_of("messages"), **FAST)
    prompts = [[{"role": "user", "content": text}] for text in ("user good", "user mat")]
    for context, count in ((FORMAL, 3), (PAIR, 3), (Context({"loud": 0.5}), None)):
        of = [sum(c == context for prompt, own, _, _ in asked if prompt == p for c in own) for p in prompts]
        assert sorted(of) == ([count, count] if count else [1, 2]), "of a strength curve the first group only"
    assert [sum(len(own) for _, own, base, _ in asked if base and prompt == prompt) for prompt in prompts] == [6, 6]
    assert all(own == [OBS] * len(own) for _, own, base, _ in asked if base)
    asked.clear()
    evaluate_texts(adapted(), word_tokenizer(), data_of("messages"), prompt="the mat", **FAST)
    assert all(prompt == [{"role": "user", "content": "the mat"}] for prompt, *_ in asked)


def test_batches_have_the_size_that_was_asked_for(asked, quick):
    evaluate_texts(adapted(), word_tokenizer(), data_of(), batch_size=5, **FAST)
    assert max(len(own) for _, own, _, _ in asked) == 5


def test_a_prompt_of_plain_texts_is_part_of_them(asked, quick):
    report = evaluate_texts(adapted(), word_tokenizer(), data_of(), prompt="a cat", **FAST)
    written = next(
        text for _, own, base, texts in asked if not base for c, text in zip(own, texts, strict=True) if not c
    )
    assert report.texts[""][1][0] == written
    assert written.startswith("a cat "), "as the tokenizer writes both: some have no space in front of a text"
    assert {prompt for prompt, *_ in asked} == {"a cat"}


def test_real_texts_are_read_as_long_as_the_samples_are(judge):
    report = judge(max_new_tokens=2)
    for real, _ in report.texts.values():
        assert all(len(text.split()) <= 2 for text in real)
    whole = judge()
    assert whole.settings["max_new_tokens"] == 7, "nine of ten have at most as many words"
    tokenize = Tokenization(word_tokenizer(), "text")
    assert real_texts.shortened(["the CAT sat on"], tokenize, 3) == ["the sat"], (
        "what the tokenizer does not know is lost"
    )


def test_streams_are_read_too_and_rows_are_bounded(quick, monkeypatch):
    monkeypatch.setattr(real_texts, "MAX_REAL_TEXTS", 12)
    monkeypatch.setattr(real_texts, "MAX_SCORED_TEXTS", 5)
    rows = Dataset.from_dict(
        {
            "context": [str(context) for context in CONTEXTS for _ in range(20)],
            "text": [text for own in texts(20).values() for text in own],
        }
    )
    streamed = texts_from_dataset(
        rows.to_iterable_dataset(), concepts=("formal", "loud"), held_out_contexts=["formal+loud"]
    )
    for data in (texts_from_dataset(rows), streamed):
        report = evaluate_texts(adapted(), word_tokenizer(), data, **FAST)
        assert [result.num_real for result in report.contexts] == [12] * 4
        assert [result.perplexity.num_rows for result in report.contexts] == [5] * 4


def test_contexts_without_real_rows_are_judged_by_the_classifiers_alone(judge):
    report = judge(contexts=["formal+loud=0.5", "formal+observational=0"])
    names = [result.context for result in report.contexts]
    assert names == ["", "formal", "formal+observational=0.0", "loud", "formal+loud=0.5"]
    assert result_of(report, Context({"formal": 1, "loud": 0.5})).perplexity is None
    assert "formal+loud=0.5: no real rows, so nothing to compare with" in markdown(report)
    assert report.verdict.works


def test_an_adapter_without_an_observational_part_has_the_base_as_its_empty_context(quick):
    report = evaluate_texts(adapted(observational_rank=0), word_tokenizer(), data_of(), **FAST)
    scores = result_of(report, OBS).perplexity
    assert scores.empty == scores.base
    assert all(curve.zero_is_base and curve.zero_is_empty for curve in report.strength_curves)
    with_part = evaluate_texts(adapted(), word_tokenizer(), data_of(), **FAST)
    assert not any(curve.zero_is_base for curve in with_part.strength_curves)
    assert "Strength 0 gives the samples of the empty context, bit for bit." in markdown(with_part)


def test_bad_input_is_an_error_that_says_what_to_do(adapter, folder, tmp_path, capsys):
    def error(*more, data=folder):
        assert main(command(adapter, data, tmp_path / "out", *more)) == 1
        return capsys.readouterr().err

    assert "is an adapter of a language model, so --num_inference_steps, --resolution would have no effect" in error(
        "--num_inference_steps", "3", "--resolution", "8"
    )
    assert "Unknown concept 'color' in context 'color'" in error("--contexts", "color")
    assert "--max_new_tokens=0 must be at least 1" in error("--max_new_tokens", "0")
    assert "so --max_new_tokens=99 is too much. Give at most" in error("--max_new_tokens", "99")
    (folder / "loud" / "texts.txt").write_text("\n".join(texts()[LOUD][:9]))
    assert "The context 'loud' has 9 real rows. At least 10" in error()
    (folder / "loud").rename(folder / "calm")
    (folder / "formal+loud").rename(folder / "formal+calm")
    assert "The adapter has the concepts 'formal', 'loud', the data 'calm', 'formal'" in error()
    with pytest.raises(ValueError, match="This language model has no causal context adapter. Load one first"):
        evaluate_texts(language_model("llama"), word_tokenizer(), data_of())
    with pytest.raises(ValueError, match="num_samples=1 must be at least 2"):
        evaluate_texts(adapted(), word_tokenizer(), data_of(), num_samples=1)


def test_ngrams_count_characters_pairs_and_words_that_are_common():
    ngrams = Ngrams(["The cat!", "the cat", "a cat"])
    values = ngrams(["cat", "CAT cat cat", "zzz", "Cat"])
    assert values.shape[0] == 4
    # "c", "a", "t", "ca", "at", " ", " c" and the word "cat" are in three texts; then the number of characters
    assert values.shape[1] == 9
    assert values[0].count_nonzero() == 7, "all but the space and the pair with it"
    assert values[2, :-1].count_nonzero() == 0
    assert values[:, -1].tolist() == pytest.approx(np.log1p([3, 11, 3, 3]).tolist())
    assert values[3].count_nonzero() == 5, "of words, case does not count; of characters it does"


def test_a_linear_classifier_learns_more_features_than_rows():
    concepts = ConceptSet(("formal", "loud"))
    ngrams = Ngrams(text for own in texts(20).values() for text in own)
    learned = {context: ngrams(own) for context, own in texts(20).items()}
    rng = np.random.default_rng(1)
    judged = {context: ngrams([write(context, rng) for _ in range(50)]) for context in CONTEXTS}
    classifier = classifiers.train_classifier(learned, concepts, linear=True)
    accuracy = classifiers.balanced_accuracy({c: classifier.read(rows) for c, rows in judged.items()}, concepts)
    assert min(accuracy.values()) > 0.95
    assert sum(parameter.numel() for parameter in classifier.parameters()) == 2 * (learned[OBS].shape[1] + 1)


def test_curves_of_texts_may_fall_as_far_as_chance_takes_them():
    generator = torch.Generator().manual_seed(0)
    noise = {s: torch.randn(50, generator=generator) for s in (0.0, 0.5, 1.0)}
    for fall, expected in ((0.1, True), (1.5, False)):
        logits = {s: rows - rows.mean() + (0, fall, 0)[n] for n, (s, rows) in enumerate(noise.items())}
        assert strength_curve("a", logits, None, False, True, paired=False).monotone == expected
        assert not strength_curve("a", logits, None, False, True).monotone
