"""Microsoft's nnScaler 0.8 as the second engine: `trainer` runs it, `files` reads its checkpoints."""
