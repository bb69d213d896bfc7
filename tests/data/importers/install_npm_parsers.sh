#!/usr/bin/env bash
# Fetch npm's chat parsers, which tests/data/importers/test_npm_parsers.py compares with ours, and llama.cpp into .npm-parsers/ (not committed).
# Without npm or its registry it says so and exits 0; the tests are then skipped with the reason.
set -euo pipefail
cd "$(dirname "$0")/../../.."
command -v npm >/dev/null || { echo "npm is not here: the comparison with npm's parsers is left out"; exit 0; }
mkdir -p .npm-parsers
if ! timeout 120 npm install --prefix .npm-parsers --no-audit --no-fund --ignore-scripts --loglevel=error \
  whatsapp-chat-parser@4.0.2 telegram-chat-parser@1.0.7; then
  echo "npm could not install the parsers: the comparison with them is left out"
  rm -rf .npm-parsers
fi
# A compiled llama.cpp, which runs our GGUF files in tests/trainer/convert: 85 MB and 15 s without its builds for other systems and GPUs.
if [ "$(uname -sm)" = "Linux x86_64" ] && ! timeout 120 npm install --prefix .npm-parsers --no-audit --no-fund --ignore-scripts \
  --omit=optional --loglevel=error node-llama-cpp@3.22.1 @node-llama-cpp/linux-x64@3.22.1; then
  echo "npm could not install node-llama-cpp: the tests with llama.cpp are left out"
  rm -rf .npm-parsers/node_modules/node-llama-cpp
fi
