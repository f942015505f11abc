#!/usr/bin/env bash
# Asks a running slipstream server everything it answers over plain HTTP, as a probe or a person
# with curl would, and has Prometheus's promtool look at /metrics if it is installed.
#
#     slipstream serve &
#     bash tests/python/http_check.sh 127.0.0.1:50051
#
# Exit code 0 when every answer is as expected.
set -u
address=${1:-127.0.0.1:50051}
failed=0

# ask NAME WANTED_CODE CURL_ARGUMENTS...
ask() {
    local name=$1 wanted=$2 body code
    shift 2
    echo
    echo "\$ curl $*"
    body=$(mktemp)
    code=$(curl --noproxy '*' --silent --max-time 10 --output "$body" --write-out '%{http_code}' "$@")
    echo "HTTP $code"
    head -c 400 "$body"
    echo
    rm -f "$body"
    if [ "$code" = "$wanted" ]; then
        echo "PASS  $name"
    else
        echo "FAIL  $name: wanted HTTP $wanted"
        failed=$((failed + 1))
    fi
}

ask health 200 "http://$address/health"
ask ready 200 "http://$address/ready"
ask version 200 "http://$address/version"
ask metrics 200 "http://$address/metrics"
ask head 200 --head "http://$address/health"
ask http2 200 --http2-prior-knowledge "http://$address/health"
ask unknown-path 404 "http://$address/no-such-path"
ask wrong-method 405 --request POST "http://$address/health"

if command -v promtool >/dev/null; then
    echo
    echo "\$ curl http://$address/metrics | promtool check metrics"
    if curl --noproxy '*' --silent --max-time 10 "http://$address/metrics" | promtool check metrics; then
        echo "PASS  promtool"
    else
        echo "FAIL  promtool"
        failed=$((failed + 1))
    fi
else
    echo "SKIP  promtool is not installed"
fi

echo
echo "$failed failed"
exit $((failed > 0))
