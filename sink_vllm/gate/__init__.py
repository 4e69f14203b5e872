"""What is refused at start-up, and how a refused start ends."""
