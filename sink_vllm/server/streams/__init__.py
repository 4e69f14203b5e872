"""``/v1/streams``: stored streams, appended to without resending them (API server)."""
