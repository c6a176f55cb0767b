"""Image latents: the codec that makes them, and stored copies of them."""
