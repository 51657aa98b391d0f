"""A live server in, launches out."""
