"""Per-application split tunnelling for Linux: chosen apps beside the VPN, all others through it."""

__version__ = "0.1.0"
