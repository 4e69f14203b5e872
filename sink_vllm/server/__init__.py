"""The API server, and whoever builds the configuration: flags, lengths, requests, responses."""
