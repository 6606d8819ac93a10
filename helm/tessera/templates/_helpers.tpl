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

{{/* What every process needs to connect; `as` is a service, or setup. */}}
{{- define "tessera.connectionEnv" -}}
{{- $kafka := .root.Values.kafka -}}
{{ include "tessera.secretEnv" (dict "root" .root "name" "TESSERA__POSTGRES__WORKER_PASSWORD" "key" "worker-password") }}
{{ include "tessera.secretEnv" (dict "root" .root "name" "TESSERA__POSTGRES__CLIENT_PASSWORD" "key" "client-password") }}
{{- if hasPrefix "SASL" $kafka.securityProtocol }}
{{- $own := and $kafka.ownPrincipals (ne .as "setup") }}
{{- if $kafka.ownPrincipals }}
- {name: TESSERA__KAFKA__SASL_USERNAME, value: {{ ternary (printf "tessera-%s" .as) $kafka.saslUsername $own | quote }}}
{{- end }}
{{ include "tessera.secretEnv" (dict "root" .root "name" "TESSERA__KAFKA__SASL_PASSWORD" "key" (ternary (printf "kafka-%s-password" .as) "kafka-sasl-password" $own)) }}
{{- end }}
{{ include "tessera.secretEnv" (dict "root" .root "name" "TESSERA__REDIS__PASSWORD" "key" "redis-password" "optional" true) }}
{{- end }}

{{/* Certificates of servers' authorities, and of the client `as`; the whole folder is mounted, so that replaced files arrive. */}}
{{- define "tessera.certificateMounts" -}}
{{- range $name := include "tessera.certificateNames" . | fromJsonArray }}
- {name: {{ $name }}, mountPath: /etc/tessera/{{ $name }}, readOnly: true}
{{- end }}
{{- end }}

{{- define "tessera.certificateVolumes" -}}
{{- $values := .root.Values -}}
{{- $secrets := dict "kafka-ca" $values.kafka.tlsCaSecret "postgres-ca" $values.postgres.tlsCaSecret "redis-ca" $values.redis.tlsCaSecret -}}
{{- $_ := set $secrets "kafka-client" (printf "%s%s" $values.kafka.tlsClientSecretPrefix .as) -}}
{{- $_ := set $secrets "postgres-client" (printf "%s%s" $values.postgres.tlsClientSecretPrefix .as) -}}
{{- range $name := include "tessera.certificateNames" . | fromJsonArray }}
- name: {{ $name }}
  secret: {secretName: {{ get $secrets $name | quote }}, defaultMode: 0440}
{{- end }}
{{- end }}

{{- define "tessera.certificateNames" -}}
{{- $values := .root.Values -}}
{{- $names := list -}}
{{- if $values.kafka.tlsCaSecret }}{{ $names = append $names "kafka-ca" }}{{ end -}}
{{- if $values.kafka.tlsClientSecretPrefix }}{{ $names = append $names "kafka-client" }}{{ end -}}
{{- if $values.postgres.tlsCaSecret }}{{ $names = append $names "postgres-ca" }}{{ end -}}
{{- if $values.postgres.tlsClientSecretPrefix }}{{ $names = append $names "postgres-client" }}{{ end -}}
{{- if $values.redis.tlsCaSecret }}{{ $names = append $names "redis-ca" }}{{ end -}}
{{- toJson $names -}}
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
{{- if and .Values.kafka.ownPrincipals (not (hasPrefix "SASL" .Values.kafka.securityProtocol)) }}{{ fail "kafka.ownPrincipals needs a securityProtocol with SASL; with client certificates use tlsClientSecretPrefix" }}{{ end -}}
{{- if and (or .Values.kafka.tlsCaSecret .Values.kafka.tlsClientSecretPrefix) (not (hasSuffix "SSL" .Values.kafka.securityProtocol)) }}{{ fail "kafka.tlsCaSecret and tlsClientSecretPrefix need securityProtocol SSL or SASL_SSL" }}{{ end -}}
{{- if lt (int .Values.terminationGracePeriodSeconds) (add (int .Values.drainSeconds) 4) }}{{ fail "terminationGracePeriodSeconds must exceed drainSeconds by at least 4: Kafka's rebalance time-out lies between them" }}{{ end -}}
{{- range $name, $service := .Values.services }}{{ if and (ne $name "gateway") (gt (int $service.replicas) 12) }}{{ fail (printf "services.%s.replicas must not exceed 12, the partitions of keyed topics: further replicas would only stand by" $name) }}{{ end }}{{ end -}}
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
    {{- include "tessera.connectionEnv" (dict "root" .root "as" "setup") | nindent 4 }}
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
    {{- include "tessera.certificateMounts" (dict "root" .root) | nindent 4 }}
{{- end }}
