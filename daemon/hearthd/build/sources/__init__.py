"""Where checkpoints come from: the catalogue, package indexes, the hub, exports by optimum."""
