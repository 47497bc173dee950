"""Edits beside the truth: observational images that have a partner in another context, edited to that context.

Shapes: N images (N, C, H, W) in [0, 1].
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor

from ..bases.diffusion_base import DiffusionBase
from ..bases.images import read_image
from ..contexts import Context
from ..data import InterventionalData
from ..data.pairs import partners
from ..inference.counterfactuals import counterfactuals
from .metrics import Estimate
from .readings import Reader
from .results import EditResult

MAX_PAIRS = 64  # per context; an edit takes two passes of the denoiser in each step


def edit_results(
    base: DiffusionBase,
    data: InterventionalData,
    contexts: Collection[Context],
    read: Reader,
    *,
    resolution: int,
    prompt: str | None,
    class_label: int | None,
    num_inference_steps: int,
    batch_size: int,
    seed: int,
) -> tuple[EditResult, ...]:
    """Edit the partners of rows in each context, trained or held out, and compare them with these rows.

    At most `MAX_PAIRS` of each context; contexts without pairs are left out.
    """
    found = []
    for context, plain, true in _paired_rows(data, contexts, seed):
        of_edits, of_none = [], []
        for start in range(0, len(plain), batch_size):
            parts = (part[start : start + batch_size][data.content_column] for part in (plain, true))
            images, truth = (
                torch.tensor(np.stack([read_image(image, base.image_channels, resolution) for image in part])) / 255
                for part in parts
            )
            (edit,) = counterfactuals(
                base,
                images,
                [context],
                Context(),
                strengths=[1.0],
                mask=None,
                prompt=prompt,
                class_label=class_label,
                num_inference_steps=num_inference_steps,
                calibrated=False,
            )
            of_edits.append(_errors(edit.images[0], truth, read))
            of_none.append(_errors(images, truth, read))
        edited, unedited = torch.cat(of_edits, 1), torch.cat(of_none, 1)
        features = len(edited) > 1
        found.append(
            EditResult(
                context=str(context),
                trained=str(context) in data.contexts,
                num_pairs=len(plain),
                error=Estimate.of(edited[0].tolist()),
                unedited=Estimate.of(unedited[0].tolist()),
                gain=Estimate.of((unedited - edited)[0].tolist()),
                feature_error=Estimate.of(edited[1].tolist()) if features else None,
                unedited_feature_error=Estimate.of(unedited[1].tolist()) if features else None,
            )
        )
    return tuple(found)


def _paired_rows(
    data: InterventionalData, contexts: Collection[Context], seed: int
) -> Iterator[tuple[Context, Dataset, Dataset]]:
    """Each context with observational rows, and their partners in it."""
    assert isinstance(data.rows, Dataset)  # streams have no pairs
    observational = data.rows.select(np.flatnonzero(np.array(data.rows["context"][:], dtype=object) == ""))
    for name in (*data.contexts, *data.held_out):
        context, rows = Context.parse(name), data.held_out.get(name, data.rows)
        if not context or context not in contexts:
            continue
        assert isinstance(rows, Dataset)
        own = rows.select(np.flatnonzero(np.array(rows["context"][:], dtype=object) == name))
        known = [*observational["pair"][:], *own["pair"][:]]
        found = partners([""] * len(observational) + [name] * len(own), known)[len(observational) :]
        numbers = np.random.default_rng(seed).permutation(np.flatnonzero(found >= 0))[:MAX_PAIRS]
        if len(numbers):
            yield context, observational.select(found[numbers]), own.select(numbers)


def _errors(made: Tensor, truth: Tensor, read: Reader) -> Tensor:
    """Root mean square differences of images (1, N), and where there are features their cosine distances, (2, N)."""
    errors = [(made - truth).square().flatten(1).mean(1).sqrt()]
    ours, theirs = (read(images, "Edits").features for images in (made, truth))
    if ours is not None and theirs is not None:
        errors.append(1 - F.cosine_similarity(ours, theirs))
    return torch.stack(errors)
