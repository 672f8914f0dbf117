"""Roles may do what their policies in IAM say, in their own account, and nothing else."""

import json
import re
from dataclasses import replace
from typing import Any

import pytest
from botocore.exceptions import ClientError

SEARCH = "/api/2.0/mlflow/experiments/search"
CREATE = "/api/2.0/mlflow/experiments/create"
UI_SEARCH = "/ajax-api/2.0/mlflow/experiments/search"
DENIED = "AccessDeniedException"


@pytest.mark.parametrize("role", ["writer", "reader", "nothing"])
@pytest.mark.parametrize(
    ("call", "body", "allowed"),
    [
        (f"POST {SEARCH}", {"max_results": 1}, {"writer", "reader"}),
        ("GET /api/2.0/mlflow/experiments/get?experiment_id=0", None, {"writer", "reader"}),
        ("GET /api/3.0/mlflow/traces/tr-1", None, {"writer", "reader"}),
        ("POST /api/2.0/mlflow/runs/create", {"experiment_id": "0"}, {"writer"}),
        ("POST /api/3.0/mlflow/datasets/create", {"name": "d"}, {"writer"}),
        ("DELETE /api/2.0/mlflow/registered-models/delete", {"name": "x"}, {"writer"}),
        ("GET /", None, {"writer", "reader"}),
        (f"POST {UI_SEARCH}", {"max_results": 1}, {"writer", "reader"}),
        ("POST /ajax-api/2.0/mlflow/runs/create", {"experiment_id": "0"}, {"writer"}),
        ("POST /api/2.0/mlflow/%72uns/create", {"experiment_id": "0"}, {"writer"}),
        ("POST /api/2.0/mlflow/runs//create", {"experiment_id": "0"}, {"writer"}),
    ],
)
def test_roles_on_the_tracking_server(developer: Any, role: str, call: str, body: Any, allowed: set[str]) -> None:
    method, path, query = re.split("[ ?]", call + "?")[:3]
    answer = developer.assume(role).call(method, path, body, signed_query=query)
    assert (answer.error == DENIED) is (role not in allowed)


@pytest.mark.parametrize(("role", "allowed"), [("writer", True), ("reader", False), ("nothing", False)])
@pytest.mark.parametrize("path", [SEARCH, CREATE])
def test_an_app_knows_one_action(developer: Any, sagemaker: Any, role: str, allowed: bool, path: str) -> None:
    answer = developer.assume(role).call("POST", path, {"max_results": 1}, arn=sagemaker.app_arn)
    assert (answer.error != DENIED) is allowed
    if not allowed:
        assert "sagemaker:CallMlflowAppApi on resource: " + sagemaker.app_arn in answer.message


def test_wording_of_a_denial(developer: Any, sagemaker: Any) -> None:
    answer = developer.assume("reader").call("POST", "/api/2.0/mlflow/runs/create", {})
    assert answer.status == 403
    assert answer.message == (
        "User: arn:aws:sts::111122223333:assumed-role/reader/tests is not authorized to perform: "
        f"sagemaker-mlflow:CreateRun on resource: {sagemaker.tracking_arn} because no identity-based policy "
        "allows the sagemaker-mlflow:CreateRun action"
    )


def test_explicit_deny_wins(developer: Any, make_user: Any) -> None:
    user = make_user(
        {"Effect": "Allow", "Action": "sagemaker-mlflow:*", "Resource": "*"},
        {"Effect": "Deny", "Action": "sagemaker-mlflow:Search*", "Resource": "*"},
    )
    assert user.call("GET", "/api/2.0/mlflow/experiments/get", signed_query="experiment_id=0").status == 200
    answer = user.call("POST", SEARCH, {})
    assert answer.error == DENIED
    assert answer.message.endswith("with an explicit deny in an identity-based policy")


def test_policies_of_groups_and_managed_ones_count(developer: Any, make_user: Any) -> None:
    user = make_user({"Effect": "Allow", "Action": "s3:GetObject", "Resource": "*"})
    assert user.call("POST", SEARCH, {}).error == DENIED
    iam = developer.client("iam")
    document = {"Version": "2012-10-17", "Statement": {"Effect": "Allow", "Action": "*", "Resource": "*"}}
    policy = iam.create_policy(PolicyName="all", PolicyDocument=json.dumps(document))["Policy"]["Arn"]
    iam.create_group(GroupName="g")
    iam.attach_group_policy(GroupName="g", PolicyArn=policy)
    iam.add_user_to_group(GroupName="g", UserName="user-0")
    try:
        assert user.call("POST", SEARCH, {"max_results": 1}).status == 200
    finally:
        iam.remove_user_from_group(GroupName="g", UserName="user-0")
        iam.detach_group_policy(GroupName="g", PolicyArn=policy)
        iam.delete_group(GroupName="g")
        iam.delete_policy(PolicyArn=policy)


def test_session_policy_narrows(developer: Any) -> None:
    only = {"Effect": "Allow", "Action": "sagemaker-mlflow:GetExperiment", "Resource": "*"}
    narrow = developer.assume("writer", Policy=json.dumps({"Version": "2012-10-17", "Statement": [only]}))
    assert narrow.call("GET", "/api/2.0/mlflow/experiments/get", signed_query="experiment_id=0").status == 200
    assert narrow.call("POST", SEARCH, {}).error == DENIED


def test_foreign_and_missing_resources(developer: Any, sagemaker: Any, make_user: Any) -> None:
    foreign = sagemaker.cross_account_arn
    assert developer.call("POST", SEARCH, {}, arn=foreign).error == DENIED
    nowhere = foreign.replace("partner-tracking", "nowhere")
    assert developer.call("POST", SEARCH, {}, arn=nowhere).error == DENIED
    missing = sagemaker.tracking_arn + "-2"
    assert developer.call("POST", SEARCH, {}, arn=missing).error == DENIED
    answer = make_user({"Effect": "Allow", "Action": "*", "Resource": "*"}).call("POST", SEARCH, {}, arn=missing)
    assert (answer.status, answer.error) == (404, "ResourceNotFoundException")


def test_a_wide_policy_does_not_reach_another_account(make_user: Any, sagemaker: Any) -> None:
    user = make_user({"Effect": "Allow", "Action": "*", "Resource": "*"})
    answer = user.call("POST", SEARCH, {}, arn=sagemaker.cross_account_arn)
    assert answer.error == DENIED
    assert "no resource-based policy" in answer.message


def test_cross_account_role(developer: Any, sagemaker: Any) -> None:
    partner = developer.assume("cross-account", ExternalId=sagemaker.external_id)
    arn = sagemaker.cross_account_arn
    made = partner.call("POST", CREATE, {"name": "theirs"}, arn=arn)
    assert made.status == 200
    assert partner.call("POST", SEARCH, {"max_results": 1}).error == DENIED
    found = developer.call("POST", SEARCH, {"max_results": 100}).json()["experiments"]
    assert "theirs" not in {each["name"] for each in found}
    identity = partner.client("sts").get_caller_identity()
    assert identity["Account"] == "444455556666"


@pytest.mark.parametrize("options", [{}, {"ExternalId": "another"}])
def test_external_id_is_asked_for(developer: Any, options: dict[str, str]) -> None:
    with pytest.raises(ClientError, match=r"AccessDenied.*sts:AssumeRole"):
        developer.assume("cross-account", **options)


def test_assume_role_is_guarded(developer: Any, make_user: Any, sagemaker: Any) -> None:
    with pytest.raises(ClientError, match="AccessDenied"):
        developer.assume("arn:aws:iam::111122223333:role/absent")
    with pytest.raises(ClientError, match="AccessDenied"):
        make_user({"Effect": "Allow", "Action": "s3:*", "Resource": "*"}).assume("writer")
    with pytest.raises(ClientError, match="AccessDenied"):
        developer.assume("nothing").assume("writer")
    with pytest.raises(ClientError, match="durationSeconds"):
        developer.assume("writer", DurationSeconds=43201)


def test_sts_checks_signatures(developer: Any) -> None:
    key, secret = developer.credentials.access_key, developer.credentials.secret_key
    wrong = replace(developer, credentials=type(developer.credentials)(key, secret[::-1]))
    with pytest.raises(ClientError, match="SignatureDoesNotMatch"):
        wrong.assume("writer")
    unknown = replace(developer, credentials=type(developer.credentials)("AKIAAAAAAAAAAAAAAAAA", secret))
    with pytest.raises(ClientError, match="InvalidClientTokenId"):
        unknown.client("sts").get_caller_identity()


def test_caller_identity(developer: Any) -> None:
    assert developer.client("sts").get_caller_identity()["Arn"] == "arn:aws:iam::111122223333:user/developer"
    arn = developer.assume("reader").client("sts").get_caller_identity()["Arn"]
    assert arn == "arn:aws:sts::111122223333:assumed-role/reader/tests"
