"""The list of packages, which pyproject.toml cannot express; all other metadata is there."""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["starflow2_jax", "starflow2_jax.*"]),
        # An installation has no folder experiments/ of its own; see runtime/cli.py.
        "starflow2_jax.experiments",
        "starflow2_jax.experiments.ablations",
    ],
    package_dir={"starflow2_jax.experiments": "experiments"},
)
