"""The latent codec: frozen tower, encoder, decoders, and their losses."""
