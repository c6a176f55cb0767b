"""Configuration files with `get_config(variant)`; an installation has them in the package."""
