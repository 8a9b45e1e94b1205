"""The stylization of one frame: bundle, style and prompt in, a compiled program run on a backend."""
