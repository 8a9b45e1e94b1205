"""The window of a live session, and its overlay."""
