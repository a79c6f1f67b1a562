#!/usr/bin/env bash
# Everything that is unknown about the CUDA path, in one call on a borrowed card:
#     bash bench/gpu.sh h100 [PYTHON]       at most 450 s, for 78 GiB
#     bash bench/gpu.sh h200 [PYTHON]       at most 240 s, for 139 GiB
#     bash bench/gpu.sh STAGE [PYTHON]      one stage; bench/gpu.py says which there are
# A stage is a process with a limit of seconds, so none takes the time of the next. $OUT (out/gpu) gets
# the log and rows.jsonl, a row for each result as it comes; the table at the end is made of these.
# With SMOLLM2, PAIRS and EVAL (a model folder and two files of pairs) the last stage trains that model.
set -u
cd "$(dirname "$0")/.."
export OUT=${OUT:-out/gpu} HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
card=${1:?which card or stage? h100, h200, or a stage of bench/gpu.py}
python=${2:-python3}
case $card in
  h100) stages="15:machine 30:gradients 25:builtin 35:waits 80:speed 95:wide 45:profile 40:lora 60:trl 25:smollm2" ;;
  h200) stages="15:machine 140:full 55:profile-full 30:smollm2" ;;
  *) stages="3600:$card" ;;
esac
mkdir -p "$OUT"
rm -f "$OUT/rows.jsonl"
{
  date -u +%Y-%m-%d
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null || echo "no nvidia-smi"
  for stage in $stages; do
    timeout -k 5 "${stage%%:*}" "$python" -m bench.gpu "${stage#*:}"
    status=$?
    [ $status = 0 ] || echo "stage ${stage#*:}: ended with status $status (124: its ${stage%%:*} s were over)"
  done
  "$python" -m bench.gpu table
} 2>&1 | tee "$OUT/log"
