"""The runtime: programs, transports and sessions that execute a plan."""
