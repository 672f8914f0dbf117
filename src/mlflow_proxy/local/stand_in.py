"""The local SageMaker as a whole: starts its parts, tells where they are, and ends them.

moto keeps its state per process, so there is one stand-in per process at a time, and moto's `mock_aws` must
not be used beside it.
"""

from __future__ import annotations

import atexit
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from .accounts import EXTERNAL_ID, Estate, Residents, make_bucket, settle
from .admin import Admin
from .aws_services import AwsServices
from .control_plane import ControlPlane
from .data_plane import DataPlane
from .errors import LocalError
from .faults import Faults
from .gate import Gate
from .identity import Directory
from .journal import Journal
from .listeners import Listeners, address
from .relay import Relay
from .servers import MlflowServer
from .service import Features, Service
from .targets import Arn, Kind, Target, Targets
from .ui import UiGate

# Seconds of silence while MLflow starts.
_PATIENCE = 3.0


class LocalSageMaker:
    """A SageMaker with MLflow on this machine. `start` it, or use it as a context manager."""

    def __init__(
        self,
        state_dir: Path,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        region: str = "us-east-1",
        account: str = "111122223333",
        other_account: str = "444455556666",
        tracking: bool = True,
        app: bool = True,
        cross_account: bool = False,
        presigned_artifacts: bool = True,
        mlflow_python: Path | None = None,
        progress: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Choose what to start; nothing is started yet.

        `port` is the gate's, all others are free ones. `cross_account` adds a tracking server of
        `other_account`. `presigned_artifacts` is whether MLflow's endpoints for presigned URLs of artifacts answer.
        `mlflow_python` is the interpreter of another environment, whose `mlflow server` is then run. Experiments
        outlive a restart with the same `state_dir`, artifacts do not.
        """
        self.state_dir = state_dir.absolute()
        self.region = region
        self.bucket = "local-sagemaker-mlflow"
        self._service = Service(
            region, Directory((account, other_account)), Features(presigned_artifacts=presigned_artifacts)
        )
        self._host, self._port, self._account, self._python = host, port, account, mlflow_python
        self._progress = progress
        self._estate = Estate(
            account=account,
            other_account=other_account,
            tracking=_arn(region, account, Kind.TRACKING, "team-tracking"),
            app=_arn(region, account, Kind.APP, "app-LOCAL7EXAMPLE"),
            cross_account=_arn(region, other_account, Kind.TRACKING, "partner-tracking"),
        )
        wanted = {
            "tracking": (tracking, self._estate.tracking),
            "app": (app, self._estate.app),
            "cross-account": (cross_account, self._estate.cross_account),
        }
        self._wanted = {name: arn for name, (want, arn) in wanted.items() if want}
        self._servers: dict[str, MlflowServer] = {}
        self._listeners: Listeners | None = None
        self._relay: Relay | None = None
        self._aws: AwsServices | None = None
        self._residents: Residents | None = None
        self.endpoint = self.sagemaker_endpoint = self.admin_endpoint = ""

    @property
    def faults(self) -> Faults:
        """The faults in force; `faults.add(Fault(...))` is the same as posting one to the admin endpoint."""
        return self._service.faults

    @property
    def features(self) -> Features:
        """What MLflow offers; a change counts from the next request on, as one posted to the admin endpoint does."""
        return self._service.features

    @property
    def journal(self) -> Journal:
        """What arrived, for callers in this process."""
        return self._service.journal

    @property
    def targets(self) -> Targets:
        """The targets that were asked for."""
        return self._service.targets

    @property
    def tracking_arn(self) -> str:
        """The managed tracking server's ARN."""
        return self._estate.tracking.text

    @property
    def app_arn(self) -> str:
        """The serverless MLflow App's ARN."""
        return self._estate.app.text

    @property
    def cross_account_arn(self) -> str:
        """The ARN of the other account's tracking server; it answers only with `cross_account`."""
        return self._estate.cross_account.text

    @property
    def external_id(self) -> str:
        """The external id that the role "cross-account" asks for."""
        return EXTERNAL_ID

    @property
    def moto_endpoint(self) -> str:
        """STS, S3 and IAM."""
        return "" if self._aws is None else self._aws.endpoint

    @property
    def mlflow_urls(self) -> Mapping[str, str]:
        """The MLflow servers themselves, unguarded, by target name."""
        return {name: server.url for name, server in self._servers.items()}

    @property
    def mlflow_pids(self) -> Mapping[str, int]:
        """The process of each running MLflow server."""
        return {name: server.pid for name, server in self._servers.items() if server.pid is not None}

    @property
    def roles(self) -> Mapping[str, str]:
        """The ARNs of the roles writer, untagged, reader, nothing and cross-account."""
        return {} if self._residents is None else self._residents.roles

    def environment(self) -> dict[str, str]:
        """Environment variables that make any AWS client the default principal and send it here."""
        if self._residents is None:
            raise LocalError("The local SageMaker has not been started.")
        return {
            "AWS_ACCESS_KEY_ID": self._residents.access_key,
            "AWS_SECRET_ACCESS_KEY": self._residents.secret_key,
            "AWS_REGION": self.region,
            "AWS_DEFAULT_REGION": self.region,
            "AWS_ENDPOINT_URL_STS": self.moto_endpoint,
            "AWS_ENDPOINT_URL_S3": self.moto_endpoint,
            "AWS_ENDPOINT_URL_IAM": self.moto_endpoint,
            "AWS_ENDPOINT_URL_SAGEMAKER": self.sagemaker_endpoint,
        }

    def proxy_toml(self) -> str:
        """The targets for the proxy's configuration file; the first is the default."""
        blocks: list[str] = []
        for target in self.targets:
            lines = [f'name = "{target.name}"', f'arn = "{target.arn.text}"', f'endpoint = "{self.endpoint}"']
            if target.arn.account != self._account:
                lines.append(f'assume_role_arn = "{self.roles["cross-account"]}"')
                lines.append(f'external_id = "{EXTERNAL_ID}"')
            if not blocks:
                lines.append("default = true")
            blocks.append("\n".join(["[[targets]]", *lines]) + "\n")
        return "\n".join(blocks)

    def summary(self) -> dict[str, Any]:
        """All that `GET /_local/environment` tells."""
        return {
            "endpoint": self.endpoint,
            "sagemaker_endpoint": self.sagemaker_endpoint,
            "moto_endpoint": self.moto_endpoint,
            "admin_endpoint": self.admin_endpoint,
            "targets": {target.name: target.arn.text for target in self.targets},
            "mlflow_urls": dict(self.mlflow_urls),
            "roles": dict(self.roles),
            "external_id": EXTERNAL_ID,
            "environment": self.environment(),
        }

    def start(self) -> None:
        """Start everything and wait until it answers; raises LocalError, having ended what was begun."""
        atexit.register(self.stop)
        try:
            self._start()
        except BaseException:
            self.stop()
            raise

    def _start(self) -> None:
        began = time.monotonic()
        self.state_dir.mkdir(parents=True, exist_ok=True)
        listeners = self._listeners = Listeners(self._host)
        listeners.start()
        self._aws = AwsServices(self._host, self._service)
        self._aws.start()
        self._residents = settle(self._estate)
        make_bucket(self._account, self.region, self.bucket)
        self._progress(f"STS, S3 and IAM answer on {self.moto_endpoint}")
        self._start_mlflow()
        self._open_ports(listeners)
        self._wait_for_mlflow(began)

    def _start_mlflow(self) -> None:
        aws = {name: value for name, value in self.environment().items() if "SAGEMAKER" not in name}
        aws["MLFLOW_S3_ENDPOINT_URL"] = self.moto_endpoint
        for name, arn in self._wanted.items():
            root = f"s3://{self.bucket}/{name}"
            server = MlflowServer(
                name, self.state_dir / name, root, workspaces=arn.kind is Kind.APP, python=self._python
            )
            self._servers[name] = server
            server.start(aws)
            self.targets.add(Target(name, arn, server.url, root))
            self._progress(f"MLflow for {name} starts (log: {server.log})")

    def _open_ports(self, listeners: Listeners) -> None:
        relay = self._relay = listeners.call(lambda: Relay(self._service.clock))
        plane = DataPlane(self._service, relay)
        for target in self.targets:
            bound = listeners.bind()
            target.ui_origin = address(bound)
            listeners.serve(UiGate(target, self._service, plane), bound)
        try:
            bound = listeners.bind(self._port)
        except OSError as error:
            raise LocalError(f"Port {self._port} on {self._host} cannot be had: {error}. Choose another.") from error
        self.endpoint = address(bound)
        listeners.serve(Gate(self._service, plane), bound)
        bound = listeners.bind()
        self.sagemaker_endpoint = address(bound)
        listeners.serve(ControlPlane(self._service), bound)
        bound = listeners.bind(loopback=True)
        self.admin_endpoint = address(bound)
        listeners.serve(Admin(self._service, self.roles, self.summary), bound)

    def _wait_for_mlflow(self, began: float) -> None:
        starting = [target.name for target in self.targets]

        def tell() -> None:
            if starting:
                names, seconds = " and ".join(starting), time.monotonic() - began
                self._progress(f"still starting after {seconds:.0f} s: MLflow for {names}")

        with _every(_PATIENCE, tell):
            for target in self.targets:
                server = self._servers[target.name]
                server.wait()
                target.mlflow_version = server.version()
                starting.remove(target.name)
                self._progress(
                    f"MLflow {target.mlflow_version} for {target.name} answers after {time.monotonic() - began:.1f} s"
                )

    def stop(self) -> None:
        """End everything that was started; harmless when nothing was, or twice."""
        atexit.unregister(self.stop)
        if self._listeners is not None:
            if self._relay is not None:
                self._listeners.run(self._relay.close())
            self._listeners.stop()
        with ThreadPoolExecutor(len(self._servers) or 1) as pool:
            list(pool.map(MlflowServer.stop, self._servers.values()))
        if self._aws is not None:
            self._aws.stop()
        self._listeners = self._relay = self._aws = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


@contextmanager
def _every(seconds: float, act: Callable[[], None]) -> Iterator[None]:
    """Call `act` in a thread again and again, until the block ends."""
    ended = threading.Event()

    def repeat() -> None:
        while not ended.wait(seconds):
            act()

    thread = threading.Thread(target=repeat, name="local-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _arn(region: str, account: str, kind: Kind, resource: str) -> Arn:
    text = f"arn:aws:sagemaker:{region}:{account}:{kind.value}/{resource}"
    arn = Arn.parse(text)
    if arn is None:
        raise LocalError(f"{text} is not an ARN of SageMaker MLflow; check the region and the account.")
    return arn
