"""Findings of cdk-nag, cfn-lint and CDK itself that stand, each with its reason next to the resource."""

from __future__ import annotations

import aws_cdk as cdk
from constructs import IConstruct


def acknowledge(construct: IConstruct, reason: str, *rules: str) -> None:
    """Let findings of a construct and all below it stand.

    Rules of cdk-nag are named without the pack before them, and warnings of CDK's own as it prints them.
    """
    names = (rule if rule.startswith("@aws-cdk/") else f"AwsSolutions-{rule}" for rule in rules)
    cdk.Validations.of(construct).acknowledge(*(cdk.Acknowledgment(id=name, reason=reason) for name in names))


def acknowledge_lint(resource: IConstruct, reason: str, *rules: str) -> None:
    """Let findings of cfn-lint about one resource stand."""
    made = resource if isinstance(resource, cdk.CfnResource) else resource.node.default_child
    assert isinstance(made, cdk.CfnResource)  # noqa: S101
    made.add_metadata("cfn-lint", {"config": {"ignore_checks": list(rules)}, "reason": reason})
