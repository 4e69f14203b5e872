"""KV pages: read and written as memory, and where keys and values lie in each layout."""
