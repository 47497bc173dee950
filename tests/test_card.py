"""The card: a function of the files in an adapter's folder, valid, and harmless whatever concepts are called."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id  # noqa: F401 (the client is not patched here)

from hf_causal_context.bases.gap import BaseGap
from hf_causal_context.bases.names import is_packaged, portable_base_name, resolve_base_name, unpacked
from hf_causal_context.errors import UserValueError
from hf_causal_context.hub.card import is_edited, render_card, write_card
from hf_causal_context.hub.card_tables import markdown_text
from hf_causal_context.hub.contents import CardContents

CARDS = Path(__file__).parent.parent / "model_cards"
REPORT = {
    "concepts": ["thick", "slant"],
    "notes": ["A note with a | in it."],
    "contexts": [
        {
            "context": context,
            "trained": "+" not in context,
            "distance": {
                **{key: {"mean": value, "half_width": width} for key, value, width in estimates},
                "gap_closed": closed,
            },
            "conformity": {"mean": 0.75, "half_width": None} if context else None,
            "real_conformity": 0.8 if context else None,
        }
        for context, closed, estimates in (
            ("", None, [("samples", 0.1, None), ("floor", 0.09, 0.01), ("base", 0.1, None)]),
            ("slant+thick", 0.95, [("samples", 0.12, 0.02), ("floor", 0.11, None), ("base", 0.31, None)]),
        )
    ],
    "trained": None,
    "unseen": {"samples": 0.12, "conformity": 0.75},
    "settings": {},
}


@pytest.fixture
def folder(tmp_path):
    """An adapter's folder as `save` leaves it, without its images and weights."""
    folder = tmp_path / "strokes"
    (folder / "evaluation").mkdir(parents=True)
    config = {"concepts": ["thick", "slant"], "target_modules": ["to_q", "to_v"]}
    arguments = {"learning_rate": 0.001, "max_train_steps": 300, "dataset_name": "user/strokes-data", "use_ema": False}
    data = {"trained": {"": 1500, "thick": None}, "held_out": {"slant+thick": 40}, "reweighted": {"slant+thick": 700}}
    files = {"adapter_config.json": config, "training_arguments.json": arguments, "training_data.json": data}
    for name, values in (files | {"evaluation/report.json": REPORT}).items():
        (folder / name).write_text(json.dumps(values))
    CardContents(
        name="strokes",
        library="diffusers",
        base="user/base",
        pipeline_tag="text-to-image",
        call={"num_inference_steps": 25, "prompt": 'say "word"'},
        revision="v1",
        seed=7,
        prompt='say "word"',
        descriptions={"thick": "strokes are thicker"},
        samples={"": "pictures/obs.png", "thick": "pictures/thick.png", "slant+thick": "pictures/slant+thick.png"},
        grid="pictures/grid.png",
        strengths="pictures/strengths.png",
        influence="influence.png",
        loras={"thick": "loras/thick.safetensors"},
        lora_format="diffusers",
        license="apache-2.0",
    ).save(folder)
    return folder


def changed(folder, **changes):
    dataclasses.replace(CardContents.load(folder), **changes).save(folder)
    return render_card(folder)


def code(card):
    [block] = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    return block


def test_metadata_says_what_the_hub_needs(folder):
    data = ModelCard(render_card(folder)).data
    assert (data.library_name, data.base_model, data.base_model_relation) == ("peft", "user/base", "adapter")
    assert (data.pipeline_tag, data.license, data.datasets) == ("text-to-image", "apache-2.0", "user/strokes-data")
    assert data.tags == ["causal-context", "hf_causal_context", "diffusers"]
    assert data.widget[2] == {"text": "slant+thick", "output": {"url": "pictures/slant+thick.png"}}
    values = {result.metric_type: (result.metric_name, result.metric_value) for result in data.eval_results}
    assert values == {
        "sliced_wasserstein": ("Sliced Wasserstein distance, unseen combinations", 0.12),
        "conformity": ("Conformity, unseen combinations", 0.75),
    }


def test_it_shows_everything_that_the_folder_holds(folder):
    (folder / "results.md").write_text("    a command\n\nBeside stacked LoRAs: 0.2\n")
    (folder / "results.png").write_bytes(b"")
    card = render_card(folder, "user/strokes")
    for part in (
        "# strokes\n",
        "for `user/base`",
        "![Samples in each context](pictures/grid.png)",
        "Not trained on: slant+thick. Rows of single interventions stood in for them.",
        '| slant+thick | <img src="pictures/slant+thick.png" alt="slant+thick" width="128"> |',
        "pictures/strengths.png",
        "[thick](loras/thick.safetensors)",
        "- thick: strokes are thicker",
        'The prompt: say "word"',
        'pipe.load_lora_weights("user/strokes", weight_name="thick.safetensors", subfolder="loras")',
        "| (observational) | 1,500, trained on |",
        "| thick | a stream, trained on |",
        "| slant+thick | 40, only measured; 700 draws from rows of single interventions, trained on |",
        "| learning rate | 0.001 |",
        "| adapted modules | to\\_q, to\\_v |",
        "| (observational) | yes | 0.1000 | 0.1000 | 0.0900 ± 0.0100 | - |  |",
        "| slant+thick | none | 0.3100 | 0.1200 ± 0.0200 | 0.1100 | 0.95 | 0.75 / 0.80 |",
        "A note with a \\| in it.",
        "![What was measured](results.png)\n\n    a command\n\nBeside stacked LoRAs: 0.2",
        "![Learned influence of the concepts](influence.png)",
        "The adapter: apache-2.0. The license and terms of `user/base` apply to its use.",
        "@inproceedings{markham2026intervening",
    ):
        assert part in card, part
    assert "moving average" not in card  # a setting that was off


def test_the_code_shows_a_single_context_where_no_combination_is_shown(folder):
    samples = {"": "pictures/obs.png", "thick=0.5": "pictures/half.png"}
    card = changed(folder, samples=samples, loras={})
    assert 'intervene(pipe, "thick=0.5")' in code(card)
    assert "This makes the image `pictures/half.png` of this card again" in card


def test_a_verdict_and_the_bases_own_rate_are_on_the_card(folder):
    report = json.loads(json.dumps(REPORT)) | {"verdict": {"works": False, "sentences": ["Fails: slant+thick (a|b)."]}}
    for item in report["contexts"]:
        asked = bool(item["context"])
        item |= {"base_conformity": 0.25 if asked else None, "conformity_beyond_base": 0.667 if asked else None}
        item |= {"real_conformity_beyond_base": 0.733 if asked else None}
    report["unseen"] |= {"conformity_beyond_base": 0.66667}
    (folder / "evaluation/report.json").write_text(json.dumps(report))
    card = render_card(folder)
    assert "## Evaluation\n\n- Fails: slant+thick (a\\|b).\n\nSliced" in card
    assert "| gap closed | conformity / real | the base's | beyond it / real |" in card
    assert "| 0.95 | 0.75 / 0.80 | 0.25 | 0.67 / 0.73 |" in card
    assert "| (observational) | yes | 0.1000 | 0.1000 | 0.0900 ± 0.0100 | - |  |  |  |" in card
    values = {result.metric_type: result.metric_value for result in ModelCard(card).data.eval_results}
    assert values["conformity_beyond_base"] == 0.6667


def test_it_says_how_far_the_base_was_and_warns_where_nothing_else_holds_the_difference(folder):
    assert "observational set (" not in render_card(folder)
    gap = BaseGap("images", 0.3, 0.1, 32)
    (folder / "base_gap.json").write_text(gap.json())
    assert f"\n\n{gap.note(0)}\n\n" in render_card(folder)  # a config that does not say has no observational part
    stored = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(stored | {"observational_rank": 8}))
    assert f"\n\n{gap.note(8)}\n\n" in render_card(folder)


def test_a_report_on_texts_has_perplexities_in_place_of_distances(folder):
    report = json.loads(json.dumps(REPORT)) | {"verdict": {"works": True, "sentences": ["Everything works."]}}
    for item in report["contexts"]:
        asked = bool(item["context"])
        item |= {"distance": None, "base_conformity": 0.25 if asked else None, "conformity_beyond_base": 0.667}
        item |= {"real_conformity_beyond_base": 0.733}
        item["perplexity"] = {"adapter": 12.25, "empty": 20.5, "base": 31.125, "num_rows": 40} if asked else None
    report["unseen"] |= {"samples": None}
    (folder / "evaluation/report.json").write_text(json.dumps(report))
    card = render_card(folder)
    assert "Perplexity of real rows (lower is likelier; those of contexts with data are training rows)" in card
    assert "| context | data | base | empty context | this adapter | conformity / real | the base's |" in card
    assert "| slant+thick | none | 31.12 | 20.50 | 12.25 | 0.75 / 0.80 | 0.25 | 0.67 / 0.73 |" in card
    assert "| (observational) | yes |  |  |  |  |  |  |" in card
    assert "sliced_wasserstein" not in {result.metric_type for result in ModelCard(card).data.eval_results}


def test_code_loads_what_the_card_is_of_and_asks_for_its_image(folder):
    block = code(render_card(folder, "user/strokes"))
    compile(block, "card", "exec")
    assert 'CausalContextPipeline.from_pretrained("user/strokes", dtype=torch.float32)' in block  # the config has v1
    assert 'with intervene(pipe, "slant+thick"):' in block
    call = 'pipe(num_inference_steps=25, prompt="say \\"word\\"", generator=torch.Generator().manual_seed(7))'
    assert call in block
    assert 'image.save("slant+thick.png")' in block


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"class_label": 3, "call": {"num_inference_steps": 5}}, "seeds=[7], class_label=3, num_inference_steps=5"),
        ({"base": "hf_causal_context/models/digit_base"}, 'from_pretrained("strokes", dtype=torch.float32)'),
        ({"dtype": "float16", "variant": "fp16"}, '"strokes", dtype=torch.float16, variant="fp16")'),
        (
            {
                "library": "transformers",
                "auto_class": "AutoPeftModelForCausalLM",
                "inputs": 'tokenizer("a", return_tensors="pt")',
                "samples": {"": "a text", "slant+thick": "another"},
                "call": {"do_sample": True},
            },
            'model.generate(**inputs, context="slant+thick", do_sample=True)',
        ),
    ],
)
def test_code_of_other_bases(folder, changes, expected):
    block = code(changed(folder, **changes))
    compile(block, "card", "exec")
    assert expected in block


def test_a_card_is_the_same_whenever_it_is_made_and_for_another_name_differs_in_that_only(folder):
    assert render_card(folder) == render_card(folder)
    ours, other = render_card(folder, "user/a"), render_card(folder, "user/b")
    differing = [(x, y) for x, y in zip(ours.splitlines(), other.splitlines(), strict=True) if x != y]
    assert len(differing) == 5  # title, model-index, code, code of a LoRA, seal


def test_code_of_a_branch_loads_that_branch(folder):
    block = code(render_card(folder, "user/strokes", "v2"))
    assert 'from_pretrained("user/strokes", revision="v2", dtype=torch.float32)' in block


@pytest.mark.parametrize(
    ("trained", "said"),
    [
        ({"": 1500, "thick": None}, "Only 0 and 1 were trained."),
        ({"": 1500, "slant": 9, "thick=0.5": 9}, "0, 0.5 and 1 were trained."),
        ({"": 1500, "thick=0.25": 9, "thick=0.5": 9}, "0, 0.25 and 0.5 were trained."),
    ],
)
def test_it_says_which_strengths_were_trained_and_what_is_calibrated(folder, trained, said):
    (folder / "training_data.json").write_text(json.dumps({"trained": trained}))
    assert f"extrapolate. {said}\n" in render_card(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"calibration": {"thick": [[0, 0], [1, 1]]}}))
    told = "equal steps of the strength of thick are equal changes."
    assert f"{said} With `calibrated=True` (`--calibrated`), {told}" in render_card(folder)


def test_an_edited_card_is_kept_and_one_as_it_was_written_is_not(folder):
    write_card(folder)
    first = (folder / "README.md").read_text()
    assert not is_edited(first)
    assert not is_edited(first.replace("\n", "\r\n"))
    (folder / "results.md").write_text("new results")
    write_card(folder)
    second = (folder / "README.md").read_text()
    assert "new results" in second
    edited = second.replace("## License", "## My license")
    assert is_edited(edited)
    assert is_edited(second.rpartition("<!--")[0])
    (folder / "README.md").write_text(edited)
    write_card(folder)
    assert (folder / "README.md").read_text() == edited


def test_the_generic_card_of_peft_is_replaced(folder):
    (folder / "README.md").write_text("# Model Card\n\n[More Information Needed]\n")
    write_card(folder)
    assert not is_edited((folder / "README.md").read_text())


def test_without_a_base_that_others_have_the_metadata_name_none(folder):
    card = changed(folder, base="./my-base", loras={}, without_loras="not linear")
    assert ModelCard(card).data.base_model is None
    assert "for `my-base`" in card
    packaged = changed(folder, base="hf_causal_context/models/digit_base")
    assert "for `digit_base`, a small model that comes with the package" in packaged
    assert "None: not linear" in card


NASTY = [
    "<script>alert(1)</script>",
    "a|b",
    "`code` *bold* _it_ [link](http://x) ![img](y)",
    "$x^2$ ~~no~~ # title",
    '"; import os #',
    "{{ card_data }} {% for x in y %}",
    "--- key: value",
    "& &lt; \\",
    "<!-- comment",
    "日本語",
]


@pytest.mark.parametrize("name", NASTY)
@pytest.mark.parametrize("library", ["diffusers", "transformers"])
def test_names_with_markup_are_text(folder, name, library):
    stored = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(stored | {"concepts": [name, "slant"]}))
    pair = f"slant+{name}"
    shown = "pictures/x.png" if library == "diffusers" else name
    (folder / "training_data.json").write_text(json.dumps({"trained": {name: 3}, "reweighted": {pair: 1}}))
    card = changed(
        folder,
        library=library,
        auto_class="AutoPeftModelForCausalLM",
        inputs='tokenizer("a", return_tensors="pt")',
        samples={"": shown, name: shown, pair: shown},
        loras={name: "loras/x.safetensors"},
    )
    data = ModelCard(card).data
    assert data.widget[1]["text"] == name
    assert yaml.safe_load(card.split("---\n")[1])["library_name"] == "peft" or name.startswith("---")
    block = code(card)
    compile(block, "card", "exec")
    assert json.dumps(pair, ensure_ascii=False) in block
    assert not is_edited(card)
    rendered = card.replace(f"```python\n{block}```", "").partition("\n---\n\n#")[2].rpartition("<!--")[0]
    assert not re.search(r"<(?!img src=\"pictures)", rendered)
    for table in re.findall(r"(?:^\|.*\n)+", rendered, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1, table


@pytest.mark.parametrize(
    ("text", "expected"), [("a_b", "a\\_b"), ("<b>", "&lt;b&gt;"), ("x\n\ny", "x y"), ("+1.5", "+1.5")]
)
def test_markdown_text(text, expected):
    assert markdown_text(text) == expected


def test_card_json_of_another_version_or_half_of_one_says_so(folder):
    stored = json.loads((folder / "card.json").read_text())
    for text in (json.dumps(stored | {"holograms": []}), '{"name": "dig'):
        (folder / "card.json").write_text(text)
        with pytest.raises(UserValueError, match="is not what this version writes.*Make the folder again"):
            render_card(folder)


def test_names_of_bases(tmp_path, monkeypatch):
    packaged = "hf_causal_context/models/digit_base"
    assert is_packaged(packaged)
    assert Path(unpacked(packaged), "model_index.json").exists()
    assert (
        resolve_base_name(unpacked(packaged)) == resolve_base_name(packaged) == packaged == portable_base_name(packaged)
    )
    assert not is_packaged("hf_causal_context/models/../../etc")
    assert not is_packaged("hf_causal_context/models/digit_base/unet")
    assert resolve_base_name("user/base") == portable_base_name("user/base") == "user/base"
    (tmp_path / "base").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve_base_name("base") == str((tmp_path / "base").resolve())
    assert portable_base_name("base") == "./base"


@pytest.mark.parametrize(
    "folder", sorted(path.parent for path in CARDS.glob("*/README.md")), ids=lambda path: path.name
)
def test_model_cards_are_up_to_date(folder):
    """Made anew by `python -m examples.model_cards`; what the code writes today must be what is committed."""
    assert render_card(folder) == (folder / "README.md").read_text(encoding="utf-8")
    contents = CardContents.load(folder)
    images = list(contents.samples.values()) if contents.library == "diffusers" else []
    for name in filter(None, [*images, contents.grid, contents.strengths, contents.influence]):
        assert (folder / name).exists(), name
