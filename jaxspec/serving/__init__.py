"""Many requests at once: continuous batching, one verification budget, an HTTP server."""
