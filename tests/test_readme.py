"""The README is held to what it says: its commands, options, files and folders exist and are what CI runs."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import lampworks

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
LINES = [shlex.split(line, comments=True) for block in BLOCKS for line in block.splitlines() if line.strip()]


def test_the_two_commands_come_first():
    assert [words for words in LINES[:2]] == [["make", "demo"], ["make", "test"]]


def test_every_make_verb_exists_and_sets_up_first():
    makefile = (ROOT / "Makefile").read_text()
    verbs = {words[1] for words in LINES if words[0] == "make"}
    assert {"demo", "test", "check"} <= verbs
    for verb in verbs - {"help"}:
        assert re.search(rf"^{verb}:.*\bsetup\b", makefile, re.MULTILINE), verb


def test_make_demo_and_make_test_do_what_the_readme_says():
    dry = {
        v: subprocess.run(["make", "-n", v], cwd=ROOT, capture_output=True, text=True).stdout for v in ("demo", "test")
    }
    assert ".venv/bin/lampworks demo" in dry["demo"]
    assert '.venv/bin/pytest -m "not slow and not gpu"' in dry["test"]


def test_ci_runs_the_readme_test_command():
    script = (ROOT / ".ci" / "run").read_text()
    assert "make test\n" in script


COMMANDS = [words for words in LINES if words[0] == "lampworks"] + [
    shlex.split(text.replace(".venv/bin/", "")) for text in re.findall(r"`(\.venv/bin/lampworks [^`]+)`", README)
]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_line_is_accepted(words, monkeypatch):
    """Parsed by the real parser; only the work itself is left out."""
    seen = []
    monkeypatch.setattr(lampworks, "_load_function", lambda name: seen.append)
    lampworks._run(words[1], words[2:])
    assert seen


def test_every_command_is_in_the_readme():
    named = {words[1] for words in COMMANDS}
    assert named >= {"record", "curate", "train", "tokenize", "evaluate", "report", "serve", "show", "demo"}


def test_folders_and_files_of_the_house_exist():
    tree = README.split("## The house")[1].split("```")[1]
    for line in tree.strip().splitlines():
        assert (ROOT / line.split()[0]).exists(), line


def test_docs_that_are_named_exist_and_stay_short():
    for name in README.split("docs/ ")[1].splitlines()[0].split(","):
        page = ROOT / "docs" / f"{name.strip()}.md"
        assert len(page.read_text().splitlines()) < 200, page


def test_command_line_errors_are_one_sentence(tmp_path):
    command = [Path(sys.executable).parent / "lampworks"]
    cases = {
        ("traain",): "did you mean train",
        ("evaluate", "nothing", "--home", str(tmp_path)): "no artifact 'nothing'",
        ("curate", str(tmp_path / "gone"), "--home", str(tmp_path)): "gone",
        ("train", "--preset", "nope"): "no preset 'nope'",
        ("train", "--config", str(tmp_path / "x.toml")): "can't be read",
        ("show", "nope", "--home", str(tmp_path)): "no artifact 'nope'",
    }
    for words, message in cases.items():
        done = subprocess.run([*command, *words], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 2, (words, done.stderr)
        last = done.stderr.strip().splitlines()[-1]
        assert last.startswith("lampworks: "), (words, done.stderr)
        assert message in last, (words, last)
        assert "Traceback" not in done.stderr


def test_a_toml_file_lies_under_the_options(tmp_path):
    from pipelines.config import RecordConfig

    file = tmp_path / "record.toml"
    file.write_text("episodes = 7\nseed = 3\nrates_fps = [20]\n")
    config = lampworks.read_config(RecordConfig, "record", ["--config", str(file), "--seed", "5"])
    assert (config.episodes, config.seed, config.rates_fps) == (7, 5, (20,))
    file.write_text("epsodes = 7\n")
    with pytest.raises(ValueError, match="did you mean episodes"):
        lampworks.read_config(RecordConfig, "record", ["--config", str(file)])


def test_a_preset_lies_under_the_file_and_the_options(tmp_path):
    from pipelines.presets import demo_path
    from pipelines.train_config import TrainConfig

    file = tmp_path / "train.toml"
    file.write_text("steps = 9\n[optimizer]\nlr = 1e-4\nfinal_lr = 1e-5\n")
    words = ["world", "--preset", "demo-world", "--config", str(file), "--seed", "5"]
    config = lampworks.read_config(TrainConfig, "train", words)
    assert (config.steps, config.seed, config.optimizer.lr, config.stage) == (9, 5, 1e-4, "world")
    assert config.model == demo_path().world.model
