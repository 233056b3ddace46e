"""Readers of users' files: prompts and conversations."""
