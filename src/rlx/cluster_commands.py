"""What the commands print and do that concern clusters of machines. Nothing heavy is imported at the top."""

from __future__ import annotations

import argparse


def certs(options: argparse.Namespace) -> None:
    """Make a cluster's key, or renew its certificates."""
    from rlx.actors.cluster.credentials import ClusterKey

    if options.renew:
        key = ClusterKey.renew(options.out, options.days)
        print(f"renewed the certificates in {key.path} for {options.days} days: copy it to every machine")
    else:
        key = ClusterKey.create(options.out, options.days)
        print(f"made {key.path}, whose certificates are good for {options.days} days; whoever has it owns the cluster")
