"""IAM for the proxy: for each role of callers an IAM role with just its actions on just the target, and the host's own.

The proxy signs a caller's requests with the caller's role, whose session is tagged with caller and role: so IAM holds
the line even where the proxy would fail to, and CloudTrail shows who it was.
"""

from __future__ import annotations

from collections.abc import Mapping

import aws_cdk as cdk
from aws_cdk import aws_iam as iam
from constructs import Construct

from infra.acknowledgements import acknowledge
from infra.mlflow import MlflowTarget
from infra.settings import CallerRole, Settings
from mlflow_proxy.access.policy import Role
from mlflow_proxy.targets import Mode

# All actions of AWS's service prefix `sagemaker-mlflow` (Service Authorization Reference, "Amazon SageMaker with
# MLflow"). What MLflow has beyond them, IAM cannot allow, and the service refuses.
AWS_ACTIONS = (
    "AccessUI",
    "CreateExperiment",
    "CreateModelVersion",
    "CreateRegisteredModel",
    "CreateRun",
    "DeleteExperiment",
    "DeleteLoggedModel",
    "DeleteLoggedModelTag",
    "DeleteModelVersion",
    "DeleteModelVersionTag",
    "DeleteRegisteredModel",
    "DeleteRegisteredModelAlias",
    "DeleteRegisteredModelTag",
    "DeleteRun",
    "DeleteTag",
    "DeleteTraceTag",
    "DeleteTraces",
    "EndTrace",
    "FinalizeLoggedModel",
    "GetDownloadURIForModelVersionArtifacts",
    "GetExperiment",
    "GetExperimentByName",
    "GetLatestModelVersions",
    "GetLoggedModel",
    "GetMetricHistory",
    "GetModelVersion",
    "GetModelVersionByAlias",
    "GetRegisteredModel",
    "GetRun",
    "GetTraceInfo",
    "ListArtifacts",
    "ListLoggedModelArtifacts",
    "LogBatch",
    "LogInputs",
    "LogLoggedModelParams",
    "LogMetric",
    "LogModel",
    "LogOutputs",
    "LogParam",
    "RenameRegisteredModel",
    "RestoreExperiment",
    "RestoreRun",
    "SearchExperiments",
    "SearchLoggedModels",
    "SearchModelVersions",
    "SearchRegisteredModels",
    "SearchRuns",
    "SearchTraces",
    "SetExperimentTag",
    "SetLoggedModelTags",
    "SetModelVersionTag",
    "SetRegisteredModelAlias",
    "SetRegisteredModelTag",
    "SetTag",
    "SetTraceTag",
    "StartTrace",
    "TransitionModelVersionStage",
    "UpdateExperiment",
    "UpdateModelVersion",
    "UpdateRegisteredModel",
    "UpdateRun",
)
_UI = "AccessUI"
# The one call that readiness and `mlflow-proxy check` make for the proxy itself.
_PROBE = "SearchExperiments"
_LINKS = {Mode.TRACKING: "CreatePresignedMlflowTrackingServerUrl", Mode.APP: "CreatePresignedMlflowAppUrl"}
_DESCRIBE = {Mode.TRACKING: "DescribeMlflowTrackingServer", Mode.APP: "DescribeMlflowApp"}
# An App has one action for all of MLflow.
_APP_CALL = "sagemaker:CallMlflowAppApi"


def allowed_actions(role: CallerRole) -> list[str]:
    """AWS's actions that a role of callers allows, in AWS's order."""
    judge = Role(role.of_proxy("*"))
    return [action for action in AWS_ACTIONS if judge.allows(action) and not judge.denies(action)]


def allows_links(role: CallerRole, mode: Mode) -> bool:
    """Whether a role may make presigned links to the UI: only if it names that action."""
    judge = Role(role.of_proxy("*"))
    return judge.allows(_LINKS[mode]) and not judge.denies(_LINKS[mode])


def caller_statements(role: CallerRole, mode: Mode, arn: str) -> list[iam.PolicyStatement]:
    """What the IAM role of a role of callers may do."""
    actions = allowed_actions(role)
    on_target = [f"sagemaker:{_LINKS[mode]}"] if allows_links(role, mode) else []
    if mode is Mode.APP:
        on_target = ([_APP_CALL] if actions else []) + on_target
    else:
        on_target = [f"sagemaker-mlflow:{action}" for action in actions if action != _UI] + on_target
    statements = [iam.PolicyStatement(sid="Target", actions=on_target, resources=[arn])] if on_target else []
    if mode is Mode.TRACKING and _UI in actions:
        # AWS lets AccessUI be granted on all resources only: it has no resource-level permissions.
        statements.append(
            iam.PolicyStatement(sid="Ui", actions=[f"sagemaker-mlflow:{_UI}"], resources=["*"]),
        )
    return statements


class Permissions(Construct):
    """The host's role, and one for each role of callers. `host` is for instances, or for tasks."""

    def __init__(self, scope: Construct, id: str, settings: Settings, target: MlflowTarget, keys_arn: str) -> None:
        super().__init__(scope, id)
        service = "ec2.amazonaws.com" if settings.compute == "ec2" else "ecs-tasks.amazonaws.com"
        self.host = iam.Role(
            self, "Host", description="The MLflow proxy itself", assumed_by=iam.ServicePrincipal(service)
        )
        self._callers = {role.name: self._caller_role(role, settings.mode, target.arn) for role in settings.roles}
        self._allow_host(settings.mode, target.arn, keys_arn)

    @property
    def caller_arns(self) -> Mapping[str, str]:
        """The IAM role of each role of callers."""
        return {name: role.role_arn for name, role in self._callers.items()}

    def _caller_role(self, role: CallerRole, mode: Mode, arn: str) -> iam.Role:
        made = iam.Role(
            self,
            f"Caller-{role.name}",
            description=f"Callers of the MLflow proxy with the role {role.name}",
            # Only the proxy's hosts, and only with the tags that say for whom.
            assumed_by=iam.ArnPrincipal(self.host.role_arn)
            .with_conditions(
                {
                    "StringEquals": {"aws:RequestTag/role": role.name},
                    "ForAllValues:StringEquals": {"aws:TagKeys": ["caller", "role"]},
                }
            )
            .with_session_tags(),
        )
        for statement in caller_statements(role, mode, arn):
            made.add_to_policy(statement)
        acknowledge(made, "AWS lets sagemaker-mlflow:AccessUI be granted on all resources only.", "IAM5[Resource::*]")
        return made

    def _allow_host(self, mode: Mode, arn: str, keys_arn: str) -> None:
        probe = f"sagemaker-mlflow:{_PROBE}" if mode is Mode.TRACKING else _APP_CALL
        statements = {
            "Readiness": ([probe, f"sagemaker:{_DESCRIBE[mode]}"], [arn]),
            "Callers": (["sts:AssumeRole", "sts:TagSession"], list(self.caller_arns.values())),
            "Keys": (["secretsmanager:GetSecretValue"], [keys_arn]),
        }
        for sid, (actions, resources) in statements.items():
            self.host.add_to_policy(iam.PolicyStatement(sid=sid, actions=actions, resources=resources))

    def allow_sessions(self) -> None:
        """Let people open a shell through Session Manager (its guide, "Create a custom IAM role")."""
        self.host.add_to_policy(
            iam.PolicyStatement(
                sid="SessionManager",
                actions=[
                    "ssm:UpdateInstanceInformation",
                    "ssmmessages:CreateControlChannel",
                    "ssmmessages:CreateDataChannel",
                    "ssmmessages:OpenControlChannel",
                    "ssmmessages:OpenDataChannel",
                ],
                # These actions have no resource-level permissions.
                resources=["*"],
            )
        )
        acknowledge(self.host, "Session Manager's actions have no resource-level permissions.", "IAM5[Resource::*]")

    def allow_logs(self, group_arn: str) -> None:
        """Let the host write to its log group."""
        self.host.add_to_policy(
            iam.PolicyStatement(
                sid="Logs",
                actions=["logs:CreateLogStream", "logs:DescribeLogStreams", "logs:PutLogEvents"],
                resources=[group_arn],
            )
        )

    def allow_object(self, bucket: str, key: str) -> None:
        """Let the host read one object: the application."""
        arn = cdk.Stack.of(self).format_arn(service="s3", region="", account="", resource=bucket, resource_name=key)
        self.host.add_to_policy(iam.PolicyStatement(sid="Application", actions=["s3:GetObject"], resources=[arn]))
