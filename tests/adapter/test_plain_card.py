"""The card that PEFT's own `save_pretrained` leaves."""

import re

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel, get_peft_model
from torch import nn

from hf_causal_context import CausalContextConfig, intervene
from tests.training.small_language import language_model


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x)


def adapted(model=None, **settings):
    given = {"concepts": ("thick", "a|b"), "target_modules": ["linear"], "init_weights": False}
    return get_peft_model(Net() if model is None else model, CausalContextConfig(**given | settings))


def card(folder):
    return (folder / "README.md").read_text(encoding="utf-8")


def test_it_says_what_the_adapter_holds(tmp_path):
    model = adapted(observational_rank=3)
    model.peft_config["default"].base_model_name_or_path = "user/base"
    model.save_pretrained(tmp_path)
    text = " ".join(card(tmp_path).split())
    assert "[More Information Needed]" not in text
    assert "One adapter for the concepts *thick*, *a\\|b*, which" in text
    assert "It is for `user/base`" in text
    assert "Mechanism: `independent`, rank 4 for each concept, 3 for what is on in every context." in text
    data = ModelCard.load(tmp_path / "README.md").data
    assert data.library_name == "peft"
    assert {"causal-context", "hf_causal_context"} <= set(data.tags)


def test_its_code_runs(tmp_path):
    model = adapted(concepts=("thick", "slant")).eval()
    model.save_pretrained(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", card(tmp_path), re.DOTALL)
    base, x = Net(), torch.randn(2, 4)
    base.load_state_dict(
        {
            key.replace(".base_layer", ""): w
            for key, w in model.get_base_model().state_dict().items()
            if "causal" not in key
        }
    )
    names = {"base": base, "x": x}
    code = code.replace("this folder or repository", str(tmp_path)).replace("...  # call the model", "y = model(x)")
    exec(code, names)
    assert isinstance(names["model"], PeftModel)
    with intervene(model, "thick+slant"):
        assert torch.equal(names["y"], model(x))


def test_a_path_of_this_machine_is_not_on_it(tmp_path):
    language_model("llama").save_pretrained(tmp_path / "my-base")
    base = language_model("llama").from_pretrained(tmp_path / "my-base")
    adapted(base, target_modules=["q_proj"], task_type="CAUSAL_LM").save_pretrained(tmp_path / "adapter")
    assert str(tmp_path) not in (text := card(tmp_path / "adapter"))
    assert "It is for `my-base`" in text
    data = ModelCard.load(tmp_path / "adapter" / "README.md").data
    assert (data.base_model, data.pipeline_tag) == (None, "text-generation")


def test_it_is_made_again_at_every_save(tmp_path):
    for concepts in (("thick", "slant"), ("wide",)):
        adapted(concepts=concepts).save_pretrained(tmp_path)
    assert "*wide*" in card(tmp_path)
    assert "*thick*" not in card(tmp_path)


@pytest.mark.parametrize("text", ["# Mine\n", "---\nlicense: mit\n---\n# Mine\n"])
def test_another_card_is_kept(text, tmp_path):
    (tmp_path / "README.md").write_text(text)
    adapted().save_pretrained(tmp_path)
    assert "# Mine" in card(tmp_path)
    assert "causal context" not in card(tmp_path)


def test_no_card_comes_with_a_config_alone(tmp_path):
    CausalContextConfig(concepts=("thick",)).save_pretrained(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["adapter_config.json"]
