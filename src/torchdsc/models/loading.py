"""A file beside saved weights by which Auto classes load DSCGPT without an import of torchdsc.models."""

from os import PathLike
from pathlib import Path

MODULE = "modeling_dsc_gpt"
# The entry of config.json for it.
AUTO_MAP = {
    "AutoConfig": f"{MODULE}.DSCGPTConfig",
    "AutoModel": f"{MODULE}.DSCGPTModel",
    "AutoModelForCausalLM": f"{MODULE}.DSCGPTForCausalLM",
}
_SOURCE = '''"""Where Auto classes find DSCGPT, given trust_remote_code=True: in torchdsc, which must be installed."""

from torchdsc.models import DSCGPTConfig, DSCGPTForCausalLM, DSCGPTModel  # noqa: F401
'''


def write_module(folder: str | PathLike[str]) -> None:
    """Write the file that ``AUTO_MAP`` names into ``folder``, which is created if missing."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    Path(folder, f"{MODULE}.py").write_text(_SOURCE, encoding="utf-8")
