"""Why a job waits: explains Slurm's short reasons where waiting alone may not help."""

from __future__ import annotations

import re

MEANINGS = {
    r"PartitionConfig|PartitionNodeLimit|BadConstraints": (
        "requests more than the nodes of its partition have or allow{asks}; see the profile, and sinfo for the nodes"
    ),
    r"PartitionTimeLimit": "requests more hours than its partition allows{asks}; lower hours in the profile",
    r"PartitionDown|PartitionInactive": (
        "its partition is down; wait until sinfo shows it as up, or set another partition in the profile"
    ),
    r"ReqNodeNotAvail|NodeDown|Nodes.required.for.job.are.DOWN": (
        "the nodes that it needs are down, drained or reserved; sinfo -R says why; if this does not change, "
        "cancel and use another profile"
    ),
    r"NotAllowed|InvalidQOS|InvalidAccount": (
        "its account or QOS may not be used there; see account, qos and partition in the profile"
    ),
    r"^(QOS|Assoc|MaxCpuPerAccount|MaxMemPerAccount)": (
        "a limit of its account or QOS is reached{asks}; it starts once other jobs end, or never if it alone "
        "exceeds the limit: then request less in the profile"
    ),
    r"Reservation": "the reservation that it requests is not active; see options in the profile",
    r"Licenses": "waits for licences; see options in the profile",
    r"DependencyNeverSatisfied": "waits for a job that can no longer end as required; cancel it and submit again",
    r"JobHeld|JobHold|held": "is held; release it with scontrol release and its job id",
}


def meaning(reason: str, asks: str = "") -> str:
    """What the reason of a waiting job means, Slurm's word behind it; just that word where it explains itself.

    `asks` is what the job asks for, e.g. `8 CPUs, 6 GB of memory, 24 h`.
    """
    for pattern, sentence in MEANINGS.items():
        if re.search(pattern, reason):
            return f"{sentence.format(asks=f': {asks}' if asks else '')} ({reason})"
    return reason
