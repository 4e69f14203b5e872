"""Train a hybrid and an attention-only model alike to recall facts from far back in a stream."""
