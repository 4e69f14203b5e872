"""The attention layers of the loaded model, and how the keys of each rotate."""
