"""Stack 2, sagemaker-infra-domain: a SageMaker AI domain in the VPC, and a user in it. Both modes share it."""

from __future__ import annotations

from typing import Any

import aws_cdk as cdk
from aws_cdk import aws_iam as iam
from aws_cdk import aws_sagemaker as sagemaker
from constructs import Construct

from infra.acknowledgements import acknowledge
from infra.networking import Network
from infra.settings import Settings


class DomainStack(cdk.Stack):
    """Studio for people who work with MLflow from notebooks. They reach MLflow through the proxy, with an API key."""

    def __init__(self, scope: Construct, id: str, settings: Settings, network: Network, **options: Any) -> None:
        super().__init__(scope, id, **options)
        role = self._execution_role()
        domain = sagemaker.CfnDomain(
            self,
            "Domain",
            domain_name=settings.studio_domain,
            auth_mode="IAM",
            app_network_access_type="VpcOnly",
            vpc_id=network.vpc.vpc_id,
            subnet_ids=[subnet.subnet_id for subnet in network.proxy_subnets],
            default_user_settings=sagemaker.CfnDomain.UserSettingsProperty(
                execution_role=role.role_arn, security_groups=[network.studio.security_group_id]
            ),
        )
        domain.node.add_dependency(role.node.find_child("DefaultPolicy"))
        self.user = sagemaker.CfnUserProfile(
            self, "User", domain_id=domain.attr_domain_id, user_profile_name=settings.studio_user
        )
        self.domain = domain
        cdk.CfnOutput(self, "DomainId", value=domain.attr_domain_id, description="The SageMaker AI domain")

    def _execution_role(self) -> iam.Role:
        """What Studio does for a person, and apps by themselves: spaces and apps of the domain, and their logs.

        That is what AWS's guide grants for spaces ("Give your users access to spaces"). Data, jobs and models are not
        in it: give people what they need of these with a policy of yours.
        """
        role = iam.Role(
            self,
            "ExecutionRole",
            description="Apps of the SageMaker AI domain",
            assumed_by=iam.ServicePrincipal(
                "sagemaker.amazonaws.com", conditions={"StringEquals": {"aws:SourceAccount": self.account}}
            ),
        )
        of_domains = [
            self.format_arn(service="sagemaker", resource=kind, resource_name="*")
            for kind in ("app", "domain", "space", "user-profile")
        ]
        # Policy variables that Studio's sessions have.
        own_profile = self.format_arn(
            service="sagemaker",
            resource="user-profile",
            resource_name="${sagemaker:DomainId}/${sagemaker:UserProfileName}",
        )
        studio_logs = self.format_arn(
            service="logs",
            resource="log-group",
            resource_name="/aws/sagemaker/studio*",
            arn_format=cdk.ArnFormat.COLON_RESOURCE_NAME,
        )
        role.add_to_policy(
            iam.PolicyStatement(
                sid="AppsOfDomains",
                actions=[
                    "sagemaker:CreateApp",
                    "sagemaker:CreateSpace",
                    "sagemaker:DeleteApp",
                    "sagemaker:DeleteSpace",
                    "sagemaker:DescribeApp",
                    "sagemaker:DescribeDomain",
                    "sagemaker:DescribeSpace",
                    "sagemaker:DescribeUserProfile",
                    "sagemaker:UpdateSpace",
                ],
                resources=of_domains,
            )
        )
        role.add_to_policy(
            iam.PolicyStatement(
                sid="OwnAddress", actions=["sagemaker:CreatePresignedDomainUrl"], resources=[own_profile]
            )
        )
        role.add_to_policy(
            # These actions have no resource-level permissions.
            iam.PolicyStatement(
                sid="Lists",
                actions=[
                    "sagemaker:ListApps",
                    "sagemaker:ListDomains",
                    "sagemaker:ListSpaces",
                    "sagemaker:ListUserProfiles",
                ],
                resources=["*"],
            )
        )
        role.add_to_policy(
            # Studio tags what it makes; nothing is tagged later.
            iam.PolicyStatement(
                sid="TagsOfNewAppsAndSpaces",
                actions=["sagemaker:AddTags"],
                resources=[arn for arn in of_domains if ":app/" in arn or ":space/" in arn],
                conditions={"Null": {"sagemaker:TaggingAction": "false"}},
            )
        )
        role.add_to_policy(
            iam.PolicyStatement(
                sid="StudioLogs",
                actions=["logs:CreateLogGroup", "logs:CreateLogStream", "logs:PutLogEvents"],
                resources=[studio_logs],
            )
        )
        acknowledge(
            role,
            "A domain's id is only known when it exists, and its role must exist before: so all domains of this "
            "account in this region. Lists have no resource-level permissions. Studio names its log streams itself.",
            "IAM5[Resource::*]",
            *(f"IAM5[Resource::{arn}]" for arn in (*of_domains, studio_logs)),
        )
        return role
