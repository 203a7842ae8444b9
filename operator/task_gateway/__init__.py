"""The gateway: ProcessingTasks over REST, WebSocket and server-sent events, for callers that do not speak Kubernetes."""
