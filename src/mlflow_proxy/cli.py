"""The command line: serve, check, validate, keys, ui, local, demo, options."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import click

from mlflow_proxy import __version__

if TYPE_CHECKING:
    from mlflow_proxy.settings import Settings

_CONFIG = click.option(
    "--config",
    "-c",
    type=click.Path(path_type=Path, dir_okay=False),
    envvar="MLFLOW_PROXY_CONFIG",
    help="TOML file with the configuration (see docs/configuration.md).",
)
_FILE = click.Path(path_type=Path, exists=True, dir_okay=False)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="mlflow-proxy")
def main() -> None:
    """Plain HTTPS access to Amazon SageMaker MLflow."""


@main.command()
@_CONFIG
def serve(config: Path | None) -> None:
    """Run the proxy until Ctrl-C or SIGTERM."""
    settings = _load(config)
    from mlflow_proxy import server
    from mlflow_proxy.exposure import exposures

    scheme = "https" if settings.server.tls_certificate else "http"
    host = f"[{settings.server.host}]" if ":" in settings.server.host else settings.server.host
    targets = ", ".join(target.name for target in settings.targets)
    click.echo(
        f"mlflow-proxy {__version__}: {scheme}://{host}:{settings.server.port}, "
        f"{settings.server.workers} workers, targets: {targets}",
        err=True,
    )
    for exposure in exposures(settings):
        click.echo(f"Warning: {exposure}", err=True)
    server.serve(settings, config)


@main.command()
@_CONFIG
@click.option("--target", "-t", "name", help="Check only this target.")
@click.option("--verbose", "-v", is_flag=True, help="Print the whole reason of what could not be found out.")
def check(config: Path | None, name: str | None, verbose: bool) -> None:
    """Test the configuration against the live targets.

    Step by step, with the likely cause of each failure. Exit code 0: all well, 1: something failed.
    """
    from mlflow_proxy.check import run

    _print_no_log()
    sys.exit(0 if run(_load(config), name, verbose=verbose) else 1)


@main.command()
@click.option("--url", required=True, help="Address of the deployment, https://… or https://…/t/<target>.")
@click.option("--target", help="Name of the target; default: the proxy's own.")
@click.option("--ca", type=_FILE, help="PEM file to trust instead of the system's CAs.")
@click.option("--key-file", type=click.File(), help="File with an API key; - is standard input. Or MLFLOW_PROXY_KEY.")
@click.option("--token-file", type=click.File(), help="File with a bearer token. Or MLFLOW_TRACKING_TOKEN.")
@click.option("--client-cert", type=_FILE, help="PEM file with a client certificate, for mTLS.")
@click.option("--client-key", type=_FILE, help="PEM file with its key, if that is not in the same file.")
@click.option("--read-only", is_flag=True, help="Make nothing; a reader's key will do.")
@click.option("--timeout", type=click.FloatRange(0.1, 600), default=30.0, show_default=True, help="Seconds per call.")
@click.option("--output", type=click.Choice(["table", "json"]), default="table", show_default=True)
@click.option("--wait", type=click.FloatRange(0, 7200), default=0.0, help="Seconds to wait until it is healthy.")
def validate(
    *,
    url: str,
    target: str | None,
    ca: Path | None,
    key_file: TextIO | None,
    token_file: TextIO | None,
    client_cert: Path | None,
    client_key: Path | None,
    read_only: bool,
    timeout: float,
    output: str,
    wait: float,
) -> None:
    """Try a live deployment as its callers use it.

    What that makes is removed. Exit code 0: all well, 1: something failed, 2: not reachable.
    """
    from mlflow_proxy.validate import run
    from mlflow_proxy.validate.deployment import Mistake, deployment

    try:
        found = deployment(
            url,
            target=target,
            key=None if key_file is None else key_file.read(),
            token=None if token_file is None else token_file.read(),
            environ=os.environ,
            ca=ca,
            client_cert=client_cert,
            client_key=client_key,
            timeout=timeout,
        )
    except (Mistake, UnicodeDecodeError) as mistake:
        raise click.UsageError(str(mistake) if isinstance(mistake, Mistake) else "the key's file is not text") from None
    sys.exit(run(found, read_only=read_only, as_json=output == "json", wait=wait))


@main.command()
@_CONFIG
@click.argument("target")
@click.option("--link-expires", type=click.IntRange(5, 300), help="Seconds until the unused link is void.")
@click.option("--session-expires", type=click.IntRange(1800, 43200), help="Seconds that the browser session lasts.")
def ui(config: Path | None, target: str, link_expires: int | None, session_expires: int | None) -> None:
    """Print a fresh presigned link to TARGET's MLflow UI. It works once."""
    from mlflow_proxy.check import presign

    _print_no_log()
    settings = _load(config)
    click.echo(
        presign(
            settings,
            target,
            link_expires=link_expires or settings.ui.link_expires,
            session_expires=session_expires or settings.ui.session_expires,
        )
    )


@main.command()
@click.option("--port", default=9500, show_default=True, help="Port of the stand-in's gate.")
@click.option("--state", type=click.Path(path_type=Path), help="Folder for its data; default: a temporary one.")
@click.option(
    "--presigned-artifacts/--no-presigned-artifacts",
    default=True,
    show_default=True,
    help="Whether MLflow hands out presigned URLs of artifacts.",
)
def local(port: int, state: Path | None, presigned_artifacts: bool) -> None:
    """Run a SageMaker MLflow on this machine, for tests without AWS."""
    _needs_local()
    click.echo("Loading the local SageMaker MLflow …")
    from mlflow_proxy.local import run_local

    if state is not None:
        sys.exit(run_local(state, port=port, presigned_artifacts=presigned_artifacts))
    with tempfile.TemporaryDirectory(prefix="mlflow-proxy-local-", ignore_cleanup_errors=True) as folder:
        code = run_local(Path(folder), port=port, presigned_artifacts=presigned_artifacts)
    sys.exit(code)


@main.command()
@click.option("--port", default=8080, show_default=True, help="Port of the proxy.")
def demo(port: int) -> None:
    """Run the proxy with a local SageMaker MLflow.

    Prints what to try. No AWS account is needed.
    """
    _needs_local()
    click.echo("Loading the local SageMaker MLflow …")
    from mlflow_proxy.local.demo import run_demo

    sys.exit(run_demo(port))


@main.command()
def options() -> None:
    """Print all options as a Markdown table.

    It is the one in docs/configuration.md.
    """
    from mlflow_proxy.options import options_markdown

    click.echo(options_markdown())


def _load(config: Path | None) -> Settings:
    from mlflow_proxy import configuration

    try:
        return configuration.load(config)
    except configuration.SettingsError as error:
        where = str(config) if config else "the environment (no --config given)"
        count = len(error.problems)
        click.echo(f"{count} mistake{'s' if count > 1 else ''} in the configuration from {where}:", err=True)
        for problem in error.problems:
            click.echo(f"  ✗ {problem}", err=True)
        sys.exit(2)


def _print_no_log() -> None:
    """For commands that print all that matters themselves: without a handler, Python prints warnings of the log."""
    import logging

    logging.getLogger("mlflow_proxy").addHandler(logging.NullHandler())


def _needs_local() -> None:
    import importlib.util

    if importlib.util.find_spec("moto") is None or importlib.util.find_spec("mlflow") is None:
        raise click.ClickException(
            "the local SageMaker is an extra; install it in a clone of the repository: pip install '.[local]'"
        )


def _add_keys() -> None:
    from mlflow_proxy.keys_command import keys

    main.add_command(keys)


_add_keys()
