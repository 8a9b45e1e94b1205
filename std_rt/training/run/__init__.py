"""What all stages share: recipes, runs, checkpoints, reports."""
