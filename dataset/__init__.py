"""From files to batches: sources, tokens, packed samples on disk, and the order of training."""
