{{- define "tessera.fullname" -}}
{{- if contains "tessera" .Release.Name }}{{ .Release.Name | trunc 50 | trimSuffix "-" }}{{ else }}{{ printf "%s-tessera" .Release.Name | trunc 50 | trimSuffix "-" }}{{ end -}}
{{- end }}

{{- define "tessera.labels" -}}
app.kubernetes.io/name: tessera
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{- define "tessera.selector" -}}
app.kubernetes.io/name: tessera
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .service }}
{{- end }}

{{- define "tessera.image" -}}
{{- $image := .root.Values.image -}}
{{- with $image.registry }}{{ . }}/{{ end }}{{ $image.repositoryPrefix }}/{{ .service }}:{{ $image.tag | default .root.Chart.AppVersion }}
{{- end }}

{{- define "tessera.serviceAccount" -}}
{{- if .Values.serviceAccount.create }}{{ .Values.serviceAccount.name | default (include "tessera.fullname" .) }}{{ else }}{{ .Values.serviceAccount.name | default "default" }}{{ end -}}
{{- end }}

{{- define "tessera.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "tessera.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{- define "tessera.secretEnv" -}}
- name: {{ .name }}
  valueFrom: {secretKeyRef: {name: {{ .root.Values.existingSecret | quote }}, key: {{ .key }}{{ if .optional }}, optional: true{{ end }}}}
{{- end }}

{{/* What every process needs to connect. */}}
{{- define "tessera.connectionEnv" -}}
{{ include "tessera.secretEnv" (dict "root" . "name" "TESSERA__POSTGRES__WORKER_PASSWORD" "key" "worker-password") }}
{{ include "tessera.secretEnv" (dict "root" . "name" "TESSERA__POSTGRES__CLIENT_PASSWORD" "key" "client-password") }}
{{- if hasPrefix "SASL" .Values.kafka.securityProtocol }}
{{ include "tessera.secretEnv" (dict "root" . "name" "TESSERA__KAFKA__SASL_PASSWORD" "key" "kafka-sasl-password") }}
{{- end }}
{{ include "tessera.secretEnv" (dict "root" . "name" "TESSERA__REDIS__PASSWORD" "key" "redis-password" "optional" true) }}
{{- end }}

{{- define "tessera.ownerEnv" -}}
{{ include "tessera.secretEnv" (dict "root" . "name" "TESSERA__POSTGRES__OWNER_PASSWORD" "key" "owner-password") }}
{{ include "tessera.secretEnv" (dict "root" . "name" "TESSERA_GATEWAY__POSTGRES__AUTHENTICATOR_PASSWORD" "key" "authenticator-password") }}
{{- end }}

{{- define "tessera.required" -}}
{{- $_ := required "kafka.bootstrapServers is required: this chart bundles no Kafka" .Values.kafka.bootstrapServers -}}
{{- $_ := required "postgres.host is required: this chart bundles no Postgres" .Values.postgres.host -}}
{{- $_ := required "redis.url is required: this chart bundles no Redis" .Values.redis.url -}}
{{- $_ := required "objects.url is required" .Values.objects.url -}}
{{- $_ := required "existingSecret is required: see the comment in values.yaml for its keys" .Values.existingSecret -}}
{{- if le (int .Values.terminationGracePeriodSeconds) (int .Values.drainSeconds) }}{{ fail "terminationGracePeriodSeconds must exceed drainSeconds" }}{{ end -}}
{{- end }}

{{- define "tessera.setupStep" -}}
- name: {{ .name }}
  image: {{ include "tessera.image" (dict "root" .root "service" .service) }}
  imagePullPolicy: {{ .root.Values.image.pullPolicy }}
  command: {{ toJson .command }}
  securityContext: {{- include "tessera.containerSecurity" .root | nindent 4 }}
  envFrom:
    - configMapRef: {name: {{ include "tessera.fullname" .root }}}
  env:
    {{- include "tessera.connectionEnv" .root | nindent 4 }}
    {{- include "tessera.ownerEnv" .root | nindent 4 }}
    {{- if .admin }}
    {{- include "tessera.secretEnv" (dict "root" .root "name" "TESSERA_ADMIN_DATABASE_URL" "key" "postgres-admin-url") | nindent 4 }}
    {{- end }}
  resources:
    requests: {cpu: 100m, memory: 128Mi}
    limits: {memory: 512Mi}
  volumeMounts:
    - {name: state, mountPath: /var/lib/tessera}
    - {name: temporary, mountPath: /tmp}
{{- end }}
