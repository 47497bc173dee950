import pytest
from datasets import ClassLabel, Dataset, Features

from hf_causal_context.data import SELECTION_WARNING, contexts_from_attributes, from_attributes
from hf_causal_context.data.arguments import TextDataArguments
from hf_causal_context.data.from_arguments import load_text_data

pytestmark = pytest.mark.filterwarnings("ignore:Contexts are made by selecting")


def faces():
    return Dataset.from_dict(
        {
            "image": [0, 1, 2, 3],
            "Smiling": [-1, 1, -1, 1],
            "Glasses": [0, 0, 1, 1],
            "age": [10, 20.5, 30, None],
            "hair": ["red", "gray", "red", "gray"],
            "weight": [60.0, 70.0, float("nan"), 80.0],
        }
    )


def contexts(**rules):
    return contexts_from_attributes(faces(), rules)["context"][:]


@pytest.mark.parametrize("streaming", [False, True])
def test_rules_add_a_context_column_and_warn(streaming):
    rows = faces().to_iterable_dataset() if streaming else faces()
    with pytest.warns(UserWarning, match="selecting is not intervening"):
        result = contexts_from_attributes(rows, {"smiling": "Smiling == 1", "glasses": "Glasses > 0"})
    assert [row["context"] for row in result] == ["", "smiling", "glasses", "glasses+smiling"]
    assert result.column_names == [*faces().column_names, "context"]


@pytest.mark.parametrize(
    ("rule", "rows"),
    [
        ("Smiling == 1 and Glasses == 0", [1]),
        ("Smiling == 1 or Glasses == 1", [1, 2, 3]),
        ("not (Smiling == 1 or Glasses == 1)", [0]),
        ("Smiling != -1", [1, 3]),
        ("hair == 'red' and 5 < age <= 20", [0]),
        ("  hair != 'red'  ", [1, 3]),
        ("Smiling >= Glasses and Glasses < 1", [1]),
    ],
)
def test_grammar(rule, rows):
    assert [number for number, context in enumerate(contexts(x=rule)) if context] == rows


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("Smiling =", "rule of 'x' cannot be read: 'Smiling =': it is not a condition. Allowed are comparisons"),
        ("", "it is not a condition"),
        ("Smiling", "'Smiling' is not a comparison"),
        ("5_o_Clock == 1", "Rename columns that are not plain names"),
        ("__import__('os') == 1", r"__import__\('os'\).* is neither a column nor a number nor quoted text"),
        ("Smiling.real == 1", "'Smiling.real' is neither a column"),
        ("Smiling + 1 == 2", "'Smiling . 1' is neither a column"),
        ("Smiling in (1, 2)", "is not a comparison"),
        ("[s for s in Smiling]", "is not a comparison"),
        ("Smile == 1", "no column 'Smile' .rule of 'x'.. Its columns: 'image', 'Smiling'"),
        ("hair < 3", r"Row 0: The rule of 'x' cannot be applied to {'hair': 'red'}"),
        ("age > 5", r"Row 3: The rule of 'x' needs the column 'age', which is empty here.*remove such rows"),
        ("age == 10", "Row 3: The rule of 'x' needs the column 'age'"),
        ("age != 10", "Row 3: The rule of 'x' needs the column 'age'"),
        ("Smiling == 1 or weight > 5", "Row 2: The rule of 'x' needs the column 'weight'"),
        ("Smiling == 7", "No row fulfils the rule of 'x': .* values of the columns 'Smiling'"),
        ("Smiling == '1'", "Row 0: The rule of 'x' cannot be applied .*: -1 and '1' are of two types; quotes are for"),
        ("Smiling != '1'", "-1 and '1' are of two types"),
        ("hair != 1 and Smiling == 1", "'red' and 1 are of two types"),
    ],
)
def test_bad_rules(rule, message):
    with pytest.raises(ValueError, match=message):
        contexts(x=rule)


def test_a_class_label_that_nobody_gave_is_empty():
    label = Features({"label": ClassLabel(names=["no", "yes"])})
    rows = Dataset.from_dict({"label": [0, 1, -1]}, features=label)
    with pytest.raises(ValueError, match="Row 2: The rule of 'x' needs the column 'label', which is empty here"):
        contexts_from_attributes(rows, {"x": "label != 0"})


def test_bad_names_and_columns():
    with pytest.raises(ValueError, match="No concepts given"):
        contexts()
    with pytest.raises(ValueError, match="has a column 'context' already. .* another name: context_column="):
        contexts_from_attributes(faces().rename_column("hair", "context"), {"x": "age > 1"})


def test_a_dataset_with_a_column_of_contexts_may_have_rules_whose_contexts_have_another_name():
    theirs = faces().rename_column("hair", "context")
    made = contexts_from_attributes(theirs, {"x": "Glasses == 1"}, "of_rules")
    assert made["of_rules"][:] == ["", "", "x", "x"]
    assert made["context"][:] == theirs["context"][:]
    data = from_attributes(theirs, {"x": "Glasses == 1"}, context_column="of_rules")
    assert data.counts == {"": 2, "x": 2}
    stream = from_attributes(theirs.to_iterable_dataset(), {"x": "Glasses == 1"}, context_column="of_rules")
    assert [row["context"] for row in stream.rows] == ["", "", "x", "x"]


def test_from_attributes():
    data = from_attributes(faces(), {"smiling": "Smiling == 1", "glasses": "Glasses == 1"}, caption_column="hair")
    assert data.concepts.names == ("smiling", "glasses")
    assert data.warnings == (SELECTION_WARNING,)
    assert data.counts == {"": 1, "glasses": 1, "smiling": 1}
    assert data.rows["caption"][:] == ["red", "gray", "red"]
    assert data.held_out["glasses+smiling"]["image"][:] == [3]


def test_rules_know_what_the_observational_set_is_called(tmp_path):
    faces().save_to_disk(tmp_path / "faces")
    given = {"dataset_name": str(tmp_path / "faces"), "text_column": "hair", "observational_name": "plain"}
    smiling = {"attribute_rules": ["smiling: Smiling == 1", "glasses: Glasses == 1"]}
    chosen = {"training_contexts": ["plain", "smiling"]}
    data = load_text_data(TextDataArguments(**given, **smiling, **chosen))
    assert data.counts == {"": 1, "smiling": 1}
    with pytest.raises(ValueError, match="The concept 'plain' has the name of the observational context"):
        load_text_data(TextDataArguments(**given, attribute_rules=["plain: Smiling == 1"]))
