"""The proxy on EC2: hosts of an Auto Scaling group, over zones, replaced one by one when anything in them changes."""

from __future__ import annotations

import re
from pathlib import Path

import aws_cdk as cdk
from aws_cdk import aws_autoscaling as autoscaling
from aws_cdk import aws_ec2 as ec2
from aws_cdk import aws_elasticloadbalancingv2 as elbv2
from aws_cdk import aws_logs as logs
from aws_cdk import aws_s3_assets as assets
from aws_cdk import aws_sns as sns
from constructs import Construct

from infra import application
from infra.acknowledgements import acknowledge_lint
from infra.networking import Network
from infra.permissions import Permissions
from infra.proxy_configuration import Configuration, as_toml
from infra.settings import Settings, SettingsError

# Canonical's parameter names the newest image of Ubuntu 24.04: each deployment takes that.
_UBUNTU = "/aws/service/canonical/ubuntu/server/24.04/stable/current/{}/hvm/ebs-gp3/ami-id"
_DPKG_ARCHITECTURE = {"arm64": "arm64", "x86_64": "amd64"}
_USER_DATA = Path(__file__).parent / "host" / "user_data.sh"
_SHEBANG = "#!/bin/bash"
_DISK_GIGABYTES = 12
# EC2's limit, in bytes before encoding (EC2 guide, "Run commands when you launch an EC2 instance").
_MOST_USER_DATA = 16_384
# What CloudFormation fills in is ARNs and names above all; IAM's longest ARN of a role of ours has 95 bytes.
_TOKEN = re.compile(r"\$\{Token\[[^\]]*\]\}")
_TOKEN_BYTES = 128
# A host needs about three minutes from its start to its first answer.
_BOOT = cdk.Duration.minutes(15)
_GRACE = cdk.Duration.minutes(5)


class HostsOnEc2(Construct):
    """Launch template, group, scaling. `group_name` names the group, for people who look for a host."""

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
        topic: sns.ITopic,
    ) -> None:
        super().__init__(scope, id)
        permissions.allow_sessions()
        permissions.allow_logs(log_group.log_group_arn)
        folder = settings.application or application.build_application(settings.architecture, tracing=settings.traces)
        asset = assets.Asset(self, "Application", path=str(folder))
        permissions.allow_object(asset.s3_bucket_name, asset.s3_object_key)
        user_data = ec2.UserData.for_linux(shebang=_SHEBANG)
        template = self._launch_template(settings, network, permissions, user_data)
        self._group = self._auto_scaling_group(settings, network, template, topic)
        self._group.node.add_dependency(permissions)
        # It names the group, which in turn takes the template: so it is filled in last.
        user_data.add_commands(self._user_data(settings, asset, configuration, log_group))
        self._scale(settings, target_group)

    @property
    def group_name(self) -> str:
        """The Auto Scaling group's name."""
        return self._group.auto_scaling_group_name

    def _launch_template(
        self, settings: Settings, network: Network, permissions: Permissions, user_data: ec2.UserData
    ) -> ec2.LaunchTemplate:
        return ec2.LaunchTemplate(
            self,
            "Template",
            machine_image=ec2.MachineImage.from_ssm_parameter(
                _UBUNTU.format(_DPKG_ARCHITECTURE[settings.architecture]), user_data=user_data
            ),
            instance_type=ec2.InstanceType(settings.host_type),
            role=permissions.host,
            security_group=network.proxy,
            user_data=user_data,
            # Version 2 of the metadata service, and only for programs on the host itself.
            require_imdsv2=True,
            http_put_response_hop_limit=1,
            detailed_monitoring=True,
            ebs_optimized=True,
            block_devices=[
                ec2.BlockDevice(
                    device_name="/dev/sda1",
                    volume=ec2.BlockDeviceVolume.ebs(
                        _DISK_GIGABYTES, encrypted=True, volume_type=ec2.EbsDeviceVolumeType.GP3
                    ),
                )
            ],
        )

    def _auto_scaling_group(
        self, settings: Settings, network: Network, template: ec2.LaunchTemplate, topic: sns.ITopic
    ) -> autoscaling.AutoScalingGroup:
        group = autoscaling.AutoScalingGroup(
            self,
            "Group",
            vpc=network.vpc,
            vpc_subnets=ec2.SubnetSelection(subnets=list(network.proxy_subnets)),
            launch_template=template,
            min_capacity=settings.instances_min,
            max_capacity=settings.instances_max,
            health_checks=autoscaling.HealthChecks.with_additional_checks(
                additional_types=[autoscaling.AdditionalHealthCheckType.ELB], grace_period=_GRACE
            ),
            default_instance_warmup=cdk.Duration.minutes(3),
            # A changed template, configuration or application: a new host must be ready before an old one goes.
            signals=autoscaling.Signals.wait_for_min_capacity(timeout=_BOOT),
            update_policy=autoscaling.UpdatePolicy.rolling_update(
                max_batch_size=1,
                min_instances_in_service=settings.instances_min,
                pause_time=_BOOT,
                wait_on_resource_signals=True,
            ),
            notifications=[autoscaling.NotificationConfiguration(topic=topic)],
            group_metrics=[autoscaling.GroupMetrics.all()],
        )
        # A host that goes first leaves the load balancer, which sends it nothing new and waits for what is under way,
        # drain_seconds at the most (EC2 Auto Scaling guide, "How lifecycle hooks work"). The hook then leaves it as
        # long again, to end what holds on and to send the rest of its log. It ends by its time alone: a host that had
        # to say "done" could also fail to.
        group.add_lifecycle_hook(
            "Drain",
            lifecycle_transition=autoscaling.LifecycleTransition.INSTANCE_TERMINATING,
            heartbeat_timeout=cdk.Duration.seconds(max(30, settings.drain_seconds)),
            default_result=autoscaling.DefaultResult.CONTINUE,
        )
        return group

    def _scale(self, settings: Settings, target_group: elbv2.ApplicationTargetGroup) -> None:
        self._group.attach_to_application_target_group(target_group)
        self._group.scale_on_cpu_utilization("Cpu", target_utilization_percent=settings.cpu_target)
        requests = self._group.scale_on_request_count(
            "Requests", target_requests_per_minute=settings.requests_per_target
        )
        acknowledge_lint(requests, "CDK's own construct names the dependency on the listener twice.", "W3005")

    def _user_data(
        self, settings: Settings, asset: assets.Asset, configuration: Configuration, log_group: logs.ILogGroup
    ) -> str:
        stack = cdk.Stack.of(self)
        resource = self._group.node.default_child
        assert isinstance(resource, autoscaling.CfnAutoScalingGroup)  # noqa: S101
        words = {
            "REGION": stack.region,
            "STACK": stack.stack_name,
            "GROUP": stack.get_logical_id(resource),
            "BUCKET": asset.s3_bucket_name,
            "KEY": asset.s3_object_key,
            "DPKG_ARCHITECTURE": _DPKG_ARCHITECTURE[settings.architecture],
            "LOG_GROUP": log_group.log_group_name,
            "PROXY_TOML": as_toml(configuration).rstrip("\n"),
        }
        text = _USER_DATA.read_text("utf-8").removeprefix(f"{_SHEBANG}\n")
        for word, value in words.items():
            text = text.replace(f"@{word}@", value)
        _check_size(f"{_SHEBANG}\n{text}")
        return text


def _check_size(user_data: str) -> None:
    """Raise SettingsError if EC2 could refuse user data for its size: hosts would not start, and that late."""
    size = len(_TOKEN.sub("x" * _TOKEN_BYTES, user_data).encode())
    if size > _MOST_USER_DATA:
        raise SettingsError(
            [
                f"roles: with these and proxy_options the script of a host's first start may have {size} bytes, and "
                f"EC2 takes {_MOST_USER_DATA}; name groups instead of subjects, or take compute=fargate"
            ]
        )
