"""Which models a cache was made with: digests of local files, the commit of a hub's; no model is loaded to tell."""

import hashlib
from functools import lru_cache
from pathlib import Path

from common.errors import UserError, first_line
from common.files import MODEL_FILES, digest
from models.family import Family


def encoder_identities(family: Family) -> dict[str, str]:
    """For each part that a cache's content depends on (VAE, text encoders, tokenizers): "sha256:..." of a local folder's
    files, "hub:..." the commit. Raises UserError."""
    return {part: identity(*source) for part, source in family.encoder_sources().items()}


def identity(name: str, subfolder: str | None, revision: str | None, cache_dir: str | None) -> str:
    folder = Path(name, subfolder or "")
    if not Path(name).exists():
        return f"hub:{hub_commit(name, subfolder, revision, cache_dir)}"
    sha = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        if file.is_file() and file.suffix in MODEL_FILES:
            status = file.stat()
            sha.update(f"{file.relative_to(folder).as_posix()} {_digest(file, status.st_size, status.st_mtime_ns)}".encode())
    return f"sha256:{sha.hexdigest()}"


@lru_cache(maxsize=None)
def _digest(path: Path, size: int, modified: int) -> str:
    """size and modified only say when the file has changed."""
    return digest(path)


@lru_cache(maxsize=None)
def hub_commit(name: str, subfolder: str | None, revision: str | None, cache_dir: str | None) -> str:
    """The commit of a hub's model, from where one of its configs is kept: so it is known without a network, too."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    problem = None
    for file in ("config.json", "tokenizer_config.json"):
        try:
            kept = hf_hub_download(name, file, subfolder=subfolder, revision=revision, cache_dir=cache_dir)
            return Path(kept).parts[-3 if subfolder else -2]
        except EntryNotFoundError as error:  # a tokenizer has the second file alone
            problem = error
        except Exception as error:  # the network's and the hub's failures are of many kinds
            raise UserError(f"cannot tell which version of {name} the hub gives ({first_line(error, 160)}): check the name, "
                            "and the network") from None
    raise UserError(f"cannot tell which version of {name} the hub gives: it has no config of {subfolder or 'the model'}, or "
                    f"cannot be reached ({first_line(problem, 160)})")
