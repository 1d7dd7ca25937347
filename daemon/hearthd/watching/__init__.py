"""What the daemon sees of itself: counts of how calls end, warnings, Prometheus's page."""
