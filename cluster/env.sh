# What processes on a node need to speak to its Ray: the way to it, its token, its certificates. Nothing secret stands here.
export PATH="$HOME/forge-ray/.venv/bin:$PATH"
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$HOME/.forge-ray/node/token"
export RAY_USE_TLS=1 RAY_TLS_CA_CERT="$HOME/.forge-ray/node/ca.pem"
export RAY_TLS_SERVER_CERT="$HOME/.forge-ray/tls/cert.pem" RAY_TLS_SERVER_KEY="$HOME/.forge-ray/tls/key.pem"
export RAY_USAGE_STATS_ENABLED=0 RAY_USAGE_STATS_REPORT_URL=http://127.0.0.1:9/ RAY_TRAIN_ENABLE_STATE_TRACKING=1
# A node that goes without a word is missed after 3 s, not after 30.
export RAY_health_check_period_ms=1000 RAY_health_check_timeout_ms=2000 RAY_health_check_failure_threshold=3
# A job that is stopped has time for its last checkpoint; Ray's own patience is 3 s.
export RAY_JOB_STOP_WAIT_TIME_S=60
