"""AWS WAF before the load balancer: AWS's managed rules, and a limit for each address."""

from __future__ import annotations

from collections.abc import Iterator

from aws_cdk import aws_wafv2 as wafv2
from constructs import Construct

from infra.settings import Settings

_COMMON = "AWSManagedRulesCommonRuleSet"
# In the order in which they are asked.
_MANAGED = ("AWSManagedRulesAmazonIpReputationList", _COMMON, "AWSManagedRulesKnownBadInputsRuleSet")
_FIVE_MINUTES = 300


class WebFirewall(Construct):
    """A web ACL for one load balancer. Callers behind one address (NAT, a VPN) share its limit."""

    def __init__(self, scope: Construct, id: str, settings: Settings, load_balancer_arn: str) -> None:
        super().__init__(scope, id)
        acl = wafv2.CfnWebACL(
            self,
            "WebAcl",
            scope="REGIONAL",
            description="MLflow proxy",
            default_action=wafv2.CfnWebACL.DefaultActionProperty(allow=wafv2.CfnWebACL.AllowActionProperty()),
            visibility_config=_visibility("WebAcl"),
            rules=list(_rules(settings)),
        )
        wafv2.CfnWebACLAssociation(self, "Association", web_acl_arn=acl.attr_arn, resource_arn=load_balancer_arn)


def _rules(settings: Settings) -> Iterator[wafv2.CfnWebACL.RuleProperty]:
    yield wafv2.CfnWebACL.RuleProperty(
        name="RatePerAddress",
        priority=0,
        action=wafv2.CfnWebACL.RuleActionProperty(block=wafv2.CfnWebACL.BlockActionProperty()),
        statement=wafv2.CfnWebACL.StatementProperty(
            rate_based_statement=wafv2.CfnWebACL.RateBasedStatementProperty(
                aggregate_key_type="IP", limit=settings.waf_rate, evaluation_window_sec=_FIVE_MINUTES
            )
        ),
        visibility_config=_visibility("RatePerAddress"),
    )
    for priority, name in enumerate(_MANAGED, 1):
        yield wafv2.CfnWebACL.RuleProperty(
            name=name,
            priority=priority,
            override_action=wafv2.CfnWebACL.OverrideActionProperty(none={}),
            statement=wafv2.CfnWebACL.StatementProperty(
                managed_rule_group_statement=wafv2.CfnWebACL.ManagedRuleGroupStatementProperty(
                    vendor_name="AWS",
                    name=name,
                    # Bodies of log-batch are larger than the 8 KB that SizeRestrictions_BODY lets through.
                    rule_action_overrides=_counted(settings) if name == _COMMON else None,
                )
            ),
            visibility_config=_visibility(name),
        )


def _counted(settings: Settings) -> list[wafv2.CfnWebACL.RuleActionOverrideProperty]:
    return [
        wafv2.CfnWebACL.RuleActionOverrideProperty(
            name=rule, action_to_use=wafv2.CfnWebACL.RuleActionProperty(count=wafv2.CfnWebACL.CountActionProperty())
        )
        for rule in settings.waf_counted_rules
    ]


def _visibility(name: str) -> wafv2.CfnWebACL.VisibilityConfigProperty:
    return wafv2.CfnWebACL.VisibilityConfigProperty(
        cloud_watch_metrics_enabled=True, metric_name=name, sampled_requests_enabled=True
    )
