"""Output trees of public benchmarks: prompts, layouts, completeness and protocol stamps."""
