"""One frozen configuration from TOML and environment: its sections and kinds of keys, all paths, what roles may do."""
