"""One call gives an adapter on its base; what comes back is saved and pushed as the adapter that it is."""

import copy
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import diffusers
import huggingface_hub
import pytest
import torch
import transformers
from diffusers import DiffusionPipeline
from peft import PeftModelForCausalLM, PeftModelForSeq2SeqLM

from hf_causal_context import (
    AdapterError,
    AutoCausalContextModel,
    CausalContextPipeline,
    intervene,
    load_context_adapter,
    unload_context_adapter,
)
from hf_causal_context.hub import load

from ..test_pipelines import build, run, write_adapter
from ..training.small_language import language_model, word_tokenizer

BASE, REPO = "user/base", "user/adapter"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
CONCEPTS = ("thick", "slant")


def images(pipe, name="stable_diffusion"):
    pipe.set_progress_bar_config(disable=True)
    with intervene(pipe, {"thick": 1.0, "slant": -0.5}):
        return run(name, pipe)


def upload(folder, repo_id, private=None, **kwargs):
    huggingface_hub.create_repo(repo_id, private=private, exist_ok=True)
    huggingface_hub.upload_folder(repo_id=repo_id, folder_path=folder, **kwargs)


def name_base(folder, base):
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's, with a base that is no name
    for path in folder.rglob(CONFIG):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": str(base)}))
    return folder


@pytest.fixture
def base(tmp_path):
    build("stable_diffusion").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def adapter(base, tmp_path):
    """An adapter of a denoiser and a text encoder, which names its base."""
    pipe = build("stable_diffusion")
    folder = write_adapter(pipe.unet, tmp_path / "adapter", concepts=CONCEPTS)
    write_adapter(pipe.text_encoder, folder / "text_encoder", concepts=CONCEPTS, target_modules=["q_proj"])
    return name_base(folder, base)


@pytest.fixture
def expected(base, adapter):
    return images(load_context_adapter(DiffusionPipeline.from_pretrained(base), adapter))


class TestPipelines:
    def test_a_folder_gives_the_bases_own_pipeline_with_the_adapter(self, adapter, expected):
        pipe = CausalContextPipeline.from_pretrained(adapter)
        assert isinstance(pipe, diffusers.StableDiffusionPipeline)
        assert type(pipe).__name__ == "StableDiffusionPipeline"
        assert torch.equal(images(pipe), expected)
        assert torch.equal(images(load(adapter)), expected)

    def test_a_private_adapter_takes_its_token_to_its_private_base(self, hub, base, adapter, expected):
        upload(base, BASE, private=True)
        upload(name_base(adapter, BASE), REPO, private=True)
        hub.login(None)
        with pytest.raises(FileNotFoundError, match="may be read without a"):
            CausalContextPipeline.from_pretrained(REPO)
        for call in (CausalContextPipeline.from_pretrained, load):
            assert torch.equal(images(call(REPO, token="hf_user")), expected)

    def test_a_revision_and_a_subfolder_are_the_adapters(self, hub, base, adapter, expected):
        upload(base, BASE)
        huggingface_hub.create_repo(REPO)
        huggingface_hub.create_branch(REPO, branch="old")
        upload(name_base(adapter, BASE), REPO, path_in_repo="runs/first", revision="old")
        pipe = CausalContextPipeline.from_pretrained(REPO, revision="old", subfolder="runs/first")
        assert torch.equal(images(pipe), expected)
        with pytest.raises(FileNotFoundError, match="user/adapter/runs/first holds no adapter"):
            CausalContextPipeline.from_pretrained(REPO, subfolder="runs/first")

    def test_a_subfolder_of_a_folder(self, adapter, expected, tmp_path):
        shutil.copytree(adapter, tmp_path / "all" / "first")
        assert torch.equal(images(CausalContextPipeline.from_pretrained(tmp_path / "all", subfolder="first")), expected)

    def test_options_are_those_of_diffusers(self, hub, base, adapter, tmp_path):
        scheduler = diffusers.DDIMScheduler()
        pipe = CausalContextPipeline.from_pretrained(
            adapter, dtype=torch.bfloat16, scheduler=scheduler, device_map="cpu"
        )
        assert pipe.scheduler is scheduler
        assert {p.dtype for part in (pipe.unet, pipe.text_encoder) for p in part.parameters()} == {torch.bfloat16}
        assert pipe.hf_device_map == "cpu"
        upload(base, BASE)
        upload(name_base(adapter, BASE), REPO)
        before = set(hub.home.rglob("*.safetensors"))
        CausalContextPipeline.from_pretrained(REPO, cache_dir=tmp_path / "cache")  # the adapter's files, too
        assert set(hub.home.rglob("*.safetensors")) == before
        assert len(list((tmp_path / "cache").rglob(WEIGHTS))) == 2
        CausalContextPipeline.from_pretrained(REPO, cache_dir=tmp_path / "cache", local_files_only=True)

    @pytest.mark.filterwarnings("ignore:.*torch_dtype.*deprecated")
    def test_the_older_word_torch_dtype_still_works(self, adapter):
        pipe = CausalContextPipeline.from_pretrained(adapter, torch_dtype=torch.bfloat16)
        assert pipe.unet.dtype == pipe.text_encoder.dtype == torch.bfloat16

    @pytest.mark.filterwarnings("ignore:.*prepare_for_inference")
    def test_a_quantized_base(self, adapter, expected):
        torchao = pytest.importorskip("torchao.quantization")
        weights = diffusers.TorchAoConfig(torchao.Int8WeightOnlyConfig())
        config = diffusers.PipelineQuantizationConfig(quant_mapping={"unet": weights})
        pipe = CausalContextPipeline.from_pretrained(adapter, quantization_config=config)
        assert type(pipe.unet.conv_in.weight.data) is torch.Tensor
        target = pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_q
        assert type(target.base_layer.weight.data) is not torch.Tensor
        assert 0 < (images(pipe) - expected).abs().max() < 0.1

    def test_any_pipeline_not_only_those_that_can_be_trained(self, tmp_path):
        pipe = build("wan")
        pipe.save_pretrained(tmp_path / "base")
        adapter = name_base(write_adapter(pipe.transformer, tmp_path / "adapter", concepts=CONCEPTS), tmp_path / "base")
        again = CausalContextPipeline.from_pretrained(adapter)
        assert isinstance(again, diffusers.WanPipeline)
        assert again.transformer.peft_config["default"].concepts == CONCEPTS

    def test_another_kind_of_adapter_or_base_is_refused(self, base, adapter, tmp_path):
        with pytest.raises(ValueError, match="in Python, CausalContextPipeline.from_pretrained loads it"):
            AutoCausalContextModel.from_pretrained(adapter)
        with pytest.raises(FileNotFoundError, match="which is not here. Give --pre.*In Python, load the base yourself"):
            CausalContextPipeline.from_pretrained(name_base(adapter, tmp_path / "gone"))
        with pytest.raises(OSError, match="is not a saved diffusers pipeline"):
            CausalContextPipeline.from_pretrained(name_base(adapter, base / "unet"))
        with pytest.raises(TypeError, match="Call CausalContextPipeline.from_pretrained"):
            CausalContextPipeline()


class TestSaving:
    @pytest.fixture
    def pipe(self, adapter):
        return CausalContextPipeline.from_pretrained(adapter)

    def test_it_saves_the_adapter_which_the_same_call_loads(self, pipe, adapter, expected, tmp_path):
        (tmp_path / "saved").mkdir()
        (tmp_path / "saved" / "notes.txt").write_text("mine")
        pipe.save_pretrained(tmp_path / "saved")
        files = {path.relative_to(tmp_path / "saved").as_posix() for path in (tmp_path / "saved").rglob("*.*")}
        assert files == {CONFIG, WEIGHTS, f"text_encoder/{CONFIG}", f"text_encoder/{WEIGHTS}", "notes.txt"}
        assert torch.equal(images(CausalContextPipeline.from_pretrained(tmp_path / "saved")), expected)

    def test_a_part_of_an_adapter_that_was_there_before_goes(self, pipe, expected, tmp_path):
        pipe.save_pretrained(tmp_path / "saved")
        (tmp_path / "saved" / "text_encoder_2").mkdir()
        (tmp_path / "saved" / "text_encoder_2" / CONFIG).write_text("{}")
        pipe.save_pretrained(tmp_path / "saved")
        assert not (tmp_path / "saved" / "text_encoder_2" / CONFIG).exists()
        assert torch.equal(images(CausalContextPipeline.from_pretrained(tmp_path / "saved")), expected)

    @pytest.mark.parametrize("twin", [copy.deepcopy, lambda pipe: pickle.loads(pickle.dumps(pipe))])
    def test_copies_save_the_adapter_too(self, twin, pipe, tmp_path):
        twin(pipe).save_pretrained(tmp_path / "saved")
        assert (tmp_path / "saved" / WEIGHTS).exists()
        assert not (tmp_path / "saved" / "model_index.json").exists()

    @pytest.mark.filterwarnings("ignore:.* was saved without its causal context adapter")
    def test_diffusers_own_call_saves_the_base_as_well(self, pipe, expected, tmp_path):
        DiffusionPipeline.save_pretrained(pipe, tmp_path / "whole")
        whole = DiffusionPipeline.from_pretrained(tmp_path / "whole")
        assert type(whole) is diffusers.StableDiffusionPipeline
        assert torch.equal(images(load_context_adapter(whole, tmp_path / "whole")), expected)
        with pytest.raises(ValueError, match="holds a whole pipeline, and an adapter would overwrite"):
            pipe.save_pretrained(tmp_path / "whole")

    def test_without_its_adapter_it_is_the_base_and_saved_as_such(self, pipe, tmp_path):
        unload_context_adapter(pipe)
        assert type(pipe) is diffusers.StableDiffusionPipeline
        pipe.save_pretrained(tmp_path / "base-again")
        assert (tmp_path / "base-again" / "model_index.json").exists()

    def test_options_of_a_whole_pipeline_are_refused(self, pipe, tmp_path):
        with pytest.raises(TypeError, match="max_shard_size, variant would have no effect. .* save the base"):
            pipe.save_pretrained(tmp_path / "own", variant="fp16", max_shard_size="1GB")
        with pytest.raises(ValueError, match="safe_serialization=False: adapters are written as safetensors only"):
            pipe.save_pretrained(tmp_path / "own", safe_serialization=False)
        assert not (tmp_path / "own").exists()
        pipe.save_pretrained(tmp_path / "own", safe_serialization=True)

    def test_two_adapters_are_no_single_one(self, pipe, adapter, tmp_path):
        load_context_adapter(pipe, adapter, "other")
        with pytest.raises(ValueError, match="several adapters \\('default', 'other'\\), and a folder holds one"):
            pipe.save_pretrained(tmp_path / "saved")

    def test_an_adapter_that_diffusers_took_off_is_told(self, pipe, tmp_path):
        pipe.unload_lora_weights()
        for save in (pipe.save_pretrained, pipe.push_to_hub):
            with pytest.raises(ValueError, match="no causal context adapter any more.*Load one with load_context_adap"):
                save(str(tmp_path / "saved"))
        assert not (tmp_path / "saved").exists()

    def test_it_pushes_the_adapter_with_a_card(self, hub, base, adapter, expected):
        upload(base, BASE)
        pipe = CausalContextPipeline.from_pretrained(name_base(adapter, BASE))
        address = pipe.push_to_hub(REPO, private=True)
        repository = hub.server.repositories[REPO]
        assert address == f"{hub.server.endpoint}/{REPO}/commit/{repository.at().sha}"
        assert repository.private
        files = repository.contents()
        assert {*files} == {CONFIG, WEIGHTS, f"text_encoder/{CONFIG}", f"text_encoder/{WEIGHTS}"} | {
            *("README.md", ".gitattributes")
        }
        card = huggingface_hub.ModelCard(files["README.md"].decode())
        assert (card.data.library_name, card.data.base_model) == ("peft", BASE)
        assert f'CausalContextPipeline.from_pretrained("{REPO}")' in card.text
        assert torch.equal(images(CausalContextPipeline.from_pretrained(REPO)), expected)
        repository.edit({"README.md": "# Mine\n"})
        pipe.push_to_hub(REPO)
        assert repository.contents()["README.md"] == b"# Mine\n"

    def test_saving_can_push_as_well(self, hub, base, adapter, tmp_path):
        upload(base, BASE)
        pipe = CausalContextPipeline.from_pretrained(name_base(adapter, BASE))
        pipe.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id=REPO)
        assert (tmp_path / "saved" / WEIGHTS).read_bytes() == hub.server.repositories[REPO].contents()[WEIGHTS]

    def test_a_base_that_nobody_else_has_is_not_pushed(self, hub, pipe):
        with pytest.raises(ValueError, match="is a folder of this machine, which nobody who downloads"):
            pipe.push_to_hub(REPO)
        assert REPO not in hub.server.repositories


class TestLanguageModels:
    @pytest.fixture(params=["llama", "t5"])
    def adapter(self, request, tmp_path):
        model = language_model(request.param)
        model.save_pretrained(tmp_path / "base")
        word_tokenizer(bos=request.param != "t5").save_pretrained(tmp_path / "base")
        t5 = request.param == "t5"
        options = {"task_type": "SEQ_2_SEQ_LM" if t5 else "CAUSAL_LM", "target_modules": ["q"] if t5 else ["q_proj"]}
        return name_base(write_adapter(model, tmp_path / "adapter", concepts=CONCEPTS, **options), tmp_path / "base")

    @staticmethod
    def logits(model):
        ids = torch.arange(3, 9)[None]
        decoder = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
        with torch.no_grad():
            return model(ids, **decoder, context="thick").logits

    def test_the_task_chooses_the_class(self, adapter):
        model = AutoCausalContextModel.from_pretrained(adapter)
        assert type(model) is (PeftModelForSeq2SeqLM if model.config.is_encoder_decoder else PeftModelForCausalLM)
        assert not model.training
        assert torch.equal(self.logits(model), self.logits(load(adapter)))

    def test_it_saves_the_adapter_which_the_same_call_loads(self, adapter, tmp_path):
        model = AutoCausalContextModel.from_pretrained(adapter)
        model.save_pretrained(tmp_path / "saved")
        assert not list((tmp_path / "saved").glob("model*"))
        again = AutoCausalContextModel.from_pretrained(tmp_path / "saved")
        assert torch.equal(self.logits(again), self.logits(model))

    def test_a_private_adapter_takes_its_token_to_its_private_base(self, hub, adapter):
        expected = self.logits(load(adapter))
        upload(adapter.parent / "base", BASE, private=True)
        upload(name_base(adapter, BASE), REPO, private=True, path_in_repo="runs/first")
        hub.login(None)
        model = AutoCausalContextModel.from_pretrained(REPO, subfolder="runs/first", token="hf_user")
        assert torch.equal(self.logits(model), expected)

    def test_options_are_those_of_transformers_and_of_peft(self, adapter):
        model = AutoCausalContextModel.from_pretrained(adapter, "mine", True, dtype=torch.bfloat16, device_map="cpu")
        assert model.dtype == torch.bfloat16
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert trained
        assert all(".mine" in name for name in trained)

    @pytest.mark.filterwarnings("ignore:.*prepare_for_inference")
    def test_a_quantized_base(self, adapter):
        torchao = pytest.importorskip("torchao.quantization")
        config = transformers.TorchAoConfig(torchao.Int8WeightOnlyConfig())
        model = AutoCausalContextModel.from_pretrained(adapter, quantization_config=config, dtype=torch.float32)
        weights = [m.base_layer.weight for m in model.modules() if hasattr(m, "causal_context_up")]
        assert all(type(weight.data) is not torch.Tensor for weight in weights)
        difference = (self.logits(model) - self.logits(load(adapter))).abs().max()
        assert 0 < difference < 0.1

    def test_an_adapter_of_another_base_is_refused(self, adapter):
        config = json.loads((adapter / CONFIG).read_text())
        (adapter / CONFIG).write_text(json.dumps(config | {"concept_rank": 3}))
        with pytest.raises(AdapterError):
            AutoCausalContextModel.from_pretrained(adapter)
        with pytest.raises(ValueError, match="adapter of a language model, .*AutoCausalContextModel.from_pretrained"):
            CausalContextPipeline.from_pretrained(adapter)


@pytest.mark.slow
def test_a_language_model_needs_no_diffusers(tmp_path):
    model = language_model("llama")
    model.save_pretrained(tmp_path / "base")
    options = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj"]}
    adapter = name_base(write_adapter(model, tmp_path / "adapter", concepts=CONCEPTS, **options), tmp_path / "base")
    code = (
        "import sys; sys.modules['diffusers'] = None\n"
        "from hf_causal_context import AutoCausalContextModel\n"
        f"print(type(AutoCausalContextModel.from_pretrained({str(adapter)!r})).__name__)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.stdout.strip() == "PeftModelForCausalLM", done.stderr
