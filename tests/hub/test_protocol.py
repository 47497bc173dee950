"""The package's loading, and PEFT's and diffusers' own, against a Hub: revisions, tokens, the cache and faults."""

import json
from pathlib import Path

import huggingface_hub
import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub.errors import HfHubHTTPError
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_causal_context  # noqa: F401 (before PEFT reads an adapter)
from hf_causal_context import intervene, load_context_adapter

from ..test_pipelines import build, run, write_adapter
from ..training.small_language import TOKENIZER, adapted, language_model

REPO, BASE = "user/name", "user/base"
CONTEXT = {"thick": 1.0, "slant": -0.5}
WEIGHTS = "adapter_model.safetensors"
DOWNLOADS = r"GET (/storage/|.*/resolve/)"


@pytest.fixture
def adapter(tmp_path):
    """A folder with an adapter for the tiny DDIM pipeline, and what else people put beside one."""
    folder = write_adapter(build("ddim").unet, tmp_path / "adapter")
    (folder / "README.md").write_text("---\nlibrary_name: peft\ntags: [causal-context]\n---\n# Mine\n")
    (folder / "images").mkdir()
    (folder / "images" / "grid.png").write_bytes(bytes(range(256)))
    return folder


def upload(folder, repo_id=REPO, **kwargs):
    huggingface_hub.create_repo(repo_id, exist_ok=True, private=kwargs.pop("private", None))
    return huggingface_hub.upload_folder(repo_id=repo_id, folder_path=folder, **kwargs)


def scaled(folder, factor):
    """Write other weights."""
    weights = load_file(folder / WEIGHTS)
    save_file({key: factor * value for key, value in weights.items()}, folder / WEIGHTS, metadata={"format": "pt"})


def images(pipe):
    with intervene(pipe, CONTEXT):
        return run("ddim", pipe)


def loaded(source, **kwargs):
    return images(load_context_adapter(build("ddim"), source, **kwargs))


def downloaded(hub):
    """How many files of what kind were fetched, and how many bytes."""
    requests = [request for request in hub.server.requests(DOWNLOADS) if request.status != 302]
    return len(requests), sum(request.sent for request in requests)


class TestRevisions:
    def test_a_repository_gives_what_its_folder_gives(self, hub, adapter):
        commit = upload(adapter)
        assert commit.oid == hub.server.repositories[REPO].branches["main"]
        assert torch.equal(loaded(REPO), loaded(adapter))

    def test_branch_tag_and_sha(self, hub, adapter):
        first = upload(adapter).oid
        expected = {"v1": loaded(adapter)}
        huggingface_hub.create_tag(REPO, tag="v1")
        scaled(adapter, 2.0)
        second = upload(adapter).oid
        expected["main"] = loaded(adapter)
        huggingface_hub.create_branch(REPO, branch="try/other", revision=first)
        scaled(adapter, 2.0)
        upload(adapter, revision="try/other")
        expected["try/other"] = loaded(adapter)
        expected |= {first: expected["v1"], second: expected["main"]}
        assert not torch.equal(expected["v1"], expected["main"])
        assert not torch.equal(expected["main"], expected["try/other"])
        for revision, images in expected.items():
            assert torch.equal(loaded(REPO, revision=revision), images), revision
        assert torch.equal(loaded(REPO), expected["main"])

    def test_a_revision_that_is_not_there(self, hub, adapter):
        upload(adapter)
        with pytest.raises(FileNotFoundError, match="user/name has no revision 'v9'"):
            loaded(REPO, revision="v9")

    def test_a_repository_without_an_adapter(self, hub):
        hub.server.create(REPO).edit({"README.md": "nothing"})
        with pytest.raises(FileNotFoundError, match="user/name holds no adapter: there is no adapter_config.json"):
            loaded(REPO)


class TestTokens:
    @pytest.mark.parametrize(
        ("token", "message"),
        [(None, "log in.*HF_TOKEN"), ("hf_other", "log in.*HF_TOKEN"), ("hf_unknown", "401|HF_TOKEN")],
    )
    def test_a_private_repository_is_hidden_from_others(self, hub, adapter, token, message):
        upload(adapter, private=True)
        hub.login(token)
        with pytest.raises(OSError, match=f"user/name .*{message}"):
            loaded(REPO)
        assert downloaded(hub) == (0, 0)

    def test_a_private_repository_with_a_token(self, hub, adapter):
        upload(adapter, private=True)
        hub.login("hf_reader")
        assert torch.equal(loaded(REPO), loaded(adapter))
        hub.login(None)
        hub.new_cache()
        assert torch.equal(loaded(REPO, token="hf_user"), loaded(adapter))
        hub.login("hf_user")
        hub.new_cache()
        with pytest.raises(OSError, match="user/name .*log in"):
            loaded(REPO, token=False)

    def test_a_gated_repository(self, hub, adapter):
        hub.server.create(REPO, gated=True)
        upload(adapter)
        assert torch.equal(loaded(REPO), loaded(adapter))
        hub.login("hf_other")
        hub.new_cache()
        with pytest.raises(PermissionError, match="user/name is gated: accept its terms"):
            loaded(REPO)


class TestCache:
    def test_only_an_adapters_files_are_downloaded(self, hub, adapter):
        upload(adapter)
        hub.server.log.clear()
        loaded(REPO)
        files = {request.path.split("/", 5)[-1] for request in hub.server.requests("HEAD .*/resolve/")}
        assert files == {"adapter_config.json", WEIGHTS}
        sizes = [(adapter / name).stat().st_size for name in files]
        assert downloaded(hub) == (2, sum(sizes))

    def test_adapters_of_components_come_along(self, hub, tmp_path):
        pipe = build("stable_diffusion")
        folder = write_adapter(pipe.unet, tmp_path / "adapter")
        write_adapter(pipe.text_encoder, folder / "text_encoder")
        (folder / "other").mkdir()
        (folder / "other" / WEIGHTS).write_bytes(b"\0")
        upload(folder)
        hub.server.log.clear()
        load_context_adapter(pipe, REPO)
        assert pipe.text_encoder.peft_config["default"].concepts == ("thick", "slant", "size")
        assert downloaded(hub)[0] == 4

    def test_a_second_load_downloads_nothing(self, hub, adapter):
        upload(adapter)
        images = loaded(REPO)
        hub.server.log.clear()
        assert torch.equal(loaded(REPO), images)
        assert downloaded(hub) == (0, 0)
        assert [str(request) for request in hub.server.log] == ["GET /api/models/user/name/revision/main"]

    def test_only_what_changed_is_downloaded_again(self, hub, adapter):
        upload(adapter)
        loaded(REPO)
        scaled(adapter, 2.0)
        upload(adapter)
        hub.server.log.clear()
        assert torch.equal(loaded(REPO), loaded(adapter))
        assert downloaded(hub) == (1, (adapter / WEIGHTS).stat().st_size)

    def test_offline_from_the_cache(self, hub, adapter):
        upload(adapter)
        loaded(REPO)
        hub.offline()
        hub.server.log.clear()
        assert torch.equal(loaded(REPO), loaded(adapter))
        hub.new_cache()
        with pytest.raises(ConnectionError, match="HF_HUB_OFFLINE is set"):
            loaded(REPO)
        assert not hub.server.log

    @pytest.mark.slow
    def test_offline_in_a_fresh_process(self, hub, client, adapter, tmp_path):
        upload(adapter)
        build("ddim").save_pretrained(tmp_path / "base")
        loaded(REPO)
        hub.server.log.clear()
        code = f"""
from diffusers import DiffusionPipeline
from hf_causal_context import load_context_adapter
pipe = load_context_adapter(DiffusionPipeline.from_pretrained({str(tmp_path / "base")!r}), {REPO!r})
print(sorted(pipe.unet.peft_config))
"""
        offline = client(code, HF_HUB_OFFLINE="1", HF_HUB_CACHE=huggingface_hub.constants.HF_HUB_CACHE)
        assert offline.stdout == "['default']\n", offline.stderr
        assert not hub.server.log

    def test_a_fresh_process_gets_what_this_one_gets(self, hub, client, adapter):
        upload(adapter, private=True)
        code = f"from huggingface_hub import snapshot_download; print(snapshot_download({REPO!r}))"
        folder = Path(client(code).stdout.strip())
        assert (folder / WEIGHTS).read_bytes() == (adapter / WEIGHTS).read_bytes()
        assert "RepositoryNotFoundError" in client(code, HF_TOKEN=None, HF_HUB_CACHE=str(hub.new_cache())).stderr

    def test_an_unreachable_hub_uses_the_cache(self, hub, adapter):
        upload(adapter)
        images = loaded(REPO)
        hub.server.fail_next("GET /api/", status=503, times=99)
        assert torch.equal(loaded(REPO), images)
        hub.new_cache()
        with pytest.raises(ConnectionError, match="user/name .*could not be read .*503"):
            loaded(REPO)


class TestFaults:
    @pytest.mark.parametrize("after_bytes", [0, 500, 3000])
    def test_a_download_that_is_cut_goes_on_where_it_stopped(self, hub, adapter, after_bytes, monkeypatch):
        monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 500)  # what is kept: whole chunks
        upload(adapter)
        hub.server.fail_next("GET /storage/", status="drop", after_bytes=after_bytes)
        hub.server.log.clear()
        assert torch.equal(loaded(REPO), loaded(adapter))
        sent = [request.sent for request in hub.server.requests("GET /storage/")]
        assert sent == [after_bytes, (adapter / WEIGHTS).stat().st_size - after_bytes]

    def test_a_download_that_fails_leaves_nothing_that_loads(self, hub, adapter):
        upload(adapter)
        hub.server.fail_next("GET /storage/", status="drop", after_bytes=3000, times=99)
        pipe = build("ddim")
        before = {key: value.clone() for key, value in pipe.unet.state_dict().items()}
        with pytest.raises(ConnectionError, match="user/name .*peer closed"):
            load_context_adapter(pipe, REPO)
        assert pipe.unet.state_dict().keys() == before.keys()
        hub.server.faults.clear()
        hub.offline()
        with pytest.raises(ConnectionError, match="cache does not hold it whole"):
            loaded(REPO)
        hub.offline(False)
        assert torch.equal(loaded(REPO), loaded(adapter))

    def test_a_commit_that_fails_changes_nothing(self, hub, adapter):
        upload(adapter)
        repository = hub.server.repositories[REPO]
        before = repository.at()
        scaled(adapter, 2.0)
        hub.server.fail_next("POST .*/commit/", status=503)
        with pytest.raises(HfHubHTTPError, match="503"):
            upload(adapter)
        assert repository.at() == before
        hub.server.log.clear()
        upload(adapter)
        assert not hub.server.requests("PUT /storage/")
        assert repository.contents()[WEIGHTS] == (adapter / WEIGHTS).read_bytes()


class TestPeft:
    @pytest.fixture
    def texts(self, hub, tmp_path):
        """A base and an adapter with its tokenizer on the Hub; returns the adapted model."""
        language_model("llama").save_pretrained(tmp_path / "base")
        TOKENIZER.save_pretrained(tmp_path / "base")
        upload(tmp_path / "base", BASE)
        model = adapted("llama")
        model.peft_config["default"].base_model_name_or_path = BASE
        model.save_pretrained(tmp_path / "adapter")
        TOKENIZER.save_pretrained(tmp_path / "adapter")
        (tmp_path / "adapter" / "README.md").unlink()
        upload(tmp_path / "adapter")
        hub.server.log.clear()
        return model

    @staticmethod
    def logits(model):
        return model(torch.arange(3, 9)[None], context="formal").logits

    def test_auto_class_and_tokenizer(self, texts):
        model = AutoPeftModelForCausalLM.from_pretrained(REPO)
        assert torch.equal(self.logits(model), self.logits(texts))
        assert AutoTokenizer.from_pretrained(REPO)("the dog")["input_ids"] == TOKENIZER("the dog")["input_ids"]

    def test_from_pretrained(self, texts):
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), REPO)
        assert torch.equal(self.logits(model), self.logits(texts))

    def test_offline(self, hub, texts):
        AutoPeftModelForCausalLM.from_pretrained(REPO)
        hub.offline()
        hub.server.log.clear()
        model = AutoPeftModelForCausalLM.from_pretrained(REPO)
        assert torch.equal(self.logits(model), self.logits(texts))
        assert not hub.server.log

    def test_push_to_hub_of_peft(self, hub, texts):
        texts.push_to_hub("user/stock", private=True)
        files = hub.server.repositories["user/stock"].contents()
        assert {"adapter_config.json", WEIGHTS, "README.md"} <= files.keys()
        assert json.loads(files["adapter_config.json"])["concepts"] == ["formal", "loud"]
        model = AutoPeftModelForCausalLM.from_pretrained("user/stock")
        assert torch.equal(self.logits(model), self.logits(texts))

    def test_base_and_adapter_of_a_pipeline(self, hub, adapter, tmp_path):
        build("ddim").save_pretrained(tmp_path / "base")
        upload(tmp_path / "base", BASE)
        pipe = DiffusionPipeline.from_pretrained(BASE)
        pipe.set_progress_bar_config(disable=True)
        upload(adapter)
        assert torch.equal(images(load_context_adapter(pipe, REPO)), loaded(adapter))
        other = build("ddim")
        PeftModel.from_pretrained(other.unet, REPO)
        assert torch.equal(images(other), loaded(adapter))

    def test_a_lora_is_refused(self, hub, tmp_path):
        unet = build("ddim").unet
        get_peft_model(unet, LoraConfig(target_modules=["to_q"])).save_pretrained(tmp_path / "lora")
        (tmp_path / "lora" / "README.md").unlink()
        upload(tmp_path / "lora")
        with pytest.raises(ValueError, match="user/name is a .*LORA adapter"):
            loaded(REPO)


class TestServer:
    """What the other tests rely on: it refuses what a Hub refuses."""

    @pytest.mark.parametrize(
        ("card", "problem"),
        [
            ("a: [", "Invalid YAML"),
            ("- a", "must be an object"),
            ("pipeline_tag: drawing", '"pipeline_tag" must be one of'),
            ("license: mine", '"license" must be one of'),
            ("base_model: /home/me/base", '"base_model" with value .* is not valid'),
            ("base_model_relation: friend", '"base_model_relation" must be one of'),
            ("tags: causal", '"tags" must be an array'),
            ("tags: ['']", "strings that are not empty"),
            ("model-index:\n- results: []", '"model-index" is not valid'),
        ],
    )
    def test_cards(self, hub, adapter, card, problem):
        (adapter / "README.md").write_text(f"---\n{card}\n---\n# Mine\n")
        with pytest.raises(ValueError, match=f"Invalid metadata in README.md.\n- .*{problem}"):
            upload(adapter)
        assert not hub.server.requests("PUT|/commit/")

    def test_writing_needs_the_right_token(self, hub, adapter):
        for token, message in (("hf_other", "rights to write"), ("hf_reader", "rights to write"), (None, "401")):
            hub.login(token)
            with pytest.raises(HfHubHTTPError, match=message):
                upload(adapter)
        assert not hub.server.repositories

    def test_an_outdated_parent(self, hub, adapter):
        parent = upload(adapter).oid
        hub.server.repositories[REPO].edit({"README.md": "edited"})
        scaled(adapter, 2.0)
        with pytest.raises(HfHubHTTPError, match="A commit has happened since"):
            upload(adapter, parent_commit=parent)

    def test_the_storage_sees_no_tokens(self, hub, adapter):
        upload(adapter, private=True)
        loaded(REPO)
        requests = hub.server.requests("/storage/")
        assert {request.method for request in requests} == {"PUT", "GET"}
        assert {request.user for request in requests} == {None}
        assert {request.status for request in requests} == {200}
