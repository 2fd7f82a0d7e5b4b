"""An engine behind SGLang servers: their native ``/generate``, token ids in, token ids out.

    generate(ids, sampling) ──> Router ──> POST /generate {rid, input_ids, sampling_params, …}
                            <── meta_info.output_token_logprobs: (log-probability, id, _) per token
    stream(…, tell)         <── the same, in pieces
    cancelled               ──> POST /abort_request {rid}, and the connection closes

    before the first call of a server,   its tokenizer is compared with ours
    and after a connection was lost
    no answer, or cut off; 500, 502 …    the next server, at once; its dialogues stay there
    429, 503                             the same server again, later (``Retry``, ``Pace``); with
                                         the last try the next one

What the log-probabilities are (SGLang 0.5.11 and 0.5.23, ``layers/sampler.py``):
log softmax(logits / T) of the sampled id *before* top-p cuts the tail; at temperature 0
log softmax(logits). With ``top_p`` = 1 that is the distribution which was drawn from; with
``top_p`` < 1 it is not renormalised, so train with ``top_p`` = 1. Under a JSON schema it is that of
the ids which the schema allowed. A server started with SGLANG_RETURN_ORIGINAL_LOGPROB=1 leaves the
temperature out: do not set it.

Ids go in as they are, but for prompts with pictures on SGLang 0.5.11: it spells those and reads
them again, so ids that its tokenizer would not choose become others (0.5.23 keeps them).

Seeds count only on a server that was started with ``--enable-deterministic-inference``, which needs
a GPU; elsewhere SGLang ignores them, and a warning in the log says so once. Experts are recorded by
a server that was started with ``--enable-return-routed-experts``.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
import uuid
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import anyio

from swarm_sdk.errors import ConfigError, ContextOverflow, ModelError, SwarmError
from swarm_sdk.model_backend.chat.dialogue import TokenModel
from swarm_sdk.model_backend.chat.template import ChatFormat
from swarm_sdk.model_backend.chat.tokenizer import Tokenizer
from swarm_sdk.model_backend.http import OVERLOADED, Retry, ServerClient, data_url
from swarm_sdk.model_backend.model.config_json import read_json, section
from swarm_sdk.model_backend.routing import Router
from swarm_sdk.model_backend.sglang_wire import (
    ExpertsShape,
    Piece,
    generation_of,
    joined,
    piece_of,
    spans_of,
    version_of,
)
from swarm_sdk.types import Generation

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from swarm_sdk.types import Image, Sampling

_log = logging.getLogger(__name__)

_ROUTING_HEADER: Final = "X-SMG-Routing-Key"
"""By which SGLang's own router, where one stands before its servers, keeps a dialogue on one."""
_ABORT_WITHIN_S: Final = 5.0
_HEALTHY_WITHIN_S: Final = 5.0
_NUM_PROBED: Final = 4096
"""Tokens of the vocabulary that are compared with the server's: all of a small one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SglangServer:
    """What a SGLang server tells of itself."""

    version: str
    model_path: str
    tokenizer_path: str
    context_tokens: int
    """Prompt and answer together."""
    weight_version: int
    honours_seeds: bool
    has_vision: bool
    has_grammar: bool
    """Whether it can hold a turn to a JSON schema."""
    records_experts: bool


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What the client must know of the model behind a server: ``SglangEngine`` checks it."""

    tokenizer: Tokenizer
    experts: ExpertsShape | None = None
    """Set to have routed experts recorded."""

    def probe(self) -> tuple[list[int], str]:
        """Ids to be spelled by the server, and the hash that it must come to (:func:`spelled`)."""
        total = self.tokenizer.num_tokens
        ids = list(range(0, total, max(1, total // _NUM_PROBED)))
        return ids, spelled([self.tokenizer.decode([token_id]) for token_id in ids])


def spelled(texts: Sequence[str]) -> str:
    """SHA-256 of tokens' texts: two tokenizers that agree on it share a vocabulary."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


@dataclass(slots=True)
class _Known:
    """What is known of one server."""

    told: SglangServer | None = None
    asking: anyio.Lock = field(default_factory=anyio.Lock)
    failure: SwarmError | None = None
    """Why it was last asked in vain."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Call:
    """What is asked, whichever server is asked."""

    payload: dict[str, Any]
    num_prompt_tokens: int
    """Those of pictures included, of which the payload has one a picture."""
    sampling: Sampling
    tell: Callable[[Piece], None] | None
    """Gets the tokens as they come, if set."""
    busy: set[int] = field(default_factory=set)
    """Servers that it waited for."""


class SglangEngine:
    """``Engine`` over the native API of one SGLang server, or of several with the same weights."""

    def __init__(
        self,
        base_urls: str | Sequence[str],
        *,
        model: ServedModel | None = None,
        api_key: str | None = None,
        retry: Retry | None = None,
        timeout_s: float = 600.0,
        max_connections: int = 0,
    ) -> None:
        """Check the settings; connects to nothing.

        Without ``model`` nothing is known of the server's: its tokenizer is not compared, pictures
        cannot be sent and experts are not read. ``timeout_s`` bounds one request;
        ``max_connections`` of each server, 0 sets no bound.

        Raises:
            ConfigError: an address is no http(s) address, or a number is out of range.
        """
        urls = [base_urls] if isinstance(base_urls, str) else list(base_urls)
        if not urls or len(set(urls)) < len(urls):
            raise ConfigError("give SglangEngine one address or several, each once")
        self._clients = [
            ServerClient(url, api_key=api_key, timeout_s=timeout_s, max_connections=max_connections)
            for url in urls
        ]
        self._model = model
        self._retry = Retry() if retry is None else retry
        self._router = Router(len(urls))
        self._running: dict[str, tuple[int, anyio.Event]] = {}
        """Requests by id: at which server, and an event that is set when the request ends."""
        self._is_closing = False
        self._known = [_Known() for _ in urls]
        self._warned: set[str] = set()

    @property
    def base_urls(self) -> tuple[str, ...]:
        """The servers' addresses."""
        return tuple(client.base_url for client in self._clients)

    def num_running(self, number: int = 0) -> int:
        """Calls that a server is answering now."""
        return sum(at == number for at, _ in self._running.values())

    async def generate(
        self, token_ids: Sequence[int], sampling: Sampling, images: Sequence[Image] = ()
    ) -> Generation:
        """Continue ``token_ids``; see ``Engine.generate``. The stop token is among the ids.

        With a ``model``, ``max_tokens`` is cut to the room that is left in the server's context.

        Raises:
            ConfigError: no token ids, an id outside the vocabulary, images for a model or a server
                without vision, or the server has another tokenizer than ``model``.
            ContextOverflow, ModelError: as ``ServerClient.post``, after the retries.
        """
        return await self._generate(token_ids, sampling, images, None)

    async def stream(
        self,
        token_ids: Sequence[int],
        sampling: Sampling,
        tell: Callable[[Piece], None],
        images: Sequence[Image] = (),
    ) -> Generation:
        """As ``generate``, and ``tell`` gets the tokens as they come.

        Costs the server and the client more than ``generate`` does. What ``tell`` raises ends the
        call and aborts the request. The versions in ``Generation.version_spans`` are known from any
        server here.
        """
        return await self._generate(token_ids, sampling, images, tell)

    async def server(self, number: int = 0) -> SglangServer:
        """Ask a server what it serves, and compare its tokenizer; not again while it answers.

        Raises:
            ConfigError: its tokenizer is not that of ``model``, or it is SGLang's router.
            ModelError: it does not answer, or is no SGLang server.
        """
        return await self._retry.run(lambda: self._told(number))

    async def are_healthy(self) -> tuple[bool, ...]:
        """Whether each server answers ``/health`` in 5 s; no retries."""

        async def ask(number: int) -> None:
            try:
                with anyio.fail_after(_HEALTHY_WITHIN_S):
                    await self._clients[number].get("/health")
            except (ModelError, TimeoutError):
                return
            found[number] = True

        found = [False] * len(self._clients)
        async with anyio.create_task_group() as tasks:
            for number in range(len(self._clients)):
                tasks.start_soon(ask, number, name=f"health of {self._clients[number].base_url}")
        return tuple(found)

    async def aclose(self) -> None:
        """Abort what runs, then close the connections."""
        self._is_closing = True
        with anyio.move_on_after(_ABORT_WITHIN_S):
            for request_id, (number, ended) in tuple(self._running.items()):
                await self._abort(number, request_id)
                await ended.wait()
        for client in self._clients:
            await client.aclose()

    # -- one call --------------------------------------------------------------------------------

    async def _generate(
        self,
        token_ids: Sequence[int],
        sampling: Sampling,
        images: Sequence[Image],
        tell: Callable[[Piece], None] | None,
    ) -> Generation:
        self._check_open()
        call = _Call(
            payload=self._payload(token_ids, sampling, images),
            num_prompt_tokens=len(token_ids),
            sampling=sampling,
            tell=tell,
        )
        num_tries = 0

        async def once() -> Generation:
            nonlocal num_tries
            num_tries += 1
            return await self._anywhere(call, is_last=num_tries == self._retry.attempts)

        try:
            try:
                return await self._retry.run(once)
            except ModelError as error:
                if error.status not in OVERLOADED or num_tries == self._retry.attempts:
                    raise
                return await self._anywhere(call, is_last=True, after=error)  # no time is left
        except ModelError:
            if self._is_closing:
                return Generation(token_ids=(), logprobs=(), finish_reason="abort")
            raise
        except _ListenerError as error:
            raise error.raised from error

    def _payload(
        self, token_ids: Sequence[int], sampling: Sampling, images: Sequence[Image]
    ) -> dict[str, Any]:
        if not token_ids:
            raise ConfigError("there is nothing to continue: token_ids is empty")
        if self._model is None:
            if images:
                raise ConfigError("give SglangEngine the ServedModel to send it images")
        elif not 0 <= min(token_ids) <= max(token_ids) < self._model.tokenizer.num_tokens:
            # It would end a server that embeds on the CPU.
            raise ConfigError(
                f"token_ids go from {min(token_ids)} to {max(token_ids)}, and the vocabulary has "
                f"{self._model.tokenizer.num_tokens}; use the tokenizer of the served model"
            )
        for image in images:
            if not image.media_type.startswith("image/"):  # SGLang's K2.5 processor has no videos
                raise ConfigError(
                    f"{image.name or 'a file'} is no picture ({image.media_type}); SGLang takes "
                    "PNG and JPEG for this model, so send the frames that matter"
                )
        params: dict[str, Any] = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_new_tokens": sampling.max_tokens,
            "stop_token_ids": list(sampling.stop_token_ids),
            # A deterministic server takes one fixed seed for all requests that name none.
            "sampling_seed": secrets.randbits(31) if sampling.seed is None else sampling.seed,
        }
        if sampling.json_schema:
            params["json_schema"] = sampling.json_schema
        payload: dict[str, Any] = {
            "input_ids": self._with_one_pad_an_image(token_ids),
            "sampling_params": params,
            "return_logprob": True,
        }
        if images:
            payload["image_data"] = [data_url(image) for image in images]
        return payload

    async def _anywhere(
        self, call: _Call, *, is_last: bool, after: ModelError | None = None
    ) -> Generation:
        """One try: at the key's server, and at the others where that one fails.

        One that is busy is waited for, since it has the prompt cached; but not with the last try.
        It was waited for long enough if ``after`` is its last error.
        """
        failure = after
        tried = frozenset() if after is None else frozenset(call.busy)
        while (number := self._router.pick(call.sampling.routing_key, beside=tried)) is not None:
            try:
                self._check_open()
                generation = await self._at(number, call)
            except ModelError as error:
                is_waited_for = error.status in OVERLOADED and not is_last
                if is_waited_for:
                    call.busy.add(number)
                if not error.retryable or is_waited_for or self._is_closing:
                    raise
                if error.status is None:
                    self._router.failed(number)
                    self._known[number].told = None  # another may answer there next
                tried, failure = tried | {number}, error
                if len(self._clients) > 1:
                    _log.warning("%s; its calls go on elsewhere", error)
            else:
                for other in tried:  # the fault was theirs and not the call's
                    self._router.failed(other)
                self._router.answered(number)
                return generation
            finally:
                self._router.leave(number)
        assert failure is not None
        raise failure

    async def _at(self, number: int, call: _Call) -> Generation:
        """One try at one server."""
        sampling, payload, shape = call.sampling, call.payload, None
        if self._model is not None or sampling.seed is not None or sampling.json_schema:
            payload, shape = self._fitted(number, await self._told(number), call)
        pieces: list[Piece] = []

        def keep(piece: Piece) -> None:
            pieces.append(piece)
            if call.tell is not None:
                try:
                    call.tell(piece)
                except ModelError as error:  # not the server's, which would be asked again
                    raise _ListenerError(error) from error

        listener = None if call.tell is None else keep
        answer = await self._post(number, payload, listener, sampling.routing_key)
        generation = generation_of(answer, shape=shape, experts_from=sampling.experts_from or 0)
        if pieces and not generation.version_spans:  # SGLang 0.5.11 tells them in the pieces only
            generation = replace(generation, version_spans=spans_of(pieces))
        if generation.finish_reason == "abort" and not self._is_closing:
            # Not by us: an update of the weights ends what runs, if it is told to.
            url = self._clients[number].base_url
            raise ModelError(f"{url} ended a request before its time", status=503, retryable=True)
        return generation

    async def _told(self, number: int) -> SglangServer:
        """What a server tells of itself; calls that need it at once share one answer or failure."""
        known = self._known[number]
        if known.told is None:
            failure_before = known.failure
            async with known.asking:
                if known.told is None:
                    if known.failure is not None and known.failure is not failure_before:
                        raise known.failure  # of a call that asked while this one waited
                    try:
                        known.told = await self._ask_server(number)
                    except SwarmError as error:
                        known.failure = error
                        raise
        return known.told

    def _fitted(
        self, number: int, server: SglangServer, call: _Call
    ) -> tuple[dict[str, Any], ExpertsShape | None]:
        """Build what a server is sent, by what it can do; the shape of the experts it records.

        Raises:
            ConfigError: it cannot do what is asked.
            ContextOverflow: the prompt leaves no room in its context.
        """
        url, sampling = self._clients[number].base_url, call.sampling
        if "image_data" in call.payload and not server.has_vision:
            raise ConfigError(f"{url} serves a model without vision; send it no images")
        room = server.context_tokens - call.num_prompt_tokens
        if room <= 0:
            raise ContextOverflow(
                num_prompt_tokens=call.num_prompt_tokens, limit_tokens=server.context_tokens
            )
        params = call.payload["sampling_params"] | {
            "max_new_tokens": min(sampling.max_tokens, room)
        }
        if sampling.json_schema and not server.has_grammar:
            self._warn(f"{url} has no grammar and reads over JSON schemas; start it with one")
            del params["json_schema"]
        if sampling.seed is not None and not server.honours_seeds:
            self._warn(
                f"{url} ignores seeds; start it with --enable-deterministic-inference to have them"
            )
        payload = call.payload | {"sampling_params": params}
        wants_experts = sampling.experts_from is not None and server.records_experts
        shape = self._model.experts if self._model is not None and wants_experts else None
        if shape is not None:
            payload["return_routed_experts"] = True
            payload["routed_experts_start_len"] = sampling.experts_from
        return payload, shape

    def _check_open(self) -> None:
        if self._is_closing:
            raise ModelError("the engine is closed; make a new one")

    def _warn(self, sentence: str) -> None:
        """Log a warning, the first time that it is due."""
        if sentence not in self._warned:
            self._warned.add(sentence)
            _log.warning(sentence)

    async def _post(
        self,
        number: int,
        payload: dict[str, Any],
        tell: Callable[[Piece], None] | None,
        routing_key: str,
    ) -> Any:
        """One request, under an id of its own: an earlier try may still run on the server."""
        request_id = uuid.uuid4().hex
        self._running[request_id] = (number, anyio.Event())
        client, body = self._clients[number], {"rid": request_id, **payload}
        headers = {_ROUTING_HEADER: routing_key} if routing_key else None
        try:
            if tell is None:
                return await client.post("/generate", body, headers=headers, is_paced=True)
            return await _streamed(client, body, tell, headers)
        except ModelError:
            raise
        except BaseException:  # cancelled, or what ``tell`` raised
            with anyio.move_on_after(_ABORT_WITHIN_S, shield=True):
                await self._abort(number, request_id)
            raise
        finally:
            self._running.pop(request_id)[1].set()

    async def _abort(self, number: int, request_id: str) -> None:
        try:
            await self._clients[number].post("/abort_request", {"rid": request_id})
        except ModelError as error:
            # The closed connection ends the request as well, only later.
            _log.warning("could not abort request %s: %s", request_id, error)

    async def _ask_server(self, number: int) -> SglangServer:
        client = self._clients[number]
        try:
            model = await client.get("/model_info")
        except ModelError as error:
            if error.status != HTTPStatus.NOT_FOUND:
                raise
            await _check_no_router(client)
            raise _another_kind(client) from error
        served = await client.get("/v1/models")
        settings = await client.get("/server_info")
        try:
            server = SglangServer(
                version=settings["version"],
                model_path=model["model_path"],
                tokenizer_path=model["tokenizer_path"],
                context_tokens=served["data"][0]["max_model_len"],
                weight_version=version_of(model.get("weight_version")),
                honours_seeds=settings["enable_deterministic_inference"],
                has_vision=model["has_image_understanding"],
                has_grammar=settings["grammar_backend"] != "none",
                records_experts=settings["enable_return_routed_experts"],
            )
        except (KeyError, IndexError, TypeError) as error:
            raise _another_kind(client) from error
        if self._model is not None:
            await _compare_tokenizer(client, server, self._model)
        return server

    def _with_one_pad_an_image(self, token_ids: Sequence[int]) -> list[int]:
        """SGLang wants one placeholder a picture and expands it by itself."""
        pad = None if self._model is None else self._model.tokenizer.special.media_pad
        if pad is None or pad not in token_ids:
            return list(token_ids)
        return [
            token_id
            for index, token_id in enumerate(token_ids)
            if token_id != pad or index == 0 or token_ids[index - 1] != pad
        ]


def open_sglang(
    base_urls: str | Sequence[str],
    directory: str | Path,
    *,
    sees_images: bool = False,
    records_experts: bool = True,
    api_key: str | None = None,
    name: str | None = None,
) -> TokenModel:
    """Take the model of ``directory`` (its ``config.json`` and tokenizer) as SGLang serves it.

    ``sees_images`` sends pictures to it instead of telling it their names. ``records_experts``
    keeps which experts were chosen, where the servers tell. Connects to nothing.

    Raises:
        ConfigError: an address is none, or a file is missing or broken.
    """
    tokenizer = Tokenizer.from_dir(directory)
    # Not the whole configuration: SGLang serves kinds that our own network does not (INT4).
    text = section(read_json(Path(directory)), "text_config")
    try:
        context_tokens = int(text["max_position_embeddings"])
        shape = ExpertsShape(
            num_layers=int(text["num_hidden_layers"]), num_chosen=int(text["num_experts_per_tok"])
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"config.json in '{directory}' is no K2.5 model's: text_config lacks {error}"
        ) from error
    urls = [base_urls] if isinstance(base_urls, str) else list(base_urls)
    return TokenModel(
        name=name or ",".join(urls),
        engine=SglangEngine(
            urls,
            model=ServedModel(tokenizer, shape if records_experts else None),
            api_key=api_key,
        ),
        chat_format=ChatFormat(
            tokenizer,
            thinking=True,
            has_vision=sees_images,
            num_image_tokens=_num_image_tokens if sees_images else None,
        ),
        context_tokens=context_tokens,
        has_grammar=True,  # where a server has none, it warns
    )


class _ListenerError(Exception):
    """Brings what a stream's listener raised past those who mend what servers do."""

    def __init__(self, raised: ModelError) -> None:
        super().__init__(str(raised))
        self.raised = raised


async def _streamed(
    client: ServerClient,
    body: dict[str, Any],
    tell: Callable[[Piece], None],
    headers: dict[str, str] | None,
) -> Any:
    """The answer of one streamed request; its pieces go to ``tell`` on the way."""
    last: Any = None
    pieces: list[Piece] = []
    num_known = 0

    def take(answer: Any) -> None:
        nonlocal last, num_known
        piece, last = piece_of(answer, num_known), answer
        if piece.token_ids:
            pieces.append(piece)
            num_known += len(piece.token_ids)
            tell(piece)

    await client.stream("/generate", {**body, "stream": True}, take, headers=headers)
    if last is None:
        raise ModelError(f"{client.base_url} sent a stream without an answer", retryable=True)
    return joined(last, pieces)


def _another_kind(client: ServerClient) -> ModelError:
    return ModelError(
        f"{client.base_url} answers, but not as a SGLang server does; "
        "for other servers use openai:URL#MODEL"
    )


async def _check_no_router(client: ServerClient) -> None:
    """Raise if SGLang's router answers, which passes on too little of what its servers tell."""
    try:
        told = await client.get("/get_server_info")
    except ModelError:
        return
    if isinstance(told, dict) and told.get("router_manager"):
        raise ConfigError(
            f"{client.base_url} is SGLang's router, which does not tell what its servers serve; "
            "give the servers' own addresses in its place: sglang:URL1,URL2"
        )


async def _compare_tokenizer(
    client: ServerClient, server: SglangServer, model: ServedModel
) -> None:
    ids, ours = model.probe()
    asked = {"tokens": [[token_id] for token_id in ids], "skip_special_tokens": False}
    try:
        texts = (await client.post("/v1/detokenize", asked))["text"]
        theirs = spelled(texts)
    except (KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{client.base_url} does not spell tokens as SGLang does") from error
    if theirs != ours:
        raise ConfigError(
            f"{client.base_url} serves {server.model_path}, whose tokenizer is another than "
            f"ours (hash {theirs[:12]}, ours {ours[:12]}); give the directory of that model: "
            "sglang:URL#DIRECTORY"
        )


def _num_image_tokens(image: Image) -> int:
    from swarm_sdk.model_backend.model import media  # needs numpy, which text does not

    width, height = media.decode_image(image.data, image.name or "the image").size
    return media.num_image_tokens(width, height)
