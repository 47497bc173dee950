"""Digits under edits that never happen by themselves, so that no two sets have an image in common.

    striped    the ink is cut into horizontal stripes
    framed     a gray frame is drawn around the image
    inverted   light and dark are exchanged

In whatever order they are made, the image is the same: the truth of every combination is known. But no image of another
set shows it, so that reweighting has nothing to draw, and methods are left to themselves.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hf_causal_context import ConceptSet
from hf_causal_context.contexts import ContextLike, as_context
from hf_causal_context.data.worlds.digits import RESOLUTION, Split, sample_digits

CONCEPTS = ("striped", "framed", "inverted")

_STRIPE = 2  # pixels of a stripe, and of the gap to the next
_FRAME = 2  # width of the frame, in pixels
_GRAY = 128  # its level, which is as light when it is inverted


def sample_edits(num: int, context: ContextLike = (), seed: int = 0, split: Split = "train") -> NDArray[np.uint8]:
    """Draw edited digits.

    Args:
        num: number of images.
        context: the edits; () is none.
        seed: of the digits: the same seed in another context gives the same ones, edited otherwise.
        split: the glyphs of "test" are other digits than those of "train".

    Returns:
        Images (num, 32, 32), uint8.

    Raises:
        ValueError: for an edit this world does not have, or one at another strength than 1.
    """
    made = ConceptSet(CONCEPTS).mask([as_context(context)])[0]
    if not set(made.tolist()) <= {0.0, 1.0}:
        raise ValueError(f"Edits are made or not, at strength 1; received {context!r}.")
    striped, framed, inverted = made.bool().tolist()
    images = sample_digits(num, (), seed, split)[0]
    if striped:
        images = images * (np.arange(RESOLUTION) // _STRIPE % 2 == 0).astype(np.uint8)[:, None]
    if inverted:
        images = 255 - images
    if framed:
        frame = np.pad(np.zeros((RESOLUTION - 2 * _FRAME,) * 2, dtype=bool), _FRAME, constant_values=True)
        images[:, frame] = _GRAY
    return images
