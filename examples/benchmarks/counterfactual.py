"""How true are counterfactual images? Digits, where the truth is known, beside the same edit by stacked LoRAs.

    python -m examples.benchmarks.counterfactual --adapter digits-context --output_dir counterfactuals

`--adapter` is the quickstart's output. Observational digits of glyphs that training never saw are edited to every
single intervention and every pair. The truth is the world's own: the same glyph and the same noise of every latent,
with which an intervened attribute spreads about its new mean, too. *Spread unknown* is the truth of somebody who knows
all but that, and puts the mean. LoRAs start from the same abducted noise.

Attributes are read from the images; errors are in standard deviations of the observational world. Intervals are 95 %
over images, of one adapter and one set of LoRAs.
"""

import argparse
import copy
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from hf_causal_context import Context, load_context_adapter
from hf_causal_context.bases.images import image_grid
from hf_causal_context.bases.loading import load_base
from hf_causal_context.data.worlds import digits
from hf_causal_context.inference.counterfactuals import Sampler
from hf_causal_context.quickstart import BASE, CONTEXTS, PAIRS, SINGLES

from .digit_peers import stacked_loras

METHODS = ("unedited", "stacked LoRAs", "this adapter", "spread unknown")
HELD = 0.02  # root mean square, 5 of 255 levels


def sample(context: Context, num: int, seed: int, known_spread: bool = True) -> Tensor:
    latents = copy.copy(digits.LATENTS)
    if not known_spread:
        latents.interventions = {name: (mean, 0.0) for name, (mean, _) in latents.interventions.items()}
    with mock.patch.object(digits, "LATENTS", latents):
        return torch.from_numpy(digits.sample_digits(num, context, seed=seed, split="test")[0])[:, None] / 255


def attributes(images: Tensor) -> np.ndarray:
    return digits.read_attributes((255 * images[:, 0]).round().byte().numpy())


def lora_deltas(file: Path, seed: int) -> dict[str, dict[str, Tensor]]:
    """What each concept's LoRA adds to every weight; trained once."""
    if not file.exists():
        layers = dict(stacked_loras(load_base(str(BASE)), seed).get_base_model().named_modules())
        adapted = {name: layer for name, layer in layers.items() if hasattr(layer, "get_delta_weight")}
        deltas = {c: {n: layer.get_delta_weight(c).detach() for n, layer in adapted.items()} for c in digits.CONCEPTS}
        torch.save(deltas, file)
    return torch.load(file)


def draw(base, noise: Tensor, context: Context, steps: int) -> Tensor:
    return base.decode_images(Sampler(base, steps, None, None).forward(noise, [context], [noise], None))


def draw_with_loras(base, noise: Tensor, deltas: list[dict[str, Tensor]], steps: int) -> Tensor:
    """LoRAs added to the base's weights; the adapter's empty context changes nothing."""
    weights = {name: value.clone() for name, value in base.denoiser.state_dict().items()}
    for delta in deltas:
        for name, value in delta.items():
            base.denoiser.get_submodule(name).base_layer.weight += value
    images = draw(base, noise, Context(), steps)
    base.denoiser.load_state_dict(weights)
    return images


def interval(values: np.ndarray) -> str:
    """Mean and half of its 95 % confidence interval; digits without ink have no attributes."""
    values = values[np.isfinite(values)]
    return f"{values.mean():.3f} ± {1.96 * values.std(ddof=1) / np.sqrt(len(values)):.3f}"


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--num_images", type=int, default=64)
    parser.add_argument("--num_inference_steps", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0, help="of the images and the LoRAs")
    arguments = parser.parse_args()
    steps, num, seed = arguments.num_inference_steps, arguments.num_images, 1000 + arguments.seed
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    with torch.enable_grad():
        deltas = lora_deltas(arguments.output_dir / "loras.pt", arguments.seed)
    base = load_base(str(BASE))
    load_context_adapter(base.pipe, arguments.adapter).set_progress_bar_config(disable=True)
    facts = sample(Context(), num, seed)
    units = np.nanstd(attributes(sample(Context(), 1000, seed + 1)), axis=0)
    noise = Sampler(base, steps, None, None).backward(2 * facts - 1, Context())[-1]
    lost = (draw(base, noise, Context(), steps) - facts).square().flatten(1).mean(1).sqrt().numpy()
    titles = ("RMSE", "Attributes that change", "Attributes that must not change")
    scores: dict[str, dict[Context, list[np.ndarray]]] = {title: {} for title in titles}
    rows = [facts[:8]]
    for context in (*SINGLES, *PAIRS):
        truth = sample(context, num, seed)
        theirs = draw_with_loras(base, noise, [deltas[name] for name in context.targets], steps)
        edits = (facts, theirs, draw(base, noise, context, steps), sample(context, num, seed, known_spread=False))
        # Thickness moves darkness, unless that is set.
        changing = [
            n in context.targets or (n == "darkness" and "thickness" in context.targets) for n in digits.CONCEPTS
        ]
        wrong = [np.abs(attributes(edit) - attributes(truth)) / units for edit in edits]
        rmse = [(edit - truth).square().flatten(1).mean(1).sqrt().numpy() for edit in edits]
        parts = (rmse, [w[:, changing].mean(1) for w in wrong], [w[:, ~np.array(changing)].mean(1) for w in wrong])
        for score, values in zip(scores.values(), parts, strict=True):
            score[context] = values
        rows += [truth[:8], edits[2][:8]]
    print(
        f"Inversion: error {interval(lost)}, below {HELD} in {(lost < HELD).mean():.0%}; noise std {noise.std():.3f}."
    )
    for title, score in scores.items():
        print(f"\n| {title} | {' | '.join(METHODS)} |\n|---|{'---|' * len(METHODS)}")
        means = {"**singles**": SINGLES, "**pairs**": PAIRS}
        groups = {str(context): [context] for context in score} | means
        for name, group in groups.items():
            values = np.mean([score[context] for context in group], axis=0)
            print(f"| {name} | {' | '.join(map(interval, values))} |")
    labels = ["factual", *(text for context in CONTEXTS[1:] for text in (f"{context}: truth", "  this adapter"))]
    image_grid(rows, labels).save(arguments.output_dir / "grid.png")


if __name__ == "__main__":
    main()
