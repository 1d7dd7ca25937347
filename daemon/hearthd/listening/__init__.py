"""Addresses, TLS and connections: where callers reach the daemon, and how many at once."""
