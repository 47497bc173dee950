"""Names of folders and in columns that may mean something else than a concept."""

import pytest
from datasets import Dataset

from hf_causal_context.data import from_dataset, load_folders, load_text_folders
from tests.data.small import write_folders
from tests.data.small_texts import write_text_folders


def folders(root, names):
    return load_folders(write_folders(root / "images", dict.fromkeys(names, 1)))


def texts(root, names):
    return load_text_folders(write_text_folders(root / "texts", "text", dict.fromkeys(names, 1)))


def column(root, names):
    return from_dataset(Dataset.from_dict({"image": list(range(len(names))), "context": names}))


@pytest.mark.parametrize("load", [folders, texts, column])
@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["obs", "Hat", "hat"], "'Hat', 'hat' differ in capitals only. .* name all concepts: concepts=\\."),
        (["obs", "10_hat"], "'10_hat' looks like a folder of kohya's scripts.* rename it to 'hat'"),
        (["5_obs", "10_a hat"], "'10_a hat' looks like .* rename it to 'a hat'"),
        (["Obs", "hat"], "'Obs' looks like the observational set, which is called 'obs' here. .* rename it, or give"),
        (["obs", "OBS", "hat"], "'OBS' looks like the observational set"),
        (["observations", "hat"], "'observations' looks like .*--observational_name observations"),
        (["observation", "hat"], "'observation' looks like .* if it is a concept, name all concepts: concepts="),
    ],
)
def test_a_name_that_may_mean_something_else_is_asked_about(load, names, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load(tmp_path, names)


def test_the_answers_are_taken(tmp_path):
    root = write_folders(tmp_path, {"Obs": 2, "hat": 1})
    assert load_folders(root, observational_name="Obs").counts == {"": 2, "hat": 1}
    named = load_folders(root, concepts=("Obs", "hat"))
    assert named.counts == {"Obs": 2, "hat": 1}
    rows = Dataset.from_dict({"image": [0, 1, 2, 3], "context": ["obs", "Hat", "hat", "10_hat"]})
    assert from_dataset(rows, concepts=("hat", "Hat", "10_hat")).concepts.names == ("hat", "Hat", "10_hat")


def test_obs_is_no_concept_whatever_the_observational_set_is_called(tmp_path):
    folders = write_folders(tmp_path, {"plain": 2, "obs": 1})
    with pytest.raises(ValueError, match="'obs' would be hidden by the empty context, which has this name. Rename it"):
        load_folders(folders, observational_name="plain", concepts=("obs",))


def test_the_long_name_of_the_observational_set_is_known_and_no_concept(tmp_path):
    data = load_folders(write_folders(tmp_path, {"observational": 2, "hat": 1}))
    assert (data.concepts.names, data.counts) == (("hat",), {"": 2, "hat": 1})


def test_beside_an_observational_set_an_observation_is_a_concept(tmp_path):
    """Traces of agents hold thoughts, actions and observations."""
    assert texts(tmp_path, ["obs", "observation", "thought"]).concepts.names == ("observation", "thought")
