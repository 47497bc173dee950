"""The wheel that others install: built from a clean checkout, whole, and nothing else in it."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "hf_causal_context"
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
