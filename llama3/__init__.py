"""What is trained: Llama 3, its tokenizer and its text. Knows transformers and datasets; nothing of ranks, meshes or checkpoints."""
