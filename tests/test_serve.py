"""The web server of the examples: many requests at once, each in its own context."""

import asyncio
import threading
from types import SimpleNamespace

import httpx
import pytest
import torch

from examples.serve import Batches, Writer, make_app

from .adapter.test_generation import build, tokenizer  # noqa: F401 (a fixture)

NEW = 6
PROMPTS = ("w3 w9 w17", "w40 w5", "w8 w50 w21 w30 w12", "w60")
CONTEXTS = [f"thick={i % 5 - 2}+slant={i % 4}+size={i / 10}" for i in range(98)] + ["", "thick+observational=0"]
REQUESTS = [{"prompt": PROMPTS[i % len(PROMPTS)], "context": context} for i, context in enumerate(CONTEXTS)]


@pytest.fixture(scope="module")
def model():
    return build("llama")


@pytest.fixture(scope="module")
def expected(model, tokenizer):  # noqa: F811
    """What each request gives alone."""
    texts = []
    for request in REQUESTS:
        inputs = tokenizer(request["prompt"], return_tensors="pt", return_token_type_ids=False)
        output = model.generate(**inputs, context=request["context"], max_new_tokens=NEW, do_sample=False)
        texts.append(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    assert len(set(texts)) > 50
    return texts


@pytest.fixture
def batches(model, monkeypatch):
    """The rows of each call of `generate`."""
    rows, generate = [], model.generate

    def counted(**kwargs):
        rows.append(len(kwargs["input_ids"]))
        return generate(**kwargs)

    monkeypatch.setattr(model, "generate", counted)
    return rows


def ask(app, requests):
    """The responses to (route, request), all sent at once."""

    async def send():
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://server", timeout=60) as client:
            return await asyncio.gather(*(client.post(route, json=request) for route, request in requests))

    return asyncio.run(send())


def test_a_hundred_requests_in_one_batch_are_those_alone(model, tokenizer, expected):  # noqa: F811
    writer = Writer(model, tokenizer, NEW)
    prompts = [tokenizer(request["prompt"])["input_ids"] for request in REQUESTS]
    assert writer.batch(prompts, [request["context"] for request in REQUESTS]) == expected


def test_batches_and_streaming_threads_do_not_mix(model, tokenizer, expected, batches):  # noqa: F811
    routes = ["/stream" if i % 5 == 0 else "/write" for i in range(len(REQUESTS))]
    responses = ask(make_app(Writer(model, tokenizer, NEW)), zip(routes, REQUESTS, strict=True))
    for route, response, text in zip(routes, responses, expected, strict=True):
        assert response.status_code == 200
        assert (response.text if route == "/stream" else response.json()["text"]).split() == text.split()
    assert sum(batches) == len(REQUESTS)
    assert len(batches) < len(REQUESTS)  # most of those that are written share some


@pytest.mark.parametrize("route", ["/write", "/stream"])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"prompt": "w3", "context": "wide"}, "Unknown concept 'wide'"),
        ({"prompt": "w3", "context": "thick=much"}, "thick=much"),
        ({"prompt": "", "context": "thick"}, "The prompt has 0 tokens"),
        ({"prompt": "w3 " * 5000, "context": "thick"}, "The prompt has 5000 tokens"),
    ],
)
def test_a_wrong_request_is_refused_alone(model, tokenizer, expected, route, wrong, message):  # noqa: F811
    right, refused = ask(make_app(Writer(model, tokenizer, NEW)), [("/write", REQUESTS[0]), (route, wrong)])
    assert right.json()["text"] == expected[0]
    assert refused.status_code == 422
    assert message in refused.json()["detail"]


def test_an_error_of_a_batch_reaches_all_who_wait_and_the_next_one_runs(model, tokenizer, expected, monkeypatch):  # noqa: F811
    writer = Writer(model, tokenizer, NEW)
    app, batch = make_app(writer), writer.batch
    monkeypatch.setattr(writer, "batch", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ask(app, [("/write", request) for request in REQUESTS[:3]])
    monkeypatch.setattr(writer, "batch", batch)
    assert ask(app, [("/write", REQUESTS[0])])[0].json()["text"] == expected[0]


def test_requests_that_are_cancelled_take_nothing_from_others():
    started, go = threading.Event(), threading.Event()

    def batch(prompts, contexts):
        started.set()
        assert go.wait(60)
        return [str(prompt) for prompt in prompts]

    async def send():
        batches = Batches(SimpleNamespace(batch=batch))
        tasks = [asyncio.create_task(batches.answer([number], "")) for number in range(4)]
        await asyncio.to_thread(started.wait)
        tasks[0].cancel()  # the batch is its own, and runs on
        await asyncio.sleep(0.1)
        tasks[1].cancel()  # waits for its answer
        await asyncio.sleep(0.1)
        go.set()
        return await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 60)

    first, second, *others = asyncio.run(send())
    assert isinstance(first, asyncio.CancelledError)
    assert isinstance(second, asyncio.CancelledError)
    assert others == ["[2]", "[3]"]


def test_encoder_decoders_are_refused(tokenizer):  # noqa: F811
    with pytest.raises(ValueError, match="not for encoder-decoders"):
        Writer(build("t5"), tokenizer, NEW)


def test_a_stream_that_fails_ends(model, tokenizer, monkeypatch):  # noqa: F811
    writer = Writer(model, tokenizer, NEW)
    monkeypatch.setattr(writer, "_generate", lambda *_, **__: torch.zeros(1) @ torch.zeros(2))
    monkeypatch.setattr("threading.excepthook", lambda _: None)
    assert "".join(writer.stream([3, 9], "thick")) == ""
