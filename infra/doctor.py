"""Checks this machine and says the fix: `lampworks doctor`, or `python -m infra.doctor --install` from make setup."""

import importlib.util
import logging
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from infra.config import DoctorConfig

log = logging.getLogger("infra.doctor")

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Program:
    """A program that pip can't bring."""

    command: str
    package: str
    """Debian's package."""
    used_for: str


PROGRAMS = (
    Program("chromium", "chromium", "browser tests of the player page"),
    Program("ffprobe", "ffmpeg", "tests that read stored clips with another reader; curation benchmarks"),
    Program("redis-server", "redis-server", "tests of the session store on Redis"),
)


@dataclass(frozen=True)
class Finding:
    """One thing looked at: whether it is well, what was seen, and what to do."""

    well: bool
    what: str
    fix: str = ""


def missing_programs() -> list[Program]:
    """Those of PROGRAMS that are not on the PATH."""
    return [p for p in PROGRAMS if shutil.which(p.command) is None]


def install_programs() -> list[Program]:
    """Installs what is missing with apt where this runs as root; returns what is missing afterwards."""
    missing = missing_programs()
    if missing and os.geteuid() == 0 and shutil.which("apt-get"):
        names = [p.package for p in missing]
        log.info("installing %s with apt-get", ", ".join(names))
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for words in (["update", "-qq"], ["install", "-qq", "-y", "--no-install-recommends", *names]):
            subprocess.run(["apt-get", *words], env=environment, stdout=subprocess.DEVNULL, check=False)
    return missing_programs()


def examine() -> list[Finding]:
    """Looks at Python, where the packages resolve from, programs, memory and disk."""
    findings = [Finding(sys.version_info[:2] == (3, 11), f"Python {sys.version.split()[0]}", "use Python 3.11")]
    for name in ("models", "pipelines", "serving", "infra"):
        spec = importlib.util.find_spec(name)
        origin = Path(spec.origin).resolve() if spec and spec.origin else None
        ours = origin is not None and origin.parent.parent == ROOT
        findings.append(Finding(ours, f"package {name} from {origin}", f"another {name!r} comes first on sys.path"))
    for program in PROGRAMS:
        found = shutil.which(program.command)
        fix = f"apt-get install {program.package} ({program.used_for})"
        findings.append(Finding(found is not None, f"{program.command}: {found or 'missing'}", fix))
    games = importlib.util.find_spec("procgen") is not None
    findings.append(Finding(games, f"procgen: {'installed' if games else 'missing'}", "make setup (lampworks record)"))
    free = shutil.disk_usage(ROOT).free
    findings.append(Finding(free > 5 * 2**30, f"{free / 2**30:.0f} GiB of disk free", "free 5 GiB for the demo"))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    findings.append(Finding(memory > 7 * 2**30, f"{memory / 2**30:.0f} GiB of memory", "the demo wants 8 GiB"))
    return findings


def run(config: DoctorConfig) -> int:
    """A line for every finding, or the installation of what is missing; returns the exit code."""
    if config.install:
        for program in install_programs():
            log.warning("missing: %s (%s): install Debian's %s", program.command, program.used_for, program.package)
        return 0
    findings = examine()
    for finding in findings:
        fix = "" if finding.well else f" -> {finding.fix}"
        log.info("%s %s%s", "ok  " if finding.well else "MEND", finding.what, fix)
    return 0 if all(f.well for f in findings) else 1


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    sys.exit(run(DoctorConfig(install="--install" in sys.argv)))
