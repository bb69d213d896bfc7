#!/usr/bin/env bash
# Fetch npm's chat parsers, which tests/data/importers/test_npm_parsers.py compares with ours, into .npm-parsers/ (not committed).
# Without npm or its registry it says so and exits 0; the test is then skipped with the reason.
set -euo pipefail
cd "$(dirname "$0")/../../.."
command -v npm >/dev/null || { echo "npm is not here: the comparison with npm's parsers is left out"; exit 0; }
mkdir -p .npm-parsers
if ! timeout 120 npm install --prefix .npm-parsers --no-audit --no-fund --ignore-scripts --loglevel=error \
  whatsapp-chat-parser@4.0.2 telegram-chat-parser@1.0.7; then
  echo "npm could not install the parsers: the comparison with them is left out"
  rm -rf .npm-parsers
fi
