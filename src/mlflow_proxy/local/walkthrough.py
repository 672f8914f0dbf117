"""The commands that the demo prints and the README shows, ready to paste: seven calls with curl, and an MLflow client.

Before them goes the proxy's address: PROXY for the calls, MLFLOW_TRACKING_URI for the client. A test runs them as they
stand here, against both targets, and compares them with the README.
"""

from __future__ import annotations

CURL = r"""
API=$PROXY/api/2.0/mlflow
JSON='Content-Type: application/json'

# 1  make an experiment
EXPERIMENT=$(curl -s $API/experiments/create -H "$JSON" -d '{"name": "hello-'$(date +%s)'"}' | tr -dc 0-9)
echo "experiment $EXPERIMENT"

# 2  find experiments
curl -s $API/experiments/search -H "$JSON" -d '{"max_results": 5}'

# 3  look at one
curl -s "$API/experiments/get?experiment_id=$EXPERIMENT"

# 4  start a run in it
RUN=$(curl -s $API/runs/create -H "$JSON" -d '{"experiment_id": "'$EXPERIMENT'", "run_name": "first"}' |
  sed -n 's/.*"run_id": "\([0-9a-f]*\)".*/\1/p')
echo "run $RUN"

# 5  list its artifacts
curl -s "$API/artifacts/list?run_id=$RUN"

# 6  tag it
curl -s $API/runs/set-tag -H "$JSON" -d '{"run_id": "'$RUN'", "key": "stage", "value": "trial"}'

# 7  delete it
curl -s $API/runs/delete -H "$JSON" -d '{"run_id": "'$RUN'"}'
""".strip()

CLIENT = """
# In the clone, after make demo. Elsewhere: pip install mlflow in an environment of your own, and its python here.
.venv/bin/python -c '
import mlflow
with mlflow.start_run():
    mlflow.log_param("rate", 0.1)
    mlflow.log_metric("loss", 0.5)
print(mlflow.search_runs()[["run_id", "metrics.loss"]])'
""".strip()
