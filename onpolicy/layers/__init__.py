"""Layers of Llama-like decoders, compiled for CPUs that multiply bf16 values: frozen ones and trained ones."""
