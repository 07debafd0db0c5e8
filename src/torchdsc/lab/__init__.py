"""The laboratory: experiments, the tasks that their runs train for, data, training, the budget solver and figures."""

from importlib.util import find_spec

# Looked for, not imported: the command line shows its help before they load.
_NEEDED = (
    *("accelerate", "filelock", "jinja2", "matplotlib", "numpy", "peft", "psutil", "pydantic", "rich", "scipy"),
    *("tokenizers", "transformers", "yaml"),
)
_missing = [name for name in _NEEDED if find_spec(name) is None]
if _missing:
    raise ImportError(f"torchdsc.lab needs {', '.join(_missing)}: pip install 'torchdsc[lab]'")
