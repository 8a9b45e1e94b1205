"""Training data: pictures, clips and shards."""
