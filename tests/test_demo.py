"""The demo: what its buttons do, what it says when they cannot, its server, and the page in a browser."""

import os
import runpy
import shutil
import socket
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from PIL import Image

from hf_causal_context import CausalContextConfig, Context
from hf_causal_context.adapter.lookup import conditionings
from hf_causal_context.bases.loading import load_base
from hf_causal_context.cli import main
from hf_causal_context.inference import counterfactuals
from hf_causal_context.inference.sampling import generate
from hf_causal_context.messages.installation import installation

from .training.conftest import pipeline_folder  # noqa: F401 (a fixture)

gr = pytest.importorskip("gradio")
from hf_causal_context.demo import page as demo_module  # noqa: E402
from hf_causal_context.demo.page import DemoBackend, build_demo, demo_or_reason, launch  # noqa: E402
from hf_causal_context.demo.views import decoded, grid_html, legible, warned  # noqa: E402

APP = Path(__file__).parents[1] / "examples" / "space" / "app.py"
MARKUP = "<img src=x onerror=document.title='broken'>"
BROWSER = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
BROWSER += ["--disable-background-networking", "--disable-component-update"]
SMALL = (2, 0, 2)  # images, first seed, steps


@pytest.fixture
def adapted(pipeline_folder):  # noqa: F811
    """A function: name of a tiny pipeline -> its base with a new adapter that does something."""

    def attach(name, concepts=("thick", "slant"), **config):
        base = load_base(pipeline_folder(name))
        config = {"observational_rank": 0} | config
        settings = CausalContextConfig(concepts=concepts, init_weights=False, **config)
        get_peft_model(base.denoiser, settings)
        return base

    return attach


@pytest.fixture
def adapter(tmp_path, pipeline_folder):  # noqa: F811
    base = pipeline_folder("ddpm")
    model = get_peft_model(
        load_base(base).denoiser, CausalContextConfig(concepts=("thick",), observational_rank=0, init_weights=False)
    )
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def served():
    """A function: page -> its address, on a free port."""
    pages = []

    def serve(page):
        pages.append(page)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        return launch(page, port=port, wait=False)

    yield serve
    for page in pages:
        page.close(verbose=False)


def last(steps):
    *_, html = steps
    return html


def sources(html):
    return [part.split('"')[0] for part in html.split('src="')[1:]]


@pytest.mark.parametrize(
    ("name", "condition"), [("ddpm", ()), ("stable_diffusion", ("a digit",)), ("ddpm_classes", (3,)), ("dit", (3,))]
)
def test_every_handler_on_every_kind_of_base(adapted, name, condition):
    studio = DemoBackend(adapted(name))
    left = (1.0, 0.0, *condition, *SMALL)
    steps = list(studio.intervene(*left))
    assert [html.count("<img") for html in steps] == [0, 2, 4]  # a row at a time, in places that are there already
    assert [html.count("<i>") for html in steps] == [4, 2, 0]
    nothing, thick = sources(steps[-1])[:2], sources(steps[-1])[2:]
    assert len({*nothing, *thick}) == 4  # other seeds and other contexts are other images
    assert "no intervention, seed 1" in steps[-1]

    combined = sources(last(studio.combinations(["thick", "slant"], *left)))
    assert len(combined) == 8
    assert combined[:4] == [*nothing, *thick]  # as in the other tab

    swept = last(studio.sweep("slant", "0, 1", False, *left))
    assert sources(swept)[:2] == nothing
    assert "slant = 1" in swept
    assert sources(last(studio.sweep("slant", "0", True, *left))) == thick

    image = studio.sample("", *left)
    assert image.size == (studio.base.default_resolution,) * 2
    html = studio.counterfactual(image, "", "0, 1", *left)
    assert len(sources(html)) == 3
    assert "Reconstruction error 0." in html

    assert "data:image/png" in studio.read_out()


def test_a_box_says_whether_sliders_are_calibrated(adapted):
    knots = {name: [[0, 0], [0.5, 0.25], [1, 1]] for name in ("thick", "slant")}
    base = adapted("ddpm", calibration=knots)
    studio, page = DemoBackend(base), build_demo(base)
    boxes = [block.label for block in page.blocks.values() if isinstance(block, gr.Checkbox)]
    assert boxes[0] == "Calibrated: equal steps are equal changes"
    nothing, quarter = generate(base, [Context(), Context({"thick": 0.25})], seeds=[0, 1], num_inference_steps=2)
    expected = grid_html(["no intervention", "thick=0.5"], [nothing, quarter], range(2))
    assert last(studio.intervene(0.5, 0.0, True, *SMALL)) == expected
    assert last(studio.intervene(0.25, 0.0, False, *SMALL)) == expected.replace("thick=0.5", "thick=0.25")
    assert sources(last(studio.sweep("thick", "0.5", False, 0.0, 0.0, True, *SMALL))) == sources(expected)[2:]
    image = studio.sample("", 0.0, 0.0, True, *SMALL)
    half, quarter = (
        sources(studio.counterfactual(image, "", way, 1.0, 0.0, way == "0.5", *SMALL)) for way in ("0.5", "0.25")
    )
    assert half == quarter
    assert not DemoBackend(adapted("ddpm", calibration={"thick": knots["thick"]})).has_calibration


def test_conditions_are_asked_for_only_where_the_base_takes_them(adapted):
    def labels(name):
        page = build_demo(adapted(name))
        return {block.label for block in page.blocks.values() if hasattr(block, "label")}

    plain, text, classes = (labels(name) for name in ("ddpm", "stable_diffusion", "ddpm_classes"))
    assert text - plain == {"Prompt"}
    assert classes - plain == {"Class, 0 to 4"}
    assert plain - text == plain - classes == set()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s, left: s.sweep("thick", "0, x", False, *left), "Strengths '0, x': write 1 to 12 numbers"),
        (lambda s, left: s.sweep("thick", "nan", False, *left), "Strengths 'nan': write"),
        (lambda s, left: s.sweep("thick", "1 " * 13, False, *left), "write 1 to 12 numbers"),
        (lambda s, left: s.sweep("<b>", "1", False, *left), "Unknown concept '&lt;b&gt;'"),
        (lambda s, left: s.intervene(float("inf"), *left[1:]), "must be a finite number"),
        (lambda s, left: s.intervene(1.0, 0.0, 2, None, 2), "first seed is missing"),
        (lambda s, left: s.combinations([], *left), "0 concepts are chosen. Choose 1 to 4."),
        (lambda s, left: s.combinations(["a"] * 5, *left), "5 concepts are chosen"),
        (lambda s, left: s.counterfactual(None, "", "1", *left), "no image yet. Upload one"),
        (lambda s, left: s.counterfactual(Image.new("L", (9, 9)), "thick", "1", *left), "Move one of them"),
        (lambda s, left: s.counterfactual(Image.new("L", (9, 9)), "thin", "1", *left), "Unknown concept 'thin'"),
    ],
)
def test_errors_of_use_are_told(adapted, call, message):
    studio = DemoBackend(adapted("ddpm"))

    def handler():
        result = call(studio, (1.0, 0.0, *SMALL))
        return result if isinstance(result, str) else last(result)

    with pytest.raises(gr.Error) as caught:
        warned(handler)()
    assert message in caught.value.message
    assert not caught.value.print_exception


def test_a_bug_is_told_and_keeps_its_traceback_for_whoever_serves_the_page():
    def handler():
        raise ValueError("not enough values to unpack")

    with pytest.raises(gr.Error, match="not enough values") as caught:
        warned(handler)()
    assert caught.value.print_exception


def test_a_file_without_an_image_is_told(tmp_path):
    class Upload:
        path = str(tmp_path / "image.png")

    Path(Upload.path).write_bytes(b"no image")
    with pytest.raises(gr.Error, match="holds no image that can be read"):
        decoded(Upload)
    Image.new("RGB", (64, 64)).save(Upload.path)
    Path(Upload.path).write_bytes(Path(Upload.path).read_bytes()[:60])
    with pytest.raises(gr.Error, match="holds no image that can be read"):
        decoded(Upload)
    Image.new("RGBA", (40, 20)).save(Upload.path)
    assert decoded(Upload).size == (40, 20)
    assert decoded(None) is None


def test_a_reconstruction_that_did_not_hold_is_a_warning(adapted):
    studio = DemoBackend(adapted("stable_diffusion"))
    noise = Image.effect_noise((300, 200), 100)  # of another size, and gray
    html = studio.counterfactual(noise, "slant", "1", 1.0, 0.0, "a digit", *SMALL)
    error = float(html.split("Reconstruction error ")[1].split(" ")[0])
    assert ("did not hold" in html) == ("cc-warning" in html) == (error > counterfactuals.VISIBLE_ERROR)
    studio.base.decode_images = lambda latents: torch.rand(len(latents), 3, 16, 16)
    assert "did not hold" in studio.counterfactual(noise, "slant", "1", 1.0, 0.0, "a digit", *SMALL)


def test_the_observational_part_has_a_slider_that_serves_every_tab(adapted):
    base = adapted("ddpm", observational_rank=2)
    studio = DemoBackend(base)
    page = build_demo(base)
    labels = [block.label for block in page.blocks.values() if isinstance(block, gr.Slider)]
    assert labels[:3] == ["thick", "slant", "observational part (0: the base's own look, 1: the data's)"]
    options = {"seeds": range(SMALL[1], SMALL[1] + SMALL[0]), "num_inference_steps": SMALL[2]}
    off = [Context(observational=0.5), Context("thick", observational=0.5)]
    expected = grid_html([legible(c) for c in off], generate(base, off, **options), options["seeds"])
    assert last(studio.intervene(1.0, 0.0, 0.5, *SMALL)) == expected
    assert "thick (observational=0.5)" in expected
    assert last(studio.combinations(["thick"], 0.0, 0.0, 0.5, *SMALL)) == expected
    swept = generate(base, off[1:], **options)
    expected = grid_html(["thick = 1"], swept, options["seeds"])
    assert last(studio.sweep("thick", "1", False, 0.0, 0.0, 0.5, *SMALL)) == expected


def test_an_expressive_adapter_has_no_read_out(adapted):
    assert (
        "No read-out: Adapter &#x27;default&#x27; is not linear"
        in DemoBackend(adapted("ddpm", expressive_depth=1)).read_out()
    )


def test_a_base_without_an_adapter_is_refused(pipeline_folder):  # noqa: F811
    with pytest.raises(ValueError, match="has no adapter to show"):
        build_demo(load_base(pipeline_folder("ddpm")))


def test_names_with_markup_are_text(adapted):
    studio = DemoBackend(adapted("ddpm", concepts=("<b>", r"$\frac$")))
    html = last(studio.combinations(list(studio.concepts), 0.0, 0.0, *SMALL))
    assert "<b>" not in html
    assert "&lt;b&gt;" in html
    assert "<img" in studio.read_out()  # matplotlib would take the other name for mathematics


def test_the_package_does_not_import_gradio():
    code = "import sys, hf_causal_context.cli; sys.exit('gradio' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_command_says_what_is_missing(tmp_path, monkeypatch, capsys):
    assert main(["demo", "--adapter", str(tmp_path)]) == 1
    assert "holds no adapter: there is no adapter_config.json in it" in capsys.readouterr().err
    for name in ("commands.demo", "demo", "demo.page", "demo.views"):
        monkeypatch.delitem(sys.modules, f"hf_causal_context.{name}")
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["demo", "--adapter", str(tmp_path)]) == 1
    assert f"The demo needs gradio: {installation('demo')}" in capsys.readouterr().err


def test_the_command_serves(adapter, monkeypatch):
    found = []
    monkeypatch.setattr(demo_module, "launch", lambda page, **options: found.append((page, options)))
    assert main(["demo", "--adapter", str(adapter), "--port", "7999"]) == 0
    ((page, options),) = found
    assert page.title == "adapter"
    assert options == {"share": False, "port": 7999}


def test_a_space_answers_with_its_adapter_or_the_reason(adapter, monkeypatch, served):
    monkeypatch.setenv("ADAPTER", str(adapter))
    space = runpy.run_path(str(APP), run_name="app")
    address = served(space["demo"])
    with urllib.request.urlopen(address, timeout=20) as answer:
        page = answer.read().decode()
    assert answer.status == 200
    assert "thick" in page
    assert str(adapter.parent) not in page  # folders of the machine are nobody's business

    client = pytest.importorskip("gradio_client").Client(address, verbose=False, analytics_enabled=False)
    assert client.predict(1.0, *SMALL, api_name="/intervene").count("<img") == 4
    with pytest.raises(Exception, match="Strengths 'x'"):
        client.predict("thick", "x", False, 1.0, *SMALL, api_name="/sweep")
    client.close()

    monkeypatch.setenv("ADAPTER", str(adapter.parent / "nothing"))
    config = demo_or_reason(os.environ["ADAPTER"]).get_config_file()
    assert "nothing" in str(config)
    assert "No adapter to show" in str(config)


@pytest.mark.slow
def test_in_a_browser(adapted, served, monkeypatch):
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("There is no browser.")
    base = adapted("ddpm", concepts=("<marquee>", "thick"))
    hold, started = threading.Event(), threading.Event()
    hold.set()
    real = demo_module.generate

    def generate(*args, **kwargs):
        started.set()
        assert hold.wait(20)
        return real(*args, **kwargs)

    monkeypatch.setattr(demo_module, "generate", generate)
    address = served(build_demo(base, MARKUP))

    with playwright.sync_playwright() as run:
        browser = run.chromium.launch(executable_path=chromium, args=BROWSER)
        elsewhere, errors = [], []

        def visit():
            page = browser.new_page(viewport={"width": 1280, "height": 900})
            page.set_default_timeout(20_000)
            page.on("request", lambda r: None if address.rstrip("/") in r.url or r.url[:5] in ("data:", "blob:")
                    else elsewhere.append(r.url))  # fmt: skip
            page.on("pageerror", lambda error: errors.append(str(error)))
            page.goto(address)
            page.get_by_label("Steps of the sampler").first.wait_for()
            for label, value in (("Images", "2"), ("number input for Steps of the sampler", "2")):
                page.get_by_label(label).fill(value)
            return page

        page = visit()
        shown = page.locator(".cc-tiles img:visible")
        page.get_by_label("range slider for thick").fill("0.5")
        page.get_by_role("button", name="Draw", exact=True).click()
        playwright.expect(shown).to_have_count(4)
        playwright.expect(page.locator(".cc-row span").last).to_have_text("<marquee> + thick=0.5")
        for tab, button, count in (("Combinations", "Draw combinations", 8), ("Strength sweep", "Draw sweep", 14)):
            page.get_by_role("tab", name=tab).click()
            page.get_by_role("button", name=button).click()
            playwright.expect(shown).to_have_count(count)
        page.get_by_label("Strengths", exact=True).fill("much")
        page.get_by_role("button", name="Draw sweep").click()
        playwright.expect(page.get_by_test_id("toast-body")).to_contain_text("Strengths 'much': write")
        page.get_by_role("tab", name="Counterfactual").click()
        page.get_by_label("The image was made in").fill("<marquee")
        page.get_by_role("button", name="Draw one").click()
        playwright.expect(page.get_by_test_id("toast-body").last).to_contain_text("Unknown concept '<marquee'")
        page.get_by_label("The image was made in").fill("")
        page.get_by_role("button", name="Draw one").click()
        playwright.expect(page.get_by_test_id("image").locator("img").first).to_be_visible()
        page.get_by_role("button", name="Ask what if").click()
        playwright.expect(shown).to_have_count(4)
        page.get_by_role("tab", name="Read-out").click()
        playwright.expect(page.locator(".cc-figure img")).to_be_visible()
        assert page.locator("marquee").count() == 0  # in labels, choices, buttons, grids and messages it is text

        started.clear()
        hold.clear()
        page.get_by_role("tab", name="Intervene").click()
        page.get_by_role("button", name="Draw", exact=True).click()
        assert started.wait(20)
        page.close()
        hold.set()

        page = visit()
        page.get_by_role("button", name="Draw", exact=True).click()
        playwright.expect(page.locator(".cc-tiles img:visible")).to_have_count(4)
        assert page.title() == MARKUP  # as text
        browser.close()
    assert elsewhere == []
    assert errors == []
    assert conditionings(base.pipe)[0].request() is None
