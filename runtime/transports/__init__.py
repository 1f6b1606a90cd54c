"""How messages move: `lockstep` within one process, `distributed` between processes and hosts.

To add a transport, write one class with the members of `Transport`.
"""

from runtime.transports.base import Handle, Job, Parcel, Traffic, Transport

__all__ = ["Handle", "Job", "Parcel", "Traffic", "Transport"]
