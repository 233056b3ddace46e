"""What people hand in: prompts and conversations. The only readers of their files."""
