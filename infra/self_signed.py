"""A self-signed certificate for the load balancer's own name, so that `dev` has HTTPS before anybody has a domain.

A function makes it at deploy time, because the name is not known before; see `certificate/handler.py`. A certificate
that the person who deploys makes and imports would need two deployments. CloudFormation asks the function again when a
property changes: so one names the quarter of the year, and the function renews what would not last.
"""

from __future__ import annotations

from datetime import UTC, datetime

import aws_cdk as cdk
from aws_cdk import aws_iam as iam
from aws_cdk import aws_lambda as lambda_
from constructs import Construct

from infra import application
from infra.acknowledgements import acknowledge, acknowledge_lint
from infra.retention import log_group
from infra.settings import Settings

_TAG = "sagemaker-mlflow-proxy:self-signed"


class SelfSignedCertificate(Construct):
    """`arn` is the certificate's in ACM."""

    def __init__(self, scope: Construct, id: str, settings: Settings, name: str) -> None:
        super().__init__(scope, id)
        stack = cdk.Stack.of(self)
        logs = log_group(self, "Logs", settings)
        role = iam.Role(
            self,
            "Role",
            description="Makes the self-signed certificate of the MLflow proxy",
            assumed_by=iam.ServicePrincipal("lambda.amazonaws.com"),
        )
        role.add_to_policy(
            iam.PolicyStatement(
                sid="Logs", actions=["logs:CreateLogStream", "logs:PutLogEvents"], resources=[logs.log_group_arn]
            )
        )
        certificates = stack.format_arn(service="acm", resource="certificate", resource_name="*")
        # A certificate's ARN is not known before it is imported, so that the tag must tell which ones are ours.
        role.add_to_policy(
            iam.PolicyStatement(
                sid="Import",
                actions=["acm:ImportCertificate", "acm:AddTagsToCertificate"],
                resources=[certificates],
                conditions={"StringEquals": {f"aws:RequestTag/{_TAG}": stack.stack_name}},
            )
        )
        role.add_to_policy(
            iam.PolicyStatement(
                sid="Own",
                actions=["acm:DeleteCertificate", "acm:DescribeCertificate"],
                resources=[certificates],
                conditions={"StringEquals": {f"aws:ResourceTag/{_TAG}": stack.stack_name}},
            )
        )
        acknowledge(
            role,
            "The certificate's ARN is not known before it is imported; a tag says which certificates are this stack's.",
            f"IAM5[Resource::{certificates}]",
        )
        code = settings.certificate_function or application.build_certificate_function(settings.architecture)
        function = lambda_.Function(
            self,
            "Function",
            description="Makes the self-signed certificate of the MLflow proxy",
            runtime=lambda_.Runtime(application.LAMBDA_RUNTIME, lambda_.RuntimeFamily.PYTHON),
            architecture=lambda_.Architecture.ARM_64
            if settings.architecture == "arm64"
            else lambda_.Architecture.X86_64,
            handler="handler.handle",
            code=lambda_.Code.from_asset(str(code)),
            role=role.without_policy_updates(),
            log_group=logs,
            timeout=cdk.Duration.minutes(4),
            memory_size=256,
        )
        function.node.add_dependency(role.node.find_child("DefaultPolicy"))
        acknowledge_lint(function, "CDK's own construct names the dependency on the role twice.", "W3005")
        certificate = cdk.CustomResource(
            self,
            "Certificate",
            resource_type="Custom::SelfSignedCertificate",
            service_token=function.function_arn,
            service_timeout=cdk.Duration.minutes(5),
            properties={"Name": name, "Tags": {_TAG: stack.stack_name}, "Quarter": _quarter(datetime.now(UTC))},
        )
        self.arn = certificate.ref


def _quarter(now: datetime) -> str:
    return f"{now.year}-Q{(now.month + 2) // 3}"
