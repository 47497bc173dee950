"""Images of chosen contexts as files: what `hf-causal-context generate` does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..bases.images import picture_grid, to_image
from ..contexts import Context, file_name
from ..inference.adapted import StoredAdapter
from ..inference.sampling import generate


def generate_files(
    adapter: str,
    contexts: Sequence[str],
    output_dir: Path,
    *,
    seeds: Sequence[int],
    num_inference_steps: int,
    pretrained_model_name_or_path: str | None = None,
    prompt: str | None = None,
    class_label: int | None = None,
    guidance_scale: float | None = None,
    resolution: int | None = None,
    revision: str | None = None,
    variant: str | None = None,
    dtype: str = "float32",
    batch_size: int = 8,
    observational_name: str = "obs",
    grid: bool = False,
    adapter_revision: str | None = None,
    token: str | bool | None = None,
) -> list[Path]:
    """Write one PNG per context and seed (``thick+slant-seed3.png``), or one grid, and return the paths.

    Raises:
        ValueError: for another kind of adapter, an unknown base, unknown concepts, or what `generate` refuses.
        OSError: for an adapter or base that cannot be read, or pictures that cannot be written.
    """
    parsed = [Context() if name == observational_name else Context.parse(name) for name in contexts]
    stored = StoredAdapter.open(
        adapter, pretrained_model_name_or_path, revision=revision, adapter_revision=adapter_revision, token=token
    )
    base = stored.pipeline(parsed, variant=variant, dtype=dtype)
    rows = generate(
        base,
        parsed,
        seeds=seeds,
        prompt=prompt,
        class_label=class_label,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        resolution=resolution,
        batch_size=batch_size,
    )
    output_dir.mkdir(parents=True, exist_ok=True)
    labels = [str(context) or observational_name for context in parsed]
    if grid:
        path = output_dir / "grid.png"
        picture_grid(rows, labels).save(path)
        return [path]
    paths = []
    for label, row in zip(labels, rows, strict=True):
        for seed, picture in zip(seeds, row, strict=True):
            paths.append(output_dir / f"{file_name(label)}-seed{seed}.png")
            to_image(picture).save(paths[-1])
    return paths
