"""A camera."""
