"""`python -m mlflow_proxy` is `mlflow-proxy`."""

from mlflow_proxy.cli import main

main(prog_name="mlflow-proxy")
