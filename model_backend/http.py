"""HTTP to a model server: kept connections, typed errors, one rule for asking again.

    Retry.run(attempt) ──> ServerClient.post(path, json) ──> Pool (kept connections)
                                                          └─ through Pace, if it samples

What went wrong decides the error, and the error decides whether to ask again:

    refused, reset, cut off, silent too long, body cut or no JSON   retryable
    408, 429, 500, 502, 503, 504                                    retryable, after Retry-After
    400 and 413 that tell of the context length                     ContextOverflow
    any other status >= 300                                         not retryable
"""

from __future__ import annotations

import asyncio
import base64
import json
import re
import ssl
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final, TypeVar
from urllib.parse import quote, urlsplit
from weakref import WeakKeyDictionary

import anyio
import tenacity
from pydantic_core import from_json, to_json

from swarm_sdk.errors import ConfigError, ContextOverflow, ModelError
from swarm_sdk.model_backend.pacing import Pace
from swarm_sdk.model_backend.transport import BrokenConnection, CannotConnect, Pool, Response

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from swarm_sdk.types import Image

AnswerT = TypeVar("AnswerT")

_RETRYABLE_STATUSES: Final = frozenset({408, 429, 500, 502, 503, 504})
OVERLOADED: Final = frozenset({429, 503})
"""What slows down all calls of the process to the server."""
_LONGEST_QUOTE: Final = 400
"""Characters of a server's error message that ours repeats."""

# How servers word that a prompt is too long, the most telling number first: OpenAI, vLLM, SGLang,
# Moonshot, llama.cpp. A message counts only if it names the limit and the prompt.
_LIMIT_PATTERNS: Final = (
    r"context (?:length|window|size)(?: of| is)?\W{0,4}(\d+)",
    r"limit of (\d+) tokens",
    r"allowed length \((\d+) tokens",
    r"token limit\W{1,3}(\d+)",
    r"n_ctx\W{1,4}(\d+)",
)
_PROMPT_PATTERNS: Final = (
    r"(\d+) tokens from the input",
    r"(\d+) (?:tokens )?in the (?:messages|prompt)",
    r"resulted in (\d+) tokens",
    r"has (\d+) input tokens",
    r"(?:input|Input length) \((\d+) tokens",
    r"n_prompt_tokens\W{1,4}(\d+)",
    r"requested\W{1,3}(?:a total of )?(\d+)",
)


class _BusyError(ModelError):
    """A retryable error of a server that said how long to wait."""

    def __init__(self, message: str, *, status: int, retry_after_s: float) -> None:
        super().__init__(message, status=status, retryable=True)
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Retry:
    """How often a failed call is tried again: waits grow as 2^k with jitter."""

    attempts: int = 6
    """Tries in all, the first included."""
    total_s: float = 600.0
    """No try starts later than this after the first."""
    first_wait_s: float = 0.5
    longest_wait_s: float = 30.0
    """Bound of the growing wait; a server's own Retry-After may be longer."""

    def __post_init__(self) -> None:
        if self.attempts < 1 or min(self.total_s, self.first_wait_s, self.longest_wait_s) < 0:
            raise ConfigError(f"retries need attempts >= 1 and no negative time, got {self}")

    async def run(self, attempt: Callable[[], Awaitable[AnswerT]]) -> AnswerT:
        """Call ``attempt`` until it returns, fails for good, or the tries are used up.

        Raises:
            ModelError: that of the last try.
        """
        try:
            return await attempt()
        except ModelError as error:
            if not error.retryable:
                raise
            first = error
        return await self._again(attempt, first)

    async def _again(self, attempt: Callable[[], Awaitable[AnswerT]], first: ModelError) -> AnswerT:
        """All tries after the first, which failed with ``first`` and counts as one."""
        failed: ModelError | None = first
        grow = tenacity.wait_random_exponential(
            multiplier=self.first_wait_s, max=self.longest_wait_s
        )

        def wait_s(state: tenacity.RetryCallState) -> float:
            error = state.outcome.exception() if state.outcome is not None else None
            asked_s = error.retry_after_s if isinstance(error, _BusyError) else 0.0
            return max(asked_s, grow(state))

        async def once() -> AnswerT:
            nonlocal failed
            if failed is not None:
                error, failed = failed, None
                raise error
            return await attempt()

        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception(_is_retryable),
            wait=wait_s,
            stop=tenacity.stop_after_attempt(self.attempts)
            | tenacity.stop_before_delay(self.total_s),
            sleep=anyio.sleep,
            reraise=True,
        )
        return await retrying(once)


def _is_retryable(error: BaseException) -> bool:
    return isinstance(error, ModelError) and error.retryable


class ServerClient:
    """Posts JSON to one server and gets JSON back.

    The session opens with the first call, inside the running event loop; every loop has its own, so
    a client outlives ``anyio.run``. Cancelling a call closes its connection.
    """

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None = None,
        timeout_s: float = 600.0,
        max_connections: int = 0,
    ) -> None:
        """Check the address; connects to nothing.

        ``timeout_s`` bounds one call. ``max_connections`` = 0 sets no bound.

        Raises:
            ConfigError: ``base_url`` is no http(s) address, or a number is out of range.
        """
        self.base_url: str = _checked_url(base_url)
        if timeout_s <= 0 or max_connections < 0:
            raise ConfigError("timeout_s must be > 0 and max_connections >= 0")
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if api_key is not None:
            headers["Authorization"] = f"Bearer {_checked_key(api_key)}"
        self._headers = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        self._timeout_s = timeout_s
        self._max_connections = max_connections
        self._heads: dict[str, bytes] = {}
        """What a request begins with, up to the length of its body, by method and address."""
        self._here: tuple[asyncio.AbstractEventLoop, str, Pool, Pace] | None = None
        """The running event loop's own; another loop gets others."""
        self._pools: WeakKeyDictionary[asyncio.AbstractEventLoop, Pool] = WeakKeyDictionary()

    async def post(
        self,
        path: str,
        payload: Mapping[str, Any],
        *,
        headers: Mapping[str, str] | None = None,
        is_paced: bool = False,
    ) -> Any:
        """Send ``payload`` once and give back the parsed answer.

        ``headers`` go with this call beside those of all; their values are percent-encoded. A call
        that samples ``is_paced``: it waits for its place. One that controls the server must not, or
        it would wait for the very calls that it is to pause, abort or let go on.

        Raises:
            ModelError: as the table at the top of this file; ``status`` where there was one.
            ContextOverflow: the server said that the prompt does not fit.
        """
        return await self._call("POST", path, payload, headers=headers, is_paced=is_paced)

    async def command(self, path: str, payload: Mapping[str, Any]) -> None:
        """Send ``payload`` once; of the answer only the status counts. Raises as ``post``."""
        await self._call("POST", path, payload, lambda _: None)

    async def stream(
        self,
        path: str,
        payload: Mapping[str, Any],
        tell: Callable[[Any], None],
        *,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Send ``payload`` once, paced; ``tell`` gets each server-sent event, parsed, as it comes.

        Raises:
            ModelError, ContextOverflow: as ``post``; also where an event tells of an error, which
                servers send under status 200 once they have begun.
            Exception: what ``tell`` raised; the connection is closed at once.
        """
        events = _Events(self.base_url + path, tell)
        try:
            await self._call("POST", path, payload, events.feed, headers=headers, is_paced=True)
        except ModelError:
            if events.failure is None:
                raise
        events.end()

    async def get(self, path: str) -> Any:
        """Read ``path`` once; raises as ``post``."""
        return await self._call("GET", path, None)

    async def aclose(self) -> None:
        """Close the connections of this event loop."""
        self._here = None
        pool = self._pools.pop(asyncio.get_running_loop(), None)
        if pool is not None:
            pool.close()
            await asyncio.sleep(0)  # the event loop closes the sockets in its next turn

    async def _call(
        self,
        method: str,
        path: str,
        payload: Mapping[str, Any] | None,
        on_body: Callable[[bytes], None] | None = None,
        *,
        headers: Mapping[str, str] | None = None,
        is_paced: bool = False,
    ) -> Any:
        pool, pace = self._connections()
        if not is_paced:
            return await self._send(pool, method, path, payload, on_body, headers)
        began_s = await pace.enter()
        try:
            answer = await self._send(pool, method, path, payload, on_body, headers)
        except _BusyError as error:
            if error.status in OVERLOADED:
                pace.overloaded(began_s, error.retry_after_s)
            raise
        finally:
            pace.leave()
        pace.answered()
        return answer

    def _connections(self) -> tuple[Pool, Pace]:
        loop = asyncio.get_running_loop()
        here = self._here
        if here is None or here[0] is not loop or here[1] != self.base_url:
            url = urlsplit(self.base_url)
            tls = ssl.create_default_context() if url.scheme == "https" else None
            pool = Pool(
                url.hostname or "",
                url.port or (443 if tls is not None else 80),
                tls=tls,
                max_connections=self._max_connections,
            )
            self._pools[loop] = pool
            here = self._here = (loop, self.base_url, pool, Pace.of(self.base_url))
        return here[2], here[3]

    async def _send(
        self,
        pool: Pool,
        method: str,
        path: str,
        payload: Mapping[str, Any] | None,
        on_body: Callable[[bytes], None] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Any:
        url = self.base_url + path
        body = b"" if payload is None else to_json(payload)
        head = self._heads.get(method + url) or self._head(method, url)
        more = b""
        if headers:
            more = "".join(f"\r\n{name}: {quote(headers[name])}" for name in headers).encode()
        content = b"%b%d%b\r\n\r\n%b" % (head, len(body), more, body)
        try:
            async with asyncio.timeout(self._timeout_s):
                response = await pool.request(content, on_body)
        except CannotConnect as error:
            raise _connect_error(self.base_url, error) from error
        except TimeoutError as error:
            raise ModelError(
                f"{url} gave no answer within {self._timeout_s:g} s", retryable=True
            ) from error
        except BrokenConnection as error:
            raise ModelError(
                f"the connection to {url} broke before the answer was complete", retryable=True
            ) from error
        if response.status >= HTTPStatus.MULTIPLE_CHOICES:
            raise _error_of(url, response)
        if not response.body:
            return None
        try:
            return from_json(response.body)
        except ValueError as error:
            raise ModelError(f"{url} sent an answer that is not JSON", retryable=True) from error

    def _head(self, method: str, url: str) -> bytes:
        """The head of a request but for the number of its body's bytes, kept for the next one."""
        parts = urlsplit(url)
        target = quote(parts.path or "/", safe="/%:@!$&'()*+,;=-._~")
        target += f"?{parts.query}" if parts.query else ""
        host = parts.netloc.rpartition("@")[2].encode("idna").decode()
        head = f"{method} {target} HTTP/1.1\r\nHost: {host}\r\n{self._headers}Content-Length: "
        self._heads[method + url] = encoded = head.encode("latin-1")
        return encoded


class _Events:
    """Cuts a body into server-sent events; only their ``data`` lines count."""

    def __init__(self, url: str, tell: Callable[[Any], None]) -> None:
        self._url, self._tell = url, tell
        self._open = b""
        """A line that has not come to its end."""
        self.failure: Exception | None = None
        """What ended the stream before its time."""
        self._is_done = False

    def feed(self, body: bytes) -> None:
        """Take a part of the body; what is raised here closes the connection."""
        *lines, self._open = (self._open + body).split(b"\n")
        try:
            for line in lines:
                if line.startswith(b"data:"):
                    self._take(line[5:].strip())
        except Exception as error:
            self.failure = error
            raise

    def _take(self, data: bytes) -> None:
        if data == b"[DONE]":
            self._is_done = True
            return
        try:
            event = from_json(data)
        except ValueError as error:
            raise ModelError(f"{self._url} sent an event that is not JSON") from error
        if isinstance(event, dict) and "error" in event:
            raise _event_error(self._url, data.decode("utf-8", errors="replace"))
        self._tell(event)

    def end(self) -> None:
        """Raise what an event told of, or ``tell`` raised; or that the last one did not come."""
        if self.failure is not None:
            raise self.failure
        if not self._is_done:
            raise ModelError(f"the stream of {self._url} broke before its end", retryable=True)


def _event_error(url: str, text: str) -> ModelError:
    """Build the error that an event tells of."""
    overflow = context_overflow(text)
    message, _ = _message_and_code(text)
    return overflow or ModelError(f"{url} answered with an error: {message}")


def _connect_error(base_url: str, error: CannotConnect) -> ModelError:
    if isinstance(error.__cause__, ssl.SSLCertVerificationError):
        return ModelError(f"{base_url} does not show a valid certificate: {error}")
    return ModelError(
        f"no server answers at {base_url}; start it, or correct the address", retryable=True
    )


def _checked_key(api_key: str) -> str:
    if not api_key.isascii() or not api_key.isprintable():
        raise ConfigError("the API key holds characters that no HTTP header can; copy it again")
    return api_key


def context_overflow(message: str) -> ContextOverflow | None:
    """Read the overflow that a server's error message tells of; ``None`` if it tells of none.

    >>> context_overflow("The input (90 tokens) is longer than the model's context length "
    ...                  "(64 tokens).").limit_tokens
    64
    """
    limit = _first_number(_LIMIT_PATTERNS, message)
    prompt = _first_number(_PROMPT_PATTERNS, message)
    if limit is None or prompt is None:
        return None
    return ContextOverflow(num_prompt_tokens=prompt, limit_tokens=limit)


def _first_number(patterns: tuple[str, ...], message: str) -> int | None:
    for pattern in patterns:
        if found := re.search(pattern, message):
            return int(found[1])
    return None


def data_url(image: Image) -> str:
    """Encode the picture as a ``data:`` address, as servers take it in JSON."""
    return f"data:{image.media_type};base64,{base64.b64encode(image.data).decode('ascii')}"


def _checked_url(base_url: str) -> str:
    try:
        parts = urlsplit(base_url)
        _ = parts.port  # raises where it is no number
    except ValueError:
        parts = urlsplit("")
    if parts.scheme not in {"http", "https"} or not parts.hostname or parts.query or parts.fragment:
        raise ConfigError(
            f"{base_url!r} is not the address of a server; give one like http://HOST:PORT/v1"
        )
    return base_url.rstrip("/")


def _error_of(url: str, response: Response) -> ModelError:
    """Build the error for an answer with a status >= 300."""
    status = response.status
    text = response.body.decode("utf-8", errors="replace")
    message, code = _message_and_code(text)
    if status in {HTTPStatus.BAD_REQUEST, HTTPStatus.REQUEST_ENTITY_TOO_LARGE}:
        overflow = context_overflow(text)
        if overflow is not None:
            return overflow
    sentence = f"{url} answered {status}: {message or response.reason}"
    # A spent quota comes as 429 as well, and waiting does not refill it.
    if status not in _RETRYABLE_STATUSES or code == "insufficient_quota":
        return ModelError(sentence, status=status)
    return _BusyError(sentence, status=status, retry_after_s=_retry_after_s(response.headers))


def _message_and_code(text: str) -> tuple[str, str]:
    """Read what a server says of its error, on one line, and its error code."""
    try:
        found = json.loads(text)
    except ValueError:
        found = text
    if isinstance(found, dict) and isinstance(found.get("error"), dict | str):
        found = found["error"]
    code = ""
    if isinstance(found, dict):
        code = str(found.get("code") or found.get("type") or "")
        found = found.get("message") or found.get("detail") or found
    message = " ".join(str(found or "").split())
    return (message if len(message) <= _LONGEST_QUOTE else message[:_LONGEST_QUOTE] + "…"), code


def _retry_after_s(headers: Mapping[str, str]) -> float:
    """Seconds to wait by the ``Retry-After`` header, which holds seconds or a date; 0 without."""
    value = headers.get("retry-after", "")
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (TypeError, ValueError):
        return 0.0
