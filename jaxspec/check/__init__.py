"""Whether a drafter fits its target."""
