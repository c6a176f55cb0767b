"""A soak test: random kills, damaged files and hostile inputs for every command and reader."""
