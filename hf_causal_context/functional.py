"""The equations of the causal layers, as pure functions of features, intervention mask and weights.

Markham et al., "Intervening to Learn and Compose Causally Disentangled Representations" (CLeaR 2026), carried over to
adapters: the coordinates z come from a frozen model's features, and the map U_obs of the observational context is the
identity without loss of generality, because the representation layer before it absorbs any other. In generator space
(`ContextModule`) both maps have weights: `intervenable`.

Shapes: B rows, T tokens or pixels (any number of dimensions, none included), K concepts, W width per concept (in and
out where a map changes it), R = K W features, concept by concept. The intervention mask m (B, K) broadcasts over T and
W; B = 1 serves any batch. Where it meets features (B, T, R), `per_feature(m)` may be passed instead.

Between an adapter's Down and Up everything is linear in z: `reduced_matrices` and `structural_matrices` are the same
equations as matrices, c(m) = M(m) z, of L layers and C contexts in one batch: a few large products, where single layers
would launch many small ones. `mask_CR` is the mask per feature.

An adapter's observational part is N more features z_o in front of the concepts', (B, T, N + R), which no mechanism
mixes; they are multiplied by the part's strength o, the first column of strengths (B, 1 + K).
"""

from __future__ import annotations

import torch
from torch import Tensor


def per_feature(mask: Tensor, features_BTR: Tensor, observational_rank: int = 0) -> Tensor:
    """Repeat a mask (B, K) over the W features of each concept: (B, 1..., R), in the dtype of the features.

    With `observational_rank` N > 0 it is strengths (B, 1 + K) over features (B, T, N + R): the first one N times.
    What was repeated already is returned as it is, so that callers may keep it and pass it instead of the mask.
    """
    features = features_BTR.shape[-1], features_BTR.ndim, features_BTR.dtype
    if (mask.shape[-1], mask.ndim, mask.dtype) == features:
        return mask
    mask = mask.to(features_BTR.dtype)
    concepts = mask[:, 1:] if observational_rank else mask
    width = (features_BTR.shape[-1] - observational_rank) // concepts.shape[-1]
    mask_BR = concepts.repeat_interleave(width, dim=-1)
    if observational_rank:
        mask_BR = torch.cat([mask[:, :1].expand(-1, observational_rank), mask_BR], dim=-1)
    return mask_BR.view(mask_BR.shape[0], *(1,) * (features_BTR.ndim - 2), mask_BR.shape[-1])


def linear(features: Tensor, weight: Tensor) -> Tensor:
    """Return features W^T over the last dimension, as one product of matrices: (..., in), (out, in) -> (..., out).

    For strided features torch.matmul chooses between one product and a batch of them by `requires_grad`, which rounds
    differently: a loaded adapter would not reproduce the trained one bit for bit.
    """
    if features.is_contiguous():  # always one product, and generation of single tokens notices two calls more
        return torch.nn.functional.linear(features, weight)
    rows = torch.nn.functional.linear(features.reshape(-1, features.shape[-1]), weight)
    return rows.view(*features.shape[:-1], weight.shape[0])


def views_of_rows(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return the features (..., in) twice, for two products, so that compiled code adds their gradients in a product.

    Compilers fuse an addition into a product of matrices where nothing lies in between, such as a view of the result.
    """
    rows = features.reshape(-1, features.shape[-1])
    return rows.view(features.shape), rows.view(features.shape)


def row_linear(features_BTR: Tensor, weights_BRR: Tensor) -> Tensor:
    """Return features W_b, with a matrix for each row b or one for all: (B, T, R), (B or 1, R, R) -> (B, T, R)."""
    if len(weights_BRR) == 1:
        return linear(features_BTR, weights_BRR.squeeze(0).T)
    rows = features_BTR.reshape(len(features_BTR), -1, features_BTR.shape[-1])
    return torch.bmm(rows, weights_BRR).view(features_BTR.shape)


def block_linear(features_BTR: Tensor, blocks_KWW: Tensor) -> Tensor:
    """Apply one W x W map per concept, (B, T, R) -> (B, T, R); concepts never mix."""
    # K small products cost more to launch than one R x R product, whose zeros are few at the sizes of an adapter.
    blocks_KWKW = torch.diag_embed(blocks_KWW.permute(1, 2, 0)).permute(2, 0, 3, 1)
    num_features = features_BTR.shape[-1]
    return linear(features_BTR, blocks_KWKW.reshape(num_features, num_features))


def expressive(features_BTR: Tensor, blocks_DKWW: Tensor) -> Tensor:
    """Per-concept residual layers x <- x + gelu(V_d x), for the D maps V_d of shape (K, W, W)."""
    for blocks_KWW in blocks_DKWW:
        features_BTR = features_BTR + torch.nn.functional.gelu(block_linear(features_BTR, blocks_KWW))
    return features_BTR


def independent(z_BTR: Tensor, mask: Tensor) -> Tensor:
    """c_k = m_k z_k: every concept on its own; zero in the empty context, additive in the targets."""
    return per_feature(mask, z_BTR) * z_BTR


def block_map(x_BKI: Tensor, blocks_KOI: Tensor) -> Tensor:
    """Apply one map per concept, (B, K, in) -> (B, K, out), all in one batched product; concepts never mix."""
    return torch.einsum("bki,koi->bko", x_BKI, blocks_KOI)


def diagonal_blocks(weight_RR: Tensor, num_concepts: int) -> Tensor:
    """Return the blocks of a (K out, K in) matrix that map a concept to itself: (K, out, in)."""
    weight_KOKI = weight_RR.unflatten(1, (num_concepts, -1)).unflatten(0, (num_concepts, -1))
    return weight_KOKI.diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def intervenable(z_BKI: Tensor, mask: Tensor, observational_KOI: Tensor, interventional_KOI: Tensor) -> Tensor:
    """e_k = U_obs_k z_k + m_k (U_ivn_k - U_obs_k) z_k: (B, K, in) and a mask (B or 1, K) -> (B, K, out).

    Both maps are applied in one batched product, so that every row of a batch may have another context.
    """
    both = torch.cat((observational_KOI, interventional_KOI), dim=1)
    observed, intervened_on = block_map(z_BKI, both).chunk(2, dim=-1)
    return torch.lerp(observed, intervened_on, mask[..., None].to(observed.dtype))


def group_norm(weight_RR: Tensor, num_concepts: int) -> Tensor:
    """Sum over all pairs of concepts of the Frobenius norm of the block from one to the other: (R, R) -> scalar."""
    squares_KK = weight_RR.square().unflatten(1, (num_concepts, -1)).unflatten(0, (num_concepts, -1)).sum(dim=(1, 3))
    # The root has no derivative at a block of zeros, which is where this penalty wants to be.
    return (squares_KK + 1e-12).sqrt().sum() - 1e-6 * num_concepts**2


def intervened(z_BTR: Tensor, mask: Tensor, shift_KWW: Tensor) -> Tensor:
    """e_k = z_k + m_k (U_ivn_k - U_obs_k) z_k with U_obs = 1 and `shift` = U_ivn - U_obs: linear in the strength."""
    return torch.addcmul(z_BTR, per_feature(mask, z_BTR), block_linear(z_BTR, shift_KWW))


def reduced(
    e_BTR: Tensor, mask: Tensor, observational_RR: Tensor, interventional_RR: Tensor, *, perfect_interventions: bool
) -> Tensor:
    """Total effects of the paper's causal layer.

    c_i = e_i + (1 - q_i) sum_j (1 - q_j) Bobs_ij e_j + g_i sum_j q_j Bivn_ij e_j with the cut q = clamp(m, 0, 1).
    g_i = 1 - q_i for perfect interventions (an intervened concept listens to nobody), else g_i = 1 as published.

    Both matrices must have zero diagonal blocks.
    """
    cut = per_feature(mask, e_BTR).clamp(0, 1)
    open_ = 1 - cut
    from_observed = linear(e_BTR * open_, observational_RR)
    from_intervened = linear(e_BTR * cut, interventional_RR)
    if perfect_interventions:
        return torch.addcmul(e_BTR, open_, from_observed + from_intervened)
    return torch.addcmul(e_BTR, open_, from_observed) + from_intervened


def structural(
    e_BTR: Tensor, mask: Tensor, coefficients_RR: Tensor, *, steps: int, perfect_interventions: bool
) -> Tensor:
    """Solve c = e + (1 - q) (A c) by substitution: direct effects A, the rows of intervened concepts cut.

    Imperfect (soft) interventions cut nothing: they only shift e. `steps` substitutions are exact when no directed path
    of A is longer; K - 1 are enough for any acyclic A.
    """
    features = e_BTR.shape[-1]
    open_ = 1 - per_feature(mask, e_BTR).clamp(0, 1)
    # One matrix for every row, or for all of them if they are cut alike.
    matrices = len(open_) if perfect_interventions else 1
    if fewest_doublings(steps, e_BTR[..., 0].numel() // matrices, features):
        effects_BRR, once_BTR = coefficients_RR[None], linear(e_BTR, coefficients_RR)
        if perfect_interventions:
            effects_BRR, once_BTR = open_.view(-1, features, 1) * effects_BRR, open_ * once_BTR
        columns, once = (x.reshape(matrices, -1, features).mT for x in (e_BTR, once_BTR))
        return _sum_of_powers(columns, once, effects_BRR, steps).mT.reshape(e_BTR.shape)
    c_BTR = e_BTR
    for _ in range(steps):
        effects = linear(c_BTR, coefficients_RR)
        c_BTR = torch.addcmul(e_BTR, open_, effects) if perfect_interventions else e_BTR + effects
    return c_BTR


def reduced_matrices(
    mask_CR: Tensor, shift_LKWW: Tensor, observational_LRR: Tensor, interventional_LRR: Tensor, perfect: bool
) -> Tensor:
    """Return M(m) of `reduced` after `intervened`, (L, C, R, R)."""
    cut = mask_CR.clamp(0, 1)
    open_ = 1 - cut
    listens = open_ if perfect else torch.ones_like(open_)
    identity_RR, shift_LRR = _block_diagonal(shift_LKWW)
    matrices = _of_shifted(identity_RR, shift_LRR, mask_CR)
    for weight_LRR, effects, causes in ((observational_LRR, open_, open_), (interventional_LRR, listens, cut)):
        of_shifted = _of_shifted(weight_LRR, weight_LRR @ shift_LRR, mask_CR)
        matrices = torch.addcmul(matrices, of_shifted, effects[:, :, None] * causes[:, None])
    return matrices


def structural_matrices(
    mask_CR: Tensor, shift_LKWW: Tensor, coefficients_LRR: Tensor, steps: int, perfect: bool
) -> Tensor:
    """Return M(m) of `structural` after `intervened`, (L, C, R, R)."""
    identity_RR, shift_LRR = _block_diagonal(shift_LKWW)
    shifted = _of_shifted(identity_RR, shift_LRR, mask_CR)
    if not steps:
        return shifted
    effects = coefficients_LRR[:, None].expand_as(shifted)
    once = _of_shifted(coefficients_LRR, coefficients_LRR @ shift_LRR, mask_CR)
    if perfect:
        open_CR1 = 1 - mask_CR.clamp(0, 1)[:, :, None]
        effects, once = open_CR1 * effects, open_CR1 * once
    total = _sum_of_powers(shifted.flatten(0, 1), once.flatten(0, 1), effects.flatten(0, 1), steps)
    return total.view_as(shifted)


def _of_shifted(weight_LRR: Tensor, of_shift_LRR: Tensor, mask_CR: Tensor) -> Tensor:
    """Return B (1 + diag(m) S), (L, C, R, R), from B and B S: no product for every context.

    This needs m to be the same within a block of S, as masks of concepts are.
    """
    return torch.addcmul(weight_LRR.unsqueeze(-3), mask_CR[:, None], of_shift_LRR[:, None])


def _block_diagonal(blocks_LKWW: Tensor) -> tuple[Tensor, Tensor]:
    """Return the identity (R, R), and the blocks on the diagonal of matrices (L, R, R)."""
    L, K, W, _ = blocks_LKWW.shape
    identity = torch.eye(K * W, dtype=blocks_LKWW.dtype, device=blocks_LKWW.device)
    own = identity[::W, ::W][:, None, :, None]
    return identity, (blocks_LKWW[:, :, :, None] * own).view(L, K * W, K * W)


def _sum_of_powers(e_BRT: Tensor, once_BRT: Tensor, effects_BRR: Tensor, steps: int) -> Tensor:
    """Return (1 + A + ... + A^steps) e, given `once` = A e: what so many substitutions of c = e + A c give.

    Doubling n powers takes a product with e and one of A^n with itself; n substitutions at once take one with e.
    """
    terms = steps + 1
    doublings = fewest_doublings(steps, e_BRT.shape[-1], e_BRT.shape[-2])

    def substituted(c_BRT: Tensor, power_BRR: Tensor, added_BRT: Tensor) -> Tensor:
        if c_BRT is e_BRT and power_BRR is effects_BRR:
            return added_BRT + once_BRT
        return torch.baddbmm(added_BRT, power_BRR, c_BRT)

    power, total, rest = effects_BRR, e_BRT, None  # A^n, the sum of n powers, that of the lower bits of `terms`; n = 1
    for place in range(doublings):
        if terms >> place & 1:
            rest = total if rest is None else substituted(rest, power, total)
        total = substituted(total, power, total)
        power = power @ power
    for _ in range(terms >> doublings):
        rest = total if rest is None else substituted(rest, power, total)
    assert rest is not None
    return rest


def fewest_doublings(steps: int, tokens: int, features: int) -> int:
    """How often to double in `_sum_of_powers`, for the least arithmetic."""
    terms, fewest = steps + 1, 0

    def products(doublings: int) -> int:
        with_e = doublings + (terms >> doublings) + (terms & ((1 << doublings) - 1)).bit_count()
        return doublings * features + with_e * tokens

    for doublings in range(1, terms.bit_length()):  # compilers know no min(..., key=...)
        if products(doublings) < products(fewest):
            fewest = doublings
    return fewest


def normal_like(tensor: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal numbers in the shape of a tensor, drawn where the generator is: a CPU's serves every device."""
    place = tensor.device if generator is None else generator.device
    return torch.randn(tensor.shape, generator=generator, device=place, dtype=tensor.dtype).to(tensor.device)


def acyclicity_penalty(coefficients_RR: Tensor, num_concepts: int) -> Tensor:
    """trace(exp(S)) - K with S_ij = ||A_ij||_F^2: zero exactly when A has no directed cycle.

    Zheng et al., "DAGs with NO TEARS" (NeurIPS 2018). Shapes: coefficients (R, R) -> scalar. Differentiable.
    """
    width = coefficients_RR.shape[0] // num_concepts
    strength_KK = coefficients_RR.unflatten(1, (num_concepts, width)).unflatten(0, (num_concepts, width))
    strength_KK = strength_KK.square().sum(dim=(1, 3))
    return torch.linalg.matrix_exp(strength_KK).diagonal().sum() - num_concepts
