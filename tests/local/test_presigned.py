"""The control plane, presigned URLs, and the browser sessions that they open."""

import time
from typing import Any
from urllib.parse import urlsplit

import pytest
import requests
from botocore.exceptions import ClientError


def presign(caller: Any, mode: str, **options: Any) -> str:
    client, sagemaker = caller.client("sagemaker"), caller.sagemaker
    if mode == "tracking":
        answer = client.create_presigned_mlflow_tracking_server_url(TrackingServerName="team-tracking", **options)
    else:
        answer = client.create_presigned_mlflow_app_url(Arn=sagemaker.app_arn, **options)
    return str(answer["AuthorizedUrl"])


def origin(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"


MODES = pytest.mark.parametrize("mode", ["tracking", "app"])


@MODES
def test_opens_the_ui_once(developer: Any, mode: str) -> None:
    url = presign(developer, mode)
    browser = requests.Session()
    first = browser.get(url)
    assert [each.status_code for each in (*first.history, first)] == [302, 200]
    assert "<title>MLflow</title>" in first.text
    cookie = first.history[0].headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=Lax" in cookie
    again = requests.get(url)
    assert again.status_code == 403
    assert "used before" in again.text
    assert browser.get(f"{origin(url)}/static-files/manifest.json").status_code == 200


@MODES
def test_head_does_not_spend_it(developer: Any, mode: str) -> None:
    url = presign(developer, mode)
    assert requests.head(url).status_code == 403
    assert requests.get(url, allow_redirects=False).status_code == 302


@MODES
def test_the_session_writes_from_its_own_origin_only(developer: Any, mode: str) -> None:
    url = presign(developer, mode)
    browser = requests.Session()
    browser.get(url)
    create = f"{origin(url)}/ajax-api/2.0/mlflow/experiments/create"
    made = browser.post(create, json={"name": f"ui {mode} {time.time()}"}, headers={"Origin": origin(url)})
    assert made.status_code == 200
    for foreign in ("http://evil.example", "null", "http://127.0.0.1:1"):
        assert browser.post(create, json={"name": "x"}, headers={"Origin": foreign}).status_code == 403


def test_both_sessions_in_one_browser(developer: Any) -> None:
    """Cookies do not know ports, so each target's has its own name."""
    browser = requests.Session()
    urls = [presign(developer, mode) for mode in ("tracking", "app")]
    roots = set()
    for url in urls:
        browser.get(url)
    for url in urls:
        search = f"{origin(url)}/ajax-api/2.0/mlflow/experiments/search"
        found = browser.post(search, json={"max_results": 1, "order_by": ["experiment_id"]})
        roots.add(found.json()["experiments"][0]["artifact_location"])
    assert len(roots) == 2


def test_a_session_of_one_target_is_none_of_another(developer: Any) -> None:
    tracking, app = (presign(developer, mode) for mode in ("tracking", "app"))
    cookie = requests.get(tracking, allow_redirects=False).cookies
    stolen = {name.replace("tracking", "app"): value for name, value in cookie.items()}
    assert requests.get(f"{origin(app)}/", cookies=stolen).status_code == 403
    moved = app.replace(origin(app), origin(tracking))
    assert requests.get(moved).status_code == 403


def test_without_a_session(developer: Any, sagemaker: Any) -> None:
    url = presign(developer, "tracking")
    for answer in (
        requests.get(f"{origin(url)}/"),
        requests.get(f"{origin(url)}/auth"),
        requests.get(f"{origin(url)}/auth?authToken=guess"),
        requests.get(f"{origin(url)}/", cookies={"sagemaker-mlflow-session-tracking": "guess"}),
    ):
        assert answer.status_code == 403
        assert "presigned URL" in answer.text
    browser = requests.Session()
    browser.get(url)
    assert browser.get(f"{sagemaker.endpoint}/").headers["x-amzn-errortype"] == "MissingAuthenticationTokenException"


def test_expires(developer: Any) -> None:
    url = presign(developer, "tracking", ExpiresInSeconds=5)
    time.sleep(5.1)
    assert requests.get(url).status_code == 403


def test_session_ends(developer: Any, admin: Any) -> None:
    url = presign(developer, "tracking", SessionExpirationDurationInSeconds=1800)
    browser = requests.Session()
    assert "Max-Age=1800" in browser.get(url).history[0].headers["set-cookie"]
    admin("POST", "faults", {"session_lifetime": 0.2})
    time.sleep(0.3)
    assert browser.get(f"{origin(url)}/").status_code == 403


def test_the_token_is_not_in_the_journal(developer: Any, sagemaker: Any) -> None:
    url = presign(developer, "tracking")
    requests.get(url)
    assert url.partition("authToken=")[2] not in str(sagemaker.journal.last(20))


def test_a_session_has_its_makers_permissions(developer: Any, sagemaker: Any, make_user: Any) -> None:
    presigner = {
        "Effect": "Allow",
        "Action": ["sagemaker:CreatePresignedMlflowTrackingServerUrl", "sagemaker-mlflow:AccessUI"],
        "Resource": "*",
    }
    url = presign(make_user(presigner), "tracking")
    browser = requests.Session()
    assert browser.get(url).status_code == 200
    search = f"{origin(url)}/ajax-api/2.0/mlflow/experiments/search"
    assert browser.post(search, json={}).headers["x-amzn-errortype"] == "AccessDeniedException"


@MODES
@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"ExpiresInSeconds": 4}, "expiresInSeconds.*greater than or equal to 5"),
        ({"ExpiresInSeconds": 301}, "expiresInSeconds.*less than or equal to 300"),
        ({"SessionExpirationDurationInSeconds": 1799}, "sessionExpiration.*1800"),
        ({"SessionExpirationDurationInSeconds": 43201}, "sessionExpiration.*43200"),
    ],
)
def test_bounds(developer: Any, mode: str, options: dict[str, int], text: str) -> None:
    with pytest.raises(ClientError, match=f"ValidationException.*{text}"):
        presign_unchecked(developer, mode, options)


def presign_unchecked(caller: Any, mode: str, options: dict[str, int]) -> None:
    """botocore checks the lower bounds itself unless told not to."""
    import boto3
    from botocore.config import Config

    client = boto3.client(
        "sagemaker",
        region_name=caller.sagemaker.region,
        endpoint_url=caller.sagemaker.sagemaker_endpoint,
        aws_access_key_id=caller.credentials.access_key,
        aws_secret_access_key=caller.credentials.secret_key,
        config=Config(parameter_validation=False),
    )
    if mode == "tracking":
        client.create_presigned_mlflow_tracking_server_url(TrackingServerName="team-tracking", **options)
    else:
        client.create_presigned_mlflow_app_url(Arn=caller.sagemaker.app_arn, **options)


def test_names_are_of_the_callers_account(developer: Any, sagemaker: Any) -> None:
    partner = developer.assume("cross-account", ExternalId=sagemaker.external_id).client("sagemaker")
    with pytest.raises(ClientError, match="AccessDenied"):
        partner.describe_mlflow_tracking_server(TrackingServerName="team-tracking")
    own = partner.describe_mlflow_tracking_server(TrackingServerName="partner-tracking")
    assert own["TrackingServerArn"] == sagemaker.cross_account_arn


def test_permissions_of_the_control_plane(developer: Any) -> None:
    reader = developer.assume("reader").client("sagemaker")
    with pytest.raises(ClientError, match=r"AccessDeniedException.*CreatePresignedMlflowTrackingServerUrl"):
        reader.create_presigned_mlflow_tracking_server_url(TrackingServerName="team-tracking")
    with pytest.raises(ClientError, match=r"AccessDeniedException.*ListMlflowApps"):
        reader.list_mlflow_apps()


def test_signature_of_the_control_plane(developer: Any) -> None:
    developer.credentials.secret_key = "0" * 40
    with pytest.raises(ClientError, match="InvalidSignatureException"):
        developer.client("sagemaker").list_mlflow_apps()


def test_describe_and_list(developer: Any, sagemaker: Any) -> None:
    client = developer.client("sagemaker")
    server = client.describe_mlflow_tracking_server(TrackingServerName="team-tracking")
    assert server["TrackingServerArn"] == sagemaker.tracking_arn
    assert server["IsActive"] == "Active"
    assert server["CreationTime"].year >= 2026
    app = client.describe_mlflow_app(Arn=sagemaker.app_arn)
    assert (app["Arn"], app["Status"]) == (sagemaker.app_arn, "Created")
    assert [s["TrackingServerArn"] for s in client.list_mlflow_tracking_servers()["TrackingServerSummaries"]] == [
        sagemaker.tracking_arn
    ]
    assert [s["Arn"] for s in client.list_mlflow_apps()["Summaries"]] == [sagemaker.app_arn]
    with pytest.raises(ClientError, match="AccessDenied"):
        client.describe_mlflow_tracking_server(TrackingServerName="absent")


def test_missing_resource(make_user: Any, sagemaker: Any) -> None:
    client = make_user({"Effect": "Allow", "Action": "sagemaker:*", "Resource": "*"}).client("sagemaker")
    with pytest.raises(client.exceptions.ResourceNotFound):
        client.describe_mlflow_tracking_server(TrackingServerName="absent")
    with pytest.raises(ClientError, match="UnknownOperation"):
        client.list_models()


def test_stop_and_start(developer: Any, admin: Any) -> None:
    client = developer.client("sagemaker")
    search = "/api/2.0/mlflow/experiments/search"
    client.stop_mlflow_tracking_server(TrackingServerName="team-tracking")
    described = client.describe_mlflow_tracking_server(TrackingServerName="team-tracking")
    assert (described["TrackingServerStatus"], described["IsActive"]) == ("Stopped", "Inactive")
    answer = developer.call("POST", search, {})
    assert (answer.status, answer.error) == (503, "ServiceUnavailableException")
    assert "its status is Stopped" in answer.message
    assert developer.call("POST", search, {"max_results": 1}, arn=developer.sagemaker.app_arn).status == 200
    with pytest.raises(client.exceptions.ConflictException):
        client.stop_mlflow_tracking_server(TrackingServerName="team-tracking")
    client.start_mlflow_tracking_server(TrackingServerName="team-tracking")
    assert developer.call("POST", search, {"max_results": 1}).status == 200
