"""Ray starts, watches and stops the processes of a cluster."""
