#!/usr/bin/env bash
# Measure an output folder, compare it with the profile of the base branch, and tell the result.
# Environment: FOLDER; EXPORT, BASELINE, GATE, PRESET, COMMENT as in action.yml; BASE_REF and
# PULL_REQUEST of a pull request, empty otherwise. Ends with the exit code of `moe2edge compare`.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
command -v moe2edge > /dev/null || pip install --quiet -c "$root/constraints.txt" "$root[cpu]"
work=${RUNNER_TEMP:-$(mktemp -d)}/moe2edge-gate
mkdir -p "$work"
profile=$work/profile.json comment=$work/comment.md

if [[ -n ${EXPORT:-} ]]; then
  read -ra arguments <<< "$EXPORT"
  moe2edge export "${arguments[@]}" -o "$FOLDER" --force
fi
moe2edge profile "$FOLDER" --preset "${PRESET:-ci}" -o "$profile" --markdown "$work/profile.md"

code=0
baseline=${BASELINE:-moe2edge-profile.json}
if git show "origin/${BASE_REF:-HEAD}:$baseline" > "$work/base.json" 2> "$work/reason.txt"; then
  moe2edge compare "$work/base.json" "$profile" ${GATE:+--gate "$GATE"} \
    --markdown "$comment" --junit "$work/gate.xml" || code=$?
else
  printf '<!-- moe2edge compare -->\nThe base branch has no `%s`; commit this profile as it.\n' \
    "$baseline" > "$comment"
fi
# An error other than 3 and 4 writes no comparison.
[[ -f $comment ]] || printf '<!-- moe2edge compare -->\nmoe2edge compare ended with %s.\n' \
  "$code" > "$comment"
{
  cat "$comment"
  printf '\n<details><summary>profile</summary>\n\n'
  cat "$work/profile.md"
  printf '\n</details>\n'
} > "$work/told.md"
cat "$work/told.md" >> "${GITHUB_STEP_SUMMARY:-/dev/null}"
printf 'profile=%s\nexit-code=%s\n' "$profile" "$code" >> "${GITHUB_OUTPUT:-/dev/null}"

if [[ ${COMMENT:-} == true && -n ${PULL_REQUEST:-} ]]; then
  # One comment for a pull request, which later runs replace. It is told in the summary anyhow.
  gh pr comment "$PULL_REQUEST" --edit-last --create-if-none --body-file "$work/told.md" ||
    echo "::warning::the comment could not be written; see the summary of the job"
fi
exit "$code"
