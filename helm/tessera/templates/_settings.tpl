{{- define "tessera.settings" -}}
TESSERA__PROFILE: {{ .Values.profile | quote }}
TESSERA__DRAIN_SECONDS: {{ .Values.drainSeconds | quote }}
TESSERA__ADMIN_HOST: "0.0.0.0"
TESSERA__ADMIN_PORT: "9000"
TESSERA__KAFKA__BOOTSTRAP_SERVERS: {{ .Values.kafka.bootstrapServers | quote }}
TESSERA__KAFKA__REPLICATION_FACTOR: {{ .Values.kafka.replicationFactor | quote }}
TESSERA__KAFKA__MINIMUM_IN_SYNC_REPLICAS: {{ .Values.kafka.minimumInSyncReplicas | quote }}
TESSERA__KAFKA__TOPIC_PREFIX: {{ .Values.kafka.topicPrefix | quote }}
TESSERA__KAFKA__SECURITY_PROTOCOL: {{ .Values.kafka.securityProtocol | quote }}
{{- if hasPrefix "SASL" .Values.kafka.securityProtocol }}
TESSERA__KAFKA__SASL_MECHANISM: {{ .Values.kafka.saslMechanism | quote }}
TESSERA__KAFKA__SASL_USERNAME: {{ .Values.kafka.saslUsername | quote }}
{{- end }}
TESSERA__POSTGRES__HOST: {{ .Values.postgres.host | quote }}
TESSERA__POSTGRES__PORT: {{ .Values.postgres.port | quote }}
TESSERA__POSTGRES__DATABASE: {{ .Values.postgres.database | quote }}
TESSERA__POSTGRES__TLS__MODE: {{ .Values.postgres.tlsMode | quote }}
TESSERA__REDIS__URL: {{ .Values.redis.url | quote }}
TESSERA__OBJECTS__URL: {{ .Values.objects.url | quote }}
TESSERA__TELEMETRY__LOG_LEVEL: {{ .Values.telemetry.logLevel | quote }}
{{- with .Values.telemetry.otlpEndpoint }}
TESSERA__TELEMETRY__OTLP_ENDPOINT: {{ . | quote }}
{{- end }}
{{- end }}
