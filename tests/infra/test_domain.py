"""Stack 2: the SageMaker AI domain and its user."""

from __future__ import annotations

import json

from tests.infra.variants import as_list, every_statement, synthesize


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
    assert not [action for action in actions if "*" in action or "Presigned" in action or "Mlflow" in action]
