"""Whether a checkpoint's files are whole, found without making tensors of them."""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any

from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from ..._files import ARGUMENTS, CONFIG, WEIGHTS, read_json
from ...errors import UserValueError

_REQUIRED = (ARGUMENTS, "optimizer.bin", "custom_checkpoint_0.pkl", "random_states_0.pkl")
_WEIGHTS = ((WEIGHTS, CONFIG), (SAFETENSORS_WEIGHTS_NAME, "config.json"))


RECORD = "checkpoint.json"


def write_record(folder: Path, num_processes: int, begun_steps: int) -> None:
    """Write checkpoint.json: what the arguments do not say, and checksums of the weights, whose format has none.

    Args:
        folder: of the checkpoint.
        num_processes: of the run.
        begun_steps: see `begun_steps`.
    """
    files = sorted(folder.rglob("*.safetensors"))  # those of text encoders are in sub-folders
    checksums = {path.relative_to(folder).as_posix(): _checksum(path) for path in files}
    record = {"num_processes": num_processes, "begun_steps": begun_steps, "sha256": checksums}
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n")


def read_record(folder: Path) -> dict[str, Any]:
    """Return what `write_record` wrote; empty for a checkpoint that is older."""
    return read_json(folder / RECORD)


def begun_steps(checkpoint: Path | None, num_steps: int) -> int:
    """Return how many steps a run was to have when it began, which may go on from a checkpoint to have `num_steps`.

    What begins at a share of the run is a share of that, for what has begun shall not end when a run is made longer.
    """
    if checkpoint is None:
        return num_steps
    stored = json.loads((checkpoint / ARGUMENTS).read_text())["max_train_steps"]  # of an older one all that is known
    return read_record(checkpoint).get("begun_steps") or stored or num_steps


def find_corruption(folder: Path) -> str | None:
    """Return what is wrong with the files of a checkpoint; None if they are whole."""
    there = {path.name for path in folder.iterdir()}
    required = {*_REQUIRED, *next((pair for pair in _WEIGHTS if there.intersection(pair)), _WEIGHTS[0])}
    if missing := sorted(required - there):
        return f"{', '.join(missing)} missing"
    for path in sorted(folder.iterdir()):
        try:
            _check(path)
        except (OSError, ValueError, SafetensorError, zipfile.BadZipFile) as error:
            return f"{path.name}: {error}"
    for name, checksum in read_record(folder).get("sha256", {}).items():
        if not (folder / name).exists():
            return f"{name} missing"
        if _checksum(folder / name) != checksum:
            return f"{name}: its checksum is wrong"
    if json.loads((folder / ARGUMENTS).read_text()).get("use_ema") and "custom_checkpoint_1.pkl" not in there:
        return "custom_checkpoint_1.pkl missing"  # the average
    return None


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check(path: Path) -> None:
    """Raise what reading a damaged file raises."""
    if path.suffix == ".json":
        json.loads(path.read_text())
    elif path.suffix == ".safetensors":
        with safe_open(path, framework="pt"):  # compares the header with the size
            pass
    elif path.suffix in (".bin", ".pkl", ".pt"):  # of torch.save: archives with checksums
        with zipfile.ZipFile(path) as archive:
            if spoilt := archive.testzip():
                raise UserValueError(f"the checksum of {spoilt} is wrong")
