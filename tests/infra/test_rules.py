"""Rule checkers find nothing: cdk-nag's AWS Solutions, cfn-lint, and CDK's own validation of templates."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from aws_cdk import Validations
from cdk_nag import AwsSolutionsChecks
from constructs import IConstruct
from tests.infra.variants import (
    CLIENT_CERTIFICATES,
    COMPUTES,
    MODES,
    PROD,
    SIGN_IN,
    TLS,
    Synthesized,
    synthesize,
)

VARIANTS = {
    **{f"{mode}-{compute}": (mode, compute, {}) for mode in MODES for compute in COMPUTES},
    "given": ("tracking", "ec2", TLS["given"]),
    "requested": ("tracking", "ec2", TLS["requested"]),
    "sign-in": ("tracking", "ec2", SIGN_IN),
    "client-certificates": ("tracking", "ec2", CLIENT_CERTIFICATES),
    "prod": ("tracking", "ec2", PROD),
    "public": ("tracking", "ec2", {"internet_facing": "true", "allowed_cidrs": "0.0.0.0/0"}),
    "closed": ("tracking", "ec2", {"nat_gateways": "0"}),
    "registration": ("serverless", "fargate", {"model_registration": "true"}),
}


def made(variant: str) -> Synthesized:
    mode, compute, more = VARIANTS[variant]
    return synthesize(mode, compute, **more)


@pytest.mark.parametrize("variant", VARIANTS)
def test_aws_solutions(variant: str) -> None:
    report = AwsSolutionsChecks(made(variant).app).validate_scope(made(variant).app)
    findings = {one.rule_name: [where.construct_path for where in one.violating_resources] for one in report.violations}
    assert findings == {}


@pytest.mark.parametrize("variant", VARIANTS)
def test_cdks_own_validation(variant: str) -> None:
    report = made(variant).folder / "validation-report.json"
    violations = [
        (one["ruleName"], one["description"])
        for plugin in (json.loads(report.read_text())["pluginReports"] if report.is_file() else [])
        for one in plugin.get("violations", [])
    ]
    assert violations == []


def test_cfn_lint() -> None:
    # Variants share most stacks: each template once.
    templates = {
        path.read_text(): str(path) for variant in VARIANTS for path in made(variant).folder.glob("*.template.json")
    }
    assert len(templates) >= len(VARIANTS)
    lint = Path(sys.executable).parent / "cfn-lint"
    done = subprocess.run([str(lint), "--", *templates.values()], capture_output=True, text=True, check=False)
    assert done.stdout == ""
    assert done.returncode == 0


def test_checkers_do_find_something(tmp_path: Path) -> None:
    """An oracle for the three tests above: without its acknowledgements, nag would complain."""
    import aws_cdk as cdk
    from aws_cdk import aws_s3 as s3

    app = cdk.App(outdir=str(tmp_path))
    stack = cdk.Stack(app, "bad")
    s3.Bucket(stack, "Bucket")
    app.synth()
    rules = {one.rule_name for one in AwsSolutionsChecks(app).validate_scope(app).violations}
    assert {"AwsSolutions-S1", "AwsSolutions-S10"} <= rules


def acknowledgements(construct: IConstruct) -> Iterator[tuple[str, str, str]]:
    for child in construct.node.find_all():
        for entry in child.node.metadata:
            if entry.type == Validations.ACKNOWLEDGED_RULES_METADATA_KEY:
                for rule, reason in entry.data.items():
                    yield child.node.path, rule, reason


def test_every_acknowledgement_names_one_rule_and_a_reason() -> None:
    found = {one for variant in VARIANTS for one in acknowledgements(made(variant).app)}
    assert found
    for path, rule, reason in found:
        assert len(reason.split()) >= 6, (path, rule)
        assert "*" not in rule.split("[")[0]
        # On a resource or a construct of ours, never on a whole stack.
        assert "/" in path, (path, rule)
    lint = {
        (name, resource["Metadata"]["cfn-lint"]["reason"])
        for variant in VARIANTS
        for template in made(variant).templates.values()
        for name, resource in template["Resources"].items()
        if "cfn-lint" in resource.get("Metadata", {})
    }
    assert {reason for _, reason in lint} != set()
    assert all(reason.endswith(".") for _, reason in lint)
