"""The machine under the daemon: its heat, its power, its memory."""
