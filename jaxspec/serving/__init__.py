"""Serving: continuous batching under one verification budget, and an HTTP server."""
