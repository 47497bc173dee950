"""Evaluation of an adapter on a real (tiny) pipeline, from Python and from the command line."""

import json
from functools import partial

import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from peft import PeftModel, get_peft_model
from PIL import Image
from transformers import ViTConfig, ViTModel

from hf_causal_context import CausalContextConfig, Context
from hf_causal_context.adapter.layer import CausalContextLayer
from hf_causal_context.bases.loading import load_base
from hf_causal_context.cli import main
from hf_causal_context.commands.evaluate import Arguments, trained_with
from hf_causal_context.data import from_dataset, load_folders
from hf_causal_context.evaluation import asked, classifiers, evaluator, metrics, real_rows
from hf_causal_context.evaluation.evaluator import evaluate
from hf_causal_context.evaluation.markdown import markdown
from hf_causal_context.evaluation.readings import Reader
from hf_causal_context.evaluation.real_rows import read_real_rows
from hf_causal_context.evaluation.sampling import adapters_disabled
from hf_causal_context.inference.adapted import StoredAdapter
from hf_causal_context.inference.sampling import generate, generate_jobs

from ..training.conftest import pipeline_folder  # noqa: F401 (a fixture)

FAST = {"num_samples": 3, "num_seeds": 2, "num_inference_steps": 2}
COUNTS = {"obs": 14, "thick": 12, "slant": 12, "slant+thick": 10}


@pytest.fixture(scope="module")
def base_folder(pipeline_folder):  # noqa: F811
    return pipeline_folder("ddpm")


@pytest.fixture(autouse=True)
def _rough_and_fast(monkeypatch):
    monkeypatch.setattr(metrics, "NUM_PROJECTIONS", 20)
    monkeypatch.setattr(classifiers, "_MIN_STEPS", 20)


def write_images(root, counts=COUNTS):
    """Gray noise, brighter on the left for thick and at the top for slant."""
    generator = torch.Generator().manual_seed(0)
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            levels = torch.randint(100, (16, 16), generator=generator)
            levels[:, :8] += 120 * ("thick" in name)
            levels[:8] += 30 * ("slant" in name)
            Image.fromarray(levels.byte().numpy()).save(root / name / f"{i}.png")
    return root


@pytest.fixture
def images(tmp_path):
    return write_images(tmp_path / "images")


@pytest.fixture
def store(tmp_path, base_folder):
    """Saves an adapter of random weights and returns its folder."""

    def save(**options):
        torch.manual_seed(0)
        config = CausalContextConfig(concepts=("thick", "slant"), init_weights=False, **options)
        model = get_peft_model(load_base(base_folder).denoiser, config)
        model.peft_config["default"].base_model_name_or_path = base_folder
        model.save_pretrained(tmp_path / "adapter")
        return str(tmp_path / "adapter")

    return save


@pytest.fixture
def adapter(store):
    """One whose empty context is the base."""
    return store(observational_rank=0)


def adapted(base_folder, adapter):
    base = load_base(base_folder)
    PeftModel.from_pretrained(base.denoiser, adapter)
    return base


def command(adapter, images, folder, *more):
    options = [f"--{name}={value}" for name, value in FAST.items()]
    return ["evaluate", "--adapter", adapter, "--train_data_dir", str(images), "--output_dir", str(folder), *options, *more]  # fmt: skip  # noqa: E501


def test_the_command_writes_what_python_returns(adapter, images, base_folder, tmp_path, capsys):
    assert main(command(adapter, images, tmp_path / "out")) == 0
    printed = capsys.readouterr().out
    text = (tmp_path / "out" / "report.md").read_text()
    assert text in printed
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "report.json", "report.md", "report.png", "samples.png"
    }  # fmt: skip
    assert str(tmp_path / "out" / "samples.png") in printed
    values = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [context["context"] for context in values["contexts"]] == ["", "slant", "thick", "slant+thick"]
    assert [context["trained"] for context in values["contexts"]] == [True, True, True, False]
    assert [context["num_real"] for context in values["contexts"]] == [14, 12, 12, 10]
    assert [context["num_samples"] for context in values["contexts"]] == [6, 6, 6, 6]
    assert values["drift"] == {"largest": 0, "mean": 0, "distance": pytest.approx(0, abs=1e-9)}
    assert [curve["zero_is_base"] for curve in values["strength_curves"]] == [True, True]
    assert [curve["zero_is_empty"] for curve in values["strength_curves"]] == [True, True]
    for sentence in values["verdict"]["sentences"]:
        assert printed.count(f"- {sentence}\n") == 2, "on top of the report, and at the end of what is printed"
    assert values["settings"]["adapter"] == adapter

    report = evaluate(adapted(base_folder, adapter), load_folders(images), **FAST)
    values["settings"] = {name: values["settings"][name] for name in report.settings}
    assert json.loads(json.dumps(report.to_dict())) == values
    # the images are those of generate(), of the seeds of the first group
    (pair,) = generate(adapted(base_folder, adapter), ["thick+slant"], seeds=range(3), num_inference_steps=2)
    torch.testing.assert_close(report.examples["slant+thick"][1], pair)


def test_the_base_is_sampled_without_the_adapter(adapter, images, base_folder):
    base = adapted(base_folder, adapter)
    for module in base.denoiser.modules():
        if isinstance(module, CausalContextLayer):  # an adapter whose empty context is not the base
            module._add_adapter_output = lambda result, x, name: result + 0.1
    report = evaluate(base, load_folders(images), **FAST)
    assert report.drift.largest > 0.01
    assert not report.strength_curves[0].zero_is_base
    assert report.strength_curves[0].zero_is_empty
    for result in report.contexts:
        assert result.distance.empty.mean != result.distance.base.mean


def test_an_observational_part_makes_the_empty_context_another_world_than_the_base(store, images, base_folder):
    base = adapted(base_folder, store(observational_rank=2))
    report = evaluate(base, load_folders(images), contexts=["slant+thick", "slant+observational=0"], **FAST)
    assert report.drift.largest > 0.01
    assert "Beside the base at equal seeds: largest difference" in markdown(report)
    assert all(curve.zero_is_empty and not curve.zero_is_base for curve in report.strength_curves)
    names = [result.context for result in report.contexts]
    assert names == ["", "observational=0.0+slant", "slant", "thick", "slant+thick"]
    draw = partial(generate, base, seeds=[0, 1], num_inference_steps=2)
    empty, at_zero, of_base = draw([(), "thick=0", "observational=0"])
    assert torch.equal(empty, at_zero)
    with adapters_disabled(base.denoiser):
        torch.testing.assert_close(draw([()])[0], of_base)
    assert (empty - of_base).abs().max() > 0.01
    torch.testing.assert_close(report.examples[""][1][:2], empty)


def test_the_empty_context_need_not_be_sampled_to_be_the_base(store, images, base_folder):
    """`observational=0` without targets is a context of its own, which asks for nothing."""
    base = adapted(base_folder, store(observational_rank=2))
    report = evaluate(base, load_folders(images), contexts=["observational=0"], **FAST)
    result = report.contexts[1]
    assert (result.context, result.conformity, result.trained) == ("observational=0.0", None, False)
    assert report.unseen is None


def test_disabled_adapters_are_the_base_and_come_back_as_they_were(adapter, base_folder):
    options = {"seeds": [0, 1], "num_inference_steps": 2}
    (plain,) = generate(load_base(base_folder), [()], **options)
    base = adapted(base_folder, adapter)
    trainable = [parameter.requires_grad for parameter in base.denoiser.parameters()]
    (before,) = generate(base, ["thick"], **options)
    with adapters_disabled(base.denoiser):
        assert torch.equal(generate(base, [()], **options)[0], plain)
    assert torch.equal(generate(base, ["thick"], **options)[0], before)
    assert not torch.equal(before, plain)
    assert [parameter.requires_grad for parameter in base.denoiser.parameters()] == trainable


def test_without_held_out_rows_pairs_are_judged_by_the_classifiers(adapter, tmp_path, base_folder, monkeypatch):
    data = load_folders(write_images(tmp_path / "images", {**COUNTS, "slant+thick": 9}))
    few = evaluate(adapted(base_folder, adapter), data, **FAST)
    assert "no combination can be compared with the truth" in few.notes[0]
    singles = write_images(tmp_path / "singles", {"obs": 12, "thick": 12, "slant": 12})
    for folder in singles.iterdir():
        lines = [json.dumps({"file_name": f"{i}.png", "text": "a digit"}) for i in range(12)]
        (folder / "metadata.jsonl").write_text("\n".join(lines))
    data = load_folders(singles)
    report = evaluate(adapted(base_folder, adapter), data, **FAST)
    assert "no combination can be compared with the truth" in report.notes[0]
    pair = report.contexts[-1]
    assert (pair.context, pair.distance) == ("slant+thick", None)
    assert pair.conformity is not None
    assert "Real images have captions, all samples the prompt ''" in report.notes[-1]
    monkeypatch.setattr(asked, "MAX_UNSEEN_PAIRS", 0)
    report = evaluate(adapted(base_folder, adapter), data, **FAST)
    assert "Of 1 unseen pairs the first 0 were sampled; --contexts names others." in report.notes


def test_what_samples_and_real_images_differ_in_besides_is_noted(adapter, images, base_folder):
    (images / "obs" / "0.mask.png").write_bytes((images / "obs" / "0.png").read_bytes())
    base = adapted(base_folder, adapter)
    base.takes_captions = True
    notes = " ".join(evaluate(base, load_folders(images), **FAST).notes)
    assert "No prompt was given: all samples are of the empty one" in notes
    assert "The data has masks, and what they leave out is not learned" in notes


def test_contexts_choose_the_combinations(adapter, images, tmp_path):
    assert main(command(adapter, images, tmp_path / "out", "--contexts", "obs", "thick=0.5,slant")) == 0
    values = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [context["context"] for context in values["contexts"]] == ["", "slant", "thick", "slant+thick=0.5"]
    assert values["contexts"][-1]["num_real"] == 0


def test_samples_are_as_the_training_was_unless_asked_for_otherwise(images, pipeline_folder, tmp_path):  # noqa: F811
    base_folder = pipeline_folder("stable_diffusion")
    config = CausalContextConfig(concepts=("thick", "slant"), target_modules=["to_q"])
    model = get_peft_model(load_base(base_folder).denoiser, config)
    model.peft_config["default"].base_model_name_or_path = base_folder
    adapter = tmp_path / "adapter"
    model.save_pretrained(adapter)
    recorded = {"instance_prompt": "a digit", "validation_prompt": "a face", "resolution": 8}
    (adapter / "training_arguments.json").write_text(json.dumps(recorded))

    assert main(command(str(adapter), images, tmp_path / "out")) == 0
    used = json.loads((tmp_path / "out" / "report.json").read_text())["settings"]
    assert (used["prompt"], used["resolution"]) == ("a digit", 8)

    def options(**given):
        arguments = Arguments(adapter=str(adapter), output_dir="-", **given)
        return trained_with(StoredAdapter.open(str(adapter)), arguments)

    assert options(prompt="", resolution=16) == {"prompt": "", "resolution": 16}
    (adapter / "training_arguments.json").write_text(json.dumps(recorded | {"instance_prompt": "", "resolution": None}))
    assert options() == {"prompt": "a face", "resolution": None}
    (adapter / "training_arguments.json").write_text(json.dumps({"instance_prompt": "", "validation_prompt": ""}))
    assert options() == {"prompt": None, "resolution": None}
    (adapter / "training_arguments.json").unlink()
    assert options() == {"prompt": None, "resolution": None}


def test_the_command_takes_a_feature_extractor(adapter, images, tmp_path):
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    ViTModel(ViTConfig(**sizes, image_size=16, patch_size=8)).save_pretrained(tmp_path / "vit")
    more = ["--contexts", "slant+thick", "--feature_extractor", str(tmp_path / "vit")]
    assert main(command(adapter, images, tmp_path / "out", *more)) == 0
    assert "## FID and KID" in (tmp_path / "out" / "report.md").read_text()


def test_bad_input_is_an_error_that_says_what_to_do(adapter, images, base_folder, tmp_path, capsys):
    def error(*more, data=images):
        assert main(command(adapter, data, tmp_path / "out", *more)) == 1
        return capsys.readouterr().err

    assert "Unknown concept 'color' in context 'color'" in error("--contexts", "color")
    assert "--num_samples=1 must be at least 2" in error("--num_samples", "1")
    assert "takes no captions" in error("--prompt", "a digit")
    assert "is an adapter of a diffusers pipeline, so --max_new_tokens would have no effect. Leave it out." in error(
        "--max_new_tokens", "9"
    )
    assert "Unknown arguments: --nothing" in error("--nothing")
    assert main(["evaluate", "--train_data_dir", str(images)]) == 1
    assert "Missing: --adapter, --output_dir. Give the adapter" in capsys.readouterr().err
    others = write_images(tmp_path / "others", {"obs": 12, "thick": 12, "small": 12})
    assert "The adapter has the concepts 'thick', 'slant', the data 'small', 'thick'. They must be" in error(
        data=others
    )
    few = write_images(tmp_path / "few", {"obs": 12, "thick": 12, "slant": 9})
    assert "The context 'slant' has 9 real rows. At least 10" in error(data=few)
    with pytest.raises(ValueError, match="The unet of this pipeline has no causal context adapter. Attach one first"):
        evaluate(load_base(base_folder), load_folders(images), **FAST)


def test_more_steps_than_levels_of_noise_are_refused_before_anything_is_read(adapter, images, base_folder, monkeypatch):
    monkeypatch.setattr(evaluator, "read_real_rows", None)
    with pytest.raises(ValueError, match="num_inference_steps=1001, but the base was trained with 1000 levels"):
        evaluate(adapted(base_folder, adapter), load_folders(images), num_inference_steps=1001)


def test_images_that_are_not_finite_name_their_context(adapter, images, base_folder, monkeypatch):
    def broken(base, jobs, **options):
        for start, batch in enumerate(generate_jobs(base, jobs, batch_size=1)):
            yield batch * (torch.nan if jobs[start][0] == Context("slant") else 1)

    monkeypatch.setattr(evaluator, "generate_jobs", broken)
    with pytest.raises(ValueError, match="Samples of context 'slant' contain NaN or infinite values"):
        evaluate(adapted(base_folder, adapter), load_folders(images), **FAST)


def test_what_a_safety_checker_made_black_is_told(adapter, images, base_folder, monkeypatch):
    def checked(base, jobs, **options):
        for (context, seed), image in zip(jobs, torch.cat(list(generate_jobs(base, jobs, **options))), strict=True):
            yield image[None] * (context != Context("slant") or seed % 2)

    monkeypatch.setattr(evaluator, "generate_jobs", checked)
    base = adapted(base_folder, adapter)
    assert not any("black" in note for note in evaluate(base, load_folders(images), **FAST).notes)
    base.pipe.safety_checker = torch.nn.Identity()
    (note,) = [note for note in evaluate(base, load_folders(images), **FAST).notes if "black" in note]
    assert note.startswith("The base's safety checker made samples black, and they are measured as such: 3 of 'slant'.")


def test_contexts_share_batches_and_give_the_images_of_one_after_another(adapter, images, base_folder):
    base, rows = adapted(base_folder, adapter), []
    forward = base.denoiser.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    report = evaluate(base, load_folders(images), **FAST)
    forward.remove()
    # 6 images of the empty context and of the base, 6 of three contexts, 3 of five strengths of two concepts.
    assert rows[:: FAST["num_inference_steps"]] == [6, 6] + [8] * 6
    for context, (_, made) in report.examples.items():
        [alone] = generate(base, [Context.parse(context)], seeds=range(3), num_inference_steps=2, batch_size=1)
        torch.testing.assert_close(made, alone, rtol=1e-4, atol=1e-5)


def test_real_rows_are_bounded_and_streams_are_read_too(images, monkeypatch):
    monkeypatch.setattr(real_rows, "MAX_REAL_ROWS", 11)
    rows = [(str(path), path.parent.name) for path in sorted(images.rglob("*.png"))]
    table = Dataset.from_dict({"image": [path for path, _ in rows], "context": [name for _, name in rows]})
    table = table.cast(Features({"image": ImageFeature(), "context": Value("string")}))
    streamed = from_dataset(table.to_iterable_dataset(), concepts=("thick", "slant"), held_out_contexts=["slant+thick"])
    for data in (from_dataset(table), streamed):
        read = read_real_rows(data, Reader(), 1, 16)
        assert {str(context): len(part) for context, part in read.items()} == {
            "": 11, "thick": 11, "slant": 11, "slant+thick": 10
        }  # fmt: skip
        values = read[Context("thick")].values
        assert values.shape == (11, 1, 16, 16)
        assert 0.6 < values[..., :8].mean() < 0.75
        assert 0.1 < values[..., 8:].mean() < 0.3
