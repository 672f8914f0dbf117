"""The CDK application. Run by the `cdk` command line (cdk.json); `python -m infra.app` synthesizes without it."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any

import aws_cdk as cdk

from infra.application import BuildError
from infra.domain import DomainStack
from infra.flaskapp import FlaskappStack
from infra.mlflow import MlflowStack
from infra.networking import NetworkingStack
from infra.settings import Settings, SettingsError, load

PREFIX = "sagemaker-infra"


def stack_ids(mlflow_type: str) -> tuple[str, str, str, str]:
    """The stacks of a mode in the order of their deployment. The first two are both modes'."""
    return (
        f"{PREFIX}-networking",
        f"{PREFIX}-domain",
        f"{PREFIX}-mlflow-{mlflow_type}",
        f"{PREFIX}-flaskapp-{mlflow_type}",
    )


def add_stacks(app: cdk.App, settings: Settings) -> None:
    """All four stacks of the mode."""
    common: dict[str, Any] = {
        "env": cdk.Environment(account=settings.account, region=settings.region),
        "termination_protection": settings.is_prod,
    }
    networking_id, domain_id, mlflow_id, flaskapp_id = stack_ids(settings.mlflow_type)
    networking = NetworkingStack(app, networking_id, settings, description="MLflow proxy: network", **common)
    domain = DomainStack(app, domain_id, settings, networking.network, description="MLflow proxy: Studio", **common)
    mlflow = MlflowStack(
        app, mlflow_id, settings, description=f"MLflow proxy: MLflow ({settings.mlflow_type})", **common
    )
    flaskapp = FlaskappStack(
        app,
        flaskapp_id,
        settings,
        networking.network,
        mlflow.target,
        description=f"MLflow proxy: proxy ({settings.mlflow_type})",
        **common,
    )
    for stack in (networking, domain, mlflow, flaskapp):
        _tag(stack, settings)
    # The shared stacks are the same in both modes, so they have no tag that tells modes apart.
    for stack in (mlflow, flaskapp):
        cdk.Tags.of(stack).add("mlflow-type", settings.mlflow_type)


def _tag(stack: cdk.Stack, settings: Settings) -> None:
    tags = {"project": "sagemaker-mlflow-proxy", "environment": settings.stack_env, "stack": stack.stack_name}
    for name, value in (tags | settings.tags).items():
        cdk.Tags.of(stack).add(name, value)


def build(context: Mapping[str, Any], environ: Mapping[str, str], outdir: str | None = None) -> cdk.App:
    """The application, not yet synthesized. `context` counts besides what the command line gives."""
    app = cdk.App(outdir=outdir, context=dict(context), analytics_reporting=False)
    known = app.node.get_all_context()
    settings = load(known, environ)
    if settings.vpc_id is not None and not any(settings.vpc_id in name for name in known):
        # CDK runs this twice: first with a made-up VPC in place of the one that it then looks up, whose made-up ids its
        # own validation takes for mistakes.
        app.node.set_context("@aws-cdk/core:validateAgainstDefaultRules", False)
    add_stacks(app, settings)
    return app


def main() -> None:
    """Synthesize. Mistakes are told in words, without a traceback."""
    try:
        build({}, os.environ).synth()
    except (SettingsError, BuildError) as error:
        print(error, file=sys.stderr)  # noqa: T201
        sys.exit(2)


if __name__ == "__main__":
    main()
