"""How a model is trained: nnScaler's Trainer interface on PyTorch's own distributed engine. Knows nothing of Llama."""
