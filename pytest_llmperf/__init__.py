"""Gate llama.cpp builds on speed, memory and quality from pytest."""

__version__ = "0.1.0"
