"""Where a llama.cpp build comes from and what it is called."""
