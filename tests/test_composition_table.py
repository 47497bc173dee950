"""The table of the composition benchmark, from result files."""

import json

from examples.benchmarks.composition_table import write_tables

SINGLES, PAIRS = ("a", "b", "c"), ("a+b", "a+c", "b+c")
METHOD = "independent, reweighted"


def test_a_seed_that_drew_fewer_pairs_counts_with_those_it_drew(tmp_path):
    for seed, drawn in enumerate((PAIRS, PAIRS[:1])):
        results = dict.fromkeys((*SINGLES, *PAIRS), 0.1) | {"a+b+c": 0.2, "a+b+c+d+e+f": 0.3}
        content = {"results": {METHOD: results}, "seconds": {"train": 1.0}, "rows": dict.fromkeys(drawn, 0.01 + seed)}
        (tmp_path / f"dependent-{seed}-x.json").write_text(json.dumps(content))
    write_tables(tmp_path)
    (row,) = [line for line in (tmp_path / "results.md").read_text().splitlines() if METHOD in line]
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    assert cells[2:6] == ["0.1000 ± 0.0000", "0.2000 ± 0.0000", "0.3000 ± 0.0000", "0.5100 ± 0.7071"]
