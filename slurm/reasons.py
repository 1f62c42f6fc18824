"""Why a job waits, in words: what Slurm's own short reasons mean where waiting alone may not help."""

from __future__ import annotations

import re

MEANINGS = {
    r"PartitionConfig|PartitionNodeLimit|BadConstraints": (
        "asks for more than the nodes of its partition have or allow{asks}; see the profile, and sinfo for the nodes"
    ),
    r"PartitionTimeLimit": "asks for more hours than its partition allows{asks}; lower hours in the profile",
    r"PartitionDown|PartitionInactive": (
        "its partition is out of service; wait until sinfo shows it up, or name another partition in the profile"
    ),
    r"ReqNodeNotAvail|NodeDown|Nodes.required.for.job.are.DOWN": (
        "the nodes that it needs are down, drained or reserved; sinfo -R says why, and if they stay so, cancel "
        "and take another profile"
    ),
    r"NotAllowed|InvalidQOS|InvalidAccount": (
        "its account or QOS may not be used there; see account, qos and partition in the profile"
    ),
    r"^(QOS|Assoc|MaxCpuPerAccount|MaxMemPerAccount)": (
        "a limit of its account or QOS is reached{asks}; it starts once other jobs leave room, or never if this "
        "alone is more than the limit: then ask for less in the profile"
    ),
    r"Reservation": "the reservation that it asks for is not there now; see options in the profile",
    r"Licenses": "waits for licences; see options in the profile",
    r"DependencyNeverSatisfied": "waits for a job that can no longer end as it must; cancel it and submit again",
    r"JobHeld|JobHold|held": "is held; scontrol release, by its number, lets it go",
}


def meaning(reason: str, asks: str = "") -> str:
    """What the reason of a waiting job means, Slurm's word behind it; just that word where it explains itself.

    `asks` is what the job asks for, e.g. `8 CPUs, 6 GB of memory, 24 h`.
    """
    for pattern, sentence in MEANINGS.items():
        if re.search(pattern, reason):
            return f"{sentence.format(asks=f': {asks}' if asks else '')} ({reason})"
    return reason
