"""Renders a stand-in for 3DIdent: a jug on a colored floor under a colored spotlight.

    pip install mitsuba
    python -m examples.paper.render_three_d_ident --output_dir 3dident

4,000 images of 64 x 64 pixels in each of the contexts obs, bg, obj, sl, bg-obj, bg-sl, obj-sl: half an hour on one CPU
core. Run the command again to go on after an interruption. The same seed makes the same images. They are not the
published ones, so distances are not comparable with the paper's; orders are.

The latents are those of 3DIdent: hue of the floor; hue, place and turns of the object; hue and place of the spotlight.
They follow a linear Gaussian causal model and are mapped to u in [0, 1], as in the quad world, and `latents.csv` holds
these u. An intervention on a concept sets all of its latents, whatever their causes.

Shapes: N images, V latents, P points of a mesh, F faces.
"""

import argparse
import csv
import io
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from hf_causal_context._files import complete_or_absent
from hf_causal_context.contexts import Context
from hf_causal_context.data.worlds.linear_gaussian import LinearGaussianModel
from hf_causal_context.errors import MissingPackageError, UserValueError

from ..worlds.three_d_ident import FOLDERS

# Latents of every concept.
LATENTS = {
    "bg": ("floor_hue",),
    "obj": ("object_hue", "object_x", "object_y", "object_turn", "object_tilt"),
    "sl": ("light_hue", "light_place"),
}
NAMES = tuple(name for names in LATENTS.values() for name in names)
SIDE = 64

_EFFECTS = {
    ("floor_hue", "object_hue"): 0.9,
    ("floor_hue", "object_x"): -0.6,
    ("object_hue", "light_hue"): 0.9,
    ("object_x", "light_place"): 0.7,
    ("object_turn", "light_place"): -0.5,
}
_MEANS = (1.3, -1.4, 1.2, -1.2, 1.3, -1.1, 1.4, -1.3)  # under an intervention
_SPREAD = 0.6
_SAMPLES_PER_PIXEL = 16
_RECORD = "latents.csv"
# Over the whole circle of hues its two ends would look the same.
_HUES = np.array([[1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 1, 1], [0, 0, 1], [1, 0, 1]], dtype=float)


def sample_latents(num: int, folder: str, seed: int = 0) -> NDArray[np.float64]:
    """Draw u (N, V) in [0, 1], in the order of `NAMES`, for one of the folders."""
    interventions = {name: (mean, _SPREAD) for name, mean in zip(NAMES, _MEANS, strict=True)}
    model = LinearGaussianModel(NAMES, _EFFECTS, [1.0] * len(NAMES), interventions)
    concepts = [] if folder == "obs" else folder.split("-")
    context = Context(*(name for concept in concepts for name in LATENTS[concept]))
    latents = model.sample(num, context, np.random.default_rng([seed, FOLDERS.index(folder)]))
    return torch.special.ndtr(torch.from_numpy(latents / model.deviations())).numpy()


def render(output_dir: Path, num: int, seed: int = 0, side: int = SIDE) -> None:
    """Write `num` images for each context, those that are missing.

    Raises:
        MissingPackageError: without mitsuba.
        UserValueError: for a folder with images of another seed.
    """
    mitsuba = _mitsuba()
    latents = {folder: sample_latents(num, folder, seed) for folder in FOLDERS}
    _record(output_dir, latents)
    missing = [
        (path, row)
        for folder in FOLDERS
        for i, row in enumerate(latents[folder])
        if not (path := output_dir / folder / f"{i:05d}.png").exists()
    ]
    with TemporaryDirectory() as place:
        mesh = Path(place, "jug.ply")
        _write_mesh(mitsuba, mesh, *_jug())
        for path, row in tqdm(missing, desc="render"):
            scene = mitsuba.load_dict(_scene(mitsuba, mesh, dict(zip(NAMES, row, strict=True)), side))
            bitmap = mitsuba.util.convert_to_bitmap(mitsuba.render(scene, seed=int(path.stem)))
            path.parent.mkdir(exist_ok=True)
            with complete_or_absent(path) as unfinished:
                Image.fromarray(np.array(bitmap)).save(unfinished)


def _mitsuba() -> Any:
    try:
        import mitsuba
    except ImportError as error:
        raise MissingPackageError("Rendering needs mitsuba: pip install mitsuba") from error
    mitsuba.set_variant("scalar_rgb")  # the same bits on every processor, and no compiler
    return mitsuba


def _record(output_dir: Path, latents: dict[str, NDArray[np.float64]]) -> None:
    """Keep the latents, and refuse to go on with others."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("file", *NAMES))
    for folder, rows in latents.items():
        writer.writerows((f"{folder}/{i:05d}.png", *(f"{u:.6f}" for u in row)) for i, row in enumerate(rows))
    path = output_dir / _RECORD
    with suppress(FileNotFoundError):
        if path.read_text() != text.getvalue():
            raise UserValueError(
                f"{output_dir} holds images of another --seed or --num_images. Give the same ones to go on, or choose "
                "another --output_dir."
            )
    with complete_or_absent(path) as unfinished:
        unfinished.write_text(text.getvalue())


def _scene(mitsuba: Any, mesh: Path, u: dict[str, float], side: int) -> dict[str, Any]:
    """One image as Mitsuba describes it: lengths in widths of the jug, the camera looks down at it."""
    transform = mitsuba.ScalarTransform4f()
    angle = 2 * np.pi * 5 / 6 * u["light_place"]
    light = [3 * np.cos(angle), 3 * np.sin(angle), 5]
    place = [1.6 * u["object_x"] - 0.8, 1.6 * u["object_y"] - 0.8, 0]
    turned = transform.translate(place).rotate([0, 0, 1], 300 * u["object_turn"])
    return {
        "type": "scene",
        "integrator": {"type": "path", "max_depth": 3},
        "sensor": {
            "type": "perspective",
            "fov": 34,
            "to_world": transform.look_at([0, -5.2, 4.2], [0, 0, 0.3], [0, 0, 1]),
            "film": {"type": "hdrfilm", "width": side, "height": side, "pixel_format": "rgb"},
            "sampler": {"type": "independent", "sample_count": _SAMPLES_PER_PIXEL},
        },
        "daylight": {"type": "constant", "radiance": {"type": "rgb", "value": 0.35}},
        "spotlight": {
            "type": "spot",
            "to_world": transform.look_at(light, [0, 0, 0.2], [0, 0, 1]),
            "intensity": _color(u["light_hue"], saturation=0.8, brightness=45),
            "cutoff_angle": 24.0,
            "beam_width": 18.0,
        },
        "floor": {
            "type": "rectangle",
            "to_world": transform.scale(20),
            "bsdf": {"type": "diffuse", "reflectance": _color(u["floor_hue"], saturation=0.6)},
        },
        "jug": {
            "type": "ply",
            "filename": str(mesh),
            "to_world": turned.rotate([0, 1, 0], 60 * u["object_tilt"] - 30),
            "bsdf": {
                "type": "twosided",
                "surface": {"type": "plastic", "diffuse_reflectance": _color(u["object_hue"], saturation=0.85)},
            },
        },
    }


def _color(u: float, saturation: float, brightness: float = 1.0) -> dict[str, Any]:
    positions = np.linspace(0, 1, len(_HUES))
    hue = np.array([np.interp(u, positions, channel) for channel in _HUES.T])
    return {"type": "rgb", "value": list(brightness * (1 - saturation * (1 - hue)))}


def _jug() -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Points (P, 3) and triangles (F, 3) of a belly, a handle and a spout, which tell every turn from any other."""
    belly, handle, spout = (np.linspace(0, 1, num) for num in (16, 14, 12))
    arc = np.pi * (handle - 0.5)
    parts = (
        _tube(
            np.stack([0 * belly, 0 * belly, 1.1 * belly], 1),
            0.02 + 0.55 * np.sin(np.pi * belly).clip(0) ** 0.45 * (1 - 0.25 * belly),
        ),
        _tube(np.stack([-0.45 - 0.4 * np.cos(arc), 0 * arc, 0.55 + 0.33 * np.sin(arc)], 1), np.full(len(arc), 0.07)),
        _tube(np.stack([0.4 + 0.6 * spout, 0 * spout, 0.35 + 0.55 * spout**1.5], 1), 0.16 - 0.09 * spout),
    )
    starts = np.cumsum([0, *(len(points) for points, _ in parts)])
    faces = [faces + start for (_, faces), start in zip(parts, starts, strict=False)]
    return np.concatenate([points for points, _ in parts]), np.concatenate(faces)


def _tube(
    centers: NDArray[np.float64], radii: NDArray[np.float64], sides: int = 24
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Points and triangles of a surface around a path in the plane y = 0."""
    along = np.gradient(centers, axis=0)
    along /= np.linalg.norm(along, axis=1, keepdims=True)
    across = np.cross(along, [0, 1, 0])
    angles = np.linspace(0, 2 * np.pi, sides, endpoint=False)[None, :, None]
    rings = np.cos(angles) * across[:, None] + np.sin(angles) * np.cross(along, across)[:, None]
    points = (centers[:, None] + radii[:, None, None] * rings).reshape(-1, 3)
    i, j = np.meshgrid(np.arange(len(centers) - 1), np.arange(sides), indexing="ij")
    a, b = i * sides + j, i * sides + (j + 1) % sides
    quads = np.stack([a, b, b + sides, a + sides], -1).reshape(-1, 4)
    return points, np.concatenate([quads[:, [0, 1, 2]], quads[:, [0, 2, 3]]])


def _write_mesh(mitsuba: Any, path: Path, points: NDArray[np.float64], faces: NDArray[np.int64]) -> None:
    mesh = mitsuba.Mesh("jug", len(points), len(faces))
    values = mitsuba.traverse(mesh)
    values["vertex_positions"] = points.astype(np.float32).ravel()
    values["faces"] = faces.astype(np.uint32).ravel()
    values.update()
    mesh.write_ply(str(path))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--num_images", type=int, default=4_000, help="of every context")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    render(given.output_dir, given.num_images, given.seed)


if __name__ == "__main__":
    main()
