"""The Application Load Balancer: TLS, who may reach the proxy, sign-in of browsers, client certificates."""

from __future__ import annotations

import aws_cdk as cdk
from aws_cdk import aws_certificatemanager as acm
from aws_cdk import aws_ec2 as ec2
from aws_cdk import aws_elasticloadbalancingv2 as elbv2
from aws_cdk import aws_route53 as route53
from aws_cdk import aws_route53_targets as targets
from aws_cdk import aws_s3 as s3
from constructs import Construct

from infra.networking import PROXY_PORT, Network
from infra.proxy_configuration import LOAD_BALANCER_IDLE
from infra.self_signed import SelfSignedCertificate
from infra.settings import Settings
from infra.web_firewall import WebFirewall

# Health, not readiness: one throttled or stopped target must not make the load balancer end all hosts.
_HEALTH = "/-/health"
# Callers that bring a credential of their own, which the proxy judges.
_CREDENTIAL_HEADERS = ("authorization", "x-api-key")
# What people open in a browser; anything else that is not signed in gets the proxy's 401, never a redirect.
_BROWSER_PATHS = ("/", "/t/*", "/-/*")


class LoadBalancer(Construct):
    """Load balancer, listeners, and the target group that hosts or tasks join. `url` is what callers use."""

    def __init__(self, scope: Construct, id: str, settings: Settings, network: Network, logs: s3.Bucket) -> None:
        super().__init__(scope, id)
        self.balancer = self._balancer(settings, network, logs)
        self.target_group = self._target_group(settings, network)
        zone = self._zone(settings)
        self.certificate_arn = self._certificate(settings, zone)
        self._listeners(settings)
        if zone is not None:
            route53.ARecord(
                self,
                "Name",
                zone=zone,
                record_name=settings.host_name,
                target=route53.RecordTarget.from_alias(targets.LoadBalancerTarget(self.balancer)),
            )
        if settings.waf:
            WebFirewall(self, "Firewall", settings, self.balancer.load_balancer_arn)
        self.url = f"https://{settings.host_name or self.balancer.load_balancer_dns_name}"

    def _balancer(self, settings: Settings, network: Network, logs: s3.Bucket) -> elbv2.ApplicationLoadBalancer:
        balancer = elbv2.ApplicationLoadBalancer(
            self,
            "Balancer",
            vpc=network.vpc,
            vpc_subnets=ec2.SubnetSelection(subnets=list(network.load_balancer_subnets)),
            internet_facing=settings.internet_facing,
            security_group=network.load_balancer,
            idle_timeout=cdk.Duration.seconds(LOAD_BALANCER_IDLE),
            drop_invalid_header_fields=True,
            desync_mitigation_mode=elbv2.DesyncMitigationMode.STRICTEST,
            # The proxy judges the name that the caller used.
            preserve_host_header=True,
            http2_enabled=True,
            deletion_protection=settings.is_prod,
        )
        balancer.log_access_logs(logs, "load-balancer")
        return balancer

    def _target_group(self, settings: Settings, network: Network) -> elbv2.ApplicationTargetGroup:
        return elbv2.ApplicationTargetGroup(
            self,
            # A change of the scheme replaces the load balancer, and a target group belongs to one only.
            "PublicTargets" if settings.internet_facing else "Targets",
            vpc=network.vpc,
            port=PROXY_PORT,
            protocol=elbv2.ApplicationProtocol.HTTP,
            target_type=elbv2.TargetType.INSTANCE if settings.compute == "ec2" else elbv2.TargetType.IP,
            deregistration_delay=cdk.Duration.seconds(settings.drain_seconds),
            load_balancing_algorithm_type=elbv2.TargetGroupLoadBalancingAlgorithmType.LEAST_OUTSTANDING_REQUESTS,
            health_check=elbv2.HealthCheck(
                path=_HEALTH,
                healthy_http_codes="200",
                interval=cdk.Duration.seconds(10),
                timeout=cdk.Duration.seconds(5),
                healthy_threshold_count=2,
                unhealthy_threshold_count=3,
            ),
        )

    def _zone(self, settings: Settings) -> route53.IHostedZone | None:
        if settings.hosted_zone_id is None or settings.hosted_zone_name is None:
            return None
        return route53.HostedZone.from_hosted_zone_attributes(
            self, "Zone", hosted_zone_id=settings.hosted_zone_id, zone_name=settings.hosted_zone_name
        )

    def _certificate(self, settings: Settings, zone: route53.IHostedZone | None) -> str:
        if settings.certificate_arn is not None:
            return settings.certificate_arn
        if zone is not None and settings.host_name is not None:
            certificate = acm.Certificate(
                self,
                "Certificate",
                domain_name=settings.host_name,
                validation=acm.CertificateValidation.from_dns(zone),
            )
            return certificate.certificate_arn
        return SelfSignedCertificate(self, "SelfSigned", settings, self.balancer.load_balancer_dns_name).arn

    def _listeners(self, settings: Settings) -> None:
        self.balancer.add_listener(
            "Http",
            port=80,
            open=False,
            default_action=elbv2.ListenerAction.redirect(protocol="HTTPS", port="443", permanent=True),
        )
        forward = elbv2.ListenerAction.forward([self.target_group])
        listener = self.balancer.add_listener(
            "Https",
            port=443,
            open=False,
            protocol=elbv2.ApplicationProtocol.HTTPS,
            ssl_policy=elbv2.SslPolicy.TLS13_RES,
            certificates=[elbv2.ListenerCertificate.from_arn(self.certificate_arn)],
            mutual_authentication=self._mutual_authentication(settings),
            default_action=forward
            if not settings.signs_in
            else self._authenticated(settings, forward, elbv2.UnauthenticatedAction.ALLOW),
        )
        if settings.signs_in:
            self._sign_in(listener, settings, forward)

    def _sign_in(self, listener: elbv2.ApplicationListener, settings: Settings, forward: elbv2.ListenerAction) -> None:
        """Whoever brings a credential is left to the proxy; a browser's page leads to sign-in; the rest may pass."""
        for priority, header in enumerate(_CREDENTIAL_HEADERS, 1):
            listener.add_action(
                f"With-{header}",
                priority=priority,
                conditions=[elbv2.ListenerCondition.http_header(header, ["*"])],
                action=forward,
            )
        listener.add_action(
            "Browsers",
            priority=10,
            conditions=[
                elbv2.ListenerCondition.path_patterns(list(_BROWSER_PATHS)),
                elbv2.ListenerCondition.http_header("accept", ["*text/html*"]),
            ],
            action=self._authenticated(settings, forward, elbv2.UnauthenticatedAction.AUTHENTICATE),
        )

    def _authenticated(
        self, settings: Settings, forward: elbv2.ListenerAction, unauthenticated: elbv2.UnauthenticatedAction
    ) -> elbv2.ListenerAction:
        return elbv2.ListenerAction.authenticate_oidc(
            issuer=settings.oidc_issuer or "",
            authorization_endpoint=settings.oidc_authorization_endpoint or "",
            token_endpoint=settings.oidc_token_endpoint or "",
            user_info_endpoint=settings.oidc_user_info_endpoint or "",
            client_id=settings.oidc_client_id or "",
            client_secret=cdk.SecretValue.secrets_manager(settings.oidc_client_secret_arn or ""),
            scope="openid email profile",
            on_unauthenticated_request=unauthenticated,
            # The security group has its rule for that in the networking stack.
            allow_https_outbound=False,
            next=forward,
        )

    def _mutual_authentication(self, settings: Settings) -> elbv2.MutualAuthentication | None:
        if settings.mtls_ca_bundle is None:
            return None
        bucket, _, key = settings.mtls_ca_bundle.removeprefix("s3://").partition("/")
        store = elbv2.TrustStore(
            self, "TrustStore", bucket=s3.Bucket.from_bucket_name(self, "CaBucket", bucket), key=key
        )
        return elbv2.MutualAuthentication(
            mutual_authentication_mode=elbv2.MutualAuthenticationMode.VERIFY, trust_store=store
        )
