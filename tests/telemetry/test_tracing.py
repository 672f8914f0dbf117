"""Traces as a collector gets them: a real OTLP receiver decodes what arrives."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from mlflow_proxy.settings import Tracing as Options
from mlflow_proxy.telemetry import tracing as module
from mlflow_proxy.telemetry.record import Record
from mlflow_proxy.telemetry.tracing import RequestTrace, Tracing

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = "00f067aa0ba902b7"
HEADERS = [(b"accept", b"*/*"), (b"traceparent", f"00-{TRACE}-{PARENT}-01".encode()), (b"tracestate", b"vendor=a")]


class Collector:
    """An OTLP/HTTP receiver. What it got is in `spans`, by name; `answers` can be withheld."""

    def __init__(self) -> None:
        self.requests: list[ExportTraceServiceRequest] = []
        self.headers: list[dict[str, str]] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                data = self.rfile.read(int(self.headers["content-length"]))
                collector.headers.append({name.lower(): value for name, value in self.headers.items()})
                collector.requests.append(ExportTraceServiceRequest.FromString(data))
                self.send_response(200)
                self.send_header("content-type", "application/x-protobuf")
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1/traces"

    @property
    def all(self) -> list[Span]:
        return [
            span
            for request in self.requests
            for of in request.resource_spans
            for scope in of.scope_spans
            for span in scope.spans
        ]

    @property
    def spans(self) -> dict[str, Span]:
        found = {span.name: span for span in self.all}
        assert len(found) == len(self.all)
        return found

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.close()


def attributes(span: Span) -> dict[str, Any]:
    return {
        pair.key: pair.value.string_value or pair.value.int_value
        for pair in span.attributes  # all of ours are texts and numbers
    }


def record_of(**values: Any) -> Record:
    record = Record("POST", "request-00000001")
    usual = {
        "caller_address": "198.51.100.7",
        "caller": "key:ci",
        "role": "writer",
        "target": "dev",
        "action": "SetTag",
        "route": "/api/2.0/mlflow/runs/set-tag",
        "status": 200,
        "upstream_request_id": "aws-1",
    }
    for name, value in {**usual, **values}.items():
        setattr(record, name, value)
    return record


def trace_of(
    collector: Collector,
    way: Callable[[RequestTrace], None],
    headers: list[tuple[bytes, bytes]] | None = None,
    sample: float = 1.0,
    **values: Any,
) -> dict[str, Span]:
    tracing = Tracing(Options(endpoint=collector.url, sample=sample, service_name="the-proxy"), version="1.2.3")
    trace = tracing.request("POST", headers or [])
    way(trace)
    trace.end(record_of(**values))
    tracing.close()
    return collector.spans


def whole_way(trace: RequestTrace) -> None:
    for step in ("identify", "authorize", "limit", "sign"):
        trace.step(step)
    trace.upstream([], "mlflow.example.com", 443)
    trace.answered(200)
    trace.step("relay")


NAME = "POST /api/2.0/mlflow/runs/set-tag"


def test_spans_of_a_request(collector: Collector) -> None:
    spans = trace_of(collector, whole_way)
    assert list(spans) == ["identify", "authorize", "limit", "sign", "upstream", "relay", NAME]
    server = spans.pop(NAME)
    assert server.kind == Span.SPAN_KIND_SERVER
    assert server.parent_span_id == b""
    assert attributes(server) == {
        "http.request.method": "POST",
        "http.response.status_code": 200,
        "http.route": "/api/2.0/mlflow/runs/set-tag",
        "client.address": "198.51.100.7",
        "mlflow_proxy.request_id": "request-00000001",
        "mlflow_proxy.caller": "key:ci",
        "mlflow_proxy.role": "writer",
        "mlflow_proxy.target": "dev",
        "mlflow_proxy.action": "SetTag",
        "mlflow_proxy.upstream_request_id": "aws-1",
    }
    ends = server.start_time_unix_nano
    for span in spans.values():
        assert span.trace_id == server.trace_id
        assert span.parent_span_id == server.span_id
        assert span.status.code == Status.STATUS_CODE_UNSET
        assert ends <= span.start_time_unix_nano <= span.end_time_unix_nano <= server.end_time_unix_nano
        ends = span.end_time_unix_nano
    assert spans["upstream"].kind == Span.SPAN_KIND_CLIENT
    assert spans["identify"].kind == Span.SPAN_KIND_INTERNAL
    assert attributes(spans["upstream"]) == {
        "http.request.method": "POST",
        "server.address": "mlflow.example.com",
        "server.port": 443,
        "http.response.status_code": 200,
    }
    (resource,) = {str(of.resource) for request in collector.requests for of in request.resource_spans}
    assert "the-proxy" in resource
    assert "1.2.3" in resource


# Trace context


def sampled(headers: dict[bytes, bytes]) -> bool:
    """By the lowest bit of the flags (W3C Trace Context, section 3.2.2.5); others may be set."""
    match = re.fullmatch(rb"00-[0-9a-f]{32}-[0-9a-f]{16}-([0-9a-f]{2})", headers[b"traceparent"])
    assert match
    return bool(int(match[1], 16) & 1)


def sent(collector: Collector, headers: list[tuple[bytes, bytes]], sample: float = 1.0) -> dict[bytes, bytes]:
    out: list[tuple[bytes, bytes]] = []
    trace_of(collector, lambda trace: out.extend(trace.upstream(headers, "h", 443)), headers, sample)
    assert len(dict(out)) == len(out)
    return dict(out)


def test_a_callers_trace_goes_on(collector: Collector) -> None:
    out = sent(collector, HEADERS)
    spans = collector.spans
    assert spans[NAME].trace_id.hex() == TRACE
    assert spans[NAME].parent_span_id.hex() == PARENT
    assert out == {
        b"accept": b"*/*",
        b"traceparent": f"00-{TRACE}-{spans['upstream'].span_id.hex()}-01".encode(),
        b"tracestate": b"vendor=a",
    }


def test_without_a_trace_one_begins(collector: Collector) -> None:
    out = sent(collector, [(b"accept", b"*/*")])
    span = collector.spans["upstream"]
    assert out[b"traceparent"].decode()[:-2] == f"00-{span.trace_id.hex()}-{span.span_id.hex()}-"
    assert sampled(out)
    assert b"tracestate" not in out


@pytest.mark.parametrize(
    "headers",
    [
        [(b"traceparent", b"nonsense")],
        [(b"traceparent", f"00-{'0' * 32}-{PARENT}-01".encode())],
        [(b"traceparent", b"\xff\xfe"), (b"tracestate", b"\xff=\x01")],
        [HEADERS[1], (b"traceparent", f"00-{'a' * 32}-{PARENT}-01".encode())],
        [(b"tracestate", b"vendor=a")],
    ],
)
def test_a_context_that_is_none_is_not_taken_nor_passed_on(
    headers: list[tuple[bytes, bytes]], collector: Collector
) -> None:
    out = sent(collector, headers)
    assert collector.spans[NAME].parent_span_id == b""
    assert sampled(out)
    assert TRACE.encode() not in out[b"traceparent"]
    assert b"tracestate" not in out


def test_sampling(collector: Collector) -> None:
    """A caller's decision stands; without one, `sample` decides. The context goes on either way."""
    out = sent(collector, HEADERS, sample=0.0)
    assert sampled(out)
    assert len(collector.all) == 2
    unsampled = [(b"traceparent", f"00-{TRACE}-{PARENT}-00".encode())]
    out = sent(collector, unsampled, sample=1.0)
    assert out[b"traceparent"].startswith(f"00-{TRACE}-".encode())
    assert not sampled(out)
    assert PARENT.encode() not in out[b"traceparent"]
    out = sent(collector, [], sample=0.0)
    assert not sampled(out)
    assert len(collector.all) == 2


def test_the_share_that_is_kept(collector: Collector) -> None:
    tracing = Tracing(Options(endpoint=collector.url, sample=0.25), version="1")
    for _ in range(1000):
        trace = tracing.request("GET", [])
        trace.step("identify")
        trace.end(record_of())
    tracing.close()
    assert 2 * 150 < len(collector.all) < 2 * 350


# Failures


def test_a_refusal_marks_the_step_that_refused(collector: Collector) -> None:
    def way(trace: RequestTrace) -> None:
        trace.step("identify")
        trace.step("authorize")

    spans = trace_of(collector, way, status=403, error="The role 'reader' does not allow SetTag")
    assert spans["identify"].status.code == Status.STATUS_CODE_UNSET
    assert spans["authorize"].status.code == Status.STATUS_CODE_ERROR
    assert attributes(spans["authorize"]) == {"error.type": "403"}
    assert spans[NAME].status.code == Status.STATUS_CODE_UNSET  # for a server, 4xx is the caller's error
    assert attributes(spans[NAME])["http.response.status_code"] == 403


def test_attempts_that_were_repeated(collector: Collector) -> None:
    def way(trace: RequestTrace) -> None:
        trace.upstream([], "h", 443)
        trace.step("sign")
        trace.upstream([], "h", 443)
        trace.answered(429)
        trace.upstream([], "h", 443)
        trace.answered(200)

    tracing = Tracing(Options(endpoint=collector.url), version="1")
    trace = tracing.request("POST", [])
    way(trace)
    trace.end(record_of(retries=2))
    tracing.close()
    attempts = [attributes(span) for span in collector.all if span.name == "upstream"]
    assert [attempt.get("error.type") for attempt in attempts] == ["no answer", "429", None]
    assert [attempt.get("http.request.resend_count") for attempt in attempts] == [None, 1, 2]
    assert [attempt.get("http.response.status_code") for attempt in attempts] == [None, 429, 200]
    assert {"sign"} == {span.name for span in collector.all if not attributes(span)}


def test_no_answer(collector: Collector) -> None:
    spans = trace_of(
        collector,
        lambda trace: [trace.upstream([], "h", 443)],  # type: ignore[arg-type]
        status=502,
        error="refused",
        upstream_error="connect",
    )
    for name in ("upstream", NAME):
        assert spans[name].status.code == Status.STATUS_CODE_ERROR
        assert attributes(spans[name])["error.type"] == "connect"


@pytest.mark.parametrize(("values", "error"), [({"status": 500}, "500"), ({"status": 0}, "0")])
def test_errors_of_the_proxy(values: dict[str, Any], error: str, collector: Collector) -> None:
    span = trace_of(collector, lambda trace: trace.step("identify"), **values)[NAME]
    assert span.status.code == Status.STATUS_CODE_ERROR
    assert attributes(span)["error.type"] == error


# What others say


def test_hostile_values_cost_no_spans(collector: Collector) -> None:
    spans = trace_of(
        collector, whole_way, caller="\ud800" * 1000, caller_address="\udfff", upstream_request_id="\ud801"
    )
    assert attributes(spans[NAME])["mlflow_proxy.caller"] == "?" * 256 + "…"
    assert attributes(spans[NAME])["client.address"] == "?"


def test_unknown_methods_are_one(collector: Collector) -> None:
    tracing = Tracing(Options(endpoint=collector.url), version="1")
    tracing.request("BREW", []).end(record_of(route=""))
    tracing.close()
    assert list(collector.spans) == ["_OTHER"]


def test_nothing_secret_is_in_a_span(collector: Collector) -> None:
    headers = [*HEADERS, (b"authorization", b"Bearer SECRET"), (b"cookie", b"SECRET"), (b"x-api-key", b"SECRET")]
    record = record_of(error="SECRET", credential="SECRET", resources={"key": "SECRET"})
    record.set_cookie = b"SECRET"
    tracing = Tracing(Options(endpoint=collector.url), version="1")
    trace = tracing.request("POST", headers)
    trace.upstream(headers, "h", 443)
    trace.end(record)
    tracing.close()
    assert len(collector.all) == 2
    assert "SECRET" not in str(collector.requests)


# The way to the collector


def test_the_environments_proxy_is_not_used(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert list(trace_of(collector, lambda trace: trace.step("identify"))) == ["identify", NAME]


def test_headers_for_the_collector_come_from_opentelemetrys_variables(
    collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-team=ml")
    trace_of(collector, lambda trace: trace.step("identify"))
    assert collector.headers[0]["x-team"] == "ml"


@pytest.mark.parametrize("kind", ["silent", "away"])
def test_a_collector_that_does_not_answer_holds_up_nobody(
    kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "_CLOSING", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        if kind == "away":
            server.close()
        tracing = Tracing(Options(endpoint=f"http://127.0.0.1:{port}/v1/traces"), version="1")
        for _ in range(5000):
            trace = tracing.request("GET", [])
            trace.step("identify")
            trace.end(record_of())
        began = time.monotonic()
        tracing.close()
        taken = time.monotonic() - began
    assert taken < module._EXPORT_TIMEOUT
    assert "last spans are lost" in caplog.text or kind == "away"


def test_off_means_not_even_imported() -> None:
    """The service without `tracing.endpoint` (Redis's client has a use of its own for OpenTelemetry's metrics)."""
    program = "import sys, mlflow_proxy.gateway; print([name for name in sys.modules if 'telemetry' in name])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "'mlflow_proxy.telemetry.record'" in done.stdout
    for name in ("mlflow_proxy.telemetry.tracing", "opentelemetry.sdk.trace", "opentelemetry.exporter"):
        assert f"'{name}'" not in done.stdout


def test_without_the_extra_it_says_what_to_install(tmp_path: Any) -> None:
    package = tmp_path / "opentelemetry"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('not there')")
    program = "import mlflow_proxy.telemetry.tracing"
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 1
    assert "pip install 'sagemaker-mlflow-proxy[tracing]'" in done.stderr


def test_the_configuration_says_what_to_install(tmp_path: Any) -> None:
    """The packages above the exporter are not there, either."""
    config = tmp_path / "proxy.toml"
    config.write_text(
        '[tracing]\nendpoint = "http://127.0.0.1:4318/v1/traces"\n[[targets]]\nname = "prod"\n'
        'arn = "arn:aws:sagemaker:us-east-1:111122223333:mlflow-tracking-server/team"\n'
    )
    program = "import sys; sys.modules['opentelemetry'] = None; from mlflow_proxy.cli import main; main()"
    for command in ("serve", "check"):
        called = [sys.executable, "-c", program, command, "--config", str(config)]
        done = subprocess.run(called, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert "tracing.endpoint: needs the extra; run pip install 'sagemaker-mlflow-proxy[tracing]'" in done.stderr
        assert "Traceback" not in done.stderr
