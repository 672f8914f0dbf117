"""The commands that the demo prints and the README shows, ready to paste: seven calls with curl, and an MLflow client.

Before them goes the proxy's address, PROXY for the calls and MLFLOW_TRACKING_URI for the client, and the keys: KEY, the
writer's, and READER. A test runs them as they stand here, against both targets, and compares them with the README.
"""

from __future__ import annotations

CURL = r"""
API=$PROXY/api/2.0/mlflow
AUTH="Authorization: Bearer $KEY"
JSON='Content-Type: application/json'

# 1  make an experiment
ANSWER=$(curl -sS -H "$AUTH" $API/experiments/create -H "$JSON" -d '{"name": "hello-'$(date +%s)'"}')
EXPERIMENT=$(printf '%s' "$ANSWER" | sed -n 's/.*"experiment_id": "\([0-9]*\)".*/\1/p')
echo "experiment ${EXPERIMENT:-was not made: $ANSWER}"

# 2  find experiments
curl -s -H "$AUTH" $API/experiments/search -H "$JSON" -d '{"max_results": 5}'

# 3  look at one
curl -s -H "$AUTH" "$API/experiments/get?experiment_id=$EXPERIMENT"

# 4  start a run in it
ANSWER=$(curl -sS -H "$AUTH" $API/runs/create -H "$JSON" -d '{"experiment_id": "'$EXPERIMENT'", "run_name": "first"}')
RUN=$(printf '%s' "$ANSWER" | sed -n 's/.*"run_id": "\([0-9a-f]*\)".*/\1/p')
echo "run ${RUN:-was not made: $ANSWER}"

# 5  list its artifacts
curl -s -H "$AUTH" "$API/artifacts/list?run_id=$RUN"

# 6  tag it
curl -s -H "$AUTH" $API/runs/set-tag -H "$JSON" -d '{"run_id": "'$RUN'", "key": "stage", "value": "trial"}'

# 7  delete it
curl -s -H "$AUTH" $API/runs/delete -H "$JSON" -d '{"run_id": "'$RUN'"}'
""".strip()

ROLES = r"""
# The reader's key may look …
curl -s -H "Authorization: Bearer $READER" $API/experiments/search -H "$JSON" -d '{"max_results": 1}'

# … but change nothing: 403, with the action, the role and the target
curl -s -H "Authorization: Bearer $READER" $API/experiments/create -H "$JSON" -d '{"name": "never"}'
""".strip()

CLIENT = """
export MLFLOW_TRACKING_TOKEN=$KEY

# In the clone, after make demo. Elsewhere: pip install mlflow in an environment of your own, and its python here.
.venv/bin/python -c '
import mlflow
with mlflow.start_run():
    mlflow.log_param("rate", 0.1)
    mlflow.log_metric("loss", 0.5)
print(mlflow.search_runs()[["run_id", "metrics.loss"]])'
""".strip()
