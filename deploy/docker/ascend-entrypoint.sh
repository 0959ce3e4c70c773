#!/bin/bash
# Sets CANN's environment, and NNAL's where it is installed, then becomes `graft`: SIGTERM reaches the server itself.
# bash, not sh: the vendor's scripts find their own folder by BASH_SOURCE. Neither `set -u` nor `set -e`: they
# read unset variables and go on after commands that fail.

# A function has no arguments but its own, so a sourced script never takes graft's arguments for its own.
source_environment() {
    local script="$1"
    shift
    # shellcheck source=/dev/null
    . "${script}"
}

first_file() {
    local path
    for path in "$@"; do
        if [ -f "${path}" ]; then
            printf '%s\n' "${path}"
            return
        fi
    done
}

# The image's own CANN if it says where that is, else where an installation as root puts it (CANN 8.5 and newer; older).
if [ -n "${ASCEND_HOME_PATH:-}" ]; then
    cann_candidates=("${ASCEND_HOME_PATH}/set_env.sh" "${ASCEND_HOME_PATH%/*}/set_env.sh")
else
    cann_candidates=(/usr/local/Ascend/cann/set_env.sh /usr/local/Ascend/ascend-toolkit/set_env.sh)
fi
cann="$(first_file "${cann_candidates[@]}")"
if [ -z "${cann}" ]; then
    echo "ascend-entrypoint: there is no CANN at ${cann_candidates[*]}: build the image from an ascend/cann base" \
        "(CANN_TAG), or set ASCEND_HOME_PATH to CANN's folder" >&2
    exit 1
fi
source_environment "${cann}"

home="${ASCEND_HOME_PATH:-${cann%/*}}"
nnal="$(first_file "${home%/*}/nnal/atb/set_env.sh" "${home%/*/*}/nnal/atb/set_env.sh")"
if [ -n "${nnal}" ]; then
    source_environment "${nnal}"
fi

# The driver belongs to the host and is mounted; not every release of CANN puts its libraries on the path.
driver=/usr/local/Ascend/driver/lib64
export LD_LIBRARY_PATH="${LD_LIBRARY_PATH:+${LD_LIBRARY_PATH}:}${driver}:${driver}/common:${driver}/driver"

exec graft "$@"
