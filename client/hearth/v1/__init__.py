"""Generated from protos/hearth/v1 by `make protos`. Never edited by hand."""
