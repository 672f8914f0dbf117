"""Stack 3: MLflow and its artifacts."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tests.infra.variants import CLIENT_CERTIFICATES, COMPUTES, MODES, PROD, TLS, synthesize


def test_tracking_server_has_size_version_and_window() -> None:
    made = synthesize(
        mlflow_size="Large", mlflow_version="3.0", maintenance_window="Sun:03:30", model_registration="true"
    )
    server = made.one("mlflow", "AWS::SageMaker::MlflowTrackingServer")
    assert server["TrackingServerSize"] == "Large"
    assert server["MlflowVersion"] == "3.0"
    assert server["WeeklyMaintenanceWindowStart"] == "Sun:03:30"
    assert server["AutomaticModelRegistration"] is True
    made.template("mlflow").resource_count_is("AWS::SageMaker::MlflowApp", 0)


def test_app_is_the_native_resource() -> None:
    made = synthesize("serverless", maintenance_window="Sun:03:30")
    app = made.one("mlflow", "AWS::SageMaker::MlflowApp")
    assert app["Name"] == "mlflow"
    assert app["WeeklyMaintenanceWindowStart"] == "Sun:03:30"
    assert app["ModelRegistrationMode"] == "AutoModelRegistrationDisabled"
    made.template("mlflow").resource_count_is("AWS::SageMaker::MlflowTrackingServer", 0)


def artifacts(**chosen: str) -> dict[str, Any]:
    (found,) = (
        bucket
        for name, bucket in synthesize(**chosen).resources("mlflow", "AWS::S3::Bucket").items()
        if name.startswith("Artifacts")
    )
    return found


@pytest.mark.parametrize("mode", MODES)
def test_artifacts_are_encrypted_versioned_and_private(mode: str) -> None:
    bucket = artifacts(mlflow_type=mode)["Properties"]
    (rule,) = bucket["BucketEncryption"]["ServerSideEncryptionConfiguration"]
    assert rule["ServerSideEncryptionByDefault"]["SSEAlgorithm"] == "aws:kms"
    assert rule["BucketKeyEnabled"] is True
    assert bucket["VersioningConfiguration"] == {"Status": "Enabled"}
    assert set(bucket["PublicAccessBlockConfiguration"].values()) == {True}
    assert len(bucket["PublicAccessBlockConfiguration"]) == 4
    (lifecycle,) = bucket["LifecycleConfiguration"]["Rules"]
    assert lifecycle["NoncurrentVersionExpiration"] == {"NoncurrentDays": 90}
    assert lifecycle["AbortIncompleteMultipartUpload"] == {"DaysAfterInitiation": 7}
    assert "Expiration" not in lifecycle
    assert bucket["LoggingConfiguration"]["LogFilePrefix"] == "artifacts/"


@pytest.mark.parametrize("mode", MODES)
def test_every_bucket_is_reached_with_tls_only(mode: str) -> None:
    made = synthesize(mode)
    buckets = set(made.resources("mlflow", "AWS::S3::Bucket"))
    guarded = set()
    for policy in made.resources("mlflow", "AWS::S3::BucketPolicy").values():
        for statement in policy["Properties"]["PolicyDocument"]["Statement"]:
            if statement["Effect"] == "Deny" and statement["Condition"] == {"Bool": {"aws:SecureTransport": "false"}}:
                assert statement["Action"] == "s3:*"
                guarded.add(policy["Properties"]["Bucket"]["Ref"])
    assert guarded == buckets


def test_key_rotates() -> None:
    key = synthesize().one("mlflow", "AWS::KMS::Key")
    assert key["EnableKeyRotation"] is True


def test_role_reaches_just_its_bucket_and_key() -> None:
    made = synthesize()
    (policy,) = made.resources("mlflow", "AWS::IAM::Policy").values()
    statements = {one["Sid"]: one for one in policy["Properties"]["PolicyDocument"]["Statement"]}
    assert set(statements) == {"Artifacts", "ListArtifacts", "ArtifactKey"}
    for statement in statements.values():
        text = json.dumps(statement["Resource"])
        assert "Artifact" in text
        assert '"*"' not in text
    trust = made.resources("mlflow", "AWS::IAM::Role")
    (role,) = (one for name, one in trust.items() if name.startswith("MlflowRole"))
    (statement,) = role["Properties"]["AssumeRolePolicyDocument"]["Statement"]
    assert statement["Condition"] == {"StringEquals": {"aws:SourceAccount": "123456789012"}}


def test_models_are_registered_only_where_wanted() -> None:
    assert "sagemaker:CreateModelPackage" not in json.dumps(synthesize().templates["mlflow"])
    assert "sagemaker:CreateModelPackage" in json.dumps(synthesize(model_registration="true").templates["mlflow"])


def test_dev_removes_its_data_and_prod_keeps_it() -> None:
    dev, prod = artifacts(), artifacts(**PROD)
    assert (dev["DeletionPolicy"], prod["DeletionPolicy"]) == ("Delete", "Retain")
    assert synthesize().resources("mlflow", "Custom::S3AutoDeleteObjects")
    assert not synthesize(**PROD).resources("mlflow", "Custom::S3AutoDeleteObjects")
    keys = [synthesize(**more).resources("mlflow", "AWS::KMS::Key") for more in ({}, PROD)]
    assert [key["DeletionPolicy"] for found in keys for key in found.values()] == ["Delete", "Retain"]


@pytest.mark.parametrize("mode", MODES)
def test_prod_keeps_mlflow_itself_and_the_role_that_it_needs(mode: str) -> None:
    """Runs, metrics and models are in MLflow, and not in the bucket."""
    types = ("AWS::SageMaker::MlflowTrackingServer", "AWS::SageMaker::MlflowApp", "AWS::IAM::Role", "AWS::IAM::Policy")
    # A first deployment that fails must not leave a server by that name, which the next one would meet.
    for more, policies in (({}, ("Delete", "Delete")), (PROD, ("RetainExceptOnCreate", "Retain"))):
        made = synthesize(mode, **more)
        found = {
            resource["Type"]: (resource.get("DeletionPolicy", "Delete"), resource.get("UpdateReplacePolicy", "Delete"))
            for type_ in types
            for name, resource in made.resources("mlflow", type_).items()
            if not name.startswith("Custom")
        }
        assert len(found) == 3
        assert set(found.values()) == {policies}


@pytest.mark.parametrize("mode", MODES)
def test_nothing_but_the_mode_changes_mlflow_and_its_bucket(mode: str) -> None:
    """So a change of compute or TLS cannot replace the bucket; the other mode has a stack of its own."""
    variants = [
        synthesize(mode, compute, **tls) for compute in COMPUTES for tls in (*TLS.values(), CLIENT_CERTIFICATES)
    ]
    assert len({json.dumps(made.templates["mlflow"], sort_keys=True) for made in variants}) == 1


def test_bucket_has_the_same_name_in_both_modes_templates() -> None:
    """Its logical id depends on nothing, so that no setting makes CloudFormation take it for another one."""
    names = {
        name
        for mode in MODES
        for compute in COMPUTES
        for name in synthesize(mode, compute).resources("mlflow", "AWS::S3::Bucket")
    }
    assert len(names) == 2
