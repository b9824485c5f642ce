"""Ray: start or join it, place workers, submit jobs, check a cluster."""
