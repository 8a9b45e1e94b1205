"""Streams of frames: styles that change, steady video, pacing, and how long everything took."""
