"""A real guest: Debian's cloud kernel and a busybox initramfs in QEMU without hardware acceleration.

`boot` runs a script to its end. A `Guest` runs on, with a monitor, and can be migrated to another one.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from support import need

ROOT = Path(__file__).resolve().parents[2]
KERNEL_DIR = ROOT / ".venv" / "guest"
MEMORY_MIB = 128
WAIT_S = 60
RECONNECT = ",file.reconnect-delay=60"
GEOMETRY = ",cyls=130,heads=16,secs=63"
"""Of a disk that cannot be read when its QEMU starts: then QEMU does not look for one there."""
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


def command_of(initramfs: Path, disks: Sequence[str], *, memory_mib: int = 256, waits: bool = False) -> list[str]:
    """QEMU, for a guest whose disks are the NBD URIs `disks`. With `waits` those cannot be read yet, and their
    servers may be started again."""
    need("qemu-system-x86_64")
    assert (KERNEL_DIR / "vmlinuz").exists(), "no guest kernel: tools/setup dev fetches it"
    command = [
        "qemu-system-x86_64", "-accel", "tcg", "-m", str(memory_mib), "-nodefaults", "-display", "none",
        "-serial", "stdio", "-no-reboot", "-kernel", str(KERNEL_DIR / "vmlinuz"), "-initrd", str(initramfs),
        "-append", "console=ttyS0 quiet panic=-1",
    ]
    for number, uri in enumerate(disks):
        drive = f"file={uri},format=raw,if=none,id=disk{number},cache=none,discard=unmap"
        command += ["-drive", drive + (RECONNECT if waits else ""),
                    "-device", f"virtio-blk-pci,drive=disk{number}{GEOMETRY if waits else ''}"]
    return command


def boot(folder: Path, script: str, disk: str) -> str:
    """Run `script` in a guest whose disk is the NBD URI `disk`; returns what it printed, AssertionError if it
    failed or did not end in time."""
    guest = subprocess.run(command_of(make_initramfs(folder, script), [disk]), capture_output=True, check=False,
                           timeout=BOOT_TIMEOUT_S, stdin=subprocess.DEVNULL, env=os.environ | {"LC_ALL": "C"})
    output = guest.stdout.decode(errors="replace").replace("\r", "")
    assert guest.returncode == 0, guest.stderr.decode()
    assert "GUEST-END 0" in output, output
    return output


class Guest:
    """A QEMU that runs: booted, or with `incoming` waiting for a guest. Its monitor is at `monitor`."""

    def __init__(self, monitor: Path, initramfs: Path, disks: Sequence[str], incoming: str | None = None,
                 *options: str, at: Sequence[str] = ()) -> None:
        """`at`: what the command begins with."""
        self.monitor = f"unix:{monitor}"
        self._console = bytearray()
        self._grown = threading.Condition()
        options = ("-qmp", f"{self.monitor},server=on,wait=off", *options)
        if incoming is not None:
            options += ("-incoming", incoming)
        command = command_of(initramfs, disks, memory_mib=MEMORY_MIB, waits=incoming is not None)
        self.process = subprocess.Popen([*at, *command, *options], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=subprocess.DEVNULL if incoming else None)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        while data := os.read(self.process.stdout.fileno(), 4096):
            with self._grown:
                self._console += data
                self._grown.notify_all()

    @property
    def console(self) -> str:
        """All that it has printed so far."""
        return self._console.decode(errors="replace").replace("\r", "")

    def wait_for(self, seen: Callable[[str], bool]) -> None:
        """Until the console is as `seen` wants it; AssertionError if it never is."""
        with self._grown:
            assert self._grown.wait_for(lambda: seen(self.console), WAIT_S), self.console

    def shut_down(self) -> None:
        """The guest does, by itself."""
        assert self.process.stdin is not None
        self.process.stdin.write(b"\n")
        self.process.stdin.flush()

    def end(self) -> None:
        self.process.kill()
        self.process.wait(WAIT_S)
        self._reader.join(WAIT_S)
        assert self.process.stdout is not None and self.process.stdin is not None
        self.process.stdout.close()
        self.process.stdin.close()
