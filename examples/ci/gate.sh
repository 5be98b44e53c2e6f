#!/usr/bin/env bash
# Measure an output folder, compare it with the profile of the base branch, and tell the result.
# Environment: FOLDER; EXPORT, BASELINE, GATE, PRESET, THREADS, COMMENT as in action.yml; BASE_REF and
# PULL_REQUEST of a pull request. Without BASE_REF the profile is the one that is checked out.
# Ends with the exit code of `moe2edge compare`, or of the command that failed.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
command -v moe2edge > /dev/null || pip install --quiet -c "$root/constraints.txt" "$root[cpu]"
# A folder of its own for each folder that a job measures.
work=$(mktemp -d "${RUNNER_TEMP:-${TMPDIR:-/tmp}}/moe2edge-gate.XXXXXX")
profile=$work/profile.json comment=$work/comment.md
baseline=${BASELINE:-moe2edge-profile.json}
# Finds the comment again. One for each baseline.
marker="<!-- moe2edge gate: $baseline -->"

write_comment() {
  # One comment for a pull request, which later runs replace. It is told in the summary anyhow.
  local comments="repos/$GITHUB_REPOSITORY/issues/$PULL_REQUEST/comments" number
  number=$(gh api --paginate "$comments" \
    --jq ".[] | select(.body | startswith(\"$marker\")) | .id" | head -n 1) || return
  if [[ -n $number ]]; then
    gh api -X PATCH "repos/$GITHUB_REPOSITORY/issues/comments/$number" -F "body=@$work/told.md"
  else
    gh api "$comments" -F "body=@$work/told.md"
  fi
}

tell() {
  local code=$?
  # An error other than 3 and 4 writes no comparison.
  [[ -f $comment ]] || printf 'moe2edge ended with exit code %s; see the log of the job.\n' \
    "$code" > "$comment"
  {
    printf '%s\n' "$marker"
    cat "$comment"
    if [[ -f $work/profile.md ]]; then
      printf '\n<details><summary>profile</summary>\n\n'
      cat "$work/profile.md"
      printf '\n</details>\n'
    fi
  } > "$work/told.md"
  cat "$work/told.md" >> "${GITHUB_STEP_SUMMARY:-/dev/null}"
  printf 'profile=%s\njunit=%s\nexit-code=%s\n' "$profile" "$work/gate.xml" "$code" \
    >> "${GITHUB_OUTPUT:-/dev/null}"
  if [[ ${COMMENT:-} == true && -n ${PULL_REQUEST:-} ]]; then
    write_comment > "$work/answer.json" ||
      echo "::warning::the comment could not be written; see the summary of the job"
  fi
}
trap tell EXIT

if [[ -n ${EXPORT:-} ]]; then
  # Words are split as a shell splits them, over several lines too; nothing is expanded.
  words=$(xargs printf '%s\n' <<< "$EXPORT")
  mapfile -t arguments <<< "$words"
  moe2edge export "${arguments[@]}" -o "$FOLDER" --force
fi
moe2edge profile "$FOLDER" --preset "${PRESET:-ci}" ${THREADS:+--threads "$THREADS"} \
  -o "$profile" --markdown "$work/profile.md"

if [[ -z ${BASE_REF:-} ]]; then
  [[ ! -f $baseline ]] || cp "$baseline" "$work/base.json"
else
  git fetch --quiet --depth=1 origin "$BASE_REF"
  [[ -z $(git ls-tree --full-tree FETCH_HEAD -- "$baseline") ]] ||
    git show "FETCH_HEAD:$baseline" > "$work/base.json"
fi
if [[ -f $work/base.json ]]; then
  moe2edge compare "$work/base.json" "$profile" ${GATE:+--gate "$GATE"} \
    --markdown "$comment" --junit "$work/gate.xml"
else
  printf 'There is no `%s` to compare with; commit this profile as it.\n' "$baseline" > "$comment"
fi
