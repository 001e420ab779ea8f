"""The doctor sees what is missing and names the fix."""

import logging
import os

from infra import doctor
from infra.config import DoctorConfig


def test_this_machine_is_fit_for_the_tests():
    """CI skips no test for want of a program, so every one must be here."""
    assert doctor.missing_programs() == []
    assert all(finding.well for finding in doctor.examine() if finding.what.startswith(("Python", "package")))


def test_a_missing_program_is_named_with_its_fix(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert {p.command for p in doctor.missing_programs()} == {p.command for p in doctor.PROGRAMS}
    with caplog.at_level(logging.INFO):
        assert doctor.run(DoctorConfig()) == 1
    for program in doctor.PROGRAMS:
        assert f"MEND {program.command}: missing -> apt-get install {program.package}" in caplog.text


def test_installing_without_root_or_apt_only_names_what_is_missing(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("PATH", str(tmp_path))
    with caplog.at_level(logging.INFO):
        assert doctor.run(DoctorConfig(install=True)) == 0
    assert "missing: chromium" in caplog.text
    assert os.listdir(tmp_path) == []
