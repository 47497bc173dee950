"""Which layers carry which concept, against weights that are multiplied out."""

import itertools

import pytest
import torch
from accelerate import cpu_offload
from peft import get_peft_model
from torch import nn

from hf_causal_context import CausalContextConfig, bake, causal_effects
from hf_causal_context.adapter.effects import CausalEffects, _blocks_and_kinds, _mixing
from hf_causal_context.adapter.lookup import adapted_layers

from .small import VARIANTS, Mlp, adapted, gpt2

CONCEPT_NAMES = ("costs $5", "a$_^$", r"$\frac$")


@pytest.mark.parametrize("build", [Mlp, gpt2])
@pytest.mark.parametrize("variant", [name for name in VARIANTS if "expressive" not in name])
def test_changes_are_those_of_the_weights(build, variant):
    model = adapted(build(), alpha=2, **VARIANTS[variant])
    effects = causal_effects(model)
    layers = adapted_layers(model.get_base_model())
    assert effects.layers == tuple(layers)
    assert effects.changes.shape == (len(layers), 3)
    for row, layer in zip(effects.changes, layers.values(), strict=True):
        frozen = layer.get_base_layer().weight.norm()
        nothing = layer.get_delta_weight("default", torch.zeros(1, 3))
        for value, mask in zip(row, torch.eye(3), strict=True):
            change = layer.get_delta_weight("default", mask[None]) - nothing
            torch.testing.assert_close(value, (change.norm() / frozen).detach(), rtol=1e-4, atol=1e-7)


def test_weights_that_are_offloaded_cannot_be_read():
    model = adapted(gpt2(), target_modules=["c_attn"])
    cpu_offload(model.get_base_model(), execution_device=torch.device("cpu"))
    for read in (causal_effects, lambda model: bake(model, "thick")):
        with pytest.raises(ValueError, match="are offloaded now, so they cannot be read"):
            read(model)


def test_one_layer_by_hand():
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    model[0].weight.data = torch.tensor([[3.0, 0], [0, 4]])  # of size 5
    config = CausalContextConfig(concepts=("a", "b"), concept_rank=1, observational_rank=1, target_modules=["0"])
    model = get_peft_model(model, config)
    layer = adapted_layers(model)["base_model.model.0"]
    layer.causal_context_down["default"].weight.data = torch.tensor([[7.0, 7], [1, 0], [0, 2]])
    layer.causal_context_up["default"].weight.data = torch.tensor([[9.0, 0, 3], [9, 5, 4]])
    # Up_a Down_a = [[0, 0], [5, 0]] and Up_b Down_b = [[0, 6], [0, 8]]
    torch.testing.assert_close(causal_effects(model).changes, torch.tensor([[1.0, 2.0]]))
    layer.set_scale("default", -3.0)
    torch.testing.assert_close(causal_effects(model).changes, torch.tensor([[3.0, 6.0]]))


def test_without_mixing_changes_are_the_diagonal():
    effects = causal_effects(adapted(target_modules=["second"]))
    frozen = Mlp().second.weight.detach().norm()
    torch.testing.assert_close(effects.changes, effects.interventional.diagonal(dim1=1, dim2=2) / frozen)


def test_changes_do_not_depend_on_the_gauge():
    model = adapted(mechanism="structural", target_modules=["second"])
    before = causal_effects(model).changes
    layer = model.get_base_model().second
    with torch.no_grad():
        layer.causal_context_down["default"].weight[4:8] *= 3  # after the observational part
        layer.causal_context_up["default"].weight[:, 4:8] /= 3
        layer.causal("default").coefficients[:4] *= 3
        layer.causal("default").coefficients[:, :4] /= 3
    torch.testing.assert_close(causal_effects(model).changes, before)


def test_a_frozen_weight_of_zeros():
    model = adapted()
    model.get_base_model().second.base_layer.weight.data.zero_()
    assert causal_effects(model).changes.isfinite().all()


def test_matrices_are_where_the_weights_are():
    """A mechanism without parameters has none of its own to go by."""
    model = adapted(target_modules=["second"])
    layer = model.get_base_model().second.to("meta")
    assert _mixing(layer, "default", torch.ones(1, 3)).device.type == "meta"


class TestImages:
    @pytest.fixture(autouse=True)
    def _matplotlib(self):
        pytest.importorskip("matplotlib")

    def test_a_panel_for_each_concept_with_blocks_in_order(self, tmp_path):
        effects = causal_effects(adapted(gpt2()))
        *panels, bar = effects.plot_layers(tmp_path / "layers.png").axes
        assert [ax.get_title() for ax in panels] == ["thick", "slant", "size"]
        for number, ax in enumerate(panels):
            assert [label.get_text() for label in ax.get_xticklabels()] == ["c_attn"]
            torch.testing.assert_close(torch.tensor(ax.images[0].get_array().data)[:, 0], effects.changes[:, number])
            assert ax.get_ylim() == (1.5, -0.5)  # the first layer is at the top
        assert [label.get_text() for label in panels[0].get_yticklabels()] == ["0", "1"]
        assert "relative" in bar.get_ylabel()
        assert (tmp_path / "layers.png").stat().st_size > 10_000

    def test_blocks_are_numbered_where_names_repeat(self):
        names = [
            f"down.{stage}.attentions.{block}.{kind}"
            for stage, block in ((0, 0), (0, 1), (1, 0))
            for kind in ("attn1.to_q", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2")
        ]
        cells = _blocks_and_kinds([*names, "mid.attentions.0.attn1.to_q", "conv_in"])
        assert cells[:5] == [
            ("down.0.attentions.0", "attn1.to_q"),
            ("down.0.attentions.0", "attn1.to_out.0"),
            ("down.0.attentions.0", "ff.net.0.proj"),
            ("down.0.attentions.0", "ff.net.2"),
            ("down.0.attentions.1", "attn1.to_q"),
        ]
        assert cells[-2:] == [("mid.attentions.0", "attn1.to_q"), ("conv_in", "")]

    def test_layers_that_a_block_lacks_stay_empty(self, tmp_path):
        effects = CausalEffects(
            ("a",),
            ("0.first", "0.second", "1.first"),
            torch.zeros(3, 1, 1),
            torch.zeros(3, 1, 1),
            torch.tensor([[1.0], [2.0], [3.0]]),
        )
        ax, _ = effects.plot_layers(tmp_path / "layers.png").axes
        table = ax.images[0].get_array().filled(-1)
        assert table.tolist() == [[1, 2], [3, -1]]

    def test_many_layers_and_names_that_look_like_formulas(self, tmp_path):
        class Deep(nn.Module):
            def __init__(self):
                super().__init__()
                self.name_of_a_stack_that_is_long = nn.ModuleDict(
                    {f"$block_{i}$_" + "x" * (60 if i == 3 else 1): nn.Linear(3, 3) for i in range(100)}
                )

            def forward(self, x):
                for layer in self.name_of_a_stack_that_is_long.values():
                    x = layer(x)
                return x

        model = adapted(Deep(), concepts=CONCEPT_NAMES, target_modules=r".*block.*")
        effects = causal_effects(model)
        figure = effects.plot_layers(tmp_path / "layers.png")
        labels = figure.axes[0].get_yticklabels()
        assert len(labels) == 100
        assert labels[0].get_text() == "$block_0$_x"
        assert max(len(label.get_text()) for label in labels) == len("...") + 48
        figure.draw_without_rendering()
        boxes = [label.get_window_extent() for label in labels]
        assert all(box.x0 >= 0 for box in boxes)  # nothing is cut
        assert all(below.y1 <= above.y0 + 1 for above, below in itertools.pairwise(boxes))  # nor overlaps
        effects.plot(tmp_path / "effects.png")
        assert (tmp_path / "effects.png").stat().st_size > 10_000

    def test_one_layer_without_any_change(self, tmp_path):
        model = adapted(target_modules=["second"], init_weights=True)
        figure = causal_effects(model).plot_layers(tmp_path / "layers.png")
        assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["second"]
