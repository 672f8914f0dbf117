"""Roles may do what their policies in IAM say, in their own account, and nothing else."""

import json
import re
from collections.abc import Callable, Iterator
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


ALICE = {"Tags": [{"Key": "caller", "Value": "user:alice"}, {"Key": "empty", "Value": ""}], "SourceIdentity": "alice"}


def test_what_a_session_carries_is_in_the_journal(developer: Any, sagemaker: Any, admin: Any) -> None:
    alice = developer.assume("writer", name="alice-1", **ALICE)
    assert alice.call("POST", SEARCH, {"max_results": 1}).status == 200
    entry = admin.last()
    assert entry["principal"] == "arn:aws:sts::111122223333:assumed-role/writer/alice-1"
    assert entry["session_tags"] == {"caller": "user:alice", "empty": ""}
    assert entry["source_identity"] == "alice"
    developer.assume("writer").call("POST", SEARCH, {"max_results": 1})
    entry = admin.last()
    assert (entry["session_tags"], entry["source_identity"]) == ({}, None)


@pytest.mark.parametrize("role", ["writer", "reader", "nothing", "cross-account"])
def test_roles_that_let_sessions_be_tagged(developer: Any, sagemaker: Any, role: str) -> None:
    external = {"ExternalId": sagemaker.external_id} if role == "cross-account" else {}
    assert developer.assume(role, **ALICE, **external).credentials.token


def test_one_that_does_not(developer: Any) -> None:
    developer.assume("untagged")
    with pytest.raises(ClientError, match=r"AccessDenied.*sts:TagSession on resource: .*role/untagged"):
        developer.assume("untagged", Tags=ALICE["Tags"])
    with pytest.raises(ClientError, match=r"AccessDenied.*sts:SetSourceIdentity on resource: .*role/untagged"):
        developer.assume("untagged", SourceIdentity="alice")


def test_the_caller_needs_the_permission_to_tag_too(make_user: Any, sagemaker: Any) -> None:
    user = make_user({"Effect": "Allow", "Action": "sts:AssumeRole", "Resource": sagemaker.roles["writer"]})
    user.assume("writer")
    with pytest.raises(ClientError, match=r"AccessDenied.*sts:TagSession"):
        user.assume("writer", Tags=ALICE["Tags"])


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"name": "a:b"}, "roleSessionName.*pattern"),
        ({"name": "é" * 4}, "roleSessionName.*pattern"),
        ({"name": "a" * 65}, "roleSessionName.*less than or equal to 64"),
        ({"SourceIdentity": "a b"}, "sourceIdentity.*pattern"),
        ({"Tags": [{"Key": "k", "Value": "a,b"}]}, "tags.1.member.value.*pattern"),
        ({"Tags": [{"Key": "k", "Value": "v" * 257}]}, "tags.1.member.value.*less than or equal to 256"),
        ({"Tags": [{"Key": "k*", "Value": "v"}]}, "tags.1.member.key.*pattern"),
        ({"Tags": [{"Key": "aws:k", "Value": "v"}]}, "must not begin with aws:"),
        ({"Tags": [{"Key": "k", "Value": "v"}, {"Key": "K", "Value": "w"}]}, "Duplicate tag keys"),
        ({"Tags": [{"Key": f"k{n}", "Value": "v"} for n in range(51)]}, "tags.*less than or equal to 50"),
    ],
)
def test_what_sts_does_not_take(developer: Any, options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ClientError, match=complaint):
        developer.assume("writer", **options)


def test_tags_of_many_alphabets_are_taken(developer: Any, admin: Any) -> None:
    developer.assume("writer", Tags=[{"Key": "caller", "Value": "Jörg 七/٣"}]).call("POST", SEARCH, {"max_results": 1})
    assert admin.last()["session_tags"] == {"caller": "Jörg 七/٣"}


@pytest.fixture
def make_role(developer: Any) -> Iterator[Callable[..., str]]:
    """Makes roles that `developer` may assume, with the statements given."""
    iam = developer.client("iam")
    made: list[str] = []

    def document(*statements: dict[str, Any]) -> str:
        return json.dumps({"Version": "2012-10-17", "Statement": list(statements)})

    def make(trust: dict[str, Any], *statements: dict[str, Any]) -> str:
        name = f"role-{len(made)}"
        principal = {"Effect": "Allow", "Principal": {"AWS": "arn:aws:iam::111122223333:root"}}
        role = iam.create_role(RoleName=name, AssumeRolePolicyDocument=document({**principal, **trust}))["Role"]
        made.append(name)
        iam.put_role_policy(RoleName=name, PolicyName="p", PolicyDocument=document(*statements))
        may = {"Effect": "Allow", "Action": "sts:*", "Resource": role["Arn"]}
        iam.put_user_policy(UserName="developer", PolicyName=name, PolicyDocument=document(may))
        return str(role["Arn"])

    yield make
    for name in made:
        iam.delete_user_policy(UserName="developer", PolicyName=name)
        iam.delete_role_policy(RoleName=name, PolicyName="p")
        iam.delete_role(RoleName=name)


def named(who: str) -> list[dict[str, str]]:
    return [{"Key": "caller", "Value": who}]


@pytest.mark.parametrize(
    ("condition", "allowed"),
    [
        ({"StringEquals": {"aws:PrincipalTag/caller": ["user:bob", "user:alice"]}}, {"user:alice", "user:bob"}),
        ({"StringLike": {"aws:PrincipalTag/caller": "user:a*"}}, {"user:alice"}),
        ({"StringEquals": {"aws:PrincipalTag/role": "writer"}}, set()),
    ],
)
def test_policies_see_the_tags(developer: Any, make_role: Any, condition: Any, allowed: set[str]) -> None:
    tagging = {"Action": ["sts:AssumeRole", "sts:TagSession"]}
    role = make_role(
        tagging, {"Effect": "Allow", "Action": "sagemaker-mlflow:*", "Resource": "*", "Condition": condition}
    )
    found = {
        who
        for who in ("user:alice", "user:bob", "key:ci")
        if developer.assume(role, Tags=named(who)).call("POST", SEARCH, {"max_results": 1}).status == 200
    }
    assert found == allowed


def test_policies_see_the_source_identity(developer: Any, make_role: Any) -> None:
    condition = {"StringEquals": {"aws:SourceIdentity": "alice"}}
    role = make_role(
        {"Action": ["sts:AssumeRole", "sts:SetSourceIdentity"]},
        {"Effect": "Allow", "Action": "sagemaker-mlflow:*", "Resource": "*", "Condition": condition},
    )
    assert developer.assume(role, SourceIdentity="alice").call("POST", SEARCH, {"max_results": 1}).status == 200
    assert developer.assume(role, SourceIdentity="mallory").call("POST", SEARCH, {}).error == DENIED
    assert developer.assume(role).call("POST", SEARCH, {}).error == DENIED


def test_trust_policies_see_what_is_asked_for(developer: Any, make_role: Any) -> None:
    wanted = {"aws:RequestTag/caller": "user:*", "sts:RoleSessionName": "alice*", "sts:SourceIdentity": "alice*"}
    actions = ["sts:AssumeRole", "sts:TagSession", "sts:SetSourceIdentity"]
    nothing = {"Effect": "Deny", "Action": "*", "Resource": "*"}
    role = make_role({"Action": actions, "Condition": {"StringLike": wanted}}, nothing)
    right = {"name": "alice-1", "Tags": named("user:alice"), "SourceIdentity": "alice"}
    developer.assume(role, **right)
    for wrong in ({"name": "bob"}, {"Tags": named("key:ci")}, {"SourceIdentity": "bob"}):
        with pytest.raises(ClientError, match="AccessDenied"):
            developer.assume(role, **{**right, **wrong})
