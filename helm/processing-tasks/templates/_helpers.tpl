{{- define "processing-tasks.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
{{- end }}

{{/* Prefix of all names. 40 characters leave room for "-operator" and "-normal" in the 63 of a label or a Service. */}}
{{- define "processing-tasks.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" }}
{{- else if contains (include "processing-tasks.name" .) .Release.Name }}
{{- .Release.Name | trunc 40 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name (include "processing-tasks.name" .) | trunc 40 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{/* What never changes for a release: the only labels that selectors may use. */}}
{{- define "processing-tasks.selectorLabels" -}}
app.kubernetes.io/name: {{ include "processing-tasks.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "processing-tasks.labels" -}}
{{ include "processing-tasks.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/part-of: processing-tasks
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{- end }}

{{- define "processing-tasks.operatorSelectorLabels" -}}
{{ include "processing-tasks.selectorLabels" . }}
app.kubernetes.io/component: operator
{{- end }}

{{- define "processing-tasks.operatorServiceAccount" -}}
{{- if .Values.operator.serviceAccount.create }}
{{- default (printf "%s-operator" (include "processing-tasks.fullname" .)) .Values.operator.serviceAccount.name }}
{{- else }}
{{- required "operator.serviceAccount.name: required when operator.serviceAccount.create is false" .Values.operator.serviceAccount.name }}
{{- end }}
{{- end }}

{{/* Reference of an image: takes a dict of image and root. */}}
{{- define "processing-tasks.image" -}}
{{- if .image.digest -}}
{{ .image.repository }}@{{ .image.digest }}
{{- else -}}
{{ .image.repository }}:{{ default .root.Chart.AppVersion .image.tag }}
{{- end }}
{{- end }}

{{/* JSON of the names of the PriorityClasses by priority; {} leaves pods to the cluster's default. */}}
{{- define "processing-tasks.priorityClasses" -}}
{{- $names := dict }}
{{- range $priority := list "high" "normal" "low" }}
{{- if $.Values.priorityClasses.create }}
{{- $_ := set $names $priority (printf "%s-%s" (include "processing-tasks.fullname" $) $priority) }}
{{- else if index $.Values.priorityClasses.existing $priority }}
{{- $_ := set $names $priority (index $.Values.priorityClasses.existing $priority) }}
{{- end }}
{{- end }}
{{- toJson $names }}
{{- end }}

{{/* YAML of where the operator's credentials stand: secret, and the key of each store. */}}
{{- define "processing-tasks.operatorStores" -}}
{{- include "processing-tasks.bundle" . }}
{{- $own := .Values.operator.stores }}
{{- if $own.existingSecret }}
secret: {{ $own.existingSecret }}
postgres: OPERATOR_POSTGRES_URL
redis: OPERATOR_REDIS_URL
{{- else if or $own.postgres.url .Values.stores.postgres.url }}
secret: {{ include "processing-tasks.fullname" . }}-operator
made: true
postgres: OPERATOR_POSTGRES_URL
redis: OPERATOR_REDIS_URL
{{- else if .Values.stores.existingSecret }}
secret: {{ .Values.stores.existingSecret }}
postgres: TASKS_POSTGRES_URL
redis: TASKS_REDIS_URL
{{- else }}
{{- fail "stores.postgres.url: required, or name a Secret that holds it in stores.existingSecret" }}
{{- end }}
{{- end }}

{{/* Settings of the operator, for its container and for the migration. Takes a dict of root and from (operatorStores). */}}
{{- define "processing-tasks.operatorEnvironment" -}}
{{- $root := .root -}}
- name: OPERATOR_POSTGRES_URL
  valueFrom:
    secretKeyRef:
      name: {{ .from.secret }}
      key: {{ .from.postgres }}
- name: OPERATOR_REDIS_URL
  valueFrom:
    secretKeyRef:
      name: {{ .from.secret }}
      key: {{ .from.redis }}
      optional: true
- name: OPERATOR_NAMESPACES
  {{- if $root.Values.operator.clusterWide }}
  value: ""
  {{- else }}
  {{- $namespaces := list }}
  {{- range $root.Values.taskNamespaces }}
  {{- $namespaces = append $namespaces .name }}
  {{- end }}
  value: {{ join "," $namespaces | required "taskNamespaces: name at least one, or set operator.clusterWide" | quote }}
  {{- end }}
- name: OPERATOR_RUNNER_IMAGE
  value: {{ include "processing-tasks.image" (dict "image" $root.Values.runner.image "root" $root) | quote }}
- name: OPERATOR_RUNNER_IMAGE_PULL_POLICY
  value: {{ $root.Values.runner.image.pullPolicy }}
- name: OPERATOR_SERVICE_ACCOUNT
  value: processing-task-runner
- name: OPERATOR_STORES_SECRET
  value: {{ default "processing-task-stores" $root.Values.stores.existingSecret }}
- name: OPERATOR_DOCUMENTS_CLAIM
  value: {{ ternary (default "processing-task-documents" $root.Values.documents.existingClaim) "" $root.Values.documents.enabled | quote }}
{{- with $root.Values.documents.subPath }}
- name: OPERATOR_DOCUMENTS_SUBPATH
  value: {{ quote . }}
{{- end }}
- name: OPERATOR_PRIORITY_CLASSES
  value: {{ include "processing-tasks.priorityClasses" $root | quote }}
- name: OPERATOR_RUNNER_RESOURCES
  value: {{ include "processing-tasks.resources" $root.Values.runner.resources | quote }}
{{- $classes := dict }}
{{- range $name, $resources := $root.Values.runner.resourceClasses }}
{{- $_ := set $classes $name (fromJson (include "processing-tasks.resources" $resources)) }}
{{- end }}
- name: OPERATOR_RUNNER_RESOURCE_CLASSES
  value: {{ toJson $classes | quote }}
- name: OPERATOR_RUNNER_MEMORY_FACTOR
  value: {{ $root.Values.runner.memoryGrowth.factor | quote }}
- name: OPERATOR_RUNNER_MEMORY_LIMIT
  value: {{ $root.Values.runner.memoryGrowth.limit | quote }}
- name: OPERATOR_RUNNER_NODE_SELECTOR
  value: {{ toJson $root.Values.runner.nodeSelector | quote }}
- name: OPERATOR_RUNNER_TOLERATIONS
  value: {{ toJson $root.Values.runner.tolerations | quote }}
- name: OPERATOR_RUNNER_AFFINITY
  value: {{ toJson $root.Values.runner.affinity | quote }}
- name: OPERATOR_RUNNER_ENV
  value: {{ toJson $root.Values.runner.extraEnv | quote }}
- name: OPERATOR_RUNNER_POD_LABELS
  value: {{ toJson $root.Values.runner.podLabels | quote }}
- name: OPERATOR_RUNNER_POD_ANNOTATIONS
  value: {{ toJson $root.Values.runner.podAnnotations | quote }}
- name: OPERATOR_RUNNER_LOST_NODE_SECONDS
  value: {{ int $root.Values.runner.lostNodeSeconds | quote }}
{{- $secrets := list }}
{{- range $root.Values.imagePullSecrets }}
{{- $secrets = append $secrets .name }}
{{- end }}
- name: OPERATOR_IMAGE_PULL_SECRETS
  value: {{ toJson $secrets | quote }}
- name: OPERATOR_INSTANCE
  value: {{ $root.Release.Name }}
{{- with $root.Values.taskLabels }}
{{- $selector := list }}
{{- range $key, $value := . }}
{{- $selector = append $selector (printf "%s=%s" $key $value) }}
{{- end }}
- name: OPERATOR_SELECTOR
  value: {{ join "," $selector | quote }}
{{- end }}
{{- with $root.Values.operator.leaderElection }}
{{- if .enabled }}
- name: OPERATOR_LEASE_NAME
  value: {{ include "processing-tasks.fullname" $root }}-operator
- name: OPERATOR_LEASE_NAMESPACE
  value: {{ $root.Release.Namespace }}
- name: OPERATOR_LEASE_DURATION_SECONDS
  value: {{ .durationSeconds | quote }}
- name: OPERATOR_LEASE_DEADLINE_SECONDS
  value: {{ .deadlineSeconds | quote }}
- name: OPERATOR_LEASE_RENEW_SECONDS
  value: {{ .renewSeconds | quote }}
- name: OPERATOR_LEASE_LOOK_SECONDS
  value: {{ .lookSeconds | quote }}
{{- end }}
{{- end }}
- name: OPERATOR_LISTEN
  value: 0.0.0.0:8081
- name: OPERATOR_RESYNC_SECONDS
  value: {{ int $root.Values.operator.resyncSeconds | quote }}
- name: OPERATOR_PENDING_DEADLINE_SECONDS
  value: {{ int $root.Values.operator.pendingDeadlineSeconds | quote }}
- name: OPERATOR_CAPACITY_DEADLINE_SECONDS
  value: {{ int $root.Values.operator.capacityDeadlineSeconds | quote }}
- name: OPERATOR_LIMIT_TOTAL
  value: {{ int $root.Values.operator.limits.total | quote }}
- name: OPERATOR_LIMIT_NAMESPACE
  value: {{ int $root.Values.operator.limits.perNamespace | quote }}
- name: OPERATOR_LIMIT_KNOWLEDGE_BASE
  value: {{ int $root.Values.operator.limits.perKnowledgeBase | quote }}
- name: OPERATOR_LIMIT_TYPES
  value: {{ toJson $root.Values.operator.limits.perType | quote }}
- name: OPERATOR_FAIR_WEIGHTS
  value: {{ toJson $root.Values.operator.limits.weights | quote }}
- name: OPERATOR_KUEUE_QUEUE
  value: {{ $root.Values.operator.kueueQueue | quote }}
- name: OPERATOR_POOL_FALLBACK
  value: {{ $root.Values.operator.poolFallback | quote }}
- name: OPERATOR_TASK_BUDGET
  value: {{ int $root.Values.operator.taskBudget | quote }}
- name: OPERATOR_JOB_TTL_SECONDS
  value: {{ int $root.Values.operator.jobTtlSeconds | quote }}
- name: OPERATOR_STUCK_SECONDS
  value: {{ int $root.Values.operator.stuckSeconds | quote }}
- name: OPERATOR_SWEEP_INTERVAL_SECONDS
  value: {{ int $root.Values.operator.sweepIntervalSeconds | quote }}
{{- $callbacks := $root.Values.callbacks }}
- name: OPERATOR_CALLBACKS_DEFAULT_URL
  value: {{ $callbacks.default.url | quote }}
- name: OPERATOR_CALLBACKS_DEFAULT_SECRET
  value: {{ with $callbacks.default.secretRef }}{{ ternary (printf "%s/%s" .name .key) "" (ne .name "") | quote }}{{ end }}
- name: OPERATOR_CALLBACKS_ALLOW
  value: {{ join "," $callbacks.allow | quote }}
- name: OPERATOR_CALLBACKS_SECRETS
  value: {{ join "," $callbacks.secrets | quote }}
- name: OPERATOR_CALLBACKS_TIMEOUT_SECONDS
  value: {{ $callbacks.timeoutSeconds | quote }}
- name: OPERATOR_CALLBACKS_CA
  value: {{ $callbacks.ca | quote }}
- name: OPERATOR_CLUSTER_DOMAIN
  value: {{ $root.Values.clusterDomain | quote }}
{{- with include "processing-tasks.rabbitmqSecret" $root }}
- name: OPERATOR_RABBITMQ_URL
  valueFrom:
    secretKeyRef:
      name: {{ . }}
      key: url
- name: OPERATOR_RABBITMQ_EXCHANGE
  value: {{ $root.Values.events.rabbitmq.exchange | quote }}
{{- end }}
{{- with $root.Values.traces.endpoint }}
- name: OPERATOR_TRACES_ENDPOINT
  value: {{ . | quote }}
- name: OPERATOR_TRACES_RATIO
  value: {{ $root.Values.traces.ratio | quote }}
{{- with $root.Values.traces.headersSecret }}
- name: OPERATOR_TRACES_HEADERS
  valueFrom:
    secretKeyRef:
      name: {{ . }}
      key: headers
{{- end }}
{{- end }}
- name: OPERATOR_HISTORY_DAYS
  value: {{ int $root.Values.operator.historyDays | quote }}
- name: OPERATOR_LOG_LEVEL
  value: {{ $root.Values.operator.logLevel | quote }}
{{- with $root.Values.operator.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* What the operator may do, in each task namespace or, with operator.clusterWide, in all. Of Secrets those
alone that sign callbacks. */}}
{{- define "processing-tasks.operatorRules" -}}
- apiGroups: [tasks.zzdsj.io]
  resources: [processingtasks]
  # delete: when ttlSecondsAfterFinished is over; create and patch: tasks of schedules, which may replace each other.
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [tasks.zzdsj.io]
  resources: [processingtasks/status]
  verbs: [get, patch, update]
- apiGroups: [tasks.zzdsj.io]
  resources: [workerpools, processingschedules]
  verbs: [list, watch]
- apiGroups: [tasks.zzdsj.io]
  resources: [workerpools/status, processingschedules/status]
  verbs: [patch]
# No task has finalizers, no pool and no schedule. Clusters that enforce permissions of owner references (OpenShift) ask for this
# when something is made whose owner is one of them.
- apiGroups: [tasks.zzdsj.io]
  resources: [processingtasks/finalizers, workerpools/finalizers, processingschedules/finalizers]
  verbs: [update]
- apiGroups: [batch]
  resources: [jobs]
  verbs: [get, list, watch, create, delete]
# Pods are read when a Job ends (termination message) or does not start; they aren't watched.
- apiGroups: [""]
  resources: [pods]
  verbs: [get, list]
# Why the Job controller could not create a pod stands in Events alone; the operator tells retries and failures in Events of its own.
- apiGroups: [events.k8s.io]
  resources: [events]
  verbs: [create, list]
{{- with .Values.callbacks.secrets }}
# Keys that sign callbacks.
- apiGroups: [""]
  resources: [secrets]
  resourceNames:
    {{- toYaml . | nindent 4 }}
  verbs: [get]
{{- end }}
{{- end }}

{{/* Name of the Secret with the address of RabbitMQ; empty: there is none. */}}
{{- define "processing-tasks.rabbitmqSecret" -}}
{{- if .Values.events.rabbitmq.existingSecret }}
{{- .Values.events.rabbitmq.existingSecret }}
{{- else if .Values.events.rabbitmq.url }}
{{- include "processing-tasks.fullname" . }}-rabbitmq
{{- end }}
{{- end }}

{{/* Resources as JSON: quantities may be written as numbers. */}}
{{- define "processing-tasks.resources" -}}
{{- $all := dict }}
{{- range $kind, $quantities := . }}
{{- $strings := dict }}
{{- range $resource, $quantity := $quantities }}
{{- $_ := set $strings $resource (toString $quantity) }}
{{- end }}
{{- $_ := set $all $kind $strings }}
{{- end }}
{{- toJson $all }}
{{- end }}

{{/* Keys of a Secret for the values `sources`; what is empty has no key, and the runner its default. */}}
{{- define "processing-tasks.sources" -}}
{{- $lists := dict "TASKS_SOURCE_ALLOW" .allow "TASKS_SOURCE_PORTS" .ports "TASKS_S3_BUCKETS" .s3.buckets }}
{{- range $key, $values := $lists }}
{{- with $values }}
{{ $key }}: {{ join "," . | b64enc }}
{{- end }}
{{- end }}
{{- $texts := dict "TASKS_SOURCE_CA" .ca "TASKS_S3_ENDPOINT" .s3.endpoint "TASKS_S3_REGION" .s3.region "TASKS_S3_ADDRESSING" .s3.addressing "TASKS_S3_ACCESS_KEY_ID" .s3.accessKeyId "TASKS_S3_SECRET_ACCESS_KEY" .s3.secretAccessKey }}
{{- range $key, $value := $texts }}
{{- with $value }}
{{ $key }}: {{ b64enc . }}
{{- end }}
{{- end }}
{{- range $key, $on := dict "TASKS_SOURCE_ALLOW_HTTP" .allowHttp "TASKS_S3_ANONYMOUS" .s3.anonymous }}
{{- if $on }}
{{ $key }}: {{ b64enc "true" }}
{{- end }}
{{- end }}
{{- end }}

{{/* With stores.bundled: gives `stores` the addresses of the stores that come along, once, before anybody reads them. */}}
{{- define "processing-tasks.bundle" -}}
{{- if and .Values.stores.bundled (not .Values.bundledStores.made) }}
{{- with .Values.stores }}
{{- if or .existingSecret .postgres.url .redis.url .milvus.url .milvus.token .elasticsearch.url .elasticsearch.apiKey }}
{{- fail "stores.bundled: leave stores.existingSecret and the stores' settings empty when it is set" }}
{{- end }}
{{- end }}
{{- $_ := set .Values.bundledStores "made" true }}
{{- $name := include "processing-tasks.fullname" . }}
{{- $known := lookup "v1" "Secret" .Release.Namespace (printf "%s-stores" $name) }}
{{- $password := .Values.bundledStores.password | default (dig "data" "password" "" ($known | default dict) | b64dec) | default (randAlphaNum 24) }}
{{- $_ := set .Values.bundledStores "password" $password }}
{{- $domain := printf "%s.svc.%s" .Release.Namespace .Values.clusterDomain }}
{{- $_ := set .Values.stores.postgres "url" (printf "postgresql://tasks:%s@%s-postgres.%s:5432/tasks" $password $name $domain) }}
{{- $_ := set .Values.stores.redis "url" (printf "redis://:%s@%s-redis.%s:6379/0" $password $name $domain) }}
{{- $_ := set .Values.stores.milvus "url" (printf "http://%s-milvus.%s:19530" $name $domain) }}
{{- $_ := set .Values.stores.elasticsearch "url" (printf "http://elastic:%s@%s-elasticsearch.%s:9200" $password $name $domain) }}
{{- end }}
{{- end }}

{{/* Checks the URLs of a dict "stores" that stands at "path". Here and not in the schema, whose errors print the value: it holds a password. */}}
{{- define "processing-tasks.validateStores" -}}
{{- $path := .path }}
{{- $stores := .stores }}
{{- range $store, $schemes := dict "postgres" "postgres(ql)?" "redis" "rediss?(\\+(sentinel|cluster))?" "milvus" "https?" "elasticsearch" "https?" }}
{{- $url := dig $store "url" "" $stores }}
{{- if and $url (not (regexMatch (printf "^%s://[^/]" $schemes) $url)) }}
{{- fail (printf "%s.%s.url: must begin with %s and name a host" $path $store (index (dict "postgres" "postgresql://" "redis" "redis://, rediss://, redis+sentinel:// or redis+cluster://" "milvus" "http:// or https://" "elasticsearch" "http:// or https://") $store)) }}
{{- end }}
{{- end }}
{{- end }}

{{/* Values that contradict each other; the schema has checked each one by itself. */}}
{{- define "processing-tasks.validate" -}}
{{- $stores := .Values.stores }}
{{- include "processing-tasks.validateStores" (dict "path" "stores" "stores" $stores) }}
{{- include "processing-tasks.validateStores" (dict "path" "operator.stores" "stores" .Values.operator.stores) }}
{{- if and $stores.existingSecret (or $stores.postgres.url $stores.redis.url $stores.milvus.url $stores.milvus.token $stores.elasticsearch.url $stores.elasticsearch.apiKey $stores.elasticsearch.ca) }}
{{- fail "stores.existingSecret: leave the urls, the token and the API key below stores empty when it is set" }}
{{- end }}
{{- with .Values.callbacks.default.secretRef }}
{{- if ne (empty .name) (empty .key) }}
{{- fail "callbacks.default.secretRef: give both name and key, or none" }}
{{- end }}
{{- if and .name (not (has .name ($.Values.callbacks.secrets | default list))) }}
{{- fail (printf "callbacks.default.secretRef.name: %s is not one of callbacks.secrets, so the operator may not read it" .name) }}
{{- end }}
{{- end }}
{{- with .Values.events.rabbitmq }}
{{- if and .url .existingSecret }}
{{- fail "events.rabbitmq.existingSecret: leave events.rabbitmq.url empty when it is set" }}
{{- end }}
{{- if and .url (not (regexMatch "^amqps?://[^/]" .url)) }}
{{- fail "events.rabbitmq.url: must begin with amqp:// or amqps:// and name a host" }}
{{- end }}
{{- end }}
{{- with .Values.gateway.upload }}
{{- if and .s3.location .claims }}
{{- fail "gateway.upload.claims: leave them empty when gateway.upload.s3.location is set" }}
{{- end }}
{{- if and .s3.location .s3.existingSecret (or .s3.accessKeyId .s3.secretAccessKey) }}
{{- fail "gateway.upload.s3.existingSecret: leave accessKeyId and secretAccessKey empty when it is set" }}
{{- end }}
{{- end }}
{{- if and $stores.existingSecret .Values.runner.embeddingModel }}
{{- fail (printf "runner.embeddingModel: has no effect with stores.existingSecret; put TASKS_EMBEDDING_MODEL into its Secret %s" $stores.existingSecret) }}
{{- end }}
{{- if and $stores.existingSecret .Values.runner.embeddingModels }}
{{- fail (printf "runner.embeddingModels: has no effect with stores.existingSecret; put TASKS_EMBEDDING_MODELS into its Secret %s" $stores.existingSecret) }}
{{- end }}
{{- if and $stores.existingSecret (include "processing-tasks.sources" .Values.sources) }}
{{- fail (printf "sources: has no effect with stores.existingSecret; put the keys of docs/sources.md into its Secret %s" $stores.existingSecret) }}
{{- end }}
{{- with .Values.operator }}
{{- if and (gt (int .replicas) 1) (not .leaderElection.enabled) }}
{{- fail "operator.replicas: several operators need operator.leaderElection.enabled, or all of them act" }}
{{- end }}
{{- with .leaderElection }}
{{- if not (and (lt (float64 .renewSeconds) (float64 .deadlineSeconds)) (le (float64 .deadlineSeconds) (mulf 0.8 .durationSeconds))) }}
{{- fail "operator.leaderElection.deadlineSeconds: must be more than renewSeconds and 80 % of durationSeconds at most: a leader is to have stopped before another one begins" }}
{{- end }}
{{- end }}
{{- end }}
{{- $names := dict }}
{{- range $index, $namespace := .Values.taskNamespaces }}
{{- if hasKey $names $namespace.name }}
{{- fail (printf "taskNamespaces[%d].name: %s is named twice" $index $namespace.name) }}
{{- end }}
{{- if $namespace.shared }}
{{- if not $.Values.taskLabels }}
{{- fail (printf "taskNamespaces[%d].shared: needs taskLabels, or two releases look after the same tasks" $index) }}
{{- end }}
{{- range $name := list "create" "quota" "limits" "stores" "sources" "documents" }}
{{- if get $namespace $name }}
{{- fail (printf "taskNamespaces[%d].%s: has no effect with shared; set it in the release that makes what is in %s" $index $name $namespace.name) }}
{{- end }}
{{- end }}
{{- end }}
{{- $_ := set $names $namespace.name true }}
{{- include "processing-tasks.validateStores" (dict "path" (printf "taskNamespaces[%d].stores" $index) "stores" ($namespace.stores | default dict)) }}
{{- if and $namespace.create (eq $namespace.name $.Release.Namespace) }}
{{- fail (printf "taskNamespaces[%d].create: %s is the release's own namespace, which helm makes (--create-namespace)" $index $namespace.name) }}
{{- end }}
{{- if and $stores.existingSecret $namespace.stores }}
{{- fail (printf "taskNamespaces[%d].stores: has no effect with stores.existingSecret; put the namespace's own values into its Secret %s" $index $stores.existingSecret) }}
{{- end }}
{{- if and $stores.existingSecret $namespace.sources }}
{{- fail (printf "taskNamespaces[%d].sources: has no effect with stores.existingSecret; put the keys of docs/sources.md into its Secret %s" $index $stores.existingSecret) }}
{{- end }}
{{- if and $.Values.documents.existingClaim $namespace.documents }}
{{- fail (printf "taskNamespaces[%d].documents: has no effect with documents.existingClaim" $index) }}
{{- end }}
{{- end }}
{{- if and $.Values.documents.enabled (not $.Values.documents.existingClaim) $.Values.documents.volumeName (gt (len .Values.taskNamespaces) 1) }}
{{- fail "documents.volumeName: a volume can be bound once; set taskNamespaces[].documents.volumeName for each namespace" }}
{{- end }}
{{- end }}

{{- define "processing-tasks.gatewaySelectorLabels" -}}
{{ include "processing-tasks.selectorLabels" . }}
app.kubernetes.io/component: gateway
{{- end }}

{{- define "processing-tasks.gatewayServiceAccount" -}}
{{- if .Values.gateway.serviceAccount.create }}
{{- default (printf "%s-gateway" (include "processing-tasks.fullname" .)) .Values.gateway.serviceAccount.name }}
{{- else }}
{{- required "gateway.serviceAccount.name: required when gateway.serviceAccount.create is false" .Values.gateway.serviceAccount.name }}
{{- end }}
{{- end }}

{{/* Settings of the gateway. Takes a dict of root and from (operatorStores). */}}
{{- define "processing-tasks.gatewayEnvironment" -}}
{{- $root := .root -}}
{{- $gateway := $root.Values.gateway -}}
{{- $namespaces := list }}
{{- range $root.Values.taskNamespaces }}
{{- $namespaces = append $namespaces .name }}
{{- end }}
{{- $default := default (first (append $namespaces $root.Release.Namespace)) $gateway.defaultNamespace }}
{{- if not (or $root.Values.operator.clusterWide (has $default $namespaces)) }}
{{- fail (printf "gateway.defaultNamespace: %s is not one of taskNamespaces" $default) }}
{{- end }}
- name: GATEWAY_POSTGRES_URL
  valueFrom:
    secretKeyRef:
      name: {{ .from.secret }}
      key: {{ .from.postgres }}
- name: GATEWAY_REDIS_URL
  valueFrom:
    secretKeyRef:
      name: {{ .from.secret }}
      key: {{ .from.redis }}
      optional: true
{{- /* Only whether they can be connected to is asked: no credentials. With stores.existingSecret, gateway.extraEnv names them. */}}
{{- range $store := list "milvus" "elasticsearch" }}
{{- with (index $root.Values.stores $store).url }}
{{- $url := urlParse . }}
- name: GATEWAY_{{ upper $store }}_URL
  value: {{ printf "%s://%s" $url.scheme $url.host }}
{{- end }}
{{- end }}
- name: GATEWAY_NAMESPACES
  value: {{ ternary "" (join "," $namespaces) $root.Values.operator.clusterWide | quote }}
- name: GATEWAY_DEFAULT_NAMESPACE
  value: {{ $default }}
{{- with $root.Values.taskLabels }}
- name: GATEWAY_TASK_LABELS
  value: {{ toJson . | quote }}
{{- end }}
- name: GATEWAY_AUTH
  value: {{ $gateway.auth }}
- name: GATEWAY_AUDIENCES
  value: {{ join "," $gateway.audiences | quote }}
- name: GATEWAY_LISTEN
  value: 0.0.0.0:8084
- name: GATEWAY_FRONT_LISTEN
  value: 0.0.0.0:8080
- name: GATEWAY_RATE
  value: {{ $gateway.limit.perSecond | quote }}
- name: GATEWAY_BURST
  value: {{ int $gateway.limit.burst | quote }}
- name: GATEWAY_CORS_ORIGINS
  value: {{ join "," $gateway.corsOrigins | quote }}
{{- if $gateway.upload.enabled }}
- name: GATEWAY_DOCUMENTS
  value: {{ default "/documents" $gateway.upload.s3.location }}
{{- with $gateway.upload.s3 }}
{{- if .location }}
{{- $read := $root.Values.sources }}
{{- range $name, $value := dict "ENDPOINT" (default $read.s3.endpoint .endpoint) "REGION" (default $read.s3.region .region) "ADDRESSING" (default $read.s3.addressing .addressing) "CA" (default $read.ca .ca) }}
{{- with $value }}
- name: GATEWAY_S3_{{ $name }}
  value: {{ quote . }}
{{- end }}
{{- end }}
{{- range $name, $key := dict "ACCESS_KEY_ID" "accessKeyId" "SECRET_ACCESS_KEY" "secretAccessKey" }}
- name: GATEWAY_S3_{{ $name }}
  valueFrom:
    secretKeyRef:
      name: {{ include "processing-tasks.uploadSecret" $root }}
      key: {{ $key }}
{{- end }}
{{- end }}
{{- end }}
- name: GATEWAY_UPLOAD_BYTES
  value: {{ int64 $gateway.upload.maxBytes | quote }}
{{- end }}
- name: GATEWAY_DRAIN_SECONDS
  value: {{ int $gateway.drainSeconds | quote }}
- name: GATEWAY_STOP_SECONDS
  value: {{ int $gateway.stopSeconds | quote }}
{{- if $gateway.queue.enabled }}
- name: GATEWAY_RABBITMQ_URL
  valueFrom:
    secretKeyRef:
      name: {{ include "processing-tasks.rabbitmqSecret" $root | required "gateway.queue.enabled: set events.rabbitmq.url or events.rabbitmq.existingSecret, where the queue is" }}
      key: url
- name: GATEWAY_RABBITMQ_QUEUE
  value: {{ $gateway.queue.name | quote }}
{{- if eq $gateway.auth "kubernetes" }}
- name: GATEWAY_RABBITMQ_ACCOUNT
  value: {{ $gateway.queue.account | required "gateway.queue.account: required, unless gateway.auth is trust-the-network: whose rights have the messages?" | quote }}
{{- end }}
- name: GATEWAY_RABBITMQ_PREFETCH
  value: {{ int $gateway.queue.prefetch | quote }}
{{- end }}
- name: GATEWAY_LOG_LEVEL
  value: {{ $gateway.logLevel }}
{{- with $gateway.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* What the gateway may do in each task namespace or, with operator.clusterWide, in all. A caller gets no more than it has itself. */}}
{{- define "processing-tasks.gatewayRules" -}}
- apiGroups: [tasks.zzdsj.io]
  resources: [processingtasks]
  verbs: [get, create, patch, delete]
# Logs of tasks: their pods by label, and what they wrote.
- apiGroups: [""]
  resources: [pods]
  verbs: [get, list]
- apiGroups: [""]
  resources: [pods/log]
  verbs: [get]
{{- end }}

{{/* Name of the Secret with the account that uploads into a bucket. */}}
{{- define "processing-tasks.uploadSecret" -}}
{{- default (printf "%s-uploads" (include "processing-tasks.fullname" .)) .Values.gateway.upload.s3.existingSecret }}
{{- end }}

{{/* Claims of the gateway's namespace with the document volumes of task namespaces, as a list under "claims". */}}
{{- define "processing-tasks.gatewayClaims" -}}
{{- $claims := list }}
{{- if and .Values.gateway.upload.enabled (not .Values.gateway.upload.s3.location) }}
{{- $served := list }}
{{- range .Values.taskNamespaces }}
{{- $served = append $served .name }}
{{- end }}
{{- range .Values.gateway.upload.claims }}
{{- if not (or $.Values.operator.clusterWide (has .namespace $served)) }}
{{- fail (printf "gateway.upload.claims: %s is not one of taskNamespaces" .namespace) }}
{{- end }}
{{- $claims = append $claims . }}
{{- end }}
{{- if and (not $claims) .Values.documents.enabled (has .Release.Namespace $served) }}
{{- $claims = append $claims (dict "namespace" .Release.Namespace "claimName" (default "processing-task-documents" .Values.documents.existingClaim) "subPath" (replace "{namespace}" .Release.Namespace .Values.documents.subPath)) }}
{{- end }}
{{- if not $claims }}
{{- fail "gateway.upload.enabled: give gateway.upload.claims, claims in the release's namespace that lead to the document volumes, or gateway.upload.s3.location" }}
{{- end }}
{{- end }}
{{- dict "claims" $claims | toYaml }}
{{- end }}

{{/* Egress rules that several pods have. Takes a dict of policies, api (whether the Kubernetes API is spoken to) and ports (of stores). */}}
{{- define "processing-tasks.egress" -}}
# Names.
- ports:
    - {protocol: UDP, port: 53}
    - {protocol: TCP, port: 53}
{{- if .api }}
# The Kubernetes API, behind whatever address: policies see it after the Service's has been replaced.
- ports:
    {{- range .policies.apiServerPorts }}
    - {protocol: TCP, port: {{ int . }}}
    {{- end }}
  {{- with .policies.apiServerTo }}
  to:
    {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end }}
{{- if .ports }}
# Stores.
- ports:
    {{- range .ports }}
    - {protocol: TCP, port: {{ int . }}}
    {{- end }}
  {{- with .policies.storesTo }}
  to:
    {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end }}
{{- end }}
