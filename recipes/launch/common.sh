# Sourced by the launchers beside it: splits off --dry-run and runs or prints a command.

DRY_RUN=0
ARGUMENTS=()
for argument in "$@"; do
    if [ "$argument" = "--dry-run" ]; then DRY_RUN=1; else ARGUMENTS+=("$argument"); fi
done

if [ "${#ARGUMENTS[@]}" -eq 0 ]; then
    echo "$(basename "$0"): no recipe given; usage: $0 [--dry-run] RECIPE.yaml [key=value ...]" >&2
    exit 2
fi
if [ ! -f "${ARGUMENTS[0]}" ]; then
    echo "$(basename "$0"): no recipe at ${ARGUMENTS[0]}; recipes/ has examples" >&2
    exit 2
fi

# Print the command, quoted for a shell, or become it.
run() {
    if [ "$DRY_RUN" = 1 ]; then printf '%q ' "$@"; echo; else exec "$@"; fi
}
