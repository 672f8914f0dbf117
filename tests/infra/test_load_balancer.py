"""The load balancer: TLS, redirects, sign-in, client certificates, health, firewall, names."""

from __future__ import annotations

import fnmatch
import json
from typing import Any

import pytest
from aws_cdk.assertions import Match
from infra.settings import load
from tests.infra.variants import CLIENT_CERTIFICATES, COMPUTES, PROD, SIGN_IN, TLS, Synthesized, settings, synthesize

LISTENER = "AWS::ElasticLoadBalancingV2::Listener"


def listener(made: Synthesized, port: int) -> dict[str, Any]:
    found: dict[str, Any]
    (found,) = (
        one["Properties"] for one in made.resources("flaskapp", LISTENER).values() if one["Properties"]["Port"] == port
    )
    return found


def attributes(made: Synthesized, type_: str) -> dict[str, str]:
    name = "LoadBalancerAttributes" if type_.endswith("::LoadBalancer") else "TargetGroupAttributes"
    return {one["Key"]: one["Value"] for one in made.one("flaskapp", type_)[name]}


def test_it_is_internal_unless_asked_otherwise() -> None:
    type_ = "AWS::ElasticLoadBalancingV2::LoadBalancer"
    internal = synthesize().one("flaskapp", type_)
    assert internal["Scheme"] == "internal"
    assert "loadbalancer" in json.dumps(internal["Subnets"])
    facing = synthesize(internet_facing="true", allowed_cidrs="192.0.2.0/24").one("flaskapp", type_)
    assert facing["Scheme"] == "internet-facing"
    assert "public" in json.dumps(facing["Subnets"])


@pytest.mark.parametrize("tls", TLS)
def test_http_only_redirects(tls: str) -> None:
    (action,) = listener(synthesize(**TLS[tls]), 80)["DefaultActions"]
    assert action["Type"] == "redirect"
    assert action["RedirectConfig"] == {"Protocol": "HTTPS", "Port": "443", "StatusCode": "HTTP_301"}


@pytest.mark.parametrize("tls", TLS)
def test_https_takes_a_tls_1_3_policy(tls: str) -> None:
    https = listener(synthesize(**TLS[tls]), 443)
    assert https["Protocol"] == "HTTPS"
    assert https["SslPolicy"].startswith("ELBSecurityPolicy-TLS13-1-2-Res")


def test_certificate_is_the_given_one() -> None:
    assert listener(synthesize(**TLS["given"]), 443)["Certificates"] == [
        {"CertificateArn": TLS["given"]["certificate_arn"]}
    ]


def test_certificate_is_requested_for_a_hosted_zone_with_a_name_in_it() -> None:
    template = synthesize(**TLS["requested"]).template("flaskapp")
    template.has_resource_properties(
        "AWS::CertificateManager::Certificate",
        {"DomainName": "mlflow.example.com", "ValidationMethod": "DNS"},
    )
    template.has_resource_properties(
        "AWS::Route53::RecordSet",
        {
            "Name": "mlflow.example.com.",
            "Type": "A",
            "HostedZoneId": "Z0123456789ABCDEFGHIJ",
            "AliasTarget": Match.any_value(),
        },
    )


def test_dev_without_a_domain_gets_a_certificate_for_the_load_balancers_own_name() -> None:
    made = synthesize()
    certificate = made.one("flaskapp", "Custom::SelfSignedCertificate")
    (balancer,) = made.resources("flaskapp", "AWS::ElasticLoadBalancingV2::LoadBalancer")
    assert certificate["Name"] == {"Fn::GetAtt": [balancer, "DNSName"]}
    (logical_id,) = made.resources("flaskapp", "Custom::SelfSignedCertificate")
    assert listener(made, 443)["Certificates"] == [{"CertificateArn": {"Ref": logical_id}}]
    assert made.templates["flaskapp"]["Outputs"]["CertificateCommand"]


@pytest.mark.parametrize("tls", ["given", "requested"])
def test_with_a_domain_nothing_makes_certificates(tls: str) -> None:
    made = synthesize(**TLS[tls])
    assert not made.resources("flaskapp", "Custom::SelfSignedCertificate")
    assert not made.resources("flaskapp", "AWS::Lambda::Function")
    assert "CertificateCommand" not in made.templates["flaskapp"]["Outputs"]


def test_sign_in_is_for_browsers_pages_and_callers_without_a_session_get_the_proxys_401() -> None:
    made = synthesize(**SIGN_IN)
    default, forward = listener(made, 443)["DefaultActions"]
    assert default["Type"] == "authenticate-oidc"
    assert default["AuthenticateOidcConfig"]["OnUnauthenticatedRequest"] == "allow"
    assert forward["Type"] == "forward"
    rules = sorted(
        (one["Properties"] for one in made.resources("flaskapp", "AWS::ElasticLoadBalancingV2::ListenerRule").values()),
        key=lambda rule: rule["Priority"],
    )
    *with_credentials, browsers = rules
    assert [rule["Conditions"][0]["HttpHeaderConfig"]["HttpHeaderName"] for rule in with_credentials] == [
        "authorization",
        "x-api-key",
    ]
    assert all([action["Type"] for action in rule["Actions"]] == ["forward"] for rule in with_credentials)
    assert [action["Type"] for action in browsers["Actions"]] == ["authenticate-oidc", "forward"]
    assert browsers["Actions"][0]["AuthenticateOidcConfig"]["OnUnauthenticatedRequest"] == "authenticate"
    conditions = {one["Field"]: one for one in browsers["Conditions"]}
    assert conditions["path-pattern"]["PathPatternConfig"]["Values"] == ["/", "/t/*", "/-/*"]
    assert conditions["http-header"]["HttpHeaderConfig"] == {"HttpHeaderName": "accept", "Values": ["*text/html*"]}


def _passes(condition: dict[str, Any], path: str, headers: dict[str, str]) -> bool:
    """Whether a request meets a condition of a listener's rule (ELB guide, "Condition types")."""
    if condition["Field"] == "path-pattern":
        return any(fnmatch.fnmatchcase(path, pattern) for pattern in condition["PathPatternConfig"]["Values"])
    header = condition["HttpHeaderConfig"]
    value = headers.get(header["HttpHeaderName"])
    return value is not None and any(fnmatch.fnmatch(value, pattern) for pattern in header["Values"])


def without_session(made: Synthesized, path: str, headers: dict[str, str]) -> str:
    """What becomes of a request without a session: it goes to the `proxy`, or is sent away to `sign in`."""
    rules = [
        one["Properties"] for one in made.resources("flaskapp", "AWS::ElasticLoadBalancingV2::ListenerRule").values()
    ]
    for rule in sorted(rules, key=lambda rule: rule["Priority"]):
        if all(_passes(condition, path, headers) for condition in rule["Conditions"]):
            actions = rule["Actions"]
            break
    else:
        actions = listener(made, 443)["DefaultActions"]
    for action in sorted(actions, key=lambda action: action.get("Order", 0)):
        unauthenticated = action.get("AuthenticateOidcConfig", {}).get("OnUnauthenticatedRequest")
        assert unauthenticated in (None, "allow", "authenticate"), "the load balancer never answers with its own 401"
        if unauthenticated == "authenticate":
            return "sign in"
    assert action["Type"] == "forward"
    return "proxy"


BROWSER = {"accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
CALL = "/api/2.0/mlflow/experiments/get"


@pytest.mark.parametrize(
    ("path", "headers", "to"),
    [
        ("/", BROWSER, "sign in"),
        ("/t/team/", BROWSER, "sign in"),
        ("/-/portal", BROWSER, "sign in"),
        # What the page fetches: after its session ended it gets a 401 that it can show, not a page of somebody else.
        ("/ajax-api/2.0/mlflow/experiments/search", {"accept": "*/*"}, "proxy"),
        ("/t/team/static-files/main.js", {"accept": "*/*"}, "proxy"),
        (CALL, {}, "proxy"),
        (CALL, {"accept": "*/*"}, "proxy"),
        (f"/t/team{CALL}", {"accept": "*/*"}, "proxy"),
        (CALL, {"authorization": "Bearer mlp_x"}, "proxy"),
        ("/", BROWSER | {"authorization": "Basic eDp5"}, "proxy"),
        ("/", BROWSER | {"x-api-key": "mlp_x"}, "proxy"),
    ],
)
def test_api_callers_are_never_redirected(path: str, headers: dict[str, str], to: str) -> None:
    assert without_session(synthesize(**SIGN_IN), path, headers) == to
    assert without_session(synthesize(), path, headers) == "proxy", "without sign-in everything goes there"


def test_clients_secret_is_never_in_the_template() -> None:
    config = listener(synthesize(**SIGN_IN), 443)["DefaultActions"][0]["AuthenticateOidcConfig"]
    assert (
        config["ClientSecret"] == f"{{{{resolve:secretsmanager:{SIGN_IN['oidc_client_secret_arn']}:SecretString:::}}}}"
    )


def test_without_sign_in_there_are_no_rules() -> None:
    made = synthesize()
    assert not made.resources("flaskapp", "AWS::ElasticLoadBalancingV2::ListenerRule")
    assert [action["Type"] for action in listener(made, 443)["DefaultActions"]] == ["forward"]


def test_client_certificates_are_verified() -> None:
    made = synthesize(**CLIENT_CERTIFICATES)
    store = made.one("flaskapp", "AWS::ElasticLoadBalancingV2::TrustStore")
    assert store["CaCertificatesBundleS3Bucket"] == "company-cas"
    assert store["CaCertificatesBundleS3Key"] == "clients.pem"
    authentication = listener(made, 443)["MutualAuthentication"]
    assert authentication["Mode"] == "verify"
    assert "MutualAuthentication" not in listener(synthesize(), 443)


@pytest.mark.parametrize("compute", COMPUTES)
def test_health_not_readiness_decides_about_hosts(compute: str) -> None:
    made = synthesize("tracking", compute)
    group = made.one("flaskapp", "AWS::ElasticLoadBalancingV2::TargetGroup")
    assert group["HealthCheckPath"] == "/-/health"
    assert group["Matcher"] == {"HttpCode": "200"}
    assert (group["Protocol"], group["Port"]) == ("HTTP", 8080)
    assert group["TargetType"] == {"ec2": "instance", "fargate": "ip"}[compute]
    found = attributes(made, "AWS::ElasticLoadBalancingV2::TargetGroup")
    assert found["deregistration_delay.timeout_seconds"] == "60"
    assert found["load_balancing.algorithm.type"] == "least_outstanding_requests"


def test_access_logs_and_hardening() -> None:
    found = attributes(synthesize(), "AWS::ElasticLoadBalancingV2::LoadBalancer")
    assert found["access_logs.s3.enabled"] == "true"
    assert found["access_logs.s3.prefix"] == "load-balancer"
    assert found["routing.http.drop_invalid_header_fields.enabled"] == "true"
    assert found["routing.http.desync_mitigation_mode"] == "strictest"
    assert found["routing.http.preserve_host_header.enabled"] == "true"
    assert found["deletion_protection.enabled"] == "false"
    prod = attributes(synthesize(**PROD), "AWS::ElasticLoadBalancingV2::LoadBalancer")
    assert prod["deletion_protection.enabled"] == "true"


def test_load_balancer_may_write_its_logs() -> None:
    made = synthesize()
    policies = made.resources("mlflow", "AWS::S3::BucketPolicy").values()
    writers = [
        statement
        for policy in policies
        for statement in policy["Properties"]["PolicyDocument"]["Statement"]
        if "load-balancer" in json.dumps(statement)
    ]
    assert writers
    assert all("s3:PutObject" in json.dumps(statement["Action"]) for statement in writers)


def test_firewall_has_awss_rules_and_a_rate_per_address() -> None:
    made = synthesize(waf_rate="700")
    acl = made.one("flaskapp", "AWS::WAFv2::WebACL")
    assert acl["Scope"] == "REGIONAL"
    assert acl["DefaultAction"] == {"Allow": {}}
    rules = {rule["Name"]: rule for rule in acl["Rules"]}
    assert list(rules) == [
        "RatePerAddress",
        "AWSManagedRulesAmazonIpReputationList",
        "AWSManagedRulesCommonRuleSet",
        "AWSManagedRulesKnownBadInputsRuleSet",
    ]
    rate = rules["RatePerAddress"]["Statement"]["RateBasedStatement"]
    assert rate == {"AggregateKeyType": "IP", "Limit": 700, "EvaluationWindowSec": 300}
    assert rules["RatePerAddress"]["Action"] == {"Block": {}}
    made.template("flaskapp").resource_count_is("AWS::WAFv2::WebACLAssociation", 1)


def test_only_the_size_of_bodies_is_counted_not_blocked() -> None:
    acl = synthesize().one("flaskapp", "AWS::WAFv2::WebACL")
    overrides = {
        rule["Name"]: rule["Statement"]["ManagedRuleGroupStatement"].get("RuleActionOverrides")
        for rule in acl["Rules"]
        if "ManagedRuleGroupStatement" in rule["Statement"]
    }
    assert overrides.pop("AWSManagedRulesCommonRuleSet") == [
        {"Name": "SizeRestrictions_BODY", "ActionToUse": {"Count": {}}}
    ]
    assert set(overrides.values()) == {None}


def test_a_rate_per_address_is_that_of_one_host() -> None:
    """Many share an address behind NAT: what one host is taken to serve, one address may ask."""
    chosen = load(settings(), {})
    rules = synthesize().one("flaskapp", "AWS::WAFv2::WebACL")["Rules"]
    (limit,) = (one["Statement"]["RateBasedStatement"]["Limit"] for one in rules if one["Name"] == "RatePerAddress")
    assert limit == chosen.requests_per_target * 5


def test_public_and_internal_load_balancers_have_other_target_groups() -> None:
    """A change of the scheme makes another load balancer, and a target group belongs to one only."""
    targets = "AWS::ElasticLoadBalancingV2::TargetGroup"
    public = synthesize(internet_facing="true", allowed_cidrs="192.0.2.0/24").resources("flaskapp", targets)
    internal = synthesize().resources("flaskapp", targets)
    assert len(public) == len(internal) == 1
    assert not public.keys() & internal.keys()


def test_firewall_can_be_left_out() -> None:
    made = synthesize(waf="false")
    assert not made.resources("flaskapp", "AWS::WAFv2::WebACL")
    assert not made.resources("flaskapp", "AWS::WAFv2::WebACLAssociation")
