"""The daemon's life beside its server: signals, systemd, and a configuration that changes while it serves."""
