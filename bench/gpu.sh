#!/usr/bin/env bash
# The CUDA path on a machine that has a card, stage by stage, each at most eight minutes on an H200:
#     bash bench/gpu.sh check|speed|7b|trl|profile [PYTHON]
# Keep what it prints in bench/results/, with its head. What each stage does: bench/gpu.py.
set -u
cd "$(dirname "$0")/.."
stage=${1:?which stage? check, speed, 7b, trl or profile}
python=${2:-python3}
status=0
date -u +%Y-%m-%d
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null || echo "no nvidia-smi"
"$python" -m bench.gpu "$stage" || status=1
if [ "$stage" = check ]; then
  "$python" -m pytest -q tests/test_fake_cuda.py tests/test_cuda.py || status=1
  "$python" train.py --out "${OUT:-out}/gpu-builtin-$$" || status=1
fi
exit $status
