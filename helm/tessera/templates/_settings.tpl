{{- define "tessera.settings" -}}
TESSERA__PROFILE: {{ .Values.profile | quote }}
TESSERA__DRAIN_SECONDS: {{ .Values.drainSeconds | quote }}
TESSERA__KAFKA__REBALANCE_TIMEOUT_SECONDS: {{ div (add (int .Values.drainSeconds) (int .Values.terminationGracePeriodSeconds)) 2 | quote }}
TESSERA__TERMINATION_GRACE_SECONDS: {{ .Values.terminationGracePeriodSeconds | quote }}
TESSERA__ADMIN_HOST: "0.0.0.0"
TESSERA__ADMIN_PORT: "9000"
TESSERA__KAFKA__BOOTSTRAP_SERVERS: {{ .Values.kafka.bootstrapServers | quote }}
TESSERA__KAFKA__REPLICATION_FACTOR: {{ .Values.kafka.replicationFactor | quote }}
TESSERA__KAFKA__MINIMUM_IN_SYNC_REPLICAS: {{ .Values.kafka.minimumInSyncReplicas | quote }}
TESSERA__KAFKA__TOPIC_PREFIX: {{ .Values.kafka.topicPrefix | quote }}
TESSERA__KAFKA__SECURITY_PROTOCOL: {{ .Values.kafka.securityProtocol | quote }}
{{- if hasPrefix "SASL" .Values.kafka.securityProtocol }}
TESSERA__KAFKA__SASL_MECHANISM: {{ .Values.kafka.saslMechanism | quote }}
{{- if not .Values.kafka.ownPrincipals }}
TESSERA__KAFKA__SASL_USERNAME: {{ .Values.kafka.saslUsername | quote }}
{{- end }}
{{- end }}
{{- if hasSuffix "SSL" .Values.kafka.securityProtocol }}
TESSERA__KAFKA__TLS__CHECK_HOSTNAME: {{ .Values.kafka.tlsCheckHostname | quote }}
{{- end }}
{{- if .Values.kafka.tlsCaSecret }}
TESSERA__KAFKA__TLS__CA_FILE: /etc/tessera/kafka-ca/ca.crt
{{- end }}
{{- if .Values.kafka.tlsClientSecretPrefix }}
TESSERA__KAFKA__TLS__CERTIFICATE_FILE: /etc/tessera/kafka-client/tls.crt
TESSERA__KAFKA__TLS__KEY_FILE: /etc/tessera/kafka-client/tls.key
{{- end }}
TESSERA__POSTGRES__HOST: {{ .Values.postgres.host | quote }}
TESSERA__POSTGRES__PORT: {{ .Values.postgres.port | quote }}
TESSERA__POSTGRES__DATABASE: {{ .Values.postgres.database | quote }}
TESSERA__POSTGRES__TLS__MODE: {{ .Values.postgres.tlsMode | quote }}
{{- if .Values.postgres.tlsCaSecret }}
TESSERA__POSTGRES__TLS__CA_FILE: /etc/tessera/postgres-ca/ca.crt
{{- end }}
{{- if .Values.postgres.tlsClientSecretPrefix }}
TESSERA__POSTGRES__TLS__CERTIFICATE_FILE: /etc/tessera/postgres-client/tls.crt
TESSERA__POSTGRES__TLS__KEY_FILE: /etc/tessera/postgres-client/tls.key
{{- end }}
TESSERA__REDIS__URL: {{ .Values.redis.url | quote }}
{{- if .Values.redis.tlsCaSecret }}
TESSERA__REDIS__TLS__CA_FILE: /etc/tessera/redis-ca/ca.crt
{{- end }}
TESSERA__OBJECTS__URL: {{ .Values.objects.url | quote }}
TESSERA__TELEMETRY__LOG_LEVEL: {{ .Values.telemetry.logLevel | quote }}
{{- with .Values.telemetry.otlpEndpoint }}
TESSERA__TELEMETRY__OTLP_ENDPOINT: {{ . | quote }}
{{- end }}
{{- end }}
