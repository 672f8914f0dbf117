"""Settings: where they come from, what is wrong with them, all mistakes together, each with what to write instead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from infra.settings import Settings, SettingsError, load, options, options_table
from tests.infra.variants import ROOT

AWS = {"CDK_DEFAULT_ACCOUNT": "123456789012", "CDK_DEFAULT_REGION": "eu-central-1"}
OIDC = {
    "oidc_issuer": "https://i",
    "oidc_authorization_endpoint": "https://i/a",
    "oidc_token_endpoint": "https://i/t",
    "oidc_user_info_endpoint": "https://i/u",
    "oidc_client_id": "c",
    "oidc_client_secret_arn": "arn:aws:secretsmanager:eu-central-1:123456789012:secret:x",
}


def problems(context: dict[str, Any], environ: dict[str, str] | None = None) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        load(context, AWS if environ is None else environ)
    return caught.value.problems


def test_without_any_it_is_a_tracking_server_on_ec2_for_dev() -> None:
    made = load({}, AWS)
    assert (made.account, made.region) == ("123456789012", "eu-central-1")
    assert (made.stack_env, made.mlflow_type, made.compute) == ("dev", "tracking", "ec2")
    assert (made.nat_gateway_count, made.retention_days, made.host_type) == (1, 14, "t4g.small")
    assert made.self_signed
    assert made.shares_limits
    assert [role.name for role in made.roles] == ["reader", "writer"]


def test_prod_has_other_defaults() -> None:
    prod = load({"stack_env": "prod", "hosted_zone_id": "Z1", "hosted_zone_name": "e.com", "host_name": "m.e.com"}, AWS)
    assert (prod.nat_gateway_count, prod.retention_days, prod.self_signed) == (2, 365, False)


def test_environment_and_mode_come_from_variables() -> None:
    made = load({}, AWS | {"STACK_ENV": "dev", "MLFLOW_TYPE": "serverless"})
    assert made.mlflow_type == "serverless"


def test_variable_and_context_must_agree() -> None:
    found = problems({"mlflow_type": "tracking"}, AWS | {"MLFLOW_TYPE": "serverless"})
    assert found == ["mlflow_type: is 'tracking' in the context but 'serverless' in MLFLOW_TYPE; keep one of them"]


def test_values_of_the_command_line_are_texts() -> None:
    made = load(
        {
            "zones": "3",
            "waf": "false",
            "nat_gateways": "0",
            "allowed_cidrs": "10.0.0.0/8, 192.0.2.0/24",
            "roles": '[{"name": "all", "allow": ["*"], "groups": ["ml"]}]',
            "tags": '{"team": "ml"}',
        },
        AWS,
    )
    assert (made.zones, made.waf, made.nat_gateway_count) == (3, False, 0)
    assert made.allowed_cidrs == ["10.0.0.0/8", "192.0.2.0/24"]
    assert made.roles[0].groups == ["ml"]
    assert made.tags == {"team": "ml"}


def test_relative_folders_begin_at_the_repository() -> None:
    """`cdk` runs in infra/, but people write paths as they see them."""
    assert load({"application": "build/application"}, AWS).application == ROOT / "build" / "application"
    assert load({"application": "/srv/application"}, AWS).application == Path("/srv/application")


def test_names_of_cdk_itself_are_no_settings() -> None:
    context = {"@aws-cdk/core:checkSecretUsage": True, "vpc-provider:account=1": {}, "aws:cdk:enable-path-metadata": 1}
    assert load(context, AWS) == load({}, AWS)


def test_all_mistakes_are_listed_together() -> None:
    found = problems({"computer": "ec2", "zones": "1", "mlflow_size": "Tiny", "maintenance_window": "Someday"}, {})
    assert len(found) == 6
    assert found[0] == "computer: no such setting; did you mean compute?"
    assert any(one.startswith("account: not known, because there are no AWS credentials") for one in found)
    assert any(one.startswith("zones: '1' ") for one in found)
    assert any(one.startswith("mlflow_size: 'Tiny' ") and "'Small'" in one for one in found)
    assert any(one.startswith("maintenance_window: 'Someday' ") and "Sun:03:30" in one for one in found)


CLOSED = "nat_gateways: 0 leaves no way out of the VPC but endpoints, and "
GIVEN = {"certificate_arn": "arn:aws:acm:eu-central-1:123456789012:certificate/1"}
ELSEWHERE = {"certificate_arn": "arn:aws:acm:us-east-1:123456789012:certificate/1", "host_name": "m.e.com"}
ZONE = {"hosted_zone_id": "Z1", "hosted_zone_name": "e.com"}
MISTAKES: list[tuple[dict[str, str], str]] = [
    ({"nat_gateways": "0", "mlflow_type": "serverless"}, CLOSED + "no endpoint for MLflow Apps"),
    ({"nat_gateways": "0", "endpoints": "none"}, CLOSED + "endpoints=none"),
    ({"nat_gateways": "0", "compute": "fargate", "image": "docker.io/x:1"}, CLOSED + "only images in ECR"),
    ({"nat_gateways": "0", "host_name": "m.e.com", **GIVEN, **OIDC}, CLOSED + "sign-in"),
    ({"vpc_id": "vpc-12345678", "nat_gateways": "1"}, "nat_gateways: counts only for a new VPC"),
    ({"compute": "fargate"}, "image: is required with compute=fargate"),
    ({"image": "x"}, "image: counts only with compute=fargate"),
    ({"compute": "fargate", "image": "x", "instance_type": "t4g.small"}, "instance_type: counts only with compute=ec2"),
    ({"instance_type": "t3.small"}, "instance_type: t3.small is not arm64; write architecture=x86_64"),
    ({"instance_type": "m7g.large", "architecture": "x86_64"}, "instance_type: m7g.large is not x86_64"),
    ({"instances_min": "5"}, "instances_min: is larger than instances_max"),
    ({"instances_min": "4"}, "instances_max: must be larger than instances_min"),
    ({"stack_env": "prod"}, "certificate_arn: prod takes no self-signed certificate"),
    ({"stack_env": "prod", "instances_min": "1"}, "instances_min: prod takes 2 or more"),
    ({"internet_facing": "true"}, "allowed_cidrs: is required with internet_facing"),
    ({"host_name": "m.e.com"}, "host_name: needs a certificate"),
    (GIVEN, "host_name: is required with certificate_arn"),
    (ELSEWHERE, "certificate_arn: must be in eu-central-1"),
    ({"hosted_zone_id": "Z1"}, "hosted_zone_id: goes with hosted_zone_name"),
    (ZONE | {"host_name": "m.other.com"}, "host_name: must be in the zone e.com"),
    ({"oidc_issuer": "https://i"}, "oidc_client_id: is missing"),
    (OIDC | {"oidc_issuer": "http://i"}, "oidc_issuer: must be an https:// URL"),
    ({"oidc_groups_claim": "groups"}, "oidc_groups_claim: counts only with oidc_issuer"),
    ({"mlflow_type": "serverless", "mlflow_version": "3.0"}, "mlflow_version: counts only with mlflow_type=tracking"),
    ({"roles": "[]"}, "roles: is empty"),
    ({"roles": '[{"name": "a", "allow": ["Gett*"]}]'}, "roles[1].allow: 'Gett*' matches no action"),
    ({"roles": '[{"name": "a", "allow": ["*"]}, {"name": "a", "allow": ["*"]}]'}, "roles: the name 'a' is used twice"),
    ({"roles": '[{"name": "a", "allow": ["*"], "deney": []}]'}, "roles.0.deney: no such option of a role"),
    ({"roles": "reader"}, "roles: 'reader' is not JSON"),
    ({"log_retention_days": "15"}, "log_retention_days: '15' is not one that CloudWatch takes"),
    ({"vpc_cidr": "10.0.0.0/24"}, "vpc_cidr: '10.0.0.0/24' must be /16 to /22"),
    ({"vpc_cidr": "10.42.0.1/16"}, "vpc_cidr: '10.42.0.1/16' takes networks as address/length without bits behind the "
     "length; write 10.42.0.0/16"),
    ({"vpc_cidr": "fd00::/20"}, "vpc_cidr: 'fd00::/20' takes IPv4 networks such as 10.0.0.0/8, and fd00::/20 is none"),
    ({"allowed_cidrs": "192.0.2.0/24,10.0.0.1/8"}, "allowed_cidrs: '192.0.2.0/24,10.0.0.1/8' takes networks as "
     "address/length without bits behind the length; write 10.0.0.0/8"),
    ({"allowed_cidrs": "192.0.2.7"}, "allowed_cidrs: '192.0.2.7' takes networks as address/length"),
    ({"allowed_cidrs": "2001:db8::/32"}, "allowed_cidrs: '2001:db8::/32' takes IPv4 networks"),
    ({"allowed_cidrs": "office"}, "allowed_cidrs: 'office' takes IPv4 networks"),
    ({"allowed_cidrs": ",".join(f"10.{i}.0.0/16" for i in range(31))}, "allowed_cidrs: "),
    ({"zone_names": "eu-central-1a"}, "zone_names: must name 2 different zones"),
    ({"zone_names": "eu-central-1a,eu-central-1a"}, "zone_names: must name 2 different zones"),
    ({"zone_names": "eu-central-1a,us-east-1a"}, "zone_names: us-east-1a is no zone of eu-central-1"),
    ({"zone_names": "eu-central-1a,eu-central-1b", "vpc_id": "vpc-12345678"}, "zone_names: counts only for a new VPC"),
    ({"compute": "fargate", "image": "x", "drain_seconds": "121"}, "drain_seconds: Fargate waits 120 at the most"),
    ({"instance_type": "t2.small", "architecture": "x86_64"}, "instance_type: t2 has no EBS optimization"),
    ({"vpc_id": "my-vpc"}, "vpc_id: 'my-vpc' does not have the right form (An existing VPC"),
]  # fmt: skip


@pytest.mark.parametrize(("context", "begin"), MISTAKES, ids=[begin.split(";")[0][:60] for _, begin in MISTAKES])
def test_each_mistake_says_what_to_write_instead(context: dict[str, str], begin: str) -> None:
    assert any(problem.startswith(begin) for problem in problems(context)), problems(context)


def test_as_many_networks_as_a_security_group_takes() -> None:
    """It takes 60 rules, and each network has one for HTTPS and one for what is redirected there."""
    networks = [f"10.{number}.0.0/16" for number in range(31)]
    assert len(load({"allowed_cidrs": ",".join(networks[:30])}, AWS).allowed_cidrs) == 30
    (problem,) = problems({"allowed_cidrs": ",".join(networks)})
    assert "has 31 networks, and a security group takes 30; write larger ones" in problem


def test_fargate_drains_for_two_minutes_and_hosts_for_longer() -> None:
    assert load({"compute": "fargate", "image": "x", "drain_seconds": "120"}, AWS).drain_seconds == 120
    assert load({"drain_seconds": "900"}, AWS).drain_seconds == 900


def test_mistakes_are_counted_in_words() -> None:
    with pytest.raises(SettingsError, match=r"^1 mistake in the settings of the deployment:\n  ✗ image: "):
        load({"image": "x"}, AWS)


def test_every_setting_is_explained_with_type_and_default() -> None:
    listed = {option.name: option for option in options()}
    assert set(listed) == set(Settings.model_fields)
    for option in listed.values():
        assert option.description.endswith("."), option
        assert option.type
        assert option.default
    assert listed["compute"].type == "`ec2` / `fargate`"
    assert listed["zones"].default == "2"
    assert listed["nat_gateways"].default == "see text"
    assert listed["vpc_id"].default == "see text"
    assert listed["image"].default == "none"
    assert (listed["proxy_options"].type, listed["application"].type) == ("file", "folder")
    assert options_table().count("\n") == len(Settings.model_fields) + 1
