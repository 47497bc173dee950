"""Class images: under their own prompt and the observational part alone, at their share of the batches."""

from itertools import islice

import pytest
import torch
from PIL import Image

from hf_causal_context.bases.loading import load_base
from hf_causal_context.contexts import Context
from hf_causal_context.data import load_folders
from hf_causal_context.training.arguments import TrainingArguments
from hf_causal_context.training.denoiser.batches import DenoiserBatches
from hf_causal_context.training.denoiser.class_images import class_images
from hf_causal_context.training.finetune import train
from hf_causal_context.training.loop.loss_record import LossRecord, kinds_of_contexts
from hf_causal_context.training.recipe import attach_adapter

from .small import adapter_weights, settings, write_folders

pytestmark = pytest.mark.usefixtures("on_cpu")
PROMPT = "a dog"
CPU = torch.device("cpu")


@pytest.fixture
def class_folder(tmp_path):
    (tmp_path / "class" / "more").mkdir(parents=True)
    for number, name in enumerate(("a.png", "b.png", "more/c.png")):
        Image.new("RGB", (16, 16), (0, 0, 60 * number)).save(tmp_path / "class" / name)
    return tmp_path / "class"


@pytest.fixture
def given(pipeline_folder, class_folder, tmp_path):
    def given(name="stable_diffusion", captions=False, **changes):
        root = tmp_path / f"data-{captions}"
        if not root.exists():
            write_folders(root, captions=captions)
        usual = {"class_data_dir": str(class_folder), "class_prompt": PROMPT, "resolution": 16, "train_batch_size": 4}
        if not captions:
            usual["instance_prompt"] = "my dog"
        return TrainingArguments(**settings(pipeline_folder(name), root, tmp_path / "out", **usual | changes))

    return given


@pytest.fixture
def make(given):
    def make(name="stable_diffusion", rank=0, world_size=1, **changes):
        arguments = given(name, **changes)
        data = load_folders(arguments.train_data_dir)
        base = load_base(arguments.pretrained_model_name_or_path)
        return DenoiserBatches(base, data, arguments, 40, CPU, rank, world_size)

    return make


def of_class(batches, batch):
    """Which samples are class images, by their latents, and which have the class's prompt."""
    base = batches._base
    colors = torch.stack([torch.tensor([-1.0, -1.0, number * 60 / 127.5 - 1]) for number in range(3)])
    latents = base.encode_images(colors[:, :, None, None].expand(-1, -1, 16, 16))
    shown = [any(torch.allclose(clean, one, atol=1e-4) for one in latents) for clean in batch.clean]
    prompt = base.encode_captions([PROMPT])["encoder_hidden_states"][0]
    named = [torch.allclose(row, prompt, atol=1e-5) for row in batch.conditions["encoder_hidden_states"]]
    return shown, named


@pytest.mark.parametrize(
    "changes",
    [{}, {"captions": True}, {"aspect_ratio_buckets": True}, {"random_flip": True}, {"caption_dropout": 0.5}],
)
@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_they_have_their_prompt_the_empty_context_and_their_share(weight, changes, make):
    batches, count = make(prior_loss_weight=weight, train_batch_size=6, **changes), 0
    for batch in islice(batches(0), 6):
        shown, named = of_class(batches, batch)
        assert shown == named
        assert not batch.context[torch.tensor(shown)].any()
        count += sum(shown)
    assert count == 36 * weight / (3 + weight)  # of three contexts with a share of 1


def test_resumed_runs_and_several_processes_see_the_same(make):
    whole = list(islice(make()(0), 6))
    for actual, expected in zip(islice(make()(3), 3), whole[3:], strict=True):
        assert torch.equal(actual.clean, expected.clean)
    halves = [make(rank=rank, world_size=2, train_batch_size=2)(0) for rank in range(2)]
    for expected, first, second in zip(whole[:4], *halves, strict=False):
        assert torch.equal(torch.cat([first.clean, second.clean]), expected.clean)


def test_they_are_not_measured_as_observational_rows(make):
    batches = make()
    assert len(batches.few("", 20).clean) == 4
    assert not any(of_class(batches, batches.few("", 20))[0])


def test_their_losses_are_not_those_of_observational_rows(make):
    batches = make(prior_loss_weight=3.0, train_batch_size=6)
    record = LossRecord(kinds_of_contexts(batches._data.concepts, ["", "slant", "thick"], "obs"), 1, 1, CPU)
    for batch in islice(batches(0), 6):
        shown = torch.tensor(of_class(batches, batch)[0])
        record.add(0, batch.context, torch.where(shown, 100.0, 1.0), batch.apart)
    assert record.sums[0].tolist() == [[6, 6, 6], [6, 6, 6]]


def test_a_run_tells_the_record_which_they_are(given, monkeypatch):
    told = []
    monkeypatch.setattr(LossRecord, "add", lambda self, place, context, losses, apart: told.extend(apart.tolist()))
    train(given(max_train_steps=2, train_batch_size=8, observational_steps=0))
    assert sum(told) == 4  # of 16, a quarter


@pytest.mark.parametrize(("observational", "learns"), [(0.0, False), (1.0, True)])
def test_in_the_bases_own_world_they_would_teach_nothing(observational, learns, make):
    """Why they are in the empty context: without the observational part, the adapter adds nothing whatever it is."""
    batches = make()
    base = batches._base
    model = attach_adapter(base.denoiser, batches._data, batches._arguments)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(0.1 * torch.randn_like(parameter))
    batch = next(batches(0))
    times = torch.arange(4)
    context = [Context(observational=observational)] * 4
    base.predict(model, batch.clean, times, batch.conditions, context).square().mean().backward()
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in trained) == learns


def test_a_run_resumes_with_them(given, tmp_path):
    changes = {"max_train_steps": 4, "checkpointing_steps": 2}
    train(given(**changes, class_prompt="one of the dogs"))
    whole = adapter_weights(tmp_path / "out")
    with pytest.raises(ValueError, match="--class_prompt: 'one of the dogs' then, 'a dog' now"):
        train(given(**changes, resume_from_checkpoint="checkpoint-2"))
    train(given(**changes, class_prompt="one of the dogs", resume_from_checkpoint="checkpoint-2"))
    for name, tensor in adapter_weights(tmp_path / "out").items():
        assert torch.equal(tensor, whole[name]), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_prompt": ""}, "--class_data_dir=.* and --class_prompt='' belong together. Give both, or none."),
        ({"class_data_dir": None}, "--class_data_dir=None and --class_prompt='a dog' belong together"),
        ({"class_prompt": "my dog"}, "--class_prompt='my dog' is --instance_prompt, too. Give another one"),
        ({"captions": True, "class_prompt": "a thick 1"}, "--class_prompt='a thick 1' is a caption of the data, too"),
        ({"streaming": True}, "--class_data_dir is read by number, which a stream has not"),
        ({"prior_loss_weight": 0.0}, "--prior_loss_weight=0.0 must be positive"),
        (
            {"name": "ddpm", "instance_prompt": ""},
            "--class_prompt='a dog' was given, but DDPMPipeline takes no captions",
        ),
    ],
)
def test_bad_settings_are_refused(changes, message, make):
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_an_image_that_cannot_be_read_is_named_before_any_is_encoded(make, class_folder):
    (class_folder / "bad.png").write_bytes((class_folder / "a.png").read_bytes()[:40])
    with pytest.raises(ValueError, match="class/bad.png' cannot be read: .* Replace or remove it."):
        make()


def test_masks_are_no_images_of_the_class(given, class_folder):
    (class_folder / "a.mask.png").write_bytes((class_folder / "a.png").read_bytes())
    assert class_images(given()) == [str(class_folder / name) for name in ("a.png", "b.png", "more/c.png")]


def test_a_folder_without_images_is_refused(make, tmp_path):
    with pytest.raises(ValueError, match="nowhere' has no images. Put images of the class into it"):
        make(class_data_dir=str(tmp_path / "nowhere"))
