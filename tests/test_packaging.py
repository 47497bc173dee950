"""The wheel that others install: built from a clean checkout, whole, and nothing else in it."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path, PurePosixPath

import pytest

from hf_causal_context import __version__ as VERSION
from hf_causal_context.messages import installation

ROOT = Path(__file__).parents[1]
PACKAGE = "hf_causal_context"
# What the first release replaces, by file.
RELEASED = {
    f"{PACKAGE}/messages/installation.py": ("ON_PACKAGE_INDEX = False", "ON_PACKAGE_INDEX = True"),
    ".github/CHANGELOG.md": (f"## {VERSION} (unreleased)", f"## {VERSION}"),
}
SHOW_HELP = "import hf_causal_context.cli as cli; print(cli.__file__); cli.main(['--help'])"


def pip(command, *arguments):
    offline = ("--no-deps", "--no-index", "--disable-pip-version-check", "--quiet")
    subprocess.run([sys.executable, "-m", "pip", command, *offline, *map(str, arguments)], check=True, timeout=120)


@pytest.fixture(scope="module")
def tracked():
    """The files that git tracks, relative to the root."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip(f"not a checkout of git: {listed.stderr.strip()}")
    return [name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def wheel(tracked, tmp_path_factory):
    """The wheel of a copy that holds nothing but those files."""
    checkout, wheels = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("wheels")
    for name in tracked:
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, checkout / name)
    pip("wheel", "--no-build-isolation", "--wheel-dir", wheels, checkout)
    (built,) = wheels.iterdir()
    return built


def test_the_wheel_holds_the_package_whole_and_nothing_else(wheel, tracked):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info" not in PurePosixPath(name).parts[0]}
    assert names == {name for name in tracked if PurePosixPath(name).parts[0] == PACKAGE}
    for needed in ("py.typed", "hub/card.md.jinja", "models/digit_base/model_index.json"):
        assert f"{PACKAGE}/{needed}" in names


def test_the_installed_wheel_shows_its_help(wheel, tmp_path):
    target = tmp_path / "installed"
    pip("install", "--target", target, wheel)
    assert "hf_causal_context.cli" in (target / "bin" / "hf-causal-context").read_text()
    finished = subprocess.run(
        [sys.executable, "-c", SHOW_HELP],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(target)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.startswith(str(target))
    assert "usage: hf-causal-context" in finished.stdout


@pytest.fixture
def release(tmp_path):
    """Run .ci/release in a copy of the repository where the steps of a release were taken, all but some."""

    def run(tag, *forgotten):
        for name in (PACKAGE, ".ci", ".github", "pyproject.toml", "README.md", "LICENSE"):
            (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, tmp_path / name)
        for name, (before, after) in RELEASED.items():
            text = (tmp_path / name).read_text(encoding="utf-8")
            assert before in text
            if name not in forgotten:
                (tmp_path / name).write_text(text.replace(before, after), encoding="utf-8")
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        command = [tmp_path / ".ci" / "release", tag]
        finished = subprocess.run(command, env=os.environ | {"PATH": path}, capture_output=True, text=True, timeout=120)
        return finished, sorted(file.name for file in tmp_path.glob("dist/*"))

    return run


def test_a_release_is_a_wheel_and_its_sources(release):
    finished, built = release(f"v{VERSION}")
    assert finished.returncode == 0, finished.stderr
    assert built == [f"{PACKAGE}-{VERSION}-py3-none-any.whl", f"{PACKAGE}-{VERSION}.tar.gz"]


@pytest.mark.parametrize(
    ("tag", "forgotten", "message"),
    [
        ("v9", (), f"received the tag 'v9', and the version is {VERSION}. Allowed: v{VERSION}."),
        (
            f"v{VERSION}",
            (f"{PACKAGE}/messages/installation.py",),
            "installation.py says that the package is not on the package index",
        ),
        (f"v{VERSION}", (".github/CHANGELOG.md",), f".github/CHANGELOG.md has no line '## {VERSION}'"),
    ],
)
def test_what_a_release_forgot_is_said(tag, forgotten, message, release):
    finished, built = release(tag, *forgotten)
    assert finished.returncode == 1
    assert message in finished.stderr
    assert built == []


@pytest.mark.parametrize(
    ("on_index", "arguments", "command"),
    [
        (True, {}, 'pip install "hf-causal-context"'),
        (True, {"extra": "demo"}, 'pip install "hf-causal-context[demo]"'),
        (True, {"upgrade": True}, 'pip install --upgrade "hf-causal-context"'),
        (False, {"extra": "demo"}, 'pip install ".[demo]"  # in a clone of hf_causal_context\'s repository: '),
        (False, {"upgrade": True}, 'pip install --upgrade "."  # in a new clone of hf_causal_context\'s repository: '),
    ],
)
def test_one_place_says_how_to_install(on_index, arguments, command, monkeypatch):
    monkeypatch.setattr(installation, "ON_PACKAGE_INDEX", on_index)
    rest = "" if on_index else "it is not on the package index yet"
    assert installation.installation(**arguments) == command + rest


def test_no_other_place_says_how_to_install(tracked):
    """No file but `installation.py` tells people to install the package from the package index."""
    inside = [name for name in tracked if PurePosixPath(name).suffix in (".py", ".md", ".jinja", ".yml", ".ipynb")]
    saying = {name for name in inside if re.search("pip install.{0,20}hf-causal-context", (ROOT / name).read_text())}
    assert saying == {"tests/test_packaging.py"}  # which expects it of `installation`
