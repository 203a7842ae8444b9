"""The one-node Kubernetes and the stores that demo and tests run on."""
