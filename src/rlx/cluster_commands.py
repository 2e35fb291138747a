"""What the commands print and do that concern clusters of machines. Nothing heavy is imported at the top."""

from __future__ import annotations

import argparse


def certs(options: argparse.Namespace) -> None:
    """Make a cluster's key, or renew its certificates."""
    from rlx.actors.cluster.credentials import DEFAULT_PATH, VALID_DAYS, ClusterKey

    path, days = options.out or DEFAULT_PATH, options.days or VALID_DAYS
    if options.renew:
        key = ClusterKey.renew(path, days)
        print(f"renewed the certificates in {key.path} for {days} days: copy it to every machine")
    else:
        key = ClusterKey.create(path, days)
        print(f"made {key.path}, whose certificates are good for {days} days; whoever has it owns the cluster")
