"""What operator and gateway have in common: the way to the Kubernetes API, settings, logs and the feed of live progress."""
