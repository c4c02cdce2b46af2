#!/bin/sh
# A session learns a text and answers from it: with nothing but curl. TITANS_BASE_URL says where the server is.
set -eu
url="${TITANS_BASE_URL:-http://127.0.0.1:8000}"
ask() { curl --fail-with-body --silent --show-error --header "Authorization: Bearer ${TITANS_API_KEY:-none}" "$@"; }
value() { sed -n "s/.*\"$1\": *\"\([^\"]*\)\".*/\1/p" | head -n 1; }

session=$(ask --request POST "$url/v1/sessions" | value id)
model=$(ask "$url/v1/sessions/$session" | value model)
echo "session $session of $model"

echo 'The access code of the mossy lighthouse is 4819203.' |
  ask --header 'Content-Type: text/plain' --data-binary @- "$url/v1/sessions/$session/documents"
echo

ask --header 'Content-Type: application/json' "$url/v1/sessions/$session/completions" --data '{
  "prompt": "\n\nQuestion: What is the access code of the mossy lighthouse?\nAnswer:",
  "max_tokens": 40, "temperature": 0, "stop": "\n"}'
echo

# The same session through OpenAI's API, as a stream that can be picked up where it is cut.
ask --no-buffer --dump-header /dev/stderr --header 'Prefer: resumable' --header 'Content-Type: application/json' \
  --header "X-Session-ID: $session" "$url/v1/chat/completions" --data "{
  \"model\": \"$model\", \"stream\": true, \"max_tokens\": 40, \"temperature\": 0,
  \"messages\": [{\"role\": \"user\", \"content\": \"What is the access code of the mossy lighthouse?\"}]}"

ask --request DELETE "$url/v1/sessions/$session"
