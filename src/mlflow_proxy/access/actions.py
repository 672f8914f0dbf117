"""Which action a request stands for: one table of MLflow's routes, so that roles can name what their callers may do.

Names are those of AWS's IAM actions (`sagemaker-mlflow:GetRun` is `GetRun` here). Routes that AWS has no action for are
named after their path. A name beginning with Get, List, Search or Access only ever reads: nothing so named changes
anything, spends anything, reaches another host for its caller, or tells what works as a credential. Every other name
counts as a write. What is not in the table is `Unknown:<METHOD> <path>`: a write by any method, which a role must allow
explicitly.

MLflow decodes a path once and matches it exactly, case and trailing slash included (Werkzeug and Starlette both do, on
the routes that MLflow has). So does this module. Where servers could differ over a path, it is unknown. Permissions are
not decided here, and the actions of a GraphQL request are in its body: see graphql.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple


class Action(NamedTuple):
    """What a request does. One object per route, shared by all its requests.

    `template` is MLflow's rule, path parameters as `{name}`, or "unknown". `writes` says whether it may change
    something or is for another reason to be audited like a write. With `by_body`, the actions are in the body.
    """

    name: str
    template: str
    writes: bool
    by_body: bool


# Columns: methods, path below the section's prefixes, action, kind. A parameter is {name}, or {name:path} where slashes
# may be in it. Kinds: r reads; w writes; x changes nothing in MLflow, but calls out, spends, or hands out or shows what
# works as a credential, and so counts as a write.
# Rows with parameters are tried from top to bottom, in MLflow's own order.

# The UI's pages and files, and what stands beside the API. MLflow has no /index.html and no /favicon.ico, but browsers
# ask for them; its UI asks every server for users/current, which only the one with basic authentication has.
_ROOT = """
GET         /                                                                AccessUI                         r
GET         /index.html                                                      AccessUI                         r
GET         /favicon.ico                                                     AccessUI                         r
GET         /health                                                          AccessUI                         r
GET         /version                                                         AccessUI                         r
GET         /static-files/{path:path}                                        AccessUI                         r
GET         /build/{filename:path}                                           AccessUI                         r
GET,POST    /graphql                                                         GraphQL                          r
GET         /get-artifact                                                    GetArtifact                      r
GET         /model-versions/get-artifact                                     GetModelVersionArtifact          r
POST        /v1/traces                                                       LogTraces                        w
POST        /gateway/{endpoint_name}/mlflow/invocations                      InvokeGateway                    x
POST        /gateway/mlflow/v1/chat/completions                              InvokeGateway                    x
GET         /gateway/mlflow/v1/models                                        ListGatewayModels                r
POST        /gateway/openai/v1/chat/completions                              InvokeGateway                    x
POST        /gateway/openai/v1/embeddings                                    InvokeGateway                    x
POST        /gateway/openai/v1/responses                                     InvokeGateway                    x
POST        /gateway/openai/v1/responses/compact                             InvokeGateway                    x
POST        /gateway/anthropic/v1/messages                                   InvokeGateway                    x
POST        /gateway/typesafe/v1/systemone                                   InvokeGateway                    x
POST        /gateway/gemini/v1beta/models/{endpoint_name}:generateContent    InvokeGateway                    x
POST        /gateway/gemini/v1beta/models/{endpoint_name}:streamGenerateContent  InvokeGateway                x
POST        /gateway/proxy/{endpoint_name}/{path:path}                       InvokeGatewayProxy               x
"""

# MLflow's artifact proxy. It knows no runs: whoever may use it reaches the files of all of them.
_ARTIFACTS = """
GET         artifacts                                                        ListProxiedArtifacts             r
GET         artifacts/{artifact_path:path}                                   GetProxiedArtifact               r
PUT         artifacts/{artifact_path:path}                                   UploadProxiedArtifact            w
DELETE      artifacts/{artifact_path:path}                                   DeleteProxiedArtifact            w
GET         presigned/{artifact_path:path}                                   PresignArtifactDownload          x
POST        mpu/create/{artifact_path:path}                                  CreateMultipartUpload            w
POST        mpu/complete/{artifact_path:path}                                CompleteMultipartUpload          w
POST        mpu/abort/{artifact_path:path}                                   AbortMultipartUpload             w
"""

# Runs, experiments and the model registry as they are since MLflow 1, which served them below /preview/, too.
_TRACKING = """
POST        experiments/create                                               CreateExperiment                 w
GET,POST    experiments/search                                               SearchExperiments                r
GET         experiments/get                                                  GetExperiment                    r
GET         experiments/get-by-name                                          GetExperimentByName              r
POST        experiments/delete                                               DeleteExperiment                 w
POST        experiments/restore                                              RestoreExperiment                w
POST        experiments/update                                               UpdateExperiment                 w
POST        experiments/set-experiment-tag                                   SetExperimentTag                 w
POST        experiments/delete-experiment-tag                                DeleteExperimentTag              w
POST        experiments/search-datasets                                      SearchExperimentDatasets         r
POST        runs/create                                                      CreateRun                        w
POST        runs/create-promptlab-run                                        CreatePromptlabRun               w
POST        runs/update                                                      UpdateRun                        w
POST        runs/delete                                                      DeleteRun                        w
POST        runs/restore                                                     RestoreRun                       w
GET         runs/get                                                         GetRun                           r
POST        runs/search                                                      SearchRuns                       r
POST        runs/log-metric                                                  LogMetric                        w
POST        runs/log-parameter                                               LogParam                         w
POST        runs/log-batch                                                   LogBatch                         w
POST        runs/log-model                                                   LogModel                         w
POST        runs/log-inputs                                                  LogInputs                        w
POST        runs/outputs                                                     LogOutputs                       w
POST        runs/set-tag                                                     SetTag                           w
POST        runs/delete-tag                                                  DeleteTag                        w
GET         metrics/get-history                                              GetMetricHistory                 r
GET         metrics/get-history-bulk                                         GetMetricHistory                 r
GET         metrics/get-history-bulk-interval                                GetMetricHistory                 r
GET         artifacts/list                                                   ListArtifacts                    r
POST        artifacts/presigned-download-url                                 PresignArtifactDownload          x
POST        artifacts/presigned-upload-url                                   PresignArtifactUpload            w
POST        registered-models/create                                         CreateRegisteredModel            w
POST        registered-models/rename                                         RenameRegisteredModel            w
PATCH       registered-models/update                                         UpdateRegisteredModel            w
DELETE      registered-models/delete                                         DeleteRegisteredModel            w
GET         registered-models/get                                            GetRegisteredModel               r
GET         registered-models/search                                         SearchRegisteredModels           r
GET,POST    registered-models/get-latest-versions                            GetLatestModelVersions           r
POST        registered-models/set-tag                                        SetRegisteredModelTag            w
DELETE      registered-models/delete-tag                                     DeleteRegisteredModelTag         w
GET         registered-models/alias                                          GetModelVersionByAlias           r
POST        registered-models/alias                                          SetRegisteredModelAlias          w
DELETE      registered-models/alias                                          DeleteRegisteredModelAlias       w
POST        model-versions/create                                            CreateModelVersion               w
PATCH       model-versions/update                                            UpdateModelVersion               w
POST        model-versions/transition-stage                                  TransitionModelVersionStage      w
DELETE      model-versions/delete                                            DeleteModelVersion               w
GET         model-versions/get                                               GetModelVersion                  r
GET         model-versions/search                                            SearchModelVersions              r
GET         model-versions/get-download-uri                  GetDownloadURIForModelVersionArtifacts           r
POST        model-versions/set-tag                                           SetModelVersionTag               w
DELETE      model-versions/delete-tag                                        DeleteModelVersionTag            w
"""

# A webhook's URL is often its only credential (Slack, Teams): reading one is no plain Get.
_VERSION_2 = """
POST        logged-models                                                    CreateLoggedModel                w
POST        logged-models/search                                             SearchLoggedModels               r
GET         logged-models/{model_id}                                         GetLoggedModel                   r
PATCH       logged-models/{model_id}                                         FinalizeLoggedModel              w
DELETE      logged-models/{model_id}                                         DeleteLoggedModel                w
GET         logged-models/{model_id}/artifacts/directories                   ListLoggedModelArtifacts         r
GET         logged-models/{model_id}/artifacts/files                         GetLoggedModelArtifact           r
POST        logged-models/{model_id}/params                                  LogLoggedModelParams             w
PATCH       logged-models/{model_id}/tags                                    SetLoggedModelTags               w
DELETE      logged-models/{model_id}/tags/{tag_key}                          DeleteLoggedModelTag             w
GET         traces                                                           SearchTraces                     r
PATCH       traces/{request_id}                                              EndTrace                         w
GET         traces/{request_id}/info                                         GetTraceInfo                     r
POST        traces/link-prompts                                              LinkPromptsToTrace               w
POST        traces/link-to-run                                               LinkTracesToRun                  w
GET         get-online-trace-details                                         GetOnlineTraceDetails            r
GET         unified-traces                                                   SearchUnifiedTraces              r
POST        upload-artifact                                                  UploadArtifact                   w
GET,POST    gateway-proxy                                                    InvokeGateway                    x
GET         users/current                                                    AccessUI                         r
GET         webhooks                                                         InspectWebhooks                  x
POST        webhooks                                                         CreateWebhook                    w
GET         webhooks/{webhook_id}                                            InspectWebhook                   x
PATCH       webhooks/{webhook_id}                                            UpdateWebhook                    w
DELETE      webhooks/{webhook_id}                                            DeleteWebhook                    w
POST        webhooks/{webhook_id}/test                                       TestWebhook                      x
"""

# The same under both versions, though no MLflow serves all of them under both. In MLflow 3.0 some of these answer 501.
_BOTH_VERSIONS = """
GET         get-trace-artifact                                               GetTraceArtifact                 r
POST        traces                                                           StartTrace                       w
POST        traces/search                                                    SearchTraces                     r
POST        traces/delete-traces                                             DeleteTraces                     w
PATCH       traces/{trace_id}/tags                                           SetTraceTag                      w
DELETE      traces/{trace_id}/tags                                           DeleteTraceTag                   w
GET         traces/{trace_id}                                                GetTraceInfo                     r
POST        traces/{trace_id}/assessments                                    CreateAssessment                 w
GET         traces/{trace_id}/assessments/{assessment_id}                    GetAssessment                    r
PATCH       traces/{trace_id}/assessments/{assessment_id}                    UpdateAssessment                 w
DELETE      traces/{trace_id}/assessments/{assessment_id}                    DeleteAssessment                 w
"""

# Reading gateway secrets shows them masked, with names and settings: still no plain Get.
_VERSION_3 = """
GET         server-info                                                      GetServerInfo                    r
GET         ui-telemetry                                                     GetUiTelemetry                   r
POST        ui-telemetry                                                     LogUiTelemetry                   x
GET         traces/get                                                       GetTrace                         r
GET         traces/batchGet                                                  GetTraces                        r
POST        traces/batchGetInfos                                             GetTraceInfos                    r
POST        traces/metrics                                                   GetTraceMetrics                  r
POST        traces/calculate-filter-correlation                              GetTraceFilterCorrelation        r
POST        datasets/create                                                  CreateDataset                    w
GET,POST    datasets/search                                                  SearchDatasets                   r
GET         datasets/{dataset_id}                                            GetDataset                       r
DELETE      datasets/{dataset_id}                                            DeleteDataset                    w
PATCH       datasets/{dataset_id}/tags                                       SetDatasetTags                   w
DELETE      datasets/{dataset_id}/tags/{key}                                 DeleteDatasetTag                 w
GET         datasets/{dataset_id}/records                                    GetDatasetRecords                r
POST        datasets/{dataset_id}/records                                    UpdateDatasetRecords             w
DELETE      datasets/{dataset_id}/records                                    DeleteDatasetRecords             w
GET         datasets/{dataset_id}/experiment-ids                             GetDatasetExperiments            r
POST        datasets/{dataset_id}/add-experiments                            AddDatasetToExperiments          w
POST        datasets/{dataset_id}/remove-experiments                         RemoveDatasetFromExperiments     w
POST        scorers/register                                                 RegisterScorer                   w
GET         scorers/get                                                      GetScorer                        r
GET         scorers/list                                                     ListScorers                      r
GET         scorers/versions                                                 ListScorerVersions               r
DELETE      scorers/delete                                                   DeleteScorer                     w
GET         scorers/online-configs                                           GetScorerOnlineConfigs           r
PUT         scorers/online-config                                            UpdateScorerOnlineConfig         w
POST        scorer/invoke                                                    InvokeScorer                     x
POST        genai/evaluate/invoke                                            InvokeEvaluation                 x
POST        issues                                                           CreateIssue                      w
POST        issues/search                                                    SearchIssues                     r
POST        issues/invoke                                                    InvokeIssueDetection             x
GET         issues/{issue_id}                                                GetIssue                         r
PATCH       issues/{issue_id}                                                UpdateIssue                      w
POST        label-schemas/create                                             CreateLabelSchema                w
GET         label-schemas/get                                                GetLabelSchema                   r
GET         label-schemas/get-by-name                                        GetLabelSchemaByName             r
GET         label-schemas/list                                               ListLabelSchemas                 r
PATCH       label-schemas/update                                             UpdateLabelSchema                w
DELETE      label-schemas/delete                                             DeleteLabelSchema                w
POST        review-queues/create                                             CreateReviewQueue                w
GET         review-queues/get                                                GetReviewQueue                   r
GET         review-queues/get-by-name                                        GetReviewQueueByName             r
POST        review-queues/get-or-create-user                                 CreateUserReviewQueue            w
GET         review-queues/list                                               ListReviewQueues                 r
POST        review-queues/update                                             UpdateReviewQueue                w
POST        review-queues/delete                                             DeleteReviewQueue                w
POST        review-queues/items/add                                          AddReviewQueueItems              w
GET         review-queues/items/list                                         ListReviewQueueItems             r
POST        review-queues/items/remove                                       RemoveReviewQueueItems           w
POST        review-queues/items/set-status                                   SetReviewQueueItemStatus         w
POST        prompt-optimization/jobs                                         CreatePromptOptimizationJob      w
GET,POST    prompt-optimization/jobs/search                                  SearchPromptOptimizationJobs     r
GET         prompt-optimization/jobs/{job_id}                                GetPromptOptimizationJob         r
DELETE      prompt-optimization/jobs/{job_id}                                DeletePromptOptimizationJob      w
POST        prompt-optimization/jobs/{job_id}/cancel                         CancelPromptOptimizationJob      w
GET         jobs/{job_id}                                                    GetJob                           r
PATCH       jobs/cancel/{job_id}                                             CancelJob                        w
POST        demo/generate                                                    CreateDemo                       w
POST        demo/delete                                                      DeleteDemo                       w
GET         workspaces                                                       ListWorkspaces                   r
POST        workspaces                                                       CreateWorkspace                  w
GET         workspaces/{workspace_name}                                      GetWorkspace                     r
PATCH       workspaces/{workspace_name}                                      UpdateWorkspace                  w
DELETE      workspaces/{workspace_name}                                      DeleteWorkspace                  w
GET         gateway/supported-providers                                      ListGatewaySupportedProviders    r
GET         gateway/supported-models                                         ListGatewaySupportedModels       r
GET         gateway/provider-config                                          GetGatewayProviderConfig         r
POST        gateway/secrets/create                                           CreateGatewaySecret              w
GET         gateway/secrets/get                                              InspectGatewaySecret             x
GET         gateway/secrets/list                                             InspectGatewaySecrets            x
GET         gateway/secrets/config                                           InspectGatewaySecretsConfig      x
POST        gateway/secrets/update                                           UpdateGatewaySecret              w
DELETE      gateway/secrets/delete                                           DeleteGatewaySecret              w
POST        gateway/endpoints/create                                         CreateGatewayEndpoint            w
GET         gateway/endpoints/get                                            GetGatewayEndpoint               r
GET         gateway/endpoints/list                                           ListGatewayEndpoints             r
POST        gateway/endpoints/update                                         UpdateGatewayEndpoint            w
DELETE      gateway/endpoints/delete                                         DeleteGatewayEndpoint            w
POST        gateway/endpoints/set-tag                                        SetGatewayEndpointTag            w
DELETE      gateway/endpoints/delete-tag                                     DeleteGatewayEndpointTag         w
POST        gateway/endpoints/models/attach                                  AttachGatewayEndpointModel       w
POST        gateway/endpoints/models/detach                                  DetachGatewayEndpointModel       w
POST        gateway/endpoints/bindings/create                                CreateGatewayEndpointBinding     w
GET         gateway/endpoints/bindings/list                                  ListGatewayEndpointBindings      r
DELETE      gateway/endpoints/bindings/delete                                DeleteGatewayEndpointBinding     w
POST        gateway/model-definitions/create                                 CreateGatewayModelDefinition     w
GET         gateway/model-definitions/get                                    GetGatewayModelDefinition        r
GET         gateway/model-definitions/list                                   ListGatewayModelDefinitions      r
POST        gateway/model-definitions/update                                 UpdateGatewayModelDefinition     w
DELETE      gateway/model-definitions/delete                                 DeleteGatewayModelDefinition     w
POST        gateway/budgets/create                                           CreateGatewayBudget              w
GET         gateway/budgets/get                                              GetGatewayBudget                 r
GET         gateway/budgets/list                                             ListGatewayBudgets               r
GET         gateway/budgets/windows                                          ListGatewayBudgetWindows         r
POST        gateway/budgets/update                                           UpdateGatewayBudget              w
DELETE      gateway/budgets/delete                                           DeleteGatewayBudget              w
POST        gateway/guardrails/create                                        CreateGatewayGuardrail           w
GET         gateway/guardrails/get                                           GetGatewayGuardrail              r
GET         gateway/guardrails/list                                          ListGatewayGuardrails            r
GET         gateway/guardrails/list-for-endpoint                             ListGatewayEndpointGuardrails    r
POST        gateway/guardrails/add-to-endpoint                               AddGatewayGuardrailToEndpoint    w
DELETE      gateway/guardrails/remove-from-endpoint                    RemoveGatewayGuardrailFromEndpoint     w
PATCH       gateway/guardrails/update-config                                 UpdateGatewayGuardrailConfig     w
DELETE      gateway/guardrails/delete                                        DeleteGatewayGuardrail           w
GET         assistant/config                                                 GetAssistantConfig               r
PUT         assistant/config                                                 UpdateAssistantConfig            w
GET         assistant/providers                                              ListAssistantProviders           r
GET         assistant/providers/{provider}/health                            InvokeAssistantProvider          x
GET         assistant/providers/{provider}/models                            InvokeAssistantProvider          x
POST        assistant/message                                                InvokeAssistant                  x
GET         assistant/sessions/{session_id}/stream                           InvokeAssistant                  x
PATCH       assistant/sessions/{session_id}                                  UpdateAssistantSession           w
POST        assistant/sessions/{session_id}/permission                       InvokeAssistant                  x
POST        assistant/sessions/{session_id}/tool-result                      InvokeAssistant                  x
POST        assistant/skills/install                                         InstallAssistantSkills           w
GET         mcp-servers                                                      SearchMcpServers                 r
POST        mcp-servers                                                      CreateMcpServer                  w
GET         mcp-servers/endpoints                                            SearchMcpEndpoints               r
POST        mcp-servers/{name:path}/versions/{version:path}/tags             SetMcpServerVersionTag           w
DELETE      mcp-servers/{name:path}/versions/{version:path}/tags/{key:path}  DeleteMcpServerVersionTag        w
GET         mcp-servers/{name:path}/versions/{version:path}                  GetMcpServerVersion              r
PATCH       mcp-servers/{name:path}/versions/{version:path}                  UpdateMcpServerVersion           w
DELETE      mcp-servers/{name:path}/versions/{version:path}                  DeleteMcpServerVersion           w
POST        mcp-servers/{name:path}/versions                                 CreateMcpServerVersion           w
GET         mcp-servers/{name:path}/versions                                 SearchMcpServerVersions          r
POST        mcp-servers/{name:path}/endpoints                                CreateMcpEndpoint                w
GET         mcp-servers/{name:path}/endpoints/{endpoint_id}                  GetMcpEndpoint                   r
PATCH       mcp-servers/{name:path}/endpoints/{endpoint_id}                  UpdateMcpEndpoint                w
DELETE      mcp-servers/{name:path}/endpoints/{endpoint_id}                  DeleteMcpEndpoint                w
GET         mcp-servers/{name:path}/endpoints                                SearchMcpEndpoints               r
POST        mcp-servers/{name:path}/tags                                     SetMcpServerTag                  w
DELETE      mcp-servers/{name:path}/tags/{key:path}                          DeleteMcpServerTag               w
POST        mcp-servers/{name:path}/aliases                                  SetMcpServerAlias                w
GET         mcp-servers/{name:path}/aliases/{alias:path}                     GetMcpServerVersionByAlias       r
DELETE      mcp-servers/{name:path}/aliases/{alias:path}                     DeleteMcpServerAlias             w
GET         mcp-servers/{name:path}                                          GetMcpServer                     r
PATCH       mcp-servers/{name:path}                                          UpdateMcpServer                  w
DELETE      mcp-servers/{name:path}                                          DeleteMcpServer                  w
"""

_JOBS = """
POST        jobs/                                                            SubmitJob                        w
POST        jobs/search                                                      SearchJobs                       r
GET         jobs/{job_id}                                                    GetJob                           r
PATCH       jobs/cancel/{job_id}                                             CancelJob                        w
"""

# MLflow's own slip: it lacks a slash here, and answers 501.
_MISSPELT = """
POST        mlflow/experiments/search-datasets                               SearchExperimentDatasets         r
"""

# MLflow serves its UI under /ajax-api/ what clients get under /api/. The few routes that it has under one of them only
# are known here under both: the other is a 404 of MLflow's, not a different action.
_SECTIONS = (
    (_ROOT, ("",)),
    (_ARTIFACTS, ("/api/2.0/mlflow-artifacts/", "/ajax-api/2.0/mlflow-artifacts/")),
    (_TRACKING, ("/api/2.0/mlflow/", "/ajax-api/2.0/mlflow/")),
    (_TRACKING, ("/api/2.0/preview/mlflow/", "/ajax-api/2.0/preview/mlflow/")),
    (_VERSION_2, ("/api/2.0/mlflow/", "/ajax-api/2.0/mlflow/")),
    (
        _BOTH_VERSIONS,
        ("/api/2.0/mlflow/", "/ajax-api/2.0/mlflow/", "/api/3.0/mlflow/", "/ajax-api/3.0/mlflow/"),
    ),
    (_VERSION_3, ("/api/3.0/mlflow/", "/ajax-api/3.0/mlflow/")),
    (_JOBS, ("/api/3.0/", "/ajax-api/3.0/")),
    (_MISSPELT, ("/api/2.0", "/ajax-api/2.0")),
)

# One expression with a group per rule, and the rules' actions.
_Patterns = tuple[re.Pattern[str], tuple[Action, ...]]

_UNKNOWN_LENGTH = 200
_PARAMETER = re.compile(r"\{\w+(:path)?\}")

# What selects the few patterns that a path is tried against: `/api/3.0/mlflow/`, `/gateway/`.
_HEAD = re.compile(r"/(?:(?:ajax-)?api/[^/]+/)?[^/]+/")

# Left in a decoded path, these are read differently by different servers: empty and dot segments, `;`, escapes that a
# second decoding would turn into something else, and what the proxy's canonical form cannot contain.
_AMBIGUOUS = re.compile(r"//|/\.{1,2}(?:/|\Z)|;|%25[0-9A-Fa-f]{2}|%(?![0-9A-F]{2})|%(?:[01][0-9A-F]|2[EF]|5C|7F)")


def action_of(method: str, path: str) -> Action:
    """The action of a request with this method and canonical path (transform.py), without the proxy's `/t/<target>`."""
    found = _STATIC.get((method, path))
    if found is not None:
        return found
    return _with_parameters(method, path) or Action(
        f"Unknown:{method} {path[:_UNKNOWN_LENGTH]}", "unknown", writes=True, by_body=False
    )


def _with_parameters(method: str, path: str) -> Action | None:
    if "%" in path or ";" in path or "//" in path or "/." in path:
        path = path.replace("%2F", "/").replace("%3A", ":")
        if _AMBIGUOUS.search(path):
            return None
        found = _STATIC.get((method, path))
        if found is not None:
            return found
    head = _HEAD.match(path)
    patterns = _PATTERNS.get((method, head[0])) if head else None
    if head is None or patterns is None or path.endswith("/"):
        return None
    match = patterns[0].fullmatch(path, head.end())
    return patterns[1][match.lastindex - 1] if match and match.lastindex else None


def routes() -> Iterator[tuple[str, str, Action]]:
    """Every method, rule and action of the table, in its order. HEAD is as GET to MLflow."""
    for text, prefixes in _SECTIONS:
        for methods, path, name, kind in (row.split() for row in text.split("\n") if row):
            for prefix in prefixes:
                rule = prefix + path
                action = Action(name, rule.replace(":path}", "}"), kind != "r", name == "GraphQL")
                for method in methods.split(","):
                    yield method, rule, action
                    if method == "GET":
                        yield "HEAD", rule, action


def _pattern(rule: str) -> str:
    """A rule as a regular expression in one group: parameters as Werkzeug and Starlette match them.

    Before a second {name:path}, the first place where the text in between occurs will do, whatever comes later. Not
    trying the others keeps the time linear in the length of the path.
    """
    first, *rest = _PARAMETER.split(rule)
    kinds, texts = rest[::2], [re.escape(text) for text in rest[1::2]]
    parts = [re.escape(first)]
    for index, (kind, text) in enumerate(zip(kinds, texts, strict=True)):
        if kind is None:
            parts.append(f"[^/]+{text}")
        else:
            parts.append(f"(?>.+?{text})" if ":path" in kinds[index + 1 :] else f".+{text}")
    return f"({''.join(parts)})"


def _tables() -> tuple[dict[tuple[str, str], Action], dict[tuple[str, str], _Patterns]]:
    """Routes without parameters by method and path; those with, by method and head."""
    static: dict[tuple[str, str], Action] = {}
    rules: dict[tuple[str, str], dict[str, Action]] = {}
    for method, rule, action in routes():
        head = _HEAD.match(rule)
        if "{" in rule and head is not None:
            rules.setdefault((method, head[0]), {})[_pattern(rule[head.end() :])] = action
        else:
            static[method, rule] = action
    patterns = {key: (re.compile("|".join(found)), tuple(found.values())) for key, found in rules.items()}
    return static, patterns


_STATIC, _PATTERNS = _tables()


# Every action that a route of MLflow may need.
NAMES = frozenset(action.name for _, _, action in routes())
