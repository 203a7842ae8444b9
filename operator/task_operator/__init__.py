"""The operator: makes Jobs of ProcessingTasks and tells in their status what becomes of them."""
