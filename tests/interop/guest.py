"""A real guest: Debian's cloud kernel and a busybox initramfs in QEMU without hardware acceleration."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from support import need

ROOT = Path(__file__).resolve().parents[2]
KERNEL_DIR = ROOT / ".venv" / "guest"
MODULES = ("virtio_ring", "virtio", "virtio_pci_modern_dev", "virtio_pci_legacy_dev", "virtio_pci", "virtio_blk")
BOOT_TIMEOUT_S = 90

INIT = """#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t devtmpfs none /dev
mount -t proc none /proc
for module in {modules}; do insmod /modules/$module.ko; done
echo GUEST-BEGIN
(
{script}
)
echo GUEST-END $?
poweroff -f
"""


def make_initramfs(folder: Path, script: str) -> Path:
    """An initramfs that runs `script` (busybox sh; the disk is /dev/vda) and powers off."""
    need("busybox", "cpio")
    root = folder / "initramfs"
    for name in ("bin", "dev", "proc", "mnt", "modules"):
        (root / name).mkdir(parents=True)
    busybox = shutil.which("busybox")
    assert busybox is not None
    shutil.copy(busybox, root / "bin" / "busybox")
    for module in MODULES:
        shutil.copy(KERNEL_DIR / "modules" / f"{module}.ko", root / "modules")
    init = root / "init"
    init.write_text(INIT.format(modules=" ".join(MODULES), script=script))
    init.chmod(0o755)
    names = "\n".join(str(path.relative_to(root)) for path in sorted(root.rglob("*")))
    archive = subprocess.run(["cpio", "--create", "--format=newc", "--quiet"], cwd=root, input=names.encode(),
                             stdout=subprocess.PIPE, check=True, timeout=30).stdout
    image = folder / "initramfs.img"
    image.write_bytes(archive)
    return image


def boot(folder: Path, script: str, disk: str) -> str:
    """Run `script` in a guest whose disk is the NBD URI `disk`; returns what it printed, AssertionError if it
    failed or did not end in time."""
    need("qemu-system-x86_64")
    assert (KERNEL_DIR / "vmlinuz").exists(), "no guest kernel: tools/setup dev fetches it"
    command = [
        "qemu-system-x86_64", "-accel", "tcg", "-m", "256", "-nodefaults", "-display", "none", "-serial", "stdio",
        "-no-reboot", "-kernel", str(KERNEL_DIR / "vmlinuz"), "-initrd", str(make_initramfs(folder, script)),
        "-append", "console=ttyS0 quiet panic=-1",
        "-drive", f"file={disk},format=raw,if=none,id=disk,cache=none,discard=unmap",
        "-device", "virtio-blk-pci,drive=disk",
    ]
    guest = subprocess.run(command, capture_output=True, check=False, timeout=BOOT_TIMEOUT_S,
                           stdin=subprocess.DEVNULL, env=os.environ | {"LC_ALL": "C"})
    output = guest.stdout.decode(errors="replace").replace("\r", "")
    assert guest.returncode == 0, guest.stderr.decode()
    assert "GUEST-END 0" in output, output
    return output
