"""A web server for a language model with an adapter: every request has a context of its own.

    python -m examples.serve --adapter my-style
    curl localhost:8000/write --json '{"prompt": "Dear", "context": "brief+formal"}'
    curl -N localhost:8000/stream --json '{"prompt": "Dear", "context": "brief=0.5"}'

`/write` runs what arrives at about the same time as one batch, with a context for each row. `/stream` sends words as
they are written, from a thread of its own. Both use the model at the same time. The server is made with FastAPI, which
comes with `pip install -e ".[demo]"`.
"""

import argparse
import asyncio
from collections.abc import Iterator, Sequence
from threading import Thread
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI, HTTPException
from fastapi.responses import StreamingResponse
from peft import PeftModel
from pydantic import BaseModel
from transformers import PreTrainedTokenizerBase, TextIteratorStreamer

from hf_causal_context import intervene
from hf_causal_context.bases.language import ONE_TEXT
from hf_causal_context.bases.tokens import filler, room_after
from hf_causal_context.inference.adapted import StoredAdapter
from hf_causal_context.inference.texts import padded_prompts

MOST_ROWS = 128  # of a batch
WAIT = 0.01  # seconds for requests to join a batch


class Request(BaseModel):
    prompt: str
    context: str = ""  # the empty one


class Writer:
    """A language model with an adapter, as the web server uses it."""

    def __init__(self, model: PeftModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> None:
        self.model, self.tokenizer = model, tokenizer
        if model.config.is_encoder_decoder:
            raise ValueError("This server is for models that go on with their prompt, not for encoder-decoders.")
        self.options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "pad_token_id": filler(tokenizer), **ONE_TEXT}

    def tokens(self, request: Request) -> list[int]:
        """Return a prompt's tokens; refuse (ValueError) what would fail later, in a batch with others."""
        intervene(self.model, request.context)
        ids: Any = self.tokenizer(request.prompt)["input_ids"]
        if not ids or room_after(self.model, ids) < self.options["max_new_tokens"]:
            raise ValueError(f"The prompt has {len(ids)} tokens: it is empty, or leaves no room for an answer.")
        return ids

    def batch(self, prompts: Sequence[list[int]], contexts: list[str]) -> list[str]:
        """Answer requests in one call of `generate`, a row for each."""
        ids, mask = padded_prompts(prompts, filler(self.tokenizer), left=True)
        with intervene(self.model, contexts):
            output = self._generate(ids, mask)
        return self.tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)

    def stream(self, prompt: list[int], context: str) -> Iterator[str]:
        """Answer one request a few words at a time, from a thread of its own."""
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)

        def write() -> None:
            ids = torch.tensor([prompt])
            try:
                # Not around the loop below, whose steps a web server runs on one thread or another.
                with intervene(self.model, context):
                    self._generate(ids, torch.ones_like(ids), streamer=streamer)
            finally:
                streamer.end()  # also if that fails

        Thread(target=write).start()
        yield from streamer

    def _generate(self, ids: torch.Tensor, mask: torch.Tensor, **options: Any) -> torch.Tensor:
        place = self.model.device
        model: Any = self.model
        return model.generate(input_ids=ids.to(place), attention_mask=mask.to(place), **self.options, **options)


class Batches:
    """Gathers requests while the batch before them runs."""

    def __init__(self, writer: Writer) -> None:
        self.writer = writer
        self.waiting: list[tuple[list[int], str, asyncio.Future[str]]] = []
        self.running = asyncio.Lock()

    async def answer(self, prompt: list[int], context: str) -> str:
        """Return what the model writes after a prompt."""
        answer = asyncio.get_running_loop().create_future()
        self.waiting.append((prompt, context, answer))
        async with self.running:
            if not answer.done():  # else another's batch took it along
                await asyncio.sleep(WAIT)
                await asyncio.shield(self._run())  # others wait for it, too
        return await answer

    async def _run(self) -> None:
        batch, self.waiting = self.waiting[:MOST_ROWS], self.waiting[MOST_ROWS:]
        if not batch:  # those who wait are in one that is running, whose own request was cancelled
            return
        prompts, contexts, answers = zip(*batch, strict=True)
        try:
            texts = await asyncio.to_thread(self.writer.batch, prompts, list(contexts))
        except Exception as error:
            for answer in answers:
                if not answer.done():  # a request that waited for it was cancelled
                    answer.set_exception(error)
        else:
            for answer, text in zip(answers, texts, strict=True):
                if not answer.done():
                    answer.set_result(text)


def make_app(writer: Writer) -> FastAPI:
    app, batches = FastAPI(), Batches(writer)

    # In the event loop, for threads must not share a tokenizer that reads.
    def tokens(request: Request) -> list[int]:
        try:
            return writer.tokens(request)
        except ValueError as error:  # such as a concept that the adapter does not have
            raise HTTPException(422, str(error)) from error

    @app.post("/write")
    async def write(request: Request) -> dict[str, str]:
        return {"text": await batches.answer(tokens(request), request.context)}

    @app.post("/stream")
    async def stream(request: Request) -> StreamingResponse:
        return StreamingResponse(writer.stream(tokens(request), request.context), media_type="text/plain")

    return app


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--adapter", required=True, help="folder, or Hub id, of a causal language model's adapter")
    parser.add_argument("--max_new_tokens", type=int, default=60)
    parser.add_argument("--port", type=int, default=8000)
    arguments = parser.parse_args()
    writer = Writer(*StoredAdapter.open(arguments.adapter).language_model(), arguments.max_new_tokens)
    uvicorn.run(make_app(writer), port=arguments.port)


if __name__ == "__main__":
    main()
