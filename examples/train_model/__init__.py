"""Train, export and measure the small Python-source model in ``examples/models``."""
