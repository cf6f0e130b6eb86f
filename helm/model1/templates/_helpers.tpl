{{/* Names and labels, and nothing else. */}}

{{/* Of the RayService, which gives its Ray clusters names 6 characters longer and Services of
theirs 10 more: at most 40, so that all of them fit the 63 of a DNS label. */}}
{{- define "model1.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride -}}
{{- else if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* What a Service or a policy finds this release's pods by. */}}
{{- define "model1.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "model1.labels" -}}
{{ include "model1.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | quote }}
{{- end -}}

{{- define "model1.image" -}}
{{- with .Values.image -}}
{{- if .digest -}}
{{ .repository }}@{{ .digest }}
{{- else -}}
{{ .repository }}:{{ .tag | default $.Chart.AppVersion }}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* The Secret with Ray's token and, where Valkey is ours, its password. */}}
{{- define "model1.secretName" -}}
{{- .Values.auth.secretName | default (printf "%s-auth" (include "model1.fullname" .)) -}}
{{- end -}}

{{- define "model1.redisSecretName" -}}
{{- .Values.redis.passwordSecret.name | default (include "model1.secretName" .) -}}
{{- end -}}

{{- define "model1.tlsSecretName" -}}
{{- .Values.tls.secretName | default (printf "%s-tls" (include "model1.fullname" .)) -}}
{{- end -}}

{{/* redis://HOST:PORT of the given Redis, or of our own Valkey. */}}
{{- define "model1.redisUrl" -}}
{{- .Values.redis.url | default (printf "redis://%s-valkey:6379" (include "model1.fullname" .)) -}}
{{- end -}}
