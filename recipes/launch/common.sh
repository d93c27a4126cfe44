# Sourced by the launchers beside it: splits off --dry-run and runs or prints a command.

DRY_RUN=0
ARGUMENTS=()
for argument in "$@"; do
    if [ "$argument" = "--dry-run" ]; then DRY_RUN=1; else ARGUMENTS+=("$argument"); fi
done

if [ "${#ARGUMENTS[@]}" -eq 0 ]; then
    echo "$(basename "$0"): no recipe given; usage: $0 [--dry-run] RECIPE [key=value ...]" >&2
    exit 2
fi
# A recipe is a file, or the name of one that stands beside this folder: text/s1_xxs.
NAME=${ARGUMENTS[0]#recipes/}
if [ ! -f "${ARGUMENTS[0]}" ] && [ ! -f "$(dirname "${BASH_SOURCE[0]}")/../${NAME%.yaml}.yaml" ]; then
    echo "$(basename "$0"): no recipe at ${ARGUMENTS[0]}; ebt-train --list shows those that come with it" >&2
    exit 2
fi

# Print the command, quoted for a shell, or become it.
run() {
    if [ "$DRY_RUN" = 1 ]; then printf '%q ' "$@"; echo; else exec "$@"; fi
}
