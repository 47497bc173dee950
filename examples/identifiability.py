"""The identifiability claim, tested: with an intervention on every concept, the learned concepts are the true ones.

    python -m examples.identifiability

A simulated world x = f(e), c_j = C_j e + noise, whose concepts c follow a linear Gaussian causal model. The base model
f is given and frozen, C is unknown: a `ContextModule` learns to generate the embeddings e of every context. The tables
show R^2 of the linear regression of a true concept (column) on one learned concept (row), on fresh data.

Interventions on every concept were not enough. What was needed besides:
- interventions that nearly fix their concept, so that they stand out, and a start that expects it;
- effects that do not depend on whether their cause was intervened on (`tied`): two free matrices of effects, as the
  causal layer has, leave directions in which concepts mix and the covariances of all contexts stay the same;
- a penalty on effects, and several starts, of which the best lower bound on the training data is kept: most starts end
  in local optima whose concepts are mixed. The variants without interventions get the same. Some worlds need more
  starts than five.
"""

import argparse

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from hf_causal_context.context_module import ContextModule
from hf_causal_context.data.worlds.linear_gaussian import LinearGaussianModel
from hf_causal_context.functional import group_norm

NAMES = ("cause", "left", "right")
K, EMBEDDING = 3, 5
MASKS = torch.cat([torch.zeros(1, K), torch.eye(K)])  # the contexts: observational, then one concept each
DEVIATION = 0.1  # of the likelihood, at the end of training


class World:
    """cause -> left, cause -> right; embeddings e with c = C e + noise; the frozen base model x = f(e)."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = np.random.default_rng(seed)
        effects = {("cause", name): rng.choice([-1, 1]) * rng.uniform(0.8, 1.2) for name in NAMES[1:]}
        interventions = {name: (rng.choice([-1, 1]) * 0.5, rng.uniform(0.15, 0.35)) for name in NAMES}
        self.concepts = LinearGaussianModel(NAMES, effects, rng.uniform(0.7, 1.3, K).tolist(), interventions)
        left, right, *self.mixing = (np.linalg.qr(rng.normal(size=(EMBEDDING, EMBEDDING)))[0] for _ in range(5))
        rows = left * rng.uniform(0.7, 1.3, EMBEDDING) @ right  # C, and what else an embedding says
        self.inverse = np.linalg.inv(rows)

    def sample(self, num: int) -> tuple[Tensor, Tensor]:
        """`num` rows of every context: x (contexts, num, EMBEDDING) and the true concepts (contexts, num, K)."""
        c = np.stack([self.concepts.sample(num, context, self.rng) for context in ((), *((name,) for name in NAMES))])
        noisy = c + 0.05 * self.rng.standard_normal(c.shape)
        rest = 0.1 * self.rng.standard_normal((*c.shape[:2], EMBEDDING - K))
        x = np.concatenate([noisy, rest], axis=-1) @ self.inverse.T
        for Q in self.mixing:
            x = x @ Q
            x = np.where(x > 0, x, 0.3 * x)
        return torch.as_tensor(x, dtype=torch.float32), torch.as_tensor(c, dtype=torch.float32)

    def embed(self, x: Tensor) -> Tensor:
        """e = f^-1(x)."""
        for Q in reversed(self.mixing):
            x = torch.where(x > 0, x, x / 0.3) @ torch.as_tensor(Q.T, dtype=x.dtype)
        return x


def build(tied: bool) -> ContextModule:
    """A module that starts as a linear map without effects, where interventions make their concept quiet."""
    # Two noise coordinates and two features per concept, as gelu(x) - gelu(-x) = x.
    module = ContextModule(EMBEDDING, EMBEDDING, K, noise_width=2, concept_width=2)
    module.requires_grad_(False)
    for parameter in (*module.first.parameters(), *module.causal.parameters(), module.output.bias):
        parameter.zero_()
    for layer in (module.mean_shift, module.log_variance_shift):
        layer.weight.zero_()
    module.first.observational.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
    module.first.interventional.copy_(module.first.observational * 0.2)
    for parameter in module.expressive.get_submodule("0.linear").parameters():
        parameter.zero_()
    module.expressive.get_parameter("0.linear.weight").copy_(torch.tensor([[1.0, -1.0], [-1.0, 1.0]]))
    column = torch.randn(EMBEDDING, K, 1) / K**0.5
    module.output.weight.copy_(torch.cat([column, -column], -1).flatten(1))
    if tied:
        module.causal.interventional = module.causal.observational
    return module.requires_grad_(True)


def lower_bound(module: ContextModule, e: Tensor, mask: Tensor, deviation: float) -> Tensor:
    """The evidence lower bound of embeddings (B, EMBEDDING), up to a constant of the deviation: (B,)."""
    posterior = module.encode(e, mask)
    error = (module(posterior.sample(), mask) - e).square().sum(1)
    return -error / (2 * deviation**2) - posterior.kl()


def train(e: Tensor, masks: Tensor, steps: int, tied: bool) -> ContextModule:
    """Fit embeddings (contexts, num, EMBEDDING), each context under its mask."""
    module = build(tied).eval()  # batch statistics would be too noisy
    optimizer = torch.optim.Adam(module.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps, pct_start=0.05)
    mask = masks.repeat_interleave(400 // len(e), 0)
    for step in range(steps):
        rows = torch.randint(e.shape[1], (len(e), 400 // len(e)))
        batch = e[torch.arange(len(e))[:, None], rows].flatten(0, 1)
        # From coarse to fine: the deviation falls from 1, and the penalty ends.
        deviation = DEVIATION ** min(1, step / steps / 0.6)
        penalty = 0.3 * max(0, 1 - step / steps / 0.7) ** 2
        effects = sum(group_norm(matrix, K) for matrix in module.causal.effects())
        loss = penalty * effects - lower_bound(module, batch, mask, deviation).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return module


@torch.no_grad()
def r_squared(module: ContextModule, e: Tensor, c: Tensor, mask: Tensor) -> Tensor:
    """R^2 of every true concept (column) from one coordinate of every learned one (row): (K, K).

    A learned concept has two features. Its coordinate is the first principal component of what it adds to the
    embedding, as two features could otherwise hold two concepts.
    """
    learned = module.concepts(module.encode(e, mask).mean, mask)
    added = torch.einsum("bkw,dkw->kbd", learned, module.output.weight.view(EMBEDDING, K, -1))
    added = added - added.mean(1, keepdim=True)
    coordinates = (added @ torch.linalg.svd(added, full_matrices=False).Vh[:, :1].mT)[..., 0]
    return torch.corrcoef(torch.cat([coordinates, c.T]))[:K, K:].square()


def experiment(seed: int, steps: int, restarts: int, variants: list[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """Variant -> R^2 on fresh data, in the observational context and over all contexts together."""
    torch.manual_seed(seed)
    world = World(seed)
    (x, _), (x_new, c_new) = world.sample(20_000), world.sample(4_000)
    e, e_new = world.embed(x), world.embed(x_new)
    e, e_new = e / e.std(), e_new / e.std()
    results = {}
    for variant in variants:
        masks = MASKS if "with interventions" in variant else torch.zeros_like(MASKS)
        num = 1 if variant == "observational data only" else len(MASKS)
        trained = [train(e[:num], masks[:num], steps, tied="not tied" not in variant) for _ in range(restarts)]
        with torch.no_grad():
            rows, mask = e[:num].flatten(0, 1), masks[:num].repeat_interleave(e.shape[1], 0)
            bounds = [lower_bound(module, rows, mask, DEVIATION).mean().item() for module in trained]
        best = trained[int(np.argmax(bounds))]
        mask = masks.repeat_interleave(e_new.shape[1], 0)
        pooled = r_squared(best, e_new.flatten(0, 1), c_new.flatten(0, 1), mask)
        results[variant] = (r_squared(best, e_new[0], c_new[0], masks[:1]), pooled)
    truth = c_new.flatten(0, 1)
    results["the true concepts themselves"] = (torch.corrcoef(c_new[0].T) ** 2, torch.corrcoef(truth.T) ** 2)
    return results


def best_assignment(table: Tensor) -> Tensor:
    """R^2 of the concepts when learned ones are assigned to true ones at their best."""
    rows, columns = linear_sum_assignment(-table.numpy())
    return table[torch.as_tensor(rows), torch.as_tensor(columns)]


VARIANTS = ["with interventions", "observational data only", "contexts ignored", "with interventions, not tied"]


def main() -> None:
    parser = argparse.ArgumentParser(description="Do learned concepts recover the true ones?")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--restarts", type=int, default=5)
    args = parser.parse_args()
    for variant, tables in experiment(args.seed, args.steps, args.restarts, VARIANTS).items():
        print(f"\n{variant:34}" + "".join(f"{name:>8}" for name in NAMES))
        for label, table in zip(("observational", "all contexts"), tables, strict=True):
            for name, row in zip(NAMES, table.tolist(), strict=True):
                print(f"  {label + ', learned ' + name:32}" + "".join(f"{value:8.3f}" for value in row))
            print(f"  smallest R^2: {table.diagonal().min():.3f}; best assignment: {best_assignment(table).min():.3f}")


if __name__ == "__main__":
    main()
