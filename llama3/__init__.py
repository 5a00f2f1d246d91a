"""Llama 3: the model, its loss, adapters, weights, export and generation; nothing of ranks or checkpoints."""
