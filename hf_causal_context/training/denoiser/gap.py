"""How far a diffusion base is from the observational set: its denoising loss there, and on samples of its own.

The bare base is measured: samples are drawn without guidance, in the space that it was trained in, with the captions or
classes of the rows. Both losses are at the same noise levels, with the same noise.

Shapes: B samples, C channels, H x W pixels or latents.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor, nn

from ...bases.diffusion_base import DiffusionBase
from ...bases.gap import BaseGap
from ...inference.sampling import eval_mode
from ...messages.progress import ProgressBar
from ..bare_model import BareModel
from ..few_rows import part_of
from ..gap_report import NotMeasuredError
from ..noise import Draws, LevelDraws
from .objectives import Batch, denoising_objective

NUM_ROWS = 48
NUM_INFERENCE_STEPS = 12
LEVELS = (0.125, 0.375, 0.625, 0.875)  # of the time steps, as shares of what training draws them from
_AT_ONCE = 8
# Whatever the base's own scheduler prefers, of which the noise and the kind of prediction are kept.
_SOLVER: dict[str, Any] = {
    "algorithm_type": "dpmsolver++",
    "solver_order": 2,
    "timestep_spacing": "trailing",
    "use_lu_lambdas": True,
    **dict.fromkeys(("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_flow_sigmas"), False),
    "final_sigmas_type": "zero",
    "thresholding": False,
    "variance_type": None,  # `predict` has left it out
}


def check_measurable(base: DiffusionBase) -> None:
    """Refuse a base that draws no samples alone, before rows are read for it.

    Raises:
        NotMeasuredError: for one of two denoisers.
    """
    if base.noise_range != (0.0, 1.0):
        raise NotMeasuredError("its denoisers of high and of low noise would have to draw samples together")


@torch.no_grad()
def denoiser_gap(base: DiffusionBase, rows: Batch, seed: int) -> BaseGap:
    """Compare the base's losses on observational rows and on as many samples; the random state stays as it was.

    It takes `NUM_INFERENCE_STEPS` + 2 x `len(LEVELS)` forward passes of every row. Bases in half precision need
    autocast.
    """
    objective, model = denoising_objective(base), cast(nn.Module, BareModel(base.denoiser))
    device = next(base.denoiser.parameters()).device
    losses = torch.zeros(2, len(LEVELS), dtype=torch.float64)
    with eval_mode(base.denoiser):
        for start in ProgressBar(range(0, len(rows.clean), _AT_ONCE), desc="compare with the base", unit="batch"):
            slots = range(start, min(start + _AT_ONCE, len(rows.clean)))
            # A sample begins with other noise than the one it is judged with, which its base would know.
            others = range(slots.start + len(rows.clean), slots.stop + len(rows.clean))
            part = part_of(rows, slots, Draws(seed, others), device)
            if part.captions:
                part = replace(part, conditions=base.encode_captions(part.captions))
            samples = own_samples(base, model, part)
            for number, level in enumerate(LEVELS):
                for own, clean in enumerate((part.clean, samples)):
                    draws = LevelDraws(seed, slots, [level] * len(slots))
                    batch = Batch(clean, part.context, part.conditions, draws)
                    losses[own, number] += objective(model, batch).double().sum().cpu()
    on_set, on_samples = (losses / len(rows.clean)).log().mean(1).exp().tolist()
    return BaseGap("images", on_set, on_samples, len(rows.clean))


def own_samples(base: DiffusionBase, model: nn.Module, batch: Batch) -> Tensor:
    """Return samples of a model under the conditions of a batch, as large as its rows; the batch's draws are used up.

    In few steps: by DPM-Solver++ (Lu et al., 2022), evenly in the logarithm of signal to noise, or for flows by the
    Adams-Bashforth method of second order. Coarser methods make too little variance, which would be judged as ease.
    """
    x = batch.draws.normal(*batch.clean.shape[1:]).to(batch.clean)
    if base.prediction == "flow":
        return _along_flow(base, model, batch, x)
    scheduler: Any = solver_of(base)
    scheduler.set_timesteps(NUM_INFERENCE_STEPS, device=x.device)
    for time in scheduler.timesteps:
        prediction = base.predict(model, x, time.expand(len(x)), batch.conditions, batch.context)
        x = scheduler.step(prediction.float(), time, x).prev_sample
    return x


def solver_of(base: DiffusionBase) -> DPMSolverMultistepScheduler:
    """Return a solver at the noise levels that the base is trained at."""
    # Betas are in the config of its scheduler, but not what some schedulers do to the levels that follow from them.
    levels = cast(Any, base.noise_scheduler()).alphas_cumprod.double()
    betas = 1 - levels / torch.cat([levels.new_ones(1), levels[:-1]])
    own = base.pipe.scheduler.config
    return cast(Any, DPMSolverMultistepScheduler.from_config(own, trained_betas=betas.tolist(), **_SOLVER))


def _along_flow(base: DiffusionBase, model: nn.Module, batch: Batch, x: Tensor) -> Tensor:
    sigmas = torch.linspace(1, 0, NUM_INFERENCE_STEPS + 1) ** 1.5  # finer where little noise is left
    steps = sigmas.diff().tolist()
    slope = torch.zeros_like(x)  # the velocity of the step before
    for number, sigma in enumerate(sigmas[:-1].tolist()):
        time = x.new_full((len(x),), sigma * base.num_train_timesteps)
        velocity = base.predict(model, x, time, batch.conditions, batch.context).float()
        bend = steps[number] / (2 * steps[number - 1]) if number else 0.0
        x, slope = x + steps[number] * (velocity + bend * (velocity - slope)), velocity
    return x
