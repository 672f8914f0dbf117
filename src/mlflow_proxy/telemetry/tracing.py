"""OpenTelemetry traces: a span per request, with one for each step of its way, sent to a collector by OTLP over HTTP.

Off unless `tracing.endpoint` is set; then nothing imports this module, and nothing of it runs. Traces begun by callers
go on (W3C Trace Context, in and out). In spans is what is in the log line, and as little as there: no header, path,
query, body or key.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable

import requests

from mlflow_proxy.settings import Tracing as Options
from mlflow_proxy.telemetry.record import Record, cut

try:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
    from opentelemetry.trace import Span, SpanKind, StatusCode, Tracer, set_span_in_context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
except ImportError as error:
    raise ImportError(
        "tracing.endpoint needs OpenTelemetry: pip install 'sagemaker-mlflow-proxy[tracing]', or "
        "pip install '.[tracing]' in a clone"
    ) from error

logger = logging.getLogger(__name__)

Headers = list[tuple[bytes, bytes]]

# For one export, its repetitions included, in seconds. A collector that is away costs spans, never requests.
_EXPORT_TIMEOUT = 5.0
# How long `close` waits for what is left to be sent, in seconds.
_CLOSING = 5.0
_CONTEXT_HEADERS = frozenset({b"traceparent", b"tracestate"})
# Methods that may be in a span's name (OpenTelemetry's semantic conventions for HTTP: few different ones).
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_OTHER_METHOD = "_OTHER"

_propagator = TraceContextTextMapPropagator()


class Tracing:
    """Makes the spans of one worker, in which it must be created: its thread does not survive a fork."""

    def __init__(self, options: Options, *, version: str) -> None:
        session = requests.Session()
        session.trust_env = False  # no proxy or password from the environment, as everywhere in the proxy
        self._provider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(options.sample)),
            resource=Resource.create({"service.name": options.service_name, "service.version": version}),
            shutdown_on_exit=False,
        )
        self._exporter = OTLPSpanExporter(options.endpoint, timeout=_EXPORT_TIMEOUT, session=session)
        self._provider.add_span_processor(BatchSpanProcessor(self._exporter))
        self._tracer = self._provider.get_tracer("mlflow_proxy", version)

    def request(self, method: str, headers: Iterable[tuple[bytes, bytes]]) -> RequestTrace:
        """Begin the span of a request with these headers; `RequestTrace.end` ends it."""
        return RequestTrace(self._tracer, method, headers)

    def close(self) -> None:
        """Send what is left. Waits for the collector, for five seconds at the most: call it in a thread."""
        sending = threading.Thread(target=self._provider.shutdown, name="traces-end", daemon=True)
        sending.start()
        sending.join(_CLOSING)
        if sending.is_alive():
            logger.warning("traces: the collector does not answer, so the last spans are lost")
            self._exporter.shutdown()  # type: ignore[no-untyped-call]


class RequestTrace:
    """The spans of one request. Its steps follow one another: to begin one ends the one before."""

    __slots__ = ("_attempts", "_context", "_kept", "_method", "_span", "_step", "_tracer", "_unanswered")

    def __init__(self, tracer: Tracer, method: str, headers: Iterable[tuple[bytes, bytes]]) -> None:
        self._tracer = tracer
        self._method = method if method in _METHODS else _OTHER_METHOD
        self._span = tracer.start_span("request", context=_propagator.extract(_carrier(headers)), kind=SpanKind.SERVER)
        self._context = set_span_in_context(self._span)
        self._kept = self._span.is_recording()  # a trace that is not kept costs no more than its context
        self._step: Span | None = None
        self._unanswered = False
        self._attempts = 0

    def step(self, name: str) -> None:
        """The next step begins: identify, authorize, limit, sign, relay."""
        if self._kept:
            self._end_step()
            self._step = self._tracer.start_span(name, context=self._context)

    def upstream(self, headers: Headers, host: str, port: int) -> Headers:
        """An attempt at the service begins. Gives the headers to send: with the context of its span, whatever the
        caller's was.
        """
        if self._kept:
            self._end_step()
            self._step = self._attempt(host, port)
        carrier: dict[str, str] = {}
        _propagator.inject(carrier, set_span_in_context(self._step or self._span))
        own = [(name.encode("ascii"), value.encode("latin-1")) for name, value in carrier.items()]
        return [pair for pair in headers if pair[0] not in _CONTEXT_HEADERS] + own

    def _attempt(self, host: str, port: int) -> Span:
        attributes: dict[str, str | int] = {
            "http.request.method": self._method,
            "server.address": host,
            "server.port": port,
        }
        if self._attempts:
            attributes["http.request.resend_count"] = self._attempts
        self._attempts += 1
        self._unanswered = True
        return self._tracer.start_span("upstream", context=self._context, kind=SpanKind.CLIENT, attributes=attributes)

    def answered(self, status: int) -> None:
        """The head of the service's answer has arrived; ends the attempt."""
        if self._step is not None:
            self._step.set_attribute("http.response.status_code", status)
            self._unanswered = False
            self._end_step(str(status) if status >= 400 else "")

    def end(self, record: Record) -> None:
        """The request is finished, and its record whole."""
        if not self._kept:
            self._span.end()
            return
        refused = str(record.status) if record.error else ""
        self._end_step(record.upstream_error if self._unanswered else refused)
        span = self._span
        span.update_name(f"{self._method} {record.route}" if record.route else self._method)
        attributes: dict[str, str | int] = {
            "http.request.method": self._method,
            "http.response.status_code": record.status,
            "client.address": _encodable(record.caller_address),
            "mlflow_proxy.request_id": record.request_id,
            "mlflow_proxy.caller": _encodable(cut(record.caller)),
            "mlflow_proxy.role": record.role,
            "mlflow_proxy.target": record.target,
            "mlflow_proxy.action": cut(record.action),
            "mlflow_proxy.limit": record.limit,
            "mlflow_proxy.upstream_request_id": _encodable(record.upstream_request_id),
            "http.route": record.route,
        }
        span.set_attributes({name: value for name, value in attributes.items() if value})
        if record.status >= 500 or not record.status:
            _mark_failed(span, record.upstream_error or str(record.status))
        span.end()

    def _end_step(self, error: str = "") -> None:
        """End the step that is under way; `error` is why, if it failed, as an attempt without an answer always did."""
        if self._step is None:
            return
        if error or self._unanswered:
            _mark_failed(self._step, error or "no answer")
        self._step.end()
        self._step, self._unanswered = None, False


def _mark_failed(span: Span, error: str) -> None:
    span.set_attribute("error.type", error)
    span.set_status(StatusCode.ERROR)


def _encodable(text: str) -> str:
    """What callers and services say may have lone surrogates, and one of those would cost a whole batch of spans."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _carrier(headers: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    """The trace context among a request's headers; none if there are two, which could mean two things."""
    parents = [value for name, value in headers if name == b"traceparent"]
    if len(parents) != 1:
        return {}
    states = [value for name, value in headers if name == b"tracestate"]
    return {"traceparent": parents[0].decode("latin-1"), "tracestate": b",".join(states).decode("latin-1")}
