#!/usr/bin/env bash
# Proves the CUDA path on a machine that has one, in a few minutes and with what is installed there:
#     bash bench/gpu.sh [python]
# CUDA tests, losses and gradients on the CPU and on CUDA in float32 and bfloat16, a speed table to 6.7B,
# TRL on the same pairs where it is installed, and the built-in job on the GPU. Keep what it prints in
# bench/results/ with date and hardware.
set -u
cd "$(dirname "$0")/.."
python=${1:-python3}
status=0
date -u +%Y-%m-%d
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null || echo "no nvidia-smi"
"$python" -m pytest -q tests/test_cuda.py || status=1
"$python" bench/gpu.py || status=1
timeout 150 "$python" bench/gpu_trl.py --steps 5 || echo "TRL: not measured to the end"
"$python" train.py --out "${OUT:-out}/gpu-builtin-$$" || status=1
exit $status
