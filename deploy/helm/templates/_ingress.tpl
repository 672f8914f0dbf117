{{/* One Ingress. Takes root, name, annotations, and backends: names of services, or of rules in the annotations. */}}
{{- define "mlflow-proxy.ingress" -}}
{{- $root := .root -}}
{{- $ingress := $root.Values.ingress -}}
apiVersion: networking.k8s.io/v1
kind: Ingress
metadata:
  name: {{ .name }}
  labels:
    {{- include "mlflow-proxy.labels" $root | nindent 4 }}
  annotations:
    {{- merge (deepCopy $ingress.annotations) .annotations | toYaml | nindent 4 }}
spec:
  {{- $class := default (ternary "" $ingress.controller (eq $ingress.controller "other")) $ingress.className }}
  {{- with $class }}
  ingressClassName: {{ . }}
  {{- end }}
  {{- with $ingress.tls }}
  tls:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  rules:
    {{- range $host := $ingress.hosts }}
    - host: {{ $host | quote }}
      http:
        paths:
          {{- range $backend := $.backends }}
          - path: /
            pathType: Prefix
            backend:
              service:
                name: {{ $backend }}
                port:
                  name: {{ ternary "use-annotation" "http" (hasPrefix "with-" $backend) }}
          {{- end }}
    {{- end }}
{{- end -}}

{{/* For the AWS Load Balancer Controller. */}}
{{- define "mlflow-proxy.albAnnotations" -}}
{{- $alb := .Values.ingress.alb -}}
{{- $drain := add .Values.shutdownDelay (include "mlflow-proxy.drainSeconds" .) -}}
{{- $attributes := merge (deepCopy $alb.attributes) (dict
  "idle_timeout.timeout_seconds" (include "mlflow-proxy.loadBalancerIdle" .)
  "routing.http.drop_invalid_header_fields.enabled" "true"
  "routing.http.desync_mitigation_mode" "strictest"
  "routing.http.preserve_host_header.enabled" "true"
) -}}
{{- $pairs := list -}}
{{- range $key, $value := $attributes -}}
{{- $pairs = append $pairs (printf "%s=%v" $key $value) -}}
{{- end -}}
alb.ingress.kubernetes.io/scheme: {{ $alb.scheme }}
# Straight to the pods: no second hop through a node, and a pod that goes is known by its address.
alb.ingress.kubernetes.io/target-type: ip
alb.ingress.kubernetes.io/listen-ports: '[{"HTTP": 80}, {"HTTPS": 443}]'
alb.ingress.kubernetes.io/ssl-redirect: "443"
alb.ingress.kubernetes.io/ssl-policy: {{ $alb.sslPolicy }}
alb.ingress.kubernetes.io/backend-protocol: {{ include "mlflow-proxy.scheme" . | upper }}
# Health, not readiness: one throttled target must not take all pods away.
alb.ingress.kubernetes.io/healthcheck-protocol: {{ include "mlflow-proxy.scheme" . | upper }}
alb.ingress.kubernetes.io/healthcheck-path: /-/health
alb.ingress.kubernetes.io/healthcheck-interval-seconds: "10"
alb.ingress.kubernetes.io/healthcheck-timeout-seconds: "5"
alb.ingress.kubernetes.io/healthy-threshold-count: "2"
alb.ingress.kubernetes.io/unhealthy-threshold-count: "3"
alb.ingress.kubernetes.io/success-codes: "200"
alb.ingress.kubernetes.io/load-balancer-attributes: {{ join "," $pairs | quote }}
alb.ingress.kubernetes.io/target-group-attributes: {{ printf "deregistration_delay.timeout_seconds=%d,load_balancing.algorithm.type=least_outstanding_requests" $drain | quote }}
{{- with $alb.certificateArns }}
alb.ingress.kubernetes.io/certificate-arn: {{ join "," . | quote }}
{{- end }}
{{- with $alb.subnets }}
alb.ingress.kubernetes.io/subnets: {{ join "," . | quote }}
{{- end }}
{{- with $alb.securityGroups }}
alb.ingress.kubernetes.io/security-groups: {{ join "," . | quote }}
alb.ingress.kubernetes.io/manage-backend-security-group-rules: "true"
{{- end }}
{{- with $alb.inboundCidrs }}
alb.ingress.kubernetes.io/inbound-cidrs: {{ join "," . | quote }}
{{- end }}
{{- with $alb.wafAclArn }}
alb.ingress.kubernetes.io/wafv2-acl-arn: {{ . | quote }}
{{- end }}
{{- if or $alb.group $alb.oidc.enabled }}
alb.ingress.kubernetes.io/group.order: {{ $alb.groupOrder | int | quote }}
alb.ingress.kubernetes.io/group.name: {{ default (printf "%s.%s" .Release.Namespace (include "mlflow-proxy.fullname" .) | trunc 63 | trimSuffix "-") $alb.group | quote }}
{{- end }}
{{- end -}}

{{/* Sign-in by the ALB. */}}
{{- define "mlflow-proxy.oidcAnnotations" -}}
{{- $oidc := .Values.ingress.alb.oidc -}}
alb.ingress.kubernetes.io/auth-type: oidc
alb.ingress.kubernetes.io/auth-idp-oidc: {{ dict "issuer" $oidc.issuer "authorizationEndpoint" $oidc.authorizationEndpoint "tokenEndpoint" $oidc.tokenEndpoint "userInfoEndpoint" $oidc.userInfoEndpoint "secretName" $oidc.existingSecret | toJson | quote }}
alb.ingress.kubernetes.io/auth-scope: {{ $oidc.scope | quote }}
alb.ingress.kubernetes.io/auth-session-timeout: {{ $oidc.sessionTimeout | int | quote }}
{{- end -}}

{{/*
For ingress-nginx (nginx.ingress.kubernetes.io) and F5's NGINX Ingress Controller (nginx.org); each ignores the other's.
Bodies and answers stream; the proxy bounds bodies itself, and its 413 is one that MLflow's clients understand.
*/}}
{{- define "mlflow-proxy.nginxAnnotations" -}}
{{- if eq .Values.ingress.controller "nginx" -}}
{{- $idle := include "mlflow-proxy.loadBalancerIdle" . -}}
{{- $https := eq (include "mlflow-proxy.scheme" .) "https" -}}
nginx.ingress.kubernetes.io/force-ssl-redirect: "true"
nginx.ingress.kubernetes.io/backend-protocol: {{ include "mlflow-proxy.scheme" . | upper }}
nginx.ingress.kubernetes.io/proxy-buffering: "off"
nginx.ingress.kubernetes.io/proxy-request-buffering: "off"
nginx.ingress.kubernetes.io/proxy-body-size: "0"
nginx.ingress.kubernetes.io/proxy-connect-timeout: "5"
nginx.ingress.kubernetes.io/proxy-read-timeout: {{ $idle | quote }}
nginx.ingress.kubernetes.io/proxy-send-timeout: {{ $idle | quote }}
# Another pod is tried only where none has got the request.
nginx.ingress.kubernetes.io/proxy-next-upstream: error
nginx.ingress.kubernetes.io/proxy-next-upstream-tries: "2"
nginx.org/redirect-to-https: "True"
nginx.org/proxy-buffering: "False"
nginx.org/client-max-body-size: "0"
nginx.org/proxy-connect-timeout: 5s
nginx.org/proxy-read-timeout: {{ $idle }}s
nginx.org/proxy-send-timeout: {{ $idle }}s
{{- if $https }}
nginx.org/ssl-services: {{ include "mlflow-proxy.fullname" . | quote }}
{{- end }}
{{- else -}}
{}
{{- end -}}
{{- end -}}
