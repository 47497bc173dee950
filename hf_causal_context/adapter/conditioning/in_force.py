"""Which contexts are in force where: those of the `with intervene(...)` blocks that this task or thread is inside of.

They lie in a context variable, so that the tasks of an event loop do not mix, and `asyncio.to_thread` and new tasks
have them. New threads have them too while the block is open, which Python itself does from 3.14 on, if it is told to
(`thread_inherit_context`). An executor's workers do not: they outlive the call that started them, and serve others.

Context variables cannot be read inside compiled graphs. What those read is in a box on a thread-local (attributes set
directly on a thread-local give wrong results there), and where that may be another task's, the graph breaks to ask.
"""

from __future__ import annotations

import asyncio
import functools
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar, Token
from itertools import takewhile
from typing import Any, Final, cast

import torch

from ...errors import UserValueError
from .frame import Frame
from .request import Owner, Request
from .rows import Call

_LOCK = threading.Lock()
_INNERMOST: ContextVar[Request | None] = ContextVar("hf_causal_context_innermost", default=None)
_UNKNOWN: Final = Request(cast(Owner, None), {}, None, None)  # in a box: ask the context variable


class _Box:
    def __init__(self) -> None:
        self.frame: Frame | None = None
        self.request = None if threading.current_thread() is threading.main_thread() else _UNKNOWN
        self.opened: list[Request] = []  # on this thread, and not ended yet


class _ThreadState(threading.local):
    def __init__(self) -> None:
        self.box = _Box()


STATE = _ThreadState()


def innermost_request(owner: Owner) -> Request | None:
    """Return the innermost request in force here for a model, or None.

    Raises:
        ValueError: where a task or thread was started inside a block that has ended since.
    """
    asked = [request for request in _chain(_innermost()) if request.owner is owner]
    found = _first_open(asked)
    if found is None and asked:
        raise UserValueError(
            "The `with intervene(...)` block in which this task or thread was started has ended. Keep the block open "
            "until the task or thread is done, or open one inside of it. The same happens where a generator opened it, "
            "and was closed elsewhere: do not `yield` inside the block."
        )
    if found is None and owner.open_requests and not torch.compiler.is_compiling():
        warnings.warn(
            "A model with a causal context adapter runs without a context here, so as the base, while another thread, "
            "task or generator has `with intervene(...)` open for it. If that context was meant for this call, open "
            "the block where the call is made: what runs in an executor, as the steps of a web server's generator do, "
            "is outside of it. If the base was meant, all is well.",
            stacklevel=2,
        )
    return found


def _chain(request: Request | None) -> Iterator[Request]:
    while request is not None:
        yield request
        request = request.outer


def _first_open(requests: Iterable[Request]) -> Request | None:
    return next((request for request in requests if not request.ended), None)


def _innermost() -> Request | None:
    if not torch.compiler.is_compiling():
        return _INNERMOST.get()
    request = STATE.box.request
    return cast(Any, _ask)() if request is _UNKNOWN else request


@torch.compiler.disable(reason="Where tasks or threads share models, contexts are asked for outside of graphs.")
def _ask() -> Request | None:
    return _INNERMOST.get()


def is_inside(request: Request) -> bool:
    """Whether this task or thread is inside the block of a request."""
    return request in _chain(_INNERMOST.get())


@contextmanager
def in_force(requests: Iterable[Request]) -> Iterator[list[Request]]:
    """Put requests in force for what runs inside the block, until it ends; gives those that this opens."""
    _reach_new_threads()
    box = STATE.box
    # No frame: one that is left from an interrupted forward must not serve parts of a model that run on their own.
    frame, box.frame = box.frame, None
    opened: list[Request] = []
    try:
        for request in requests:
            opened.append(_open(request, box))
        yield opened
    finally:
        if box is STATE.box:  # a generator may end on another thread, while this one is inside a forward
            box.frame = frame
        for request in reversed(opened):
            _end(request, box)


@contextmanager
def during_call(owners: Iterable[Owner], call: Call | None) -> Iterator[None]:
    """Let the contexts in force for models know, for a while, what runs them; None where that is not known.

    Raises:
        ValueError: for another number of contexts than of prompts.
    """
    active = [request for owner in owners if (request := innermost_request(owner)) is not None]
    with in_force([request.during(call) for request in active] if call is not None else []):
        # No other task runs on this thread before the call is done.
        STATE.box.request = _INNERMOST.get()
        try:
            yield
        finally:
            _publish(STATE.box)


def _open(request: Request, box: _Box) -> Request:
    outer = _INNERMOST.get()
    request = request.within(outer, _first_open(each for each in _chain(outer) if each.owner is request.owner))
    with _LOCK:
        request.owner.open_requests += 1
    box.opened.append(request)
    _INNERMOST.set(None)  # a token keeps the value that was there
    request.token = _INNERMOST.set(request)
    _publish(box)
    return request


def _end(request: Request, box: _Box) -> None:
    request.ended = True
    with _LOCK:
        request.owner.open_requests -= 1
    box.opened.remove(request)
    innermost = _INNERMOST.get()
    above: list[Request] = []
    if is_inside(request):  # or a generator was closed elsewhere
        chain = takewhile(lambda each: each is not request, _chain(innermost))
        above = [each for each in chain if not each.ended]
        # What is below stays, also if it is over: so a task that outlives a block can be told.
        innermost = request.outer
        for each in reversed(above):
            each.outer, innermost = innermost, each
    while innermost is not None and innermost.ended and _was_opened_here(innermost):
        innermost = innermost.outer
    _INNERMOST.set(innermost)
    _publish(box)
    if above:
        warnings.warn(
            "A `with intervene(...)` block ended before one that was opened inside of it, as happens when generators "
            "run by turns. What the first made after the second had begun has the context of the second. Do not "
            "`yield` inside the block; open it around each call.",
            stacklevel=2,
        )


def _was_opened_here(request: Request) -> bool:
    """Whether it was, and not where this task or thread was started; asked once, of one that was closed elsewhere."""
    try:
        _INNERMOST.reset(cast(Token, request.token))
    except (ValueError, RuntimeError):  # of another context, which may have asked
        return False
    return True


def _publish(box: _Box) -> None:
    """Tell compiled graphs on this thread what is in force, where no other task can change it."""
    innermost = _INNERMOST.get()
    chain = list(_chain(innermost))
    known = innermost is not None or threading.current_thread() is threading.main_thread()
    alone = all(request in chain for request in box.opened) and asyncio._get_running_loop() is None
    STATE.box.request = innermost if known and alone else _UNKNOWN
    if box is not STATE.box:  # opened on another thread
        box.request = _UNKNOWN


@functools.cache
def _reach_new_threads() -> None:
    """Give threads that are started inside a block its contexts."""
    start = threading.Thread.start

    @functools.wraps(start)
    def start_inside(thread: Any) -> None:
        innermost = _INNERMOST.get()
        executor = getattr(getattr(thread, "_target", None), "__module__", None) == "concurrent.futures.thread"
        if innermost is not None and type(thread) is threading.Thread and not executor:
            thread.run = functools.partial(_run_inside, innermost, thread.run)
        start(thread)

    threading.Thread.start = start_inside  # type: ignore[method-assign]


def _run_inside(innermost: Request, run: Callable[[], None]) -> None:
    _INNERMOST.set(innermost)
    run()
