#!/usr/bin/env bash
# Everything that needs a GPU, in one call of less than ten minutes and offline: what the machine is, the installed
# wheel, the tests, compute-sanitizer, the benchmark, a profile. Before, where it is built (git ignores carry/):
#   TORCH_CUDA_ARCH_LIST=9.0 NVCC_APPEND_FLAGS=-lineinfo pip wheel -w carry --no-deps . && git rev-parse @ >carry/commit
#   cp FOLDER/instances_val2014_100.json carry
#   pip download -d carry --no-deps --python-version 3.12 pycocotools tabulate tqdm
# Then, with carry/, on the GPU machine (it needs torch, pytest, hypothesis, numpy, matplotlib, ncu, compute-sanitizer):
#   benchmarks/gpu_check.sh --out DIR
# Options: --wheel FILE (default: the newest in carry/ or dist/, else one is built), --seconds N for all of it, --only
# REGEX of the steps' names, --rehearse (without a GPU: runs what needs none and names the rest). PYTHON: which one.
# Every step has its own time limit; a failure is recorded and the next step runs. DIR gets at most eight files;
# gpu_check.tar.gz among them holds everything. Exit status 1 if any step failed.
set -uo pipefail
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
out=$repo/benchmarks/out/gpu_check wheel="" seconds=560 only="" rehearse=""
while [ $# -gt 0 ]; do
  case $1 in
    --out) out=$(realpath -m "$2"); shift 2 ;;
    --wheel) wheel=$(realpath "$2"); shift 2 ;;
    --seconds) seconds=$2; shift 2 ;;
    --only) only=$2; shift 2 ;;
    --rehearse) rehearse=1; shift ;;
    *) sed -n '2,12s/^# \?//p' "$0"; exit 2 ;;
  esac
done
SECONDS=0
python=$(realpath -s "$(command -v "${PYTHON:-python3}")") # as it is named: a venv's is a link
work=$(mktemp -d)
logs=$work/logs results=$work/results site=$work/site
mkdir -p "$out" "$logs" "$results" "$site"
cd "$work" || exit 1 # outside the source tree, so that Python finds the installed package
for folder in /usr/local/cuda/bin /opt/nvidia/nsight-compute/*/; do PATH=$PATH:$folder; done
export PATH python repo work results site PYTHONPATH=$site PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export OMP_WAIT_POLICY=PASSIVE PIP_ROOT_USER_ACTION=ignore HYPOTHESIS_PROFILE=ci
export TORCHINDUCTOR_CACHE_DIR=$work/inductor TORCHINDUCTOR_COMPILE_THREADS=4
annotations=${SEA_KERNELS_DATA:-$repo/carry}/instances_val2014_100.json
[ -f "$annotations" ] && export SEA_KERNELS_DATA="${annotations%/*}"
SEA_KERNELS_COMMIT=$(git -C "$repo" rev-parse HEAD 2>/dev/null || cat "$repo/carry/commit" 2>/dev/null || echo unknown)
export SEA_KERNELS_COMMIT

say() { echo "$*" | tee -a "$work/summary.txt"; }

step() { # name, seconds that it may take, command: what it prints goes to logs/NAME.log, its last line to the summary
  local name=$1 limit=$2 began=$SECONDS status=0
  shift 2
  if [[ ! $name =~ $only && $name != install ]]; then return; fi
  limit=$((limit < seconds - SECONDS ? limit : seconds - SECONDS))
  if [ $limit -lt 10 ]; then say "FAILED  $name: no time was left"; return; fi
  timeout --kill-after=5 $limit "$@" >"$logs/$name.log" 2>&1 </dev/null || status=$?
  case $status in
    0) say "ok      $name: $((SECONDS - began)) s: $(tail -n 1 "$logs/$name.log" | cut -c1-150)" ;;
    124 | 137) say "FAILED  $name: not done in $limit s"; tail -n 8 "$logs/$name.log" | cut -c1-300 ;;
    *) say "FAILED  $name: $((SECONDS - began)) s, exit status $status"; tail -n 12 "$logs/$name.log" | cut -c1-300 ;;
  esac
}

gpu() { # a step that needs a GPU
  if [ "$rehearse" ]; then say "skipped $1: needs a GPU"; else step "$@"; fi
}

pack() { # everything in one file, and beside it what one looks at first
  tar -czf "$out/gpu_check.tar.gz" -C "$work" summary.txt logs results
  cp "$work/summary.txt" "$out"
  for file in bench_losses{_W1,_W2}.{json,png} profile_W{1,2}.json; do
    [ ! -f "$results/$file" ] || cp "$results/$file" "$out"
  done
}

machine() {
  local missing=0
  for tool in nvidia-smi nvcc ncu compute-sanitizer; do
    command -v $tool || { echo "missing: $tool"; [ "${1-}" ] || missing=1; }
  done
  if [ ! "${1-}" ]; then
    nvidia-smi && nvidia-smi -q -d CLOCK,POWER,TEMPERATURE,PERFORMANCE
    for tool in nvcc ncu compute-sanitizer; do $tool --version; done
  fi
  uname -a; lscpu | grep -E "^(Model name|CPU\(s\))"; free -g | head -2
  local packages="torch|triton|numpy|pytest|hypothesis|matplotlib|pycocotools|tabulate|tqdm|setuptools|ninja"
  "$python" -m pip list 2>/dev/null | grep -iE "^($packages) "
  "$python" -VV && echo "commit $SEA_KERNELS_COMMIT"
  return $missing
}

install() { # into a folder of its own; carried wheels of other packages where they are missing
  local pip=("$python" -m pip install -q --disable-pip-version-check --no-index --no-deps --no-compile --target "$site")
  "${pip[@]}" "$1" || return 1
  for package in pycocotools tabulate tqdm; do
    "$python" -c "import $package" || "${pip[@]}" "$repo"/carry/$package-*.whl || echo "$package is missing"
  done
  "$python" -c "import sea_kernels; print(sea_kernels.__file__)"
}

kernels() { # what was built; on a GPU every operator must have a kernel
  "$python" -m sea_kernels && "$python" - "${1-}" <<'EOF'
import sys, torch
from sea_kernels.native import library, schemas
missing = [name for name in schemas.OPERATORS if not library.has_kernel(name, "CPU" if sys.argv[1] else "CUDA")]
assert sys.argv[1] or torch.cuda.is_available(), "torch sees no GPU"
assert not missing, f"no kernel: {missing}"
print("every operator has a kernel")
EOF
}

tests() { # name, pytest's arguments; a file without such a test is not an error
  local name=$1
  shift
  "$python" -m pytest -q -p no:cacheprovider --durations=5 --junitxml="$results/$name.xml" "$@"
  local status=$?
  [ $status = 5 ] || return $status
}

sanitize() { # tool, a port of its own; a warning of racecheck counts as well
  set -o pipefail
  local options=()
  # torch asks the driver for what it does not always get: no error. Memory that it keeps would count as initialized.
  [ "$1" != memcheck ] || options=(--report-api-errors no)
  [ "$1" != initcheck ] || export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  compute-sanitizer --tool "$1" --port "$2" --error-exitcode 9 --launch-timeout 120 --print-limit 20 "${options[@]}" \
    "$python" "$repo/benchmarks/sanitize.py" | tee "$work/$1.txt" && grep -q "SUMMARY: 0 " "$work/$1.txt"
}

profile() { # workload: the counters of one step, kernel by kernel; fewer of them where this ncu refuses some
  local file=$results/ncu_$1 sections=() metrics
  for section in SpeedOfLight MemoryWorkloadAnalysis LaunchStats Occupancy WarpStateStats SourceCounters; do
    sections+=(--section $section)
  done
  metrics=$("$python" "$repo/benchmarks/profile_step.py" --metrics)
  counters() { # caches and clocks are left as they are, as in training
    ncu --clock-control none --cache-control none --profile-from-start off --force-overwrite --export "$file" "${@:2}" \
      "$python" "$repo/benchmarks/profile_step.py" --workload "$1"
  }
  counters "$1" "${sections[@]}" --metrics "$metrics" ||
    counters "$1" --metrics "${metrics%%,dram__throughput*}" || return 1
  ncu --import "$file.ncu-rep" --csv --page raw --print-units base >"$file.csv" &&
    "$python" "$repo/benchmarks/profile_step.py" --csv "$file.csv" --results "$results/bench_losses_$1.json" \
      --out "$results/profile_$1.json"
}

export -f machine install kernels tests sanitize profile
run() { step "$1" "$2" bash -c '"$@"' - "${@:3}"; } # a step that is one of the functions above
run_gpu() { gpu "$1" "$2" bash -c '"$@"' - "${@:3}"; }
test_files() { # name, seconds, threads, which: each file in the background, so that one broken context breaks one file
  local file
  for file in "$repo"/tests/{spec,kernels,integration,tools}/test_*.py; do # not the emulator's, which compile for CPUs
    local name=$1${file##*/test}
    OMP_NUM_THREADS=$3 run "${name%.py}" "$2" tests "${name%.py}" -k "$4" "$file" &
  done
}
bench=("$python" "$repo/benchmarks/bench_losses.py")
trap 'pack; rm -rf "$work"' EXIT
trap 'exit 1' INT TERM

wheel=${wheel:-$(ls -t "$repo"/{carry,dist}/sea_kernels-*.whl 2>/dev/null | head -1)}
if [ ! "$wheel" ]; then
  wheel=$repo TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-9.0}
  export TORCH_CUDA_ARCH_LIST
fi
run machine 60 machine $rehearse
run install 180 install "$wheel"
run kernels 90 kernels $rehearse

# At once, since none is timed: tests, sanitizers, and filling torch.compile's cache for the benchmark.
if [ "$rehearse" ]; then
  run tests 150 tests tests "$repo"/tests/kernels/test_{everything_once,on_a_gpu}.py
  step sanitize 60 "$python" "$repo/benchmarks/sanitize.py" --device cpu
  say "skipped gpu_*, cpu_*, bench_coco: the rest of the tests and the benchmark on real boxes need a GPU"
else
  test_files gpu 230 2 "cuda or gpu"
fi
port=50000
for tool in memcheck racecheck initcheck synccheck; do
  port=$((port + 100))
  run_gpu $tool 230 sanitize $tool $port &
done
for workload in W1 W2 W3 W4 W5; do
  gpu "compile_$workload" 200 "${bench[@]}" --device cuda --workload $workload --compile-only &
done
wait
pack

if [ "$rehearse" ]; then
  step bench 90 "${bench[@]}" --device cpu --smoke --out "$results"
  step table 30 "$python" "$repo/benchmarks/table.py" "$results/bench_losses.json"
  step metrics 30 "$python" "$repo/benchmarks/profile_step.py" --metrics
fi
for workload in W1 W2 W3 W4 W5; do
  gpu "bench_$workload" 100 "${bench[@]}" --device cuda --workload $workload --budget 70 --out "$results"
  case $workload in W1 | W2)
    gpu "operations_$workload" 40 "$python" "$repo/benchmarks/profile_step.py" --workload $workload \
      --operations "$results/operations_$workload.json"
    run_gpu "profile_$workload" 90 profile $workload ;;
  esac
done
if [ ! "$rehearse" ] && [ -f "$annotations" ]; then
  step bench_coco 40 "${bench[@]}" --device cuda --workload W1 --no-compile --annotations "$annotations" \
    --out "$results/coco"
fi
pack

# Where time is left: what needs no GPU, and the slowest way to compile.
if [ ! "$rehearse" ] && [ $((seconds - SECONDS)) -ge 60 ]; then
  test_files cpu 200 4 "not cuda and not gpu"
  wait
fi
TORCHINDUCTOR_COMPILE_THREADS=16 gpu autotune 200 "${bench[@]}" --device cuda --workload W1 --autotune \
  --out "$results/autotune"

shopt -s nullglob
tables=("$results"/bench_losses_W?.json)
[ ${#tables[@]} = 0 ] || "$python" "$repo/benchmarks/table.py" "${tables[@]}" | tee -a "$work/summary.txt"
failed=$(grep -c ^FAILED "$work/summary.txt")
say "$failed failed of $(grep -cE '^(ok|FAILED) ' "$work/summary.txt") steps, in $SECONDS s"
[ "$failed" = 0 ]
