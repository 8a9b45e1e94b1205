"""Cameras, files played as cameras, and the virtual camera."""
