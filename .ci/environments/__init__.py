"""What `make install` makes: one virtual environment per vLLM line. Standard library only."""
