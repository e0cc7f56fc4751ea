"""Where runs are carried out: in this process, in local processes, on a Ray cluster."""
