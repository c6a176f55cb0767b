"""The evaluation suite on the synthetic shapes benchmark."""
