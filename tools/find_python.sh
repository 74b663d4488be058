#!/bin/sh
# Print the first Python that can make the environment: 3.11 or newer, with venv and pip inside.
# The one the user already runs comes first; a pyenv shim can exist and still not run, so each is tried.
check='import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))'
for name in ${1:-python3 python3.13 python3.12 python3.11 python}; do
    if "$name" -c "$check" >/dev/null 2>&1; then
        command -v "$name"
        exit 0
    fi
done
echo "error: no Python 3.11 or newer with the venv module (tried: ${1:-python3, python3.13, python3.12, python3.11});" \
    "install one, or name it: make PYTHON=/path/to/python3.11" >&2
exit 1
