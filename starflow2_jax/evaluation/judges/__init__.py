"""Scores of edited and drawn images by a judge behind an OpenAI-compatible address."""
