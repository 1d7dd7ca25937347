"""Pairing: a device becomes a caller by a code that holds address, certificate fingerprint and a one-time secret.

`cli` is `hearthd pair`, on the board; `gate` is the other half, in the daemon, which a device's `hearth pair` calls.
They share nothing but `records`, a directory of files beside the token file.
"""
