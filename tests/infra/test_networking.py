"""Stack 1: VPC, ways out, endpoints, flow logs, security groups."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from aws_cdk import App, Environment
from aws_cdk.assertions import Match, Template
from aws_cdk.aws_ec2 import ISubnet
from infra.app import build
from infra.networking import NetworkingStack
from infra.settings import SettingsError, load
from tests.infra.variants import ACCOUNT, CONTEXT, REGION, resolve, settings, synthesize


@pytest.mark.parametrize(
    ("chosen", "zones", "gateways"),
    [({}, 2, 1), ({"zones": "3", "nat_gateways": "per-zone"}, 3, 3), ({"nat_gateways": "0"}, 2, 0)],
    ids=["dev", "a gateway per zone", "closed"],
)
def test_subnets_and_gateways(chosen: dict[str, str], zones: int, gateways: int) -> None:
    template = synthesize(**chosen).template("networking")
    template.resource_count_is("AWS::EC2::Subnet", zones * 4)
    template.resource_count_is("AWS::EC2::NatGateway", gateways)
    for kind in ("public", "private", "isolated", "load-balancer"):
        found = template.find_resources(
            "AWS::EC2::Subnet",
            {"Properties": {"Tags": Match.array_with([{"Key": "aws-cdk:subnet-name", "Value": kind}])}},
        )
        assert len(found) == zones


def test_subnets_are_in_different_zones_known_when_deployed() -> None:
    subnets = synthesize().resources("networking", "AWS::EC2::Subnet")
    zones = {json.dumps(subnet["Properties"]["AvailabilityZone"]) for subnet in subnets.values()}
    assert zones == {json.dumps({"Fn::Select": [index, {"Fn::GetAZs": ""}]}) for index in range(2)}


def test_a_third_zone_leaves_the_subnets_of_the_others_as_they_are() -> None:
    """What they have cannot be changed, and other subnets in their place would overlap with them."""
    two, three = (synthesize(zones=zones).resources("networking", "AWS::EC2::Subnet") for zones in ("2", "3"))
    assert len(two) == 8
    assert two.items() <= three.items()
    assert len({one["Properties"]["CidrBlock"] for one in three.values()}) == 12


def test_zones_can_be_named() -> None:
    subnets = synthesize(zone_names=f"{REGION}c,{REGION}a").resources("networking", "AWS::EC2::Subnet")
    assert {one["Properties"]["AvailabilityZone"] for one in subnets.values()} == {f"{REGION}c", f"{REGION}a"}


def test_nothing_gets_a_public_address_by_itself() -> None:
    for subnet in synthesize().resources("networking", "AWS::EC2::Subnet").values():
        assert subnet["Properties"]["MapPublicIpOnLaunch"] is False


ENDPOINTS = {
    f"com.amazonaws.{REGION}.{name}"
    for name in (
        "sagemaker.api",
        "sts",
        "logs",
        "ssm",
        "ssmmessages",
        "secretsmanager",
        "ecr.api",
        "ecr.dkr",
    )
} | {f"aws.sagemaker.{REGION}.experiments"}


def _interface_endpoints(**chosen: str) -> set[str]:
    found = synthesize(**chosen).resources("networking", "AWS::EC2::VPCEndpoint").values()
    interfaces = [one["Properties"] for one in found if one["Properties"]["VpcEndpointType"] == "Interface"]
    assert all(one["PrivateDnsEnabled"] for one in interfaces)
    return {one["ServiceName"] for one in interfaces}


def test_endpoints_of_all_services_that_the_proxy_calls() -> None:
    assert _interface_endpoints() == ENDPOINTS


def test_closed_network_has_the_endpoint_that_hosts_report_to() -> None:
    assert _interface_endpoints(nat_gateways="0") == ENDPOINTS | {f"com.amazonaws.{REGION}.cloudformation"}


def test_s3_has_a_gateway_endpoint_on_all_route_tables() -> None:
    template = synthesize(endpoints="none").template("networking")
    template.resource_count_is("AWS::EC2::VPCEndpoint", 1)
    made = synthesize(endpoints="none").one("networking", "AWS::EC2::VPCEndpoint")
    assert made["VpcEndpointType"] == "Gateway"
    assert made["ServiceName"] == {"Fn::Join": ["", ["com.amazonaws.", {"Ref": "AWS::Region"}, ".s3"]]}
    assert len(made["RouteTableIds"]) == 8


def test_flow_logs_of_all_traffic_are_kept_for_a_time() -> None:
    template = synthesize().template("networking")
    template.has_resource_properties("AWS::EC2::FlowLog", {"TrafficType": "ALL", "ResourceType": "VPC"})
    template.has_resource_properties("AWS::Logs::LogGroup", {"RetentionInDays": 14})


def _rules(**chosen: str) -> set[tuple[str, str, int]]:
    """Who may reach which group on which port."""
    made = synthesize(**chosen)
    rules = set()
    groups = {
        name: group["Properties"] for name, group in made.resources("networking", "AWS::EC2::SecurityGroup").items()
    }
    short = {name: name.split("Group")[0] for name in groups}
    for rule in made.resources("networking", "AWS::EC2::SecurityGroupIngress").values():
        properties = rule["Properties"]
        source = properties.get("CidrIp")
        if source is None:
            source = short[properties["SourceSecurityGroupId"]["Fn::GetAtt"][0]]
        elif isinstance(source, dict):
            source = "vpc"
        rules.add((source, short[properties["GroupId"]["Fn::GetAtt"][0]], properties.get("FromPort", -1)))
    for name, group in groups.items():
        assert "SecurityGroupIngress" not in group, name
    return rules


def test_each_group_lets_in_just_the_part_before_it() -> None:
    assert _rules() == {
        ("vpc", "LoadBalancer", 443),
        ("vpc", "LoadBalancer", 80),
        ("LoadBalancer", "Proxy", 8080),
        ("Proxy", "Valkey", 6379),
        ("Proxy", "Valkey", 6380),
        ("Studio", "Studio", -1),
        ("vpc", "Endpoint", 443),
    }


def test_callers_networks_are_those_that_are_named() -> None:
    rules = _rules(allowed_cidrs="10.0.0.0/8", endpoints="none")
    assert {rule for rule in rules if rule[1] == "LoadBalancer"} == {
        ("10.0.0.0/8", "LoadBalancer", 443),
        ("10.0.0.0/8", "LoadBalancer", 80),
    }


def test_load_balancer_reaches_the_proxy_alone() -> None:
    egress = synthesize().resources("networking", "AWS::EC2::SecurityGroupEgress").values()
    of_balancer = [
        rule["Properties"]
        for rule in egress
        if rule["Properties"]["GroupId"]["Fn::GetAtt"][0].startswith("LoadBalancer")
    ]
    assert [rule.get("FromPort") for rule in of_balancer] == [8080]


VPC = "vpc-0123456789abcdef0"
PUBLIC = {"internet_facing": "true", "allowed_cidrs": "192.0.2.0/24"}


def looked_up(*groups: tuple[str, str]) -> dict[str, object]:
    """What CDK finds of an existing VPC: groups of subnets, each with its kind, and the letters of its zones."""
    key = f"vpc-provider:account={ACCOUNT}:filter.vpc-id={VPC}:region={REGION}:returnAsymmetricSubnets=true"
    subnets = [
        {
            "name": f"{kind}{index}",
            "type": kind,
            "subnets": [
                {
                    "subnetId": f"subnet-{kind}{index}{zone}",
                    "cidr": f"10.9.{index}{number}.0/24",
                    "availabilityZone": f"{REGION}{zone}",
                    "routeTableId": f"rtb-{kind}{index}{zone}",
                }
                for number, zone in enumerate(zones)
            ],
        }
        for index, (kind, zones) in enumerate(groups, 1)
    ]
    found = {"vpcId": VPC, "vpcCidrBlock": "10.9.0.0/16", "ownerAccountId": ACCOUNT,
             "availabilityZones": [], "subnetGroups": subnets}  # fmt: skip
    return {key: found}


def in_existing_vpc(*groups: tuple[str, str], **more: str) -> NetworkingStack:
    app = App(context=CONTEXT | looked_up(*groups))
    chosen = load(settings(vpc_id=VPC, **more), {})
    return NetworkingStack(app, "n", chosen, env=Environment(account=ACCOUNT, region=REGION))


def ids(subnets: Sequence[ISubnet]) -> list[str]:
    return [subnet.subnet_id.removeprefix("subnet-") for subnet in subnets]


def test_existing_vpc_with_several_subnets_in_a_zone_lends_one_of_each() -> None:
    """AWS refuses a load balancer, an endpoint and Valkey two subnets of a zone."""
    stack = in_existing_vpc(
        *[("Public", "ab")] * 2, *[("Private", "ab")] * 2, ("Isolated", "ab"), ("Isolated", "ba"),
        endpoints="all", **PUBLIC,
    )  # fmt: skip
    assert ids(stack.network.load_balancer_subnets) == ["Public1a", "Public1b"]
    assert ids(stack.network.proxy_subnets) == ["Private3a", "Private3b"]
    assert ids(stack.network.data_subnets) == ["Isolated5a", "Isolated5b"]
    endpoints = Template.from_stack(stack).find_resources("AWS::EC2::VPCEndpoint").values()
    assert {tuple(one["Properties"]["SubnetIds"]) for one in endpoints} == {("subnet-Private3a", "subnet-Private3b")}


def test_public_load_balancer_and_proxy_are_in_the_same_zones() -> None:
    """A load balancer sends nothing to zones in which it is not."""
    stack = in_existing_vpc(("Public", "bcd"), ("Private", "abcd"), **PUBLIC)
    assert ids(stack.network.load_balancer_subnets) == ["Public1b", "Public1c", "Public1d"]
    assert ids(stack.network.proxy_subnets) == ["Private2b", "Private2c", "Private2d"]


def test_an_existing_vpc_may_have_subnets_for_the_load_balancer_alone() -> None:
    """So that nobody else's word counts for the proxy (server.trusted_proxies)."""
    named = {"load_balancer_subnets": "subnet-Isolated2a,subnet-Isolated2b"}
    stack = in_existing_vpc(("Private", "ab"), ("Isolated", "ab"), **named)
    assert ids(stack.network.load_balancer_subnets) == ["Isolated2a", "Isolated2b"]
    assert ids(stack.network.proxy_subnets) == ["Private1a", "Private1b"]
    with pytest.raises(SettingsError, match="subnet-other is no private subnet of"):
        in_existing_vpc(("Private", "ab"), load_balancer_subnets="subnet-Private1a,subnet-other")


@pytest.mark.parametrize("isolated", ["", "a"])
def test_private_subnets_do_where_isolated_ones_are_too_few(isolated: str) -> None:
    stack = in_existing_vpc(("Private", "abcd"), ("Isolated", isolated))
    assert ids(stack.network.data_subnets) == ["Private1a", "Private1b", "Private1c"]


@pytest.mark.parametrize(
    ("groups", "more", "words"),
    [
        ([("Public", "ab"), ("Isolated", "ab")], {}, "has no private subnets with a way out"),
        ([("Private", "ab")], PUBLIC, "has no public subnets, which internet_facing takes; write internet_facing="),
        ([("Private", "a"), ("Private", "a")], {}, "has private subnets in fewer than 2 zones"),
        ([("Public", "ab"), ("Private", "bc")], PUBLIC, "has public and private subnets in fewer than 2 zones"),
    ],
)  # fmt: skip
def test_existing_vpc_that_cannot_be_used_is_refused_in_words(
    groups: list[tuple[str, str]], more: dict[str, str], words: str
) -> None:
    with pytest.raises(SettingsError) as caught:
        in_existing_vpc(*groups, **more)
    (problem,) = caught.value.problems
    assert problem.startswith(f"vpc_id: {VPC} {words}")
    assert "delete infra/cdk.context.json" in problem


def test_made_up_vpc_of_the_first_pass_is_not_refused(tmp_path: Path) -> None:
    """CDK runs the application before it looks the VPC up; what it makes up must not end that."""
    app = build(CONTEXT | settings(vpc_id=VPC, **PUBLIC), {}, outdir=str(tmp_path))
    app.synth()
    missing = json.loads((tmp_path / "manifest.json").read_text())["missing"]
    assert [one["provider"] for one in missing] == ["vpc-provider"]


def test_existing_vpc_brings_its_subnets_and_gets_no_endpoints() -> None:
    stack = in_existing_vpc(("Public", "ab"), ("Private", "ab"), ("Isolated", "ab"))
    template = Template.from_stack(stack)
    template.resource_count_is("AWS::EC2::VPC", 0)
    template.resource_count_is("AWS::EC2::VPCEndpoint", 0)
    assert stack.network.load_balancer_cidrs == ("10.9.20.0/24", "10.9.21.0/24")
    template.has_resource_properties("AWS::EC2::SecurityGroupIngress", {"CidrIp": "10.9.0.0/16", "FromPort": 443})


@pytest.mark.parametrize("chosen", [{}, {"nat_gateways": "0"}, {"stack_env": "dev", "zones": "3"}])
def test_shared_stacks_do_not_depend_on_mode_or_compute(chosen: dict[str, str]) -> None:
    modes = ["tracking"] if chosen.get("nat_gateways") == "0" else ["tracking", "serverless"]
    shared = {
        json.dumps([made.templates["networking"], made.templates["domain"]], sort_keys=True)
        for made in (synthesize(mode, compute, **chosen) for mode in modes for compute in ("ec2", "fargate"))
    }
    assert len(shared) == 1


def test_cidrs_of_the_load_balancers_subnets_are_known() -> None:
    made = synthesize()
    cidrs = {
        subnet["Properties"]["CidrBlock"]
        for subnet in made.resources("networking", "AWS::EC2::Subnet").values()
        if {"Key": "aws-cdk:subnet-name", "Value": "load-balancer"} in subnet["Properties"]["Tags"]
    }
    template = made.one("flaskapp", "AWS::EC2::LaunchTemplate")
    user_data = resolve(template["LaunchTemplateData"]["UserData"])
    assert all(f'"{cidr}"' in user_data for cidr in cidrs)
