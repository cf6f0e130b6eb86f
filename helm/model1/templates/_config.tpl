{{/* The runtime config: values' `settings`, and what follows from the rest of the values. */}}
{{- define "model1.config" -}}
{{- $config := include "model1.snaked" .Values.settings | fromJson -}}

{{- with include "model1.modelPath" . -}}{{- $_ := set $config.model "path" . -}}{{- end -}}
{{- $_ := set $config "topology" (dict "expert_groups" .Values.experts.groups "gateways" "per_node") -}}
{{- $_ := set $config.gateway "host" "0.0.0.0" -}}
{{- $_ := set $config.gateway "port" 50051 -}}
{{- $_ := set $config.gateway "metrics_host" "0.0.0.0" -}}
{{- $_ := set $config.gateway "metrics_port" 9464 -}}
{{- if .Values.kv.disk.type -}}
{{- $_ := set $config.kv "disk_path" "/var/lib/model1/kv" -}}
{{- end -}}
{{- if not .Values.redis.coldTier -}}
{{- $_ := set $config.kv "redis" "off" -}}
{{- else -}}
{{- $_ := set $config.kv "redis" (include "model1.redisUrl" .) -}}
{{- if include "model1.redisHasPassword" . -}}
{{- $_ := set $config.kv "redis_password_file" "/etc/model1/redis/password" -}}
{{- end -}}
{{- if .Values.redis.caSecret.name -}}
{{- $_ := set $config.kv "redis_ca_file" "/etc/model1/redis-ca/ca.crt" -}}
{{- end -}}
{{- end -}}
{{- $_ := set $config.cluster "ray_address" "auto" -}}
{{- if .Values.tls.enabled -}}
{{- $_ := set $config "tls" (dict "cert_file" "/etc/model1/tls/tls.crt" "key_file" "/etc/model1/tls/tls.key" "ca_file" "/etc/model1/tls/ca.crt" "server_name" .Values.tls.serverName) -}}
{{- $_ := set $config.gateway "require_client_certificate" .Values.tls.requireClientCertificate -}}
{{- end -}}
{{- if .Values.auth.tokens.enabled -}}
{{- $_ := set $config.gateway "tokens_file" "/etc/model1/tokens/tokens" -}}
{{- end -}}
{{- range $section, $keys := $config }}
{{- if $keys }}
{{ $section }}:
{{- range $key, $value := $keys }}
  {{ $key }}: {{ toJson $value }}
{{- end }}
{{- end }}
{{- end }}
{{- end -}}

{{/* Where the checkpoint is mounted; empty: the one inside the image's package. */}}
{{- define "model1.modelPath" -}}
{{- with .Values.model -}}
{{- if eq .source "path" -}}
{{ .path }}
{{- else if ne .source "shipped" -}}
/models{{ with .subPath }}/{{ . }}{{ end }}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* "true", or empty. */}}
{{- define "model1.redisHasPassword" -}}
{{- if or (not .Values.redis.url) .Values.redis.passwordSecret.name -}}true{{- end -}}
{{- end -}}

{{- define "model1.usesRedis" -}}
{{- if or .Values.redis.coldTier .Values.redis.gcsFaultTolerance -}}true{{- end -}}
{{- end -}}

{{/* "true" where the chart runs the Valkey itself. */}}
{{- define "model1.ownValkey" -}}
{{- if and (include "model1.usesRedis" .) (not .Values.redis.url) -}}true{{- end -}}
{{- end -}}

{{/* A map as JSON: keys of values are camelCase, those of the program snake_case. What is null is
left out, and so the program's default. */}}
{{- define "model1.snaked" -}}
{{- $snaked := dict -}}
{{- range $key, $value := . -}}
{{- if kindIs "map" $value -}}
{{- $_ := set $snaked ($key | snakecase) (include "model1.snaked" $value | fromJson) -}}
{{- else if not (kindIs "invalid" $value) -}}
{{- $_ := set $snaked ($key | snakecase) $value -}}
{{- end -}}
{{- end -}}
{{- toJson $snaked -}}
{{- end -}}
