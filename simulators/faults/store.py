"""A proxy before an S3 store that answers requests wrongly on command: refused before, or failed after the deed.

The second is the hard case: the request took effect and the client is told that it failed. Requests are passed on
verbatim, so signatures stay valid; a client signs for the host and port of the proxy, and a store checks the signature
against the Host field it receives.
"""

from __future__ import annotations

import asyncio
import random
import re
import socket
from collections import deque
from collections.abc import AsyncIterator, Sequence
from enum import StrEnum
from xml.sax.saxutils import escape

import msgspec

from contract.errors import ConfigurationError
from simulators.faults.http import (
    HEAD_BYTES_MAX,
    HEAD_END,
    Body,
    Head,
    NotHttp,
    chunk_size,
    request_head,
    response_head,
)
from simulators.faults.proxy import Direction, FaultProxy, Pair

SEEN_MAX = 10_000
"""So many requests are remembered."""
LATE_BODY_S = 5.0
"""How long a client may go on sending a body after the answer to it has been passed on."""


class When(StrEnum):
    """Whether the request reaches the store."""

    BEFORE = "before"
    AFTER = "after"


class Answer(StrEnum):
    """What the client gets instead of the store's answer."""

    SLOW_DOWN = "slow_down"
    """503 SlowDown"""
    INTERNAL_ERROR = "internal_error"
    """500 InternalError"""
    RESET = "reset"
    """The connection is reset."""


_ERRORS = {
    Answer.SLOW_DOWN: ("503 Slow Down", "SlowDown", "Please reduce your request rate."),
    Answer.INTERNAL_ERROR: ("500 Internal Server Error", "InternalError", "We encountered an internal error."),
}


class StoreFault(msgspec.Struct, frozen=True, kw_only=True):
    """A rule. The first one that matches a request and draws it decides its fate."""

    name: str = "fault"
    when: When = When.BEFORE
    answer: Answer = Answer.SLOW_DOWN
    method: str = ".*"
    """Regular expression for the whole method."""
    path: str = ""
    """Regular expression, found anywhere in path and query."""
    fraction: float = 1.0
    """Of the matching requests, drawn with the seed."""
    skip: int = 0
    """So many matching requests pass first."""
    count_max: int | None = None
    """After so many the rule is spent; None: never."""

    def __post_init__(self) -> None:
        """Refuse expressions that are none."""
        try:
            re.compile(self.method)
            re.compile(self.path)
        except re.error as error:
            raise ConfigurationError(f"fault {self.name!r}: {error}; mend the regular expression") from error


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """One request that came by."""

    method: str
    target: str
    fault: str | None
    """The name of the rule that decided, None when it was passed on untouched."""
    status: str
    """What the store answered; empty when it was not asked."""


class _Rule:
    """A fault and what it has drawn so far. One generator each: rules do not disturb each other's draws."""

    def __init__(self, fault: StoreFault, seed: int, index: int) -> None:
        self.fault = fault
        self.matched = self.done = 0
        self._rng = random.Random(f"{seed}/{index}")

    def takes(self, method: str, target: str) -> bool:
        fault = self.fault
        if not (re.fullmatch(fault.method, method) and re.search(fault.path, target)):
            return False
        self.matched += 1
        if self.matched <= fault.skip or (fault.count_max is not None and self.done >= fault.count_max):
            return False
        if self._rng.random() >= fault.fraction:
            return False
        self.done += 1
        return True


class _Reader:
    """One side of a connection as a sequence of heads and bodies, raw."""

    def __init__(self, proxy: FaultProxy, source: socket.socket) -> None:
        self._proxy = proxy
        self._source = source
        self._buffer = b""

    async def head(self) -> bytes | None:
        """The bytes of the next head; None when the other side has nothing more to say.

        Raises:
            NotHttp: when no head ends within HEAD_BYTES_MAX.
            EOFError: when the other side leaves in the middle of one.
        """
        while HEAD_END not in self._buffer:
            if len(self._buffer) > HEAD_BYTES_MAX:
                raise NotHttp(f"no head ends within {HEAD_BYTES_MAX} bytes")
            if not await self._more():
                if self._buffer:
                    raise EOFError("left in the middle of a head")
                return None
        return self._take(self._buffer.index(HEAD_END) + len(HEAD_END))

    async def body(self, head: Head) -> AsyncIterator[bytes]:
        """The raw bytes of the body, framing included, as they come.

        Raises:
            EOFError: when the other side leaves in the middle of it.
        """
        if head.body is Body.LENGTH:
            async for data in self._exactly(head.length):
                yield data
        elif head.body is Body.CHUNKED:
            while True:
                line = await self._line()
                yield line
                if (size := chunk_size(line)) == 0:
                    break
                async for data in self._exactly(size + 2):
                    yield data
            # Trailer fields, then an empty line.
            while (line := await self._line()) != b"\r\n":
                yield line
            yield line
        elif head.body is Body.UNTIL_CLOSE:
            while self._buffer or await self._more():
                yield self._take(len(self._buffer))

    async def _exactly(self, size: int) -> AsyncIterator[bytes]:
        while size:
            if not self._buffer and not await self._more():
                raise EOFError("left in the middle of a body")
            data = self._take(min(size, len(self._buffer)))
            size -= len(data)
            yield data

    async def _line(self) -> bytes:
        while b"\r\n" not in self._buffer:
            if len(self._buffer) > HEAD_BYTES_MAX or not await self._more():
                raise EOFError("left in the middle of a line")
        return self._take(self._buffer.index(b"\r\n") + 2)

    async def _more(self) -> bool:
        data = await self._proxy.receive(self._source)
        self._buffer += data
        return bool(data)

    def _take(self, size: int) -> bytes:
        taken, self._buffer = self._buffer[:size], self._buffer[size:]
        return taken


class StoreFaultProxy(FaultProxy):
    """A `FaultProxy` that knows requests. All of the weather applies as well."""

    def __init__(self, target_port: int, *, target_host: str = "127.0.0.1", port: int = 0) -> None:
        self._rules: list[_Rule] = []
        self._seen: deque[Seen] = deque(maxlen=SEEN_MAX)
        super().__init__(target_port, target_host=target_host, port=port)

    def inject(self, faults: Sequence[StoreFault], *, seed: int = 1) -> None:
        """Replace all rules; none passes everything. In force for the next request when this returns.

        Args:
            faults: the rules, in order.
            seed: draws which of the matching requests are hit: the n-th matching request has the same fate each time.
        """
        rules = [_Rule(fault, seed, index) for index, fault in enumerate(faults)]
        self.command(lambda: setattr(self, "_rules", rules))

    def seen(self) -> list[Seen]:
        """The last requests, oldest first, at most SEEN_MAX."""
        return self.command(lambda: list(self._seen))

    async def relay(self, pair: Pair) -> None:
        """Request by request, until one side has nothing more to say."""
        reader = _Reader(self, pair.client)
        try:
            while (raw := await reader.head()) is not None:
                if not await self._handle(pair, reader, raw):
                    return
        except NotHttp as error:
            raise ConnectionResetError(str(error)) from error

    async def _handle(self, pair: Pair, reader: _Reader, raw: bytes) -> bool:
        """One request; returns whether there may be another on this connection."""
        head = request_head(raw)
        method, target, _ = head.first
        fault = next((rule.fault for rule in self._rules if rule.takes(method, target)), None)
        if fault is not None and fault.when is When.BEFORE:
            self._note(head, fault, "")
            # Who waits to be told to go on is told so by the answer, and may or may not send the body after all.
            waiting = "expect" in head.fields
            if not waiting:
                async for _ in reader.body(head):
                    pass
            await self._fail(pair, fault, head, last=waiting)
            return not waiting and not head.last
        server = await self.connect(pair)
        await self.forward(pair, server, Direction.UP, raw)
        sending = asyncio.ensure_future(self._send_body(pair, reader, head, server))
        answering = asyncio.ensure_future(self._answer(pair, _Reader(self, server), head, fault))
        try:
            await asyncio.wait({sending, answering}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                # A body that broke off gets no answer; waiting for one would last until the store loses patience.
                await sending
            answer = await answering
            done, _ = await asyncio.wait({sending}, timeout=LATE_BODY_S)
            return bool(done) and not answer.last and not head.last
        finally:
            sending.cancel()
            answering.cancel()
            await asyncio.gather(sending, answering, return_exceptions=True)

    async def _send_body(self, pair: Pair, reader: _Reader, head: Head, server: socket.socket) -> None:
        async for data in reader.body(head):
            await self.forward(pair, server, Direction.UP, data)

    async def _answer(self, pair: Pair, reader: _Reader, request: Head, fault: StoreFault | None) -> Head:
        """Pass on the store's answer, or wait for its end and give another instead."""
        while True:
            raw = await reader.head()
            if raw is None:
                raise EOFError("the store left without an answer")
            answer = response_head(raw, request.first[0])
            interim = answer.first[1].startswith("1")
            if interim or fault is None:
                await self.forward(pair, pair.client, Direction.DOWN, raw)
            if not interim:
                break
        async for data in reader.body(answer):
            if fault is None:
                await self.forward(pair, pair.client, Direction.DOWN, data)
        self._note(request, fault, answer.first[1])
        if fault is not None:
            await self._fail(pair, fault, request, last=answer.last)
        return answer

    async def _fail(self, pair: Pair, fault: StoreFault, request: Head, *, last: bool) -> None:
        if fault.answer is Answer.RESET:
            raise ConnectionResetError(f"by fault {fault.name!r}")
        status, code, message = _ERRORS[fault.answer]
        resource = request.first[1].split("?", 1)[0]
        text = (
            '<?xml version="1.0" encoding="UTF-8"?>\n'
            f"<Error><Code>{code}</Code><Message>{message}</Message>"
            f"<Resource>{escape(resource)}</Resource><RequestId>injected-{escape(fault.name)}</RequestId></Error>"
        ).encode()
        lines = [f"HTTP/1.1 {status}", "Content-Type: application/xml", f"Content-Length: {len(text)}"]
        if last:
            lines.append("Connection: close")
        data = "\r\n".join(lines).encode("latin-1") + HEAD_END + (b"" if request.first[0] == "HEAD" else text)
        await self.forward(pair, pair.client, Direction.DOWN, data)

    def _note(self, request: Head, fault: StoreFault | None, status: str) -> None:
        method, target, _ = request.first
        self._seen.append(
            Seen(method=method, target=target, fault=None if fault is None else fault.name, status=status)
        )
