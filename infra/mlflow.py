"""Stack 3, sagemaker-infra-mlflow-tracking or -serverless: MLflow itself, and the bucket with its artifacts.

Nothing here depends on where the proxy runs, so that changing that never touches the bucket.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import aws_cdk as cdk
from aws_cdk import aws_iam as iam
from aws_cdk import aws_s3 as s3
from aws_cdk import aws_sagemaker as sagemaker
from constructs import Construct

from infra.acknowledgements import acknowledge
from infra.retention import acknowledge_bucket_emptier, encryption_key, log_bucket, named_removal, removal
from infra.settings import Settings

# Older versions of changed artifacts are kept so long; parts of an upload that never ended, so long.
_OLD_VERSION_DAYS = 90
_UNFINISHED_DAYS = 7
# After that S3 moves what nobody reads to cheaper storage by itself.
_TIERING_DAYS = 30


@dataclass(frozen=True)
class MlflowTarget:
    """What the proxy's stack gets: the target's name and ARN, and the bucket for access logs."""

    name: str
    arn: str
    logs: s3.Bucket


class MlflowStack(cdk.Stack):
    """A tracking server, or an App, with its role and bucket. In prod all of that stays when the stack goes."""

    def __init__(self, scope: Construct, id: str, settings: Settings, **options: Any) -> None:
        super().__init__(scope, id, **options)
        logs = log_bucket(self, "Logs", settings)
        self.artifacts = self._artifacts(settings, logs)
        role = self._role(settings)
        tracking = settings.mlflow_type == "tracking"
        arn = self._tracking_server(settings, role) if tracking else self._app(settings, role)
        self.target = MlflowTarget(name=settings.mlflow_name, arn=arn, logs=logs)
        # Exported also where nobody uses it yet: see networking.
        self.export_value(arn)
        self.export_value(logs.bucket_name)
        acknowledge_bucket_emptier(self)
        cdk.CfnOutput(self, "MlflowArn", value=arn, description="The MLflow that the proxy serves")
        cdk.CfnOutput(self, "ArtifactBucket", value=self.artifacts.bucket_name, description="Where artifacts are kept")

    def _artifacts(self, settings: Settings, logs: s3.Bucket) -> s3.Bucket:
        return s3.Bucket(
            self,
            "Artifacts",
            encryption=s3.BucketEncryption.KMS,
            encryption_key=encryption_key(self, "ArtifactKey", settings, "Artifacts of SageMaker MLflow"),
            bucket_key_enabled=True,
            versioned=True,
            block_public_access=s3.BlockPublicAccess.BLOCK_ALL,
            object_ownership=s3.ObjectOwnership.BUCKET_OWNER_ENFORCED,
            enforce_ssl=True,
            minimum_tls_version=1.2,
            server_access_logs_bucket=logs,
            server_access_logs_prefix="artifacts/",
            lifecycle_rules=[
                s3.LifecycleRule(
                    abort_incomplete_multipart_upload_after=cdk.Duration.days(_UNFINISHED_DAYS),
                    noncurrent_version_expiration=cdk.Duration.days(_OLD_VERSION_DAYS),
                    transitions=[
                        s3.Transition(
                            storage_class=s3.StorageClass.INTELLIGENT_TIERING,
                            transition_after=cdk.Duration.days(_TIERING_DAYS),
                        )
                    ],
                )
            ],
            removal_policy=removal(settings),
            auto_delete_objects=not settings.is_prod,
        )

    def _role(self, settings: Settings) -> iam.Role:
        """What SageMaker does for MLflow: keep artifacts, and register models where that is wanted."""
        role = iam.Role(
            self,
            "MlflowRole",
            description="SageMaker MLflow to its artifact bucket",
            # AWS's guide has this condition for other parts of SageMaker, and says nothing of MLflow ("Cross-service
            # confused deputy prevention"): docs/deploy-aws.md says what to do if MLflow does not meet it.
            assumed_by=iam.ServicePrincipal(
                "sagemaker.amazonaws.com", conditions={"StringEquals": {"aws:SourceAccount": self.account}}
            ),
        )
        role.add_to_policy(
            iam.PolicyStatement(
                sid="Artifacts",
                actions=["s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload"],
                resources=[self.artifacts.arn_for_objects("*")],
            )
        )
        role.add_to_policy(
            iam.PolicyStatement(
                sid="ListArtifacts",
                actions=["s3:ListBucket", "s3:GetBucketLocation"],
                resources=[self.artifacts.bucket_arn],
            )
        )
        key = self.artifacts.encryption_key
        assert key is not None  # noqa: S101
        role.add_to_policy(
            iam.PolicyStatement(
                sid="ArtifactKey", actions=["kms:Decrypt", "kms:GenerateDataKey"], resources=[key.key_arn]
            )
        )
        bucket = self.get_logical_id(self.artifacts.node.default_child)  # type: ignore[arg-type]
        acknowledge(
            role,
            "Any object of the bucket: MLflow chooses their names.",
            f"IAM5[Resource::<{bucket}.Arn>/*]",
        )
        if settings.model_registration:
            self._allow_registration(role)
        # MLflow that is kept still needs it for the artifacts that are kept.
        for part in (role.node.default_child, role.node.find_child("DefaultPolicy").node.default_child):
            assert isinstance(part, cdk.CfnResource)  # noqa: S101
            part.apply_removal_policy(named_removal(settings))
        return role

    def _allow_registration(self, role: iam.Role) -> None:
        packages = [
            self.format_arn(service="sagemaker", resource=kind, resource_name="*")
            for kind in ("model-package", "model-package-group")
        ]
        role.add_to_policy(
            iam.PolicyStatement(
                sid="ModelRegistry",
                actions=[
                    "sagemaker:AddTags",
                    "sagemaker:CreateModelPackage",
                    "sagemaker:CreateModelPackageGroup",
                    "sagemaker:DescribeModelPackageGroup",
                    "sagemaker:UpdateModelPackage",
                ],
                resources=packages,
            )
        )
        acknowledge(
            role,
            "MLflow names model package groups after the models that people register.",
            *(f"IAM5[Resource::{arn}]" for arn in packages),
        )

    def _tracking_server(self, settings: Settings, role: iam.Role) -> str:
        server = sagemaker.CfnMlflowTrackingServer(
            self,
            "TrackingServer",
            tracking_server_name=settings.mlflow_name,
            tracking_server_size=settings.mlflow_size,
            mlflow_version=settings.mlflow_version,
            weekly_maintenance_window_start=settings.maintenance_window,
            automatic_model_registration=settings.model_registration,
            artifact_store_uri=self.artifacts.s3_url_for_object(),
            role_arn=role.role_arn,
        )
        server.node.add_dependency(role.node.find_child("DefaultPolicy"))
        server.apply_removal_policy(named_removal(settings))
        return server.attr_tracking_server_arn

    def _app(self, settings: Settings, role: iam.Role) -> str:
        app = sagemaker.CfnMlflowApp(
            self,
            "App",
            name=settings.mlflow_name,
            weekly_maintenance_window_start=settings.maintenance_window,
            model_registration_mode=(
                "AutoModelRegistrationEnabled" if settings.model_registration else "AutoModelRegistrationDisabled"
            ),
            artifact_store_uri=self.artifacts.s3_url_for_object(),
            role_arn=role.role_arn,
        )
        app.node.add_dependency(role.node.find_child("DefaultPolicy"))
        app.apply_removal_policy(named_removal(settings))
        return app.attr_arn
