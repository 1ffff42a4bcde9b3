#!/usr/bin/env bash
# All missing runs of one of the papers' tables, on what is at hand: scripts/reproduce.py says how.
#
#   scripts/reproduce.sh math --dry-run
#   scripts/reproduce.sh math model=tinyllama seed=0
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec "${PYTHON:-python}" scripts/reproduce.py "$@"
