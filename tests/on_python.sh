#!/usr/bin/env bash
# Runs tests/core on another Python, torch and numpy: tests/on_python.sh 3.13, tests/on_python.sh 3.11 torch==2.7.0 "numpy<2.3"
# (the interpreter of Triton 3.3, which torch 2.7 brings, fails with newer ones). What follows goes to pytest.
# Needs uv (pip install uv), which brings the Python; a path to one does as well.
set -euo pipefail
cd "$(dirname "$0")/.."

exec uv run --isolated --no-project --python "$1" --with "${2:-torch}" --with "${3:-numpy}" \
  --with entmax --with hypothesis --with matplotlib --with pytest --with safetensors --with scipy --with setuptools \
  python -m pytest tests/core -q "${@:4}"
