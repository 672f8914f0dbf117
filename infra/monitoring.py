"""What people look at, and what wakes them: metrics from the proxy's JSON log, a dashboard, alarms to one topic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import aws_cdk as cdk
from aws_cdk import aws_certificatemanager as acm
from aws_cdk import aws_cloudwatch as cloudwatch
from aws_cdk import aws_cloudwatch_actions as actions
from aws_cdk import aws_elasticloadbalancingv2 as elbv2
from aws_cdk import aws_iam as iam
from aws_cdk import aws_logs as logs
from aws_cdk import aws_sns as sns
from aws_cdk import aws_sns_subscriptions as subscriptions
from constructs import Construct

from infra.retention import encryption_key
from infra.settings import Settings

_NAMESPACE = "SageMakerMlflowProxy"
_MINUTE = cdk.Duration.minutes(1)
_FIVE_MINUTES = cdk.Duration.minutes(5)
# Thresholds of alarms.
_ERRORS_IN_FIVE_MINUTES = 10
_P99_SECONDS = 10
_THROTTLED_IN_FIVE_MINUTES = 50
_AUTH_FAILURES_IN_FIVE_MINUTES = 100
# ACM renews what it issued 60 days before the end; what is still so old then, it could not renew, or does not.
_CERTIFICATE_DAYS = 30
_BAND_WIDTH = 3  # standard deviations
# The role with which EC2 Auto Scaling tells of its events (its guide, "Service-linked roles").
_SCALING_ROLE = "aws-service-role/autoscaling.amazonaws.com/AWSServiceRoleForAutoScaling"


@dataclass(frozen=True)
class _Line:
    """A metric from request lines (only these have duration_ms): which of them, and what is added up."""

    id: str
    pattern: str
    value: str = "1"
    unit: cloudwatch.Unit = cloudwatch.Unit.COUNT


_REQUEST = "$.duration_ms >= 0"
_LINES = (
    _Line("Requests", f"{{ {_REQUEST} }}"),
    _Line("Latency", f"{{ {_REQUEST} }}", "$.duration_ms", cloudwatch.Unit.MILLISECONDS),
    _Line("Errors", f"{{ {_REQUEST} && $.status >= 500 }}"),
    _Line("Throttled", f"{{ {_REQUEST} && $.status = 429 }}"),
    _Line("Limited", f'{{ {_REQUEST} && $.limit = "*" && $.limit != "" }}'),
    _Line("AuthFailures", f"{{ {_REQUEST} && $.status = 401 }}"),
    _Line("Denied", f"{{ {_REQUEST} && $.status = 403 }}"),
    _Line("CredentialFailures", f'{{ {_REQUEST} && $.status >= 500 && $.error = "No AWS credentials*" }}'),
)


class AlarmTopic(sns.Topic):
    """The topic that alarms and scaling events go to: encrypted, and reached with TLS only."""

    def __init__(self, scope: Construct, id: str, settings: Settings) -> None:
        # SNS's own key does not do: its policy, which cannot be changed, does not let alarms use it.
        key = encryption_key(scope, f"{id}Key", settings, "Alarms of the MLflow proxy", holds_data=False)
        super().__init__(
            scope, id, enforce_ssl=True, master_key=key, display_name=f"MLflow proxy, {settings.mlflow_type}"
        )
        account = cdk.Stack.of(self).account
        alarms = iam.ServicePrincipal("cloudwatch.amazonaws.com")
        of_account = {"StringEquals": {"aws:SourceAccount": account}}
        # A policy of one's own takes the place of the default one, which lets the account's alarms publish.
        self.add_to_resource_policy(
            iam.PolicyStatement(
                sid="Alarms",
                principals=[alarms],
                actions=["sns:Publish"],
                resources=[self.topic_arn],
                conditions=of_account,
            )
        )
        # "*" in a key's policy is the key itself. Publishing takes both actions (SNS guide, "Key management").
        encrypt: dict[str, Any] = {"actions": ["kms:Decrypt", "kms:GenerateDataKey"], "resources": ["*"]}
        key.add_to_resource_policy(
            iam.PolicyStatement(sid="Alarms", principals=[alarms], conditions=of_account, **encrypt)
        )
        if settings.compute == "ec2":
            key.add_to_resource_policy(
                # Named in a condition, because KMS refuses a policy whose principal does not exist, and AWS makes this
                # role with an account's first Auto Scaling group. It publishes with rights of its own.
                iam.PolicyStatement(
                    sid="ScalingEvents",
                    principals=[iam.AnyPrincipal()],
                    conditions={
                        "StringEquals": {
                            "aws:PrincipalArn": cdk.Stack.of(self).format_arn(
                                service="iam", region="", resource="role", resource_name=_SCALING_ROLE
                            ),
                            "kms:ViaService": f"sns.{cdk.Stack.of(self).region}.amazonaws.com",
                        }
                    },
                    **encrypt,
                )
            )
        if settings.alarm_email is not None:
            self.add_subscription(subscriptions.EmailSubscription(settings.alarm_email))


class Monitoring(Construct):
    """Metric filters, dashboard, anomaly detection, alarms."""

    def __init__(
        self,
        scope: Construct,
        id: str,
        settings: Settings,
        *,
        load_balancer: elbv2.ApplicationLoadBalancer,
        target_group: elbv2.ApplicationTargetGroup,
        certificate_arn: str,
        log_group: logs.LogGroup,
        topic: sns.ITopic,
    ) -> None:
        super().__init__(scope, id)
        self._topic = topic
        self._certificate = acm.Certificate.from_certificate_arn(self, "Certificate", certificate_arn)
        self._mode = settings.mlflow_type
        self._from_log = {line.id: self._filter(log_group, line) for line in _LINES}
        balancer = load_balancer.metrics
        self._balancer = {
            "traffic": balancer.request_count(period=_MINUTE),
            "target 5xx": balancer.http_code_target(elbv2.HttpCodeTarget.TARGET_5XX_COUNT, period=_FIVE_MINUTES),
            "balancer 5xx": balancer.http_code_elb(elbv2.HttpCodeElb.ELB_5XX_COUNT, period=_FIVE_MINUTES),
            "p50": balancer.target_response_time(statistic="p50", period=_MINUTE),
            "p99": balancer.target_response_time(statistic="p99", period=_FIVE_MINUTES),
            "healthy": target_group.metrics.healthy_host_count(period=_MINUTE),
            "unhealthy": target_group.metrics.unhealthy_host_count(statistic="max", period=_MINUTE),
        }
        self._alarms()
        self._anomalies()
        self._dashboard()

    def _filter(self, log_group: logs.LogGroup, line: _Line) -> cloudwatch.Metric:
        name = f"{self._mode}-{line.id}"
        logs.MetricFilter(
            self,
            f"{line.id}Filter",
            log_group=log_group,
            filter_pattern=logs.FilterPattern.literal(line.pattern),
            metric_namespace=_NAMESPACE,
            metric_name=name,
            metric_value=line.value,
            # Without lines, a sum is none and a duration unknown.
            default_value=0 if line.value == "1" else None,
            unit=line.unit,
        )
        return cloudwatch.Metric(
            namespace=_NAMESPACE, metric_name=name, statistic="sum", period=_FIVE_MINUTES, label=line.id
        )

    def _alarm(self, id: str, metric: cloudwatch.IMetric, threshold: float, what: str, periods: int = 1) -> None:
        alarm = cloudwatch.Alarm(
            self,
            id,
            metric=metric,
            threshold=threshold,
            evaluation_periods=periods,
            comparison_operator=cloudwatch.ComparisonOperator.GREATER_THAN_OR_EQUAL_TO_THRESHOLD,
            treat_missing_data=cloudwatch.TreatMissingData.NOT_BREACHING,
            alarm_description=f"MLflow proxy ({self._mode}): {what}",
        )
        self._tell(alarm)

    def _tell(self, alarm: cloudwatch.AlarmBase) -> None:
        alarm.add_alarm_action(actions.SnsAction(self._topic))
        alarm.add_ok_action(actions.SnsAction(self._topic))

    def _alarms(self) -> None:
        balancer, line = self._balancer, self._from_log
        self._alarm("Proxy5xx", balancer["target 5xx"], _ERRORS_IN_FIVE_MINUTES, "the proxy answered with 5xx")
        self._alarm(
            "Balancer5xx", balancer["balancer 5xx"], _ERRORS_IN_FIVE_MINUTES, "the load balancer found no proxy to ask"
        )
        self._alarm("SlowAnswers", balancer["p99"], _P99_SECONDS, "one in a hundred answers is slow", 3)
        self._alarm("UnhealthyHosts", balancer["unhealthy"], 1, "a host does not answer its health check", 5)
        self._alarm("Throttling", line["Throttled"], _THROTTLED_IN_FIVE_MINUTES, "many requests were throttled (429)")
        self._alarm("NoCredentials", line["CredentialFailures"], 1, "requests failed for lack of AWS credentials")
        self._alarm(
            "AuthFailureBurst",
            line["AuthFailures"],
            _AUTH_FAILURES_IN_FIVE_MINUTES,
            "many requests with wrong credentials: a broken client, or somebody who guesses",
        )
        self._certificate_alarm()

    def _certificate_alarm(self) -> None:
        alarm = cloudwatch.Alarm(
            self,
            "CertificateExpires",
            metric=self._certificate.metric_days_to_expiry(),
            threshold=_CERTIFICATE_DAYS,
            evaluation_periods=1,
            comparison_operator=cloudwatch.ComparisonOperator.LESS_THAN_OR_EQUAL_TO_THRESHOLD,
            # ACM says nothing on a new certificate's first day, and nothing any more once it is over.
            treat_missing_data=cloudwatch.TreatMissingData.IGNORE,
            alarm_description=f"MLflow proxy ({self._mode}): the certificate ends within {_CERTIFICATE_DAYS} days",
        )
        self._tell(alarm)

    def _anomalies(self) -> None:
        for id_, metric, what in (
            ("UnusualTraffic", self._balancer["traffic"].with_(period=_FIVE_MINUTES), "traffic is unusual"),
            ("UnusualErrors", self._from_log["Errors"], "errors are unusually many"),
        ):
            alarm = cloudwatch.AnomalyDetectionAlarm(
                self,
                id_,
                metric=metric,
                std_devs=_BAND_WIDTH,
                evaluation_periods=3,
                comparison_operator=cloudwatch.ComparisonOperator.GREATER_THAN_UPPER_THRESHOLD,
                treat_missing_data=cloudwatch.TreatMissingData.NOT_BREACHING,
                alarm_description=f"MLflow proxy ({self._mode}): {what}",
            )
            self._tell(alarm)

    def _dashboard(self) -> None:
        balancer, line = self._balancer, self._from_log
        latency = [line["Latency"].with_(statistic=one, label=f"proxy {one}") for one in ("p50", "p90", "p99")]
        rows = [
            ("Traffic (requests)", [balancer["traffic"], line["Requests"]]),
            ("Errors", [balancer["target 5xx"], balancer["balancer 5xx"], line["Errors"]]),
            ("Latency (ms)", latency),
            ("Throttling", [line["Throttled"], line["Limited"]]),
            ("Hosts", [balancer["healthy"], balancer["unhealthy"]]),
            ("Callers refused", [line["AuthFailures"], line["Denied"], line["CredentialFailures"]]),
        ]
        dashboard = cloudwatch.Dashboard(self, "Dashboard", dashboard_name=f"mlflow-proxy-{self._mode}")
        for index in range(0, len(rows), 2):
            dashboard.add_widgets(
                *(
                    cloudwatch.GraphWidget(title=title, left=metrics, width=12)
                    for title, metrics in rows[index : index + 2]
                )
            )
