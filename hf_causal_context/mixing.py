"""The causal layers' equations as matrices M(m), c(m) = M(m) z, of many layers and contexts in one batch.

They are those of `functional`, which computes features row by row; a test holds the two together. Between an adapter's
Down and Up everything is linear in z, so a forward pass needs each layer's matrices once, and makes all of them in a
few large products where single layers would launch many small ones.

Shapes: L layers, C contexts, K concepts, W width, R = K W features. `mask_CR` is the intervention mask per feature.
"""

from __future__ import annotations

import torch
from torch import Tensor


def reduced_matrices(
    mask_CR: Tensor, shift_LKWW: Tensor, observational_LRR: Tensor, interventional_LRR: Tensor, perfect: bool
) -> Tensor:
    """Return M(m) of `functional.reduced` after `functional.intervened`, (L, C, R, R)."""
    cut = mask_CR.clamp(0, 1)
    open_ = 1 - cut
    observed = open_[:, :, None] * observational_LRR[:, None] * open_[:, None]
    intervened = interventional_LRR[:, None] * cut[:, None]
    effects = observed + (intervened * open_[:, :, None] if perfect else intervened)
    shifted = _shifted(mask_CR, shift_LKWW)
    return shifted + effects @ shifted


def structural_matrices(
    mask_CR: Tensor, shift_LKWW: Tensor, coefficients_LRR: Tensor, steps: int, perfect: bool
) -> Tensor:
    """Return M(m) of `functional.structural` after `functional.intervened`, (L, C, R, R)."""
    shifted = _shifted(mask_CR, shift_LKWW)
    effects = coefficients_LRR[:, None]
    if perfect:
        effects = (1 - mask_CR.clamp(0, 1))[:, :, None] * effects
    return _geometric_sum(effects, steps) @ shifted


def _shifted(mask_CR: Tensor, shift_LKWW: Tensor) -> Tensor:
    """Return 1 + diag(m) S with the blocks S_k on the diagonal, (L, C, R, R)."""
    L, K = shift_LKWW.shape[:2]
    features = mask_CR.shape[-1]
    identity = torch.eye(features, dtype=shift_LKWW.dtype, device=shift_LKWW.device)
    own = torch.eye(K, dtype=shift_LKWW.dtype, device=shift_LKWW.device)[:, None, :, None]
    blocks = (shift_LKWW[:, :, :, None] * own).view(L, 1, features, features)
    return torch.addcmul(identity, mask_CR[:, :, None], blocks)


def _geometric_sum(matrix: Tensor, steps: int) -> Tensor:
    """Return 1 + A + ... + A^steps, as so many substitutions of c = e + A c make it, in log-many products."""
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    total, power = identity.expand_as(matrix), matrix  # of n powers, and A^n, with n = 1
    bits = bin(steps + 1)[3:]
    for place, bit in enumerate(bits):
        total = total + power @ total
        if bit == "1":
            total = identity + matrix @ total
        if place + 1 < len(bits):
            power = power @ power
            if bit == "1":
                power = matrix @ power
    return total
