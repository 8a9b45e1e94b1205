"""Processing of frame streams: batching, temporal filter, optical flow, frame skipping."""
