"""The results of the composition benchmark as Markdown and an image."""

import json
from collections import defaultdict
from pathlib import Path

import numpy as np

from hf_causal_context import Context

# Column -> number of targets of its contexts.
GROUPS = {"singles": (1,), "pairs": (2,), "triples": (3,), "all six": (6,)}
_COLUMNS = ("method", *GROUPS, "rows of pairs", "worst pair", "gap closed", "seconds")

Results = dict[str, list[dict[str, float]]]  # method -> distances by context, for each seed


def write_tables(folder: Path) -> None:
    """Write results.md from the result files in a folder, and print it."""
    worlds = [world for world in ("dependent", "independent") if any(folder.glob(f"{world}-*.json"))]
    text = "\n\n".join(table(world, *read(folder, world)) for world in worlds)
    unfinished = folder / ".results.md.unfinished"
    unfinished.write_text(text + "\n")
    unfinished.replace(folder / "results.md")
    print(text)


def read(folder: Path, world: str) -> tuple[Results, Results, dict[str, float]]:
    """Results, distances of the rows that stood for combinations, and the mean seconds of training, by method."""
    results: Results = defaultdict(list)
    rows: Results = defaultdict(list)
    seconds: dict[str, list[float]] = defaultdict(list)
    for path in sorted(folder.glob(f"{world}-*.json")):
        content = json.loads(path.read_text())
        for method, distances in content["results"].items():
            results[method].append(distances)
            seconds[method].append(content["seconds"]["train"])
            if "rows" in content:
                rows[method].append(content["rows"])
    return results, rows, {method: float(np.mean(values)) for method, values in seconds.items()}


def table(world: str, results: Results, rows: Results, seconds: dict[str, float]) -> str:
    """Mean and deviation over seeds; gap closed = (base - method) / (base - best oracle) on the means of the pairs."""
    lines = [f"{world.capitalize()} concepts:", ""]
    lines += ["| " + " | ".join(_COLUMNS) + " |", "|" + "---|" * len(_COLUMNS)]
    means = {method: np.mean(_group(runs, (2,))) for method, runs in results.items()}
    oracle = min((mean for method, mean in means.items() if method.startswith("oracle")), default=np.nan)
    for method, runs in sorted(results.items(), key=lambda item: -means[item[0]]):
        cells = [with_deviation(_group(runs, sizes)) for sizes in GROUPS.values()]
        cells.append(with_deviation(_group(rows[method], (2,))) if method in rows else "")
        worst = max(_contexts(runs[0], (2,)), key=lambda context: np.mean([run[context] for run in runs]))
        cells.append(f"{np.mean([run[worst] for run in runs]):.3f} ({worst})")
        closed = (means.get("base", np.nan) - means[method]) / (means.get("base", np.nan) - oracle)
        cells.append("" if method in ("base", "floor") else f"{closed:.3f}")
        cells.append("" if method in ("base", "floor") else f"{seconds[method]:.0f}")
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _contexts(run: dict[str, float], sizes: tuple[int, ...]) -> list[str]:
    return [context for context in run if len(Context.parse(context).targets) in sizes]


def _group(runs: list[dict[str, float]], sizes: tuple[int, ...]) -> np.ndarray:
    """Mean distance of a group of contexts, for every seed; of rows, those of the combinations that it drew."""
    return np.array([np.mean([run[context] for context in _contexts(run, sizes)]) for run in runs])


def with_deviation(values: np.ndarray) -> str:
    """Mean and deviation over seeds, as text."""
    return f"{values.mean():.4f}" + (f" ± {values.std(ddof=1):.4f}" if len(values) > 1 else "")
