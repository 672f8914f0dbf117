"""Stack 1: VPC, ways out, endpoints, flow logs, security groups."""

from __future__ import annotations

import json

import pytest
from aws_cdk import App, Environment
from aws_cdk.assertions import Match, Template
from infra.networking import NetworkingStack
from infra.settings import load
from tests.infra.variants import ACCOUNT, CONTEXT, REGION, resolve, settings, synthesize


@pytest.mark.parametrize(
    ("chosen", "zones", "gateways"),
    [({}, 2, 1), ({"zones": "3", "nat_gateways": "per-zone"}, 3, 3), ({"nat_gateways": "0"}, 2, 0)],
    ids=["dev", "a gateway per zone", "closed"],
)
def test_subnets_and_gateways(chosen: dict[str, str], zones: int, gateways: int) -> None:
    template = synthesize(**chosen).template("networking")
    template.resource_count_is("AWS::EC2::Subnet", zones * 3)
    template.resource_count_is("AWS::EC2::NatGateway", gateways)
    for kind in ("public", "private", "isolated"):
        found = template.find_resources(
            "AWS::EC2::Subnet",
            {"Properties": {"Tags": Match.array_with([{"Key": "aws-cdk:subnet-name", "Value": kind}])}},
        )
        assert len(found) == zones


def test_subnets_are_in_different_zones_known_when_deployed() -> None:
    subnets = synthesize().resources("networking", "AWS::EC2::Subnet")
    zones = {json.dumps(subnet["Properties"]["AvailabilityZone"]) for subnet in subnets.values()}
    assert zones == {json.dumps({"Fn::Select": [index, {"Fn::GetAZs": ""}]}) for index in range(2)}


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
        "ec2messages",
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
    assert len(made["RouteTableIds"]) == 6


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


def test_existing_vpc_brings_its_subnets_and_gets_no_endpoints() -> None:
    context = settings(vpc_id="vpc-0123456789abcdef0")
    filters = "filter.vpc-id=vpc-0123456789abcdef0"
    key = f"vpc-provider:account={ACCOUNT}:{filters}:region={REGION}:returnAsymmetricSubnets=true"
    groups = [
        {
            "name": kind,
            "type": kind,
            "subnets": [
                {
                    "subnetId": f"subnet-{kind}{zone}",
                    "cidr": f"10.9.{index}{number}.0/24",
                    "availabilityZone": f"{REGION}{zone}",
                    "routeTableId": f"rtb-{kind}{zone}",
                }
                for number, zone in enumerate("ab")
            ],
        }
        for index, kind in enumerate(("Public", "Private", "Isolated"), 1)
    ]
    found = {"vpcId": "vpc-0123456789abcdef0", "vpcCidrBlock": "10.9.0.0/16", "ownerAccountId": ACCOUNT,
             "availabilityZones": [], "subnetGroups": groups}  # fmt: skip
    app = App(context=CONTEXT | {key: found})
    stack = NetworkingStack(app, "n", load(context, {}), env=Environment(account=ACCOUNT, region=REGION))
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
        if {"Key": "aws-cdk:subnet-name", "Value": "private"} in subnet["Properties"]["Tags"]
    }
    template = made.one("flaskapp", "AWS::EC2::LaunchTemplate")
    user_data = resolve(template["LaunchTemplateData"]["UserData"])
    assert all(f'"{cidr}"' in user_data for cidr in cidrs)
