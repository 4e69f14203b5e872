"""Keys: where they lie in a page of each layout, and how they are rotated."""
