"""Networks, data, the demo and the measurements; nothing here is part of the installed packages."""
