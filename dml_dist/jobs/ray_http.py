"""The HTTP interface of a Ray head's dashboard: requests with a token, streams of logs, errors.

Ray's own client of it has no time limits, and lets RAY_ADDRESS replace the address that a job's
record holds.
"""

from __future__ import annotations

import asyncio
import json
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dml_dist.errors import ConfigError, RunError

_TIMEOUT_SECONDS = 20.0
# A stream of a log may fall silent although the job has ended.
_SECONDS_OF_SILENCE = 10.0


class Dashboard:
    """The dashboard at an address, as http://HOST:PORT."""

    def __init__(self, address: str) -> None:
        """Nothing is sent."""
        self.address = address.rstrip("/")

    def call(
        self,
        method: str,
        path: str,
        *,
        data: bytes | None = None,
        missing: bool = False,
        expects: str | None = None,
        anonymous: bool = False,
    ) -> Any:
        """Return the answer of the head, JSON or nothing.

        Args:
            method: The HTTP method.
            path: The path below the address.
            data: What is sent.
            missing: Whether to return None where there is no such thing.
            expects: A key that the answer of a head has.
            anonymous: Whether to keep the token back.

        Raises:
            ConfigError: If the token is missing or wrong.
            RunError: If there is no answer, or another one.
        """
        headers = {"Content-Type": "application/json"} | ({} if anonymous else _authorization())
        request = urllib.request.Request(
            self.address + path, data=data, headers=headers, method=method
        )
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as response:
                body = response.read()
        except urllib.error.HTTPError as error:
            if missing and error.code == 404:
                return None
            if expects is not None and error.code == 404:
                raise self._stranger() from None
            raise self._refusal(error) from None
        except OSError as error:  # URLError and time-outs, too.
            raise RunError(
                f"no Ray cluster answers at {self.address} "
                f"({getattr(error, 'reason', None) or error}); start one with `ray start --head`, "
                "give its dashboard with --set address=http://HOST:8265, or reach it with "
                "`ssh -L 8265:127.0.0.1:8265 HEAD`"
            ) from None
        try:
            answer = json.loads(body) if body else {}
        except ValueError:
            answer = {}
        if expects is not None and not (isinstance(answer, dict) and expects in answer):
            raise self._stranger()
        return answer

    def is_open(self) -> bool:
        """Whether the head answers without a token; a driver then has to connect without one."""
        try:
            self.call("GET", "/api/version", anonymous=True)
        except ConfigError:
            return False
        return True

    def _stranger(self) -> RunError:
        return RunError(
            f"{self.address} answers, but not as the dashboard of a Ray cluster; give its "
            "address with --set address=http://HOST:8265"
        )

    def _refusal(self, error: urllib.error.HTTPError) -> ConfigError | RunError:
        sources = "RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token"
        if error.code == 401:
            return ConfigError(
                f"the cluster {self.address} needs a token, and none was found in {sources}; copy "
                "the head's token there, with mode 0600"
            )
        if error.code == 403:
            return ConfigError(
                f"the cluster {self.address} refuses the token from {_token_source()}; copy the "
                "head's token there, and check that the address is the right one"
            )
        lines = error.read().decode(errors="replace").strip().splitlines()
        return RunError(
            f"the cluster {self.address} answers {error.code} {error.reason}"
            f"{f' ({lines[-1]})' if lines else ''}; see dashboard.log of its head"
        )

    def stream_log(self, job: str, has_ended: Callable[[], bool]) -> Iterator[str]:
        """Give the pieces of a job's log from its beginning, until the stream ends.

        The stream may end early, while the job goes on.

        Args:
            job: Identifier of the job.
            has_ended: Whether the job has ended; asked when nothing came for some seconds.
        """
        url = f"{self.address}/api/jobs/{job}/logs/tail"
        pieces: asyncio.Queue[str | None] = asyncio.Queue()

        async def first() -> asyncio.Task[None]:
            return asyncio.create_task(_receive(url, pieces))

        async def following() -> str | None:
            return await asyncio.wait_for(pieces.get(), _SECONDS_OF_SILENCE)

        with asyncio.Runner() as runner:
            task = runner.run(first())
            while True:
                try:
                    piece = runner.run(following())
                except TimeoutError:
                    if has_ended():
                        return
                    continue
                if piece is None:
                    runner.run(asyncio.wait_for(task, None))
                    return
                yield piece


async def _receive(url: str, pieces: asyncio.Queue[str | None]) -> None:
    """Put the text of a websocket into a queue, then None."""
    import aiohttp

    try:
        async with (
            aiohttp.ClientSession(headers=_authorization()) as session,
            session.ws_connect(url) as socket,
        ):
            async for message in socket:
                if message.type is aiohttp.WSMsgType.TEXT:
                    pieces.put_nowait(message.data)
    except (aiohttp.ClientError, OSError):
        pass  # Whether the job goes on is a question for its status.
    finally:
        pieces.put_nowait(None)


def _token_source() -> str | None:
    """Return where Ray finds its token, in Ray's order; None if there is none."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return "RAY_AUTH_TOKEN"
    path = os.environ.get("RAY_AUTH_TOKEN_PATH")
    if path:
        return path
    default = Path("~/.ray/auth_token").expanduser()
    return str(default) if default.is_file() else None


def token() -> str | None:
    """Return the token of the cluster, from where Ray itself looks for it; None if there is none.

    Raises:
        ConfigError: If the file that RAY_AUTH_TOKEN_PATH names cannot be read.
    """
    source = _token_source()
    if source is None or source == "RAY_AUTH_TOKEN":
        return os.environ.get("RAY_AUTH_TOKEN") or None
    try:
        return Path(source).read_text(encoding="utf-8").strip() or None
    except OSError as error:
        raise ConfigError(
            f"the token of the cluster cannot be read from {source} ({error.strerror}); correct "
            "RAY_AUTH_TOKEN_PATH"
        ) from None


def _authorization() -> dict[str, str]:
    found = token()
    return {} if found is None else {"Authorization": f"Bearer {found}"}
