#!/usr/bin/env bash
# Runs tests/core on another Python, and another torch: tests/on_python.sh 3.10 torch==2.7.0
# Needs uv (pip install uv), which brings the Python.
set -euo pipefail
cd "$(dirname "$0")/.."

exec uv run --isolated --no-project --python "$1" --with "${2:-torch}" --with "${3:-numpy}" \
  --with entmax --with hypothesis --with matplotlib --with pytest --with scipy --with setuptools \
  python -m pytest tests/core -q
