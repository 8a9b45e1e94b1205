"""Video clips: reading, writing, transcoding, and recording live sessions."""
