"""One line for each call, without content."""
