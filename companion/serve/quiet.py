"""uvicorn's server, awake when there is something to do: its own loop looks ten times a second whether it should end."""

import asyncio
from contextlib import suppress
from types import FrameType

import uvicorn

TICK = 1.0  # seconds: how old the date in the answers may be


class Server(uvicorn.Server):
    """Ends as soon as the signal comes, and until then sleeps but for the date."""

    _loop: asyncio.AbstractEventLoop | None = None

    async def main_loop(self) -> None:
        self._ended = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        while not await self.on_tick(0):
            with suppress(TimeoutError):
                await asyncio.wait_for(self._ended.wait(), TICK)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._ended.set)
