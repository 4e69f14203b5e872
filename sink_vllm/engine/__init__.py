"""The engine core: who may hold KV pages, who owns them, and what is evicted when."""
