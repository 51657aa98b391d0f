"""GGUF files: found, hashed, made."""
