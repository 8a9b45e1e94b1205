"""One frame."""
