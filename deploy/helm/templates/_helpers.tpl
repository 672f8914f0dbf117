{{/* Names and labels. */}}
{{- define "mlflow-proxy.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{- define "mlflow-proxy.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 52 | trimSuffix "-" -}}
{{- else if contains (include "mlflow-proxy.name" .) .Release.Name -}}
{{- .Release.Name | trunc 52 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "mlflow-proxy.name" .) | trunc 52 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "mlflow-proxy.selectorLabels" -}}
app.kubernetes.io/name: {{ include "mlflow-proxy.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: proxy
{{- end -}}

{{- define "mlflow-proxy.labels" -}}
{{ include "mlflow-proxy.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* Labels of the pod of `helm test`: the proxy's selectors must not match it. */}}
{{- define "mlflow-proxy.testLabels" -}}
app.kubernetes.io/name: {{ include "mlflow-proxy.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: test
{{- end -}}

{{- define "mlflow-proxy.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "mlflow-proxy.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- define "mlflow-proxy.image" -}}
{{- if .Values.image.digest -}}
{{- printf "%s@%s" .Values.image.repository .Values.image.digest -}}
{{- else -}}
{{- printf "%s:%s" .Values.image.repository (default .Chart.AppVersion .Values.image.tag) -}}
{{- end -}}
{{- end -}}

{{/* What the pods speak. */}}
{{- define "mlflow-proxy.scheme" -}}
{{- ternary "https" "http" (not (empty .Values.tls.existingSecret)) -}}
{{- end -}}

{{- define "mlflow-proxy.port" -}}
{{- dig "server" "port" 8080 .Values.config | int -}}
{{- end -}}

{{/* Seconds in which requests under way may finish, rounded up. */}}
{{- define "mlflow-proxy.drainSeconds" -}}
{{- dig "server" "drain_timeout" 30 .Values.config | float64 | ceil | int -}}
{{- end -}}

{{/* Seconds that a load balancer waits for an answer, and keeps an unused connection. */}}
{{- define "mlflow-proxy.loadBalancerIdle" -}}180{{- end -}}

{{/* Names by which the proxy may be called: the configured ones, the ingress' hosts, the service's. As a JSON list. */}}
{{- define "mlflow-proxy.hosts" -}}
{{- $name := include "mlflow-proxy.fullname" . -}}
{{- $hosts := dig "server" "allowed_hosts" list .Values.config -}}
{{- if .Values.ingress.enabled -}}
{{- $hosts = concat $hosts .Values.ingress.hosts -}}
{{- end -}}
{{- $service := printf "%s.%s" $name .Release.Namespace -}}
{{- concat $hosts (list $name $service (printf "%s.svc" $service) (printf "%s.svc.cluster.local" $service)) | uniq | toJson -}}
{{- end -}}

{{/*
proxy.toml: the configuration of the values, with what follows from the rest of them.
*/}}
{{- define "mlflow-proxy.toml" -}}
{{- $config := deepCopy .Values.config -}}
{{- $server := deepCopy (default dict $config.server) -}}
{{- $_ := set $server "allowed_hosts" (include "mlflow-proxy.hosts" . | fromJsonArray) -}}
{{- if and .Values.ingress.enabled (not $server.public_url) -}}
{{- $_ := set $server "public_url" (printf "https://%s" (first .Values.ingress.hosts)) -}}
{{- end -}}
{{- if .Values.tls.existingSecret -}}
{{- $server = merge (dict "tls_certificate" "/etc/mlflow-proxy/tls/tls.crt" "tls_key" "/etc/mlflow-proxy/tls/tls.key") $server -}}
{{- end -}}
{{- $_ := set $config "server" $server -}}
{{- if .Values.keys.existingSecret -}}
{{- $access := merge (dict "keys_file" (printf "/etc/mlflow-proxy/keys/%s" .Values.keys.secretKey)) (default dict $config.access) -}}
{{- $_ := set $config "access" $access -}}
{{- end -}}
{{- if .Values.signIn.existingSecret -}}
{{- $files := dict "session_secret_file" "/etc/mlflow-proxy/sign-in/session-secret" -}}
{{- if .Values.signIn.clientSecretKey -}}
{{- $_ := set $files "client_secret_file" "/etc/mlflow-proxy/sign-in/client-secret" -}}
{{- end -}}
{{- $_ := set $config "oidc" (merge $files (default dict $config.oidc)) -}}
{{- end -}}
{{- if .Values.caBundle.configMap -}}
{{- $bundle := dict "ca_bundle" "/etc/mlflow-proxy/ca/ca.pem" -}}
{{- $targets := list -}}
{{- range $config.targets -}}
{{- $targets = append $targets (merge (deepCopy .) $bundle) -}}
{{- end -}}
{{- $_ := set $config "targets" $targets -}}
{{- if dig "oidc" "issuer" "" $config -}}
{{- $_ := set $config "oidc" (merge (deepCopy $config.oidc) $bundle) -}}
{{- end -}}
{{- end -}}
{{- range $name, $value := $config }}
{{- if kindIs "slice" $value }}
{{- range $table := $value }}
[[{{ $name }}]]
{{- include "mlflow-proxy.tomlOptions" $table }}
{{ end }}
{{- else if $value }}
[{{ $name }}]
{{- include "mlflow-proxy.tomlOptions" $value }}
{{ end }}
{{- end }}
{{- end -}}

{{/*
The lines of one table. Texts, numbers, truth values and lists of texts are written in TOML as in JSON; Helm's own
toToml makes floats of whole numbers, in other ways from one version to the next.
*/}}
{{- define "mlflow-proxy.tomlOptions" -}}
{{- range $option, $value := . }}
{{- if kindIs "map" $value }}
{{- $pairs := list }}
{{- range $key, $text := $value }}
{{- $pairs = append $pairs (printf "%s = %s" (toJson $key) (toJson $text)) }}
{{- end }}
{{ $option }} = { {{- join ", " $pairs -}} }
{{- else }}
{{ $option }} = {{ toJson $value }}
{{- end }}
{{- end }}
{{- end -}}

{{/* Whether any way of identifying callers is configured, or the risk is named: "true" or nothing. */}}
{{- define "mlflow-proxy.identifies" -}}
{{- $config := .Values.config -}}
{{- if or .Values.keys.existingSecret (dig "access" "keys_file" "" $config) (dig "access" "keys_secret" "" $config) (dig "oidc" "issuer" "" $config) (dig "load_balancer" "arn" "" $config) (dig "certificates" "subject_header" "" $config) -}}
true
{{- end -}}
{{- end -}}

{{/* All mistakes that a schema cannot see, together. Renders nothing, or ends the command. */}}
{{- define "mlflow-proxy.mistakes" -}}
{{- $config := .Values.config -}}
{{- $wrong := list -}}
{{- if not .Values.image.repository -}}
{{- $wrong = append $wrong "image.repository: is required; name the repository that you pushed the image of deploy/container to" -}}
{{- end -}}
{{- if eq .Values.image.tag "latest" -}}
{{- $wrong = append $wrong "image.tag: latest may be another image on each node, and cannot be rolled back; name a version, or a digest" -}}
{{- end -}}
{{- if not $config.targets -}}
{{- $wrong = append $wrong "config.targets: is required; add an entry with name and arn of a tracking server or MLflow App" -}}
{{- end -}}
{{- $anonymous := eq (dig "access" "anonymous" "" $config) "i-understand" -}}
{{- if not (or (include "mlflow-proxy.identifies" .) $anonymous) -}}
{{- $wrong = append $wrong "config: no way to identify callers, so the proxy would not start; set keys.existingSecret, config.access.keys_secret, config.oidc or another of docs/access.md, or name the risk with config.access.anonymous: i-understand" -}}
{{- end -}}
{{- if and (include "mlflow-proxy.identifies" .) (not $config.roles) -}}
{{- $wrong = append $wrong "config.roles: is required, as every identified caller would be refused without; add an entry with name, targets and allow" -}}
{{- end -}}
{{- if and (dig "oidc" "client_id" "" $config) (not .Values.signIn.existingSecret) (not (dig "oidc" "session_secret_file" "" $config)) -}}
{{- $wrong = append $wrong "signIn.existingSecret: is required with config.oidc.client_id; without a common secret each pod would sign out the other pods' users" -}}
{{- end -}}
{{- if and .Values.signIn.existingSecret (not (dig "oidc" "client_id" "" $config)) -}}
{{- $wrong = append $wrong "signIn.existingSecret: counts only with config.oidc.client_id; add that or remove this" -}}
{{- end -}}
{{- if and (dig "server" "tls_certificate" "" $config) (not .Values.tls.existingSecret) -}}
{{- $wrong = append $wrong "config.server.tls_certificate: no such file would be in the pods; put certificate and key in a Secret, and name it in tls.existingSecret" -}}
{{- end -}}
{{- if .Values.ingress.enabled -}}
{{- if not .Values.ingress.hosts -}}
{{- $wrong = append $wrong "ingress.hosts: is required with ingress.enabled; name the host that callers use" -}}
{{- end -}}
{{- if not (dig "server" "trusted_proxies" "" $config) -}}
{{- $wrong = append $wrong "config.server.trusted_proxies: is required with ingress.enabled; name the networks of the load balancer (ALB: its subnets, nginx: the pods' network), else all callers count as one address, and one who fails to sign in locks out all" -}}
{{- end -}}
{{- else if .Values.ingress.alb.oidc.enabled -}}
{{- $wrong = append $wrong "ingress.alb.oidc.enabled: counts only with ingress.enabled" -}}
{{- end -}}
{{- if and .Values.ingress.alb.oidc.enabled (ne .Values.ingress.controller "alb") -}}
{{- $wrong = append $wrong "ingress.alb.oidc.enabled: counts only with ingress.controller: alb" -}}
{{- end -}}
{{- if and (dig "certificates" "subject_header" "" $config) (not .Values.networkPolicy.enabled) -}}
{{- $wrong = append $wrong "networkPolicy.enabled: is required with config.certificates, as any pod in a trusted network could claim any certificate; let in the ingress alone" -}}
{{- end -}}
{{- if and .Values.autoscaling.enabled (gt (int .Values.autoscaling.minReplicas) (int .Values.autoscaling.maxReplicas)) -}}
{{- $wrong = append $wrong "autoscaling.minReplicas: is more than maxReplicas" -}}
{{- end -}}
{{- if and .Values.autoscaling.enabled (not (dig "requests" "cpu" "" .Values.resources)) -}}
{{- $wrong = append $wrong "resources.requests.cpu: is required with autoscaling, which goes by its share" -}}
{{- end -}}
{{- if and .Values.networkPolicy.enabled (not .Values.networkPolicy.ingressFrom) -}}
{{- $wrong = append $wrong "networkPolicy.ingressFrom: is empty, so no caller could reach the proxy; name the ingress controller's pods, or the ALB's subnets as ipBlock" -}}
{{- end -}}
{{- if and .Values.networkPolicy.enabled .Values.limitsStorage.existingSecret (not .Values.networkPolicy.storageTo) -}}
{{- $wrong = append $wrong "networkPolicy.storageTo: is empty, so the proxy could not reach the storage of limitsStorage; name it" -}}
{{- end -}}
{{- if and .Values.serviceMonitor.enabled (not .Values.serviceMonitor.keySecret) (include "mlflow-proxy.identifies" .) -}}
{{- $wrong = append $wrong "serviceMonitor.keySecret: is required; make an API key of a role that allows proxy:GetMetrics, and put it in a Secret" -}}
{{- end -}}
{{- if and .Values.tests.url (not .Values.tests.keySecret) (include "mlflow-proxy.identifies" .) -}}
{{- $wrong = append $wrong "tests.keySecret: is required with tests.url; put the API key of a reader in a Secret" -}}
{{- end -}}
{{- if $wrong -}}
{{- fail (printf "%d mistake%s in the values:\n  ✗ %s" (len $wrong) (ternary "" "s" (eq (len $wrong) 1)) (join "\n  ✗ " $wrong)) -}}
{{- end -}}
{{- end -}}
