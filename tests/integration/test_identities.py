"""Whose AWS rights a request has, and what happens when AWS says no: expiry, permissions, throttling, clocks."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

import pytest
import requests
from tests.faults.proxies import Proxy
from tests.integration.conftest import NO_KEYS, Control, Start

from mlflow_proxy.local import LocalSageMaker

Environment = Callable[[str, int], dict[str, str]]


def post(proxy: Proxy, route: str, data: dict[str, Any], target: str = "") -> requests.Response:
    url = f"http://127.0.0.1:{proxy.port}{target}/api/2.0/mlflow/{route}"
    return requests.post(url, json=data, timeout=60)


def search(proxy: Proxy, target: str = "") -> requests.Response:
    return post(proxy, "experiments/search", {"max_results": 1}, target)


def ready(proxy: Proxy) -> tuple[int, dict[str, Any]]:
    answer = requests.get(f"http://127.0.0.1:{proxy.port}/-/ready", timeout=60)
    return answer.status_code, answer.json()["targets"]


def served(control: Control) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = control("GET", "requests?last=2000")["requests"]
    return [entry for entry in entries if entry["plane"] == "mlflow"]


def test_two_targets_in_two_accounts(sagemaker: LocalSageMaker, control: Control, start: Start) -> None:
    proxy = start(wanted={"tracking": {"assume_role_arn": sagemaker.roles["writer"]}, "cross-account": {}})
    control("DELETE", "requests")
    assert post(proxy, "experiments/create", {"name": f"own {proxy.port}"}).status_code == 200
    abroad = post(proxy, "experiments/create", {"name": f"abroad {proxy.port}"}, "/t/cross-account")
    assert abroad.status_code == 200, abroad.text
    found = [(entry["target"], entry["principal"]) for entry in served(control)]
    assert found == [
        ("tracking", "arn:aws:sts::111122223333:assumed-role/writer/sagemaker-mlflow-proxy"),
        ("cross-account", "arn:aws:sts::444455556666:assumed-role/cross-account/sagemaker-mlflow-proxy"),
    ]


def test_the_wrong_external_id(sagemaker: LocalSageMaker, control: Control, start: Start) -> None:
    proxy = start(wanted={"tracking": {}, "cross-account": {"external_id": "somebody-elses"}})
    answer = search(proxy, "/t/cross-account")
    assert answer.status_code == 501
    assert answer.json()["error_code"] == "INVALID_STATE"
    assert sagemaker.roles["cross-account"] not in answer.text
    assert sagemaker.roles["cross-account"] in proxy.log_line(answer.headers["x-request-id"])["error"]
    assert search(proxy).status_code == 200
    status, targets = ready(proxy)
    assert status == 503
    assert (targets["tracking"]["ready"], targets["cross-account"]["ready"]) == (True, False)


def test_credentials_expire_while_requests_run(control: Control, start: Start, container: Environment) -> None:
    lifetime = 9
    proxy = start(container("writer", lifetime), {"tracking": {}, "app": {}})
    end = time.monotonic() + 3 * lifetime + 2
    keys: set[str] = set()

    def call(number: int) -> list[tuple[int, str]]:
        failures, count = [], 0
        while time.monotonic() < end:
            count += 1
            answer = search(proxy, "/t/app" if (number + count) % 2 else "")
            if answer.status_code != 200:
                failures.append((answer.status_code, answer.text))
            time.sleep(0.02)
        return failures

    with ThreadPoolExecutor(6) as pool:
        running = [pool.submit(call, number) for number in range(6)]
        while time.monotonic() < end:
            time.sleep(1)
            keys |= {entry["access_key"] for entry in served(control)}
        failures = [failure for each in running for failure in each.result()]
    assert failures == []
    assert len(keys) >= 3


def test_credentials_revoked_early_are_renewed_unnoticed(
    control: Control, start: Start, container: Environment
) -> None:
    proxy = start(container("writer", 3600), {"tracking": {}})
    assert search(proxy).status_code == 200
    before = {entry["access_key"] for entry in served(control)}
    time.sleep(4)
    control("POST", "faults", {"credential_lifetime": 3.5})  # what is older than this is void, whatever it says
    answer = post(proxy, "experiments/create", {"name": f"revoked {proxy.port}"})
    assert answer.status_code == 200, answer.text
    assert proxy.log_line(answer.headers["x-request-id"])["retries"] == 1
    refused, served_again = served(control)[-2:]
    assert refused["verdict"] == "ExpiredTokenException"
    assert refused["access_key"] in {None, *before}
    assert served_again["access_key"] not in before


def test_no_credentials_at_all(sagemaker: LocalSageMaker, start: Start) -> None:
    proxy = start({**sagemaker.environment(), **NO_KEYS}, {"tracking": {}})
    answer = search(proxy)
    assert answer.status_code == 501
    assert "retry-after" not in answer.headers
    assert answer.json()["error_code"] == "INVALID_STATE"
    assert "cannot obtain AWS credentials for the target tracking" in answer.json()["message"]
    line = proxy.log_line(answer.headers["x-request-id"])
    assert line["error"].startswith(
        "No AWS credentials for tracking: the credential chain: no AWS credentials were found"
    )
    status, targets = ready(proxy)
    assert status == 503
    assert "credentials" in targets["tracking"]["reason"]
    assert targets["tracking"]["credentials"]["usable"] is False
    assert requests.get(f"http://127.0.0.1:{proxy.port}/-/health", timeout=5).status_code == 200


class Container(NamedTuple):
    """A container's credential endpoint, with credentials of ten seconds, until it is `broken`."""

    url: str
    broken: threading.Event


@pytest.fixture
def fragile(control: Control) -> Iterator[Container]:
    broken = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            credentials = {} if broken.is_set() else control("GET", "container-credentials/writer?lifetime=10")
            body = json.dumps(credentials).encode()
            self.send_response(500 if broken.is_set() else 200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield Container(f"http://127.0.0.1:{server.server_port}/", broken)
    server.shutdown()
    server.server_close()


def error_of(proxy: Proxy, answer: requests.Response) -> str:
    return str(proxy.log_line(answer.headers["x-request-id"]).get("error", ""))


def test_credentials_run_out(sagemaker: LocalSageMaker, start: Start, fragile: Container) -> None:
    environ = {**sagemaker.environment(), **NO_KEYS, "AWS_CONTAINER_CREDENTIALS_FULL_URI": fragile.url}
    proxy = start(environ, {"tracking": {}})
    assert search(proxy).status_code == 200
    fragile.broken.set()
    end = time.monotonic() + 60
    while (answer := search(proxy)).status_code != 503 or fragile.url[:-1] not in error_of(proxy, answer):
        assert time.monotonic() < end
        time.sleep(0.5)
    assert answer.headers["retry-after"] == "5"
    assert "no valid AWS credentials for the target tracking at the moment" in answer.json()["message"]
    status, targets = ready(proxy)
    assert (status, targets["tracking"]["ready"]) == (503, False)
    assert "credentials" in targets["tracking"]["reason"]
    fragile.broken.clear()
    end = time.monotonic() + 60
    while search(proxy).status_code != 200:  # it comes back by itself
        assert time.monotonic() < end
        time.sleep(0.5)


def test_a_role_that_may_only_read(sagemaker: LocalSageMaker, control: Control, start: Start) -> None:
    proxy = start(wanted={"tracking": {"assume_role_arn": sagemaker.roles["reader"]}})
    assert search(proxy).status_code == 200
    answer = post(proxy, "experiments/create", {"name": "no"})
    assert answer.status_code == 403
    assert answer.headers["content-type"] == "application/json"
    error = answer.json()
    assert error["error_code"] == "PERMISSION_DENIED"
    assert error["message"].startswith("SageMaker MLflow answered AccessDeniedException.")
    assert sagemaker.tracking_arn not in answer.text
    reason = proxy.log_line(error["request_id"])["error"]
    assert (
        f"is not authorized to perform: sagemaker-mlflow:CreateExperiment on resource: {sagemaker.tracking_arn}"
        in reason
    )
    assert error["request_id"] == answer.headers["x-request-id"]


def test_a_role_that_may_do_nothing(sagemaker: LocalSageMaker, control: Control, start: Start) -> None:
    nothing = {"assume_role_arn": sagemaker.roles["nothing"]}
    proxy = start(wanted={"tracking": nothing, "app": nothing})
    for target, action in (("", "sagemaker-mlflow:SearchExperiments"), ("/t/app", "sagemaker:CallMlflowAppApi")):
        answer = search(proxy, target)
        assert (answer.status_code, answer.json()["error_code"]) == (403, "PERMISSION_DENIED")
        assert action in proxy.log_line(answer.headers["x-request-id"])["error"]
    status, targets = ready(proxy)
    assert status == 503
    assert "not authorized" in targets["tracking"]["reason"]


@pytest.mark.parametrize("shape", [429, 400])
def test_throttled_calls_are_repeated(control: Control, proxy: Proxy, shape: int) -> None:
    control("POST", "faults", {"throttle": shape, "requests": 2})
    name = f"throttled {shape} {time.time()}"
    answer = post(proxy, "experiments/create", {"name": name})
    assert answer.status_code == 200, answer.text
    assert proxy.log_line(answer.headers["x-request-id"])["retries"] == 2
    assert post(proxy, "experiments/create", {"name": name}).json()["error_code"] == "RESOURCE_ALREADY_EXISTS"


@pytest.mark.parametrize("shape", [429, 400])
def test_throttled_for_good(control: Control, proxy: Proxy, shape: int, mode: str) -> None:
    control("POST", "faults", {"throttle": shape})
    answer = search(proxy, f"/t/{mode}")
    assert answer.status_code == 429
    assert answer.json()["error_code"] == "REQUEST_LIMIT_EXCEEDED"
    assert int(answer.headers["retry-after"]) >= 1
    assert len(served(control)) == 3


@pytest.mark.parametrize("skew", [600, -600])
def test_a_clock_that_is_wrong(control: Control, start: Start, skew: int) -> None:
    proxy = start()
    assert search(proxy).status_code == 200
    for now in (skew, 0):  # goes wrong, and is put right
        control("POST", "faults", {"clock_skew": now})
        with ThreadPoolExecutor(20) as pool:
            answers = list(pool.map(lambda n: search(proxy, ("", "/t/app")[n % 2]), range(60)))
        assert [answer.text for answer in answers if answer.status_code != 200] == []
    assert ready(proxy)[0] == 200


def test_a_stopped_server(control: Control, proxy: Proxy) -> None:
    control("POST", "servers/tracking/stop")
    answer = search(proxy)
    assert answer.status_code == 503
    assert "may be stopped" in answer.json()["message"]
    assert "its status is Stopped" in proxy.log_line(answer.headers["x-request-id"])["error"]
    assert search(proxy, "/t/app").status_code == 200
    control("POST", "servers/tracking/start")
    assert search(proxy).status_code == 200
