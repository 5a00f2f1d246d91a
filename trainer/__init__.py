"""How a model is trained: nnScaler's Trainer interface, on PyTorch's own engine or on nnScaler's."""
