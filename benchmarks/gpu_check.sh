#!/usr/bin/env bash
# See gpu_check.py. PYTHON: which one runs it and everything that it starts.
exec "${PYTHON:-python3}" "$(dirname "${BASH_SOURCE[0]}")/gpu_check.py" "$@"
