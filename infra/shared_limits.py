"""Valkey, in which instances count requests together: ElastiCache Serverless, reached with TLS by the proxy alone.

There is no password, on purpose: it would have to stand in the proxy's configuration, and so in a launch template that
more people can read than can reach the port. The line is the security group, which lets in the proxy's hosts alone;
what is kept there are counters of some minutes, nothing of MLflow's. While it is away, instances count alone.
"""

from __future__ import annotations

import json
from hashlib import sha256

import aws_cdk as cdk
from aws_cdk import aws_elasticache as elasticache
from constructs import Construct

from infra.networking import Network
from infra.settings import Settings

# Counters of a few minutes: far below the least that can be bought, so these only bound the bill.
_GIGABYTES = 1
_UNITS_PER_SECOND = 5000


class SharedLimits(Construct):
    """`url` is what the proxy's `limits.storage` takes. It keeps counters of minutes, so nothing is backed up."""

    def __init__(self, scope: Construct, id: str, settings: Settings, network: Network) -> None:
        super().__init__(scope, id)
        subnets = [subnet.subnet_id for subnet in network.data_subnets]
        cache = elasticache.CfnServerlessCache(
            self,
            "Cache",
            engine="valkey",
            major_engine_version="8",
            serverless_cache_name=f"mlflow-proxy-{settings.mlflow_type}-{self._digest(subnets)}",
            description="Shared limits of the MLflow proxy",
            subnet_ids=subnets,
            security_group_ids=[network.valkey.security_group_id],
            cache_usage_limits=elasticache.CfnServerlessCache.CacheUsageLimitsProperty(
                data_storage=elasticache.CfnServerlessCache.DataStorageProperty(unit="GB", maximum=_GIGABYTES),
                ecpu_per_second=elasticache.CfnServerlessCache.ECPUPerSecondProperty(maximum=_UNITS_PER_SECOND),
            ),
        )
        self.url = f"rediss://{cache.attr_endpoint_address}:{cache.attr_endpoint_port}/0"

    def _digest(self, subnets: list[str]) -> str:
        """Of what cannot be changed in a cache: other subnets take another one, and so another name."""
        return sha256(json.dumps(cdk.Stack.of(self).resolve(subnets)).encode()).hexdigest()[:8]
