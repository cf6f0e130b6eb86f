{{/* What the pods of the Ray cluster have in common. Knows no role by itself: rayservice.yaml says
what each has. */}}

{{/* Ray would take any free ports; policies need to name them. */}}
{{- define "model1.rayPortParams" -}}
node-manager-port: "6380"
object-manager-port: "6381"
runtime-env-agent-port: "6382"
dashboard-agent-grpc-port: "6383"
dashboard-agent-listen-port: "52365"
metrics-export-port: "8080"
min-worker-port: "20000"
max-worker-port: "20999"
# Nothing of ours travels through the object store: the least that Ray accepts.
object-store-memory: "83886080"
{{- end -}}

{{/* The same ports, as a policy lists them: every node of a Ray cluster talks to every other. */}}
{{- define "model1.rayPorts" -}}
- {port: 6380, endPort: 6383, protocol: TCP}
- {port: 8080, protocol: TCP}
- {port: 20000, endPort: 20999, protocol: TCP}
- {port: 52365, protocol: TCP}
{{- end -}}

{{- define "model1.podSecurityContext" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- define "model1.containerSecurityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end -}}

{{/* Labels and annotations of a pod template. (dict "root" $ "component" NAME "group" VALUES) */}}
{{- define "model1.podMetadata" -}}
labels:
  {{- include "model1.selector" .root | nindent 2 }}
  app.kubernetes.io/component: {{ .component }}
  {{- with .group.podLabels }}{{ toYaml . | nindent 2 }}{{ end }}
annotations:
  # Another config is another Ray cluster: KubeRay starts it beside the old one and moves over.
  model1/config-sha256: {{ include "model1.config" .root | sha256sum }}
  {{- with .group.podAnnotations }}{{ toYaml . | nindent 2 }}{{ end }}
{{- end -}}

{{/* Where a pod may run. The same argument. */}}
{{- define "model1.scheduling" -}}
{{- with .group.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .group.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .group.affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .group.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- if .group.topologySpread }}
topologySpreadConstraints:
  {{- range .group.topologySpread }}
  - {{- toYaml . | nindent 4 }}
    labelSelector:
      matchLabels:
        {{- include "model1.selector" $.root | nindent 8 }}
        app.kubernetes.io/component: {{ $.component }}
  {{- end }}
{{- end }}
{{- with .root.Values.image.pullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{- define "model1.env" -}}
- {name: HOME, value: /tmp}
- {name: RAY_USAGE_STATS_ENABLED, value: "0"}
# Ray's default is 15: serving would yield to anything else that runs on the node.
- {name: RAY_worker_niceness, value: "0"}
# Ray would hide the GPUs from actors that reserve none; ours share what their node has.
- {name: RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO, value: "0"}
- name: POD_IP
  valueFrom: {fieldRef: {fieldPath: status.podIP}}
{{- with .Values.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* The root is read-only; Ray writes below /tmp/ray. */}}
{{- define "model1.writableMounts" -}}
- {name: tmp, mountPath: /tmp}
- {name: ray-logs, mountPath: /tmp/ray}
{{- end -}}

{{- define "model1.writableVolumes" -}}
- name: tmp
  emptyDir: {}
- name: ray-logs
  emptyDir: {}
{{- end -}}

{{/* Resource requests and limits of a worker, its GPUs among them. */}}
{{- define "model1.groupResources" -}}
{{- $resources := deepCopy .resources -}}
{{- if .gpus -}}
{{- $limits := $resources.limits | default dict -}}
{{- $_ := set $resources "limits" (merge (dict .gpuResource .gpus) $limits) -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end -}}

{{/* Of a node: that its raylet (and, on the head, its GCS) works. */}}
{{- define "model1.raylet" -}}
httpGet: {path: /api/healthz, port: 52365}
{{- end -}}

{{- define "model1.probeTimes" -}}
periodSeconds: {{ .periodSeconds }}
timeoutSeconds: {{ .timeoutSeconds }}
failureThreshold: {{ .failureThreshold }}
{{- end -}}

{{/* One worker group of the RayService.
(dict "root" $ "component" NAME "group" VALUES "slots" MAP "shm" BYTES) */}}
{{- define "model1.workerGroup" -}}
{{- $values := .root.Values -}}
{{- $fullname := include "model1.fullname" .root -}}
{{- $isAttention := eq .component "attention" -}}
groupName: {{ .component }}
replicas: {{ .group.replicas }}
minReplicas: {{ .group.min }}
maxReplicas: {{ .group.max }}
rayStartParams:
  # Each of our actors that computes asks for a core and a slot.
  num-cpus: {{ .group.slots | quote }}
  resources: {{ printf "'%s'" (toJson .slots) | quote }}
  {{- include "model1.rayPortParams" .root | nindent 2 }}
template:
  metadata:
    {{- include "model1.podMetadata" . | nindent 4 }}
  spec:
    serviceAccountName: {{ $fullname }}
    automountServiceAccountToken: false
    enableServiceLinks: false
    terminationGracePeriodSeconds: {{ .group.terminationGracePeriodSeconds | default (add $values.settings.cluster.drainSeconds 60) }}
    securityContext: {{- include "model1.podSecurityContext" .root | nindent 6 }}
    {{- include "model1.scheduling" . | nindent 4 }}
    {{- if eq $values.model.source "objectStore" }}
    initContainers:
      - name: model
        {{- with $values.model.objectStore }}
        image: {{ .image }}
        args: {{- toYaml .args | nindent 10 }}
        env:
          - {name: HOME, value: /tmp}
          {{- with .env }}{{ toYaml . | nindent 10 }}{{ end }}
        {{- with .secretName }}
        envFrom:
          - secretRef: {name: {{ . }}}
        {{- end }}
        resources: {{- toYaml .resources | nindent 10 }}
        {{- end }}
        securityContext: {{- include "model1.containerSecurityContext" .root | nindent 10 }}
        volumeMounts:
          - {name: model, mountPath: /models}
          - {name: tmp, mountPath: /tmp}
    {{- end }}
    containers:
      - name: ray-worker
        image: {{ include "model1.image" .root }}
        imagePullPolicy: {{ $values.image.pullPolicy }}
        securityContext: {{- include "model1.containerSecurityContext" .root | nindent 10 }}
        env: {{- include "model1.env" .root | nindent 10 }}
        resources: {{- include "model1.groupResources" .group | nindent 10 }}
        {{- if $isAttention }}
        ports:
          - {name: grpc, containerPort: 50051}
          - {name: gateway-metrics, containerPort: 9464}
        {{- end }}
        livenessProbe:
          {{- include "model1.raylet" .root | nindent 10 }}
          {{- include "model1.probeTimes" $values.probes.liveness | nindent 10 }}
        readinessProbe:
          {{- if not $isAttention }}
          {{- include "model1.raylet" .root | nindent 10 }}
          {{- else if $values.tls.enabled }}
          # The kubelet's own gRPC probe has no TLS.
          exec:
            command: [model1, status, --health, --config, /etc/model1/model1.yaml, --endpoint, "localhost:50051"]
          {{- else }}
          grpc: {port: 50051}
          {{- end }}
          {{- include "model1.probeTimes" $values.probes.readiness | nindent 10 }}
        lifecycle:
          preStop:
            exec:
              # What runs here moves to other nodes first; requests go on there.
              command:
                - /bin/bash
                - -c
                - model1 drain --node "$POD_IP" --config /etc/model1/model1.yaml --endpoint {{ $fullname }}-grpc:50051
        volumeMounts:
          {{- include "model1.writableMounts" .root | nindent 10 }}
          - {name: shm, mountPath: /dev/shm}
          - {name: config, mountPath: /etc/model1/model1.yaml, subPath: model1.yaml, readOnly: true}
          {{- if has $values.model.source (list "pvc" "image" "objectStore") }}
          - {name: model, mountPath: /models, readOnly: true}
          {{- end }}
          {{- if and $isAttention $values.kv.disk.type }}
          - {name: kv-disk, mountPath: /var/lib/model1/kv}
          {{- end }}
          {{- if and $isAttention $values.redis.coldTier }}
          {{- if include "model1.redisHasPassword" .root }}
          - {name: redis-password, mountPath: /etc/model1/redis, readOnly: true}
          {{- end }}
          {{- if $values.redis.caSecret.name }}
          - {name: redis-ca, mountPath: /etc/model1/redis-ca, readOnly: true}
          {{- end }}
          {{- end }}
          {{- if $values.tls.enabled }}
          - {name: tls, mountPath: /etc/model1/tls, readOnly: true}
          {{- end }}
          {{- if $values.auth.tokens.enabled }}
          - {name: tokens, mountPath: /etc/model1/tokens, readOnly: true}
          {{- end }}
    volumes:
      {{- include "model1.writableVolumes" .root | nindent 6 }}
      - name: shm
        emptyDir: {medium: Memory, sizeLimit: {{ .shm | quote }}}
      - name: config
        configMap: {name: {{ $fullname }}}
      {{- with $values.model }}
      {{- if eq .source "pvc" }}
      - name: model
        persistentVolumeClaim: {claimName: {{ .pvc.claimName }}, readOnly: true}
      {{- else if eq .source "image" }}
      - name: model
        image: {reference: {{ .image.reference | quote }}, pullPolicy: {{ .image.pullPolicy }}}
      {{- else if eq .source "objectStore" }}
      - name: model
        {{- if .objectStore.cachePath }}
        hostPath: {path: {{ .objectStore.cachePath }}, type: DirectoryOrCreate}
        {{- else }}
        emptyDir: {sizeLimit: {{ .objectStore.sizeLimit }}}
        {{- end }}
      {{- end }}
      {{- end }}
      {{- if $isAttention }}
      {{- with $values.kv.disk }}
      {{- if eq .type "emptyDir" }}
      - name: kv-disk
        emptyDir: {sizeLimit: {{ .size }}}
      {{- else if eq .type "hostPath" }}
      - name: kv-disk
        hostPath: {path: {{ .path }}, type: Directory}
      {{- else if eq .type "ephemeral" }}
      - name: kv-disk
        ephemeral:
          volumeClaimTemplate:
            spec:
              accessModes: [ReadWriteOnce]
              {{- with .storageClassName }}
              storageClassName: {{ . }}
              {{- end }}
              resources: {requests: {storage: {{ .size }}}}
      {{- end }}
      {{- end }}
      {{- if $values.redis.coldTier }}
      {{- if include "model1.redisHasPassword" .root }}
      - name: redis-password
        secret:
          secretName: {{ include "model1.redisSecretName" .root }}
          items: [{key: {{ $values.redis.passwordSecret.key }}, path: password}]
      {{- end }}
      {{- with $values.redis.caSecret }}
      {{- if .name }}
      - name: redis-ca
        secret: {secretName: {{ .name }}, items: [{key: {{ .key }}, path: ca.crt}]}
      {{- end }}
      {{- end }}
      {{- end }}
      {{- end }}
      {{- if $values.tls.enabled }}
      - name: tls
        secret: {secretName: {{ include "model1.tlsSecretName" .root }}}
      {{- end }}
      {{- if $values.auth.tokens.enabled }}
      - name: tokens
        secret:
          secretName: {{ $values.auth.tokens.secretName | default (include "model1.secretName" .root) }}
          items: [{key: tokens, path: tokens}]
      {{- end }}
{{- end -}}
