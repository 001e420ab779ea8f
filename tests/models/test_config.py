import json
import subprocess
import sys

import pytest

from models.config import ModelError, WorldConfig, config_from_dict, config_to_dict


def test_settings_survive_json():
    config = WorldConfig()
    assert config_from_dict(WorldConfig, json.loads(json.dumps(config_to_dict(config)))) == config


def test_unknown_settings_are_named_with_a_suggestion():
    with pytest.raises(ModelError, match="config.dynamics has no setting 'masknig'; did you mean 'masking'"):
        config_from_dict(WorldConfig, {"dynamics": {"masknig": "ctf"}})
    with pytest.raises(ModelError, match="known are fps, tokenizer"):
        config_from_dict(WorldConfig, {"zzz": 1})


def test_settings_are_light():
    code = "import models.config, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
