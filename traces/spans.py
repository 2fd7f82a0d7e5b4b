"""Spans of an episode, at a cost that lets them stay on.

    episode span   by the tracer: the sampler decides here, once an episode
    all below it   made whole when they end, and handed to the provider's processors

Most of what a span costs goes into deciding on it and into locking what may still change; a span
that is made when all of it is known needs neither. Processors see these spans in ``on_end`` only.
A tracer that is not the SDK's is used by the API's own way.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace import Tracer as SdkTracer
from opentelemetry.trace import (
    NonRecordingSpan,
    SpanContext,
    Status,
    StatusCode,
    TraceFlags,
    TraceState,
)

from swarm_sdk.traces import schema
from swarm_sdk.traces.ledger import Row

Step = tuple[Row, str, dict[str, Any], int, int]
"""A span that is over: the row that it points to, name, attributes, start and end (ns)."""

_ERROR = Status(StatusCode.ERROR)
_UNSET = Status(StatusCode.UNSET)


class EpisodeSpans:
    """Makes the spans below one episode's span."""

    __slots__ = (
        "_flags",
        "_is_sdk",
        "_new_id",
        "_processor",
        "_resource",
        "_scope",
        "_state",
        "_trace_id",
        "is_on",
        "tracer",
    )

    def __init__(self, tracer: trace.Tracer, root: trace.Span) -> None:
        """``root`` is the episode's span, current now."""
        self.tracer: trace.Tracer = tracer
        self.is_on: bool = root.is_recording()
        """Whether anybody collects the spans of this episode."""
        self._is_sdk = False
        context = root.get_span_context()
        self._trace_id: int = context.trace_id
        self._flags: TraceFlags = context.trace_flags
        self._state: TraceState = context.trace_state
        if self.is_on and isinstance(tracer, SdkTracer) and isinstance(root, ReadableSpan):
            self._is_sdk = True
            self._resource = root.resource
            self._scope = root.instrumentation_scope
            self._processor = tracer.span_processor
            self._new_id = tracer.id_generator.generate_span_id

    @contextmanager
    def agent(
        self, name: str, attributes: Mapping[str, Any], started_ns: int, now_ns: Any
    ) -> Iterator[SpanContext | None]:
        """A span that is the current one inside; yields what its children are made with."""
        if not self.is_on:
            yield None
            return
        if not self._is_sdk:
            with self.tracer.start_as_current_span(
                name, start_time=started_ns, attributes=attributes
            ):
                yield None
            return
        parent = trace.get_current_span().get_span_context()
        own = self._child()
        token = otel_context.attach(trace.set_span_in_context(NonRecordingSpan(own)))
        status = _ERROR
        try:
            yield own
            status = _UNSET
        finally:
            otel_context.detach(token)
            self._emit(name, own, parent, attributes, started_ns, now_ns(), status)

    def steps(self, parent: SpanContext | None, ended: Sequence[Step]) -> None:
        """Spans that are over; ``parent`` is what ``agent`` gave."""
        if not self._is_sdk or parent is None:
            for _, name, attributes, started_ns, ended_ns in ended:
                span = self.tracer.start_span(name, start_time=started_ns, attributes=attributes)
                if schema.ERROR_TYPE in attributes:
                    span.set_status(StatusCode.ERROR)
                span.end(end_time=ended_ns)
            return
        for _, name, attributes, started_ns, ended_ns in ended:
            status = _ERROR if schema.ERROR_TYPE in attributes else _UNSET
            self._emit(name, self._child(), parent, attributes, started_ns, ended_ns, status)

    def _child(self) -> SpanContext:
        return SpanContext(self._trace_id, self._new_id(), False, self._flags, self._state)  # noqa: FBT003

    def _emit(
        self,
        name: str,
        own: SpanContext,
        parent: SpanContext,
        attributes: Mapping[str, Any],
        started_ns: int,
        ended_ns: int,
        status: Status,
    ) -> None:
        self._processor.on_end(
            ReadableSpan(
                name=name,
                context=own,
                parent=parent,
                resource=self._resource,
                attributes=attributes,
                status=status,
                start_time=started_ns,
                end_time=ended_ns,
                instrumentation_scope=self._scope,
            )
        )
