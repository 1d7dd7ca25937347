"""The models that a daemon serves: which there are, which of them are loaded, and whose turn it is to compute.

    pool    every configured model; loads them when they are asked for, and lets them go
    baton   one model computes at a time

Called by `server` and `services`.
"""
