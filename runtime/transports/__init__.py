"""How messages move: `lockstep` within one process, `distributed` between processes and hosts.

To add a transport, write one class with the two members of `Transport`.
"""

from runtime.transports.base import Job, Parcel, Traffic, Transport

__all__ = ["Job", "Parcel", "Traffic", "Transport"]
