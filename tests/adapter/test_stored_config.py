"""Configs from a stranger: any JSON may stand in any field; it is used or refused, and nothing else happens."""

import copy
import json
import shutil
import time
from pathlib import Path

import pytest
from peft import AutoPeftModel, PeftConfig, PeftModel

from hf_causal_context import AdapterError, CausalContextConfig
from hf_causal_context.inference.adapted import StoredAdapter

from .fixtures.adapters import FOLDER
from .small import Mlp
from .stored_copies import edit, refused


@pytest.fixture
def reduced(tmp_path):
    return shutil.copytree(FOLDER / "format_1_unet_reduced", tmp_path / "reduced")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not valid JSON: Expecting value"),
        ("{", "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON: maximum recursion|is not valid JSON"),
        ('{"a":' * 5_000, "is not valid JSON"),
        ("[1]", r"holds no fields, but \[1\]"),
        ('"text"', "holds no fields, but 'text'"),
        ('{"alpha": NaN}', "NaN is not a number"),
        ('{"alpha": -Infinity}', "-Infinity is not a number"),
        ('{"alpha": ' + "1" * 5_000 + "}", "is not valid JSON"),
        ('{"alpha": 1, "alpha": 2}', "it gives a field twice"),
        ("{}", "says peft_type=None, which is no kind of adapter"),
        ('{"peft_type": "SOMETHING"}', "says peft_type='SOMETHING', which is no kind"),
        ('{"peft_type": ["LORA"]}', r"says peft_type=\['LORA'\], which is no kind"),
        (
            '{"peft_type": "LORA"}',
            "is a LORA adapter; only causal context adapters have contexts. Load it w",
        ),
        (" " * (2**20 + 1), "has more than 1 MiB"),
    ],
    ids=range(15),
)
def test_text_that_is_no_config(reduced, text, message):
    (reduced / "adapter_config.json").write_text(text)
    refused(reduced, message)


def test_bytes_that_are_no_text(reduced):
    (reduced / "adapter_config.json").write_bytes(b"\xff\xfe{}")
    refused(reduced, "is not valid JSON: 'utf-8' codec")


GARBAGE = (
    *("text", "", 7, -1, 2.5, True, [], [[]], [1], ["x", 1], [None], {}, {"a": 1}, {"a": {"b": []}}, [["a"]]),
    *(10**4_000, 1e308, ["a"] * 100_000, "x" * 100_000, "\ud800", "a\0b", [[[[[[[["deep"]]]]]]]], "(", ["("], "("),
)


@pytest.mark.parametrize("field", sorted(CausalContextConfig(concepts=("a",)).to_dict()))
def test_any_value_in_any_field_is_used_or_refused(reduced, field):
    given = json.loads((reduced / "adapter_config.json").read_text())
    if field.startswith("concept_"):
        given["mechanism"] = "reduced"
    for value in GARBAGE:
        fields = given | {field: copy.deepcopy(value)}
        try:
            config = CausalContextConfig(**fields)
        except (TypeError, ValueError) as error:
            assert len(str(error)) < 2_500  # noqa: PT017
            with pytest.raises((AdapterError, ValueError, TypeError)):
                PeftConfig.from_peft_type(**fields)
        else:
            text = json.dumps(config.to_dict())
            assert CausalContextConfig(**json.loads(text)) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"concepts": {"a": 1}}, "has no order. Give a list of names"),
        ({"concepts": ["a" * 101]}, "has 101 characters; allowed are 100"),
        ({"concepts": ["a\u202eb"]}, "must not contain .* control characters"),
        ({"concepts": ["a\u200bb"]}, "must not contain .* control characters"),
        ({"concepts": ["a\ud800"]}, "must not contain .* control characters"),
        ({"concepts": ["\u3164"]}, r"'\\u3164' contains characters that show as nothing"),
        ({"concepts": [f"c{i}" for i in range(1_001)]}, "More than 1,000 concepts given"),
        ({"concept_rank": True}, "concept_rank=True must be a whole number"),
        ({"concept_rank": 5_000}, "concept_rank=5000 is too large: at most 4,096"),
        ({"concept_rank": 2_000}, "rank 6,000; at most 4,096 is allowed for mechanisms that mix"),
        ({"mechanism": "independent", "expressive_depth": 0, "concept_rank": 6_000}, "rank 18,000; at most 16,384"),
        ({"rank_pattern": {"to_q": 3_000}}, r"rank_pattern\['to_q'\]=3,000 make an adapter of rank 9,000"),
        ({"rank_pattern": {f"m{i}": 1 for i in range(257)}}, "rank_pattern has 257 entries; at most 256"),
        ({"rank_pattern": [1]}, "must be a mapping from names of modules"),
        ({"expressive_depth": 17}, "expressive_depth=17 is too large: at most 16"),
        ({"alpha": "1"}, "alpha='1' must be a positive number of at most 1e"),
        ({"alpha": 1e300}, "must be a positive number of at most 1e"),
        ({"anchored": "no"}, "anchored='no' must be True or False"),
        ({"inference_mode": 1}, "inference_mode=1 must be True or False"),
        ({"mechanism": ["reduced"]}, r"Unknown mechanism \['reduced'\]"),
        ({"concept_graph": ["ab"]}, "must be a list of names"),
        ({"concept_graph": [["thick", 1]]}, "must hold names only"),
        ({"concept_order": "thick"}, "concept_order='thick' must be a list of names"),
        ({"target_modules": {"a": 1}}, "must be a list of names, or one text"),
        ({"target_modules": ["a"] * 5_001}, "target_modules has 5,001 entries"),
        ({"target_modules": "x" * 1_001}, "a regular expression of 1,001 characters; at most 1,000"),
        ({"target_modules": "("}, "is not a valid regular expression"),
        ({"exclude_modules": "(.*a)*b"}, "could take for ever to match"),
        ({"rank_pattern": {"(a|aa)+": 1}}, "could take for ever to match"),
        ({"layers_to_transform": [1.5]}, "layers_to_transform=1.5 must be a whole number"),
        ({"modules_to_save": ["(a*)*"]}, "is not the name of a module"),
        ({"modules_to_save": [""]}, "is not the name of a module"),
        ({"task_type": 3}, "task_type=3 must be a text"),
        ({"revision": "../../x"}, "must be the name of a branch or tag"),
        ({"base_model_name_or_path": "a\nb"}, "must not hold control characters"),
        ({"auto_mapping": {"base_model_class": "UNet2DModel"}}, "must name a base_model_class and a parent_lib"),
        ({"auto_mapping": {"base_model_class": "a b", "parent_library": "torch"}}, "must be a dotted name of Py"),
        ({"auto_mapping": {"base_model_class": "X", "parent_library": "this"}}, "'this', which is not imported"),
    ],
    ids=range(38),
)
def test_fields(reduced, changes, message):
    for route in (CausalContextConfig.from_pretrained, PeftConfig.from_pretrained):
        with pytest.raises((TypeError, ValueError), match=message):
            route(edit(reduced, **changes))
    if (reduced / "adapter_config.json").stat().st_size < 2**20:
        refused(reduced, message)


@pytest.mark.parametrize(
    "pattern",
    [
        r".*\.attn[12]\.(to_q|to_k|to_v|to_out\.0)",
        r"down_blocks\.\d+\.attentions\.\d+\.transformer_blocks\.\d+\.attn1\.to_[qkv]",
        r"^(?!.*embed).*(conv1|conv2)$",
        r"(?:model\.)?layers\.(?:[0-9]|1[0-5])\.self_attn\.[qv]_proj",
        r"[*+(]x\(\*\+",
        ".*a{3}",
    ],
)
def test_common_patterns_are_allowed(pattern):
    assert CausalContextConfig(concepts=("a",), target_modules=pattern).target_modules == pattern


@pytest.mark.parametrize(
    "pattern",
    ["(a+)+", "(a|a)*b", "((a?){9}){9}", ".*.*.*.*.*b", "(a|aa)" * 40, "(?x)( # )\n a*)*", "(?#[)(a*)*]", "(" * 99],
)
def test_patterns_that_take_for_ever_are_refused(pattern):
    with pytest.raises(ValueError, match="could take for ever|not a valid regular expression"):
        CausalContextConfig(concepts=("a",), rank_pattern={pattern: 1})


def test_a_million_concepts_are_refused_at_once(tmp_path):
    concepts = [str(i) for i in range(1_000_000)]
    fields = CausalContextConfig(concepts=("a",)).to_dict() | {"concepts": concepts}
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
    for load in (
        lambda: CausalContextConfig(concepts=concepts),
        lambda: PeftConfig.from_pretrained(tmp_path),
        lambda: StoredAdapter.open(tmp_path),
    ):
        start = time.process_time()
        with pytest.raises(ValueError, match="More than 1,000 concepts|more than 1 MiB"):
            load()
        assert time.process_time() - start < 0.8


def test_too_many_edges():
    edges = [("a", "b")] * 100_001
    with pytest.raises(ValueError, match="has 100,001 edges; at most 100,000 are allowed"):
        CausalContextConfig(concepts=("a", "b"), mechanism="reduced", concept_graph=edges)


def test_nothing_is_imported_for_a_config(reduced, tmp_path, monkeypatch):
    (tmp_path / "planted_code.py").write_text("raise SystemExit('code ran')")
    monkeypatch.syspath_prepend(tmp_path)
    edit(reduced, auto_mapping={"base_model_class": "X", "parent_library": "planted_code"})
    for load in (
        lambda: AutoPeftModel.from_pretrained(reduced),
        lambda: AutoPeftModel.from_pretrained(reduced, import_allowlist=["planted_code"]),
        lambda: PeftConfig.from_pretrained(reduced),
        lambda: PeftModel.from_pretrained(Mlp(), reduced),
        lambda: StoredAdapter.open(reduced),
    ):
        with pytest.raises(ValueError, match="names the module 'planted_code', which is not imported for it"):
            load()
    refused(reduced, "names the module 'planted_code', which is not imported for it")


def test_a_base_that_an_adapter_from_the_hub_names(monkeypatch):
    config = CausalContextConfig(concepts=("a",))
    for name in ("/etc", "../base", "./base", "~/base", "a/b/c", "C:\\base"):
        config.base_model_name_or_path = name
        with pytest.raises(AdapterError, match="comes from the Hub, and the base that it names, .*, is no rep"):
            _ = StoredAdapter("user/adapter", Path("x"), config, None, None, None, None).base
        assert StoredAdapter("user/adapter", Path("x"), config, "given", None, None, None).base == ("given", None)
    config.base_model_name_or_path, config.revision = "user/base", "v1"
    assert StoredAdapter("user/adapter", Path("x"), config, None, None, None, None).base == ("user/base", "v1")
