"""The results of a world on several bases as Markdown, and their images side by side."""

import json
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .image_worlds import World

Results = dict[tuple[str, int], list[dict[str, float]]]  # method, updates -> distances by context, for each seed


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
    """The distances of every method and number of updates."""
    results: Results = defaultdict(list)
    for content in _contents(folder):
        results[content["method"], content["steps"]].append(content["distances"])
    return results


def table(name: str, results: Results, world: World) -> str:
    """Means over contexts and seeds, and the combination of which a method is worst."""
    seeds = max(len(runs) for runs in results.values())
    columns = ("method", "updates", "obs", *world.groups, "worst combination")
    unseen = [str(context) for context in world.seen_by_oracle if context not in world.trained]
    lines = [f"Base {name}, {seeds} seed{'s' * (seeds > 1)}:", ""]
    lines += ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for (method, steps), runs in results.items():
        groups = [[""], *([str(context) for context in group] for group in world.groups.values())]
        cells = [method, str(steps or ""), *(f"{_mean(runs, group):.4f}" for group in groups)]
        worst = max(unseen, key=lambda context: _mean(runs, [context]))
        lines.append("| " + " | ".join([*cells, f"{_mean(runs, [worst]):.4f} ({worst})"]) + " |")
    return "\n".join(lines)


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


def _mean(runs: list[dict[str, float]], contexts: list[str]) -> float:
    return float(np.mean([run[context] for run in runs for context in contexts]))
