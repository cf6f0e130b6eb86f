"""A helper process of a benchmark: a module of ours that answers lines on stdin by lines on stdout.

Gone when the context ends, and by itself when this process dies, because its stdin closes.
"""

import asyncio
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

END_TIMEOUT_SECONDS = 5.0
MAX_LINE_BYTES = 2**24


class ChildFailed(Exception):
    """The process ended before it answered; what it said is on stderr."""


class Child:
    def __init__(self, process: Process, module: str) -> None:
        assert process.stdin is not None and process.stdout is not None
        self._module = module
        self._stdin, self._stdout = process.stdin, process.stdout

    async def ask(self, question: str) -> str:
        self._stdin.write(f"{question}\n".encode())
        return await self.listen()

    async def listen(self) -> str:
        """The next line that it says."""
        if line := await self._stdout.readline():
            return line.decode()
        raise ChildFailed(f"the process of {self._module} ended early")


@asynccontextmanager
async def started(module: str, *arguments: str) -> AsyncIterator[Child]:
    command = (sys.executable, "-m", module, *arguments)
    process = await asyncio.create_subprocess_exec(
        *command, stdin=PIPE, stdout=PIPE, limit=MAX_LINE_BYTES
    )
    try:
        yield Child(process, module)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        try:
            await asyncio.wait_for(process.wait(), END_TIMEOUT_SECONDS)
        except TimeoutError:
            process.kill()
            await process.wait()
