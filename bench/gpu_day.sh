#!/usr/bin/env bash
# Everything worth doing on a GPU, the most important first, in 480 seconds and without a network.
# gpu_day.py beside this has the stages and says how it is used.
exec "${PYTHON:-python3}" "$(dirname "${BASH_SOURCE[0]}")/gpu_day.py" "$@"
