"""The proxy on Fargate: tasks of an ECS service, over zones. A deployment whose tasks do not get healthy is undone."""

from __future__ import annotations

import re

import aws_cdk as cdk
from aws_cdk import aws_ec2 as ec2
from aws_cdk import aws_ecs as ecs
from aws_cdk import aws_elasticloadbalancingv2 as elbv2
from aws_cdk import aws_iam as iam
from aws_cdk import aws_logs as logs
from constructs import Construct

from infra.acknowledgements import acknowledge
from infra.networking import PROXY_PORT, Network
from infra.permissions import Permissions
from infra.proxy_configuration import Configuration, as_environment
from infra.settings import Settings

_CPU = 512
_MEMORY = 1024  # MiB
# What may be written to beside the read-only root: the folder that workers share their counters in, and those of the
# agent of ECS Exec. AWS does not support that agent with a read-only root; with these folders it works, as its users
# report (aws/containers-roadmap, issue 1359).
_WRITABLE = {
    "tmp": "/tmp",  # noqa: S108
    "agents": "/managed-agents",
    "agent-state": "/var/lib/amazon/ssm",
    "agent-logs": "/var/log/amazon/ssm",
}
_ECR = re.compile(r"(?P<account>[0-9]{12})\.dkr\.ecr\.(?P<region>[a-z0-9-]+)\.amazonaws\.com/(?P<name>[^:@]+)")


class TasksOnFargate(Construct):
    """Cluster, task definition, service, scaling. The two names are for people who look for a task."""

    def __init__(
        self,
        scope: Construct,
        id: str,
        settings: Settings,
        *,
        network: Network,
        permissions: Permissions,
        target_group: elbv2.ApplicationTargetGroup,
        configuration: Configuration,
        log_group: logs.ILogGroup,
    ) -> None:
        super().__init__(scope, id)
        cluster = ecs.Cluster(
            self,
            "Cluster",
            vpc=network.vpc,
            container_insights_v2=ecs.ContainerInsights.ENHANCED,
            # What people type in a shell of a task is kept with the proxy's own log.
            execute_command_configuration=ecs.ExecuteCommandConfiguration(
                logging=ecs.ExecuteCommandLogging.OVERRIDE,
                log_configuration=ecs.ExecuteCommandLogConfiguration(cloud_watch_log_group=log_group),
            ),
        )
        task = self._task(settings, permissions, configuration, log_group)
        self._service = ecs.FargateService(
            self,
            "Service",
            cluster=cluster,
            task_definition=task,
            desired_count=settings.instances_min,
            min_healthy_percent=100,
            max_healthy_percent=200,
            circuit_breaker=ecs.DeploymentCircuitBreaker(enable=True, rollback=True),
            health_check_grace_period=cdk.Duration.minutes(2),
            security_groups=[network.proxy],
            vpc_subnets=ec2.SubnetSelection(subnets=list(network.proxy_subnets)),
            assign_public_ip=False,
            enable_execute_command=True,
            propagate_tags=ecs.PropagatedTagSource.SERVICE,
        )
        self._service.attach_to_application_target_group(target_group)
        self._service.node.add_dependency(permissions)
        self._scale(settings, target_group)
        self.cluster_name = cluster.cluster_name
        self.service_name = self._service.service_name
        stack = cdk.Stack.of(self)
        group = stack.get_logical_id(log_group.node.default_child)  # type: ignore[arg-type]
        streams = f"arn:{stack.partition}:logs:{stack.region}:{stack.account}:log-group:<{group}>:*"
        acknowledge(
            permissions.host,
            "ECS Exec is Session Manager, whose actions have no resource-level permissions; it names its log streams.",
            "IAM5[Resource::*]",
            f"IAM5[Resource::{streams}]",
        )

    def _task(
        self,
        settings: Settings,
        permissions: Permissions,
        configuration: Configuration,
        log_group: logs.ILogGroup,
    ) -> ecs.FargateTaskDefinition:
        task = ecs.FargateTaskDefinition(
            self,
            "Task",
            cpu=_CPU,
            memory_limit_mib=_MEMORY,
            task_role=permissions.host,
            execution_role=self._execution_role(settings),
            runtime_platform=ecs.RuntimePlatform(
                cpu_architecture=ecs.CpuArchitecture.ARM64
                if settings.architecture == "arm64"
                else ecs.CpuArchitecture.X86_64,
                operating_system_family=ecs.OperatingSystemFamily.LINUX,
            ),
            volumes=[ecs.Volume(name=name) for name in _WRITABLE],
        )
        container = task.add_container(
            "proxy",
            image=ecs.ContainerImage.from_registry(settings.image or ""),
            environment=as_environment(configuration),
            logging=ecs.LogDrivers.aws_logs(
                stream_prefix="proxy", log_group=log_group, mode=ecs.AwsLogDriverMode.NON_BLOCKING
            ),
            port_mappings=[ecs.PortMapping(container_port=PROXY_PORT)],
            readonly_root_filesystem=True,
            stop_timeout=cdk.Duration.seconds(settings.drain_seconds),
            linux_parameters=ecs.LinuxParameters(self, "Linux", init_process_enabled=True),
        )
        acknowledge(
            container,
            "The execution role has the image's repository in it; it is named by its URI, as it may be elsewhere.",
            "@aws-cdk/aws-ecs:ecrImageRequiresPolicy",
        )
        for name, path in _WRITABLE.items():
            container.add_mount_points(ecs.MountPoint(container_path=path, source_volume=name, read_only=False))
        acknowledge(
            task,
            "The variables are the proxy's configuration; all that is secret in it is named by the ARN of its secret.",
            "ECS2",
        )
        return task

    def _execution_role(self, settings: Settings) -> iam.Role:
        """What ECS itself needs to start a task: the image. The log driver adds the log."""
        role = iam.Role(
            self,
            "ExecutionRole",
            description="Starts tasks of the MLflow proxy",
            assumed_by=iam.ServicePrincipal("ecs-tasks.amazonaws.com"),
        )
        repository = _ECR.match(settings.image or "")
        if repository is not None:
            role.add_to_policy(
                iam.PolicyStatement(
                    sid="Image",
                    actions=["ecr:BatchCheckLayerAvailability", "ecr:BatchGetImage", "ecr:GetDownloadUrlForLayer"],
                    resources=[
                        cdk.Stack.of(self).format_arn(
                            service="ecr",
                            region=repository["region"],
                            account=repository["account"],
                            resource="repository",
                            resource_name=repository["name"],
                        )
                    ],
                )
            )
            role.add_to_policy(
                # This action has no resource-level permissions.
                iam.PolicyStatement(sid="Registry", actions=["ecr:GetAuthorizationToken"], resources=["*"])
            )
            acknowledge(
                role, "AWS lets ecr:GetAuthorizationToken be granted on all resources only.", "IAM5[Resource::*]"
            )
        return role

    def _scale(self, settings: Settings, target_group: elbv2.ApplicationTargetGroup) -> None:
        tasks = self._service.auto_scale_task_count(
            min_capacity=settings.instances_min, max_capacity=settings.instances_max
        )
        tasks.scale_on_cpu_utilization("Cpu", target_utilization_percent=settings.cpu_target)
        tasks.scale_on_request_count(
            "Requests", requests_per_target=settings.requests_per_target, target_group=target_group
        )
