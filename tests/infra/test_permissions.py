"""IAM: exactly the actions of the configured roles on exactly the target; sessions with tags; wildcards explained."""

from __future__ import annotations

import fnmatch
import json
from typing import Any

import pytest
from infra.permissions import AWS_ACTIONS, allowed_actions, allows_links
from infra.settings import CallerRole
from tests.infra.variants import COMPUTES, MODES, Synthesized, as_list, every_statement, synthesize

from mlflow_proxy.access.actions import NAMES
from mlflow_proxy.targets import Mode

READS = [action for action in AWS_ACTIONS if action.startswith(("Get", "List", "Search"))]


def caller_policy(made: Synthesized, role: str) -> list[dict[str, Any]]:
    (policy,) = (
        one["Properties"]["PolicyDocument"]["Statement"]
        for name, one in made.resources("flaskapp", "AWS::IAM::Policy").items()
        if name.startswith(f"PermissionsCaller{role}")
    )
    return list(policy)


def host_statements(made: Synthesized) -> dict[str, dict[str, Any]]:
    (policy,) = (
        one["Properties"]["PolicyDocument"]["Statement"]
        for name, one in made.resources("flaskapp", "AWS::IAM::Policy").items()
        if name.startswith("PermissionsHost")
    )
    return {one.get("Sid", "other"): one for one in policy}


def test_actions_are_known_to_the_proxy() -> None:
    assert list(AWS_ACTIONS) == sorted(set(AWS_ACTIONS))
    assert set(AWS_ACTIONS) <= set(NAMES)


def test_reader_may_read_on_the_target_alone() -> None:
    target, ui = caller_policy(synthesize(), "reader")
    assert set(target["Action"]) == {f"sagemaker-mlflow:{action}" for action in READS}
    assert "TrackingServerArn" in json.dumps(target["Resource"])
    assert ui == {"Sid": "Ui", "Effect": "Allow", "Action": "sagemaker-mlflow:AccessUI", "Resource": "*"}


def test_writer_may_do_all_but_links() -> None:
    target, _ = caller_policy(synthesize(), "writer")
    assert set(target["Action"]) == {f"sagemaker-mlflow:{action}" for action in AWS_ACTIONS} - {
        "sagemaker-mlflow:AccessUI"
    }


def test_deny_takes_actions_away() -> None:
    role = CallerRole(name="careful", allow=["*"], deny=["Delete*"])
    assert not fnmatch.filter(allowed_actions(role), "Delete*")
    assert "CreateRun" in allowed_actions(role)


def test_role_without_the_ui_has_nothing_on_all_resources() -> None:
    roles = json.dumps([{"name": "robots", "allow": ["LogBatch", "CreateRun"]}])
    (target,) = caller_policy(synthesize(roles=roles), "robots")
    assert target["Action"] == ["sagemaker-mlflow:CreateRun", "sagemaker-mlflow:LogBatch"]


@pytest.mark.parametrize(
    ("mode", "action"),
    [("tracking", "CreatePresignedMlflowTrackingServerUrl"), ("serverless", "CreatePresignedMlflowAppUrl")],
)
def test_links_only_for_roles_that_name_them(mode: str, action: str) -> None:
    roles = json.dumps([{"name": "linker", "allow": [action, "GetRun"]}, {"name": "other", "allow": ["*"]}])
    made = synthesize(mode, roles=roles)
    assert f'"sagemaker:{action}"' in json.dumps(caller_policy(made, "linker"))
    assert "Presigned" not in json.dumps(caller_policy(made, "other"))
    assert "Presigned" not in json.dumps(host_statements(made))
    assert not allows_links(CallerRole(name="all", allow=["*"]), Mode.TRACKING)


def test_app_has_one_action_for_all_of_mlflow() -> None:
    for role in ("reader", "writer"):
        (target,) = caller_policy(synthesize("serverless"), role)
        assert target["Action"] == "sagemaker:CallMlflowAppApi"
        assert "AppArn" in json.dumps(target["Resource"])


@pytest.mark.parametrize("compute", COMPUTES)
def test_only_the_host_assumes_callers_roles_and_only_with_their_tags(compute: str) -> None:
    made = synthesize("tracking", compute)
    roles = made.resources("flaskapp", "AWS::IAM::Role")
    (host,) = (name for name in roles if name.startswith("PermissionsHost"))
    callers = {name: one["Properties"] for name, one in roles.items() if name.startswith("PermissionsCaller")}
    assert len(callers) == 2
    for name, role in callers.items():
        statements = role["AssumeRolePolicyDocument"]["Statement"]
        allowed = {action for one in statements for action in as_list(one["Action"])}
        assert allowed == {"sts:AssumeRole", "sts:TagSession"}
        for statement in statements:
            assert statement["Principal"] == {"AWS": {"Fn::GetAtt": [host, "Arn"]}}
            assert statement["Condition"]["StringEquals"]["aws:RequestTag/role"] in ("reader", "writer")
            assert statement["Condition"]["StringEquals"]["aws:RequestTag/role"] in name
            assert statement["Condition"]["ForAllValues:StringEquals"] == {"aws:TagKeys": ["caller", "role"]}
    assumes = host_statements(made)["Callers"]
    assert set(assumes["Action"]) == {"sts:AssumeRole", "sts:TagSession"}
    assert {one["Fn::GetAtt"][0] for one in assumes["Resource"]} == set(callers)


@pytest.mark.parametrize("compute", COMPUTES)
def test_hosts_own_rights_are_readiness_keys_and_callers(compute: str) -> None:
    made = synthesize("tracking", compute)
    statements = host_statements(made)
    assert statements["Readiness"]["Action"] == [
        "sagemaker-mlflow:SearchExperiments",
        "sagemaker:DescribeMlflowTrackingServer",
    ]
    assert "TrackingServerArn" in json.dumps(statements["Readiness"]["Resource"])
    assert statements["Keys"]["Action"] == "secretsmanager:GetSecretValue"
    (secret,) = made.resources("flaskapp", "AWS::SecretsManager::Secret")
    assert statements["Keys"]["Resource"] == {"Ref": secret}


def test_ec2_host_reads_just_its_application() -> None:
    statement = host_statements(synthesize())["Application"]
    assert statement["Action"] == "s3:GetObject"
    assert statement["Resource"].endswith(".zip")
    assert "*" not in statement["Resource"]


# Actions on all resources, or on all of a kind; the reason stands next to each in the code.
WIDE = {
    "no resource-level permissions": {
        "sagemaker-mlflow:AccessUI",
        "ssm:UpdateInstanceInformation",
        "ssmmessages:CreateControlChannel",
        "ssmmessages:CreateDataChannel",
        "ssmmessages:OpenControlChannel",
        "ssmmessages:OpenDataChannel",
        "ecr:GetAuthorizationToken",
        "logs:DescribeLogGroups",
        "sagemaker:ListApps",
        "sagemaker:ListDomains",
        "sagemaker:ListSpaces",
        "sagemaker:ListUserProfiles",
    },
    "the certificate's ARN is not known before; its tag tells": {
        "acm:AddTagsToCertificate",
        "acm:DeleteCertificate",
        "acm:DescribeCertificate",
        "acm:ImportCertificate",
    },
    "streams of the proxy's own log group": {"logs:DescribeLogStreams"},
    "any object of the artifact bucket": {
        "s3:AbortMultipartUpload",
        "s3:DeleteObject",
        "s3:GetObject",
        "s3:PutObject",
    },
    "Studio's apps, spaces and their logs in this account": {
        "sagemaker:CreateApp",
        "sagemaker:CreateSpace",
        "sagemaker:DeleteApp",
        "sagemaker:DeleteSpace",
        "sagemaker:DescribeApp",
        "sagemaker:DescribeDomain",
        "sagemaker:DescribeSpace",
        "sagemaker:DescribeUserProfile",
        "sagemaker:UpdateSpace",
        "logs:CreateLogGroup",
        "logs:CreateLogStream",
        "logs:PutLogEvents",
    },
    "model packages of this account": {
        "sagemaker:AddTags",
        "sagemaker:CreateModelPackage",
        "sagemaker:CreateModelPackageGroup",
        "sagemaker:DescribeModelPackageGroup",
        "sagemaker:UpdateModelPackage",
    },
}


def test_no_action_is_a_wildcard_and_wide_resources_are_these() -> None:
    wide = set()
    variants = [
        synthesize(mode, compute, **more)
        for mode in MODES
        for compute in COMPUTES
        for more in ({}, {"model_registration": "true"})
    ]
    for made in variants:
        for stack, name, statement in every_statement(made):
            actions = as_list(statement["Action"])
            assert not [action for action in actions if "*" in action], (stack, name, statement)
            if "*" in json.dumps(statement["Resource"]):
                wide |= set(actions)
    assert wide == set().union(*WIDE.values())


@pytest.mark.parametrize("compute", COMPUTES)
def test_nothing_is_allowed_on_all_logs(compute: str) -> None:
    for stack, name, statement in every_statement(synthesize("tracking", compute)):
        if "logs:PutLogEvents" in as_list(statement["Action"]):
            assert statement["Resource"] != "*", (stack, name)


def test_nobody_has_a_policy_of_awss_but_lambdas_basic_one() -> None:
    managed = {
        json.dumps(policy)
        for stack in synthesize().templates
        for role in synthesize().resources(stack, "AWS::IAM::Role").values()
        for policy in role["Properties"].get("ManagedPolicyArns", [])
    }
    # CDK's own function that empties buckets in dev.
    assert all("AWSLambdaBasicExecutionRole" in one for one in managed)


def test_hosts_report_to_their_own_stack_alone() -> None:
    (statement,) = (
        one
        for one in host_statements(synthesize()).values()
        if "cloudformation:SignalResource" in as_list(one["Action"])
    )
    assert statement["Resource"] == {"Ref": "AWS::StackId"}
