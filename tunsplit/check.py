"""What tunsplit needs from a host, and whether it is there."""

import shutil
from pathlib import Path

from tunsplit.errors import KernelError, PermissionMissing
from tunsplit.kernel import caps

TUN_DEVICE = "/dev/net/tun"


def require_runnable() -> None:
    """Fail early, with what to do about it, where `tunsplit run` could not work: a matter of microseconds.

    Raises:
        PermissionMissing: capabilities are missing.
        KernelError: the tun driver or `nft` is missing.
    """
    if missing := caps.missing():
        names = ", ".join(f"{capability.name} ({capability.why})" for capability in missing)
        raise PermissionMissing(f"missing {names}: {caps.how_to_grant(missing)}")
    if not Path(TUN_DEVICE).exists():
        raise KernelError(f"{TUN_DEVICE} is missing: load the tun module (`modprobe tun`), or give the container it")
    if not shutil.which("nft"):
        raise KernelError("the program nft is missing: install the package nftables")
