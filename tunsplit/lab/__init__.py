"""Throw-away test networks to try tunsplit in, and to test VPN clients with; see `open_lab`."""

from tunsplit.lab.lab import Lab, open_lab

__all__ = ["Lab", "open_lab"]
