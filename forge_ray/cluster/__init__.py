"""Clusters of Ray's launcher: what a file would create, what it costs, who may enter, and the jobs that run there."""
