"""Quality of endless streams, measured by teacher forcing through the real engine."""
