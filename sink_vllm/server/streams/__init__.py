"""``/v1/streams``: streams a client appends to without resending them (API server)."""
