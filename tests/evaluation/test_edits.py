"""Edits of images that have a partner, beside the partner: what the evaluation measures where the data has pairs."""

import json
import re

import pytest
import torch
from PIL import Image

from hf_causal_context import Context
from hf_causal_context.cli import main
from hf_causal_context.data import load_folders
from hf_causal_context.evaluation import edits, evaluator
from hf_causal_context.evaluation.edits import edit_results
from hf_causal_context.evaluation.readings import Reader
from hf_causal_context.inference.counterfactuals import counterfactual

from .test_command import (  # noqa: F401 (fixtures among them)
    FAST,
    _rough_and_fast,
    adapted,
    adapter,
    base_folder,
    command,
    images,
    pipeline_folder,
    store,
)

CONTEXTS = (Context(), Context("thick"), Context("slant"), Context("thick", "slant"))
OPTIONS = {"prompt": None, "class_label": None, "num_inference_steps": 2, "batch_size": 5, "seed": 0}


def read(path):
    return torch.tensor(list(Image.open(path).get_flattened_data())).view(1, 1, 16, 16) / 255


def test_edits_are_compared_with_the_partners_of_the_images(base_folder, adapter, images):  # noqa: F811
    base = adapted(base_folder, adapter)
    (images / "thick" / "3.png").rename(images / "thick" / "other.png")
    data = load_folders(images, paired_files=True)
    found = edit_results(base, data, CONTEXTS, Reader(), resolution=16, **OPTIONS)
    assert [(result.context, result.trained, result.num_pairs) for result in found] == [
        ("slant", True, 12),
        ("thick", True, 11),
        ("slant+thick", False, 10),
    ]
    errors, unedited = [], []
    for number in range(10):
        plain, truth = (read(images / name / f"{number}.png") for name in ("obs", "slant+thick"))
        made = counterfactual(base, plain, "slant+thick", num_inference_steps=2).images[0]
        errors.append(float((made - truth).square().mean().sqrt()))
        unedited.append(float((plain - truth).square().mean().sqrt()))
    pair = found[-1]
    assert pair.error.mean == pytest.approx(sum(errors) / 10, rel=1e-4)
    assert pair.unedited.mean == pytest.approx(sum(unedited) / 10, rel=1e-5)
    assert pair.gain.mean == pytest.approx(pair.unedited.mean - pair.error.mean, rel=1e-3)
    assert pair.feature_error is None


def test_only_some_pairs_and_the_asked_contexts_are_edited(base_folder, adapter, images, monkeypatch):  # noqa: F811
    monkeypatch.setattr(edits, "MAX_PAIRS", 3)
    data = load_folders(images, paired_files=True)
    (found,) = edit_results(
        adapted(base_folder, adapter), data, [Context(), Context("slant")], Reader(), resolution=16, **OPTIONS
    )
    assert (found.context, found.num_pairs) == ("slant", 3)


def test_features_are_compared_where_there_is_an_extractor(base_folder, adapter, images):  # noqa: F811
    class Halves(torch.nn.Module):
        def forward(self, pixels):
            return torch.stack([pixels[..., :8].float().mean((1, 2, 3)), pixels[..., 8:].float().mean((1, 2, 3))], 1)

    data = load_folders(images, paired_files=True)
    base = adapted(base_folder, adapter)
    (found,) = edit_results(
        base, data, [Context("thick")], Reader(feature_extractor=Halves()), resolution=16, **OPTIONS
    )
    cosines = []
    for number in range(12):
        a, b = (read(images / name / f"{number}.png") for name in ("obs", "thick"))
        halves = [torch.stack([image[..., :8].mean(), image[..., 8:].mean()]) for image in (a, b)]
        cosines.append(1 - float(torch.cosine_similarity(*halves, dim=0)))
    assert found.unedited_feature_error.mean == pytest.approx(sum(cosines) / 12, rel=1e-3)
    assert found.feature_error.mean != found.unedited_feature_error.mean


def test_the_report_has_a_table_of_edits_where_the_data_has_pairs(adapter, images, tmp_path):  # noqa: F811
    assert main(command(adapter, images, tmp_path / "out", "--paired_files")) == 0
    text = (tmp_path / "out" / "report.md").read_text()
    values = json.loads((tmp_path / "out" / "report.json").read_text())["edits"]
    assert [value["context"] for value in values] == ["slant", "thick", "slant+thick"]
    assert "| context | data | edit | no edit | edit / no edit | pairs |" in text
    assert f"| slant+thick | held out | {values[2]['error']['mean']:.4f} ± " in text
    assert f" | {values[2]['error']['mean'] / values[2]['unedited']['mean']:.2f} | 10 |" in text
    assert "Beyond chance nearer to the truth than no edit: " in text
    assert main(command(adapter, images, tmp_path / "without")) == 0
    assert "## Edits" not in (tmp_path / "without" / "report.md").read_text()


@pytest.mark.parametrize("fault", ["two partners", "no pairs"])
def test_pairs_that_the_check_of_data_refuses_are_refused_before_anything_is_sampled(
    fault,
    adapter,  # noqa: F811
    images,  # noqa: F811
    tmp_path,
    capsys,
    monkeypatch,
):
    if fault == "two partners":
        Image.open(images / "obs" / "0.png").save(images / "obs" / "0.bmp")
        message = r"1 observational images have the name of another one: .*obs/0.bmp \(observational\) = .*obs/0.png"
    else:
        for path in (images / "obs").iterdir():
            path.rename(path.with_name(f"other-{path.name}"))
        message = "No pairs: none of the images of interventions has the name of an observational one"
    monkeypatch.setattr(evaluator, "sample_all", None)
    assert main(command(adapter, images, tmp_path / "out", "--paired_files")) == 1
    assert re.search(message, capsys.readouterr().err)
    assert main(["check-data", "--train_data_dir", str(images), "--paired_files"]) == 1
    assert re.search(message, capsys.readouterr().out)


def test_contexts_without_pairs_are_told(base_folder, adapter, images):  # noqa: F811
    for path in (images / "slant").iterdir():
        path.rename(path.with_name(f"other-{path.name}"))
    for path in (images / "thick").iterdir():
        path.rename(path.with_name(f"other-{path.name}"))
    report = evaluator.evaluate(
        adapted(base_folder, adapter), load_folders(images, paired_files=True), contexts=["slant"], **FAST
    )
    assert report.edits == ()
    assert "None of the contexts that were sampled has pairs, so no edits were compared." in report.notes
