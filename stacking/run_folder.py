"""A run's folder: what lies where, and whether a command may write into it."""

import difflib
import errno
import fcntl
import hashlib
import json
import warnings
from pathlib import Path

from data_prep.plain_files import read_plain
from data_prep.shard_format import MANIFEST
from stacking.config import Recipe
from stacking.config_loading import resolved_json
from stacking.errors import CheckpointError, ConfigError

BRANCHES = "branches"  # folder in a run's folder, of runs that began as this one
TOKENIZER_FILES = ("tokenizer.json", "vocab.txt")
_EARLY = (".lock", ".recipe.json.tmp")  # what a start that was killed at once may leave
# Lustre without its mount option "flock", NFS without a lock service, some FUSE file systems.
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)


def recipe_sha256(recipe: Recipe) -> str:
    """Digest of what is trained; cosmetic fields, saving and branches do not count."""
    others = {"name", "description", "checkpoint", "branches", "growth_branches"}
    trained = recipe.model_dump(mode="json", exclude=others)
    return hashlib.sha256(json.dumps(trained, sort_keys=True).encode()).hexdigest()


class RunFolder:
    """Paths inside RUN_DIR and the rules of writing there."""

    def __init__(self, path: Path) -> None:
        """`path`: RUN_DIR; nothing is made yet."""
        self.path = path
        self.recipe = path / "recipe.json"
        self.deepspeed = path / "deepspeed.json"
        self.metrics = path / "metrics.jsonl"
        self.log = path / "log.txt"
        self.checkpoints = path / "checkpoints"
        self.autopsy = path / "autopsy"
        self.tokenizer = path / "tokenizer"
        self.manifest = path / MANIFEST
        self.rewound = path / "rewound.txt"

    def check(self, recipe: Recipe, resume: str) -> None:
        """Refuse another recipe's folder, a stranger's folder, and overwriting. Reads only."""
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"--run-dir {self.path}: is a file; give a folder")
        has_files = self.path.is_dir() and any(p.name not in _EARLY for p in self.path.iterdir())
        if has_files and not self.recipe.exists():
            raise ConfigError(
                f"--run-dir {self.path}: holds files but no recipe.json, so it is no run of this "
                "trainer; give an empty or new folder"
            )
        if not self.recipe.exists():
            if resume not in ("auto", "never"):
                raise CheckpointError(f"--resume {resume}: {self.path} holds no run yet")
            return
        if resume == "never" and self.has_begun():
            raise ConfigError(
                f"--run-dir {self.path}: holds a run already and --resume never was given; runs "
                "are never overwritten: give another folder, or --resume auto to continue"
            )
        if self.has_begun():
            self._check_same_recipe(recipe)

    def has_begun(self) -> bool:
        """Whether there is anything to continue: a fault before the first save leaves nothing."""
        return any(self.checkpoints.glob("[!.]*/COMMITTED"))

    def was_rewound_to(self, tag: str) -> bool:
        """Whether the run's last --resume TAG was this one: a requeued job repeats its command."""
        return self.rewound.is_file() and self.rewound.read_text().strip() == tag

    def note_rewind(self, tag: str) -> None:
        """Remember that the run went back to `tag`. Main rank only."""
        write_text(self.rewound, tag + "\n")

    def own_recipe(self) -> Recipe:
        """What lies in recipe.json; ConfigError if that is none."""
        try:
            return Recipe.model_validate_json(read_plain(self.recipe))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{self.recipe}: is not a recipe of this version: {error}") from error

    def _check_same_recipe(self, recipe: Recipe) -> None:
        old = self.own_recipe()
        if recipe_sha256(old) == recipe_sha256(recipe):
            return
        changes = difflib.unified_diff(
            old.model_dump_json(indent=1).splitlines(),
            recipe.model_dump_json(indent=1).splitlines(), "run", "given", n=0, lineterm="",
        )  # fmt: skip
        lines = [
            line.strip() for line in changes
            if line[0] in "+-" and line[:3] not in ("+++", "---")
        ]  # fmt: skip
        raise ConfigError(
            f"--run-dir {self.path}: holds a run of another recipe; give another folder, or the "
            "run's own recipe to continue. Different: " + "; ".join(lines[:12])
        )

    def create(self, recipe: Recipe, data_dir: Path) -> None:
        """Make and lock the folder, with its recipe, tokenizer and what its data says of itself.

        Main rank only.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock()
            if self.has_begun():
                self._check_same_tokenizer(data_dir)
                return
            write_text(self.recipe, resolved_json(recipe))
            self.tokenizer.mkdir(exist_ok=True)
            for name in TOKENIZER_FILES:
                if (data_dir / name).exists():
                    (self.tokenizer / name).write_bytes(read_plain(data_dir / name))
            if (data_dir / MANIFEST).exists():
                self.manifest.write_bytes(read_plain(data_dir / MANIFEST))
            else:
                self.manifest.unlink(missing_ok=True)  # of a start that got no further
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> ConfigError:
        return ConfigError(
            f"--run-dir {self.path}: cannot be written: {error}; free some space, make it writable "
            "or give another folder"
        )

    def _check_same_tokenizer(self, data_dir: Path) -> None:
        for name in TOKENIZER_FILES:
            ours, theirs = self.tokenizer / name, data_dir / name
            if ours.exists() and theirs.exists() and read_plain(ours) != read_plain(theirs):
                raise ConfigError(
                    f"--data {data_dir}: its {name} is not the one this run began with; give the "
                    "run's own data, or another --run-dir"
                )

    def _lock(self) -> None:
        """Keep other runs out of this folder for as long as this process lives.

        On NFS also those of other hosts. A file system without locks is told of once.
        """
        self._lock_file = (self.path / ".lock").open("a")
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"--run-dir {self.path}: another process is training there; wait for it or stop it"
            ) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            warnings.warn(
                f"--run-dir {self.path}: its file system has no locks ({error.strerror}), so "
                "nothing keeps a second job out of it: see to it that there is none",
                stacklevel=2,
            )

    def write_deepspeed(self, stages: list[dict[str, object]]) -> None:
        """The JSON that DeepSpeed got, one object a stage. Main rank only."""
        try:
            write_text(self.deepspeed, json.dumps({"stages": stages}, indent=1) + "\n")
        except OSError as error:
            raise self._unwritable(error) from error


def write_text(path: Path, text: str) -> None:
    """Write by rename: a reader sees the old file or the whole new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(text)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
