"""An OpenAI-compatible server of a STARFlow2."""
