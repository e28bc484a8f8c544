#!/bin/bash
# The most frequent words of the event's "text": sandbox-agent run words.sh --event '{"text": "to be or not to be"}'
# The event is the JSON file $EVENT_FILE. Only coreutils and sed are used, so escapes in the text count as spaces.
set -euo pipefail

text=$(sed -n 's/.*"text"[[:space:]]*:[[:space:]]*"\(\([^"\\]\|\\.\)*\)".*/\1/p' "${EVENT_FILE:?the agent sets it}")
if [[ -z $text ]]; then
    text="it was the best of times it was the worst of times"
    echo "the event has no text, counting a line of Dickens" >&2
fi

printf '%s\n' "$text" |
    sed 's/\\u..../ /g; s/\\./ /g' |
    tr '[:upper:]' '[:lower:]' |
    tr -cs '[:alnum:]'\' '\n' |
    sed '/^$/d' |
    sort | uniq -c | sort -k1,1nr -k2 |
    sed -n '1,10p' |
    tee words.txt
