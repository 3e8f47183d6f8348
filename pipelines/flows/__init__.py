"""Prefect flows: thin tasks, flows that read as a table of contents."""

POOL = "sdn"
"""Work pool of the deployments in `prefect.yaml`."""
RECONCILER = "sdn_reconciler"
"""Prefect variable that says which reconciler looked last."""
