"""Page moves: what a step's moves mean, and their execution on whole pages."""
