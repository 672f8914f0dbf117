"""Stack 1, sagemaker-infra-networking: the VPC, its ways out, and a security group for each part. Both modes share it.

So nothing here may depend on mode or compute: the other mode's stacks use what this one exports.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import aws_cdk as cdk
from aws_cdk import aws_ec2 as ec2
from constructs import Construct

from infra.acknowledgements import acknowledge
from infra.retention import log_group
from infra.settings import Settings, SettingsError

PROXY_PORT = 8080
# ElastiCache Serverless: writes and reads, and reads from replicas.
VALKEY_PORTS = (6379, 6380)
_ENDPOINTS = {
    "SageMakerApi": "com.amazonaws.{region}.sagemaker.api",
    "SageMakerMlflow": "aws.sagemaker.{region}.experiments",
    "Sts": "com.amazonaws.{region}.sts",
    "Logs": "com.amazonaws.{region}.logs",
    "Ssm": "com.amazonaws.{region}.ssm",
    # And no ec2messages: from version 3.3.40 on, the agent takes ssmmessages in its place (Systems Manager guide,
    # "Improve the security of EC2 instances by using VPC endpoints").
    "SsmMessages": "com.amazonaws.{region}.ssmmessages",
    "SecretsManager": "com.amazonaws.{region}.secretsmanager",
    "EcrApi": "com.amazonaws.{region}.ecr.api",
    "EcrDocker": "com.amazonaws.{region}.ecr.dkr",
}
# Hosts tell CloudFormation here that they are ready; with a NAT gateway they need no endpoint for that.
_CLOSED_ENDPOINTS = {"CloudFormation": "com.amazonaws.{region}.cloudformation"}
# What load balancers and Valkey take at the least, and what a new VPC has at the most.
_LEAST_ZONES = 2
_MOST_ZONES = 3
Subnets = tuple[ec2.ISubnet, ...]


def _one_per_zone(subnets: Iterable[ec2.ISubnet]) -> dict[str, ec2.ISubnet]:
    """The first of each zone."""
    found: dict[str, ec2.ISubnet] = {}
    for subnet in subnets:
        found.setdefault(subnet.availability_zone, subnet)
    return found


def _are_made_up(subnets: Iterable[str]) -> bool:
    """As CDK does for its first pass."""
    return all(re.fullmatch(r"[ps]-\d+", name) is not None for name in subnets)


def _in_zones(subnets: Mapping[str, ec2.ISubnet], zones: Iterable[str]) -> Subnets:
    return tuple(subnets[zone] for zone in zones if zone in subnets)


@dataclass(frozen=True)
class Network:
    """What other stacks get: the VPC, the subnets of each part, and its security group."""

    vpc: ec2.IVpc
    load_balancer_subnets: Subnets
    proxy_subnets: Subnets
    data_subnets: Subnets
    load_balancer: ec2.ISecurityGroup
    proxy: ec2.ISecurityGroup
    valkey: ec2.ISecurityGroup
    studio: ec2.ISecurityGroup

    @property
    def load_balancer_cidrs(self) -> tuple[str, ...]:
        """The networks that the load balancer's requests come from."""
        return tuple(subnet.ipv4_cidr_block for subnet in self.load_balancer_subnets)


class NetworkingStack(cdk.Stack):
    """VPC, endpoints, flow logs, security groups."""

    def __init__(self, scope: Construct, id: str, settings: Settings, **options: Any) -> None:
        super().__init__(scope, id, **options)
        self._settings = settings
        vpc = self._existing_vpc(settings.vpc_id) if settings.vpc_id else self._new_vpc()
        self._groups(vpc)
        public, private, data, inner = self._subnets(vpc)
        self.network = Network(
            vpc=vpc,
            load_balancer_subnets=public if settings.internet_facing else inner,
            proxy_subnets=private,
            data_subnets=data,
            load_balancer=self._load_balancer,
            proxy=self._proxy,
            valkey=self._valkey,
            studio=self._studio,
        )
        if settings.has_endpoints:
            self._endpoints(vpc, private)
        self._export(vpc)

    @property
    def availability_zones(self) -> list[str]:
        """Those of the settings, or the first that AWS names, known when deployed: so synthesis asks AWS nothing."""
        return self._settings.zone_names or [
            cdk.Fn.select(index, cdk.Fn.get_azs()) for index in range(self._settings.zones)
        ]

    def _new_vpc(self) -> ec2.Vpc:
        settings = self._settings
        private = ec2.SubnetType.PRIVATE_ISOLATED if settings.is_closed else ec2.SubnetType.PRIVATE_WITH_EGRESS
        vpc = ec2.Vpc(
            self,
            "Vpc",
            ip_addresses=ec2.IpAddresses.cidr(settings.vpc_cidr),
            max_azs=settings.zones,
            # Room for a third zone: subnets keep their addresses when it comes, as these cannot be changed.
            reserved_azs=_MOST_ZONES - settings.zones,
            nat_gateways=settings.nat_gateway_count,
            subnet_configuration=[
                ec2.SubnetConfiguration(
                    name="public", subnet_type=ec2.SubnetType.PUBLIC, map_public_ip_on_launch=False
                ),
                ec2.SubnetConfiguration(name="private", subnet_type=private),
                ec2.SubnetConfiguration(name="isolated", subnet_type=ec2.SubnetType.PRIVATE_ISOLATED),
                # The last, since subnets keep their addresses. The proxy trusts what comes from here, so nothing else
                # may be in it; and there is a way out, for the load balancer asks the identity provider.
                ec2.SubnetConfiguration(name="load-balancer", subnet_type=private),
            ],
            gateway_endpoints={"S3": ec2.GatewayVpcEndpointOptions(service=ec2.GatewayVpcEndpointAwsService.S3)},
        )
        vpc.add_flow_log(
            "FlowLog",
            destination=ec2.FlowLogDestination.to_cloud_watch_logs(log_group(self, "FlowLogs", settings)),
            traffic_type=ec2.FlowLogTrafficType.ALL,
        )
        return vpc

    def _existing_vpc(self, vpc_id: str) -> ec2.IVpc:
        return ec2.Vpc.from_lookup(self, "Vpc", vpc_id=vpc_id)

    def _subnets(self, vpc: ec2.IVpc) -> tuple[Subnets, Subnets, Subnets, Subnets]:
        """Public, private, isolated ones, and those of an internal load balancer; of each kind in different zones."""
        if self._settings.vpc_id is None:
            names = ("public", "private", "isolated", "load-balancer")
            groups = [vpc.select_subnets(subnet_group_name=name) for name in names]
            public, private, isolated, inner = (tuple(group.subnets) for group in groups)
            return public, private, isolated, inner
        public, private, data = self._existing_subnets(vpc)
        return public, private, data, self._named_subnets(vpc) or private

    def _named_subnets(self, vpc: ec2.IVpc) -> Subnets:
        """Those that load_balancer_subnets names. Raises SettingsError."""
        there = {subnet.subnet_id: subnet for subnet in (*vpc.private_subnets, *vpc.isolated_subnets)}
        if not there or _are_made_up(there):  # in the first pass, before CDK has looked the VPC up
            return ()
        wanted = self._settings.load_balancer_subnets
        problems = [
            f"load_balancer_subnets: {name} is no private subnet of {self._settings.vpc_id}; it has {', '.join(there)}"
            for name in wanted
            if name not in there
        ]
        if problems:
            raise SettingsError(problems)
        return tuple(there[name] for name in wanted)

    def _existing_subnets(self, vpc: ec2.IVpc) -> tuple[Subnets, Subnets, Subnets]:
        """Those of an existing VPC. AWS takes one of a zone for load balancer, endpoints and Valkey, in two or more.

        Where there are not enough isolated ones, the private ones do. Raises SettingsError.
        """
        public, private, isolated = map(_one_per_zone, (vpc.public_subnets, vpc.private_subnets, vpc.isolated_subnets))
        if not private:
            raise self._refused("no private subnets with a way out, in which the proxy runs")
        if self._settings.internet_facing:
            if not public:
                raise self._refused("no public subnets, which internet_facing takes", or_else="internet_facing=false, ")
            # The load balancer sends nothing to zones in which it is not.
            private = {zone: subnet for zone, subnet in private.items() if zone in public}
            public = {zone: subnet for zone, subnet in public.items() if zone in private}
        if len(private) < _LEAST_ZONES:
            both = "public and private" if self._settings.internet_facing else "private"
            raise self._refused(f"{both} subnets in fewer than {_LEAST_ZONES} zones")
        zones = sorted(private)[:_MOST_ZONES]
        data = {zone: subnet for zone, subnet in isolated.items() if zone in zones}
        if len(data) < _LEAST_ZONES:
            data = private
        return _in_zones(public, zones), _in_zones(private, zones), _in_zones(data, zones)

    def _refused(self, what: str, or_else: str = "") -> SettingsError:
        return SettingsError(
            [
                f"vpc_id: {self._settings.vpc_id} has {what}; write {or_else}another vpc_id, or none for a new VPC; or "
                "make such subnets in two zones or more, and delete infra/cdk.context.json, which remembers the VPC"
            ]
        )

    def _group(self, vpc: ec2.IVpc, id: str, description: str, *, outbound: bool) -> ec2.SecurityGroup:
        return ec2.SecurityGroup(
            self, id, vpc=vpc, description=description, allow_all_outbound=outbound, disable_inline_rules=True
        )

    def _groups(self, vpc: ec2.IVpc) -> None:
        """One group per part; each lets in just the part before it."""
        self._load_balancer = self._group(vpc, "LoadBalancerGroup", "Callers to the load balancer", outbound=False)
        self._proxy = self._group(vpc, "ProxyGroup", "Load balancer to proxy", outbound=True)
        self._valkey = self._group(vpc, "ValkeyGroup", "Proxy to Valkey", outbound=False)
        self._studio = self._group(vpc, "StudioGroup", "SageMaker Studio", outbound=True)
        for cidr in self._settings.allowed_cidrs or [vpc.vpc_cidr_block]:
            for port, why in ((443, "HTTPS"), (80, "redirected to HTTPS")):
                self._load_balancer.add_ingress_rule(ec2.Peer.ipv4(cidr), ec2.Port.tcp(port), f"{why} of callers")
        self._load_balancer.add_egress_rule(self._proxy, ec2.Port.tcp(PROXY_PORT), "requests and health checks")
        # Sign-in and OIDC tokens: the load balancer calls the provider itself.
        if self._settings.signs_in:
            self._load_balancer.add_egress_rule(ec2.Peer.any_ipv4(), ec2.Port.tcp(443), "identity provider")
        self._proxy.add_ingress_rule(self._load_balancer, ec2.Port.tcp(PROXY_PORT), "requests and health checks")
        for port in VALKEY_PORTS:
            self._valkey.add_ingress_rule(self._proxy, ec2.Port.tcp(port), "shared limits")
        self._studio.add_ingress_rule(self._studio, ec2.Port.all_traffic(), "apps and kernels of one domain")
        acknowledge(
            self._load_balancer,
            "With internet_facing callers may come from anywhere if allowed_cidrs says so: the proxy identifies each.",
            "EC23",
        )

    def _endpoints(self, vpc: ec2.IVpc, subnets: Subnets) -> None:
        group = self._group(vpc, "EndpointGroup", "VPC to AWS services", outbound=False)
        group.add_ingress_rule(ec2.Peer.ipv4(vpc.vpc_cidr_block), ec2.Port.tcp(443), "AWS APIs")
        acknowledge(group, "The rule names the VPC's own network, which cdk-nag cannot read from a token.", "EC23")
        services = {**_ENDPOINTS, **(_CLOSED_ENDPOINTS if self._settings.is_closed else {})}
        for name, service in services.items():
            ec2.InterfaceVpcEndpoint(
                self,
                f"{name}Endpoint",
                vpc=vpc,
                service=ec2.InterfaceVpcEndpointService(service.format(region=self.region), 443),
                subnets=ec2.SubnetSelection(subnets=list(subnets)),
                security_groups=[group],
                private_dns_enabled=True,
                open=False,
            )

    def _export(self, vpc: ec2.IVpc) -> None:
        """Export all that any mode or compute could use, in each synthesis: an export in use cannot go away."""
        for group in (self._load_balancer, self._proxy, self._valkey, self._studio):
            self.export_value(group.security_group_id)
        if self._settings.vpc_id is None:
            self.export_value(vpc.vpc_id)
            for subnet in (*vpc.public_subnets, *vpc.private_subnets, *vpc.isolated_subnets):
                self.export_value(subnet.subnet_id)
