"""Prometheus metrics: off unless `metrics.address` is set. docs/observability.md describes each of them.

    figures     what is counted as it happens
    live        what is looked up when somebody asks: the same that `hearth status` shows
    endpoint    the page, over plain HTTP

No label holds a caller's name or anything that a person wrote: models, roles and reasons are words of the
configuration and of the daemon itself.

Made by `observation`, which alone imports this: the package prometheus_client costs memory that nobody should pay who
does not ask for it.
"""
