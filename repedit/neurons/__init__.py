"""From statistics of two sets to an edit: importances, scores, selections, and trajectories of growing edits."""
