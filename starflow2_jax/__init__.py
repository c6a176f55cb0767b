"""STARFlow2 in JAX: autoregressive normalizing flows that read and write text and images."""

__version__ = "0.1.0"
