"""One request from its arrival to its end: its state, how its tokens are chosen, and what its caller sees."""
