"""What a release of vLLM changes under our feet, read from its source. See ``__main__``."""
