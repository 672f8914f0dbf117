"""The application as a whole: names, tags, protection, outputs, exports, and the command line of `cdk`."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
from infra.app import stack_ids
from tests.infra.variants import COMPUTES, MODES, PROD, ROOT, TLS, resolve, settings, synthesize

from mlflow_proxy import cli


def test_stacks_are_named_as_in_awss_sample() -> None:
    assert stack_ids("tracking") == (
        "sagemaker-infra-networking",
        "sagemaker-infra-domain",
        "sagemaker-infra-mlflow-tracking",
        "sagemaker-infra-flaskapp-tracking",
    )
    for mode in MODES:
        manifest = json.loads((synthesize(mode).folder / "manifest.json").read_text())
        stacks = {name for name, one in manifest["artifacts"].items() if one["type"] == "aws:cloudformation:stack"}
        assert stacks == set(stack_ids(mode))


def test_both_modes_share_the_first_two() -> None:
    assert set(stack_ids("tracking")) & set(stack_ids("serverless")) == set(stack_ids("tracking")[:2])


# What takes no tags, or gets them from what it belongs to.
UNTAGGED = {
    "AWS::ApplicationAutoScaling::ScalableTarget",
    "AWS::ApplicationAutoScaling::ScalingPolicy",
    "AWS::AutoScaling::LifecycleHook",
    "AWS::AutoScaling::ScalingPolicy",
    "AWS::CloudWatch::Dashboard",
    "AWS::EC2::Route",
    "AWS::EC2::SecurityGroupEgress",
    "AWS::EC2::SecurityGroupIngress",
    "AWS::EC2::SubnetRouteTableAssociation",
    "AWS::EC2::VPCGatewayAttachment",
    "AWS::ElasticLoadBalancingV2::Listener",
    "AWS::IAM::InstanceProfile",
    "AWS::IAM::Policy",
    "AWS::Logs::MetricFilter",
    "AWS::S3::BucketPolicy",
    "AWS::SNS::TopicPolicy",
    "AWS::WAFv2::WebACLAssociation",
    "Custom::S3AutoDeleteObjects",
    "Custom::SelfSignedCertificate",
}
# Made by CDK without its tags: the function that empties buckets, in dev.
_EMPTIER = "CustomS3AutoDeleteObjects"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("compute", COMPUTES)
def test_everything_has_tags(mode: str, compute: str) -> None:
    made = synthesize(mode, compute, tags='{"team": "ml"}')
    untagged = set()
    for stack, template in made.templates.items():
        for name, resource in template["Resources"].items():
            text = json.dumps(resource.get("Properties", {}))
            if not all(f'"{value}"' in text for value in ("sagemaker-mlflow-proxy", "dev", "ml")):
                if not name.startswith(_EMPTIER):
                    untagged.add(resource["Type"])
            elif stack in ("networking", "domain"):
                assert '"mlflow-type"' not in text, "shared stacks must not tell modes apart"
    assert untagged <= UNTAGGED


def test_prod_is_protected_and_keeps_its_data() -> None:
    for variant, protected in ((synthesize(), False), (synthesize(**PROD), True)):
        manifest = json.loads((variant.folder / "manifest.json").read_text())
        stacks = [one for one in manifest["artifacts"].values() if one["type"] == "aws:cloudformation:stack"]
        assert {one["properties"].get("terminationProtection", False) for one in stacks} == {protected}
    for mode, itself in (
        ("tracking", "AWS::SageMaker::MlflowTrackingServer"),
        ("serverless", "AWS::SageMaker::MlflowApp"),
    ):
        keeping = {
            resource["Type"]
            for template in synthesize(mode, **PROD).templates.values()
            for resource in template["Resources"].values()
            if str(resource.get("DeletionPolicy")).startswith("Retain")
        }
        data = {"AWS::S3::Bucket", "AWS::KMS::Key", "AWS::Logs::LogGroup", "AWS::SecretsManager::Secret"}
        assert keeping == data | {itself, "AWS::IAM::Role", "AWS::IAM::Policy"}
    in_dev = {
        resource.get("DeletionPolicy")
        for template in synthesize().templates.values()
        for resource in template["Resources"].values()
    }
    assert in_dev == {None, "Delete"}


@pytest.mark.parametrize("mode", MODES)
def test_nothing_that_is_kept_has_a_name_of_its_own_but_mlflow(mode: str) -> None:
    """It would be in the way of the next deployment. MLflow's own name is a setting, because AWS wants one."""
    named = {
        resource["Type"]
        for template in synthesize(mode, **PROD).templates.values()
        for resource in template["Resources"].values()
        if str(resource.get("DeletionPolicy")).startswith("Retain")
        and {"BucketName", "LogGroupName", "Name", "RoleName", "TrackingServerName"} & set(resource["Properties"])
    }
    assert named == {"AWS::SageMaker::MlflowTrackingServer" if mode == "tracking" else "AWS::SageMaker::MlflowApp"}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("compute", COMPUTES)
def test_outputs_say_what_to_do_next(mode: str, compute: str) -> None:
    outputs = synthesize(mode, compute, **TLS["given"]).templates["flaskapp"]["Outputs"]
    values = {name: resolve(one["Value"]) for name, one in outputs.items()}
    assert values["Url"] == "https://mlflow.example.com"
    assert values["ValidateCommand"] == "mlflow-proxy validate --url https://mlflow.example.com"
    kind = {"tracking": "mlflow-tracking-server/mlflow", "serverless": "mlflow-app/app-"}[mode]
    assert f":{kind}" in values["TargetArn"]
    assert values["ShellCommand"].startswith(
        {"ec2": "aws ssm start-session", "fargate": "aws ecs execute-command"}[compute]
    )
    assert all(one["Description"] for one in outputs.values())


@pytest.mark.parametrize("compute", COMPUTES)
def test_commands_for_a_self_signed_certificate_fit_together(compute: str) -> None:
    """What the one saves, the other trusts, and both are commands as they are."""
    outputs = synthesize("tracking", compute).templates["flaskapp"]["Outputs"]
    values = {name: str(resolve(one["Value"])) for name, one in outputs.items()}
    command = shlex.split(values["ValidateCommand"])
    assert command[:4] == ["mlflow-proxy", "validate", "--url", values["Url"]]
    assert command[4:] == ["--ca", "mlflow-proxy.pem"]
    assert values["CertificateCommand"].startswith("aws acm get-certificate ")
    assert values["CertificateCommand"].endswith(f" > {command[-1]}")


def test_validate_command_is_one_that_the_proxy_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mlflow-proxy.pem").touch()
    output = synthesize().templates["flaskapp"]["Outputs"]["ValidateCommand"]["Value"]
    name, *arguments = shlex.split(str(resolve(output)))[1:]
    command = cli.main.get_command(click.Context(cli.main), name)
    assert command is not None
    command.make_context(name, arguments)  # fails on options that do not exist


def test_exports_are_the_same_whatever_uses_them() -> None:
    """An export that is in use cannot be deleted, so none may come and go with the other mode or compute."""
    for stack in ("networking", "mlflow"):
        for mode in MODES:
            exports = {
                json.dumps(
                    sorted(
                        one["Export"]["Name"] for one in made.templates[stack]["Outputs"].values() if "Export" in one
                    )
                )
                for made in (synthesize(mode, compute) for compute in COMPUTES)
            }
            assert len(exports) == 1


def test_mistakes_are_told_without_a_traceback() -> None:
    command = [sys.executable, "-m", "infra.app"]
    context = settings(zones="1") | {"instances_min": "9"}
    environ = {"CDK_CONTEXT_JSON": json.dumps(context), "PATH": os.environ["PATH"]}
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "mistake" in done.stderr
    assert "zones: '1'" in done.stderr
    assert "Traceback" not in done.stderr
