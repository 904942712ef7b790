"""Work that waits, or calculates, beside the event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import TypeVar, cast

from contract.errors import TemporaryError

Result = TypeVar("Result")


class NotStartedError(TemporaryError):
    """There was no thread for it. Give back what was taken for the work, and try again."""


async def in_thread(work: Callable[[], Result], name: str) -> Result:
    """Run something in a daemon thread: the process can end while it hangs.

    Whoever waits may be cancelled; the thread goes on then, and nobody hears of it.

    Args:
        work: what to run; what it raises, this raises.
        name: of the thread.

    Raises:
        NotStartedError: the system gives no thread now; `work` does not run.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Result] = loop.create_future()

    def settle(found: Result | None, failure: Exception | None) -> None:
        if done.done():
            return
        if failure is not None:
            done.set_exception(failure)
        else:
            done.set_result(cast("Result", found))

    def run() -> None:
        found: Result | None = None
        failure: Exception | None = None
        try:
            found = work()
        except Exception as caught:  # noqa: BLE001 - handed to who waits
            failure = caught
        try:
            loop.call_soon_threadsafe(settle, found, failure)
        except RuntimeError:
            pass  # the loop is closed: the process ends, and nobody waits any more

    try:
        threading.Thread(target=run, name=name, daemon=True).start()
    except RuntimeError as error:
        raise NotStartedError(f"no thread could be started ({error}); try again when less is going on") from error
    return await done
