"""The synthetic benchmark: colored shapes, tasks, and a rule-based judge."""
