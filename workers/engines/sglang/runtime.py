"""The real sglang, in this process, on a thread and an event loop of its own.

sglang's ``Engine`` brings its scheduler processes, a tokenizer manager that runs on an event loop,
signal handlers and an exit handler that ends all children of its process. On a thread of its own it
gets the loop to itself and leaves the process's signals alone; the exit handler is taken back, and
only the processes that it started are ended here.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import contextvars
import functools
import logging
import os
import signal
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import anyio

from workers.engines.port import EngineFailed
from workers.engines.sglang.fingerprint import shaping_arguments
from workers.engines.sglang.processes import ASKED, Processes
from workers.engines.sglang_requests.events import follow_events
from workers.engines.sglang_requests.generations import Chunk, Request, chunk_of

log = logging.getLogger(__name__)

WARM_UP_TOKENS = 40
END_TIMEOUT_S, END_TIMEOUT_GPU_S = 10.0, 60.0
"""A scheduler that has not ended by then is killed. On GPUs it unpins its host memory, which takes
the kernel as long, and cannot be interrupted, once it is killed."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What sglang has found out at its start."""

    max_total_tokens: int
    max_input_tokens: int
    context_tokens: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    dtype: str
    arguments: Mapping[str, str]
    """Those of sglang's that decide what its KV is."""


class Runtime:
    """A :class:`workers.engines.sglang_requests.generations.Sender`.

    ``on_chunk``, ``on_events`` and ``on_end`` are called on the loop that :meth:`start` was called
    on; nothing of the others may be called before it returned.
    """

    def __init__(
        self,
        server_args: Any,
        *,
        events: str,
        on_chunk: Callable[[Chunk], None],
        replay: str,
        on_events: Callable[[bytes | None], None],
        on_end: Callable[[EngineFailed], None],
    ) -> None:
        """``server_args`` is sglang's ``ServerArgs``; ``events`` and ``replay`` are where its KV
        events are published and repeated."""
        self._server_args = server_args
        self._events, self._replay = events, replay
        self._on_chunk, self._on_events, self._on_end = on_chunk, on_events, on_end
        self._thread: threading.Thread | None = None
        self._own: asyncio.AbstractEventLoop | None = None
        self._processes = Processes()
        on_cpu = server_args.device == "cpu"
        self._end_timeout_s = END_TIMEOUT_S if on_cpu else END_TIMEOUT_GPU_S
        self._streams: dict[str, anyio.CancelScope] = {}
        """Of the requests that sglang has, on its thread."""
        self._quit: asyncio.Event | None = None
        self._up = False

    async def start(self) -> Facts:
        """Starts the processes and warms up. Raises EngineFailed."""
        self._loop = asyncio.get_running_loop()
        self._context = contextvars.copy_context()
        self._ready: asyncio.Future[Facts] = self._loop.create_future()
        # sglang's processes ask for an end by SIGQUIT, which would end this one on the spot.
        if threading.current_thread() is threading.main_thread():
            self._quit_before = signal.signal(signal.SIGQUIT, self._on_quit)
        self._thread = threading.Thread(target=self._run, name="sglang", daemon=True)
        self._thread.start()
        return await self._ready

    async def aclose(self) -> None:
        """Ends sglang's processes. Idempotent."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        if self._own is not None and self._quit is not None:
            with contextlib.suppress(RuntimeError):  # its loop has ended by itself
                self._own.call_soon_threadsafe(self._quit.set)
        with anyio.CancelScope(shield=True):
            if not self._up:
                # It is in the middle of its start, and sees only its processes end.
                end = functools.partial(self._processes.end, self._end_timeout_s, asked=False)
                await anyio.to_thread.run_sync(end)
            await anyio.to_thread.run_sync(thread.join)
        if signal.getsignal(signal.SIGQUIT) == self._on_quit:
            signal.signal(signal.SIGQUIT, self._quit_before)

    def generate(self, request: Request) -> None:
        self._tell(lambda: self._begin(request))

    def abort(self, rid: str) -> None:
        self._tell(lambda: self._cancel(rid))

    def close_session(self, session_id: str) -> None:
        """What the session's requests left in the prefix cache goes first from now on."""
        from sglang.srt.managers.io_struct import CloseSessionReqInput

        request = CloseSessionReqInput(session_id=session_id)
        self._tell(
            lambda: self._tasks.start_soon(self._manager.close_session, request, name="close")
        )

    def listen(self) -> None:
        """From now on KV events are told, from the first one on."""
        self._tell(lambda: self._tasks.start_soon(self._listen, name="events"))

    async def flush(self) -> bool:
        """Forgets what sglang has cached; False while requests run."""
        done: asyncio.Future[bool] = self._loop.create_future()

        async def flush() -> None:
            answer = await self._manager.flush_cache()
            self._post(done.set_result, bool(answer.success))

        self._tell(lambda: self._tasks.start_soon(flush, name="flush"))
        return await done

    # -- on sglang's thread -------------------------------------------------------------------

    def _tell(self, action: Callable[[], object]) -> None:
        assert self._own is not None
        with contextlib.suppress(RuntimeError):  # it has ended, and all that there was with it
            self._own.call_soon_threadsafe(action)

    def _post(self, callback: Callable[[Any], None], value: Any) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(callback, value, context=self._context)

    def _run(self) -> None:
        try:
            asyncio.run(self._main())
        except Exception as error:
            log.debug("sglang's thread ends", exc_info=True)
            self._post(self._ended, error)
        else:
            self._post(self._ended, None)

    async def _main(self) -> None:
        from sglang.srt.entrypoints.engine import Engine
        from sglang.srt.managers.io_struct import ShutdownReq
        from sglang.srt.managers.load_snapshot import shm_path_for

        self._own, self._quit = asyncio.get_running_loop(), asyncio.Event()
        engine = None
        try:
            engine = Engine(server_args=self._server_args)
            atexit.unregister(engine.shutdown)  # it ends every child of this process
            self._manager = engine.tokenizer_manager
            self._processes.watch(lambda detail: self._post(self._lost, detail))
            async with anyio.create_task_group() as tasks:
                self._tasks = tasks
                await self._warm_up()
                self._post(self._started, _facts(engine))
                await self._quit.wait()
                tasks.cancel_scope.cancel()
        finally:
            self._processes.unwatch()
            if engine is not None:
                watchdog = engine.tokenizer_manager._subprocess_watchdog
                if watchdog is not None:
                    watchdog.stop()
                engine.tokenizer_manager._dispatch_to_scheduler(ShutdownReq())
            self._processes.end(self._end_timeout_s, asked=engine is not None)
            if engine is not None:
                # Nobody else does: sglang looks for such files when it next starts.
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(shm_path_for(engine.port_args.instance_id))
                engine.send_to_rpc.close(linger=0)

    async def _warm_up(self) -> None:
        """So that the first request does not pay for set-up."""
        ids = list(range(3, 3 + WARM_UP_TOKENS))
        request = Request("warm-up", ids, {"temperature": 0, "max_new_tokens": 2}, "", "", 0)
        async with contextlib.aclosing(self._answers(request)) as answers:
            async for _ in answers:
                pass

    def _begin(self, request: Request) -> None:
        scope = self._streams[request.rid] = anyio.CancelScope()
        self._tasks.start_soon(self._stream, request, scope, name=request.rid)

    def _cancel(self, rid: str) -> None:
        """sglang's own clean-up aborts what it has given to a scheduler. Its abort_request would do
        nothing for a request whose task has not begun yet, which then ran to its end."""
        scope = self._streams.get(rid)
        if scope is not None:
            scope.cancel()

    async def _stream(self, request: Request, scope: anyio.CancelScope) -> None:
        since = asyncio.get_running_loop().time()
        try:
            with scope:
                async with contextlib.aclosing(self._answers(request)) as answers:
                    async for answer in answers:
                        before, since = since, asyncio.get_running_loop().time()
                        chunk = chunk_of(request.rid, answer, since - before)
                        self._post(self._on_chunk, chunk)
        except Exception as error:  # noqa: BLE001 - this request alone failed, whatever it is
            self._post(self._on_chunk, Chunk(request.rid, (), 0, 0.0, None, f"sglang: {error}"))
        finally:
            del self._streams[request.rid]

    def _answers(self, request: Request) -> Any:
        """sglang's own generator of answers."""
        from sglang.srt.managers.io_struct import GenerateReqInput

        return self._manager.generate_request(
            GenerateReqInput(
                input_ids=request.input_ids,
                sampling_params=request.sampling,
                stream=True,
                rid=request.rid,
                cache_salt=request.salt or None,
                session_id=request.session_id or None,
                priority=request.priority,
                external_trace_header=dict(request.trace) or None,
            ),
            None,
        )

    async def _listen(self) -> None:
        async with contextlib.aclosing(follow_events(self._events, self._replay)) as batches:
            async for batch in batches:
                self._post(self._on_events, batch)

    # -- on the worker's loop -----------------------------------------------------------------

    def _started(self, facts: Facts) -> None:
        self._up = True
        if not self._ready.done():
            self._ready.set_result(facts)

    def _ended(self, error: Exception | None) -> None:
        if not self._ready.done():
            detail = f"sglang did not start: {error}"
            self._ready.set_exception(EngineFailed(detail))
        elif error is not None:
            self._on_end(EngineFailed(f"sglang failed: {error!r}; restart the replica"))

    def _lost(self, detail: str) -> None:
        if self._thread is None:
            return  # it is being closed
        if not self._ready.done():
            self._ready.set_exception(EngineFailed(f"sglang did not start: {detail}"))
        else:
            self._on_end(EngineFailed(detail))

    def _on_quit(self, number: int, frame: Any) -> None:
        self._post(self._lost, ASKED)
        if callable(self._quit_before):
            self._quit_before(number, frame)  # of another engine in this process


def _facts(engine: Any) -> Facts:
    info = engine._scheduler_init_result.scheduler_infos[0]
    manager, args = engine.tokenizer_manager, engine.server_args
    model = manager.model_config
    eos = model.hf_eos_token_id or set()
    return Facts(
        max_total_tokens=int(info["max_total_num_tokens"]),
        max_input_tokens=int(info["max_req_input_len"]),
        context_tokens=int(model.context_len),
        vocab_size=int(model.vocab_size),
        eos_token_ids=tuple(sorted(eos)),
        dtype=str(model.dtype),
        arguments=_shaping(args),
    )


def _shaping(args: Any) -> dict[str, str]:
    import torch
    from sglang.srt.server_args import ServerArgs, record_fields

    fields = [field.name for field in record_fields(ServerArgs)]
    usual = ServerArgs(model_path=args.model_path)
    shaping = shaping_arguments(
        {name: getattr(args, name) for name in fields},
        {name: getattr(usual, name) for name in fields},
        args.resolved_dict(),
    )
    # Its "fp8" is another encoding than that of CUDA, and both are device "cuda".
    return {**shaping, "rocm": str(torch.version.hip is not None)}
