"""Stack 2: the SageMaker AI domain and its user."""

from __future__ import annotations

import json

from tests.infra.variants import as_list, every_statement, resolve, synthesize


def test_domain_is_in_the_vpc_only() -> None:
    domain = synthesize().one("domain", "AWS::SageMaker::Domain")
    assert domain["AppNetworkAccessType"] == "VpcOnly"
    assert domain["AuthMode"] == "IAM"
    assert len(domain["SubnetIds"]) == 2
    assert all("private" in json.dumps(subnet) for subnet in domain["SubnetIds"])
    assert len(domain["DefaultUserSettings"]["SecurityGroups"]) == 1


def test_domain_has_a_user() -> None:
    user = synthesize(studio_user="alice").one("domain", "AWS::SageMaker::UserProfile")
    assert user["UserProfileName"] == "alice"


def test_only_sagemaker_for_this_account_assumes_the_execution_role() -> None:
    role = synthesize().one("domain", "AWS::IAM::Role")
    (statement,) = role["AssumeRolePolicyDocument"]["Statement"]
    assert statement["Principal"] == {"Service": "sagemaker.amazonaws.com"}
    assert statement["Condition"] == {"StringEquals": {"aws:SourceAccount": "123456789012"}}
    assert "ManagedPolicyArns" not in role


def test_execution_role_has_no_way_to_mlflow_or_data() -> None:
    actions = {
        action
        for stack, _, statement in every_statement(synthesize())
        for action in as_list(statement["Action"])
        if stack == "domain"
    }
    assert actions
    assert not [action for action in actions if action.startswith(("sagemaker-mlflow:", "s3:", "sts:", "iam:", "kms:"))]
    assert not [action for action in actions if "*" in action or "Mlflow" in action]
    assert [action for action in actions if "Presigned" in action] == ["sagemaker:CreatePresignedDomainUrl"]


def test_execution_role_has_what_studio_does_for_a_person() -> None:
    """AWS's guide for spaces; without tags, Studio can make nothing."""
    found = {one["Sid"]: one for stack, _, one in every_statement(synthesize()) if stack == "domain"}
    lists = found["Lists"]
    assert lists["Resource"] == "*"
    assert set(lists["Action"]) == {f"sagemaker:List{kind}" for kind in ("Apps", "Domains", "Spaces", "UserProfiles")}
    address = resolve(found["OwnAddress"]["Resource"])
    assert address.endswith(":user-profile/${sagemaker:DomainId}/${sagemaker:UserProfileName}")
    tags = found["TagsOfNewAppsAndSpaces"]
    assert tags["Action"] == "sagemaker:AddTags"
    assert [resolve(arn).split(":")[-1] for arn in tags["Resource"]] == ["app/*", "space/*"]
    assert tags["Condition"] == {"Null": {"sagemaker:TaggingAction": "false"}}
    assert {sid for sid, one in found.items() if "*" in as_list(one["Resource"])} == {"Lists"}
