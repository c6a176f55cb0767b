"""Package, pins and extras. `pip install -e .` is all a CPU user needs."""

from pathlib import Path

from setuptools import find_packages, setup

version = {}
exec(Path(__file__).with_name("starflow2_jax").joinpath("__init__.py").read_text(), version)

setup(
    name="starflow2_jax",
    version=version["__version__"],
    description="STARFlow2 in JAX: unified text and image modelling with exact-likelihood flows",
    long_description=Path(__file__).with_name("README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["starflow2_jax", "starflow2_jax.*"]),
    python_requires=">=3.11",
    # Lower bounds are tested on python 3.11, upper ones on python 3.12.
    install_requires=[
        "jax>=0.10.2,<0.13",
        "flax>=0.12.8,<0.13",
        "optax>=0.2.8,<0.3",
        "orbax-checkpoint>=0.12.8,<0.13",  # its v1 interface still moves
        "grain>=0.2.18,<0.3",
        "array_record>=0.8.3",
        "ml-collections>=1.1.0",
        "tensorflow-datasets>=4.9.9",
        "transformers>=5.0,<6",
        "numpy>=2.0",
        "absl-py>=2.1",
        "etils[epath]>=1.12",
        "msgspec>=0.19",
        "pillow>=12.2",  # earlier releases hold decoder vulnerabilities
        "safetensors>=0.6",
        "matplotlib>=3.9",
    ],
    extras_require={
        "tpu": ["jax[tpu]"],
        "cuda": ["jax[cuda13]"],
        "plan": ["libtpu"],
        "test": ["pytest>=8", "ruff>=0.8", "tensorboardX>=2.6.4"],
        "parity": ["torch>=2.6"],
        "torch": ["torch>=2.6", "pyyaml>=6"],
        "tensorboard": ["tensorboardX>=2.6.4"],
        "wandb": ["wandb"],
        "trackio": ["trackio"],
    },
)
