"""A TCP proxy on loopback that misbehaves on command, while connections are open.

It runs an event loop in a thread of its own. Every command returns when it is in force, so a test needs no pauses.
Bytes are passed on verbatim and unbuffered: what one side sent and the other did not receive is at most one chunk.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import Callable, Coroutine
from enum import StrEnum
from types import TracebackType
from typing import Any, Self, TypeVar

import msgspec

from contract.errors import ConfigurationError, TemporaryError

HOST = "127.0.0.1"
CHUNK_BYTES_MAX = 65_536
CONNECTIONS_MAX = 2_000
COMMAND_TIMEOUT_S = 10.0
CONNECT_TIMEOUT_S = 10.0
SLICES_PER_S = 20
"""A slow line moves its bytes per second in so many portions, so that it is slow and not jerky."""

T = TypeVar("T")


class Mode(StrEnum):
    """What the network does."""

    PASS = "pass"
    REFUSE = "refuse"
    """Nobody listens: connecting fails at once. Open connections are reset."""
    RESET = "reset"
    """Connections are accepted and reset at once; open ones too."""
    HANG = "hang"
    """Connections are accepted, whatever is sent is swallowed, nothing comes back. Connections that saw this are reset
    when it ends, because bytes are missing in them."""
    STALL = "stall"
    """Nothing moves and nothing is lost: a partition. Connections go on when it ends."""


class Direction(StrEnum):
    """Which way bytes travel."""

    UP = "up"
    """From client to server."""
    DOWN = "down"
    """From server to client."""


class Weather(msgspec.Struct, frozen=True, kw_only=True):
    """How the line is at the moment."""

    mode: Mode = Mode.PASS
    bytes_per_s_max: int | None = None
    """Of all connections together, for each direction; None: no limit."""
    latency_s: float = 0.0
    """Each chunk of up to 64 KiB waits so long; what follows on that connection waits behind it."""

    def __post_init__(self) -> None:
        """Refuse what would stand still without saying so."""
        if self.bytes_per_s_max is not None and self.bytes_per_s_max < 1:
            raise ConfigurationError(f"bytes_per_s_max = {self.bytes_per_s_max}: choose 1 or more, or mode STALL")
        if self.latency_s < 0:
            raise ConfigurationError(f"latency_s = {self.latency_s}: choose 0 or more")


class Counters(msgspec.Struct, frozen=True, kw_only=True):
    """What the proxy saw and did, since it was made."""

    connections_total: int = 0
    connections_open: int = 0
    resets_total: int = 0
    """Connections that the proxy reset or turned away."""
    flips_total: int = 0
    bytes_up_total: int = 0
    bytes_down_total: int = 0
    """Passed on, not swallowed."""
    bytes_swallowed_total: int = 0


class _Flip(msgspec.Struct):
    """A bit that shall be flipped; counts the chunks until then."""

    direction: Direction
    chunks_left: int
    chunk_bytes_min: int
    byte: int
    bit: int


class Pair:
    """One connection: the client's socket, the server's once there is one, and whether bytes are missing."""

    def __init__(self, client: socket.socket) -> None:
        self.client = client
        self.server: socket.socket | None = None
        self.swallowed = False
        self.task: asyncio.Task[None] | None = None

    def close(self, *, reset: bool) -> None:
        """End both sides, with RST or with FIN."""
        for side in (self.client, self.server):
            if side is not None and side.fileno() >= 0:
                if reset:
                    side.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                side.close()


class FaultProxy:
    """Stands before `target`; a context manager.

    Args:
        target_port: where the server listens.
        target_host: on which host.
        port: where the proxy listens; 0 for any free port. It keeps the port also while it refuses.

    Raises:
        ConfigurationError: when it cannot listen.
    """

    def __init__(self, target_port: int, *, target_host: str = HOST, port: int = 0) -> None:
        self._target = (target_host, target_port)
        self._weather = Weather()
        self._flips: list[_Flip] = []
        self._pairs: set[Pair] = set()
        self._counters = Counters()
        self._listener = _bound(port)
        self.port: int = self._listener.getsockname()[1]
        self._accepting: asyncio.Task[None] | None = None
        self._loop = asyncio.new_event_loop()
        self._changed = asyncio.Event()
        self._lines = {direction: asyncio.Lock() for direction in Direction}
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=f"fault-proxy-{self.port}", daemon=True)
        self._thread.start()
        self.set(Weather())

    @property
    def address(self) -> str:
        """`host:port` for clients."""
        return f"{HOST}:{self.port}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def set(self, weather: Weather) -> None:
        """Change the weather; in force when this returns."""
        self.command(lambda: self._set(weather))

    def pass_through(self) -> None:
        """Fair weather: pass on everything, as fast as it goes."""
        self.set(Weather())

    def refuse(self) -> None:
        """See `Mode.REFUSE`."""
        self.set(Weather(mode=Mode.REFUSE))

    def reset(self) -> None:
        """See `Mode.RESET`."""
        self.set(Weather(mode=Mode.RESET))

    def hang(self) -> None:
        """See `Mode.HANG`."""
        self.set(Weather(mode=Mode.HANG))

    def stall(self) -> None:
        """See `Mode.STALL`."""
        self.set(Weather(mode=Mode.STALL))

    def slow(self, *, bytes_per_s_max: int | None = None, latency_s: float = 0.0) -> None:
        """See `Weather`."""
        self.set(Weather(bytes_per_s_max=bytes_per_s_max, latency_s=latency_s))

    def drop_connections(self) -> int:
        """Reset all open connections; returns how many. The weather stays."""
        return self.command(lambda: self._reset_pairs(lambda pair: True))

    def flip_bit(
        self, direction: Direction, *, chunk: int = 1, byte: int = 0, bit: int = 0, chunk_bytes_min: int = 1
    ) -> None:
        """Flip one bit of the `chunk`-th chunk from now on that passes in this direction, on any connection.

        Args:
            direction: which way.
            chunk: 1 for the next.
            byte: which of its bytes; counted from its end when negative; the last one when the chunk is shorter.
            bit: 0 to 7.
            chunk_bytes_min: shorter chunks are not counted, so that small packets between large ones are left alone.
        """
        flip = _Flip(direction, chunk, chunk_bytes_min, byte, bit)
        self.command(lambda: self._flips.append(flip))

    def counters(self) -> Counters:
        """What happened so far."""
        return self.command(lambda: msgspec.structs.replace(self._counters, connections_open=len(self._pairs)))

    def close(self) -> None:
        """Reset what is open and stop listening. Closing twice is allowed."""
        if self._closed:
            return
        self.command(lambda: self._set(Weather(mode=Mode.RESET)))
        self._closed = True
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._listener.close()
        self._loop.close()

    def command(self, act: Callable[[], T]) -> T:
        """Run `act` on the proxy's own thread and return what it returns.

        Raises:
            TemporaryError: when the proxy is closed, or does not answer within COMMAND_TIMEOUT_S.
        """
        if self._closed:
            raise TemporaryError(f"fault proxy {self.address} is closed")

        async def acting() -> T:
            return act()

        try:
            return asyncio.run_coroutine_threadsafe(acting(), self._loop).result(COMMAND_TIMEOUT_S)
        except TimeoutError as error:
            raise TemporaryError(f"fault proxy {self.address} does not answer") from error

    # What follows runs on the proxy's own thread.

    async def relay(self, pair: Pair) -> None:
        """Pass on one connection until both sides are done. Subclasses may look closer."""
        server = await self.connect(pair)
        await self.together(
            self._pump(pair, pair.client, server, Direction.UP), self._pump(pair, server, pair.client, Direction.DOWN)
        )

    async def connect(self, pair: Pair) -> socket.socket:
        """The server's side of the connection, made when it is first needed and not before the weather allows."""
        while self._weather.mode in (Mode.STALL, Mode.HANG):
            if self._weather.mode is Mode.HANG:
                await self._swallow_all(pair)
            await self._changed.wait()
        if pair.server is None:
            pair.server = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            pair.server.setblocking(False)
            pair.server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await asyncio.wait_for(self._loop.sock_connect(pair.server, self._target), CONNECT_TIMEOUT_S)
        return pair.server

    async def receive(self, source: socket.socket) -> bytes:
        """The next chunk from one side; empty at its end. Nothing is read during a stall."""
        while self._weather.mode is Mode.STALL:
            await self._changed.wait()
        rate = self._weather.bytes_per_s_max
        size = CHUNK_BYTES_MAX if rate is None else max(1, min(CHUNK_BYTES_MAX, rate // SLICES_PER_S))
        return await self._loop.sock_recv(source, size)

    async def forward(self, pair: Pair, sink: socket.socket, direction: Direction, data: bytes) -> None:
        """Pass `data` on, in the weather of the moment."""
        while self._weather.mode is Mode.STALL:
            await self._changed.wait()
        if self._weather.mode is Mode.HANG:
            pair.swallowed = True
            self._count(bytes_swallowed_total=len(data))
            return
        if self._weather.latency_s:
            await self._pause(self._weather.latency_s)
        if (rate := self._weather.bytes_per_s_max) is not None:
            async with self._lines[direction]:
                await self._pause(len(data) / rate)
        data = self._flipped(direction, data)
        await self._loop.sock_sendall(sink, data)
        if direction is Direction.UP:
            self._count(bytes_up_total=len(data))
        else:
            self._count(bytes_down_total=len(data))

    async def together(self, *parts: Coroutine[Any, Any, None]) -> None:
        """Run the parts side by side; when one fails or is cancelled, so are the others."""
        tasks = [asyncio.ensure_future(part) for part in parts]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _pump(self, pair: Pair, source: socket.socket, sink: socket.socket, direction: Direction) -> None:
        while data := await self.receive(source):
            await self.forward(pair, sink, direction, data)
        # One side is done sending; the other may still have much to say.
        sink.shutdown(socket.SHUT_WR)

    async def _swallow_all(self, pair: Pair) -> None:
        """Read and forget until the weather changes or the client leaves."""
        pair.swallowed = True
        reading = asyncio.ensure_future(self._loop.sock_recv(pair.client, CHUNK_BYTES_MAX))
        changing = asyncio.ensure_future(self._changed.wait())
        try:
            while not changing.done():
                await asyncio.wait({reading, changing}, return_when=asyncio.FIRST_COMPLETED)
                if reading.done():
                    data = reading.result()
                    if not data:
                        raise ConnectionResetError("the client left")
                    self._count(bytes_swallowed_total=len(data))
                    reading = asyncio.ensure_future(self._loop.sock_recv(pair.client, CHUNK_BYTES_MAX))
        finally:
            reading.cancel()
            changing.cancel()
            await asyncio.gather(reading, changing, return_exceptions=True)

    async def _pause(self, seconds: float) -> None:
        """Sleep, but no longer than the weather lasts."""
        try:
            await asyncio.wait_for(self._changed.wait(), seconds)
        except TimeoutError:
            return

    def _flipped(self, direction: Direction, data: bytes) -> bytes:
        for flip in self._flips.copy():
            if flip.direction is not direction or len(data) < flip.chunk_bytes_min:
                continue
            flip.chunks_left -= 1
            if flip.chunks_left == 0:
                self._flips.remove(flip)
                spoiled = bytearray(data)
                index = flip.byte if -len(data) <= flip.byte < len(data) else -1
                spoiled[index] ^= 1 << flip.bit
                data = bytes(spoiled)
                self._count(flips_total=1)
        return data

    def _set(self, weather: Weather) -> None:
        was, self._weather = self._weather.mode, weather
        before, self._changed = self._changed, asyncio.Event()
        before.set()
        if weather.mode in (Mode.REFUSE, Mode.RESET):
            self._reset_pairs(lambda pair: True)
        elif was is Mode.HANG and weather.mode is not Mode.HANG:
            self._reset_pairs(lambda pair: pair.swallowed)
        if weather.mode is Mode.REFUSE and self._accepting is not None:
            self._accepting.cancel()
            self._accepting = None
            # On Linux this ends listening and keeps the port, which was bound by number: nobody takes it meanwhile.
            self._loop.remove_reader(self._listener)
            self._listener.shutdown(socket.SHUT_RDWR)
        elif weather.mode is not Mode.REFUSE and self._accepting is None:
            self._listener.listen(128)
            self._accepting = self._loop.create_task(self._accept())

    def _reset_pairs(self, chosen: Callable[[Pair], bool]) -> int:
        """Reset these connections at once; their tasks find out afterwards."""
        pairs = [pair for pair in self._pairs if chosen(pair)]
        for pair in pairs:
            self._drop(pair)
        return len(pairs)

    def _drop(self, pair: Pair) -> None:
        self._pairs.discard(pair)
        self._count(resets_total=1)
        if pair.task is not None:
            pair.task.cancel()
        # The loop must forget the sockets before they are closed: their numbers will belong to others.
        for side in (pair.client, pair.server):
            if side is not None and side.fileno() >= 0:
                self._loop.remove_reader(side)
                self._loop.remove_writer(side)
        pair.close(reset=True)

    async def _accept(self) -> None:
        while True:
            client, _ = await self._loop.sock_accept(self._listener)
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._count(connections_total=1)
            pair = Pair(client)
            if self._weather.mode is Mode.RESET or len(self._pairs) >= CONNECTIONS_MAX:
                self._drop(pair)
                continue
            self._pairs.add(pair)
            pair.task = self._loop.create_task(self._serve(pair))

    async def _serve(self, pair: Pair) -> None:
        failed = True
        try:
            await self.relay(pair)
            failed = False
        except (OSError, TimeoutError, EOFError):
            # One side broke the connection, or the server cannot be reached: so does the proxy, to the other side.
            failed = True
        finally:
            if pair in self._pairs:
                self._pairs.discard(pair)
                pair.close(reset=failed)

    def _count(self, **more: int) -> None:
        values = {name: getattr(self._counters, name) + number for name, number in more.items()}
        self._counters = msgspec.structs.replace(self._counters, **values)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
        left = asyncio.all_tasks(self._loop)
        for task in left:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))


def _bound(port: int) -> socket.socket:
    """A socket bound to this port by its number, also when any would do: only then a socket keeps it without listening.

    Raises:
        ConfigurationError: when the port is taken.
    """
    made = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.setblocking(False)
    try:
        made.bind((HOST, port))
    except OSError as error:
        made.close()
        raise ConfigurationError(f"fault proxy cannot listen on {HOST}:{port}: {error}") from error
    if port:
        return made
    try:
        return _bound(made.getsockname()[1])
    finally:
        made.close()
