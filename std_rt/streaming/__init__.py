"""Many frames."""
