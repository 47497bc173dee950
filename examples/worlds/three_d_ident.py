"""3DIdent as the paper uses it: rendered objects under interventions on the background, the object and the spotlight.

Source: Markham et al., "Intervening to Learn and Compose Causally Disentangled Representations" (CLeaR 2026).
"""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

from hf_causal_context.data.folders import load_folders
from hf_causal_context.data.interventional import InterventionalData
from hf_causal_context.messages.wording import quoted

CONCEPTS = ("bg", "obj", "sl")
FOLDERS = ("obs", *CONCEPTS, *map("-".join, combinations(CONCEPTS, 2)))


def load_3dident(root: str | Path, *, streaming: bool = False) -> InterventionalData:
    """Read the published folders of images, one per context: obs, bg, obj, sl, bg-obj, bg-sl, obj-sl.

    Trained on are the observational set and the single interventions; the pairs are held out. Images are RGB of
    64 x 64 pixels, and are opened when they are used; other folders beside these are an error, see `load_folders`.

    Raises:
        FileNotFoundError: for a missing root, or a missing folder.
        ValueError: what `load_folders` raises.
    """
    root = Path(root)
    if missing := [name for name in FOLDERS if not (root / name).is_dir()]:
        raise FileNotFoundError(
            f"{str(root)!r} lacks the folders {quoted(missing)}. It must hold one folder of images for each of "
            f"{quoted(FOLDERS)}. Give the folder that holds them, or complete the download."
        )
    pairs = list(combinations(CONCEPTS, 2))
    return load_folders(root, concepts=CONCEPTS, joint_separator="-", held_out_contexts=pairs, streaming=streaming)
