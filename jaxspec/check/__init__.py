"""Whether a drafter fits its target: `report.check`, over the runs of `known_texts`."""
