"""Name tables between published weights and ours."""
