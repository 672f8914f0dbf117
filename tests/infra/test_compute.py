"""Hosts on EC2 and tasks on Fargate: images, isolation, scaling, replacement, draining."""

from __future__ import annotations

import json
import re
import subprocess
from typing import Any

import pytest
from infra.settings import SettingsError
from tests.infra.variants import ACCOUNT, IMAGE, MODES, REGION, Synthesized, every_statement, resolve, synthesize

GROUP = "AWS::AutoScaling::AutoScalingGroup"


def launch_template(made: Synthesized) -> dict[str, Any]:
    data: dict[str, Any] = made.one("flaskapp", "AWS::EC2::LaunchTemplate")["LaunchTemplateData"]
    return data


def group(made: Synthesized) -> dict[str, Any]:
    (found,) = made.resources("flaskapp", GROUP).values()
    return found


@pytest.mark.parametrize(
    ("chosen", "kind", "image"),
    [
        ({}, "t4g.small", "arm64"),
        ({"architecture": "x86_64"}, "t3.small", "amd64"),
        ({"instance_type": "m7g.large"}, "m7g.large", "arm64"),
    ],
)
def test_hosts_run_ubuntu_24_04_of_their_architecture(chosen: dict[str, str], kind: str, image: str) -> None:
    made = synthesize(**chosen)
    template = launch_template(made)
    assert template["InstanceType"] == kind
    parameter = made.templates["flaskapp"]["Parameters"][template["ImageId"]["Ref"]]
    assert (
        parameter["Default"] == f"/aws/service/canonical/ubuntu/server/24.04/stable/current/{image}/hvm/ebs-gp3/ami-id"
    )
    assert parameter["Type"] == "AWS::SSM::Parameter::Value<AWS::EC2::Image::Id>"


def test_metadata_is_version_2_and_for_the_host_alone() -> None:
    options = launch_template(synthesize())["MetadataOptions"]
    assert options["HttpTokens"] == "required"
    assert options["HttpPutResponseHopLimit"] == 1


def test_there_is_no_ssh_and_a_session_manager() -> None:
    made = synthesize()
    assert "KeyName" not in launch_template(made)
    ports = [
        rule["Properties"].get("FromPort")
        for rule in made.resources("networking", "AWS::EC2::SecurityGroupIngress").values()
    ]
    assert 22 not in ports
    assert "ssmmessages:OpenDataChannel" in json.dumps(made.templates["flaskapp"])
    assert made.templates["flaskapp"]["Outputs"]["ShellCommand"]["Value"]["Fn::Join"][1][0].startswith(
        "aws ssm start-session"
    )


def test_disks_are_encrypted() -> None:
    (disk,) = launch_template(synthesize())["BlockDeviceMappings"]
    assert disk["Ebs"]["Encrypted"] is True
    assert disk["Ebs"]["VolumeType"] == "gp3"


def test_group_has_two_hosts_or_more_over_zones_judged_by_the_load_balancer() -> None:
    properties = group(synthesize())["Properties"]
    assert (properties["MinSize"], properties["MaxSize"]) == ("2", "4")
    assert len(properties["VPCZoneIdentifier"]) == 2
    assert properties["HealthCheckType"] == "ELB"
    assert properties["HealthCheckGracePeriod"] == 300
    assert len(properties["TargetGroupARNs"]) == 1
    assert properties["NotificationConfigurations"]


def test_a_change_replaces_hosts_one_by_one_and_waits_for_each() -> None:
    resource = group(synthesize())
    rolling = resource["UpdatePolicy"]["AutoScalingRollingUpdate"]
    assert rolling["MinInstancesInService"] == 2
    assert rolling["MaxBatchSize"] == 1
    assert rolling["WaitOnResourceSignals"] is True
    assert rolling["PauseTime"] == "PT15M"
    assert resource["CreationPolicy"]["ResourceSignal"] == {"Count": 2, "Timeout": "PT15M"}


def test_a_changed_configuration_makes_another_launch_template_version() -> None:
    first = launch_template(synthesize())["UserData"]
    second = launch_template(synthesize(drain_seconds="90"))["UserData"]
    assert first != second
    assert "LatestVersionNumber" in json.dumps(group(synthesize())["Properties"]["LaunchTemplate"])


def test_hosts_that_go_get_time_to_end_their_requests() -> None:
    made = synthesize(drain_seconds="90")
    hook = made.one("flaskapp", "AWS::AutoScaling::LifecycleHook")
    assert hook["LifecycleTransition"] == "autoscaling:EC2_INSTANCE_TERMINATING"
    assert hook["HeartbeatTimeout"] == 90
    assert hook["DefaultResult"] == "CONTINUE"
    assert "drain_timeout = 85" in user_data(made)


def test_group_scales_on_requests_and_cpu() -> None:
    made = synthesize(requests_per_target="1200", cpu_target="50")
    policies = [one["Properties"] for one in made.resources("flaskapp", "AWS::AutoScaling::ScalingPolicy").values()]
    targets = {
        one["TargetTrackingConfiguration"]["PredefinedMetricSpecification"]["PredefinedMetricType"]: one[
            "TargetTrackingConfiguration"
        ]["TargetValue"]
        for one in policies
    }
    assert targets == {"ASGAverageCPUUtilization": 50, "ALBRequestCountPerTarget": 1200}


def user_data(made: Synthesized) -> str:
    text = resolve(launch_template(made)["UserData"])
    assert isinstance(text, str)
    return text


@pytest.mark.parametrize("mode", MODES)
def test_user_data_is_a_whole_script_within_ec2s_limit(mode: str) -> None:
    text = user_data(synthesize(mode))
    assert text.startswith("#!/bin/bash\n")
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    # 16 KB before encoding (EC2 guide, "Run commands when you launch an EC2 instance").
    assert len(text.encode()) < 16_000
    assert not re.search(r"@[A-Z_]+@", text), "a word was not filled in"


def of_subjects(*subjects: str) -> str:
    """One role whose holders are these."""
    return json.dumps([{"name": "writer", "allow": ["*"], "subjects": subjects}])


def test_user_data_that_ec2_would_refuse_is_refused_in_words() -> None:
    """What CloudFormation fills in is not known here; 128 bytes are more than any ARN or name there has."""
    parts = launch_template(synthesize(roles=of_subjects("x")))["UserData"]["Fn::Base64"]["Fn::Join"][1]
    written = len("".join(part for part in parts if isinstance(part, str)).encode())
    filled_in = sum(not isinstance(part, str) for part in parts)
    assert filled_in >= 8
    left = 16_384 - written - filled_in * 128
    assert left > 2000
    assert launch_template(synthesize(roles=of_subjects("x" * (1 + left))))
    with pytest.raises(SettingsError) as caught:
        synthesize(roles=of_subjects("x" * (2 + left)))
    (problem,) = caught.value.problems
    assert re.match(r"roles: .* may have 16385 bytes, and EC2 takes 16384; .* or take compute=fargate$", problem)
    assert fargate(roles=of_subjects("x" * (2 + left)))


def test_user_data_installs_from_the_wheelhouse_and_reports_to_the_group() -> None:
    made = synthesize()
    text = user_data(made)
    (logical_id,) = made.resources("flaskapp", GROUP)
    assert f"'LogicalResourceId={logical_id}'" in text
    assert "'StackName=sagemaker-infra-flaskapp-tracking'" in text
    options = '--wheelhouse "$application/wheelhouse" --config "$application/proxy.toml"'
    install = f'bash "$application/deploy/install.sh" {options}'
    assert install in text
    assert text.index(install) < text.index("\nsignal SUCCESS")
    assert f"https://cdk-hnb659fds-assets-{ACCOUNT}-{REGION}.s3.{REGION}.amazonaws.com/" in text


def test_user_data_takes_nothing_from_the_internet() -> None:
    """So it works in a closed network: only S3, CloudFormation and the metadata service are called."""
    text = user_data(synthesize()).replace("$region", REGION)
    hosts = set(re.findall(r"https?://([^/\"'\s]+)", text.split("<<'PROXY_TOML'")[0] + text.split("\nPROXY_TOML\n")[1]))
    # For what the region's bucket lacks; where it cannot be reached, the host does without.
    assert hosts - {"amazoncloudwatch-agent.s3.amazonaws.com"} == {
        "169.254.169.254",
        f"cloudformation.{REGION}.amazonaws.com",
        f"cdk-hnb659fds-assets-{ACCOUNT}-{REGION}.s3.{REGION}.amazonaws.com",
        f"amazoncloudwatch-agent-{REGION}.s3.{REGION}.amazonaws.com",
    }
    assert not re.search(r"\b(apt|apt-get|snap|pip) ", text)


def fargate(**chosen: str) -> Synthesized:
    return synthesize("tracking", "fargate", **chosen)


def container(made: Synthesized) -> dict[str, Any]:
    task = made.one("flaskapp", "AWS::ECS::TaskDefinition")
    assert task["RequiresCompatibilities"] == ["FARGATE"]
    (found,) = task["ContainerDefinitions"]
    return dict(found)


def test_tasks_run_the_given_image_with_a_read_only_root() -> None:
    found = container(fargate())
    assert found["Image"] == IMAGE
    assert found["ReadonlyRootFilesystem"] is True
    assert found["StopTimeout"] == 60
    assert {mount["ContainerPath"]: mount["ReadOnly"] for mount in found["MountPoints"]} == {
        "/tmp": False,
        # What ECS Exec writes.
        "/managed-agents": False,
        "/var/lib/amazon/ssm": False,
        "/var/log/amazon/ssm": False,
    }


def test_tasks_end_after_the_time_that_requests_get() -> None:
    assert container(fargate(drain_seconds="120"))["StopTimeout"] == 120


def test_execution_role_may_write_the_log_once() -> None:
    of_role = [
        statement
        for _, name, statement in every_statement(fargate())
        if name.startswith("TasksExecutionRole") and "logs:PutLogEvents" in statement["Action"]
    ]
    assert len(of_role) == 1
    assert "ProxyLogs" in json.dumps(of_role[0]["Resource"])


def test_tasks_have_the_hosts_architecture() -> None:
    for architecture, expected in (("arm64", "ARM64"), ("x86_64", "X86_64")):
        task = fargate(architecture=architecture).one("flaskapp", "AWS::ECS::TaskDefinition")
        assert task["RuntimePlatform"]["CpuArchitecture"] == expected


def test_service_is_private_and_undoes_failed_deployments() -> None:
    service = fargate().one("flaskapp", "AWS::ECS::Service")
    configuration = service["DeploymentConfiguration"]
    assert configuration["DeploymentCircuitBreaker"] == {"Enable": True, "Rollback": True}
    assert (configuration["MinimumHealthyPercent"], configuration["MaximumPercent"]) == (100, 200)
    network = service["NetworkConfiguration"]["AwsvpcConfiguration"]
    assert network["AssignPublicIp"] == "DISABLED"
    assert len(network["Subnets"]) == 2
    assert service["DesiredCount"] == 2


def test_service_scales_as_the_group_does() -> None:
    made = fargate(requests_per_target="1200", cpu_target="50")
    target = made.one("flaskapp", "AWS::ApplicationAutoScaling::ScalableTarget")
    assert (target["MinCapacity"], target["MaxCapacity"]) == (2, 4)
    policies = [
        one["Properties"]["TargetTrackingScalingPolicyConfiguration"]
        for one in made.resources("flaskapp", "AWS::ApplicationAutoScaling::ScalingPolicy").values()
    ]
    targets = {one["PredefinedMetricSpecification"]["PredefinedMetricType"]: one["TargetValue"] for one in policies}
    assert targets == {"ECSServiceAverageCPUUtilization": 50, "ALBRequestCountPerTarget": 1200}


def test_tasks_are_opened_with_ecs_exec() -> None:
    made = fargate()
    assert made.one("flaskapp", "AWS::ECS::Service")["EnableExecuteCommand"] is True
    assert made.templates["flaskapp"]["Outputs"]["ShellCommand"]["Value"]["Fn::Join"][1][0].startswith(
        "aws ecs execute-command"
    )


def test_fargate_needs_no_application_built_here() -> None:
    assert "Application" not in json.dumps(list(fargate().templates["flaskapp"]["Resources"]))
    assert not fargate().resources("flaskapp", GROUP)
