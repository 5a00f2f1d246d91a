"""What is trained: Llama 3, its tokenizer and its text. Knows nothing of ranks and checkpoints."""
