"""`save`, `push` and `load`: what travels, what stays, and what is left after a fault."""

import json
import shutil

import huggingface_hub
import pytest
import torch
from peft import PeftModel

from hf_causal_context import intervene
from hf_causal_context._files import CONFIG
from hf_causal_context.hub import load, push, save

from ..test_pipelines import build, run, write_adapter
from ..training.small_language import TOKENIZER, adapted, language_model
from .conftest import Client
from .server import HubServer
from .test_protocol import WEIGHTS, scaled

REPO, BASE = "user/digits", "user/base"
CARD = "README.md"
EDITED = "---\ntags: [mine]\n---\n# My own words\n"


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    build("ddim").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def saved(base_folder, tmp_path_factory):
    """What `save` makes of an adapter whose base is on the Hub."""
    home, adapter, folder = (tmp_path_factory.mktemp("saved") / name for name in ("home", "adapter", "digits"))
    home.mkdir()
    write_adapter(build("ddim").unet, adapter, concepts=("thick", "slant"))
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": BASE}))
    (adapter / "training_arguments.json").write_text(json.dumps({"max_train_steps": 7, "learning_rate": 1e-3}))
    with HubServer() as server, pytest.MonkeyPatch.context() as patch:
        client = Client(server, home, patch)
        put_base(client, base_folder)
        save(adapter, folder, num_inference_steps=1)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(saved, tmp_path / "digits")


def put_base(hub, folder):
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    hub.server.create(BASE).edit(files)


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def changed(repository, revision="main"):
    """Paths in which the last commit differs from the one before it."""
    new, old = (commit.files for commit in repository.history(revision)[:2])
    return {path for path in {*new, *old} if new.get(path) != old.get(path)}


def arrived(hub):
    return {request.path for request in hub.server.requests("PUT /storage") if request.status == 200}


def images(pipe):
    pipe.set_progress_bar_config(disable=True)
    with intervene(pipe, "thick+slant"):
        return run("ddim", pipe)


@pytest.fixture
def pushed(hub, folder):
    """The repository after a push, and an empty log."""
    push(folder, REPO)
    hub.server.log.clear()
    return hub.server.repositories[REPO]


class TestContents:
    @pytest.mark.parametrize("private", [None, True])
    def test_one_commit_holds_the_whole_folder(self, hub, folder, private):
        url = push(folder, REPO, private=private, commit_message="Mine")
        repository = hub.server.repositories[REPO]
        new, first = repository.history()
        assert (new.title, first.title) == ("Mine", "initial commit")
        assert url == f"{hub.server.endpoint}/{REPO}/commit/{new.sha}"
        here, there = contents(folder), repository.contents()
        assert {*here, ".gitattributes"} == {*there}
        assert {path for path in here if here[path] != there[path]} <= {CARD}
        assert repository.private == bool(private)
        for place in ("pictures/", "loras/"):
            assert any(path.startswith(place) for path in there), place
        assert {CARD, WEIGHTS, "adapter_config.json", "training_arguments.json"} <= there.keys()

    def test_the_card_is_accepted_and_names_the_repository(self, hub, pushed):
        card = huggingface_hub.ModelCard.load(REPO)
        card.validate()
        assert card.data.base_model == BASE
        assert "causal-context" in card.data.tags
        assert f'"{REPO}"' in card.text
        assert huggingface_hub.model_info(REPO).library_name == card.data.library_name

    def test_nothing_names_a_folder_of_this_machine(self, pushed, tmp_path):
        root = str(tmp_path.parent).encode()
        assert not [path for path, content in pushed.contents().items() if root in content]

    def test_hidden_files_stay_here(self, hub, folder):
        (folder / ".cache").mkdir()
        (folder / ".cache" / "secret").write_text("1")
        (folder / ".env").write_text("2")
        push(folder, REPO)
        assert {path for path in hub.server.repositories[REPO].contents() if "." in path[0]} == {".gitattributes"}


class TestAgain:
    def test_without_changes_nothing_travels(self, hub, pushed, folder):
        before = pushed.at()
        assert push(folder, REPO).endswith(f"/commit/{before.sha}")
        assert pushed.at() == before
        assert not hub.server.requests("PUT|/commit/")

    def test_only_changed_weights_travel(self, hub, pushed, folder):
        scaled(folder, 2.0)
        push(folder, REPO)
        assert changed(pushed) == {WEIGHTS}
        (sent,) = hub.server.requests("PUT")
        assert sent.received == (folder / WEIGHTS).stat().st_size
        (commit,) = hub.server.requests("POST .*/commit/")
        assert commit.received < 1000

    def test_images_that_are_gone_are_removed_and_the_files_of_others_kept(self, pushed, folder):
        pushed.edit({"pictures/old.png": b"\0", "loras/old.safetensors": b"\0", "notes.txt": "mine"})
        push(folder, REPO)
        assert changed(pushed) == {"pictures/old.png", "loras/old.safetensors"}
        assert pushed.contents()["notes.txt"] == b"mine"

    def test_a_part_that_the_adapter_no_longer_has_is_removed(self, pushed, folder):
        """Whoever loads the repository would get it, too."""
        pushed.edit(
            {f"text_encoder/{CONFIG}": "{}", f"text_encoder/{WEIGHTS}": b"\0", "text_encoder/notes.txt": "mine"}
        )
        push(folder, REPO)
        assert changed(pushed) == {f"text_encoder/{CONFIG}", f"text_encoder/{WEIGHTS}"}

    def test_an_edited_card_is_kept(self, pushed, folder, capsys):
        pushed.edit({CARD: EDITED})
        scaled(folder, 2.0)
        push(folder, REPO)
        assert pushed.contents()[CARD].decode() == EDITED
        assert changed(pushed) == {WEIGHTS}
        assert f"The card of {REPO} was edited on the Hub, and is kept" in capsys.readouterr().out

    def test_a_card_with_one_more_word_is_edited(self, pushed, folder):
        words = pushed.contents()[CARD].decode().replace("# digits", "# Digits of mine", 1)
        pushed.edit({CARD: words})
        (folder / "results.md").write_text("Much better.\n")
        push(folder, REPO)
        assert pushed.contents()[CARD].decode() == words

    def test_a_generated_card_is_replaced(self, pushed, folder):
        (folder / "results.md").write_text("Much better.\n")
        push(folder, REPO)
        assert changed(pushed) == {CARD, "results.md"}
        assert "Much better." in pushed.contents()[CARD].decode()

    def test_a_card_edited_here_replaces_a_generated_one(self, pushed, folder):
        (folder / CARD).write_text(EDITED)
        push(folder, REPO)
        assert pushed.contents()[CARD].decode() == EDITED

    def test_a_deleted_card_comes_back(self, pushed, folder):
        card = pushed.contents()[CARD]
        pushed.edit({CARD: None})
        push(folder, REPO)
        assert pushed.contents()[CARD] == card

    def test_an_edit_during_the_push_is_not_lost(self, pushed, folder, monkeypatch):
        commit = huggingface_hub.HfApi.create_commit

        def edited_first(api, *args, **kwargs):
            pushed.edit({CARD: EDITED})
            return commit(api, *args, **kwargs)

        monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", edited_first)
        (folder / "results.md").write_text("Much better.\n")
        with pytest.raises(ConnectionError, match="Somebody else pushed to .*Run the same command again"):
            push(folder, REPO)
        assert pushed.contents()[CARD].decode() == EDITED

    @pytest.mark.parametrize("seen", [True, False])
    def test_an_edited_card_that_cannot_be_read_is_not_replaced(self, hub, pushed, folder, seen):
        if seen:
            push(folder, REPO)  # and so the cache holds the generated card
        else:
            hub.new_cache()
        pushed.edit({CARD: EDITED})
        (folder / "results.md").write_text("Much better.\n")
        hub.server.fail_next(f"(HEAD|GET) .*/resolve/.*{CARD}", status=503, times=99)
        with pytest.raises(OSError, match=f"{REPO} did not finish|check your connection"):
            push(folder, REPO)
        assert pushed.contents()[CARD].decode() == EDITED


class TestRevisions:
    def test_load_by_revision(self, hub, pushed, folder, base_folder):
        put_base(hub, base_folder)
        old = images(load(REPO))
        first = pushed.at().sha
        scaled(folder, 2.0)
        push(folder, REPO)
        new = images(load(REPO))
        assert not torch.equal(old, new)
        assert torch.equal(images(load(REPO, revision=first)), old)
        assert torch.equal(images(load(folder)), new)

    @pytest.mark.parametrize("branch", ["bolder", "try/bolder"])
    def test_a_branch_is_made(self, hub, pushed, folder, base_folder, branch):
        put_base(hub, base_folder)
        main = pushed.at()
        scaled(folder, 2.0)
        push(folder, REPO, revision=branch)
        assert pushed.at() == main
        assert changed(pushed, branch) == {WEIGHTS, CARD}  # whose code loads the branch
        assert torch.equal(images(load(REPO, revision=branch)), images(load(folder)))
        scaled(folder, 2.0)
        push(folder, REPO, revision=branch)
        assert len(pushed.history(branch)) == 4

    def test_a_new_repository_with_a_branch(self, hub, folder):
        push(folder, REPO, revision="first")
        assert WEIGHTS in hub.server.repositories[REPO].contents("first")
        assert set(hub.server.repositories[REPO].contents("main")) == {".gitattributes"}

    def test_an_edited_card_of_a_branch_is_kept(self, pushed, folder):
        push(folder, REPO, revision="other")
        pushed.edit({CARD: EDITED}, branch="other")
        (folder / "results.md").write_text("Much better.\n")
        push(folder, REPO, revision="other")
        assert pushed.contents("other")[CARD].decode() == EDITED
        push(folder, REPO)
        assert "Much better." in pushed.contents()[CARD].decode()

    def test_a_language_model(self, hub, tmp_path):
        language_model("llama").save_pretrained(tmp_path / "base")
        TOKENIZER.save_pretrained(tmp_path / "base")
        put_base(hub, tmp_path / "base")
        model = adapted("llama")
        model.peft_config["default"].base_model_name_or_path = BASE
        model.save_pretrained(tmp_path / "adapter")
        TOKENIZER.save_pretrained(tmp_path / "adapter")
        folder = save(tmp_path / "adapter", tmp_path / "style", prompt="the dog", max_new_tokens=2)
        push(folder, "user/style", private=True)
        hub.new_cache()
        again = load("user/style")
        assert isinstance(again, PeftModel)
        inputs = torch.arange(3, 9)[None].to(again.device)
        expected = model(inputs.cpu(), context="formal").logits
        torch.testing.assert_close(again(inputs, context="formal").logits.cpu(), expected, rtol=1e-5, atol=1e-5)


class TestTokens:
    @pytest.mark.parametrize(
        ("token", "message"),
        [
            (None, f"let you write to {REPO} .*Log in with `hf auth login`, or set HF_TOKEN"),
            ("hf_unknown", f"let you write to {REPO} .*Log in with `hf auth login`, or set HF_TOKEN"),
            ("hf_reader", f"let you write to {REPO} .*HF_TOKEN to a token with the right to write"),
            ("hf_other", f"{REPO} is not yours: you are 'other', and may write under other"),
        ],
    )
    def test_without_the_right_token_nothing_is_sent(self, hub, folder, token, message):
        hub.login(token)
        with pytest.raises(PermissionError, match=message):
            push(folder, REPO)
        assert not hub.server.repositories
        assert not hub.server.requests("PUT|/commit/|preupload|batch|branch")
        assert token or not hub.server.log

    @pytest.mark.parametrize("token", [None, "hf_reader", "hf_other"])
    def test_a_repository_that_is_there(self, hub, folder, token):
        before = hub.server.create(REPO, private=True).at()
        hub.login(token)
        with pytest.raises(PermissionError, match="HF_TOKEN|is not yours"):
            push(folder, REPO, revision="mine")
        assert hub.server.repositories[REPO].at() == before
        assert set(hub.server.repositories[REPO].branches) == {"main"}

    def test_a_token_that_is_given(self, hub, folder, base_folder):
        put_base(hub, base_folder)
        hub.login(None)
        push(folder, REPO, private=True, token="hf_user")
        with pytest.raises(OSError, match="authenticated|HF_TOKEN"):
            load(REPO)
        hub.server.log.clear()
        assert torch.equal(images(load(REPO, token="hf_user")), images(load(folder)))
        assert 401 not in {request.status for request in hub.server.log}


class TestFaults:
    def test_a_dropped_upload(self, hub, pushed, folder):
        before = pushed.at()
        scaled(folder, 2.0)
        (folder / "pictures" / "new.png").write_bytes(bytes(300))
        weights = huggingface_hub.CommitOperationAdd(WEIGHTS, folder / WEIGHTS).upload_info.sha256.hex()
        hub.server.fail_next(f"PUT /storage/{weights}", status="drop", after_bytes=3000, times=99)
        with pytest.raises(ConnectionError, match=f"upload to {REPO} did not finish.*run the same command again"):
            push(folder, REPO)
        assert pushed.at() == before
        assert weights not in hub.server.objects
        assert not hub.server.requests("/commit/")
        there = arrived(hub)
        assert f"/storage/{weights}" not in there
        hub.server.faults.clear()
        hub.server.log.clear()
        push(folder, REPO)
        assert changed(pushed) == {WEIGHTS, "pictures/new.png"}
        assert f"/storage/{weights}" in arrived(hub)
        assert not arrived(hub) & there

    def test_a_short_interruption_is_not_noticed(self, hub, folder):
        hub.server.fail_next("PUT", status="drop", after_bytes=100, times=2)
        hub.server.fail_next("preupload|batch", status=503, times=2)
        push(folder, REPO)
        assert hub.server.repositories[REPO].contents()[WEIGHTS] == (folder / WEIGHTS).read_bytes()

    def test_a_commit_that_fails(self, hub, folder):
        hub.server.fail_next("POST .*/commit/", status=503)
        with pytest.raises(ConnectionError, match="503.*The repository is as it was; run the same command again"):
            push(folder, REPO)
        repository = hub.server.repositories[REPO]
        assert len(repository.history()) == 1
        hub.server.log.clear()
        push(folder, REPO)
        assert not hub.server.requests("PUT")
        assert repository.contents()[WEIGHTS] == (folder / WEIGHTS).read_bytes()

    @pytest.mark.parametrize("after_bytes", [0, 200])
    def test_a_commit_that_is_cut(self, hub, pushed, folder, after_bytes):
        before = pushed.at()
        scaled(folder, 2.0)
        hub.server.fail_next("POST .*/commit/", status="drop", after_bytes=after_bytes)
        with pytest.raises(ConnectionError, match="run the same command again"):
            push(folder, REPO)
        assert pushed.at() == before

    def test_a_commit_whose_answer_is_lost(self, hub, pushed, folder):
        scaled(folder, 2.0)
        hub.server.fail_next("POST .*/commit/", status="lose")
        with pytest.raises(ConnectionError, match="run the same command again"):
            push(folder, REPO)
        after = pushed.at()
        assert changed(pushed) == {WEIGHTS}
        assert push(folder, REPO).endswith(after.sha)
        assert pushed.at() == after

    @pytest.mark.parametrize("step", ["whoami", "repos/create", "preupload", "batch"])
    def test_a_hub_that_is_down(self, hub, folder, step):
        hub.server.fail_next(step, status="drop", times=99)
        with pytest.raises(ConnectionError, match=f"{REPO} did not finish.*run the same command again"):
            push(folder, REPO)
        assert not hub.server.requests("/commit/")

    def test_offline(self, hub, folder):
        hub.offline()
        with pytest.raises(ConnectionError, match="HF_HUB_OFFLINE"):
            push(folder, REPO)


class TestRefusals:
    @pytest.mark.parametrize("repo_id", ["", "a/b/c", "user/my digits", "user/..", "/tmp/digits", "user/", "-/x"])
    def test_what_is_no_name(self, hub, folder, repo_id):
        with pytest.raises(ValueError, match="is no name of a repository.*Give user/name"):
            push(folder, repo_id)
        assert not hub.server.log

    @pytest.mark.parametrize("name", ["adapter_config.json", WEIGHTS, CARD, "pictures", "loras"])
    def test_an_incomplete_folder(self, hub, folder, name):
        shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()
        with pytest.raises(FileNotFoundError, match=f"is not a complete folder for the Hub; it lacks .*{name}"):
            push(folder, REPO)
        assert not hub.server.log

    def test_a_folder_that_is_not_there(self, hub, folder):
        with pytest.raises(FileNotFoundError, match="is not a complete folder for the Hub"):
            push(folder / "nothing", REPO)
        assert not hub.server.log

    def test_a_base_of_this_machine(self, hub, folder, base_folder):
        card = json.loads((folder / "card.json").read_text())
        (folder / "card.json").write_text(json.dumps(card | {"base": str(base_folder)}))
        with pytest.raises(ValueError, match="is a folder of this machine.*Push the base first"):
            push(folder, REPO)
        assert not hub.server.log

    def test_a_card_that_the_hub_refuses(self, hub, folder):
        (folder / CARD).write_text("---\npipeline_tag: drawing\n---\n# Mine\n")
        with pytest.raises(ValueError, match='Invalid metadata in README.md.\n.*"pipeline_tag" must be one of'):
            push(folder, REPO)
        assert not hub.server.requests("PUT|/commit/")
