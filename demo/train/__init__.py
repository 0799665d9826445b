"""Trains the demo model: the autoencoder first, then the diffusion model with its text encoder, then the student."""
