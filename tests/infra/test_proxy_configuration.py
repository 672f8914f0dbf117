"""The proxy's configuration in the templates is one that the proxy itself accepts, with just what the stack knows."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from tests.infra.variants import (
    ACCOUNT,
    CLIENT_CERTIFICATES,
    MODES,
    REGION,
    SIGN_IN,
    TLS,
    Synthesized,
    resolve,
    synthesize,
)

from mlflow_proxy import configuration
from mlflow_proxy.settings import Settings
from mlflow_proxy.targets import Mode

BALANCER = "internal-proxy-1234567890.eu-central-1.elb.amazonaws.com"


def of_host(made: Synthesized, folder: Path) -> Settings:
    """What a host would load: the file in its user data."""
    user_data = resolve(made.one("flaskapp", "AWS::EC2::LaunchTemplate")["LaunchTemplateData"]["UserData"])
    text = user_data.split("<<'PROXY_TOML'\n")[1].split("\nPROXY_TOML\n")[0]
    path = folder / "proxy.toml"
    path.write_text(text)
    return configuration.load(path, {})


def of_task(made: Synthesized) -> Settings:
    """What a container would load: its variables."""
    (container,) = made.one("flaskapp", "AWS::ECS::TaskDefinition")["ContainerDefinitions"]
    return configuration.load(None, {one["Name"]: resolve(one["Value"]) for one in container["Environment"]})


@pytest.mark.parametrize("mode", MODES)
def test_hosts_configuration(mode: str, tmp_path: Path) -> None:
    made = of_host(synthesize(mode), tmp_path)
    (target,) = made.build_targets()
    assert target.arn.mode is {"tracking": Mode.TRACKING, "serverless": Mode.APP}[mode]
    assert target.default
    assert target.assume_role_arn is None
    assert made.server.host == "0.0.0.0"
    assert made.server.public_url == f"https://{BALANCER}"
    assert made.access.keys_secret is not None
    assert made.access.keys_secret.startswith(f"arn:aws:secretsmanager:{REGION}:{ACCOUNT}:secret:Keys")
    assert made.audit.to == "stdout"
    assert made.log.format == "json"
    assert made.limits.storage == "rediss://mlflow-proxy.serverless.euc1.cache.amazonaws.com:6379/0"
    assert made.load_balancer.arn is None
    assert made.certificates.subject_header is None


def test_trusted_proxies_are_the_load_balancers_subnets(tmp_path: Path) -> None:
    for chosen, kind in (
        ({}, "load-balancer"),
        ({"internet_facing": "true", "allowed_cidrs": "192.0.2.0/24"}, "public"),
    ):
        made = synthesize(**chosen)
        cidrs = {
            subnet["Properties"]["CidrBlock"]
            for subnet in made.resources("networking", "AWS::EC2::Subnet").values()
            if {"Key": "aws-cdk:subnet-name", "Value": kind} in subnet["Properties"]["Tags"]
        }
        assert {str(one) for one in of_host(made, tmp_path).server.trusted_proxies} == cidrs
        assert len(cidrs) == 2


def test_each_role_signs_with_a_role_of_its_own(tmp_path: Path) -> None:
    roles = of_host(synthesize(), tmp_path).roles
    assert [role.name for role in roles] == ["reader", "writer"]
    for role in roles:
        assert role.assume_role_arn is not None
        assert f"Caller{role.name}" in role.assume_role_arn
        assert role.session_tags
        assert role.targets == ["mlflow"]
    assert roles[0].allow == ["Get*", "List*", "Search*", "AccessUI"]


def test_roles_keep_what_was_configured(tmp_path: Path) -> None:
    given = [
        {
            "name": "ml",
            "allow": ["*"],
            "deny": ["Delete*"],
            "groups": ["ml"],
            "subjects": ["key:ci-*"],
            "rate": "5/second",
        }
    ]
    (role,) = of_host(synthesize(roles=json.dumps(given)), tmp_path).roles
    kept = role.model_dump(include={"name", "allow", "deny", "groups", "subjects", "rate"})
    assert kept == given[0]


@pytest.mark.parametrize("tls", ["given", "requested"])
def test_public_url_is_the_callers_name(tls: str, tmp_path: Path) -> None:
    made = of_host(synthesize(**TLS[tls]), tmp_path)
    assert made.server.public_url == "https://mlflow.example.com"
    assert made.server.allowed_hosts == [BALANCER]


def test_sign_in_at_the_load_balancer_is_believed(tmp_path: Path) -> None:
    made = of_host(synthesize(**SIGN_IN), tmp_path).load_balancer
    assert made.arn == f"arn:aws:elasticloadbalancing:{REGION}:{ACCOUNT}:loadbalancer/app/proxy/0123456789abcdef"
    assert (made.issuer, made.client_id, made.groups_claim) == ("https://login.example.com", "mlflow", "groups")


def test_verified_certificates_identify(tmp_path: Path) -> None:
    made = of_host(synthesize(**CLIENT_CERTIFICATES), tmp_path)
    assert made.certificates.subject_header == "x-amzn-mtls-clientcert-subject"


def test_one_instance_counts_alone(tmp_path: Path) -> None:
    made = synthesize("tracking", "fargate", instances_min="1", instances_max="1")
    assert not made.resources("flaskapp", "AWS::ElastiCache::ServerlessCache")
    assert of_task(made).limits.storage is None


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("more", [{}, SIGN_IN, CLIENT_CERTIFICATES], ids=["plain", "sign-in", "client-certificates"])
def test_tasks_and_hosts_are_configured_alike(mode: str, more: dict[str, str], tmp_path: Path) -> None:
    assert of_task(synthesize(mode, "fargate", **more)) == of_host(synthesize(mode, "ec2", **more), tmp_path)


def test_load_balancer_outwaits_the_proxy_and_the_proxy_keeps_connections_longer(tmp_path: Path) -> None:
    synthesized = synthesize()
    made = of_host(synthesized, tmp_path)
    balancer = synthesized.one("flaskapp", "AWS::ElasticLoadBalancingV2::LoadBalancer")
    idle = {one["Key"]: one["Value"] for one in balancer["LoadBalancerAttributes"]}["idle_timeout.timeout_seconds"]
    assert made.upstream.first_byte_timeout < int(idle) < made.server.header_timeout


def test_storage_is_reached_by_the_proxy_alone_with_tls() -> None:
    cache = synthesize().one("flaskapp", "AWS::ElastiCache::ServerlessCache")
    assert cache["Engine"] == "valkey"
    assert "ValkeyGroup" in json.dumps(cache["SecurityGroupIds"])
    assert all("isolated" in json.dumps(subnet) for subnet in cache["SubnetIds"])
    assert cache["CacheUsageLimits"]["DataStorage"] == {"Maximum": 1, "Unit": "GB"}


def test_other_subnets_make_a_cache_of_another_name() -> None:
    """They cannot be changed, and while it is replaced there are two, which cannot have one name."""
    cache = "AWS::ElastiCache::ServerlessCache"
    names = [synthesize(**more).one("flaskapp", cache)["ServerlessCacheName"] for more in ({}, {"zones": "3"})]
    assert len(set(names)) == 2
    assert all(re.fullmatch(r"mlflow-proxy-tracking-[0-9a-f]{8}", name) for name in names)
    # AWS takes 40 signs.
    assert len(synthesize("serverless").one("flaskapp", cache)["ServerlessCacheName"]) <= 40
    assert synthesize(drain_seconds="90").one("flaskapp", cache)["ServerlessCacheName"] == names[0]


def test_keys_begin_empty_and_are_kept_in_prod() -> None:
    secret = synthesize().one("flaskapp", "AWS::SecretsManager::Secret")
    assert secret["SecretString"].strip() == ""
    assert "GenerateSecretString" not in secret
