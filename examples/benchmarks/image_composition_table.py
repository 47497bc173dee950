"""The results of a world on several bases as Markdown, and their images side by side."""

import json
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from hf_causal_context import Context

from .composition_table import with_deviation
from .image_worlds import World

Results = dict[tuple[str, int], list[dict[str, Any]]]  # method, updates -> what its file holds, for each seed


def write_tables(folder: Path, world: World) -> None:
    """Write results.md and an image of samples for every base, from the result files in a folder."""
    bases = sorted(path for path in folder.iterdir() if path.is_dir())
    results = {path.name: read(path) for path in bases}
    text = "\n\n".join(table(name, own, world) for name, own in results.items() if own)
    unfinished = folder / f".{os.getpid()}.unfinished"  # several processes may write
    unfinished.write_text(text + "\n")
    unfinished.replace(folder / "results.md")
    print(text)
    for path in bases:
        if grid := draw(path):
            grid.save(unfinished, format="PNG")
            unfinished.replace(folder / f"samples-{path.name}.png")


def read(folder: Path) -> Results:
    """The results of every method and number of updates."""
    results: Results = defaultdict(list)
    for content in _contents(folder):
        results[content["method"], content["steps"]].append(content)
    return results


def table(name: str, results: Results, world: World) -> str:
    """Means over contexts and deviations over seeds, and the combination of which a method is worst.

    Other strengths than 1 have a table of their own.
    """
    seeds = max(len(runs) for runs in results.values())
    groups = {"obs": (Context(),), **world.groups}
    unseen = [context for context in world.seen_by_oracle if context not in world.trained]
    rows, at_strengths = [], []
    for (method, steps), runs in results.items():
        row = {"method": method, "updates": str(steps or "")}
        at_strengths.append(row | _cells(runs, "distances", world.at_strengths))
        worst = max(unseen, key=lambda context: float(_means(runs, "distances", (context,)).mean()))
        row |= _cells(runs, "distances", groups)
        row["worst combination"] = f"{_means(runs, 'distances', (worst,)).mean():.4f} ({worst})"
        if world.apart:
            row |= {f"exact {group}": cell for group, cell in _cells(runs, "exact", groups).items()}
        rows.append(row)
    tables = [rows, at_strengths] if world.at_strengths else [rows]
    return "\n\n".join([f"Base {name}, {seeds} seed{'s' * (seeds > 1)}:", *map(_markdown, tables)])


def draw(folder: Path) -> Image.Image | None:
    """The grids of the first seed side by side: of every method that with the most updates."""
    latest = {content["method"]: content["file"] for content in _contents(folder) if content["seed"] == 0}
    grids = {method: Image.open(file.with_suffix(".png")) for method, file in latest.items()}
    if not grids:
        return None
    heading, font = 24, ImageFont.load_default(size=14)
    whole = Image.new(
        "RGB", (sum(g.width for g in grids.values()), heading + max(g.height for g in grids.values())), "white"
    )
    x = 0
    for method, grid in grids.items():
        whole.paste(grid, (x, heading))
        ImageDraw.Draw(whole).text((x + grid.width / 2, 5), method, fill="black", font=font, anchor="ma")
        x += grid.width
    return whole


def _contents(folder: Path) -> list[dict[str, Any]]:
    """What the result files hold, in the order of the methods' names and the updates."""
    contents = [{**json.loads(path.read_text()), "file": path} for path in folder.glob("*.json")]
    return sorted(contents, key=lambda content: (content["steps"] > 0, content["method"], content["steps"]))


def _markdown(rows: list[dict[str, str]]) -> str:
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cells(runs: list[dict[str, Any]], kind: str, groups: dict[str, tuple[Context, ...]]) -> dict[str, str]:
    return {group: with_deviation(_means(runs, kind, contexts)) for group, contexts in groups.items()}


def _means(runs: list[dict[str, Any]], kind: str, contexts: tuple[Context, ...]) -> np.ndarray:
    """The mean over contexts of each seed."""
    return np.array([np.mean([run[kind][str(context)] for context in contexts]) for run in runs])
