"""The task runner: one process carries out one ProcessingTask, in a pod or on a desk, and needs nothing from Kubernetes.

``python -m job_runner --help`` shows the commands. ``docs/pipeline.md`` tells what happens to a document, in which order,
and why nothing is lost when the process dies at any write.
"""
