"""An engine behind a SGLang server: its native ``/generate``, token ids in, token ids out.

    generate(ids, sampling) ──> POST /generate {rid, input_ids, sampling_params, return_logprob}
                            <── meta_info.output_token_logprobs: (log-probability, id, _) per token
    cancelled               ──> POST /abort_request {rid}, and the connection closes

What the log-probabilities are (SGLang 0.5.11 and 0.5.23, ``layers/sampler.py``):
log softmax(logits / T) of the sampled id *before* top-p cuts the tail; at temperature 0
log softmax(logits). With ``top_p`` = 1 that is the distribution which was drawn from; with
``top_p`` < 1 it is not renormalised, so train with ``top_p`` = 1. A server started with
SGLANG_RETURN_ORIGINAL_LOGPROB=1 leaves the temperature out: do not set it.

Seeds count only on a server that was started with ``--enable-deterministic-inference``, which needs
a GPU; elsewhere SGLang ignores them, and a warning in the log says so once.
"""

from __future__ import annotations

import logging
import secrets
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import anyio

from swarm_sdk.errors import ConfigError, ModelError
from swarm_sdk.model_backend.http import Retry, ServerClient, data_url
from swarm_sdk.types import FinishReason, Generation

if TYPE_CHECKING:
    from collections.abc import Sequence

    from swarm_sdk.types import Image, Sampling

_log = logging.getLogger(__name__)

_ABORT_WITHIN_S: Final = 5.0
_FINISH_REASONS: Final[dict[str, FinishReason]] = {
    "stop": "stop",
    "length": "length",
    "abort": "abort",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SglangServer:
    """What a SGLang server tells of itself."""

    model_path: str
    tokenizer_path: str
    context_tokens: int
    """Prompt and answer together."""
    weight_version: int
    honours_seeds: bool


class SglangEngine:
    """``Engine`` over SGLang's native API."""

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None = None,
        media_pad_id: int | None = None,
        retry: Retry | None = None,
        timeout_s: float = 600.0,
        max_connections: int = 0,
    ) -> None:
        """Check the settings; connects to nothing.

        ``media_pad_id`` is the placeholder of a picture's tokens: SGLang wants one a picture and
        expands it by itself, so runs of it are sent as one. ``None`` for models without pictures.
        ``timeout_s`` bounds one request; ``max_connections`` = 0 sets no bound.

        Raises:
            ConfigError: ``base_url`` is no http(s) address, or a number is out of range.
        """
        self._client = ServerClient(
            base_url, api_key=api_key, timeout_s=timeout_s, max_connections=max_connections
        )
        self._media_pad_id = media_pad_id
        self._retry = Retry() if retry is None else retry
        self._running: dict[str, anyio.Event] = {}
        """Requests by id; each event is set when its request ends."""
        self._is_closing = False
        self._server: SglangServer | None = None

    async def generate(
        self, token_ids: Sequence[int], sampling: Sampling, images: Sequence[Image] = ()
    ) -> Generation:
        """Continue ``token_ids``; see ``Engine.generate``. The stop token is among the ids.

        Raises:
            ConfigError: no token ids, or images for an engine without ``media_pad_id``.
            ContextOverflow, ModelError: as ``ServerClient.post``, after the retries.
        """
        if not token_ids:
            raise ConfigError("there is nothing to continue: token_ids is empty")
        if images and self._media_pad_id is None:
            raise ConfigError("give SglangEngine the media_pad_id of its model to send it images")
        if sampling.seed is not None:
            await self._warn_if_seeds_are_ignored()
        payload: dict[str, Any] = {
            "input_ids": self._with_one_pad_an_image(token_ids),
            "sampling_params": {
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "max_new_tokens": sampling.max_tokens,
                "stop_token_ids": list(sampling.stop_token_ids),
                # A deterministic server takes one fixed seed for all requests that name none.
                "sampling_seed": secrets.randbits(31) if sampling.seed is None else sampling.seed,
            },
            "return_logprob": True,
        }
        if images:
            payload["image_data"] = [data_url(image) for image in images]
        try:
            answer = await self._retry.run(lambda: self._post(payload))
        except ModelError:
            if self._is_closing:
                return Generation(token_ids=(), logprobs=(), finish_reason="abort")
            raise
        return generation_of(answer)

    async def server(self) -> SglangServer:
        """Ask the server what it serves; asked once.

        Raises:
            ModelError: it does not answer, or is no SGLang server.
        """
        if self._server is None:
            model = await self._retry.run(lambda: self._client.get("/model_info"))
            served = await self._retry.run(lambda: self._client.get("/v1/models"))
            settings = await self._retry.run(lambda: self._client.get("/server_info"))
            try:
                self._server = SglangServer(
                    model_path=model["model_path"],
                    tokenizer_path=model["tokenizer_path"],
                    context_tokens=served["data"][0]["max_model_len"],
                    weight_version=_version(model.get("weight_version")),
                    honours_seeds=settings["enable_deterministic_inference"],
                )
            except (KeyError, IndexError, TypeError) as error:
                raise ModelError(
                    f"{self._client.base_url} answers, but not as a SGLang server does; "
                    "for other servers use openai:URL#MODEL"
                ) from error
        return self._server

    async def aclose(self) -> None:
        """Abort what runs, then close the connections."""
        self._is_closing = True
        with anyio.move_on_after(_ABORT_WITHIN_S):
            for request_id, ended in tuple(self._running.items()):
                await self._abort(request_id)
                await ended.wait()
        await self._client.aclose()

    async def _post(self, payload: dict[str, Any]) -> Any:
        """One try, under an id of its own: an earlier try may still run on the server."""
        request_id = uuid.uuid4().hex
        self._running[request_id] = anyio.Event()
        try:
            return await self._client.post("/generate", {"rid": request_id, **payload})
        except anyio.get_cancelled_exc_class():
            with anyio.move_on_after(_ABORT_WITHIN_S, shield=True):
                await self._abort(request_id)
            raise
        finally:
            self._running.pop(request_id).set()

    async def _abort(self, request_id: str) -> None:
        try:
            await self._client.post("/abort_request", {"rid": request_id})
        except ModelError as error:
            # The closed connection ends the request as well, only later.
            _log.warning("could not abort request %s: %s", request_id, error)

    async def _warn_if_seeds_are_ignored(self) -> None:
        is_first = self._server is None
        server = await self.server()
        if is_first and not server.honours_seeds:
            _log.warning(
                "%s ignores seeds; start it with --enable-deterministic-inference to have them",
                self._client.base_url,
            )

    def _with_one_pad_an_image(self, token_ids: Sequence[int]) -> list[int]:
        pad = self._media_pad_id
        return [
            token_id
            for index, token_id in enumerate(token_ids)
            if token_id != pad or index == 0 or token_ids[index - 1] != pad
        ]


def generation_of(answer: Any) -> Generation:
    """Read an answer of ``/generate``.

    Raises:
        ModelError: the answer is not SGLang's, or a token in it has no log-probability.
    """
    try:
        info = answer["meta_info"]
        finish = info["finish_reason"]
        pairs = [(logprob, token_id) for logprob, token_id, *_ in info["output_token_logprobs"]]
        generation = Generation(
            token_ids=tuple(token_id for _, token_id in pairs),
            logprobs=tuple(logprob for logprob, _ in pairs),
            finish_reason=_FINISH_REASONS[finish["type"]],
            weight_version=_version(info.get("weight_version")),
            num_prompt_tokens=info["prompt_tokens"],
            num_cached_tokens=info["cached_tokens"],
            num_completion_tokens=info["completion_tokens"],
        )
        output_ids, matched = answer["output_ids"], finish.get("matched")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ModelError(f"the SGLang server sent an answer without {error}") from error
    if tuple(output_ids) != generation.token_ids:
        raise ModelError("the SGLang server sent token ids and log-probabilities that differ")
    if isinstance(matched, int) and generation.token_ids[-1:] != (matched,):
        raise ModelError(f"the SGLang server left the stop token {matched} out of its answer")
    return generation


def _version(told: Any) -> int:
    """SGLang names weights by any string (``default`` at the start); ours are numbers from 0."""
    return int(told) if isinstance(told, str) and told.isdecimal() else 0
