"""A Hub that cannot be reached at the end of a training: the adapter is safe, and the message says how to push it."""

import re
import shlex
from pathlib import Path

import pytest

from hf_causal_context.cli import main
from hf_causal_context.training import recipe
from hf_causal_context.training.arguments import TrainingArguments
from hf_causal_context.training.finetune import train

from ..training.small import settings, write_folders

pytestmark = pytest.mark.usefixtures("on_cpu")


@pytest.fixture
def given(hub, pipeline_folder, tmp_path):
    """Settings of a training on a base of the Hub, to be pushed."""
    base = Path(pipeline_folder("ddpm"))
    files = {path.relative_to(base).as_posix(): path.read_bytes() for path in base.rglob("*") if path.is_file()}
    hub.server.create("user/base").edit(files)
    return settings(
        "user/base",
        write_folders(tmp_path / "data"),
        tmp_path / "out",
        push_to_hub=True,
        hub_model_id="user/adapter",
        num_inference_steps=1,
    )


@pytest.mark.parametrize("status", ["drop", 503])
def test_a_hub_that_is_gone_at_the_end_costs_nothing(status, given, hub, tmp_path, monkeypatch):
    write_card = recipe.write_card

    def write_card_and_lose_the_hub(folder):
        write_card(folder)
        hub.server.fail_next(".", status=status, times=10**6)

    monkeypatch.setattr(recipe, "write_card", write_card_and_lose_the_hub)
    command = f"hf-causal-context push --adapter {tmp_path}/out --repo_id user/adapter"
    expected = rf"The adapter is trained and in {tmp_path}/out, but not on the Hub: (?s:.*)Push it with `({command})`"
    with pytest.raises(OSError, match=expected) as raised:
        train(TrainingArguments(**given))
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "card.json", "README.md", "checkpoint-2"} <= names
    assert "user/adapter" not in hub.server.repositories

    hub.server.faults.clear()
    (said,) = re.findall("`(hf-causal-context push.*?)`", str(raised.value))[-1:]
    assert main(shlex.split(said)[1:]) == 0
    pushed = hub.server.repositories["user/adapter"]
    weights = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    assert pushed.at().files["adapter_model.safetensors"].content == weights
