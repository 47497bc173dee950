"""`--train_text_encoder`: one adapter with a part on the denoiser and on each text encoder."""

import inspect
import json
import re
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hf_causal_context import CausalContextConfig, intervene, load_context_adapter
from hf_causal_context._files import CONFIG
from hf_causal_context.bases.families.flux import Flux
from hf_causal_context.bases.loading import load_base
from hf_causal_context.cli import main
from hf_causal_context.layers import RepresentationLayer
from hf_causal_context.training.arguments import TrainingArguments
from hf_causal_context.training.denoiser.objectives import Batch, denoising_objective
from hf_causal_context.training.denoiser.text_encoders import AdaptedPipeline
from hf_causal_context.training.finetune import train
from hf_causal_context.training.loop.checkpoints import save_model
from hf_causal_context.training.loop.corruption import find_corruption
from hf_causal_context.training.noise import Draws

from .small import adapter_weights, assert_close_to_largest, settings, write_folders
from .tiny_pipelines import SLOWLY

CAPTIONS = ["a cat", "two dogs", "a cat"]
MASK = torch.tensor([[1.0, 0.0], [0.0, 0.5], [0.0, 0.0]])
OLDER = ["stable_diffusion", "stable_diffusion_xl", "stable_diffusion_3", "flux", "pixart_sigma"]
EVERY = [*OLDER, "pixart_alpha", *SLOWLY]


def attach(model, unused=None, init_weights=False):
    config = {"concepts": ("slant", "thick"), "concept_rank": 2, "exclude_modules": unused}
    return get_peft_model(model, CausalContextConfig(**config, init_weights=init_weights))


def adapted(folder, **options):
    torch.manual_seed(0)
    base = load_base(folder)
    denoiser = attach(base.denoiser, **options)
    return base, AdaptedPipeline(base, denoiser, lambda *given: attach(*given, **options))


def batch_for(base, rows=slice(None)):
    size = base.size_multiple * 2 // base._vae_scale
    clean = torch.randn(3, base.in_channels, size, size, generator=torch.Generator().manual_seed(0))
    slots = range(3)[rows]
    return Batch(clean[rows], MASK[rows], {}, Draws(0, slots), captions=CAPTIONS[rows])


def gradients(model):
    return {key: parameter.grad for key, parameter in model.named_parameters() if parameter.requires_grad}


def only_known(gradients):
    """Without those of parts of a denoiser that it does not need."""
    return {key: gradient for key, gradient in gradients.items() if gradient is not None}


@pytest.mark.parametrize("name", EVERY)
def test_gradients_are_those_of_a_step_written_by_hand(name, pipeline_folder):
    base, model = adapted(pipeline_folder(name))
    model.train()
    model(denoising_objective(base), batch_for(base)).sum().backward()
    parts = dict(model.named_children())

    # Adapters of PEFT on each component; rows one by one, each inside of its context.
    other = load_base(pipeline_folder(name))
    objective = denoising_objective(other)
    written = {}
    for part, trained in parts.items():
        component = other.denoiser if part == "denoiser" else getattr(other.pipe, part)
        written[part] = attach(component, trained.peft_config["default"].exclude_modules)
        set_peft_model_state_dict(written[part], get_peft_model_state_dict(trained))
    written["denoiser"].train()
    for row in range(3):
        batch = batch_for(other, slice(row, row + 1))
        with ExitStack() as stack:
            for each in written.values():
                stack.enter_context(intervene(each, batch.context))
            if name == "stable_diffusion":
                options = {"padding": "max_length", "max_length": 16, "truncation": True, "return_tensors": "pt"}
                ids = other.pipe.tokenizer(batch.captions, **options).input_ids
                conditions = {"encoder_hidden_states": other.pipe.text_encoder(ids)[0]}
            else:
                conditions = other.encode_captions_with_gradients(batch.captions)
        objective(written["denoiser"], replace(batch, conditions=conditions)).sum().backward()
    for part, trained in parts.items():
        expected = only_known(gradients(written[part]))
        assert_close_to_largest(only_known(gradients(trained)), expected, 1e-4)
        assert max(gradient.abs().max() for gradient in expected.values()) > 1e-5, part


@pytest.mark.parametrize("name", EVERY)
def test_all_of_the_encoders_gets_gradients_also_when_they_are_checkpointed(name, pipeline_folder):
    base, model = adapted(pipeline_folder(name))
    model.train()
    encoders = {part: encoder for part, encoder in model.named_children() if part != "denoiser"}
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.enable_gradient_checkpointing()
        model(denoising_objective(base), batch_for(base)).sum().backward()
        found.append({name: gradients(encoder) for name, encoder in encoders.items()})
        assert all(gradient is not None for part in found[-1].values() for gradient in part.values())
        model.zero_grad()
    for part, expected in found[0].items():
        assert_close_to_largest(found[1][part], expected, 1e-4)


def test_activations_of_encoders_are_computed_again(pipeline_folder):
    base, model = adapted(pipeline_folder("pixart_sigma"))
    model.train()
    model.enable_gradient_checkpointing()
    calls = []
    base.pipe.text_encoder.encoder.block[0].layer[0].register_forward_hook(lambda *given: calls.append(1))
    model(denoising_objective(base), batch_for(base)).sum().backward()
    assert len(calls) == 2


def test_layers_whose_output_does_not_reach_the_denoiser_are_left_out(pipeline_folder):
    _, model = adapted(pipeline_folder("stable_diffusion_xl"))
    first, second = (model.get_submodule(name).targeted_module_names for name in ("text_encoder", "text_encoder_2"))
    assert {path.split("layers.")[1][0] for path in first} == {"0"}  # the last one's is not used
    assert {path.split("layers.")[1][0] for path in second} == {"0", "1"}  # but pooled here


@pytest.mark.parametrize(("kept", "encoders"), [("encoder_hidden_states", {"text_encoder_2"}), ("neither", set())])
def test_an_encoder_that_does_not_reach_the_denoiser_is_left_as_it_is(kept, encoders, pipeline_folder):
    base = load_base(pipeline_folder("flux"))

    class Deaf(type(base)):
        def encode_captions(self, captions):
            encoded = inspect.unwrap(Flux.encode_captions)(self, captions)
            return {name: values if name == kept else values.detach() for name, values in encoded.items()}

    base.__class__ = Deaf
    if not encoders:
        with pytest.raises(
            ValueError, match="--train_text_encoder: .* of FluxPipeline has no effect on what the denoi"
        ):
            AdaptedPipeline(base, attach(base.denoiser), attach)
        return
    model = AdaptedPipeline(base, attach(base.denoiser), attach)
    assert {name for name, _ in model.named_children()} == {"denoiser", *encoders}
    assert not any("causal_context" in name for name in base.pipe.text_encoder.state_dict())


@pytest.mark.parametrize("name", ["stable_diffusion", "pixart_sigma"])
def test_a_fresh_adapter_leaves_the_loss_as_it_is_without_dropout(name, pipeline_folder):
    base, model = adapted(pipeline_folder(name), init_weights=True)
    conditions = base.encode_captions(CAPTIONS)
    objective, batch = denoising_objective(base), batch_for(base)
    model.train()
    expected = objective(model.denoiser, replace(batch_for(base), conditions=conditions))
    assert torch.equal(model(objective, batch), expected)


def test_dropout_hides_features_from_the_adapters_of_encoders(pipeline_folder):
    base, model = adapted(pipeline_folder("stable_diffusion"))
    objective = denoising_objective(base)
    torch.manual_seed(0)
    for share in (0.0, 0.5):
        for module in model.text_encoder.modules():
            if isinstance(module, RepresentationLayer):
                module.dropout = share
        first, second = (model.train()(objective, batch_for(base)) for _ in range(2))
        assert torch.equal(first, second) == (share == 0)
        first, second = (model.eval()(objective, batch_for(base)) for _ in range(2))
        assert torch.equal(first, second)


@pytest.fixture
def run(pipeline_folder, tmp_path, on_cpu):
    """A function: settings -> the folder of an adapter that was trained with its text encoders."""
    data = write_folders(tmp_path / "data", captions=True)

    def call(name="stable_diffusion", output_dir="out", **changes):
        changes = {"train_text_encoder": True, "resolution": 16, **changes}
        given = settings(pipeline_folder(name), data, tmp_path / output_dir, **changes)
        return train(TrainingArguments(**given))

    return call


def of_all(folder, *parts):
    return {f"{part}/{name}": w for part in ("", *parts) for name, w in adapter_weights(Path(folder, part)).items()}


@torch.no_grad()
def sample(base, contexts=None, seeds=(0, 1, 2)):
    pipe = base.pipe
    pipe.set_progress_bar_config(disable=True)
    generator = [torch.Generator().manual_seed(seed) for seed in seeds]
    call = {"height": 16, "width": 16, "num_inference_steps": 2, "output_type": "pt", "guidance_scale": 3.0}
    with intervene(pipe, contexts) if contexts is not None else ExitStack():
        return pipe(prompt=["a cat"] * len(seeds), generator=generator, **call, **base.sampling_options).images


@pytest.mark.parametrize("name", OLDER)
def test_the_adapter_has_a_part_for_each_and_loads_into_the_pipeline(name, run, pipeline_folder):
    # Validations sample with all parts.
    sampling = {"validation_steps": 1, "num_validation_images": 1, "num_inference_steps": 1}
    folder = run(name, text_encoder_rank=2, **sampling)
    base = load_base(pipeline_folder(name))
    pipe = base.pipe
    plain = sample(base)
    parts = list(base.text_encoders)
    for part in parts:
        config = json.loads((folder / part / "adapter_config.json").read_text())
        assert (config["concept_rank"], config["observational_rank"]) == (2, 8)
        assert config["concepts"] == ["slant", "thick"]
        assert config["base_model_name_or_path"] == pipeline_folder(name)
        weights = adapter_weights(folder / part)
        assert any(tensor.abs().max() > 1e-4 for key, tensor in weights.items() if "up" in key), part

    load_context_adapter(pipe, folder)
    assert torch.equal(sample(base), plain)
    contexts = ["slant", (), "slant+thick"]
    mixed = sample(base, contexts)
    for number, context in enumerate(contexts):
        alone = sample(base, context, seeds=[number])
        torch.testing.assert_close(mixed[number], alone[0], rtol=1e-4, atol=1e-5)
    assert (mixed - plain).abs().max() > 1e-4
    for part in parts:
        with intervene(pipe, "slant"):
            told = base.encode_captions(["a cat"])
        silent = base.encode_captions(["a cat"])
        assert any((told[key] - silent[key]).abs().max() > 1e-5 for key in told if told[key].is_floating_point()), part


@pytest.mark.parametrize("changes", [{"dropout": 0.3}, {"streaming": True}])
def test_a_run_resumes_bit_for_bit(changes, run):
    changes |= {"use_ema": True, "text_encoder_learning_rate": 2e-2, "checkpointing_steps": 2, "observational_steps": 1}
    changes |= {"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 3, "max_train_steps": 4}
    whole = of_all(run(output_dir="whole", **changes), "text_encoder")
    parts = {**changes, "output_dir": "parts", "resume_from_checkpoint": "latest"}
    run(**parts | {"max_train_steps": 2})
    resumed = of_all(run(**parts), "text_encoder")
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())


@pytest.mark.parametrize(
    "changes", [{"mixed_precision": "bf16", "gradient_checkpointing": True}, {"quantization": "int8"}]
)
def test_encoders_in_fewer_bits_train_too(changes, run):
    folder = run("stable_diffusion_3", **changes)
    for part in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        weights = adapter_weights(folder / part)
        assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
        assert max(tensor.abs().max() for name, tensor in weights.items() if "up" in name) > 1e-3, part


def test_each_has_its_learning_rate_which_a_resumed_run_may_change(run):
    changes = {"text_encoder_learning_rate": 2e-3, "lr_scheduler": "cosine", "checkpointing_steps": 1}
    changes |= {"max_train_steps": 2, "report_to": "tensorboard"}

    def rates(folder):
        groups = torch.load(folder / "checkpoint-1" / "optimizer.bin", weights_only=True)["param_groups"]
        return [pytest.approx((group["initial_lr"], group["lr"])) for group in groups]

    folder = run(**changes)
    assert rates(folder) == [(1e-2, 5e-3), (2e-3, 1e-3)]
    (events,) = (folder / "logs" / "hf_causal_context").glob("events.out.*")
    log = EventAccumulator(str(events.parent)).Reload()
    for name, rate in {"learning_rate": 5e-3, "text_encoder_learning_rate": 1e-3}.items():
        assert log.Scalars(name)[0].value == pytest.approx(rate), name

    again = {"resume_from_checkpoint": "checkpoint-1", "text_encoder_learning_rate": 4e-3, "max_train_steps": 3}
    folder = run(**changes | again)
    groups = torch.load(folder / "checkpoint-2" / "optimizer.bin", weights_only=True)["param_groups"]
    assert [group["initial_lr"] for group in groups] == [1e-2, 4e-3]


def test_a_damaged_part_of_a_checkpoint_is_found(run):
    checkpoint = run(checkpointing_steps=2) / "checkpoint-2"
    assert find_corruption(checkpoint) is None
    weights = checkpoint / "text_encoder" / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert find_corruption(checkpoint) == "text_encoder/adapter_model.safetensors: its checksum is wrong"
    weights.unlink()
    assert find_corruption(checkpoint) == "text_encoder/adapter_model.safetensors missing"


def test_two_processes_train_what_one_does(together, start, pipeline_folder, tmp_path):
    data = write_folders(tmp_path / "data", captions=True)
    changes = {"train_text_encoder": True, "resolution": 16, "max_train_steps": 3, "observational_steps": 1}
    given = settings(pipeline_folder("stable_diffusion_xl"), data, tmp_path / "one", **changes, train_batch_size=4)
    runs = [start(given), *together(given | {"output_dir": str(tmp_path / "two"), "train_batch_size": 2}, 2)]
    assert [run.wait() for run in runs] == [str(tmp_path / name) for name in ("one", "two", "two")]
    one, two = (of_all(tmp_path / name, "text_encoder", "text_encoder_2") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


def test_a_dry_run_counts_all_parts_and_keeps_the_encoders(run, capsys):
    plain, both = [], []
    for found, changes in ((plain, {"train_text_encoder": False}), (both, {})):
        run(dry_run=True, **changes)
        output = capsys.readouterr().out
        found += [int(re.findall(r"The adapter has ([\d,]+) parameters", output)[0].replace(",", ""))]
        found += [output.count("before the first step only")]
    # q_proj and v_proj of two layers, 16 wide: of two concepts with 4 rows each, and an observational part of 16.
    assert both[0] - plain[0] == 4 * (8 + 16) * (16 + 16)
    assert (plain[1], both[1]) == (2, 0)


def test_the_command_line_trains_exports_and_generates(pipeline_folder, tmp_path, on_cpu):
    data = write_folders(tmp_path / "data", captions=True)
    given = settings(pipeline_folder("stable_diffusion"), data, tmp_path / "adapter", resolution=16)
    words = [word for key, value in given.items() for word in (f"--{key}", str(value))]
    assert main(["train", *words, "--train_text_encoder", "--gradient_checkpointing"]) == 0
    export = ["export", "--adapter", given["output_dir"], "--output_dir", str(tmp_path / "lora")]
    assert main([*export, "--context", "slant", "--format", "diffusers"]) == 0
    plain, lora = (load_base(pipeline_folder("stable_diffusion")) for _ in range(2))
    lora.pipe.load_lora_weights(tmp_path / "lora" / "slant.safetensors")
    load_context_adapter(plain.pipe, given["output_dir"])
    torch.testing.assert_close(sample(lora), sample(plain, "slant"), rtol=1e-4, atol=1e-4)
    assert set(lora.pipe.get_list_adapters()) == {"unet", "text_encoder"}
    assert "text encoders are adapted, too" in (tmp_path / "adapter" / "README.md").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_encoder_rank": 2}, "--text_encoder_rank=2 is for text encoders that are trained. Add --train_text"),
        ({"text_encoder_learning_rate": 1.0}, "--text_encoder_learning_rate=1.0 is for text encoders that are"),
        ({"train_text_encoder": True, "text_encoder_rank": 0}, "--text_encoder_rank=0 must be at least 1"),
        ({"train_text_encoder": True, "text_encoder_learning_rate": 0.0}, "_rate=0.0 must be positive"),
        ({"train_text_encoder": True, "shard_base": True}, "--shard_base cuts the denoiser only"),
        (
            {"train_text_encoder": True, "text_encoder_learning_rate": 2.0, "optimizer": "prodigy", "learning_rate": 1},
            "--optimizer=prodigy finds one learning rate for all, .*=2.0 cannot differ from --learning_rate=1. Leave",
        ),
    ],
)
def test_settings_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainingArguments(**{"pretrained_model_name_or_path": "base", "output_dir": "out", **changes})


def test_a_base_without_captions_is_refused(run, tmp_path):
    write_folders(tmp_path / "plain")
    with pytest.raises(ValueError, match="--train_text_encoder was given, but DDPMPipeline takes no captions. Leave"):
        run("ddpm", train_data_dir=str(tmp_path / "plain"))


def test_a_run_without_encoders_leaves_none_of_an_earlier_run(pipeline_folder, tmp_path):
    base = load_base(str(pipeline_folder("stable_diffusion")))
    (tmp_path / "text_encoder").mkdir()
    (tmp_path / "text_encoder" / CONFIG).write_text("{}")
    (tmp_path / "text_encoder" / "notes.txt").write_text("mine")
    save_model(attach(base.denoiser), tmp_path)
    assert {path.name for path in (tmp_path / "text_encoder").iterdir()} == {"notes.txt"}
    assert (tmp_path / CONFIG).exists()
