"""Shared settings: no network, few threads, one seed; and which tests are `-m unit`."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

# Pure and fast: all of them take less than a minute on one core, collecting included.
UNIT = (
    *("test_base_gap.py", "test_card.py", "test_cli.py", "test_context_module.py", "test_contexts.py", "test_files.py"),
    *("test_functional.py", "test_layers.py", "test_layout.py"),
    *("adapter/test_config.py", "adapter/test_effects.py", "adapter/test_intervene.py", "adapter/test_lifecycle.py"),
    *("adapter/test_observational_part.py", "adapter/test_stored_config.py", "adapter/test_stored_downloads.py"),
    *("data/test_attributes.py", "data/test_checks.py", "data/test_interventional.py", "data/test_reweighting.py"),
    *("data/test_sampling.py", "data/test_texts.py", "data/test_vectors.py"),
    *("evaluation/test_metrics.py", "evaluation/test_report.py"),
    "properties/test_layers.py",
    *("training/test_arguments.py", "training/test_load_data.py", "training/test_objectives.py"),
    *("training/test_text_batches.py", "training/test_tokens.py"),
)
# Tests of these files that take seconds each.
NOT_UNIT = (
    "test_estimated_ratios_find_the_pair_in_which_one_concept_causes_the_other",
    "test_rows_of_other_contexts_are_not_used_and_a_missing_set_is_an_error",
    "test_sets_that_never_overlap_and_sets_that_do_not_differ_are_doubted",
)


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the files above and the examples in docstrings."""
    unit = {Path(__file__).parent / name for name in UNIT}
    if missing := [str(path) for path in unit if not path.is_file()]:
        raise pytest.UsageError(f"UNIT in {__file__} names files that are not there: {', '.join(sorted(missing))}.")
    for item in items:
        pure_and_fast = item.path in unit and getattr(item, "originalname", None) not in NOT_UNIT
        if pure_and_fast or isinstance(item, pytest.DoctestItem):
            item.add_marker("unit")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _threads():
    torch.set_num_threads(1)
