"""``/streams``: a page to look at the stored streams with (API server)."""
