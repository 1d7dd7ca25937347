"""What the daemon's life, in `server`, is made of.

parts         what a daemon consists of, made from its configuration
grpc_servers  the services behind addresses, and what a call meets before them
reload        a configuration that changes while it serves, or does not change at all
live_parts    what can take new values
notify        what systemd is told
signals       what the daemon is told
beside        coroutines that run beside one another
"""
