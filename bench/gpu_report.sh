#!/usr/bin/env bash
# Builds in place, runs the GPU tests and measures the GPU kernels against their targets, in under ten minutes and
# without a network: torch with CUDA and nvcc are enough. Without a GPU it says what it skips.
#
#   bench/gpu_report.sh [--out results.json]        BUILD=0: as it is; PYTHON: of which environment
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}

if [[ ${BUILD-1} != 0 ]]; then
  "$python" setup.py -q build_ext --inplace
fi

tests="no GPU is here"
if "$python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())'; then
  if "$python" -c 'import pytest' 2> /dev/null; then
    # The tests of a GPU's own, and those of every device in their variant for GPUs.
    mapfile -t files < <(grep -lE '^def test_\w+\(device' tests/test_*.py)
    log=$(mktemp)
    # Interrupted, pytest still says what failed; what matters most comes first.
    status=0
    timeout -s INT -k 15 210 "$python" -m pytest -q --tb=short -p no:cacheprovider --continue-on-collection-errors \
      tests/test_gpu.py tests/test_linear_4bit.py tests/test_prefix_attention.py "${files[@]}" -k "cuda or test_gpu" \
      2>&1 | tee "$log" | tail -n 60 || status=$?
    tests=$(tail -n 1 "$log")
    # timeout's own word; pytest's last line would read as if these had been all.
    if [[ $status == 124 || $status == 137 ]]; then tests+=" (stopped when time was up: not all ran)"; fi
    rm "$log"
  else
    tests="pytest is not installed"
  fi
fi
echo "GPU tests: $tests"

# A section takes up to a minute and a half.
"$python" -m bench.gpu_report --tests "$tests" --limit $((500 - SECONDS)) "$@"
