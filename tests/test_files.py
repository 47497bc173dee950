"""Files and folders appear whole, or not at all."""

from pathlib import Path

import pytest

from hf_causal_context._files import complete_files, complete_or_absent, sibling


@pytest.fixture
def folder(tmp_path):
    """A folder with a file and a folder of a file."""
    (tmp_path / "inner").mkdir()
    for name in ("a.txt", "inner/b.txt"):
        (tmp_path / name).write_text("earlier")
    return tmp_path


def contents(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_all_that_is_written_appears_at_the_end_over_what_was_there(folder):
    with complete_files(folder) as place:
        for name in ("a.txt", "inner/c.txt", "d.txt"):
            (place / name).parent.mkdir(exist_ok=True)
            (place / name).write_text("new")
        assert (folder / "a.txt").read_text() == "earlier"
        assert not (folder / "d.txt").exists()
    assert contents(folder) == {"a.txt": "new", "inner/c.txt": "new", "d.txt": "new"}
    assert sorted(path.name for path in folder.iterdir()) == ["a.txt", "d.txt", "inner"]


def test_a_failure_changes_nothing(folder):
    before = contents(folder)

    def fail():
        with complete_files(folder) as place:
            (place / "a.txt").write_text("new")
            (place / "d.txt").write_text("half")
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        fail()
    assert contents(folder) == before
    assert sorted(path.name for path in folder.iterdir()) == ["a.txt", "inner"]


def test_a_folder_is_not_lost_to_a_file_of_its_name(folder):
    before = contents(folder)
    with pytest.raises(OSError, match="inner"), complete_or_absent(folder / "inner") as path:
        path.write_text("new")
    assert contents(folder) == before


def test_missing_folders_are_made(tmp_path):
    with complete_or_absent(tmp_path / "deep" / "er" / "a.txt") as path:
        path.write_text("new")
    assert contents(tmp_path) == {"deep/er/a.txt": "new"}


@pytest.mark.parametrize(("given", "found"), [("a", "a-hub"), ("x/a/", "x/a-hub"), (".", "a-hub"), ("b/..", "a-hub")])
def test_a_place_beside_a_folder_is_never_in_it(given, found, tmp_path, monkeypatch):
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a")
    expected = Path(found) if given[0] in "ax" else tmp_path / found
    assert sibling(Path(given), "-hub") == expected
