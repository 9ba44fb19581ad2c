"""Sets the lab up: Debian packages become four trees in the nix store, and `nix/lab` learns their hashes.

Nothing is installed and no file outside the cache and /nix is touched. The packages are downloaded and
unpacked; what the lab needs is picked out of them (programs, and the libraries that their own loader
says they load, so no soname is written down here) and added to the store:

    lab-base    /usr of a guest: static busybox, bash, sshd, sudo, nix, runit
    lab-kernel  Debian's cloud kernel and the few modules a guest loads, in an order that loads
    lab-tools   what builders run: static busybox, mksquashfs, mke2fs
    lab-python  Python with its standard library, precompiled, for what a machine runs of toto

The result is `<cache>/nixpkgs`: a copy of `nix/lab` with `pinned.nix` beside it, for NIX_PATH or a flake input. Beside
them is what a machine runs of toto, as if nixpkgs had it: hosts of the lab import nothing to be locked down or to pull.
Needed on this machine: apt, dpkg-deb and nix. A second run takes half a second.
"""

import contextlib
import fcntl
import hashlib
import json
import lzma
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[2]
SOURCE: Final = ROOT / "nix" / "lab"
TREES: Final = ("lab-base", "lab-kernel", "lab-tools", "lab-python")

NIX_CONFIG: Final = """\
build-users-group =
substituters =
sandbox = false
experimental-features = nix-command flakes
"""

APT_LISTS: Final = Path("/var/lib/apt/lists")
PACKAGES: Final = (
    "bash",
    "busybox-static",
    "e2fsprogs",
    "libpam-modules",
    "linux-image-cloud-amd64",
    "nix-bin",
    "openssh-client",
    "openssh-server",
    "openssh-sftp-server",
    "python3-minimal",
    "libpython3-stdlib",
    "runit",
    "squashfs-tools",
    "sudo",
)
PROGRAMS: Final = ("bash", "chpst", "nix", "runsv", "scp", "ssh", "ssh-keygen", "sshd", "sudo", "sv")
NIX_COMMANDS: Final = (
    "nix-build",
    "nix-channel",
    "nix-collect-garbage",
    "nix-copy-closure",
    "nix-daemon",
    "nix-env",
    "nix-hash",
    "nix-instantiate",
    "nix-prefetch-url",
    "nix-shell",
    "nix-store",
)
PAM_MODULES: Final = ("pam_deny.so", "pam_env.so", "pam_permit.so", "pam_rootok.so", "pam_unix.so")
TOOLS: Final = ("mke2fs", "mksquashfs")
# Loaded at boot, dependencies first. What a kernel has built in is left out by itself.
MODULES: Final = (
    "virtio_pci",
    "virtio_blk",
    "virtio_net",
    "virtio_rng",
    "crc32c_generic",
    "ext4",
    "squashfs",
    "overlay",
    "af_packet",
    "button",
)


def cache() -> Path:
    """Where the lab keeps what it made: $TOTO_LAB_CACHE, else ~/.cache/toto/lab."""
    given = os.environ.get("TOTO_LAB_CACHE")
    return Path(given) if given else Path.home() / ".cache" / "toto" / "lab"


def nixpkgs() -> Path:
    """The `<nixpkgs>` of the lab, once `setup` has run."""
    return cache() / "nixpkgs"


def environment() -> dict[str, str]:
    """This process's environment, with nix configured for the lab, unless a daemon that has the store is asked."""
    own = {} if "NIX_REMOTE" in os.environ else {"NIX_CONFIG": NIX_CONFIG}
    return {**os.environ, **own, "NIX_PATH": f"nixpkgs={nixpkgs()}"}


def setup() -> Path:
    """Makes the lab's `<nixpkgs>` and returns it. Cheap when nothing has changed."""
    cache().mkdir(parents=True, exist_ok=True)
    with (cache() / "lock").open("w") as lock:  # two at once would make everything twice
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _setup()


def _setup() -> Path:
    pinned = cache() / "pinned.nix"
    marker = cache() / "stamp"
    asked = cache() / "asked"
    if not APT_LISTS.is_dir() or shutil.which("apt-get") is None:
        raise SystemExit("the lab takes its guests' programs from Debian's packages, and there is no apt here")
    # apt takes seconds to say what is there, so it is asked only when this recipe or its lists have changed.
    question = _hash(Path(__file__).read_text(), APT_LISTS.stat().st_mtime_ns)
    if not (asked.is_file() and asked.read_text() == question and marker.is_file() and _roots_are_valid()):
        versions = _versions(_closure(PACKAGES))
        stamp = _hash(Path(__file__).read_text(), versions)
        if not (marker.is_file() and marker.read_text() == stamp and _roots_are_valid()):
            marker.unlink(missing_ok=True)
            _write(pinned, _make_trees(versions))
            _write(marker, stamp)
        _write(asked, question)
    _publish(pinned)
    return nixpkgs()


def _hash(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _closure(wanted: Sequence[str]) -> list[str]:
    """The wanted packages and the libraries they depend on. Other dependencies (perl, debconf …) serve
    maintainer scripts, which are never run here."""
    found: list[str] = []
    level = list(wanted)
    while level:
        found += level
        following: set[str] = set()
        for name in _depends(level):
            if name.startswith(("lib", "zlib", "linux-image-", "python3.")) and "perl" not in name:
                following.add(name)
        level = sorted(following - set(found))
    return sorted(found)


def _depends(names: Sequence[str]) -> list[str]:
    said = _output("apt-cache", "depends", "--important", *names)
    return re.findall(r"^\s*\|?(?:Pre)?Depends: ([a-z0-9][^\s<>]*)$", said, re.M)


def _versions(names: Sequence[str]) -> dict[str, str]:
    """Candidate versions; a name without one (virtual, or an alternative nobody ships) drops out."""
    versions: dict[str, str] = {}
    name = ""
    for line in _output("apt-cache", "policy", *names).splitlines():
        if line and not line.startswith(" "):
            name = line.rstrip(":")
        elif "Candidate:" in line and not line.endswith("(none)"):
            versions[name] = line.split()[-1]
    return versions


def _make_trees(versions: dict[str, str]) -> str:
    debs = cache() / "debs"
    debs.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache()) as scratch:
        root = Path(scratch) / "debian"
        _unpack(debs, versions, root)
        debian = Debian(root)
        trees = {name: Path(scratch) / name for name in TREES}
        make_base(debian, trees["lab-base"])
        release = make_kernel(debian, trees["lab-kernel"])
        make_tools(debian, trees["lab-tools"])
        make_python(debian, trees["lab-python"])
        lines = [f'  {name} = "{_add(name, tree)}";' for name, tree in trees.items()]
    return "\n".join(
        [
            "# Written by the lab's setup.",
            "{",
            *lines,
            f'  kernelRelease = "{release}";',
            f'  version = "{versions["nix-bin"].split("-")[0]}";',
            "}",
            "",
        ]
    )


def _unpack(debs: Path, versions: dict[str, str], root: Path) -> None:
    # A version's colon is escaped in file names.
    names = {name: f"{name}_{version.replace(':', '%3a')}_" for name, version in versions.items()}
    missing = [name for name, start in names.items() if not any(debs.glob(start + "*.deb"))]
    if missing:
        # As root apt downloads as its own user, who cannot get at a folder below root's home.
        with tempfile.TemporaryDirectory(dir="/var/tmp") as fresh:
            if os.geteuid() == 0:
                with contextlib.suppress(LookupError):
                    shutil.chown(fresh, "_apt")
            got = subprocess.run(
                ["apt-get", "-q", "download", *missing], cwd=fresh, check=False, stdout=subprocess.DEVNULL
            )
            if got.returncode != 0:
                raise SystemExit(
                    "apt could not download the lab's packages; run `apt-get update` as root, and try again"
                )
            for deb in Path(fresh).glob("*.deb"):
                shutil.copyfile(deb, debs / deb.name)
    for start in names.values():
        (deb,) = debs.glob(start + "*.deb")
        subprocess.run(["dpkg-deb", "-x", deb, root], check=True)


class Debian:
    """A tree of unpacked packages, whether they still use /bin and /lib or /usr only."""

    def __init__(self, root: Path) -> None:
        self.root = root
        files = [path for path in root.rglob("*") if path.is_file() or path.is_symlink()]
        self.by_name: dict[str, list[Path]] = {}
        for path in files:
            self.by_name.setdefault(path.name, []).append(path)
        (self.loader,) = {self.real(path) for path in self.by_name["ld-linux-x86-64.so.2"]}
        self.busybox = self.find("busybox", within="bin/")
        self.libraries = sorted({str(path.parent) for path in files if re.search(r"^lib.*\.so(\.|$)", path.name)})

    @property
    def python(self) -> list[Path]:
        """The interpreter, and the modules of its standard library that load libraries of the system."""
        (program,) = (path for path in (self.root / "usr/bin").iterdir() if re.fullmatch(r"python3\.\d+", path.name))
        modules = self.root / f"usr/lib/{program.name}/lib-dynload"
        return [program, *(path for name in ("_hashlib", "_ssl") for path in modules.glob(f"{name}.*.so"))]

    def applets(self) -> list[str]:
        """The names by which busybox is called."""
        return _output(str(self.busybox), "--list").split()

    def real(self, path: Path) -> Path:
        """The file behind a symlink, under one name; an absolute link of the tree points into the tree."""
        while path.is_symlink():
            target = path.readlink()
            if target.is_absolute():
                inside = self.root / target.relative_to("/")
                path = inside if inside.exists() or inside.is_symlink() else self.find(target.name)
            else:
                path = Path(os.path.normpath(path.parent / target))  # Debian 13 links through `..`
        return path

    def find(self, name: str, *, within: str = "") -> Path:
        found = [
            path
            for path in self.by_name.get(name, [])
            if within in str(path)
            and not str(path).startswith(f"{self.root}/usr/share/doc")
            and not re.search("/(bash-completion|initramfs-tools|lintian|locale)/", str(path))
        ]
        if not found:
            raise RuntimeError(f"no {name} in the unpacked packages: has Debian moved it?")
        return self.real(min(found, key=lambda path: ("bin" not in path.parent.name, str(path))))

    def needs(self, program: Path) -> dict[str, Path]:
        """The libraries that `program` loads, by the name it asks for, as the tree's own loader finds them."""
        listed = subprocess.run(
            [self.loader, "--library-path", ":".join(self.libraries), "--list", program],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        # The loader itself is listed under its absolute name; it is copied apart.
        found = {name: Path(path) for name, path in re.findall(r"^\s*([^/\s]+) => (/\S+)", listed, re.M)}
        if strangers := [path for path in found.values() if not path.is_relative_to(self.root)]:
            raise RuntimeError(f"{program.name} would load {strangers} of this machine instead of the packages'")
        return found


def make_base(debian: Debian, base: Path) -> None:
    """What a guest sees as /usr."""
    programs = {f"bin/{name}": debian.find(name, within="bin/") for name in PROGRAMS}
    openssh = [
        p
        for p in (debian.root / "usr/lib/openssh").iterdir()
        if p.is_file() and not p.name.startswith(("ssh-pkcs11", "ssh-sk", "agent"))
    ]
    programs |= {f"lib/openssh/{path.name}": path for path in openssh}
    sudo = debian.find("sudoers.so").parent
    programs |= {
        f"{sudo.relative_to(debian.root / 'usr')}/{path.name}": debian.real(path) for path in sudo.glob("*.so*")
    }
    programs |= {f"lib/x86_64-linux-gnu/security/{name}": debian.find(name) for name in PAM_MODULES}
    for name, path in programs.items():
        _copy(path, base, name)
    # Most of what a guest does is to start small programs: an emulated machine starts a static one in a quarter.
    _copy(debian.busybox, base, "bin/busybox")
    # Loaded by name at run time, so nobody lists them: by a thread that ends, and by a look-up of a host.
    libraries = {
        name: debian.find(name) for name in debian.by_name if re.match(r"(libgcc_s|libnss_dns|libnss_files)\.so", name)
    }
    for path in (*programs.values(), *debian.python):
        if _is_elf(path):
            libraries |= debian.needs(path)
    for name, path in libraries.items():
        if not path.is_relative_to(sudo):
            _copy(debian.real(path), base, f"lib/x86_64-linux-gnu/{name}")
    _copy(debian.loader, base, "lib64/ld-linux-x86-64.so.2")
    for command in NIX_COMMANDS:
        _link(base / "bin" / command, "nix")
    _link(base / "sbin", "bin")
    for applet in debian.applets():
        if not (base / "bin" / applet).exists():
            _link(base / "bin" / applet, "busybox")


def make_kernel(debian: Debian, tree: Path) -> str:
    """The kernel, and modules with the order to load them in. Returns the kernel's release."""
    (image,) = debian.root.glob("boot/vmlinuz-*")
    release = image.name.removeprefix("vmlinuz-")
    _copy(image, tree, "vmlinuz")
    modules = {
        re.sub(r"\.ko.*", "", name).replace("-", "_"): paths[0]
        for name, paths in debian.by_name.items()
        if re.search(r"\.ko(\.xz)?$", name)
    }
    order: list[str] = []

    def load(name: str) -> None:
        if name in order or name not in modules:
            return
        path = modules[name]
        data = path.read_bytes() if path.suffix == ".ko" else lzma.decompress(path.read_bytes())
        needed = re.search(rb"\0depends=([^\0]*)\0", data)
        for dependency in needed[1].decode().split(",") if needed else []:
            load(dependency.replace("-", "_"))
        order.append(name)
        _write_bytes(tree / "lib/modules" / release / f"{name}.ko", data)

    for name in MODULES:
        load(name)
    _write(tree / "lib/modules" / release / "load-order", "\n".join(order) + "\n")
    return release


def make_tools(debian: Debian, tools: Path) -> None:
    """What builders run: nothing in it looks at the machine that builds."""
    _copy(debian.busybox, tools, "bin/busybox")
    for applet in debian.applets():
        if applet != "busybox":
            _link(tools / "bin" / applet, "busybox")
    _copy(debian.loader, tools, "lib/ld.so")
    libraries = {"libgcc_s.so.1": debian.find("libgcc_s.so.1")}  # loaded by name, when a thread ends
    for name in TOOLS:
        path = debian.find(name, within="bin/")
        (tools / "bin" / name).unlink(missing_ok=True)
        _copy(path, tools, f"bin/{name}")
        libraries |= debian.needs(path)
    for library, file in libraries.items():
        _copy(debian.real(file), tools, f"lib/{library}")


def make_python(debian: Debian, tree: Path) -> None:
    """Python and its standard library. (Without bytecode a first start takes an emulated machine seconds.)"""
    program = debian.python[0]
    _copy(program, tree, "bin/python3")
    library = debian.root / "usr/lib" / program.name
    for path in sorted(library.rglob("*")):
        if path.is_file() and not any(each in path.parts for each in ("__pycache__", "test", "ensurepip", "idlelib")):
            _copy(path, tree, f"lib/{program.name}/{path.relative_to(library)}")
    run: list[str | Path] = [
        debian.loader,
        "--library-path",
        ":".join(debian.libraries),
        program,
        "-IS",
        "-m",
        "compileall",
        "-q",
    ]
    subprocess.run(
        [*run, "--invalidation-mode", "unchecked-hash", "-s", tree, "-p", "/", tree / "lib"],
        check=True,
        env={"PYTHONHOME": str(debian.root / "usr"), "PYTHONHASHSEED": "0", "SOURCE_DATE_EPOCH": "1"},
    )


def _add(name: str, tree: Path) -> str:
    """Adds the tree to the store under that name, keeps it from the garbage collector; returns its hash."""
    path = _output("nix-store", "--add-fixed", "--recursive", "sha256", str(tree), env=environment()).strip()
    _output("nix-store", "--add-root", str(_root(name)), "--indirect", "--realise", path, env=environment())
    return _output("nix-hash", "--type", "sha256", "--base32", str(tree), env=environment()).strip()


def _root(name: str) -> Path:
    roots = cache() / "roots"
    roots.mkdir(parents=True, exist_ok=True)
    return roots / name


def _roots_are_valid() -> bool:
    links = [_root(name) for name in TREES]
    if not all(link.exists() for link in links):
        return False
    paths = [str(link.readlink()) for link in links]
    checked = subprocess.run(
        ["nix-store", "--check-validity", *paths], env=environment(), capture_output=True, check=False
    )
    return checked.returncode == 0


def _publish(pinned: Path) -> None:
    """Copies `nix/lab` with the hashes; leaves the directory alone when it is already right."""
    wanted = {path.relative_to(SOURCE): path.read_bytes() for path in SOURCE.rglob("*") if path.is_file()}
    wanted |= {
        Path("flying-monkey") / path.relative_to(ROOT): path.read_bytes()
        for path in (ROOT / "nix/flying-monkey.nix", *(ROOT / "flying_monkey").iterdir())
        if path.suffix in (".nix", ".py", ".sh")
    }
    wanted[Path("pinned.nix")] = pinned.read_bytes()
    have = {path.relative_to(nixpkgs()): path.read_bytes() for path in nixpkgs().rglob("*") if path.is_file()}
    if wanted == have:
        return
    # Two set-ups at once must not leave half a tree: each makes its own and renames it into place.
    fresh = Path(tempfile.mkdtemp(dir=cache(), prefix="nixpkgs-"))
    for name, data in wanted.items():
        _write_bytes(fresh / name, data)
        (fresh / name).chmod(0o755 if name.suffix == ".sh" else 0o644)
    fresh.chmod(0o755)
    if nixpkgs().exists():
        old = Path(tempfile.mkdtemp(dir=cache(), prefix="old-"))
        nixpkgs().rename(old / "nixpkgs")
        fresh.rename(nixpkgs())
        shutil.rmtree(old)
    else:
        fresh.rename(nixpkgs())


def _is_elf(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"\x7fELF"


def _copy(source: Path, tree: Path, name: str) -> None:
    """Copies a file into a tree of ours. As root a name that leads out of the tree (`tree / "/lib/x"` is
    "/lib/x") would overwrite a library of this very machine, so it is refused, and nothing is written over."""
    target = tree / name
    if not target.is_relative_to(tree) or ".." in target.parts or target.exists():
        raise ValueError(f"{target} is not a new file of {tree}")
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.parent.resolve().is_relative_to(tree.resolve()):
        raise ValueError(f"{target} leads out of {tree} through a link")
    shutil.copyfile(source, target, follow_symlinks=True)
    target.chmod(0o755)


def _link(link: Path, target: str) -> None:
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(target)


def _write(path: Path, text: str) -> None:
    _write_bytes(path, text.encode())


def _write_bytes(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    fresh.write_bytes(data)
    fresh.rename(path)


def _output(*argv: str, env: dict[str, str] | None = None) -> str:
    return subprocess.run(argv, check=True, stdout=subprocess.PIPE, text=True, env=env).stdout


def tree_size(paths: Iterable[Path]) -> int:
    """Bytes of all regular files below the paths."""
    return sum(
        file.stat().st_size for path in paths for file in path.rglob("*") if file.is_file() and not file.is_symlink()
    )
