#!/bin/sh
# Write the Python code of protos/hearth/v1 below a directory:  deploy/dev/protos.sh client
#
# One place for the compiler's options: `make protos` writes what is committed, tests/test_house.py writes beside it and
# compares. Needs .venv-protos (deploy/dev/setup.sh protos).
set -eu
target=${1:?"usage: deploy/dev/protos.sh DIRECTORY"}
target=$(cd -- "$target" && pwd)
cd -- "$(dirname -- "$0")/../.."
exec .venv-protos/bin/python -m grpc_tools.protoc -I protos \
    --python_out="$target" --pyi_out="$target" --grpc_python_out="$target" protos/hearth/v1/*.proto
