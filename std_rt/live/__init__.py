"""Live sessions: a camera stylized in real time, its controls, its metrics and the frame-rate governor."""
