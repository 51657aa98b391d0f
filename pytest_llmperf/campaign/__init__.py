"""All measuring of one config in one run, by llama-server or by llama-bench."""
