"""The Trainer interface of nnScaler, on PyTorch's own engine or on nnScaler's."""
