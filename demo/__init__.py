"""A small text-to-image model of our own: drawn scenes, an oracle that reads pictures back, training, weights."""
