"""Training end to end, from folders of images to an adapter that loads."""

import json
import shutil

import pytest
import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from peft import PeftModel
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hf_causal_context._files import checkpoint_steps
from hf_causal_context.bases.loading import load_base
from hf_causal_context.data import from_dataset
from hf_causal_context.training import finetune
from hf_causal_context.training.arguments import TrainingArguments
from hf_causal_context.training.finetune import train
from hf_causal_context.training.loop import trainer

from .run_tiny import Place
from .small import adapter_weights, assert_close_to_largest, settings, write_folders
from .tiny_pipelines import EVERY, side

pytestmark = pytest.mark.usefixtures("on_cpu")


@pytest.fixture
def data(tmp_path):
    return write_folders(tmp_path / "data")


@pytest.fixture
def run(pipeline_folder, data, tmp_path):
    """A function: train on the folders with some settings -> the output folder."""

    def call(name="ddpm", base=None, rows=None, root=data, output_dir="out", **changes):
        given = settings(pipeline_folder(name), root, tmp_path / output_dir, **changes)
        return train(TrainingArguments(**given), base=base, data=rows)

    return call


def labeled(root, labels):
    """Images of three contexts and of a pair, each with the label of its context."""
    contexts = ["obs", "slant", "thick", "slant+thick"]
    files = [sorted((root / name.partition("+")[0]).glob("*.png"))[-1 - ("+" in name)] for name in contexts]
    columns = {"image": list(map(str, files)), "context": contexts, "digit": labels}
    return Dataset.from_dict(columns).cast_column("image", ImageFeature())


def reloaded(pipeline, folder):
    base = load_base(pipeline)
    return base, PeftModel.from_pretrained(base.denoiser, str(folder)).eval()


def outputs(base, model):
    """Predictions of a pixel base in all contexts and an unseen one."""
    noisy = torch.randn(4, base.in_channels, 16, 16, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    with torch.no_grad():
        return base.predict(model.eval(), noisy, torch.tensor([1, 300, 600, 900]), {}, mask)


class TestEndToEnd:
    @pytest.fixture
    def trained(self, run, pipeline_folder, data):
        shutil.copytree(data / "thick", data / "slant+thick")  # held out
        for i, path in enumerate(sorted((data / "slant+thick").glob("*.png"))):
            Image.new("RGB", (16, 16), (40 * i, 0, 0)).save(path)
        base = load_base(pipeline_folder("ddpm"))
        before = {name: tensor.clone() for name, tensor in base.denoiser.state_dict().items()}
        folder = run(
            base=base,
            max_train_steps=6,
            checkpointing_steps=2,
            checkpoints_total_limit=2,
            validation_steps=3,
            num_validation_images=2,
            num_inference_steps=1,
            report_to="tensorboard",
        )
        return base, before, folder

    def test_it_leaves_the_base_as_it_was_and_an_adapter_that_loads(self, trained, pipeline_folder, data, tmp_path):
        base, before, folder = trained
        for name, tensor in base.denoiser.state_dict().items():
            if "causal" not in name:
                assert torch.equal(tensor, before.pop(name.replace(".base_layer", ""))), name
        assert not before

        other, model = reloaded(pipeline_folder("ddpm"), folder)
        expected = outputs(base, base.denoiser)
        assert torch.equal(outputs(other, model), expected)
        fresh = load_base(pipeline_folder("ddpm"))
        with torch.no_grad():
            untrained = fresh.denoiser(
                torch.randn(4, 1, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 300, 600, 900])
            ).sample
        assert (expected[1:] - untrained[1:]).abs().amax((1, 2, 3)).min() > 1e-3

        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["concepts"] == ["slant", "thick"]
        assert config["base_model_name_or_path"] == pipeline_folder("ddpm")
        arguments = json.loads((folder / "training_arguments.json").read_text())
        assert TrainingArguments(**arguments).train_data_dir == str(data)
        assert not list(folder.glob(".*"))

        # Grids: before the first step, at step 3 and at the end; rows base, and from step 3 on obs, slant, thick and
        # slant+thick, with two images of 64 pixels each.
        samples = sorted((folder / "samples").iterdir())
        assert [path.name for path in samples] == ["step-000000.png", "step-000003.png", "step-000006.png"]
        assert [Image.open(path).height for path in samples] == [68 + 4, 5 * 68 + 4, 5 * 68 + 4]

        (events,) = (folder / "logs" / "hf_causal_context").glob("events.out.*")  # hyperparameters have folders
        log = EventAccumulator(str(events.parent)).Reload()
        assert [event.step for event in log.Scalars("loss")] == list(range(1, 7))
        assert [event.value for event in log.Scalars("learning_rate")] == pytest.approx([1e-2] * 6)
        assert {"loss", "learning_rate", "gradient_norm"} <= set(log.Tags()["scalars"])
        assert [event.step for event in log.Images("samples")] == [0, 3, 6]
        assert {"loss/obs", "loss/slant", "loss/thick"} <= set(log.Tags()["scalars"])

    def test_checkpoints_hold_the_adapter_and_its_optimizer_but_not_the_base(self, trained):
        base, _, folder = trained
        checkpoints = checkpoint_steps(folder)
        assert list(checkpoints) == [4, 6]  # of 2, 4 and 6
        weights = adapter_weights(folder)
        size = sum(4 * tensor.numel() for tensor in weights.values())
        base_size = sum(4 * p.numel() for name, p in base.denoiser.named_parameters() if "causal" not in name)
        total = sum(path.stat().st_size for path in checkpoints[6].rglob("*"))
        assert total < 3 * size + 60_000
        assert 2 * base_size > total  # this test can tell
        assert not any("base_layer" in name or "conv_in" in name for name in adapter_weights(checkpoints[6]))
        last = adapter_weights(checkpoints[6])
        assert all(torch.equal(last[name], tensor) for name, tensor in weights.items())


def test_the_card_shows_the_last_grid_of_its_own_run(run):
    folder = run(max_train_steps=3, validation_steps=2, num_validation_images=1, num_inference_steps=1)
    shutil.rmtree(folder / "checkpoint-3")  # else another run in the folder is refused
    run(max_train_steps=2, num_validation_images=1, num_inference_steps=1)
    assert json.loads((folder / "card.json").read_text())["grid"] == "samples/step-000002.png"


def test_samples_and_card_show_the_caption_of_all_images(run, monkeypatch):
    generate, prompts = finetune.generate, []
    monkeypatch.setattr(finetune, "generate", lambda *a, **b: prompts.append(b["prompt"]) or generate(*a, **b))
    shown = {"num_validation_images": 1, "num_inference_steps": 1, "resolution": 16}
    folder = run("stable_diffusion", instance_prompt="a face", **shown)
    assert prompts == ["a face"] * 2  # of the base, and at the end of the contexts
    assert json.loads((folder / "card.json").read_text())["call"]["prompt"] == "a face"
    assert json.loads((folder / "training_arguments.json").read_text())["validation_prompt"] == "a face"  # for `push`
    other = TrainingArguments(**settings("-", "-", "-"), instance_prompt="a face", validation_prompt="a cat")
    assert other.validation_prompt == "a cat"


@pytest.mark.parametrize("name", EVERY)
def test_every_family_trains_and_finds_its_latents_again(name, pipeline_folder, tmp_path):
    base = load_base(pipeline_folder(name))
    root = write_folders(tmp_path / "data", captions=base.takes_captions)
    changes = {"resolution": side(base), "num_validation_images": 1, "num_inference_steps": 2, "max_train_steps": 2}
    rows = None
    if base.takes_classes:
        files = sorted(root.rglob("*.png"))
        columns = {
            "image": [str(path) for path in files],
            "context": [path.parent.name for path in files],
            "digit": [i % 5 for i in range(len(files))],
        }
        rows = from_dataset(Dataset.from_dict(columns).cast_column("image", ImageFeature()))
        changes["class_column"] = "digit"

    def once(output_dir, base):
        given = settings(pipeline_folder(name), root, tmp_path / output_dir, **changes)
        encoded = []
        if base.is_latent:
            base.pipe.vae.encoder.register_forward_hook(lambda module, args, output: encoded.append(len(args[0])))
        folder = train(TrainingArguments(**given), base=base, data=rows)
        return adapter_weights(folder), sum(encoded)

    first, encoded = once("first", base)
    assert all(tensor.isfinite().all() for tensor in first.values())
    assert any(tensor.abs().max() > 0 for key, tensor in first.items() if tensor.ndim > 1)
    assert (tmp_path / "first" / "samples" / "step-000002.png").exists()
    second, again = once("second", load_base(pipeline_folder(name)))
    assert (encoded, again) == ((13, 1) if base.is_latent else (0, 0))  # one for the shape
    assert all(torch.equal(second[key], tensor) for key, tensor in first.items())
    _, model = reloaded(pipeline_folder(name), tmp_path / "first")
    assert any("causal" in key for key in model.state_dict())


@pytest.mark.parametrize("name", ["ddpm", "stable_diffusion", "stable_diffusion_3"])
def test_bfloat16_keeps_the_adapter_in_single_precision(name, run, tmp_path):
    folder = run(
        name, mixed_precision="bf16", resolution=16, num_validation_images=1, num_inference_steps=1, max_train_steps=3
    )
    weights = adapter_weights(folder)
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert all(tensor.isfinite().all() for tensor in weights.values())


@pytest.mark.parametrize("name", ["ddpm", "stable_diffusion_3"])
def test_gradient_checkpointing_gives_the_same_adapter(name, run):
    plain = adapter_weights(run(name, resolution=16, adam_epsilon=1e-3))
    saving = adapter_weights(
        run(name, resolution=16, adam_epsilon=1e-3, gradient_checkpointing=True, output_dir="other")
    )
    assert_close_to_largest(saving, plain)


def test_a_stream_trains(run):
    weights = adapter_weights(run(streaming=True, max_train_steps=3))
    assert any(tensor.abs().max() > 0 for tensor in weights.values())


def test_a_label_of_a_stream_that_the_base_has_not_is_named(run, data):
    stream = from_dataset(labeled(data, [0, 7, 4, 1]).to_iterable_dataset(), concepts=["slant", "thick"])
    with pytest.raises(trainer.UnreadableDataError, match="--class_column=digit holds 7, but this .* classes 0 to 4"):
        run("ddpm_classes", rows=stream, class_column="digit", max_train_steps=2, observational_steps=0)


def test_epochs_count_rows(run):
    folder = run(max_train_steps=None, num_train_epochs=2, train_batch_size=5)
    assert list(checkpoint_steps(folder)) == [6]  # twice 12 images, in batches of 5


def test_the_average_of_the_weights_is_saved(run):
    folder = run(use_ema=True, max_train_steps=4)
    last, averaged = adapter_weights(folder / "checkpoint-4"), adapter_weights(folder)
    assert any((last[name] - tensor).abs().max() > 1e-4 for name, tensor in averaged.items())


class TestGlobalBatch:
    """The same samples, split otherwise over micro-batches and processes."""

    def gradients(self, folder):
        # Of the first step, in AdamW's first moment.
        state = torch.load(folder / "checkpoint-1" / "optimizer.bin", weights_only=True)["state"]
        return {number: moments["exp_avg"] for number, moments in state.items()}

    @pytest.mark.parametrize("streaming", [False, True])
    def test_gradients_of_8_x_1_are_those_of_1_x_8(self, streaming, run):
        given = {"max_train_steps": 1, "streaming": streaming}
        whole = run(train_batch_size=8, **given)
        apart = run(train_batch_size=1, gradient_accumulation_steps=8, output_dir="apart", **given)
        assert_close_to_largest(self.gradients(apart), self.gradients(whole))

    @pytest.mark.parametrize("streaming", [False, True])
    def test_two_processes_train_as_one(self, streaming, start, pipeline_folder, data, tmp_path):
        # A large epsilon, so that AdamW does not turn rounding errors of tiny gradients into whole steps.
        given = settings(
            pipeline_folder("ddpm"),
            data,
            tmp_path / "two",
            train_batch_size=2,
            gradient_accumulation_steps=2,
            max_train_steps=4,
            adam_epsilon=1e-3,
            use_ema=True,
            streaming=streaming,
            num_validation_images=1,
            num_inference_steps=1,
        )
        places = [Place(rank, 2, str(tmp_path / "rendezvous")) for rank in range(2)]
        two = [start(given, place=place) for place in places]
        one = start(
            given | {"output_dir": str(tmp_path / "one"), "train_batch_size": 8, "gradient_accumulation_steps": 1}
        )
        assert [process.wait() for process in (*two, one)] == [str(tmp_path / name) for name in ("two", "two", "one")]
        assert_close_to_largest(adapter_weights(tmp_path / "two"), adapter_weights(tmp_path / "one"))


class TestErrorsBeforeTraining:
    @pytest.fixture(autouse=True)
    def _no_step(self, monkeypatch):
        def refuse(*args):
            raise AssertionError("training began")

        monkeypatch.setattr(trainer, "noted_interruptions", refuse)

    def test_a_run_of_this_kind_would_begin(self, run):
        with pytest.raises(AssertionError, match="training began"):
            run()

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"concepts": ["slant", "thik"]}, "Unknown concept 'thick' .*Known concepts: 'slant', 'thik'"),
            ({"concepts": ["slant", "thick", "size"]}, "The data cannot be trained on:\n- .*size"),
            ({"train_data_dir": None}, "either --train_data_dir .* or --dataset_name"),
            ({"dataset_name": "a/b"}, "either --train_data_dir .* or --dataset_name .*received '.*data' and 'a/b'"),
            (
                {"class_column": "digit"},
                "--class_column='digit' is for datasets, and has no effect beside --train",
            ),
            ({"context_weights": ["size=2"]}, "--context_weights names 'size', which is not trained on"),
            ({"context_weights": ["slant=0"]}, "--context_weights slant=0 leaves out the set of 'slant', which would"),
            ({"context_weights": ["obs"]}, "--context_weights 'obs' must be a context and a number"),
            ({"validation_contexts": ["obs", "thick+size"]}, "Unknown concept 'size' in context 'size\\+thick'"),
            ({"held_out_contexts": ["size"]}, "names 'size', which has no rows"),
            ({"snr_gamma": -1.0}, "--snr_gamma=-1.0 must be positive"),
            ({"lr_scheduler": "cosin"}, "--lr_scheduler=cosin is unknown. Allowed: constant, .*cosine"),
            ({"mixed_precision": "bf8"}, "--mixed_precision=bf8 is unknown. Allowed: no, fp16, bf16"),
            ({"mixed_precision": "fp16"}, "--mixed_precision=fp16 needs a GPU. On the CPU use bf16 or no"),
            (
                {"instance_prompt": "a digit"},
                "--instance_prompt='a digit' was given, but DDPMPipeline takes no captions",
            ),
            ({"max_grad_norm": 0.0}, "--max_grad_norm=0.0 must be positive"),
            ({"resolution": 32}, "resolution=32 was given, but DDPMPipeline generates 16 pixels only"),
            (
                {"num_inference_steps": 1001, "num_validation_images": 1},
                "=1001, but the base was trained with 1000 levels",
            ),
            ({"report_to": "clearml"}, "--report_to=clearml: this tracker is not installed"),
            ({"attribute_rules": ["a: b == 1"]}, "--attribute_rules make contexts and concepts from the columns"),
        ],
    )
    def test_settings(self, changes, message, run, tmp_path):
        with pytest.raises(ValueError, match=message):
            run(**changes)
        assert not list(tmp_path.glob("out/*.safetensors"))

    def test_a_stream_of_unknown_length_needs_a_number_of_steps(self, run, data):
        files = [str(path) for path in sorted(data.rglob("*.png"))]
        columns = {"image": files, "context": [file.split("/")[-2] for file in files]}
        stream = Dataset.from_dict(columns).cast_column("image", ImageFeature()).to_iterable_dataset()
        with pytest.raises(
            ValueError, match="A stream has no known length, so it has no epochs. Give --max_train_steps"
        ):
            run(rows=from_dataset(stream, concepts=["slant", "thick"]), max_train_steps=None)

    def test_a_column_that_holds_no_images(self, run, data):
        files = sorted(data.rglob("*.png"))
        columns = {"image": [str(path) for path in files], "context": [path.parent.name for path in files]}
        with pytest.raises(ValueError, match="The column 'image' holds .*, not images. Name another --image_column"):
            run(rows=from_dataset(Dataset.from_dict(columns)))

    def test_a_base_with_classes_needs_their_column(self, run, data):
        rows = from_dataset(labeled(data, [0, 1, 2, 3]))
        for changes in ({}, {"class_column": "number"}):
            with pytest.raises(
                ValueError, match="conditioned on classes, but --class_column=(None|number) names no col"
            ):
                run("ddpm_classes", rows=rows, **changes)

    def test_a_base_without_classes_takes_no_column_of_them(self, run, data):
        message = "--class_column=digit was given, but this DDPMPipeline takes no classes"
        with pytest.raises(ValueError, match=message):
            run(rows=from_dataset(labeled(data, [0, 1, 2, 3])), class_column="digit")

    @pytest.mark.parametrize(
        ("labels", "held_out", "message"),
        [
            ([0, 7, 4], 0, "--class_column=digit holds 7, but this .* is conditioned on classes 0 to 4. Correct"),
            ([0, None, 4], 0, "--class_column=digit holds None, but"),
            ([0, -1, 4], 0, "--class_column=digit holds -1, but"),
            ([0, 1, 4], 5, "--class_column=digit holds 5, but"),
            (["0", "1", "2"], "0", "holds Value.'string'., and must hold the numbers of classes. Name another column"),
        ],
    )
    def test_labels_that_the_base_has_not(self, labels, held_out, message, run, data):
        rows = labeled(data, [*labels, held_out])
        with pytest.raises(ValueError, match=message):
            run("ddpm_classes", rows=from_dataset(rows), class_column="digit")

    def test_captions_for_a_base_that_takes_none(self, run, tmp_path):
        root = write_folders(tmp_path / "captioned", captions=True)
        with pytest.raises(ValueError, match="The data has captions, but DDPMPipeline takes none"):
            run(root=root)

    def test_a_missing_folder(self, run, data, tmp_path):
        with pytest.raises(FileNotFoundError, match="nowhere' is not a folder. Give the folder that holds one folder"):
            run(root=tmp_path / "nowhere")
        shutil.rmtree(data / "obs")
        with pytest.raises(ValueError, match="The data cannot be trained on:\n- .*observational"):
            run()

    def test_an_unreadable_image(self, run, data):
        (data / "thick" / "1.png").write_bytes(b"no image")
        with pytest.raises(ValueError, match=f"The data cannot be trained on:\n- .*{data}/thick/1.png"):
            run()

    def test_the_folder_of_another_run(self, run, tmp_path):
        (tmp_path / "out" / "checkpoint-3").mkdir(parents=True)
        with pytest.raises(FileExistsError, match="holds checkpoints of another run. Go on with it by --resume_from"):
            run()
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["checkpoint-3"]

    @pytest.mark.parametrize("wanted", ["checkpoint-4", "/nowhere/checkpoint-4", "samples"])
    def test_a_checkpoint_that_does_not_exist(self, wanted, run, tmp_path):
        for name in ("checkpoint-3", "samples"):
            (tmp_path / "out" / name).mkdir(parents=True)
        with pytest.raises(FileNotFoundError, match=f"={wanted} is not a checkpoint. .*there are: checkpoint-3. Give"):
            run(resume_from_checkpoint=wanted)

    def test_latest_without_a_checkpoint_begins(self, run):
        """So that the same command can be given again and again."""
        with pytest.raises(AssertionError, match="training began"):
            run(resume_from_checkpoint="latest")
