"""Train, prune, build, deliver and prove a vision model on an edge device."""

__version__ = "0.1.0"
