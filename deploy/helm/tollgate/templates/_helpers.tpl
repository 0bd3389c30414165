{{/*
Names and labels that the templates share.
Checked with helm 4.1 (lint, template); what it renders, against the Kubernetes 1.37 schemas. Not installed.
*/}}
{{- define "tollgate.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
{{- end }}

{{/* The release's name, and the chart's where that is not in it; with room for "-admin". */}}
{{- define "tollgate.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 57 | trimSuffix "-" }}
{{- else if contains (include "tollgate.name" .) .Release.Name }}
{{- .Release.Name | trunc 57 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name (include "tollgate.name" .) | trunc 57 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{- define "tollgate.selectorLabels" -}}
app.kubernetes.io/name: {{ include "tollgate.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "tollgate.labels" -}}
{{ include "tollgate.selectorLabels" . }}
app.kubernetes.io/version: {{ .Values.image.tag | default .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}

{{- define "tollgate.configMapName" -}}
{{- .Values.existingConfigMap | default (include "tollgate.fullname" .) }}
{{- end }}

{{- define "tollgate.secretName" -}}
{{- .Values.secret.existing | default (include "tollgate.fullname" .) }}
{{- end }}

{{- define "tollgate.serviceAccountName" -}}
{{- if .Values.serviceAccount.create }}
{{- .Values.serviceAccount.name | default (include "tollgate.fullname" .) }}
{{- else }}
{{- .Values.serviceAccount.name | default "default" }}
{{- end }}
{{- end }}

{{/* Stops where values do not go together. */}}
{{- define "tollgate.validate" -}}
{{- if and (eq .Values.state.type "pvc") (or .Values.autoscaling.enabled (gt (int .Values.replicaCount) 1)) }}
{{- fail "state.type: pvc is for SQLite, which is one gateway's alone: set replicaCount: 1 and autoscaling.enabled: false, or use PostgreSQL with state.type: emptyDir" }}
{{- end }}
{{- if not .Values.existingConfigMap }}
{{- $config := fromYaml .Values.config }}
{{- if hasKey $config "Error" }}
{{- fail (printf "config is no YAML: %s" $config.Error) }}
{{- end }}
{{- range $key := list "listen" "shutdown_timeout" }}
{{- if hasKey $config $key }}
{{- fail (printf "config: leave out %s; the chart sets it from ports.traffic and shutdownTimeoutSeconds" $key) }}
{{- end }}
{{- end }}
{{- $admin := get ($config.admin | default dict) "listen" }}
{{- if and (kindIs "string" $admin) (not (hasSuffix (printf ":%d" (int .Values.ports.admin)) $admin)) }}
{{- fail (printf "config: admin.listen must have the port of ports.admin (%d)" (int .Values.ports.admin)) }}
{{- end }}
{{- end }}
{{- end }}
