"""Bytes to numbers and back: stateless, pure, the same on every host."""
