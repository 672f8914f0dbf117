"""Stack 4, sagemaker-infra-flaskapp-tracking or -serverless: the proxy behind a load balancer, and all it takes."""

from __future__ import annotations

from typing import Any

import aws_cdk as cdk
from aws_cdk import aws_secretsmanager as secretsmanager
from constructs import Construct

from infra.acknowledgements import acknowledge
from infra.compute_ec2 import HostsOnEc2
from infra.compute_fargate import TasksOnFargate
from infra.load_balancer import LoadBalancer
from infra.mlflow import MlflowTarget
from infra.monitoring import AlarmTopic, Monitoring
from infra.networking import Network
from infra.permissions import Permissions
from infra.proxy_configuration import Deployment, proxy_configuration
from infra.retention import log_group, removal
from infra.settings import Settings
from infra.shared_limits import SharedLimits

# Where CertificateCommand saves what ValidateCommand trusts.
_CERTIFICATE_FILE = "mlflow-proxy.pem"


class FlaskappStack(cdk.Stack):
    """Puts the parts together; each is in a file of its own."""

    def __init__(
        self,
        scope: Construct,
        id: str,
        settings: Settings,
        network: Network,
        target: MlflowTarget,
        **options: Any,
    ) -> None:
        super().__init__(scope, id, **options)
        self._settings = settings
        keys = self._keys()
        topic = AlarmTopic(self, "Alarms", settings)
        logs = log_group(self, "ProxyLogs", settings)
        permissions = Permissions(self, "Permissions", settings, target, keys.secret_arn)
        front = LoadBalancer(self, "LoadBalancer", settings, network, target.logs)
        limits = SharedLimits(self, "Limits", settings, network) if settings.shares_limits else None
        configuration = proxy_configuration(
            settings,
            Deployment(
                target_arn=target.arn,
                public_url=front.url,
                trusted_networks=network.load_balancer_cidrs,
                load_balancer_arn=front.balancer.load_balancer_arn,
                load_balancer_host=front.balancer.load_balancer_dns_name,
                keys_arn=keys.secret_arn,
                storage=limits.url if limits is not None else None,
                caller_arns=permissions.caller_arns,
            ),
        )
        parts: dict[str, Any] = {
            "network": network,
            "permissions": permissions,
            "target_group": front.target_group,
            "configuration": configuration,
            "log_group": logs,
        }
        if settings.compute == "ec2":
            shell = self._shell_on_host(HostsOnEc2(self, "Hosts", settings, topic=topic, **parts))
        else:
            shell = self._shell_in_task(TasksOnFargate(self, "Tasks", settings, **parts))
        Monitoring(
            self,
            "Monitoring",
            settings,
            load_balancer=front.balancer,
            target_group=front.target_group,
            certificate_arn=front.certificate_arn,
            log_group=logs,
            topic=topic,
        )
        self._outputs(front, target, keys, shell)

    def _keys(self) -> secretsmanager.Secret:
        """API keys, which `mlflow-proxy keys` makes. It holds hashes only; a blank line is no key."""
        keys = secretsmanager.Secret(
            self,
            "Keys",
            description="API keys of the MLflow proxy (hashes), as mlflow-proxy keys writes them",
            secret_string_value=cdk.SecretValue.unsafe_plain_text("\n"),
            removal_policy=removal(self._settings),
        )
        acknowledge(
            keys,
            "API keys are made for people, who rotate them one by one with `mlflow-proxy keys rotate`.",
            "SMG4",
        )
        return keys

    def _shell_on_host(self, hosts: HostsOnEc2) -> str:
        return (
            f"aws ssm start-session --region {self.region} --target "
            "$(aws autoscaling describe-auto-scaling-groups "
            f"--region {self.region} --auto-scaling-group-names {hosts.group_name} "
            "--query 'AutoScalingGroups[0].Instances[0].InstanceId' --output text)"
        )

    def _shell_in_task(self, tasks: TasksOnFargate) -> str:
        return (
            f"aws ecs execute-command --region {self.region} --cluster {tasks.cluster_name} --container proxy "
            "--interactive --command /bin/sh --task "
            f"$(aws ecs list-tasks --region {self.region} --cluster {tasks.cluster_name} "
            f"--service-name {tasks.service_name} --query 'taskArns[0]' --output text)"
        )

    def _outputs(self, front: LoadBalancer, target: MlflowTarget, keys: secretsmanager.Secret, shell: str) -> None:
        trust = f" --ca {_CERTIFICATE_FILE}" if self._settings.self_signed else ""
        outputs = {
            "Url": (front.url, "What callers use as MLFLOW_TRACKING_URI"),
            "TargetArn": (target.arn, "The MLflow behind it"),
            "ValidateCommand": (
                f"mlflow-proxy validate --url {front.url}{trust}",
                "Tries the deployment, call by call, with the API key in MLFLOW_PROXY_KEY",
            ),
            "ShellCommand": (shell, "Opens a shell where the proxy runs"),
            "KeysSecret": (keys.secret_arn, "The secret with the API keys"),
            "LoadBalancerHost": (front.balancer.load_balancer_dns_name, "What a DNS name of yours must lead to"),
        }
        if self._settings.self_signed:
            command = (
                f"aws acm get-certificate --region {self.region} --certificate-arn {front.certificate_arn} "
                f"--query Certificate --output text > {_CERTIFICATE_FILE}"
            )
            outputs["CertificateCommand"] = (command, "Saves the self-signed certificate, for callers to trust")
        # TargetArn is another stack's, shown here too, because people look at this stack.
        self.template_options.metadata = {"cfn-lint": {"config": {"ignore_checks": ["W6001"]}}}
        for name, (value, description) in outputs.items():
            cdk.CfnOutput(self, name, value=value, description=description)
