# Sourced on every node before Ray starts there: . ~/forge-ray/cluster/node.sh && ray start ...
# Afterwards Ray asks every client for the cluster's token, its processes speak TLS to each other, and nothing is reported to
# anyone. forge_ray/cluster/identity.py tells where token and certificates come from.
umask 077
. "$HOME/forge-ray/cluster/env.sh"
(cd "$HOME/forge-ray" && python -m forge_ray.cluster.identity) || return 1
# Whoever comes by SSH, Ray's launcher among them, speaks to this Ray too.
grep -qs forge-ray/cluster/env.sh "$HOME/.bashrc" || echo '. "$HOME/forge-ray/cluster/env.sh"' >> "$HOME/.bashrc"
ulimit -n 65536 2> /dev/null || ulimit -n "$(ulimit -H -n)"
