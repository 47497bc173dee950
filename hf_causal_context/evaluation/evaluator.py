"""Does it compose? Samples beside real rows of the same contexts, from tensors or from an adapter and its data.

Shapes: N rows of any shape (vectors, or images (N, C, H, W) in [0, 1]), A attributes, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Unpack

from diffusers import DiffusionPipeline
from torch import Tensor, nn

from ..bases.diffusion_base import DiffusionBase
from ..bases.loading import as_base
from ..contexts import ConceptSet, Context, ContextLike, as_context
from ..data import InterventionalData
from ..data.checks import check_pairs
from ..errors import UserValueError
from ..inference.sampling import BATCH_SIZE, NUM_INFERENCE_STEPS, SamplingOptions, check_conditions, generate_jobs
from .asked import adapter_concepts, contexts_to_sample, ordered
from .edits import edit_results
from .evidence import EvaluationInputs, check_real_rows
from .features import require_torchmetrics
from .measurement import measure
from .readings import Reader
from .real_rows import read_real_rows
from .results import EvaluationReport
from .sampling import PixelChange, Sampled, Sampler, sample_all


def evaluate_samples(
    concepts: Sequence[str],
    real: Mapping[ContextLike, Tensor],
    samples: Mapping[ContextLike, Sequence[Tensor]],
    base_samples: Sequence[Tensor],
    *,
    strength_samples: Mapping[str, Mapping[float, Tensor]] | None = None,
    trained: Collection[ContextLike] | None = None,
    attributes: Callable[[Tensor], Tensor] | None = None,
    attribute_names: Sequence[str] = (),
    feature_extractor: nn.Module | None = None,
    seed: int = 0,
) -> EvaluationReport:
    """Compare samples with real rows.

    Args:
        concepts: all concepts, in order.
        real: real rows (N, ...) per context. The observational context and every single concept must be there.
        samples: per context, the samples (N, ...) of each seed group. The empty context and every single concept must
            be there; contexts without real rows are judged by the classifiers alone.
        base_samples: samples of the base, in groups of the same seeds as those of the empty context.
        strength_samples: concept -> strength -> samples (N, ...), each from the same seeds, the base's first N.
        trained: the contexts that were trained on; by default those of `real` with fewer than two targets.
        attributes: measures rows (N, ...) -> (N, A), NaN where a row has none.
        attribute_names: of the A attributes; those named like concepts are read in the strength curves too.
        feature_extractor: images (N, 3, H, W), uint8 -> (N, D), for FID and KID.
        seed: of the splits of the real rows and of the classifiers.

    Raises:
        ValueError: for rows of different shapes, missing contexts, groups that do not match, unknown concepts, too few
            real rows or values that are not finite.
        ImportError: for a feature extractor without torchmetrics.
    """
    names = ConceptSet(tuple(concepts))
    real_rows = {as_context(context): rows for context, rows in real.items()}
    groups = {as_context(context): list(parts) for context, parts in samples.items()}
    curves = strength_samples or {}
    _check_groups(names, groups, base_samples)
    _check_shapes(base_samples[0], [*real_rows.values(), *(part for parts in groups.values() for part in parts)])
    names.mask([*real_rows, *map(Context, curves)])  # refuses unknown names, and strengths that no data has
    read = _reader(attributes, attribute_names, feature_extractor)
    change = PixelChange()
    for part, of_base in zip(groups[Context()], base_samples, strict=True):
        change.add(part, of_base)
    evidence = EvaluationInputs(
        concepts=names,
        real={c: read(rows, f"Real rows of context {_shown(c)}") for c, rows in real_rows.items()},
        samples={c: [read(rows, f"Samples of context {_shown(c)}") for rows in groups[c]] for c in ordered(groups)},
        base=[read(rows, "Samples of the base") for rows in base_samples],
        strengths={
            name: {s: read(rows, f"Samples of context '{name}={s:g}'") for s, rows in sorted(curve.items())}
            for name, curve in curves.items()
        },
        trained=frozenset(map(as_context, trained) if trained is not None else _at_most_single(real_rows)),
        largest_change=change.largest,
        mean_change=change.mean,
        attribute_names=read.attribute_names,
    )
    return measure(evidence, seed)


def evaluate(
    base: DiffusionBase | DiffusionPipeline,
    data: InterventionalData,
    *,
    contexts: Sequence[ContextLike] | None = None,
    num_samples: int = 256,
    num_seeds: int = 3,
    attributes: Callable[[Tensor], Tensor] | None = None,
    attribute_names: Sequence[str] = (),
    feature_extractor: nn.Module | None = None,
    seed: int = 0,
    **sampling: Unpack[SamplingOptions],
) -> EvaluationReport:
    """Sample an adapter in the contexts of interventional data, and compare.

    The observational context and the single concepts are always sampled: leakage and strength curves need them.

    Args:
        base: a pipeline with the adapter attached to its denoiser.
        data: the data it was trained on, with combinations held out.
        contexts: the combinations; by default all with real rows, or some pairs if there are none to compare with.
        num_samples: images per context and seed group.
        num_seeds: seed groups; two or more give confidence intervals.
        attributes: see `evaluate_samples`, and so for the next three.
        attribute_names: of what they measure.
        feature_extractor: for FID and KID.
        seed: of the splits and the classifiers.
        sampling: see `generate`.

    Raises:
        ValueError: for a base without an adapter, other concepts than the data's, unknown contexts, too few real rows,
            samples that are not finite, or what `generate` refuses.
        ImportError: for a feature extractor without torchmetrics.
    """
    base = base if isinstance(base, DiffusionBase) else as_base(base)
    base.require_images("The evaluation")
    missing = (
        f"The {base.denoiser_name} of this pipeline has no causal context adapter. Attach one first: "
        "load_context_adapter(pipe, folder)."
    )
    concepts = adapter_concepts(base.denoiser, data, missing)
    wanted = None if contexts is None else list(map(as_context, contexts))
    concepts.strengths(wanted or [])  # refuses unknown names
    prompt, class_label, resolution = (sampling.get(name) for name in ("prompt", "class_label", "resolution"))
    check_conditions(base, prompt, class_label, sampling.get("guidance_scale"), resolution)
    steps = sampling.get("num_inference_steps", NUM_INFERENCE_STEPS)
    base.check_steps(steps)
    if num_samples < 2 or num_seeds < 1:
        raise UserValueError(f"num_samples={num_samples} must be at least 2 and num_seeds={num_seeds} at least 1.")
    if data.has_pairs:
        check_pairs(data)
    read = _reader(attributes, attribute_names, feature_extractor)
    real = read_real_rows(data, read, base.image_channels, resolution or base.default_resolution, seed)
    check_real_rows(concepts, {context: len(rows) for context, rows in real.items()})
    trained = frozenset(map(Context.parse, data.contexts))
    asked, notes = contexts_to_sample(concepts, wanted, real, trained)
    if data.has_captions:
        notes.append(f"Real images have captions, all samples the prompt {prompt or ''!r}: distances hold that too.")
    elif base.takes_captions and prompt is None:
        notes.append("No prompt was given: all samples are of the empty one, whatever the adapter was trained with.")
    if data.has_masks:
        notes.append(
            "The data has masks, and what they leave out is not learned: distances, classifiers and leakage compare "
            "whole images, so they hold that too."
        )
    if base.takes_classes:
        notes.append(f"All samples are of class {class_label}, real images of any: distances hold that too.")
    sampled = sample_all(
        Sampler(base, lambda jobs: generate_jobs(base, jobs, **sampling), read),
        concepts,
        asked,
        [range(group * num_samples, (group + 1) * num_samples) for group in range(num_seeds)],
    )
    notes += _made_black(base, sampled)
    evidence = EvaluationInputs(
        concepts=concepts,
        real=real,
        samples=sampled.samples,
        base=sampled.base,
        strengths=sampled.strengths,
        trained=trained,
        largest_change=sampled.change.largest,
        mean_change=sampled.change.mean,
        attribute_names=read.attribute_names,
    )
    edits = ()
    if data.has_pairs:
        edits = edit_results(
            base,
            data,
            asked,
            read,
            resolution=resolution or base.default_resolution,
            prompt=prompt,
            class_label=class_label,
            num_inference_steps=steps,
            batch_size=sampling.get("batch_size", BATCH_SIZE),
            seed=seed,
        )
        if not edits:
            notes.append("None of the contexts that were sampled has pairs, so no edits were compared.")
    report = measure(evidence, seed)
    settings = {
        "num_samples": num_samples,
        "num_seeds": num_seeds,
        "num_inference_steps": steps,
        "prompt": prompt,
        "class_label": class_label,
        "guidance_scale": sampling.get("guidance_scale"),
        "resolution": resolution or base.default_resolution,
        "seed": seed,
    }
    return replace(report, notes=(*report.notes, *notes), edits=edits, settings=settings)


def _made_black(base: DiffusionBase, sampled: Sampled) -> list[str]:
    """Say how many samples a safety checker has replaced, which all measures take for samples of the adapter."""
    if getattr(base.pipe, "safety_checker", None) is None:
        return []
    drawn = {"the base": sampled.base} | {_shown(context): groups for context, groups in sampled.samples.items()}
    black = {name: sum(int((~g.values.flatten(1).any(1)).sum()) for g in groups) for name, groups in drawn.items()}
    if not any(black.values()):
        return []
    listed = ", ".join(f"{count} of {name}" for name, count in black.items() if count)
    return [
        f"The base's safety checker made samples black, and they are measured as such: {listed}. To measure what the "
        "model makes, save the base without it: pipe.safety_checker = None, then pipe.save_pretrained(folder)."
    ]


def _reader(
    attributes: Callable[[Tensor], Tensor] | None, names: Sequence[str], feature_extractor: nn.Module | None
) -> Reader:
    if (attributes is None) != (not names):
        raise UserValueError(
            "attributes= and attribute_names= go together: a function, and the names of what it measures."
        )
    if feature_extractor is not None:
        require_torchmetrics()
    return Reader(attributes, tuple(names), feature_extractor)


def _at_most_single(contexts: Mapping[Context, object]) -> list[Context]:
    return [context for context in contexts if len(context.targets) < 2]


def _shown(context: Context) -> str:
    return repr(str(context) or "(observational)")


def _check_groups(
    concepts: ConceptSet, groups: Mapping[Context, Sequence[Tensor]], base_samples: Sequence[Tensor]
) -> None:
    concepts.strengths(list(groups))  # refuses unknown names
    if missing := [_shown(c) for c in (Context(), *map(Context, concepts)) if c not in groups]:
        raise UserValueError(
            f"samples= lacks {', '.join(missing)}. Leakage needs the empty context and every single concept; draw them."
        )
    sizes = [len(part) for part in base_samples]
    if not sizes or min(sizes) < 2 or len(set(sizes)) > 1:
        raise UserValueError(
            f"base_samples= holds groups of {sizes} samples. Give one or more groups of one size, above 1."
        )
    for context, parts in groups.items():
        if [len(part) for part in parts] != sizes:
            raise UserValueError(
                f"Context {_shown(context)} has groups of {[len(part) for part in parts]} samples, the base of "
                f"{sizes}: they must be equal. Draw the same seeds for all."
            )


def _check_shapes(example: Tensor, others: Sequence[Tensor]) -> None:
    for rows in others:
        if rows.shape[1:] != example.shape[1:]:
            raise UserValueError(
                f"Rows of shape {tuple(rows.shape[1:])} and of shape {tuple(example.shape[1:])} cannot be compared. "
                "Real rows, samples and the base's samples must have one shape."
            )
