{{- define "fairlead.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
{{- end }}

{{- define "fairlead.fullname" -}}
{{- $name := include "fairlead.name" . }}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 63 | trimSuffix "-" }}
{{- else if contains $name .Release.Name }}
{{- .Release.Name | trunc 63 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name $name | trunc 63 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{- define "fairlead.selectorLabels" -}}
app.kubernetes.io/name: {{ include "fairlead.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "fairlead.labels" -}}
{{ include "fairlead.selectorLabels" . }}
app.kubernetes.io/component: service-proxy
app.kubernetes.io/part-of: fairlead
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- with .Values.labels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "fairlead.image" -}}
{{- $repository := required "image.repository is empty: set it to the repository that you pushed Fairlead's image to" .Values.image.repository }}
{{- if .Values.image.digest }}
{{- printf "%s@%s" $repository .Values.image.digest }}
{{- else }}
{{- printf "%s:%s" $repository (default .Chart.AppVersion .Values.image.tag) }}
{{- end }}
{{- end }}

{{- define "fairlead.configMapName" -}}
{{- default (include "fairlead.fullname" .) .Values.existingConfigMap }}
{{- end }}

{{- /* GOMEMLIMIT: 90 % of the memory limit, because it does not cover all memory. Empty if the limit has another unit. */ -}}
{{- define "fairlead.goMemoryLimit" -}}
{{- $limit := dig "limits" "memory" "" .Values.resources | toString }}
{{- $unit := regexFind "[GM]i$" $limit }}
{{- if and $unit (regexMatch "^[0-9]+[GM]i$" $limit) }}
{{- $mebibytes := mul (trimSuffix $unit $limit | int64) (ternary 1024 1 (eq $unit "Gi")) }}
{{- printf "%dMiB" (div (mul $mebibytes 9) 10) }}
{{- end }}
{{- end }}

{{- /* The addresses of the HTTP servers. Beside kube-proxy, its ports are in use. */ -}}
{{- define "fairlead.healthzBindAddress" -}}
{{- default (ternary "0.0.0.0:10266" "0.0.0.0:10256" (ne .Values.serviceProxyName "")) .Values.config.healthzBindAddress }}
{{- end }}
{{- define "fairlead.metricsBindAddress" -}}
{{- default (ternary "127.0.0.1:10259" "127.0.0.1:10249" (ne .Values.serviceProxyName "")) .Values.config.metricsBindAddress }}
{{- end }}
{{- define "fairlead.healthzPort" -}}
{{- include "fairlead.healthzBindAddress" . | regexFind "[0-9]+$" }}
{{- end }}
{{- define "fairlead.metricsPort" -}}
{{- include "fairlead.metricsBindAddress" . | regexFind "[0-9]+$" }}
{{- end }}

{{- /* Whether --flow-offload is set, as text. */ -}}
{{- define "fairlead.flowOffload" -}}
{{- if has .Values.flowOffload (list "software" "hardware") }}true{{ end }}
{{- end }}

{{- /* Whether the init container loads kernel modules from the host's /lib/modules, as text. */ -}}
{{- define "fairlead.loadsModules" -}}
{{- if and .Values.setUp.enabled (or (eq .Values.mode "ipvs") (include "fairlead.flowOffload" .)) }}true{{ end }}
{{- end }}

{{- define "fairlead.args" -}}
- run
- --config=/var/lib/kube-proxy/config.conf
- --hostname-override=$(NODE_NAME)
{{- if eq .Values.mode "ipvs" }}
- --mode=ipvs
{{- end }}
{{- if include "fairlead.flowOffload" . }}
- --flow-offload={{ .Values.flowOffload }}
- --flow-offload-threshold={{ int64 .Values.flowOffloadThreshold }}
{{- end }}
{{- with .Values.serviceProxyName }}
- --service-proxy-name={{ . }}
{{- end }}
{{- with .Values.extraArgs }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "fairlead.env" -}}
- name: NODE_NAME
  valueFrom:
    fieldRef:
      fieldPath: spec.nodeName
{{- end }}

{{- /* The affinity of the values, and for canary.nodes=except also a term that excludes the canary nodes. */ -}}
{{- define "fairlead.affinity" -}}
{{- $affinity := deepCopy .Values.affinity }}
{{- if eq .Values.canary.nodes "except" }}
{{- $exclude := dict "key" .Values.canary.label "operator" "NotIn" "values" (list .Values.canary.value) }}
{{- $terms := list }}
{{- /* A node must match one of the terms, and all expressions in it. */ -}}
{{- range dig "nodeAffinity" "requiredDuringSchedulingIgnoredDuringExecution" "nodeSelectorTerms" (list (dict)) $affinity }}
{{- $terms = append $terms (merge (dict "matchExpressions" (append (default list .matchExpressions) $exclude)) .) }}
{{- end }}
{{- $node := merge (dict "requiredDuringSchedulingIgnoredDuringExecution" (dict "nodeSelectorTerms" $terms)) (dig "nodeAffinity" (dict) $affinity) }}
{{- $_ := set $affinity "nodeAffinity" $node }}
{{- end }}
{{- with $affinity }}
{{- toYaml . }}
{{- end }}
{{- end }}

{{- define "fairlead.validate" -}}
{{- if and (include "fairlead.flowOffload" .) (eq .Values.mode "ipvs") }}
{{- fail (printf "flowOffload=%s requires mode=nft, because IPVS receives packets as if they were for the node itself: set flowOffload to \"off\", or the mode to nft" .Values.flowOffload) }}
{{- end }}
{{- if .Values.existingConfigMap }}
{{- if .Values.serviceProxyName }}
{{- fail "existingConfigMap cannot be used with serviceProxyName, because kube-proxy on the same node uses the ports in it: set apiServer and config" }}
{{- end }}
{{- else if not .Values.apiServer }}
{{- fail "apiServer is empty: set it to the URL of the API server, such as https://192.0.2.10:6443, or set existingConfigMap to the name of kube-proxy's ConfigMap" }}
{{- end }}
{{- if and .Values.serviceMonitor.enabled .Values.podMonitor.enabled }}
{{- fail "serviceMonitor.enabled and podMonitor.enabled are both true, so that Prometheus would scrape every pod twice: set one of them to false" }}
{{- end }}
{{- if or .Values.serviceMonitor.enabled .Values.podMonitor.enabled (eq (get .Values.podLabels "k8s-app") "kube-proxy") }}
{{- $address := include "fairlead.metricsBindAddress" . }}
{{- if and (not .Values.existingConfigMap) (regexMatch "^(127\\.|localhost|\\[::1\\])" $address) }}
{{- fail (printf "config.metricsBindAddress is %s, which Prometheus cannot reach from a pod: set it to 0.0.0.0:%s" $address (include "fairlead.metricsPort" .)) }}
{{- end }}
{{- end }}
{{- if and .Values.podMonitor.enabled (dig "rollingUpdate" "maxSurge" 0 .Values.updateStrategy | toString | ne "0") }}
{{- fail "updateStrategy.rollingUpdate.maxSurge cannot be used with podMonitor.enabled, because two pods cannot have the same host port: use serviceMonitor" }}
{{- end }}
{{- end }}
