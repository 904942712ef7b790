#!/usr/bin/env bash
# The steps of a CI pipeline; headwater.yml calls nothing else, so that all of it can be tried by hand.
#
#   pipeline.sh train               data, checks, search, evaluation, export with its proof; no release
#   pipeline.sh release             the same, skipped where it is done, and a release in DRAFT; says which
#   pipeline.sh approve RELEASE     sign it: whoever runs this holds the targets key
#   pipeline.sh rollout RELEASE     start its rollout, once; headwater refuses what is not approved
#
# Environment: HEADWATER_LAKE and the AWS_… keys of its store; RECIPE; WORK, a folder that outlives a job; STAGES;
# ACTOR, who is recorded; for `approve` HEADWATER_KEYS, a folder with targets.pem and root.json, and the passphrase.
# Exit statuses are those of headwater. 3, something did not answer, is tried again; nothing else is.
set -euo pipefail

HEADWATER_COMMAND=${HEADWATER_COMMAND:-headwater}
RECIPE=${RECIPE:-recipe.toml}
WORK=${WORK:-headwater-work}
STAGES=${STAGES:-10%,50%,100%}
ACTOR=${ACTOR:-ci}
TRIES_MAX=${TRIES_MAX:-5}
RETRY_S=${RETRY_S:-60}
readonly TRY_AGAIN=3

headwater() {
    local tries=1 status=0
    while true; do
        status=0
        "$HEADWATER_COMMAND" "$@" --json || status=$?
        if [[ $status -ne $TRY_AGAIN || $tries -ge $TRIES_MAX ]]; then
            return "$status"
        fi
        echo "headwater $1 $2: something did not answer; try $tries of $TRIES_MAX, the next in $RETRY_S s" >&2
        tries=$((tries + 1))
        sleep "$RETRY_S"
    done
}

# A member of the last line of JSON on stdin, by its path.
member() {
    python3 -c '
import json, sys
found = json.loads(sys.stdin.readlines()[-1])
for name in sys.argv[1:]:
    found = found[name]
print(found)' "$@"
}

# The rollouts of release $1 among the lines of JSON on stdin.
rollouts_of() {
    python3 -c '
import json, sys
found = [json.loads(line) for line in sys.stdin if line.strip()]
print(*[each["rollout"] for each in found if "{model}@{version}".format(**each) == sys.argv[1]])' "$1"
}

train() {
    headwater train run "$RECIPE" --work "$WORK" --until export
}

release() {
    # --resume: the dataset that was trained on, though the lake has more by now.
    local said name
    said=$(headwater train run "$RECIPE" --work "$WORK" --resume)
    echo "$said"
    name=$(member outputs model <<<"$said")@$(member outputs version <<<"$said")
    echo "release=$name" >>"${GITHUB_OUTPUT:-/dev/stdout}"
}

approve() {
    headwater release approve "$1" --by "$ACTOR" --why "approved in the pipeline"
}

rollout() {
    local said started
    # In two steps: the status of a pipe would be that of its last failing part, and not headwater's.
    said=$(headwater rollout status)
    started=$(rollouts_of "$1" <<<"$said")
    if [[ -n $started ]]; then
        echo "release $1 has a rollout: $started" >&2
        return 0
    fi
    headwater rollout start "$1" --stages "$STAGES" --by "$ACTOR" --why "release $1 by the pipeline"
}

case "${1:-}" in
    train | release) "$1" ;;
    approve | rollout) "$1" "${2:?name the release: MODEL@VERSION}" ;;
    *)
        sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" >&2
        exit 2
        ;;
esac
